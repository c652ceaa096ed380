"""DAM's coefficients: where they lie in a tensor, and their gradients, for several families."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import small_llama
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.adapted import open_model
from evomerge.merging.binding import bind
from evomerge.merging.fitted import dam_losses as losses
from evomerge.merging.fitted.base import Problem, merged_names
from evomerge.merging.fitted.calibration import Calibration, Example, batch
from evomerge.merging.fitted.dam import DamSettings
from evomerge.merging.fitted.dam_training import make_mergers
from evomerge.merging.fitted.granularity import grid_of, kind_of
from evomerge.merging.fitted.mergers import Mergers
from evomerge.merging.fitted.network import Network
from evomerge.merging.fitted.teacher import Live

EVERYTHING = ("linears", "embeddings", "norms", "biases")


def _family(root: Path, family: str, names: str = "ab") -> Problem:
    """Small random models of any architecture, of which the logits differ a little."""
    opened = {}
    for number, name in enumerate(("base", *names)):
        model, noise = (
            tiny_models.causal(family, seed=seed, dtype=torch.float32) for seed in (0, 9 + number)
        )
        with torch.no_grad():
            for parameter, other in zip(model.parameters(), noise.parameters(), strict=True):
                parameter.mul_(0.3).add_(0.05 * other)
        model.save_pretrained(root / name)
        small_llama.tokenizer(small_llama.TOKENS[:48]).save_pretrained(root / name)
        opened[name] = open_model(str(root / name))
    sources = {name: opened[name] for name in names}
    generator = torch.Generator().manual_seed(3)
    data = {
        name: tuple(
            Example(tuple(torch.randint(3, 48, (length,), generator=generator).tolist()), 2)
            for length in (7, 5)
        )
        for name in names
    }
    digests = {model.path: model.scan().digest for model in opened.values()}
    return Problem(opened["base"], sources, digests, Calibration(data, {}))


def _gradients(problem: Problem, settings: DamSettings) -> tuple[Mergers, dict[str, torch.Tensor]]:
    """∂KL/∂m by the identity, at coefficients that are not those of the start."""
    network = Network(problem.anchor)
    mergers = make_mergers(network, problem, settings)
    generator = torch.Generator().manual_seed(5)
    for m in mergers.m.values():
        m.add_(0.1 * torch.randn(m.shape, generator=generator))
    teachers = Live(network, problem, "all").of({name: [0, 1] for name in problem.sources})
    mergers.write(network)
    with network.gradients(mergers.take):
        for name, teacher in teachers.items():
            rows = batch(problem.calibration.of(name))
            logits = network.logits(rows)[rows.attention.bool()]
            network.backward(losses.kl(logits, teacher, 2.0), rows, what="test")
    return mergers, mergers.gradients()


def _float64(problem: Problem) -> torch.nn.Module:
    """The anchor in float64 all through; norms of transformers go down to float32."""
    model = AutoModelForCausalLM.from_pretrained(
        problem.anchor.folder, dtype=torch.float64, experts_implementation="eager"
    )
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module)
    return model


def _rms_norm(module, x):
    size = (x * x).mean(-1, keepdim=True) + module.variance_epsilon
    return module.weight * x / size.sqrt()


def _kl64(model: torch.nn.Module, problem: Problem, wanted: Mapping[str, torch.Tensor]) -> float:
    total = 0.0
    for name in problem.sources:
        p = (wanted[name] / 2).softmax(1)
        q = (_logits64(model, problem, name) / 2).softmax(1)
        total += float(4 * (p * (p / q).log()).sum(1).mean())
    return total


def _logits64(model: torch.nn.Module, problem: Problem, name: str) -> torch.Tensor:
    rows = batch(problem.calibration.of(name))
    with torch.no_grad():
        out = model(input_ids=rows.tokens, attention_mask=rows.attention, use_cache=False)
    return out.logits[rows.attention.bool()]


def _phi64(kind: str, m: torch.Tensor) -> torch.Tensor:
    return {"identity": lambda x: x, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
            "relu": torch.relu}[kind](m)  # fmt: skip


def _merged64(problem: Problem, mergers: Mergers, m: Mapping, settings: DamSettings, name: str):
    """Σ φ(m)⊙W in float64, by broadcasting along the grid's axis."""
    base = problem.base.tensor(name).double() if settings.anchor == "base" else 0.0
    total = torch.zeros(problem.anchor.shape(name), dtype=torch.float64) + base
    for row, source in enumerate(problem.sources.values()):
        c = torch.tensor(1 / len(problem.sources), dtype=torch.float64)
        if name in mergers.grids:
            grid, values = (
                mergers.grids[name],
                _phi64(settings.non_linearity, m[mergers.keys[name]]),
            )
            shape = [1] * len(grid.shape)
            if grid.groups > 1:
                shape[grid.axis] = grid.shape[grid.axis]
            run = grid.shape[grid.axis] // grid.groups if grid.groups > 1 else 1
            c = values[row].repeat_interleave(run).view(shape)
        total = total + c * (source.tensor(name).double() - base)
    return total


