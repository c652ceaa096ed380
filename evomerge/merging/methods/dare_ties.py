"""DARE with an election: drop entries at random, rescale, then merge what agrees in sign.

Knows nothing of checkpoints, devices or studies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evomerge.merging.kernels.program import Program, Row
from evomerge.merging.methods.base import (
    Block,
    Blocks,
    Coefficients,
    MergeMethod,
    Parameter,
    facts_of,
)
from evomerge.merging.methods.combination import moved
from evomerge.merging.methods.dropping import DROP_PARAMETERS, Drop, drops
from evomerge.merging.methods.election import (
    balance,
    consensus,
    election_parameters,
    election_program,
    needs_balance,
    sole_voter,
    tie_sign,
)


def dare_ties(
    base: Tensor,
    sources: Tensor,
    drops: Sequence[Drop],
    *,
    weights: Sequence[float],
    scale: float = 1.0,
    tie: int = 0,
    aggregate: str = "mean",
    normalize: bool = False,
    start: int = 0,
) -> Tensor:
    """Merge randomly thinned task vectors where they have the elected sign.

        τ̃ᵢ = fᵢ·mᵢ⊙(θᵢ − θ₀)                             (mᵢ and fᵢ: `dropping.drops`)
        γ  = sign(Σᵢ wᵢ·τ̃ᵢ), `tie` where the sum is 0
        θ  = θ₀ + λ·Σ_A wᵢ·τ̃ᵢ       A = {i : sign(wᵢ·τ̃ᵢ) = γ ≠ 0}       (normalize: ÷ Σ_A wᵢ)

    Shapes: base [n], sources [s, n] float32 from flat index `start`; drops and weights [s]; returns
    [n] float32. wᵢ·fᵢ is computed in float64, the rest in float32. `aggregate` and `normalize` as
    in `consensus`. A dropped entry neither votes nor counts in a divisor.
    With λ = 0 or without a weight the result is the base bit for bit.

    Source: Yu et al. 2024, arXiv:2311.03099, with Yadav et al. 2023, arXiv:2306.01708, in place of
    its sum and without the trim. mergekit's `dare_ties` is `rescale: l1, sign_tie: positive`.
    """
    voters = [index for index, weight in enumerate(weights) if weight != 0]
    if scale == 0 or not voters:
        return base.clone()
    votes = _votes(Block(base, sources, start), drops, weights)
    chosen = [weights[index] for index in voters]
    tau = consensus(votes, chosen, tie=tie, aggregate=aggregate, normalize=normalize)
    return moved(base, tau.mul_(scale))


@dataclass(frozen=True)
class Prepared:
    """What `merge` must know of a whole tensor: each source's drop [s], and the sign at a tie.

    The sign is None where it is left to the kernel.
    """

    drops: tuple[Drop, ...]
    tie: int | None


class DareTies(MergeMethod):
    """`dare_ties` as a plug-in."""

    name = "dare_ties"
    summary = "thins task vectors at random, elects a sign per weight and adds what agrees"
    formula = "θ = θ₀ + λ·Σ_A wᵢ·τ̃ᵢ,  τ̃ᵢ = mᵢ⊙τᵢ/dᵢ,  A = {i : sign(wᵢ·τ̃ᵢ) = sign(Σᵢ wᵢ·τ̃ᵢ) ≠ 0}"
    parameters = (
        Parameter("weight", "source", "float", 1.0, "weight in the vote and in the sum"),
        *DROP_PARAMETERS,
        Parameter("lambda", "recipe", "float", 1.0, "factor of the merged task vector"),
        *election_parameters(normalize=False),
    )

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> Prepared:
        thinning = drops(blocks, coefficients)
        weights, total = coefficients.floats("weight"), 0
        if needs_balance(coefficients):
            if facts_of(blocks):
                return Prepared(thinning, None)
            total = balance(_votes(block, thinning, weights) for block in blocks())
        return Prepared(thinning, tie_sign(coefficients.choice("sign_tie"), total))

    def program(self, coefficients: Coefficients, prepared: Prepared) -> Program:
        weights = coefficients.floats("weight")
        rows = [
            Row(index, weights[index] * drop.factor, weights[index], draw=drop.draw)
            for index, drop in enumerate(prepared.drops)
        ]
        whole = [drop.density >= 1 for drop in prepared.drops]
        return election_program(coefficients, rows, tie=prepared.tie, whole=whole)

    def merge(self, block: Block, coefficients: Coefficients, prepared: Prepared) -> Tensor:
        assert block.base is not None
        assert prepared.tie is not None
        whole = sole_voter(coefficients)
        if whole is not None and prepared.drops[whole].density >= 1:
            return block.sources[whole].clone()
        return dare_ties(
            block.base,
            block.sources,
            prepared.drops,
            weights=coefficients.floats("weight"),
            scale=coefficients.number("lambda"),
            tie=prepared.tie,
            aggregate=coefficients.choice("aggregate"),
            normalize=coefficients.flag("normalize"),
            start=block.start,
        )


def _votes(block: Block, drops: Sequence[Drop], weights: Sequence[float]) -> list[Tensor]:
    """vᵢ = wᵢ·τ̃ᵢ for the sources that have a weight. Shapes: s' times [n]."""
    return [
        drop.thinned(source - block.base, block.start).mul_(weight * drop.factor)
        for source, drop, weight in zip(block.sources, drops, weights, strict=True)
        if weight != 0
    ]
