"""WIDEN: weigh each column of each task vector by how much it changed in size and direction.

Knows nothing of checkpoints, devices or studies; of a tensor's name it asks whether it embeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.merging.layout import tensor_type
from evomerge.merging.methods.base import Block, Blocks, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.combination import moved, sole
from evomerge.merging.methods.matrices import active, gathered, task_vector


def widen(base: Tensor, sources: Tensor, shares: Tensor, *, weights: Sequence[float]) -> Tensor:
    """Add task vectors, each column with a share of its own.

        Wᵢ = Dᵢ·diag(mᵢ)                        (m: norms of the columns, D: directions)
        aᵢ = |mᵢ − m₀| and bᵢ = 1 − cos(Dᵢ, D₀) by column, as ranks 0, 1/c, ... (c columns)
        S(x)ᵢ = softmax over i of xᵢ, but `calibration` where xᵢ > ratio·mean(xᵢ)
        θ  = θ₀ + Σᵢ λ·wᵢ·sᵢ ⊙ (θᵢ − θ₀)        sᵢ = ½·(S(a)ᵢ + S(b)ᵢ)
        sᵢ = S(|τ|)ᵢ                            for a tensor that is not a matrix, without ranks

    Shapes: base [n], sources [s, n] float32, shares sᵢ [s, n] float64 from `importance`, weights
    λ·w [s]; returns [n] float32. Shares and their products with weights are float64, products with
    τ and sums float32. Matrices are held as wholes to rank their columns: five copies in float64.
    With λ = 0 or without a weight the result is the base bit for bit; a lone source of λ·w = 1 is
    returned bit for bit under `calibration` 1. Columns that several sources changed much get 1 from
    each, so that shares may sum to s. A source of weight 0 takes no part.

    Source: Yu et al. 2024, arXiv:2408.03092 (sec. 3) and the authors' code. They have no weights;
    cosines of 1 − 1e-9, as of fine-tunes, are beyond their float32, so that direction ranks are
    partly rounding there; a zero column is NaN there and has the direction 0 here.
    """
    total: Tensor | None = None
    for source, share, weight in zip(sources, shares, weights, strict=True):
        term = (source - base).mul_((share * weight).float())
        total = term if total is None else total.add_(term)
    return moved(base, total)


def importance(significance: Tensor, *, ratio: float, calibration: float) -> Tensor:
    """S(x): softmax over the sources; `calibration` where x exceeds `ratio` times its mean.

    Shapes: significance x [s, c] float64; returns [s, c] float64.
    """
    weights = (significance - significance.amax(0)).exp_()
    scores = weights / weights.sum(0)
    important = significance > significance.mean(1, keepdim=True) * ratio
    return scores.masked_fill_(important, calibration)


def ranks(values: Tensor) -> Tensor:
    """The rank of each value, ascending, as a share of all; equal ones by index.

    Shapes: values [c]; returns [c] float64 in {0, 1/c, ..., (c − 1)/c}.
    """
    count = len(values)
    places = torch.arange(count, dtype=torch.float64, device=values.device) / count
    return torch.empty_like(places).scatter_(0, torch.argsort(values, stable=True), places)


@dataclass(frozen=True)
class Prepared:
    """Shares [s', c] float64 of the `chosen` sources [s']: element j has that of column
    (j // stride) mod c."""

    chosen: list[int]
    shares: Tensor
    stride: int


class Widen(MergeMethod):
    """`widen` as a plug-in."""

    name = "widen"
    summary = "task vectors weighted by how much each column changed in size and direction"
    formula = "θ = θ₀ + λ·Σᵢ wᵢ·sᵢ⊙(θᵢ − θ₀),  s: softmax of change ranks, 1 for the important ones"
    parameters = (
        Parameter("weight", "source", "float", 1.0, "factor of the source's task vector"),
        Parameter(
            "ratio",
            "recipe",
            "float",
            1.0,
            "a column is important whose change ranks above this multiple of the mean",
            low=0.0,
        ),
        Parameter("calibration", "recipe", "float", 1.0, "share of an important column", low=0.0),
        Parameter("lambda", "recipe", "float", 1.0, "factor of the merged task vector"),
    )

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> Prepared | None:
        chosen = active(coefficients)
        if coefficients.number("lambda") == 0 or not chosen:
            return None
        changes, stride = _changes(blocks, coefficients, chosen)
        ratio, calibration = coefficients.number("ratio"), coefficients.number("calibration")
        scores = [importance(x, ratio=ratio, calibration=calibration) for x in changes]
        return Prepared(chosen, torch.stack(scores).mean(0), stride)

    def merge(self, block: Block, coefficients: Coefficients, prepared: Prepared | None) -> Tensor:
        assert block.base is not None
        if prepared is None:
            return block.base.clone()
        scale = coefficients.number("lambda")
        weights = [scale * weight for weight in coefficients.floats("weight")]
        only = sole(weights)
        if only is not None and coefficients.number("calibration") == 1:
            return block.sources[only].clone()
        places = torch.arange(block.start, block.start + len(block.base), device=block.base.device)
        columns = (places // prepared.stride) % prepared.shares.shape[1]
        return widen(
            block.base,
            block.sources[prepared.chosen],
            prepared.shares[:, columns],
            weights=[weights[index] for index in prepared.chosen],
        )


def _changes(
    blocks: Blocks, coefficients: Coefficients, chosen: Sequence[int]
) -> tuple[list[Tensor], int]:
    """What tells how important a column is to each source, and how far apart columns lie.

    Shapes: returns one or two times [s', c] float64.
    """
    if len(coefficients.shape) != 2:
        taus = [task_vector(blocks, coefficients, index).flatten().abs_() for index in chosen]
        return [torch.stack(taus)], 1
    # an embedding's columns are its tokens
    by_row = tensor_type(coefficients.tensor) == "embedding"
    axis, stride = (1, coefficients.shape[1]) if by_row else (0, 1)
    base = gathered(blocks, coefficients, _base)
    sizes, directions = [], []
    for index in chosen:
        source = gathered(blocks, coefficients, _source(index))
        size, direction = _change(source, base, axis)
        sizes.append(ranks(size))
        directions.append(ranks(direction))
    return [torch.stack(sizes), torch.stack(directions)], stride


def _change(source: Tensor, base: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """|m − m₀| and 1 − cos(D, D₀) of each column. Shapes: [m, n] float64 twice; returns [c] twice.

    1 − cos is computed as ½·‖D − D₀‖², which keeps its digits where the columns hardly differ.
    """
    m, m0 = (torch.linalg.vector_norm(x, dim=axis, keepdim=True) for x in (source, base))
    apart = source / m.masked_fill(m == 0, 1) - base / m0.masked_fill(m0 == 0, 1)
    half = apart.square_().sum(axis) / 2
    lone = ((m == 0) != (m0 == 0)).squeeze(axis)
    return (m - m0).abs_().squeeze(axis), half.masked_fill_(lone, 1.0)


def _source(index: int) -> Callable[[Block], Tensor]:
    return lambda block: block.sources[index]


def _base(block: Block) -> Tensor:
    assert block.base is not None
    return block.base