CASES = [
    *((family, {}) for family in ("llama", "llama-tied", "gpt2", "qwen2", "mixtral", "opt")),
    ("qwen2", {"granularity": "row", "non_linearity": "tanh"}),
    ("gpt2", {"granularity": "row", "anchor": "base"}),
    ("llama", {"granularity": "head", "non_linearity": "sigmoid"}),
    ("gpt2", {"granularity": "head", "anchor": "base"}),
    ("qwen2", {"granularity": "tensor", "anchor": "base", "non_linearity": "relu"}),
    ("mixtral", {"granularity": "layer", "anchor": "base"}),
]


@pytest.mark.parametrize(("family", "given"), CASES)
def test_gradients_are_those_of_finite_differences_in_float64(family, given, tmp_path):
    problem = _family(tmp_path, family)
    settings = DamSettings(train=EVERYTHING, **given)
    mergers, found = _gradients(problem, settings)
    model = _float64(problem)
    targets = bind(model, problem.anchor)

    def write(tensors):
        with torch.no_grad():
            for name, tensor in tensors:
                targets[name].copy_(tensor.reshape(-1))

    wanted = {}
    for name, source in problem.sources.items():
        write((n, source.tensor(n).double()) for n in merged_names(problem))
        wanted[name] = _logits64(model, problem, name)
    m = {key: value.double() for key, value in mergers.m.items()}

    def loss(key, row, group, step):
        moved = {**m, key: m[key].clone()}
        moved[key][row, group] += step
        write(
            (n, _merged64(problem, mergers, moved, settings, n))
            for n, k in mergers.keys.items()
            if k == key
        )
        return _kl64(model, problem, wanted)

    write((n, _merged64(problem, mergers, m, settings, n)) for n in merged_names(problem))
    largest = max(float(g.abs().max()) for g in found.values())
    step = 1e-5 if family == "opt" else 1e-4  # relu has kinks; mixtral routes in float32
    dice = random.Random(1)
    for key in dice.sample(sorted(m), min(len(m), 12)):
        row, group = dice.randrange(2), dice.randrange(m[key].shape[1])
        slope = (loss(key, row, group, step) - loss(key, row, group, -step)) / (2 * step)
        loss(key, row, group, 0.0)
        assert float(found[key][row, group]) == pytest.approx(
            slope, rel=5e-3, abs=1e-4 * largest
        ), key


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_gradients_are_autograds(family, tmp_path):
    problem = _family(tmp_path, family)
    settings = DamSettings(train=EVERYTHING)
    mergers, found = _gradients(problem, settings)
    model = _float64(problem).requires_grad_(False)
    plain = dict(model.named_parameters())
    prefix = "" if next(iter(merged_names(problem))) in plain else "transformer."
    wanted = {}
    for name, source in problem.sources.items():
        own = {prefix + n: source.tensor(n).double() for n in merged_names(problem)}
        rows = batch(problem.calibration.of(name))
        out = torch.func.functional_call(
            model, own, kwargs={"input_ids": rows.tokens, "attention_mask": rows.attention}
        )
        wanted[name] = out.logits[rows.attention.bool()]
    m = {key: value.double().requires_grad_() for key, value in mergers.m.items()}
    merged = {
        prefix + n: _merged64(problem, mergers, m, settings, n) for n in merged_names(problem)
    }
    total = torch.zeros((), dtype=torch.float64)
    for name in problem.sources:
        rows = batch(problem.calibration.of(name))
        out = torch.func.functional_call(
            model, merged, kwargs={"input_ids": rows.tokens, "attention_mask": rows.attention}
        )
        z = out.logits[rows.attention.bool()]
        p, logs = (wanted[name] / 2).softmax(1), (wanted[name] / 2).log_softmax(1)
        total = total + 4 * (p * (logs - (z / 2).log_softmax(1))).sum(1).mean()
    total.backward()
    largest = max(float(g.abs().max()) for g in found.values())
    for key, value in m.items():
        torch.testing.assert_close(
            found[key].double(), value.grad, rtol=5e-3, atol=2e-5 * largest, msg=key
        )


