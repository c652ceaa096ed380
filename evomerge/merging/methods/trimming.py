"""Which entries of each task vector TIES keeps: one trim per source and tensor.

Knows densities and scopes; how an exact threshold is found in a stream is `selection`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from evomerge.merging.methods.base import Blocks, Coefficients, facts_of
from evomerge.merging.methods.selection import (
    KEEP_ALL,
    KEEP_NONE,
    Cut,
    Key,
    Quota,
    cuts,
    kept_count,
)

Stream = Callable[[], Iterable[tuple[Coefficients, Blocks]]]
"""Streams tensors; may be called more than once."""


class _Group(NamedTuple):
    """What is trimmed as one vector: one source's tensors of one density and rule."""

    source: int
    density: float
    rule: str


def trims_of(stream: Stream, *, across: bool) -> dict[str, tuple[Cut, ...]]:
    """Each source's trim for every tensor of the stream: {tensor: trims [s]}.

    `across` trims all tensors that share a density as one vector, in the stream's order; without
    it the stream must hold one tensor. A trim of one tensor exempts a tensor of fewer than
    1/density elements, of which it would leave nothing; a trim across tensors does not.
    """
    sizes: dict[Key, int] = {}
    spans: dict[str, list[tuple[_Group, int]]] = {}
    for coefficients, _ in stream():
        groups = _groups(coefficients)
        spans[coefficients.tensor] = [(group, sizes.get(group, 0)) for group in groups]
        for group in groups:
            sizes[group] = sizes.get(group, 0) + coefficients.size
    fixed: dict[Key, Cut] = {}
    quotas: dict[Key, Quota] = {}
    for group in {group for row in spans.values() for group, _ in row}:
        cut = _fixed(group.density, sizes[group], across=across)
        if cut is None:
            quotas[group] = _quota(group, sizes[group])
        else:
            fixed[group] = cut
    found = fixed | cuts(lambda: _rows(stream, spans, quotas), quotas)
    return {
        tensor: tuple(found[group].shifted(offset) for group, offset in row)
        for tensor, row in spans.items()
    }


def trims_within(blocks: Blocks, coefficients: Coefficients) -> tuple[Cut, ...]:
    """Each source's trim of one tensor [s]; of a source without weight, which plays no part, none
    is sought."""
    facts = facts_of(blocks)
    if facts is None:
        return trims_of(lambda: [(coefficients, blocks)], across=False)[coefficients.tensor]
    trims = []
    for group, weight in zip(_groups(coefficients), coefficients.floats("weight"), strict=True):
        cut = _fixed(group.density, coefficients.size, across=False)
        if cut is None and weight == 0:
            cut = KEEP_ALL
        quota = _quota(group, coefficients.size)
        trims.append(facts.cut(group.source, quota) if cut is None else cut)
    return tuple(trims)


def _groups(coefficients: Coefficients) -> list[_Group]:
    rule = coefficients.choice("ties_at_threshold")
    return [_Group(i, density, rule) for i, density in enumerate(coefficients.floats("density"))]


def _fixed(density: float, size: int, *, across: bool) -> Cut | None:
    """The trim that no magnitude has a say in; None where a threshold must be found."""
    if density >= 1:
        return KEEP_ALL
    if kept_count(size, density) == 0:
        return KEEP_NONE if across or density <= 0 else KEEP_ALL
    return None


def _quota(group: _Group, size: int) -> Quota:
    count = kept_count(size, group.density)
    if group.rule == "keep_all":
        return Quota(count + 1, all_equal=True)
    return Quota(count)


def _rows(
    stream: Stream,
    spans: Mapping[str, list[tuple[_Group, int]]],
    quotas: Mapping[Key, Quota],
) -> Iterator[tuple[Key, int, Tensor]]:
    """The task vectors whose threshold is sought, each at its place in its group."""
    for coefficients, blocks in stream():
        wanted = [entry for entry in spans[coefficients.tensor] if entry[0] in quotas]
        if not wanted:
            continue
        for block in blocks():
            assert block.base is not None
            for group, offset in wanted:
                yield group, offset + block.start, block.sources[group.source] - block.base
