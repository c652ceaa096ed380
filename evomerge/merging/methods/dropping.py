"""Dropping entries of task vectors at random and rescaling what is left: the first half of DARE.

Knows nothing of how the thinned task vectors are then merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.merging.kernels.program import Draw
from evomerge.merging.methods.base import Block, Blocks, Coefficients, Parameter, facts_of
from evomerge.merging.methods.masks import kept, mask_key, threshold
from evomerge.merging.methods.reductions import totals

NO_NORM = 1e-7
"""An L1 norm below this is not rescaled to (mergekit's constant)."""

DROP_PARAMETERS = (
    Parameter("density", "source", "float", 1.0, "probability to keep an entry", low=0.0, high=1.0),
    Parameter(
        "rescale",
        "recipe",
        "choice",
        "unbiased",
        "unbiased divides what is kept by the density, l1 restores the tensor's L1 norm (as "
        "mergekit does), none leaves it",
        choices=("unbiased", "l1", "none"),
    ),
)


@dataclass(frozen=True)
class Drop:
    """One source's mask over one tensor and the factor on what it keeps."""

    key: int
    density: float
    factor: float

    @property
    def draw(self) -> Draw | None:
        """The drop as data; None keeps everything."""
        return Draw(self.key, threshold(self.density)) if self.density < 1 else None

    def thinned(self, tau: Tensor, start: int) -> Tensor:
        """τ where it is kept, else 0; not rescaled. Shapes: tau [n] from flat index `start`."""
        if self.density >= 1:
            return tau
        return tau * kept(self.key, start, tau.numel(), density=self.density, device=tau.device)


def drops(blocks: Blocks, coefficients: Coefficients) -> tuple[Drop, ...]:
    """The drop of every source [s] for one tensor.

        m_j = [u_j ≥ 1 − d],  u_j uniform in [0, 1), keyed by (seed, source, tensor, j)
        τ̃  = f·m⊙τ            f = 1/d (unbiased) | Σ|τ| / Σ|m⊙τ| (l1) | 1 (none)

    Density 1 changes nothing, density 0 leaves nothing. An L1 norm of under 1e-7 after the drop is
    not rescaled. Reads the tensor only for `l1`.

    Source: Yu et al. 2024, arXiv:2311.03099 (unbiased); the authors' masks depend on the order in
    which tensors are visited, ours on the key alone.
    """
    rule = coefficients.choice("rescale")
    unscaled = tuple(
        Drop(mask_key(coefficients.seed, name, coefficients.tensor), density, 1.0)
        for name, density in zip(coefficients.names, coefficients.floats("density"), strict=True)
    )
    if rule == "unbiased":
        factors = [1 / drop.density if drop.density > 0 else 1.0 for drop in unscaled]
    elif rule == "l1":
        factors = _l1_factors(blocks, unscaled)
    else:
        return unscaled
    return tuple(
        Drop(drop.key, drop.density, factor) for drop, factor in zip(unscaled, factors, strict=True)
    )


def _l1_factors(blocks: Blocks, drops: Sequence[Drop]) -> list[float]:
    thinning = [index for index, drop in enumerate(drops) if 0 < drop.density < 1]
    factors = [1.0] * len(drops)
    if not thinning:
        return factors
    facts = facts_of(blocks)
    if facts is not None:
        draws = [(index, drops[index].draw) for index in thinning]
        sums = [x for index, draw in draws if draw for x in facts.norms(index, draw)]
        return _restoring(factors, thinning, sums)

    def magnitudes(block: Block) -> Tensor:
        assert block.base is not None
        rows = []
        for index in thinning:
            tau = block.sources[index] - block.base
            rows += [tau, drops[index].thinned(tau, block.start)]
        return torch.stack(rows).double().abs_()

    return _restoring(factors, thinning, totals(blocks, magnitudes))


def _restoring(factors: list[float], thinning: Sequence[int], sums: Sequence[float]) -> list[float]:
    """The factors that bring the norms after thinning back to those before."""
    for index, before, after in zip(thinning, sums[::2], sums[1::2], strict=True):
        if after >= NO_NORM:
            factors[index] = before / after
    return factors
