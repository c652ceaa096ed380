"""Whole-tensor sums: exact against math.fsum, and independent of cutting and threads."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from evomerge.merging.methods.base import Block
from evomerge.merging.methods.reductions import pairwise_sum, segments, totals

SIZE = 300_001


def _blocks(sources: torch.Tensor, step: int) -> Iterator[Block]:
    for start in range(0, sources.shape[1], step):
        yield Block(None, sources[:, start : start + step], start)


def test_totals_do_not_depend_on_the_cutting_or_the_threads() -> None:
    sources = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(0))
    found = set()
    threads = torch.get_num_threads()
    try:
        for step, count in ((SIZE, 1), (977, 1), (131_072, 2), (200_000, 2)):
            torch.set_num_threads(count)
            sums = totals(lambda: _blocks(sources, step), lambda b: b.sources.double())  # noqa: B023
            found.add(tuple(sums))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
    for row, total in zip(sources, found.pop(), strict=True):
        assert math.isclose(total, math.fsum(row.tolist()), rel_tol=1e-12)


def test_segments_have_one_size_whatever_the_blocks() -> None:
    sources = torch.arange(20.0).reshape(1, 20)
    for step in (1, 3, 7, 20):
        cut = list(segments(lambda: _blocks(sources, step), 6))  # noqa: B023
        assert [block.start for block in cut] == [0, 6, 12, 18]
        assert [block.sources.shape[1] for block in cut] == [6, 6, 6, 2]
        assert torch.equal(torch.cat([block.sources for block in cut], dim=1), sources)


def test_pairwise_sum_of_odd_lengths() -> None:
    for length in (1, 2, 3, 5, 8, 13):
        rows = torch.arange(2.0 * length, dtype=torch.float64).reshape(2, length)
        assert pairwise_sum(rows).tolist() == rows.sum(1).tolist()


def test_an_empty_tensor_has_no_totals() -> None:
    assert totals(lambda: iter(()), lambda block: block.sources.double()) == []
