"""Model Stock: average the sources, and move the average towards the base as their angles say.

Knows nothing of checkpoints, devices or studies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evomerge.merging.kernels.program import BASE, Program, Row
from evomerge.merging.methods.base import (
    Block,
    Blocks,
    Coefficients,
    MergeMethod,
    Parameter,
    facts_of,
)
from evomerge.merging.methods.combination import moved, task_vectors
from evomerge.merging.methods.reductions import pairwise_sum, totals
from evomerge.merging.methods.rows import RowWindow, row_length
from evomerge.merging.methods.spheres import gram

POLE = 1e-6
"""A denominator nearer to 0 than this leaves the base (mergekit's constant)."""


def model_stock(base: Tensor, sources: Tensor, ratio: float | Tensor) -> Tensor:
    """Move the base towards the average of the sources.

        c = mean of cos∠(τᵢ, τⱼ) over all pairs i < j, within [0, 1]       τᵢ = θᵢ − θ₀
        t = N·c / (1 + (N − 1)·c)
        θ = θ₀ + Σᵢ (t/N)·τᵢ

    Shapes: base [n], sources [s, n] float32 with N = s; ratio t, one number or [n]; returns [n]
    float32. The cosines are those of whole tensors or rows (`ratios`), in float64; products and
    sums run in float32. A task vector of length 0 has cosine 0 with all others.
    With t = 0 (orthogonal or disagreeing task vectors) the result is the base bit for bit; for
    identical sources t = 1.

    Source: Jang et al. 2024, arXiv:2403.19522, eq. 6. It supposes c ≥ 0, while its t has a pole at
    c = −1/(N − 1) and is negative between it and 0; mergekit computes that (`cosine: free`), we
    take c for 0.
    """
    count = len(sources)
    share = ratio / count
    total: Tensor | None = None
    for tau in task_vectors(base, sources):
        total = tau * share if total is None else total.add_(tau * share)
    return torch.where(torch.as_tensor(ratio == 0), base, moved(base, total))


def ratios(products: Tensor, count: int, *, free: bool) -> Tensor:
    """t for q sets of task vectors.

    Shapes: products ⟨τᵢ, τⱼ⟩ (i ≤ j, by rows) [N·(N+1)/2, q] float64; returns [q] float64. `free`
    takes c as it is; t is then 0 where its denominator is below 1e-6.
    """
    places = [(i, j) for i in range(count) for j in range(i, count)]
    length = {i: products[places.index((i, i))].sqrt() for i in range(count)}
    total = torch.zeros_like(products[0])
    for (i, j), product in zip(places, products, strict=True):
        if i != j:
            scale = length[i] * length[j]
            total += torch.where(scale > 0, product / scale.clamp(min=1e-300), 0.0)
    cosine = total / (count * (count - 1) / 2)
    if not free:
        cosine = cosine.clamp(0, 1)
    below = 1 + (count - 1) * cosine
    return torch.where(below.abs() < POLE, 0.0, count * cosine / below)


class ModelStock(MergeMethod):
    """`model_stock` as a plug-in."""

    name = "model_stock"
    summary = "the average of the sources, as near to the base as their angles say"
    formula = "θ = θ₀ + t·mean(τᵢ),  t = N·c/(1+(N−1)·c),  c = mean cos∠(τᵢ, τⱼ)"
    parameters = (
        Parameter(
            "vectors",
            "recipe",
            "choice",
            "tensor",
            "what an angle is measured between: whole tensors, or their rows (last axis)",
            choices=("tensor", "row"),
        ),
        Parameter(
            "cosine",
            "recipe",
            "choice",
            "clamped",
            "clamped takes a negative mean cosine for 0; free computes with it, as mergekit does, "
            "and has a pole",
            choices=("clamped", "free"),
        ),
    )
    min_sources = 2

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> float | RowWindow:
        count = len(coefficients.names)
        free = coefficients.choice("cosine") == "free"
        if coefficients.choice("vectors") == "row":
            width = row_length(coefficients)

            def by_row(rows: Block) -> Tensor:
                sums = pairwise_sum(_products(rows).view(-1, rows.sources.shape[1] // width, width))
                return ratios(sums, count, free=free).float().repeat_interleave(width)[None]

            return RowWindow(blocks, width, by_row)
        facts = facts_of(blocks)
        products = facts.gram(from_base=True) if facts else totals(blocks, _products)
        sums = torch.tensor(products, dtype=torch.float64)
        return ratios(sums[:, None], count, free=free).item()

    def program(self, coefficients: Coefficients, prepared: float | RowWindow) -> Program | None:
        if isinstance(prepared, RowWindow):
            return None
        count = len(coefficients.names)
        share = prepared / count
        rows = tuple(Row(index, share) for index in range(count))
        return BASE if prepared == 0 else Program(rows, "base")

    def merge(
        self, block: Block, coefficients: Coefficients, prepared: float | RowWindow
    ) -> Tensor:
        assert block.base is not None
        if isinstance(prepared, RowWindow):
            ratio = prepared.at(block.start, block.sources.shape[1])[0]
            return model_stock(block.base, block.sources, ratio)
        return model_stock(block.base, block.sources, prepared)


def _products(block: Block) -> Tensor:
    assert block.base is not None
    return gram(block.sources - block.base)
