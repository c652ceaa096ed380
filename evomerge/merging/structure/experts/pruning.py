"""Which rows of the sparse matrices of a compression stay: importance, schedule, one threshold.

Knows no model: matrices come as tensors, in an order that does not change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DECAY = 0.85
"""β₁ of the published running mean."""


def remaining(step: int, *, steps: int, dense: int, settled: int, density: float) -> float:
    """The share of S that stays after step t of T, falling as a cubic from 1 to the density P.

        1                                          t < T_i
        P + (1 − P)·(1 − (t − T_i)/(T − T_i − T_f))³   T_i ≤ t < T − T_f
        P                                          from T − T_f on

    T_i are the `dense` first steps, T_f the `settled` last ones.

    Source: Li et al. 2024, arXiv:2310.01334, sec. 3.2, as the authors' code has it: the numerator
    printed in the paper, t − T_i − T_f, makes it jump at T_i.
    """
    if step >= steps - settled:
        return density
    if step < dense:
        return 1.0
    left = 1.0 - (step - dense) / (steps - dense - settled)
    return density + (1.0 - density) * left**3


def row_importance(s: Tensor, gradient: Tensor) -> Tensor:
    """Iᵢ = mean over row i, an output neuron, of |s·∂L/∂s|; of [m, n], returns [m]."""
    return (s * gradient).abs().mean(1)


def blended(before: Tensor, now: Tensor) -> None:
    """Iₜ = β₁·Iₜ₋₁ + (1 − β₁)·I, in place. (A mean over rows of running means is the running mean
    of means over rows, so that [m] is all that is kept.)"""
    before.mul_(DECAY).add_(now, alpha=1 - DECAY)


def kept_rows(importance: Sequence[Tensor], widths: Sequence[int], share: float) -> list[Tensor]:
    """The rows that stay of all matrices together, the most important first.

    One threshold for all: as many rows as have, together, at most `share` of all entries, [m] bool
    for each matrix. A matrix may keep all of its rows, or none. Of rows that are equally important
    the first ones stay. Shapes: importance [m] of a matrix [m, width].
    """
    every = torch.cat([i.double() for i in importance])
    entries = torch.cat([
        torch.full((len(i),), width, dtype=torch.int64, device=i.device)
        for i, width in zip(importance, widths, strict=True)
    ])  # fmt: skip
    order = every.argsort(descending=True, stable=True)
    room = round(share * int(entries.sum()))
    mask = torch.zeros(len(every), dtype=torch.bool, device=every.device)
    mask[order[entries[order].cumsum(0) <= room]] = True
    return list(torch.split(mask, [len(i) for i in importance]))
