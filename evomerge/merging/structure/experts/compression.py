"""A matrix as a low-rank product plus a few whole rows, and how that is stored.

Knows no expert, no importance and no training: which rows stay is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

PARTS = ("u", "v", "rows", "values")
"""What is stored of a matrix, each under its name and a dot."""


def decomposed(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best product of a rank, and what it leaves: (U, V, S).

        W = Q Σ Rᵀ,   U = Q·√Σ,   V = √Σ·Rᵀ   of the r largest singular values
        S = W − U V

    Shapes: W [m, n]; U [m, r], V [r, n], S [m, n]. Computed in float64; U and V are then rounded to
    W's dtype, and S is what those leave, so that U V + S is W but for one rounding, exact in
    float64 up to that of the sum.

    Source: Li et al. 2024, arXiv:2310.01334, sec. 3.2. The rank is an integer; the authors' code
    takes it through a ratio.
    """
    whole = weight.double()
    q, sigma, r = torch.linalg.svd(whole, full_matrices=False)
    root = sigma[:rank].sqrt()
    u, v = (q[:, :rank] * root).to(weight.dtype), (root[:, None] * r[:rank]).to(weight.dtype)
    return u, v, (whole - u.double() @ v.double()).to(weight.dtype)


def largest_rows(s: Tensor, density: float) -> Tensor:
    """S [m, n] with that share of its rows, rounded, the longest of them; 0 elsewhere. Ours: the
    published choice is by gradients."""
    kept = s.norm(dim=1).argsort(descending=True, stable=True)[: round(density * len(s))]
    return torch.zeros_like(s).index_copy_(0, kept, s[kept])


@dataclass(frozen=True)
class Compressed:
    """U V + S of shape [m, n]: u [m, r], v [r, n]; S has the values [k, n] at its `rows` [k] int32,
    in rising order, and is 0 elsewhere."""

    u: Tensor
    v: Tensor
    rows: Tensor
    values: Tensor

    @classmethod
    def of(cls, u: Tensor, v: Tensor, s: Tensor) -> Compressed:
        """From a whole S [m, n]: its rows with any entry that is not 0. (The authors' code looks at
        a row's sum, which is 0 for rows of 1 and −1 too.)"""
        rows = s.ne(0).any(1).nonzero()[:, 0]
        return cls(u, v, rows.int(), s[rows])

    @classmethod
    def read(cls, name: str, tensors: Mapping[str, Tensor]) -> Compressed:
        """As `stored` has named it."""
        return cls(*(tensors[f"{name}.{part}"] for part in PARTS))

    def stored(self, name: str) -> dict[str, Tensor]:
        """Its tensors, by the names that they are stored under."""
        return {f"{name}.{part}": getattr(self, part) for part in PARTS}

    @property
    def shape(self) -> tuple[int, int]:
        """Of the whole matrix."""
        return self.u.shape[0], self.v.shape[1]

    @property
    def parameters(self) -> int:
        """Numbers that it consists of; the places of rows are none."""
        return self.u.numel() + self.v.numel() + self.values.numel()

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Compressed:
        """Rounded once to a dtype."""
        u, v, values = (t.to(device, dtype) for t in (self.u, self.v, self.values))
        return Compressed(u, v, self.rows.to(device), values)

    def dense(self) -> Tensor:
        """U V + S, [m, n], in the parts' dtype; computed in float32 at least."""
        wide = torch.promote_types(self.u.dtype, torch.float32)
        product = self.u.to(wide) @ self.v.to(wide)
        return product.index_add_(0, self.rows, self.values.to(wide)).to(self.u.dtype)

    def times(self, x: Tensor) -> Tensor:
        """(U V + S) x of inputs x [..., n]; returns [..., m]. W is never built."""
        return linear(linear(x, self.v), self.u).index_add(-1, self.rows, linear(x, self.values))
