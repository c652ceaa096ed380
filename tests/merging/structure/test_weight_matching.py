"""Weight matching: planted permutations of every family, and what may never happen on the way."""

from __future__ import annotations

import itertools

import pytest
import torch
from structure_configs import CONFIGS

from evomerge.errors import MergeError
from evomerge.merging.structure.architectures.trial_network import TrialNetwork
from evomerge.merging.structure.permutations.matching import assignment, mean, weight_matching
from evomerge.merging.structure.permutations.permutation import (
    apply,
    compose,
    identity,
    inverse,
    random_permutations,
)


def planted(name, seed):
    network = TrialNetwork(CONFIGS[name])
    spec, state = network.spec, network.random_state()
    p = random_permutations(spec, torch.Generator().manual_seed(seed))
    return network, spec, state, p


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize("name", CONFIGS)
def test_planted_permutations_are_recovered_and_the_merge_is_lossless(name):
    network, spec, a, p = planted(name, 1)
    b = apply(spec, a, p)
    found = weight_matching(spec, a, b)
    assert same(found.permutations, inverse(spec, p))
    merged = mean([a, apply(spec, b, found.permutations)], [0.5, 0.5])
    assert same(merged, a)
    naive = mean([a, b], [0.5, 0.5])
    wanted = network.compute(a).detach().clone()
    assert (network.compute(naive) - wanted).abs().max() > 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_network_matches_itself_as_it_is(name):
    _, spec, a, _ = planted(name, 1)
    assert same(weight_matching(spec, a, a).permutations, identity(spec))


@pytest.fixture(scope="module")
def apart():
    """Two networks with nothing in common."""
    network = TrialNetwork(CONFIGS["llama"])
    return network.spec, network.random_state(1), network.random_state(2)


def test_no_sweep_loses(apart):
    found = weight_matching(*apart)
    assert 0 < found.sweeps < 100
    assert all(after > before for before, after in itertools.pairwise(found.objective))


def test_it_ends_where_no_pair_of_units_of_any_group_gains_by_a_swap(apart):
    spec, a, b = apart
    found = weight_matching(spec, a, b)
    aligned = apply(spec, b, found.permutations)

    def score(state):
        return sum(float((a[n] * state[n]).sum()) for n in a)

    best = score(aligned)
    for group in spec.groups:
        swap = torch.arange(group.size)
        swap[[0, 1]] = swap[[1, 0]]
        assert score(apply(spec, aligned, {group.name: swap})) <= best + 1e-9


def test_similarity_is_that_of_the_units_that_end_up_beside_each_other(apart):
    spec, a, b = apart
    found = weight_matching(spec, a, b)
    mlp = next(group for group in spec.groups if group.role == "mlp")
    stream, order = found.permutations["residual"], found.permutations[mlp.name]
    wanted = torch.zeros(mlp.size, dtype=torch.float64)
    for x in ("gate_proj", "up_proj"):
        name = f"{mlp.name}.{x}.weight"
        wanted += (a[name] * b[name][order][:, stream]).sum(1)
    name = f"{mlp.name}.down_proj.weight"
    wanted += (a[name] * b[name][:, order][stream]).sum(0)
    torch.testing.assert_close(found.similarity[mlp.name], wanted)


def test_relabelling_the_second_network_changes_only_the_permutations(apart):
    spec, a, b = apart
    p = random_permutations(spec, torch.Generator().manual_seed(5))
    there, here = weight_matching(spec, a, apply(spec, b, p)), weight_matching(spec, a, b)
    assert same(compose(spec, p, there.permutations), here.permutations)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "clip", "t5"])
def test_fine_tunes_of_one_base_keep_their_order(name):
    _, spec, base, _ = planted(name, 1)
    tuned = [dict(base) for _ in range(2)]
    for seed, state in enumerate(tuned):
        noise = torch.Generator().manual_seed(seed)
        for key, t in base.items():
            shift = torch.randn(t.shape, generator=noise) * 0.2 * (t.std() if t.numel() > 1 else 1)
            state[key] = t + shift
    assert same(weight_matching(spec, *tuned).permutations, identity(spec))


def test_a_noisy_planted_permutation_is_recovered():
    _, spec, a, p = planted("llama", 3)
    noise = torch.Generator().manual_seed(0)
    noisy = {n: t + 0.3 * t.std() * torch.randn(t.shape, generator=noise) for n, t in a.items()}
    found = weight_matching(spec, a, apply(spec, noisy, p))
    assert same(found.permutations, inverse(spec, p))


def test_assignment_is_the_best_of_all():
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order, value = assignment(table)
    every = [
        sum(float(table[u, v]) for u, v in enumerate(p)) for p in itertools.permutations(range(5))
    ]
    assert value == pytest.approx(max(every))
    assert float(table[torch.arange(5), order].sum()) == pytest.approx(value)


def test_networks_of_other_shapes_and_nan_are_refused(apart):
    spec, a, b = apart
    name = "lm_head.weight"
    with pytest.raises(MergeError, match=f"{name}: units can be matched only where both"):
        weight_matching(spec, a, b | {name: b[name][:-1]})
    with pytest.raises(MergeError, match="NaN or infinite"):
        weight_matching(spec, a, b | {name: b[name] * torch.nan})