def test_what_is_a_column_a_row_and_a_head(tmp_path):
    network = Network(_family(tmp_path / "l", "llama").anchor)
    layer = "model.layers.0."
    cuts = {
        g: {
            name: (grid.axis, grid.groups)
            for name in network.learned
            for grid in [grid_of(network, name, g)]
            if name.startswith(layer) or "layers" not in name
        }
        for g in ("column", "row", "head", "tensor", "layer")
    }
    assert cuts["column"]["model.embed_tokens.weight"] == (1, 16)
    assert cuts["column"][layer + "mlp.down_proj.weight"] == (1, 24)
    assert cuts["column"][layer + "input_layernorm.weight"] == (0, 16)
    assert cuts["row"][layer + "mlp.down_proj.weight"] == (0, 16)
    assert cuts["row"]["model.embed_tokens.weight"] == (0, 48)
    assert cuts["head"][layer + "self_attn.q_proj.weight"] == (0, 4)
    assert cuts["head"][layer + "self_attn.k_proj.weight"] == (0, 2)
    assert cuts["head"][layer + "self_attn.o_proj.weight"] == (1, 4)
    assert cuts["head"][layer + "mlp.down_proj.weight"] == (0, 1)
    assert set(cuts["tensor"].values()) == set(cuts["layer"].values()) == {(0, 1)}
    stored_inputs_first = Network(_family(tmp_path / "g", "gpt2").anchor)
    name = next(n for n in stored_inputs_first.learned if n.endswith("0.mlp.c_fc.weight"))
    assert stored_inputs_first.shape(name)[0] == 16
    assert grid_of(stored_inputs_first, name, "column") == grid_of(
        stored_inputs_first, name, "column"
    ).__class__(stored_inputs_first.shape(name), 0, 16)
    joined = name.replace("mlp.c_fc", "attn.c_attn")
    heads = stored_inputs_first.model.config.n_head
    assert grid_of(stored_inputs_first, joined, "head").groups == 3 * heads
    bias = joined.replace("weight", "bias")
    assert kind_of(stored_inputs_first, bias) == "biases"
    assert grid_of(stored_inputs_first, bias, "column").groups == 1
    assert grid_of(stored_inputs_first, bias, "head").groups == 3 * heads
    assert kind_of(stored_inputs_first, name.replace("mlp.c_fc", "ln_1")) == "norms"


@pytest.mark.parametrize("anchor", ["none", "base"])
@pytest.mark.parametrize("kind", ["identity", "tanh", "sigmoid", "relu"])
def test_it_starts_from_the_uniform_average(anchor, kind, tmp_path):
    problem = _family(tmp_path, "qwen2", "abc")
    network = Network(problem.anchor)
    settings = DamSettings(anchor=anchor, non_linearity=kind, train=EVERYTHING)
    mergers = make_mergers(network, problem, settings)
    for name in merged_names(problem):  # of the released code, biases would come out as their sum
        mean = sum(m.tensor(name).double() for m in problem.sources.values()) / 3
        torch.testing.assert_close(mergers.weight(name).double(), mean, rtol=1e-5, atol=1e-6)
