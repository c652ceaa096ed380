"""Windows of whole rows: the same values for any cutting, and one pass in ascending order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from evomerge.merging.methods.base import Block, Blocks
from evomerge.merging.methods.reductions import SEGMENT
from evomerge.merging.methods.rows import RowWindow, row_segments


def cut(x: Tensor, size: int) -> Blocks:
    def blocks() -> Iterator[Block]:
        for start in range(0, x.numel(), size):
            yield Block(None, x[None, start : start + size], start)

    return blocks


def row_sums(width: int, calls: list[int]) -> Callable[[Block], Tensor]:
    def values(rows: Block) -> Tensor:
        calls.append(rows.start)
        return rows.sources.view(-1, width).sum(1).repeat_interleave(width)[None]

    return values


@pytest.mark.parametrize("block_size", [1000, 4096, 10**6])
@pytest.mark.parametrize("width", [1, 7, 1000, 140_000])
def test_every_element_sees_its_whole_row_once(width: int, block_size: int) -> None:
    x = torch.arange(280_000 // width * width, dtype=torch.float32) % 11
    expected = x.view(-1, width).sum(1).repeat_interleave(width)
    calls: list[int] = []
    window = RowWindow(cut(x, block_size), width, row_sums(width, calls))
    found = [window.at(b.start, b.sources.shape[1])[0] for b in cut(x, block_size)()]
    assert torch.equal(torch.cat(found), expected)
    assert calls == sorted(set(calls))


def test_going_back_starts_over() -> None:
    x = torch.arange(300_000, dtype=torch.float32) % 7
    calls: list[int] = []
    window = RowWindow(cut(x, 5000), 10, row_sums(10, calls))
    last, first = window.at(299_990, 10), window.at(0, 10)
    assert last.tolist() == [[x[-10:].sum()] * 10]
    assert first.tolist() == [[x[:10].sum()] * 10]
    assert len(calls) == 2  # of what lies between nothing was computed


def test_segments_hold_whole_rows() -> None:
    segments = list(row_segments(cut(torch.zeros(10 * 70_000), 999), 70_000))
    assert [s.sources.shape[1] for s in segments] == [70_000] * 10
    small = list(row_segments(cut(torch.zeros(300_000), 999), 3))
    assert [s.sources.shape[1] for s in small[:-1]] == [SEGMENT // 3 * 3] * (len(small) - 1)
