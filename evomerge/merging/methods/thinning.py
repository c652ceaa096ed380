"""Merging task vectors of which each was thinned on its own: as a sum, or after an election.

Knows nothing of how they were thinned: that is a `Thinning`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from evomerge.merging.kernels.program import Program, Row, copy_of
from evomerge.merging.methods.base import Block, Blocks, Coefficients, facts_of
from evomerge.merging.methods.combination import moved, normalised, sole, weighted_sum
from evomerge.merging.methods.election import (
    balance,
    consensus,
    election_program,
    needs_balance,
    sole_voter,
    tie_sign,
)


class Rows(Protocol):
    """A thinning that can be said as data."""

    def keeps_all(self, source: int) -> bool:
        """As in `Thinning`."""

    def row(self, source: int, factor: float, weight: float) -> Row:
        """factor·τ̂ᵢ, which counts `weight` in a divisor."""


class Thinning(Protocol):
    """How the task vectors of one tensor are thinned."""

    def keeps_all(self, source: int) -> bool:
        """Whether a source's task vector is left as it is, whatever the values."""

    def tau(self, block: Block, source: int) -> Tensor:
        """τ̂ᵢ, rescaled if the method does that. Shapes: returns [n]."""


@dataclass(frozen=True)
class Ballot:
    """A thinning, and the sign elected where its votes sum to 0 (None: left to the kernel)."""

    thinning: Thinning
    tie: int | None


def thinned_sum(block: Block, thinning: Thinning, coefficients: Coefficients) -> Tensor:
    """θ₀ + λ·Σᵢ wᵢ·τ̂ᵢ, wᵢ/Σw in place of wᵢ with `normalize`; sources of share 0 are not thinned.

    A lone source of share 1 that is left whole is returned bit for bit. Shapes: returns [n].
    """
    assert block.base is not None
    shares = _shares(coefficients)
    only = sole(shares)
    if only is not None and thinning.keeps_all(only):
        return block.sources[only].clone()
    active = [index for index, share in enumerate(shares) if share != 0]
    taus = (thinning.tau(block, index) for index in active)
    return moved(block.base, weighted_sum(taus, [shares[index] for index in active]))


def sum_program(thinning: Rows, coefficients: Coefficients) -> Program:
    """`thinned_sum` as data."""
    shares = _shares(coefficients)
    only = sole(shares)
    if only is not None and thinning.keeps_all(only):
        return copy_of(only)
    rows = (thinning.row(i, share, 1.0) for i, share in enumerate(shares) if share != 0)
    return Program(tuple(rows), "base")


def _shares(coefficients: Coefficients) -> list[float]:
    scale, normalize = coefficients.number("lambda"), coefficients.flag("normalize")
    weights = normalised(coefficients.floats("weight"), normalize=normalize)
    return [scale * weight for weight in weights]


def balloted(
    blocks: Blocks, thinning: Thinning, coefficients: Coefficients, *, kernel_counts: bool = False
) -> Ballot:
    """The ballot of a whole tensor; reads it if the rule for ties asks for the balance.

    `kernel_counts` says that the thinning is `Rows`, so that a kernel can count it.
    """
    weights, total = coefficients.floats("weight"), 0
    if needs_balance(coefficients):
        if kernel_counts and facts_of(blocks):
            return Ballot(thinning, None)
        total = balance(thinned_votes(block, thinning, weights) for block in blocks())
    return Ballot(thinning, tie_sign(coefficients.choice("sign_tie"), total))


def consensus_program(thinning: Rows, tie: int | None, coefficients: Coefficients) -> Program:
    """`thinned_consensus` as data."""
    weights = coefficients.floats("weight")
    rows = [thinning.row(index, weight, weight) for index, weight in enumerate(weights)]
    whole = [thinning.keeps_all(index) for index in range(len(weights))]
    return election_program(coefficients, rows, tie=tie, whole=whole)


def thinned_consensus(block: Block, ballot: Ballot, coefficients: Coefficients) -> Tensor:
    """θ₀ + λ·consensus of the votes wᵢ·τ̂ᵢ. Shapes: returns [n].

    A lone voter of coefficient 1 that is left whole is returned bit for bit.
    """
    assert block.base is not None
    weights, scale = coefficients.floats("weight"), coefficients.number("lambda")
    voters = [weight for weight in weights if weight != 0]
    if scale == 0 or not voters:
        return block.base.clone()
    whole = sole_voter(coefficients)
    if whole is not None and ballot.thinning.keeps_all(whole):
        return block.sources[whole].clone()
    assert ballot.tie is not None
    tau = consensus(
        thinned_votes(block, ballot.thinning, weights),
        voters,
        tie=ballot.tie,
        aggregate=coefficients.choice("aggregate"),
        normalize=coefficients.flag("normalize"),
    )
    return moved(block.base, tau.mul_(scale))


def thinned_votes(block: Block, thinning: Thinning, weights: Sequence[float]) -> list[Tensor]:
    """wᵢ·τ̂ᵢ for the sources that have a weight. Shapes: s' times [n]."""
    return [
        thinning.tau(block, index) * weight for index, weight in enumerate(weights) if weight != 0
    ]
