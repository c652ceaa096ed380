"""AdaMerging: task arithmetic with coefficients that were learned from unlabelled data.

The learning is `evomerge.merging.fitted.adamerging`; this only applies what it found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from evomerge.merging.kernels.program import Program
from evomerge.merging.methods.base import (
    Block,
    Blocks,
    Coefficients,
    Fitted,
    MergeMethod,
    Parameter,
)
from evomerge.merging.methods.combination import moved, weighted_sum
from evomerge.merging.methods.election import elect
from evomerge.merging.methods.selection import Cut
from evomerge.merging.methods.task_arithmetic import TaskArithmetic
from evomerge.merging.methods.ties import trimmed_votes

_TASK_ARITHMETIC = TaskArithmetic()


def agreeing_votes(block: Block, trims: Sequence[Cut], tie: int) -> list[Tensor]:
    """TIES' share of each source: τ̂ᵢ where it has the elected sign, else 0.

    The election is unweighted, so that coefficients do not move it. Shapes: s times [n].
    """
    votes = trimmed_votes(block, trims, [1.0] * len(trims))
    elected = elect(votes, tie)
    return [torch.where(vote * elected > 0, vote, 0.0) for vote in votes]


@dataclass(frozen=True)
class _Prepared:
    """`coefficients` are task arithmetic's; `trims` [s] are None without a selection."""

    coefficients: Coefficients
    trims: tuple[Cut, ...] | None
    tie: int


class AdaMerging(MergeMethod):
    """Task vectors, or TIES' share of each, times what was learned for each tensor and source.

        θ = θ₀ + Σᵢ sᵢ·λᵢ·τᵢ                     task arithmetic with weights sᵢ·λᵢ
        θ = θ₀ + Σᵢ sᵢ·λᵢ·τ̂ᵢ⊙[sign(τ̂ᵢ) = γ]      ++, γ = sign(Σᵢ τ̂ᵢ)

    All arithmetic is float32, sᵢ·λᵢ float64. A tensor that the fit did not learn (no parameter of
    the live model) has the fit's first λ for every source.

    Source: Yang et al. 2024, arXiv:2310.02575, and the authors' code.
    """

    name = "adamerging"
    summary = "task arithmetic, its coefficients by tensor and source learned without labels"
    formula = "θ = θ₀ + Σᵢ sᵢ·λᵢ·τᵢ,  λ learned"
    parameters = (
        Parameter("scale", "source", "float", 1.0, "factor of what was learned for the source"),
    )
    artifact = "adamerging"

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> _Prepared:
        fitted, name = coefficients.fitted, coefficients.tensor
        assert fitted is not None
        found = by_source(fitted, name, coefficients.names)
        factors = coefficients.floats("scale")
        weights = tuple(scale * value for scale, value in zip(factors, found, strict=True))
        recipe = {"lambda": 1.0, "normalize": False}
        told = replace(coefficients, source={"weight": weights}, recipe=recipe)
        selection = fitted.facts["selection"]
        if selection is None or name not in selection["trims"]:
            return _Prepared(told, None, 0)
        trims = dict(zip(fitted.facts["sources"], selection["trims"][name], strict=True))
        cuts = tuple(Cut(*trims[source]) for source in coefficients.names)
        return _Prepared(told, cuts, selection["tie"])

    def program(self, coefficients: Coefficients, prepared: _Prepared) -> Program | None:
        if prepared.trims is not None:  # an election in which λ has no vote is no Program
            return None
        return _TASK_ARITHMETIC.program(prepared.coefficients, None)

    def merge(self, block: Block, coefficients: Coefficients, prepared: _Prepared) -> Tensor:
        told = prepared.coefficients
        if prepared.trims is None:
            return _TASK_ARITHMETIC.merge(block, told, None)
        assert block.base is not None
        votes = agreeing_votes(block, prepared.trims, prepared.tie)
        return moved(block.base, weighted_sum(votes, told.floats("weight")))


def by_source(fitted: Fitted, tensor: str, names: Sequence[str]) -> list[float]:
    """What a fit learned of one tensor for each of these sources [s]; its start where nothing."""
    if tensor not in fitted:
        return [float(fitted.facts["start"])] * len(names)
    values = dict(zip(fitted.facts["sources"], fitted.tensor(tensor).tolist(), strict=True))
    return [values[name] for name in names]
