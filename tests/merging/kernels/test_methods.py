"""P9: a merge by the fused kernels and its facts has the bits of the method's own functions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_programs import assert_same_bits

from evomerge.errors import CandidateError, NonFiniteModel
from evomerge.merging import compute
from evomerge.merging.compute import Operands, merge_tensor
from evomerge.merging.kernels import cpu
from evomerge.merging.kernels.facts import Facts, Memory
from evomerge.merging.methods.base import Block, MergeMethod
from evomerge.merging.methods.reductions import totals
from evomerge.merging.methods.registry import METHODS
from evomerge.merging.methods.selection import Quota, cuts
from evomerge.merging.methods.spheres import gram
from evomerge.testing.merge_laws import Case, coefficients_of, random_case

PROGRAMMED = [
    "linear",
    "greedy_soup",
    "fisher",
    "regmean",
    "mats",
    "dam",
    "passthrough",
    "task_arithmetic",
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "model_stock",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "sens_merging",
    "adamerging",
    "learned_soup",
    "git_rebasin",
]


def written(method: MergeMethod, case: Case, dtype: torch.dtype, *, store: bool) -> object:
    """The merged tensor, or the class of the error."""
    coefficients = coefficients_of(method, case)
    sources = tuple(case.sources[name].to(dtype) for name in coefficients.names)
    base = case.base.to(dtype) if method.needs_base or method.takes_base else None
    operands = Operands(base, sources, Memory() if store else None, "b", coefficients.names)
    stream = operands.blocks(97)
    survey = method.survey(lambda: iter([(coefficients, stream)]))
    out = torch.empty(case.base.numel(), dtype=dtype)
    try:
        merge_tensor(method, coefficients, operands, survey, out, block_size=97)
    except (NonFiniteModel, CandidateError) as error:
        return type(error)
    return out


@pytest.mark.parametrize("name", METHODS)
def test_a_program_gives_the_bits_of_the_method(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @settings(deadline=None, max_examples=60 if name in PROGRAMMED else 15)
    @given(
        seed=st.integers(0, 2**31),
        size=st.sampled_from([1, 2, 50, 700]),
        sources=st.integers(1, 6),
        born=st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]),
        spread=st.sampled_from([1e-4, 1e-2, 1.0]),
        store=st.booleans(),
    )
    def check(
        seed: int, size: int, sources: int, born: torch.dtype, spread: float, store: bool
    ) -> None:
        method = METHODS[name]
        count = max(method.min_sources, min(sources, method.max_sources or sources))
        case = random_case(seed, method=method, size=size, sources=count, born=born, spread=spread)
        fused = written(method, case, born, store=store)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "can_read", lambda *tensors: False)
            wanted = written(method, case, born, store=store)
        if isinstance(wanted, torch.Tensor) and isinstance(fused, torch.Tensor):
            assert_same_bits(fused, wanted)
        else:
            assert fused is wanted

    check()


@pytest.mark.parametrize("name", METHODS)
def test_who_has_a_program_is_known(name: str) -> None:
    method = METHODS[name]
    case = random_case(3, method=method, size=40, sources=max(method.min_sources, 1))
    tensor_wide = {p.name: "tensor" for p in method.parameters if "tensor" in p.choices}
    known = coefficients_of(method, case.given(**tensor_wide))
    base = case.base if method.needs_base or method.takes_base else None
    operands = Operands(base, tuple(case.sources[name] for name in known.names))
    stream = operands.blocks(40)
    inputs = compute.Inputs(stream, operands.facts)
    survey = method.survey(lambda: iter([(known, stream)]))
    program = method.program(known, method.prepare(inputs, known, survey))
    assert (program is not None) == (name in PROGRAMMED)


def operands_of(dtype: torch.dtype, levels: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(300_001, generator=generator) * 0.02
    source = base + torch.randn(300_001, generator=generator) * 1e-3
    return base.to(dtype), source.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kept", [False, True])
def test_cuts_are_those_of_the_stream(dtype: torch.dtype, kept: bool) -> None:
    base, source = operands_of(dtype)
    facts = Facts(base, (source,), Memory() if kept else None, "b", ("s",))
    tau = source.float() - base.float()

    def rows() -> Iterator[tuple[str, int, torch.Tensor]]:
        yield "x", 0, tau

    for count in (1, 2, 1000, 60_000, 299_999, 300_001, 300_002):
        for all_equal in (False, True):
            quota = Quota(count, all_equal=all_equal)
            wanted = cuts(rows, {"x": quota})["x"].mask(tau, 0)
            found = facts.cut(0, quota, located=True)
            assert torch.equal(found.mask(tau, 0), wanted)
            counted = facts.cut(0, quota)
            patterns = tau.abs().view(torch.int32)
            equal = int((wanted & (patterns == counted.pattern)).sum())
            assert counted.pattern == found.pattern
            assert counted.last >= 0 or counted.equal == equal or counted.keeps_all


@pytest.mark.parametrize("bracket", [(0, 1), (1 << 30, 1 << 31), (0, 1 << 31)])
def test_a_sample_that_was_wrong_does_not_matter(
    bracket: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, source = operands_of(torch.bfloat16)
    wanted = Facts(base, (source,)).cut(0, Quota(60_000), located=True)
    monkeypatch.setattr(Facts, "_bracket", lambda *_: bracket)
    assert Facts(base, (source,)).cut(0, Quota(60_000), located=True) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("from_base", [False, True])
def test_products_are_those_of_the_stream(dtype: torch.dtype, from_base: bool) -> None:
    base, first = operands_of(dtype)
    second, third = first.flip(0), -base
    facts = Facts(base, (first, second, third))
    models = torch.stack([first, second, third]).float()
    vectors = models - base.float() if from_base else models

    def blocks() -> Iterator[Block]:
        for start in range(0, len(base), 70_001):
            yield Block(None, vectors[:, start : start + 70_001], start)

    assert facts.gram(from_base=from_base) == totals(blocks, lambda block: gram(block.sources))
