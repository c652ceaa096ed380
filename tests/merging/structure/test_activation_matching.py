"""Activation matching: planted permutations, each statistic by its formula, streams of any size."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import numpy
import pytest
import small_llama
import torch
from structure_configs import CONFIGS
from torch import nn

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.errors import MergeError, UserError
from evomerge.merging.fitted.calibration import Example
from evomerge.merging.fitted.gram import even_batches
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.architectures.trial_network import TrialNetwork
from evomerge.merging.structure.permutations.activations import Live, activation_matching
from evomerge.merging.structure.permutations.linear_layers import modules_of
from evomerge.merging.structure.permutations.permutation import (
    Bind,
    Group,
    Spec,
    apply,
    identity,
    inverse,
    random_permutations,
)
from evomerge.merging.structure.permutations.units import blocks

STATISTICS = ["correlation", "inner", "distance"]
MIXTURES = ("mixtral", "moe", "deepseek", "switch")
DENSE = [name for name in CONFIGS if not any(kind in name for kind in MIXTURES)]


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in second)


def live(network, state):
    """A network of its own, with these weights."""
    own = copy.copy(network)
    own.model = copy.deepcopy(network.model)
    own.__dict__["_live"] = {k: t.detach() for k, t in own.model.state_dict(keep_vars=True).items()}
    return Live(modules_of(own.model, own.shapes), lambda batch: own.compute(state))


@pytest.mark.parametrize(
    ("name", "statistic"),
    [(name, "correlation") for name in DENSE]
    + [(name, statistic) for name in ("llama", "bert", "resnet") for statistic in STATISTICS[1:]],
)
def test_planted_permutations_are_recovered(name, statistic):
    network = TrialNetwork(CONFIGS[name])
    spec, state = network.spec, network.random_state()
    p = random_permutations(spec, torch.Generator().manual_seed(1))
    a, b = live(network, state), live(network, apply(spec, state, p))
    found = activation_matching(spec, a, b, [None], statistic=statistic)
    assert same(found.permutations, inverse(spec, p))


@pytest.mark.parametrize(
    ("name", "roles"), [("mixtral", ("experts", "neurons")), ("switch", ("neurons",))]
)
def test_what_is_inside_experts_keeps_its_order_and_all_else_is_found(name, roles):
    """Experts themselves are found where their router is a linear layer."""
    network = TrialNetwork(CONFIGS[name])
    spec, state = network.spec, network.random_state()
    p = random_permutations(spec, torch.Generator().manual_seed(1))
    kept = {g.name: torch.arange(g.size) for g in spec.groups if g.role in roles}
    a, b = live(network, state), live(network, apply(spec, state, p | kept))
    found = activation_matching(spec, a, b, [None])
    assert same(found.permutations, inverse(spec, p | kept))
    assert not kept.keys() & found.similarity.keys()


@pytest.fixture
def layers():
    """Two layers apart, a group between them, and data."""
    torch.manual_seed(0)
    first, second = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double() for _ in range(2)
    )
    binds = (
        Bind("0.weight", 0, blocks(4)),
        Bind("0.bias", 0, blocks(4)),
        Bind("2.weight", 1, blocks(4)),
    )
    return first, second, Spec((Group("hidden", "mlp", 4, binds),)), torch.randn(20, 3).double()


def plain(model):
    return Live({f"{path}.weight": module for path, module in model.named_modules()}, model)


def formula(statistic, x, y):
    if statistic == "correlation":
        return numpy.corrcoef(x.T, y.T)[:4, 4:]
    if statistic == "inner":
        return x.T @ y / len(x)
    return -((x[:, :, None] - y[:, None, :]) ** 2).mean(0)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_similarity_is_the_formula_however_the_data_is_cut(layers, statistic):
    a, b, spec, data = layers
    found = activation_matching(spec, plain(a), plain(b), [data], statistic=statistic)
    with torch.no_grad():
        before = [m[0](data).numpy() for m in (a, b)]
        after = [m[1](m[0](data)).numpy() for m in (a, b)]
    table = formula(statistic, *before) + formula(statistic, *after)
    wanted = torch.from_numpy(table)[torch.arange(4), found.permutations["hidden"]]
    torch.testing.assert_close(found.similarity["hidden"], wanted)
    cut = activation_matching(spec, plain(a), plain(b), data.split(3), statistic=statistic)
    assert same(cut.permutations, found.permutations)
    torch.testing.assert_close(cut.similarity["hidden"], found.similarity["hidden"])


def test_no_sweep_loses_and_a_network_matches_itself_as_it_is():
    network = TrialNetwork(CONFIGS["llama"])
    spec = network.spec
    a, b = (live(network, network.random_state(seed)) for seed in (1, 2))
    found = activation_matching(spec, a, b, [None])
    assert found.sweeps > 0
    assert all(after > before for before, after in itertools.pairwise(found.objective))
    itself = activation_matching(spec, a, live(network, network.random_state(1)), [None])
    assert same(itself.permutations, identity(spec))


def test_a_unit_that_never_changes_is_like_no_other(layers):
    a, b, spec, data = layers
    with torch.no_grad():
        a[0].weight[1] = 0
    found = activation_matching(spec, plain(a), plain(b), [data])
    assert float(found.similarity["hidden"][1]) == 0
    assert bool((found.similarity["hidden"][[0, 2, 3]] != 0).all())


def test_a_causal_model_on_calibration_batches(tmp_path):
    trial = TrialNetwork(CONFIGS["llama"], dtype=torch.float32)
    spec, state = trial.spec, trial.random_state()
    trial.write(state)
    trial.model.save_pretrained(tmp_path)
    small_llama.tokenizer().save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    p = random_permutations(spec, torch.Generator().manual_seed(2))
    networks = Network(checkpoint), Network(checkpoint)
    for name, tensor in apply(spec, state, p).items():
        networks[1].write(name, tensor)
    a, b = (Live(modules_of(n.model, trial.shapes), n.logits) for n in networks)
    words = torch.Generator().manual_seed(0)
    tokens = [torch.randint(1, 40, (n,), generator=words).tolist() for n in (9, 9, 7, 12)]
    batches = even_batches([Example(tuple(t)) for t in tokens], 2)
    found = activation_matching(spec, a, b, batches)
    assert same(found.permutations, inverse(spec, p))


def test_no_data_and_no_layers_are_refused(layers):
    a, b, spec, data = layers
    with pytest.raises(UserError, match="no batch to match activations on"):
        activation_matching(spec, plain(a), plain(b), [])
    with pytest.raises(MergeError, match="match them by weights"):
        activation_matching(spec, replace(plain(a), modules={}), plain(b), [data])
    assert same(activation_matching(spec, plain(a), plain(a), [data]).permutations, identity(spec))
