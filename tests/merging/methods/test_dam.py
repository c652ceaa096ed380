"""DAM as a method, by hand: columns, anchors, scale and detail."""

from __future__ import annotations

import pytest
import torch

from evomerge.errors import MergeError
from evomerge.merging.methods.dam import Dam
from evomerge.merging.methods.mergers import Grid, activated, collapse, inverse, slope
from evomerge.testing.fitted_cases import Learned
from evomerge.testing.merge_laws import TENSOR, Case, merged

BASE = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
A = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
B = torch.tensor([2.0, 2.0, 2.0, 4.0, 4.0, 4.0])
M = torch.tensor([[0.5, 1.0, 0.0], [0.25, -1.0, 2.0]])  # by source and column


def _case(anchor: str = "none", axis: int = 1, m: torch.Tensor = M, phi: str = "identity") -> Case:
    facts = {"anchor": anchor, "non_linearity": phi, "axes": {TENSOR: axis}, "averaged": ["x"]}
    shape = (2, 3) if axis == 1 else (3, 2)
    return Case(BASE, {"b": B, "a": A}, shape=shape, fitted=Learned(facts, {TENSOR: m}))


def test_columns_of_models() -> None:
    wanted = [0.5 + 0.5, 2.0 - 2.0, 0.0 + 4.0, 2.0 + 1.0, 5.0 - 4.0, 0.0 + 8.0]
    assert merged(Dam(), _case()).tolist() == wanted


def test_columns_of_task_vectors() -> None:
    wanted = [1 + 0 + 0.25, 1 + 1 - 1, 1 + 0 + 2, 1 + 1.5 + 0.75, 1 + 4 - 3, 1 + 0 + 6]
    assert merged(Dam(), _case("base")).tolist() == wanted


def test_groups_along_the_first_axis() -> None:
    wanted = [0.5 + 0.5, 1.0 + 0.5, 3.0 - 2.0, 4.0 - 4.0, 0.0 + 8.0, 0.0 + 8.0]
    assert merged(Dam(), _case(axis=0)).tolist() == wanted


def test_groups_of_several_columns_are_runs() -> None:
    grid = Grid((2, 6, 2), 1, 3)
    whole = torch.arange(24).view(2, 6, 2)
    groups = torch.empty(2, 6, 2, dtype=torch.int64)
    for group in range(3):
        groups[:, 2 * group : 2 * group + 2] = group
    values = torch.tensor([[0, 1, 2], [10, 11, 12]])
    for start, count in ((0, 24), (5, 7), (23, 1), (11, 13)):
        wanted = groups.flatten()[start : start + count]
        found = grid.spread(values, start, count)
        assert torch.equal(found, torch.stack([wanted, wanted + 10]))
    for group in range(3):
        assert torch.equal(grid.view(whole)[:, group].flatten(), whole[groups == group])


def test_scale_0_is_the_uniform_average_or_the_base() -> None:
    average = merged(Dam(), _case().given(scale=0.0))
    assert torch.equal(average, A * 0.5 + B * 0.5)
    assert torch.equal(merged(Dam(), _case("base").given(scale=0.0)), BASE)


def test_scale_is_a_sources_own() -> None:
    case = Case(**{**_case("base").__dict__, "own": {"a": {"scale": 2.0}, "b": {"scale": 0.0}}})
    wanted = BASE + 2 * M[0].repeat(2) * (A - BASE)
    assert torch.equal(merged(Dam(), case), wanted)


def test_halfway_lies_between_the_average_and_the_fit() -> None:
    c = 0.25 + 0.5 * M
    wanted = c[0].repeat(2) * A + c[1].repeat(2) * B
    torch.testing.assert_close(merged(Dam(), _case().given(scale=0.5)), wanted)


def test_detail_0_is_each_tensors_mean() -> None:
    found = merged(Dam(), _case().given(detail=0.0))
    torch.testing.assert_close(found, 0.5 * A + (1.25 / 3) * B)
    genome = collapse(_case().fitted, ["a", "b"])  # type: ignore[arg-type]
    assert genome["a"] == {TENSOR: 0.5, "x": 0.5}
    assert genome["b"] == {TENSOR: pytest.approx(1.25 / 3), "x": 0.5}


@pytest.mark.parametrize("phi", ["identity", "tanh", "sigmoid", "relu"])
def test_the_non_linearity_is_the_artifacts(phi: str) -> None:
    function = {"identity": lambda m: m, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
                "relu": torch.relu}[phi]  # fmt: skip
    c = function(M)
    wanted = c[0].repeat(2) * A + c[1].repeat(2) * B
    torch.testing.assert_close(merged(Dam(), _case(phi=phi)), wanted)
    m = torch.tensor([-0.7, 0.2, 1.3], dtype=torch.float64)
    rise = (function(m + 1e-6) - function(m - 1e-6)) / 2e-6
    torch.testing.assert_close(slope(phi, m), rise, rtol=1e-6, atol=1e-6)
    assert float(activated(phi, torch.tensor(inverse(phi, 0.3)))) == pytest.approx(0.3)


def test_one_source_with_coefficient_1_is_that_source_bit_for_bit() -> None:
    tiny = BASE + torch.tensor([1e-9, 0.1, 3e-5, -0.0, 1e-8, 7.0])
    for anchor in ("none", "base"):
        case = _case(anchor, m=torch.ones(1, 1)).of({"a": tiny})
        assert torch.equal(merged(Dam(), case), tiny)


def test_without_the_base_it_was_fitted_around_it_is_refused() -> None:
    class Baseless(Dam):
        takes_base = False

    with pytest.raises(MergeError, match="give the recipe its `base`"):
        merged(Baseless(), _case("base"))


def test_another_number_of_sources_is_refused() -> None:
    with pytest.raises(MergeError, match="fitted on 2 sources, the recipe has 1"):
        merged(Dam(), _case().of({"a": A}))
