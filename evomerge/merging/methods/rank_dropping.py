"""Dropping entries at random, the smaller of a row the likelier: the first half of DELLA.

Knows nothing of how the thinned task vectors are then merged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from evomerge.merging.methods.base import Block, Blocks, Coefficients, Parameter
from evomerge.merging.methods.dropping import DROP_PARAMETERS, NO_NORM
from evomerge.merging.methods.masks import DRAW_BITS, draws, mask_key
from evomerge.merging.methods.reductions import totals
from evomerge.merging.methods.rows import RowWindow, row_length

RANK_DROP_PARAMETERS = (
    *DROP_PARAMETERS,
    Parameter(
        "epsilon",
        "source",
        "float",
        0.15,
        "how far the probability of a row's largest entry exceeds the density, and that of its "
        "smallest falls short of it",
        low=0.0,
        high=0.5,
    ),
)


class _Rule(NamedTuple):
    """How one source is thinned: the key of its draws, d, ε within bounds, and whether to ÷ q."""

    key: int
    density: float
    epsilon: float
    unbiased: bool


class RankDrops:
    """The thinned task vectors of one tensor, τ̃ᵢ = fᵢ·mᵢ⊙τᵢ.

        r  = rank of |τ_j| in its row, 0 for the smallest of its n entries
        q_j = d − ε + 2ε·r/(n − 1)                         ε cut to min(ε, d, 1 − d)
        m_j = [u_j ≥ 1 − q_j],  u_j uniform in [0, 1), keyed by (seed, source, tensor, j)
        f_j = 1/q_j (unbiased) | Σ|τ| / Σ|m⊙τ| of the tensor (l1) | 1 (none)

    Entries of one magnitude rank by their index, the lone entry of a row has q = d. Density 1
    changes nothing, density 0 leaves nothing. Rows are ranked as they come by: the tensor is read
    once more along with the merge, and once before it for `l1`.
    """

    def __init__(self, blocks: Blocks, coefficients: Coefficients) -> None:
        unbiased = coefficients.choice("rescale") == "unbiased"
        width = row_length(coefficients)
        self._windows = {}
        for index, weight in enumerate(coefficients.floats("weight")):
            density, epsilon = (coefficients.floats(name)[index] for name in ("density", "epsilon"))
            if weight != 0 and density < 1:
                key = mask_key(coefficients.seed, coefficients.names[index], coefficients.tensor)
                rule = _Rule(key, density, min(epsilon, density, 1 - density), unbiased)
                self._windows[index] = RowWindow(blocks, width, _factors(index, width, rule))
        self._scale = dict.fromkeys(self._windows, 1.0)
        if coefficients.choice("rescale") == "l1" and self._windows:
            self._scale = self._l1(blocks)

    def keeps_all(self, source: int) -> bool:
        return source not in self._windows

    def tau(self, block: Block, source: int) -> Tensor:
        tau = _tau(block, source)
        if source not in self._windows:
            return tau
        factors = self._windows[source].at(block.start, tau.numel())[0]
        tau *= factors
        scale = self._scale[source]
        return tau if scale == 1 else tau.mul_(scale)

    def _l1(self, blocks: Blocks) -> dict[int, float]:
        def magnitudes(block: Block) -> Tensor:
            rows = [f(block, source) for source in self._windows for f in (_tau, self.tau)]
            return torch.stack(rows).double().abs_()

        sums = totals(blocks, magnitudes)
        return {
            source: before / after if after >= NO_NORM else 1.0
            for source, before, after in zip(self._windows, sums[::2], sums[1::2], strict=True)
        }


def _factors(source: int, width: int, rule: _Rule) -> Callable[[Block], Tensor]:
    """Maps whole rows to m/q (or m) of every element. Shapes: returns [1, n] float32."""

    def factors(rows: Block) -> Tensor:
        keep = _probabilities(_tau(rows, source).view(-1, width), rule).view(-1)
        drawn = draws(rule.key, rows.start, keep.numel(), device=keep.device)
        kept = drawn >= ((1 - keep) * (1 << DRAW_BITS)).ceil_()
        factor = kept / keep if rule.unbiased else kept
        return torch.where(kept, factor, 0).float()[None]

    return factors


def _probabilities(tau: Tensor, rule: _Rule) -> Tensor:
    """q. Shapes: tau [rows, n]; returns [rows, n] float64."""
    width = tau.shape[1]
    if rule.epsilon == 0 or width == 1:
        return torch.full_like(tau, rule.density, dtype=torch.float64)
    order = tau.abs().sort(dim=1, stable=True).indices
    step = 2 * rule.epsilon / (width - 1)
    ladder = torch.arange(width, dtype=torch.float64, device=tau.device) * step
    ladder += rule.density - rule.epsilon
    keep = torch.empty_like(tau, dtype=torch.float64)
    return keep.scatter_(1, order, ladder.expand_as(keep))


def _tau(block: Block, source: int) -> Tensor:
    assert block.base is not None
    return block.sources[source] - block.base
