"""Random programs of kernels and what torch makes of them, shared by the tests of the devices."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.merging.kernels.program import Draw, Election, Program, Row
from evomerge.merging.methods import election
from evomerge.merging.methods.combination import moved, weighted_sum
from evomerge.merging.methods.masks import draws
from evomerge.merging.methods.selection import KEEP_ALL, KEEP_NONE, Cut

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def values(chance: random.Random, dtype: torch.dtype, size: int) -> Tensor:
    """Multiples of 1/8 near 0 among others, so that magnitudes are equal and votes cancel; zeros of
    both signs; subnormals."""
    generator = torch.Generator().manual_seed(chance.getrandbits(32))
    found = torch.randn(size, generator=generator) * 0.3
    grid = torch.randint(-4, 5, (size,), generator=generator) / 8
    kind = torch.randint(0, 10, (size,), generator=generator)
    found = torch.where(kind < 5, grid, found)
    found[kind == 9] *= 1e-39 if dtype != torch.float16 else 1e-6
    found[::97] = -0.0
    return found.to(dtype)


def random_program(chance: random.Random, sources: int, size: int) -> Program:
    """A program for tensors of `size` elements."""
    kinds = chance.choice([(), ("cut",), ("draw",), ("cut", "top"), ("cut", "top", "draw")])
    chosen = chance.sample(range(sources), chance.randint(1, sources))
    vote = Election(
        tie=chance.choice([-1, 0, 1]),
        aggregate=chance.choice(["mean", "mean", "sum", "max"]),
        normalize=chance.random() < 0.8,
        scale=chance.choice([1.0, 0.3, -2.0]),
    )
    return Program(
        rows=tuple(random_row(chance, source, size, kinds) for source in chosen),
        origin=chance.choice(["base", "base", "zero"]),
        election=chance.choice([vote, vote, None]),
    )


def random_row(chance: random.Random, source: int, size: int, kinds: Sequence[str]) -> Row:
    key = chance.getrandbits(64) - 2**63
    threshold = chance.choice([0, 2**32, 2**31, chance.getrandbits(32)])
    return Row(
        source=source,
        factor=chance.choice([1.0, -1.0, 0.5, chance.gauss(0, 1), 1e-42]),
        weight=chance.choice([1.0, -1.0, 0.7, chance.gauss(0, 1), 1e-9]),
        cut=_random_cut(chance, size) if "cut" in kinds and chance.random() < 0.8 else None,
        top=_random_cut(chance, size) if "top" in kinds and chance.random() < 0.8 else None,
        draw=Draw(key, threshold) if "draw" in kinds and chance.random() < 0.8 else None,
    )


def _random_cut(chance: random.Random, size: int) -> Cut:
    pattern = int(torch.tensor(chance.choice([0.0, 0.125, 0.25, 0.31])).view(torch.int32))
    last = chance.choice([-3, 0, 5, size // 2, size - 2, size, 2**61])
    return chance.choice([Cut(pattern, last), Cut(pattern, last), KEEP_ALL, KEEP_NONE])


def by_torch(
    program: Program, base: Tensor | None, sources: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """A program carried out by the torch functions that the methods are made of."""
    merged: Tensor | None
    parts = [_part(program, row, base, sources) for row in program.rows]
    factors = [row.factor for row in program.rows]
    if program.election is None:
        merged = weighted_sum(parts, factors)
        assert merged is not None
    else:
        vote = program.election
        votes = [part * factor for part, factor in zip(parts, factors, strict=True)]
        weights = [row.weight for row in program.rows]
        merged = election.consensus(
            votes, weights, tie=vote.tie, aggregate=vote.aggregate, normalize=vote.normalize
        ).mul_(vote.scale)
    if program.origin == "base":
        assert base is not None
        merged = moved(base.float(), merged)
    return merged.to(dtype)


def votes_of(program: Program, base: Tensor | None, sources: Sequence[Tensor]) -> list[Tensor]:
    """x of every row."""
    return [_part(program, row, base, sources) * row.factor for row in program.rows]


def _part(program: Program, row: Row, base: Tensor | None, sources: Sequence[Tensor]) -> Tensor:
    x = sources[row.source].float()
    if program.origin == "base":
        assert base is not None
        x = x - base.float()
    kept = torch.ones_like(x, dtype=torch.bool)
    if row.cut is not None:
        kept &= row.cut.mask(x, 0)
    if row.top is not None:
        kept &= ~row.top.mask(x, 0)
    if row.draw is not None:
        kept &= draws(row.draw.key, 0, x.numel()) >= row.draw.threshold
    return x * kept


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def assert_same_bits(got: Tensor, wanted: Tensor) -> None:
    differs = (bits(got) != bits(wanted)).nonzero().flatten().tolist()
    shown = [(i, float(got[i]), float(wanted[i])) for i in differs[:5]]
    assert not differs, f"{len(differs)} of {len(got)} differ: {shown}"
