"""PCB merging: by hand, against a naive float64 oracle over a whole model, and its edges."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.merging.layout import layout
from evomerge.merging.methods import registry
from evomerge.merging.methods.base import Block, Blocks, Coefficients
from evomerge.merging.methods.pcb import Pcb
from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.testing.merge_laws import Case, merged

Model = dict[str, Tensor]


def merge_vectors(*taus: list[float], **parameters: object) -> list[float]:
    sources = {f"s{i}": torch.tensor(tau) for i, tau in enumerate(taus)}
    case = Case(torch.zeros(len(taus[0])), sources, parameters)
    return merged(Pcb(), case, block_size=2).tolist()


def test_by_hand() -> None:
    # N = 2, the sum is [3, 1, -2]; both have |τ| in [0, 2]
    # β of s0: e² tanh 6 = 7.38896, e^½ tanh 1 = 1.25566, 0     -> s = 1, 0.16994, 0
    # β of s1: e^½ tanh 3 = 1.64057, 0, e² tanh 4 = 7.38410     -> s = 0.22218, 0, 1
    found = merge_vectors([2.0, 1.0, 0.0], [1.0, 0.0, -2.0], ratio=1.0, clip=0.0)
    assert found == pytest.approx([(2 + 0.22218) / 1.22218, 1.0, -2.0], rel=1e-4)
    # of two entries the second scores 0: each source is left with its best
    found = merge_vectors([2.0, 1.0, 0.0], [1.0, 0.0, -2.0], ratio=2 / 3, clip=0.0)
    assert found == [2.0, 0.0, -2.0]


def oracle(
    base: Tensor, taus: list[Tensor], weights: list[float], ratio: float, clip: float
) -> tuple[Tensor, Tensor]:
    """The merge in float64, and its divisor: where that is tiny, roundings decide."""
    size, count = base.numel(), len(taus)
    total = sum(taus, torch.zeros_like(base))
    values, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for tau, weight in zip(taus, weights, strict=True):
        ordered = sorted(tau.abs().tolist())
        cut = int(clip * size)
        low, high = ordered[cut], ordered[size - 1 - cut]
        magnitude = tau.abs().clamp(low, high)
        norm = (magnitude - low) / (high - low)
        beta = torch.exp(count * norm**2) * torch.tanh(tau * total)
        floor = sorted(beta.tolist())[int(size * (1 - ratio) + 1e-9)]
        score = ((beta - floor) / (beta.max() - floor)).clamp(min=0)
        values += weight * tau.sign() * magnitude * score
        divisor += score
    return base + values / divisor.clamp(min=1e-12), divisor


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 3),
    ratio=st.sampled_from([0.1, 0.3, 0.9, 1.0]),
    clip=st.sampled_from([0.0, 0.02, 0.2]),
    scope=st.sampled_from(["tensor", "global"]),
    spread=st.sampled_from([0.01, 1.0]),
)
def test_against_the_formula_in_float64(
    seed: int, count: int, ratio: float, clip: float, scope: str, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": 60, "b": 40, "c": 23}
    base = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    names = [f"s{index}" for index in range(count)]
    models = {
        source: {n: base[n] + spread * torch.randn(len(base[n]), generator=generator) for n in base}
        for source in names
    }
    weights = [1.0, 0.7, 1.3][:count]
    sources = [
        Source(name, ModelRef(name), {"weight": weight})
        for name, weight in zip(names, weights, strict=True)
    ]
    parameters = {"ratio": ratio, "clip": clip, "scope": scope}
    recipe = Recipe("pcb", ModelRef("base"), tuple(sources), parameters)
    found = merge(recipe, base, models)

    def taus(*tensors: str) -> list[Tensor]:
        return [torch.cat([(models[s][n] - base[n]).double() for n in tensors]) for s in names]

    for group in [tuple(sizes)] if scope == "global" else [(name,) for name in sizes]:
        start = torch.cat([base[name].double() for name in group])
        expected, divisor = oracle(start, taus(*group), weights, ratio, clip)
        clear = (divisor > 1e-4) | (divisor == 0)
        result = torch.cat([found[name].double() for name in group])
        assert torch.allclose(result[clear], expected[clear], rtol=1e-4, atol=1e-5)


def merge(recipe: Recipe, base: Model, models: dict[str, Model]) -> Model:
    """A whole model, driven as materialising does."""
    assert registry.check(recipe) == []
    places = layout(base)

    def tensor(name: str) -> tuple[Coefficients, Blocks]:
        known = registry.coefficients(recipe, places[name], tuple(base[name].shape))
        stacked = torch.stack([models[source][name] for source in known.names])

        def blocks() -> Iterator[Block]:
            for start in range(0, known.size, 16):
                cut = slice(start, start + 16)
                yield Block(base[name][cut], stacked[:, cut], start)

        return known, blocks

    survey = Pcb().survey(lambda: (tensor(name) for name in sorted(base)))
    result = {}
    for name in base:
        known, blocks = tensor(name)
        prepared = Pcb().prepare(blocks, known, survey)
        result[name] = torch.cat([Pcb().merge(block, known, prepared) for block in blocks()])
    return result


def test_the_competition_tells_agreement_from_conflict() -> None:
    # where the sources pull apart, τ·Στ of the weaker is negative: it does not compete
    found = merge_vectors([3.0, 2.0, 0.1], [-1.0, 2.0, 0.2], ratio=0.5, clip=0.0)
    assert found[0] == 3.0


def test_many_sources_do_not_overflow() -> None:
    # exp(200) is beyond float32
    taus = [[float(i % 3 + 1), 1.0, 0.5, 0.0] for i in range(200)]
    assert all(map(math.isfinite, merge_vectors(*taus, ratio=0.5)))


@pytest.mark.parametrize("tau", [[2.0], [2.0, 2.0], [0.0, 0.0]])
def test_entries_that_are_all_equal_count_fully(tau: list[float]) -> None:
    assert merge_vectors(tau, ratio=0.1) == tau


def test_an_untrained_source_does_not_dilute_the_others() -> None:
    found = merge_vectors([4.0, 2.0, 1.0], [0.0, 0.0, 0.0], ratio=1.0, clip=0.0)
    assert found[:2] == [4.0, 2.0]
