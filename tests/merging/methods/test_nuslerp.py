"""NuSLERP: worked by hand, against the formula in float64 vector by vector, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from evomerge.merging.methods.nuslerp import NuSlerp
from evomerge.merging.methods.slerp import Slerp
from evomerge.merging.values import Scalar
from evomerge.testing.merge_laws import Case, merged

SHAPE = (6, 5, 4)


def case(weights: tuple[float, float] = (1.0, 2.0), **parameters: Scalar) -> Case:
    generator = torch.Generator().manual_seed(0)
    base, first, second = torch.randn(3, math.prod(SHAPE), generator=generator)
    own = {"a": {"weight": weights[0]}, "b": {"weight": weights[1]}}
    return Case(base, {"a": first, "b": second}, parameters, own, shape=SHAPE)


def arc(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Between two vectors, float64."""
    cosine = float(a @ b / (a.norm() * b.norm())) if a.norm() * b.norm() > 0 else 0.0
    if 1 - cosine**2 <= 1e-12:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def oracle(given: Case, t: float) -> Tensor:
    base = given.base.double() if given.parameters.get("origin") == "base" else 0 * given.base
    first, second = (source.double() - base for source in given.sources.values())
    result = torch.empty_like(first)
    index = torch.arange(first.numel()).view(SHAPE)
    groups = {"tensor": index.view(1, -1), "row": index.view(-1, 4), "column": index.view(6, -1).T}
    for group in groups[str(given.parameters.get("vectors", "tensor"))]:
        result[group] = arc(first[group], second[group], t)
    return result + base


def test_by_hand() -> None:
    # weights 2 and 1: t = 1/3 of a right angle, sin 60° = 0.8660 of a and sin 30° = 0.5 of b
    sources = {"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([0.0, 4.0])}
    small = Case(torch.ones(2), sources, {}, {"a": {"weight": 2.0}})
    assert merged(NuSlerp(), small).tolist() == pytest.approx([2 * 0.8660254, 2.0], rel=1e-6)
    # the same around the base (1, 1): the task vectors are (1, -1) and (-1, 3)
    cosine = -4 / math.sqrt(2 * 10)
    angle = math.acos(cosine)
    near, far = (math.sin(f * angle) / math.sin(angle) for f in (2 / 3, 1 / 3))
    around = merged(NuSlerp(), small.given(origin="base"))
    assert around.tolist() == pytest.approx([1 + near - far, 1 - near + 3 * far], rel=1e-6)


@pytest.mark.parametrize("vectors", ["tensor", "row", "column"])
@pytest.mark.parametrize("origin", ["zero", "base"])
@pytest.mark.parametrize("weights", [(1.0, 2.0), (0.3, 0.3), (1.5, -0.5), (0.0, 0.0)])
def test_against_the_formula_in_float64(
    weights: tuple[float, float], origin: str, vectors: str
) -> None:
    given = case(weights, origin=origin, vectors=vectors)
    t = weights[1] / sum(weights) if sum(weights) else 0.5
    found = merged(NuSlerp(), given, block_size=7)
    assert torch.allclose(found.double(), oracle(given, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vectors", ["tensor", "row", "column"])
@pytest.mark.parametrize("origin", ["zero", "base"])
@pytest.mark.parametrize(("weights", "end"), [((0.7, 0.0), "a"), ((0.0, 0.2), "b")])
def test_the_ends_are_the_sources(
    weights: tuple[float, float], end: str, origin: str, vectors: str
) -> None:
    given = case(weights, origin=origin, vectors=vectors)
    assert torch.equal(merged(NuSlerp(), given), given.sources[end])


def test_is_slerp_for_weights_that_say_t() -> None:
    given = case((0.7, 0.3))
    expected = merged(Slerp(), Case(given.base, given.sources, {"t": 0.3}))
    assert torch.allclose(merged(NuSlerp(), given), expected, rtol=1e-6)


@pytest.mark.parametrize("vectors", ["tensor", "row", "column"])
@pytest.mark.parametrize("scale", [-1.0, -0.3, 1.0, 3.0])
def test_opposite_and_parallel_vectors_take_the_line(scale: float, vectors: str) -> None:
    given = case(vectors=vectors)
    first = given.sources["a"]
    line = given.of({"a": first, "b": first * scale})
    expected = first * (1 / 3 + scale * 2 / 3)
    assert torch.allclose(merged(NuSlerp(), line), expected, rtol=1e-5, atol=1e-6)


def test_a_source_that_equals_the_base_is_orthogonal_to_the_other() -> None:
    given = case((1.0, 1.0), origin="base")
    given = given.of({"a": given.base, "b": given.sources["b"]})
    expected = given.base + (given.sources["b"] - given.base) * math.sqrt(0.5)
    assert torch.allclose(merged(NuSlerp(), given), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (60,), (1, 60), (60, 1)])
def test_rows_and_columns_of_any_shape(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    generator = torch.Generator().manual_seed(3)
    base, first, second = torch.randn(3, size, generator=generator)
    given = Case(base, {"a": first, "b": second}, shape=shape)
    for vectors in ("row", "column"):
        found = merged(NuSlerp(), given.given(vectors=vectors), block_size=11)
        alone = (shape == (60, 1)) == (vectors == "row") and len(shape) == 2
        expected = (first + second) / 2  # elements on their own are parallel or opposite
        if not alone and size > 1:
            expected = arc(first.double(), second.double(), 0.5).float()
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
