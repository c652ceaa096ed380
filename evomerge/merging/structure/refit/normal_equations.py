"""Least squares of a layer from sums of products: what is summed over rows, and its solution.

All sums are float64. Knows no network and no data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Gram:
    """XᵀX [d + 1, d + 1] of rows with a further column of ones."""

    total: Tensor
    rows: int = 0

    def add(self, x: Tensor) -> None:
        """Count rows [n, d + 1]."""
        self.total += x.T @ x
        self.rows += len(x)


@dataclass(eq=False)
class Products:
    """XᵀY [d + 1, o] of rows with a further column of ones, and Σ Y²."""

    cross: Tensor
    square: Tensor

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count rows [n, d + 1] and [n, o]."""
        self.cross += x.T @ y
        self.square += y.square().sum()


@dataclass(frozen=True, eq=False)
class Equations:
    """What W = argmin ‖X Wᵀ − Y‖² + λ‖W − W₀‖² must solve, λ = `ridge`·mean(diag XᵀX).

    Entries of W that are not `allowed` [o, d] stay as they are in W₀; None allows all. With `bias`
    the last column of X is ones, and that of W the bias: λ does not count it, and it is allowed.

    Shapes: gram XᵀX [d, d], cross XᵀY [d, o], d with the column of the bias; square ‖Y‖².
    """

    gram: Tensor
    cross: Tensor
    square: Tensor
    ridge: float
    allowed: Tensor | None
    bias: bool

    def solved(self, start: Tensor) -> Tensor:
        """W [o, d] from W₀ = `start` [o, d]; of several that are best, the nearest to W₀.

        One factorization for all outputs that are allowed the same inputs.
        """
        left = self.gram.clone()
        diagonal = left.diagonal()[: len(left) - self.bias]
        added = self.ridge * float(diagonal.mean())
        diagonal += added
        right = self.cross - self.gram @ start.T
        out = start.clone()
        for columns, rows in self._blocks(start):
            block = left[columns[:, None], columns], right[columns[:, None], rows]
            out[rows[:, None], columns] += _solution(*block, definite=added > 0).T
        return out

    def error(self, weight: Tensor) -> float:
        """‖X Wᵀ − Y‖²; what rounding leaves of 0 is about 1e-15·‖Y‖²."""
        products = (self.gram @ weight.T - 2 * self.cross) * weight.T
        return max(0.0, float(products.sum() + self.square))

    def _blocks(self, start: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(columns, rows) of entries that are solved for together."""
        allowed = self.allowed
        if allowed is None:
            allowed = start.new_ones(len(start), start.shape[1] - self.bias, dtype=torch.bool)
        patterns, which = torch.unique(allowed, dim=0, return_inverse=True)
        if self.bias:
            patterns = torch.cat([patterns, patterns.new_ones(len(patterns), 1)], 1)
        return [(p.nonzero()[:, 0], (which == k).nonzero()[:, 0]) for k, p in enumerate(patterns)]


def _solution(left: Tensor, right: Tensor, *, definite: bool) -> Tensor:
    """X of A X = B for a symmetric A [d, d] without negative eigenvalues; of several the least."""
    if definite:
        factor, failed = torch.linalg.cholesky_ex(left)
        if not bool(failed):
            return torch.cholesky_solve(right, factor)
    inverse: Tensor = torch.linalg.pinv(left, hermitian=True)
    return inverse @ right
