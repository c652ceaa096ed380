"""DAM: a weighted sum of models, or of task vectors, with weights by column that a fit learned.

The learning is `evomerge.merging.fitted.dam`; this only applies its mergers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import MergeError
from evomerge.merging.kernels.program import Program, copy_of, weighted
from evomerge.merging.methods.base import Block, Blocks, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.combination import moved, sole, task_vectors, weighted_sum
from evomerge.merging.methods.mergers import Grid, factors


@dataclass(frozen=True)
class _Mix:
    """What every source is multiplied by, [s, g] float64 of exact float32, around an origin."""

    factors: Tensor
    grid: Grid
    around_base: bool

    @property
    def shares(self) -> list[float]:
        """Of a tensor with one group: its factor for every source."""
        return self.factors[:, 0].tolist()


class Dam(MergeMethod):
    """Models, or task vectors, weighted by what a fit learned for each of their columns.

        c̄ᵢ = mean over the tensor's columns of φ(mᵢ)
        cᵢ = (1 − d)·c̄ᵢ + d·φ(mᵢ)                  (d: detail)
        θ  = Σᵢ ((1 − λᵢ)/N + λᵢ·cᵢ) ⊙ θᵢ           (anchor none)
        θ  = θ₀ + Σᵢ λᵢ·cᵢ ⊙ (θᵢ − θ₀)              (anchor base)

    Columns are groups of elements along one axis, as the artifact says. φ in float32, blending in
    float64, products and sums in float32 in the order of the sources' names. λ = 1 is the fit; λ =
    0 is the uniform average, or the base bit for bit. One source with coefficient 1 is that source
    bit for bit. A tensor that was not trained has φ(m) = 1/N.

    Source: arXiv:2410.08371 and its released code, which has neither λ nor d.
    """

    name = "dam"
    summary = "weights by column and source, learned to keep each source's answers on its data"
    formula = "θ = Σᵢ φ(mᵢ)⊙θᵢ, or θ₀ + Σᵢ φ(mᵢ)⊙(θᵢ − θ₀)"
    parameters = (
        Parameter("scale", "source", "float", 1.0, "1: as fitted; 0: uniform average, or no part"),
        Parameter(
            "detail",
            "recipe",
            "float",
            1.0,
            "1: columns as fitted; 0: each tensor's mean coefficient",
        ),
    )
    needs_base = False
    takes_base = True
    artifact = "dam"

    def survey(self, model: Callable[[], Iterable[tuple[Coefficients, Blocks]]]) -> None:
        for coefficients, blocks in model():
            fitted = coefficients.fitted
            assert fitted is not None
            if fitted.facts["anchor"] == "base" and next(iter(blocks())).base is None:
                raise MergeError("dam: was fitted around a base; give the recipe its `base`")
            return

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> _Mix:
        fitted, count = coefficients.fitted, len(coefficients.names)
        assert fitted is not None
        found = factors(fitted, coefficients.tensor, count)
        phi = torch.full((count, 1), 1 / count).double() if found is None else found.double()
        detail = coefficients.number("detail")
        if detail != 1:
            phi = (1 - detail) * phi.mean(1, keepdim=True) + detail * phi
        if detail == 0:
            phi = phi[:, :1]
        scale = torch.tensor(coefficients.floats("scale"), dtype=torch.float64)[:, None]
        around_base = fitted.facts["anchor"] == "base"
        mixed = scale * phi if around_base else (1 - scale) / count + scale * phi
        axis = fitted.facts["axes"].get(coefficients.tensor, 0)
        return _Mix(mixed, Grid(coefficients.shape, axis, mixed.shape[1]), around_base)

    def program(self, coefficients: Coefficients, prepared: Any) -> Program | None:
        mix: _Mix = prepared
        if mix.grid.groups > 1:
            return None
        if (only := sole(mix.shares)) is not None:
            return copy_of(only)
        return weighted(mix.shares, "base" if mix.around_base else "zero")

    def merge(self, block: Block, coefficients: Coefficients, prepared: Any) -> Tensor:
        mix: _Mix = prepared
        rows: Iterable[Tensor] = block.sources
        if mix.around_base and block.base is not None:
            rows = task_vectors(block.base, block.sources)
        if mix.grid.groups > 1:
            total = _by_column(rows, mix, block)
        elif (only := sole(mix.shares)) is not None:
            return block.sources[only].clone()
        else:
            total = weighted_sum(rows, mix.shares)
        if mix.around_base and block.base is not None:
            return moved(block.base, total)
        return torch.zeros_like(block.sources[0]) if total is None else total


def _by_column(rows: Iterable[Tensor], mix: _Mix, block: Block) -> Tensor | None:
    """Σᵢ cᵢ⊙xᵢ, each element with its column's c, without the sources that have no part."""
    shares = mix.grid.spread(mix.factors.float(), block.start, block.sources.shape[1])
    has_part = mix.factors.ne(0).any(1).tolist()
    total: Tensor | None = None
    for row, factor, part in zip(rows, shares, has_part, strict=True):
        if part:
            term = row * factor
            total = term if total is None else total.add_(term)
    return total
