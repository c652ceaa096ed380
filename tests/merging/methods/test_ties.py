"""TIES: worked by hand, against a naive float64 oracle, and the other implementations' edges."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.merging.layout import layout
from evomerge.merging.methods import registry
from evomerge.merging.methods.base import Block, Blocks, Coefficients
from evomerge.merging.methods.ties import PRESETS
from evomerge.merging.recipe import ModelRef, Recipe, Source

Model = dict[str, Tensor]
BASE = "base"


def merge(
    base: Model,
    sources: Mapping[str, Model],
    *,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    step: int = 4,
    **parameters: Any,
) -> Model:
    """TIES over a whole model, driven as materialising does."""
    recipe = Recipe(
        "ties",
        ModelRef(BASE),
        tuple(Source(name, ModelRef(name), (own or {}).get(name, {})) for name in sources),
        parameters,
    )
    assert registry.check(recipe) == []
    method, places = registry.get("ties"), layout(base)

    def tensor(name: str) -> tuple[Coefficients, Blocks]:
        known = registry.coefficients(recipe, places[name], tuple(base[name].shape))
        stacked = torch.stack([sources[source][name] for source in known.names])

        def blocks() -> Iterator[Block]:
            for start in range(0, known.size, step):
                cut = slice(start, start + step)
                yield Block(base[name][cut], stacked[:, cut], start)

        return known, blocks

    survey = method.survey(lambda: (tensor(name) for name in sorted(base)))
    result = {}
    for name in base:
        known, blocks = tensor(name)
        prepared = method.prepare(blocks, known, survey)
        result[name] = torch.cat([method.merge(block, known, prepared) for block in blocks()])
    return result


def merge_vectors(*taus: list[float], **parameters: Any) -> list[float]:
    """The merged task vector of one tensor around a zero base."""
    sources = {f"s{index}": {"w": torch.tensor(tau)} for index, tau in enumerate(taus)}
    return merge({"w": torch.zeros(len(taus[0]))}, sources, **parameters)["w"].tolist()


def test_by_hand() -> None:
    # density 0.5 of 4 keeps 2 of each: s0 -> [4, 0, -3, 0], s1 -> [-5, 0, 0, 2]
    # with weights 1 and 2 the votes are [4-10, 0, -3, 4]: signs -, none, -, +
    # weighted means of who agrees: -10/2, 0, -3/1, 4/2; times lambda 0.5, on the base
    sources = {
        "s0": {"w": torch.tensor([5.0, 2.0, -2.0, 1.5])},
        "s1": {"w": torch.tensor([-4.0, 2.0, 1.5, 3.0])},
    }
    base = {"w": torch.tensor([1.0, 1.0, 1.0, 1.0])}
    own = {"s1": {"weight": 2.0}}
    merged = merge(base, sources, own=own, density=0.5, **{"lambda": 0.5})
    assert merged["w"].tolist() == [1 - 2.5, 1.0, 1 - 1.5, 1 + 1.0]


def test_aggregates_by_hand() -> None:
    taus = [4.0, 0.0, -3.0], [2.0, 0.0, 1.0], [-1.0, 7.0, -1.0]
    assert merge_vectors(*taus) == [3.0, 7.0, -2.0]
    assert merge_vectors(*taus, aggregate="sum") == [6.0, 7.0, -4.0]
    assert merge_vectors(*taus, aggregate="max") == [4.0, 7.0, -3.0]
    assert merge_vectors(*taus, normalize=False) == [6.0, 7.0, -4.0]


# --- a naive float64 oracle, written from the paper's section 3 and the parameters' meanings


def oracle(
    base: Tensor, taus: list[Tensor], weights: list[float], densities: list[float], **kind: Any
) -> Tensor:
    size = base.numel()
    trimmed = []
    for tau, density in zip(taus, densities, strict=True):
        values = tau.double().tolist()
        count = size if density >= 1 else int(density * size + 1e-9)
        if kind["rule"] == "keep_all" and 0 < count < size:
            smallest = sorted(map(abs, values), reverse=True)[count]
            kept = {j for j in range(size) if abs(values[j]) >= smallest}
        else:
            kept = set(sorted(range(size), key=lambda j: (-abs(values[j]), j))[:count])
        trimmed.append([value if j in kept else 0.0 for j, value in enumerate(values)])
    sums = [sum(w * row[j] for w, row in zip(weights, trimmed, strict=True)) for j in range(size)]
    elected = [(total > 0) - (total < 0) for total in sums]
    majority = (sum(elected) > 0) - (sum(elected) < 0)
    tie = {"positive": 1, "zero": 0, "majority": majority, "authors": majority or -1}[kind["tie"]]
    merged = []
    for j in range(size):
        sign = elected[j] or tie
        agree = [(w, row[j]) for w, row in zip(weights, trimmed, strict=True)]
        agree = [(w, value) for w, value in agree if w * value * sign > 0]
        products = [w * value for w, value in agree]
        if not agree:
            merged.append(0.0)
        elif kind["aggregate"] == "max":
            merged.append(sign * max(map(abs, products)))
        elif kind["aggregate"] == "sum":
            merged.append(sum(products))
        else:
            merged.append(sum(products) / (sum(w for w, _ in agree) or 1.0))
    return base.double() + kind["scale"] * torch.tensor(merged, dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(6, 40),
    count=st.integers(1, 4),
    step=st.sampled_from([1, 7, 1000]),
    scope=st.sampled_from(["tensor", "global"]),
    rule=st.sampled_from(["exact", "keep_all"]),
    tie=st.sampled_from(["majority", "positive", "zero", "authors"]),
    aggregate=st.sampled_from(["mean", "sum", "max"]),
    scale=st.sampled_from([1.0, 0.3, -0.5]),
    data=st.data(),
)
def test_against_the_oracle(
    seed: int,
    size: int,
    count: int,
    step: int,
    scope: str,
    rule: str,
    tie: str,
    aggregate: str,
    scale: float,
    data: st.DataObject,
) -> None:
    # few levels and dyadic weights: ties at thresholds and zero sums abound, and sums are exact
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(-8, 9, (size,), generator=generator).float() / 4
    taus = [torch.randint(-4, 5, (size,), generator=generator).float() / 8 for _ in range(count)]
    weights = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0, -1.0, 0.0]), min_size=count))
    weights = (weights * count)[:count] or [1.0] * count
    densities = [data.draw(st.sampled_from([0.2, 0.25, 0.5, 0.9, 1.0])) for _ in range(count)]
    names = [f"s{index}" for index in range(count)]
    own = {
        name: {"weight": weight, "density": density}
        for name, weight, density in zip(names, weights, densities, strict=True)
    }
    # in global scope the same vector lies in three tensors
    cuts = [0, size // 3, size // 2, size] if scope == "global" else [0, size]
    parts = {f"t{index}": slice(*pair) for index, pair in enumerate(itertools.pairwise(cuts))}

    def split(vector: Tensor) -> Model:
        return {name: vector[part] for name, part in parts.items()}

    merged = merge(
        split(base),
        {name: split(base + tau) for name, tau in zip(names, taus, strict=True)},
        own=own,
        step=step,
        scope=scope,
        ties_at_threshold=rule,
        sign_tie=tie,
        aggregate=aggregate,
        **{"lambda": scale},
    )
    expected = oracle(
        base, taus, weights, densities, rule=rule, tie=tie, aggregate=aggregate, scale=scale
    )
    found = torch.cat([merged[name] for name in parts])
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-7)


# --- P13: the edges of the other implementations, on vectors of ten


def support(tau: list[float]) -> int:
    return sum(value != 0 for value in tau)


DISTINCT = [1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0, 9.0, -10.0]


@pytest.mark.parametrize(("preset", "kept"), [("ties-ref", 3), ("mergelm", 3), ("mergekit", 2)])
def test_presets_count_what_is_kept(preset: str, kept: int) -> None:
    merged = merge_vectors(DISTINCT, density=0.2, **PRESETS[preset])
    assert support(merged) == kept
    assert merged[8:] == [9.0, -10.0]


@pytest.mark.parametrize(("preset", "kept"), [("ties-ref", 10), ("mergelm", 10), ("mergekit", 2)])
def test_presets_at_ties_of_the_threshold(preset: str, kept: int) -> None:
    merged = merge_vectors([1.0] * 5 + [-1.0] * 5, density=0.2, **PRESETS[preset])
    assert support(merged) == kept
    assert merged[:2] == [1.0, 1.0]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_with_a_threshold_of_zero(preset: str) -> None:
    sparse = [0.0] * 8 + [3.0, -2.0]
    assert merge_vectors(sparse, density=0.5, **PRESETS[preset]) == sparse


@pytest.mark.parametrize("preset", PRESETS)
def test_density_one_is_the_identity(preset: str) -> None:
    assert merge_vectors(DISTINCT, density=1.0, **PRESETS[preset]) == DISTINCT


@pytest.mark.parametrize(
    ("preset", "first"), [("ties-ref", -2.0), ("mergelm", -2.0), ("mergekit", 2.0)]
)
def test_presets_at_a_zero_sum_of_signs(preset: str, first: float) -> None:
    # the other nine weights elect a negative majority
    merged = merge_vectors([2.0] + [-1.0] * 9, [-2.0] + [-1.0] * 9, density=1.0, **PRESETS[preset])
    assert merged == [first] + [-1.0] * 9


@pytest.mark.parametrize(
    ("preset", "merged"), [("ties-ref", -1.0), ("mergelm", 0.0), ("mergekit", 1.0)]
)
def test_presets_where_every_sum_is_zero(preset: str, merged: float) -> None:
    taus = [1.0, -1.0] * 5, [-1.0, 1.0] * 5
    assert merge_vectors(*taus, density=1.0, **PRESETS[preset]) == [merged] * 10


def test_scope() -> None:
    base = {"large": torch.zeros(5), "small": torch.zeros(5)}
    tau = {"large": torch.arange(6.0, 11.0), "small": torch.arange(1.0, 6.0)}
    per_tensor = merge(base, {"s": tau}, density=0.4, scope="tensor")
    assert {name: support(v.tolist()) for name, v in per_tensor.items()} == {"large": 2, "small": 2}
    over_all = merge(base, {"s": tau}, density=0.4, scope="global")
    assert {name: support(v.tolist()) for name, v in over_all.items()} == {"large": 4, "small": 0}


def test_global_scope_takes_the_majority_of_the_model() -> None:
    base = {"a": torch.zeros(2), "b": torch.zeros(8)}
    first = {"a": torch.tensor([1.0, 1.0]), "b": torch.full((8,), -1.0)}
    second = {"a": torch.tensor([-1.0, 1.0]), "b": torch.full((8,), -1.0)}
    sources = {"s0": first, "s1": second}
    assert merge(base, sources, scope="tensor")["a"].tolist() == [1.0, 1.0]
    assert merge(base, sources, scope="global")["a"].tolist() == [-1.0, 1.0]


def test_global_scope_trims_tensors_of_one_density_together() -> None:
    names = ("layers.0.w", "layers.1.w", "layers.2.w")
    base = {name: torch.zeros(4) for name in names}
    tau = {name: torch.arange(1.0, 5.0) + 4 * index for index, name in enumerate(names)}
    density = [{"filter": "layers.2", "value": 0.25}, {"value": 0.5}]
    merged = merge(base, {"s": tau}, density=density, scope="global")
    assert [support(merged[name].tolist()) for name in names] == [0, 4, 1]


# --- edges


def test_trimming_to_nothing_leaves_the_base() -> None:
    assert merge_vectors(DISTINCT, density=0.0) == [0.0] * 10
    base = {"w": torch.zeros(3)}
    merged = merge(base, {"s": {"w": torch.tensor([1.0, 2.0, 3.0])}}, density=0.2, scope="global")
    assert merged["w"].tolist() == [0.0, 0.0, 0.0]


def test_a_tensor_of_fewer_than_one_kept_element_is_exempt() -> None:
    assert merge_vectors([1.0, 2.0, 3.0], density=0.2) == [1.0, 2.0, 3.0]
    assert support(merge_vectors([1.0, 2.0, 3.0], density=0.34)) == 1


def test_exact_zeros_neither_vote_nor_count() -> None:
    with_zero = merge_vectors([4.0, -2.0], [2.0, -4.0], [0.0, 0.0])
    assert with_zero == merge_vectors([4.0, -2.0], [2.0, -4.0]) == [3.0, -3.0]


def test_weights_of_one_ratio_give_one_mean() -> None:
    generator = torch.Generator().manual_seed(3)
    base = {"w": torch.zeros(200)}
    sources = {f"s{i}": {"w": torch.randn(200, generator=generator)} for i in range(3)}

    def of(factor: float) -> Tensor:
        own = {f"s{i}": {"weight": factor * w} for i, w in enumerate((0.3, 0.7, 1.1))}
        return merge(base, sources, own=own, density=0.5)["w"]

    assert torch.allclose(of(5.0), of(1.0), rtol=1e-6)


def test_a_mean_is_no_larger_than_its_largest_vote() -> None:
    generator = torch.Generator().manual_seed(4)
    sources = {f"s{i}": {"w": torch.randn(500, generator=generator)} for i in range(4)}
    merged = merge({"w": torch.zeros(500)}, sources, density=0.4)["w"]
    largest = torch.stack([model["w"].abs() for model in sources.values()]).amax(0)
    assert (merged.abs() <= largest * (1 + 1e-6)).all()


@pytest.mark.parametrize("sign_tie", ["majority", "zero"])
def test_negated_task_vectors_negate_the_merge(sign_tie: str) -> None:
    generator = torch.Generator().manual_seed(5)
    taus = [torch.randint(-3, 4, (100,), generator=generator).float() for _ in range(2)]
    merged = merge_vectors(*(tau.tolist() for tau in taus), density=0.5, sign_tie=sign_tie)
    negated = merge_vectors(*((-tau).tolist() for tau in taus), density=0.5, sign_tie=sign_tie)
    assert negated == [-value for value in merged]
