"""SCE: select the weights on which sources differ most, weigh sources by energy, erase minorities.

Knows nothing of checkpoints, devices or studies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.merging.methods.base import Block, Blocks, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.combination import moved, weighted_sum
from evomerge.merging.methods.election import (
    SIGN_TIE,
    agreement,
    balance,
    elect,
    tie_sign,
)
from evomerge.merging.methods.reductions import totals
from evomerge.merging.methods.selection import (
    KEEP_ALL,
    KEEP_NONE,
    Cut,
    Key,
    Quota,
    cuts,
    kept_count,
)


def sce(
    base: Tensor,
    selected: Sequence[Tensor],
    shares: Sequence[float],
    *,
    tie: int = 0,
    normalize: bool = True,
) -> Tensor:
    """Merge what was selected of each task vector where it has the elected sign.

        τ̂ᵢ = τᵢ where the variance of τ₁, ..., τ_N is among its ⌊d·P⌋ largest      (select)
        ηᵢ = Σⱼ τ̂ᵢⱼ² / Σᵢⱼ τ̂ᵢⱼ²                                                   (calculate)
        γ  = sign(Σᵢ τ̂ᵢ), `tie` where the sum is 0
        θ  = θ₀ + Σ_A ηᵢ·τ̂ᵢ / Σ_A ηᵢ        A = {i : sign(τ̂ᵢ) = γ ≠ 0}             (erase)

    Shapes: base [n]; selected τ̂ N times [n] float32, shares η [N]; returns [n] float32. P counts
    the weights whose variance is not 0. Variances and energies are computed in float64, the rest in
    float32. d = 1 selects everything, variance 0 included; so does a d that would select nothing.
    Without energy, where every source equals the base, the result is the base.

    Source: Wan et al. 2024, arXiv:2408.07990, sec. 3.3, whose merge is Σ_A ηᵢ·τ̂ᵢ (`normalize:
    false`); the divisor is mergekit's. mergekit takes uniform η where the mean energies sum to less
    than 1e-6, as they do for nearly all fine-tunes (see `uniform_below`).
    """
    votes = [tau * share for tau, share in zip(selected, shares, strict=True)]
    elected = elect(selected, tie)
    return moved(base, agreement(votes, shares, elected, normalize=normalize))


@dataclass(frozen=True)
class Prepared:
    """What `merge` must know of a whole tensor: the selection, the shares η, the sign at a tie."""

    cut: Cut
    shares: tuple[float, ...]
    tie: int


class Sce(MergeMethod):
    """`sce` as a plug-in."""

    name = "sce"
    summary = "selects weights that vary most, weighs sources by energy, erases minority signs"
    formula = "θ = θ₀ + Σ_A ηᵢ·τ̂ᵢ / Σ_A ηᵢ,  ηᵢ = Σⱼ τ̂ᵢⱼ²/Σᵢⱼ τ̂ᵢⱼ²,  A = {i : sign τ̂ᵢ = sign Σᵢ τ̂ᵢ}"
    parameters = (
        Parameter(
            "density",
            "recipe",
            "float",
            1.0,
            "share of the weights selected, out of those that vary over the sources",
            low=0.0,
            high=1.0,
        ),
        SIGN_TIE,
        Parameter(
            "normalize", "recipe", "bool", True, "divide by the shares of the agreeing sources"
        ),
        Parameter(
            "uniform_below",
            "recipe",
            "float",
            0.0,
            "weigh sources alike where their mean squares sum to less; mergekit's is 1e-6",
            low=0.0,
        ),
    )

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> Prepared:
        cut = _selection(blocks, coefficients.number("density"))
        energies = totals(blocks, lambda block: torch.stack(_selected(block, cut)).double() ** 2)
        rule, total = coefficients.choice("sign_tie"), 0
        if len(energies) > 1 and rule in ("majority", "authors"):
            total = balance(_selected(block, cut) for block in blocks())
        floor = coefficients.number("uniform_below") * coefficients.size
        return Prepared(cut, _shares(energies, floor), tie_sign(rule, total))

    def merge(self, block: Block, coefficients: Coefficients, prepared: Prepared) -> Tensor:
        assert block.base is not None
        if prepared.cut == KEEP_NONE:
            return block.base.clone()
        if len(block.sources) == 1 and prepared.cut.keeps_all:
            return block.sources[0].clone()
        selected = _selected(block, prepared.cut)
        normalize = coefficients.flag("normalize")
        return sce(block.base, selected, prepared.shares, tie=prepared.tie, normalize=normalize)


def deviation(block: Block) -> Tensor:
    """√Σᵢ (τᵢ − mean τ)², computed in float64. Shapes: returns [n] float32.

    In the order of the variances; and a square root of float32 neither overflows nor underflows.
    """
    assert block.base is not None
    taus = [source.double() - block.base for source in block.sources]
    ones = [1.0] * len(taus)
    total = weighted_sum(taus, ones)
    assert total is not None
    mean = total.div_(len(taus))
    squares = weighted_sum(((tau - mean).square_() for tau in taus), ones)
    assert squares is not None
    return squares.sqrt_().float()


def _selection(blocks: Blocks, density: float) -> Cut:
    if density >= 1:
        return KEEP_ALL
    if density <= 0:
        return KEEP_NONE
    varying = sum(int(torch.count_nonzero(deviation(block))) for block in blocks())
    count = kept_count(varying, density)
    if count == 0:
        return KEEP_ALL

    def rows() -> Iterator[tuple[Key, int, Tensor]]:
        return (("deviation", block.start, deviation(block)) for block in blocks())

    return cuts(rows, {"deviation": Quota(count)})["deviation"]


def _selected(block: Block, cut: Cut) -> list[Tensor]:
    """τ̂ᵢ. Shapes: N times [n]."""
    assert block.base is not None
    taus = [source - block.base for source in block.sources]
    if cut.keeps_all:
        return taus
    mask = cut.mask(deviation(block), block.start)
    return [tau * mask for tau in taus]


def _shares(energies: Sequence[float], floor: float) -> tuple[float, ...]:
    total = sum(energies)
    if total == 0 or total < floor:
        return (1 / len(energies),) * len(energies)
    return tuple(energy / total for energy in energies)
