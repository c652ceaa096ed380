"""Every shipped method under every law it declares (P1 to P8, P10 to P12), by Hypothesis.

P9 compares with precomputed paths, of which there are none yet; P13 is in test_ties.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.merging.methods.base import Block, Coefficients
from evomerge.merging.methods.linear import Linear
from evomerge.merging.methods.registry import METHODS
from evomerge.merging.methods.task_arithmetic import TaskArithmetic
from evomerge.testing.merge_laws import (
    LawBroken,
    broken_laws,
    merged,
    random_case,
    zero_scale_is_base,
)
from evomerge.testing.shipped_laws import OBEYED


@pytest.mark.parametrize("name", METHODS)
@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 50),
    sources=st.integers(1, 4),
    born=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    spread=st.sampled_from([1e-4, 1e-3, 1.0, 1e4]),
)
def test_laws(
    name: str, seed: int, size: int, sources: int, born: torch.dtype, spread: float
) -> None:
    method = METHODS[name]
    count = max(method.min_sources, min(sources, method.max_sources or sources))
    case = random_case(seed, method=method, size=size, sources=count, born=born, spread=spread)
    assert broken_laws(method, OBEYED[name], case) == []


def test_every_method_declares_its_laws() -> None:
    assert set(OBEYED) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_cutting_a_tensor_of_several_segments(name: str) -> None:
    method = METHODS[name]
    case = random_case(1, method=method, size=150_000, sources=min(2, method.max_sources or 2))
    if "rescale" in {parameter.name for parameter in method.parameters}:
        case = case.given(rescale="l1")
    bits = {
        merged(method, case, block_size=size).view(torch.int32).numpy().tobytes()
        for size in (1 << 17, 99_999, 4_097)
    }
    assert len(bits) == 1


class _Broken(TaskArithmetic):
    """Task arithmetic with a fault, which a law must find."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def merge(self, block: Block, coefficients: Coefficients, prepared: Any) -> Tensor:
        result = super().merge(block, coefficients, prepared)
        if self.fault == "first element of a block":
            result[0] += 0.125
        elif self.fault == "recipe order":
            result += coefficients.order[0] * 0.125
        elif self.fault == "writes":
            block.sources.zero_()
        elif self.fault == "divisor":
            result = (result - _base(block)) / 2 + _base(block)
        elif self.fault == "seed":
            result += torch.rand(result.shape)
        return result


def _base(block: Block) -> Tensor:
    assert block.base is not None
    return block.base


FAULTS: Mapping[str, str] = {
    "first element of a block": "cutting_is_irrelevant",
    "recipe order": "order_is_irrelevant",
    "writes": "inputs_are_untouched",
    "divisor": "neutral_is_source",
    "seed": "zero_scale_is_base",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_laws_find_faults(fault: str) -> None:
    case = random_case(0, method=TaskArithmetic(), size=20, sources=2)
    broken = broken_laws(_Broken(fault), OBEYED["task_arithmetic"], case)
    assert FAULTS[fault] in {line.split()[0] for line in broken}


def test_the_laws_tell_methods_apart() -> None:
    case = random_case(0, method=Linear(), size=20, sources=3).given(normalize=False)
    with pytest.raises(LawBroken):
        zero_scale_is_base(Linear(), case, {"weight": 0.0})
