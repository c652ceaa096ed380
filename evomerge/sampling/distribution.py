"""The normal distribution that CMA-ES adapts, in the unit cube, over the `cmaes` package.

Full covariance up to FULL_COVARIANCE_GENES genes, diagonal above (SepCMA); with discrete genes
CMA-ES with Margin (CMAwM), whose covariance is always full. Knows nothing of schedules, nor of what
restarts a search.

Source: Hansen 2016, arXiv:1604.00772; diagonal: Ros and Hansen 2008; margin: Hamano et al. 2022,
arXiv:2205.13482; results of earlier states: Hansen 2011, Injecting external solutions into CMA-ES,
arXiv:1110.4181.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from cmaes import CMA, CMAwM, SepCMA
from numpy.typing import NDArray

from evomerge.trial import Genome

FULL_COVARIANCE_GENES = 100
WIDEST = 0.5
"""Widening ends where a gene's standard deviation is half of the cube."""
# a point outside the cube is drawn again this often, then clipped: with many genes hardly any point
# lies inside, and at 300 genes a hundred draws would cost 80 ms
_RESAMPLING = 10

Vector = NDArray[np.float64]


class Distribution:
    """N(m, σ²C) over the genes, with the paths that adapt it.

    `levels` [genes] says how many equally wide cells of [0, 1] a gene has, 0 for a continuous one
    (`space.scales.level_of` says which it is in). `cov` [genes, genes] is C's start, the identity
    if None.
    """

    def __init__(
        self,
        mean: Sequence[float],
        *,
        sigma: float,
        population: int,
        levels: Sequence[int] = (),
        cov: Vector | None = None,
    ) -> None:
        self._discrete = np.flatnonzero(levels)
        self._whole: CMA | SepCMA | CMAwM
        # a population of 2 or 3 has one parent, and learning rates that divide by zero
        with np.errstate(divide="ignore"):
            self._whole = _optimiser(np.array(mean, np.float64), sigma, population, levels, cov)
        self._cma = self._whole._cma if isinstance(self._whole, CMAwM) else self._whole

    def ask(self, seed: int) -> Genome:
        """A point [genes] of the cube, a function of the state and `seed` (32 bits) alone."""
        self._whole.reseed_rng(seed)
        if not isinstance(self._whole, CMAwM):
            return tuple(self._whole.ask().tolist())
        drawn = self._whole.ask()[1]
        at = self._discrete
        drawn[at] = self._cma._mean[at] + (drawn[at] - self._cma._mean[at]) * self._whole._A[at]
        return tuple(np.clip(drawn, 0.0, 1.0).tolist())

    def tell(
        self, genomes: Sequence[Genome], losses: Sequence[float], stale: Sequence[bool]
    ) -> None:
        """Learn from ranks: genomes [population, genes], losses [population], less being better.

        A stale genome, of an earlier state, may lie where this distribution hardly reaches; its
        Mahalanobis length is cut to √n + 2n/(n + 2) so that it pulls as far as a lucky draw would.
        """
        points = [self._step(genome, old) for genome, old in zip(genomes, stale, strict=True)]
        self._whole.tell(list(zip(points, losses, strict=True)))

    def widen(self) -> None:
        """σ ← σ·exp(0.2 + cσ/dσ), as for flat fitness in Hansen 2016 (B.3), up to WIDEST."""
        factor = math.exp(0.2 + self._cma._c_sigma / self._cma._d_sigma)
        room = WIDEST / (self._cma._sigma * math.sqrt(np.max(self._variances())))
        self._cma._sigma *= min(factor, max(1.0, room))

    def exhausted(self) -> str | None:
        """Why this distribution can go no further: the package's `should_stop`, in words."""
        cma = self._cma
        # after its own eigendecomposition, which rounds C
        lengths, axis = self._axes(cma.generation % cma.dim)
        sigma, variances = cma._sigma, self._variances()
        if np.all(sigma * variances < cma._tolx) and np.all(sigma * cma._pc < cma._tolx):
            return f"steps are below {cma._tolx:.1e} in every gene"
        if sigma * np.max(lengths) > cma._tolxup:
            return f"steps are above {cma._tolxup:.0e}: the search diverged"
        if np.any(cma._mean == cma._mean + 0.2 * sigma * np.sqrt(variances)):
            return "steps are below the rounding of a gene"
        if np.all(cma._mean == cma._mean + 0.1 * sigma * axis):
            return "steps are below the rounding along an axis"
        if np.max(lengths) / np.min(lengths) > cma._tolconditioncov:
            return f"the covariance's condition is above {cma._tolconditioncov:.0e}"
        return None

    def _step(self, genome: Genome, stale: bool) -> Vector:
        """The point [genes] that is told for a genome."""
        point: Vector = np.array(genome)
        if isinstance(self._whole, CMAwM):
            at = self._discrete
            mean = self._cma._mean[at]
            point[at] = mean + (point[at] - mean) / self._whole._A[at]
        if not stale:
            return point
        n = self._cma.dim
        step = point - self._cma._mean
        cut = (math.sqrt(n) + 2 * n / (n + 2)) / max(self._length(step), 1e-300)
        return self._cma._mean + step * cut if cut < 1 else point

    def _length(self, step: Vector) -> float:
        """Mahalanobis length of a step [genes]."""
        if isinstance(self._cma, SepCMA):
            whitened = step / self._cma._eigen_decomposition()
        else:
            axes, lengths = self._cma._eigen_decomposition()
            whitened = axes.T.dot(step) / lengths
        return float(np.linalg.norm(whitened)) / float(self._cma._sigma)

    def _axes(self, i: int) -> tuple[Vector, Vector]:
        """Every principal axis' standard deviation [genes], and axis i [genes] of that length."""
        if isinstance(self._cma, SepCMA):
            lengths = self._cma._eigen_decomposition()
            return lengths, lengths[i] * np.ones(self._cma.dim)  # as the package has it
        axes, lengths = self._cma._eigen_decomposition()
        return lengths, lengths[i] * axes[:, i]

    def _variances(self) -> Vector:
        """The diagonal of C [genes]."""
        c: Vector = self._cma._C
        return c if isinstance(self._cma, SepCMA) else np.diag(c)


def _optimiser(
    mean: Vector, sigma: float, population: int, levels: Sequence[int], cov: Vector | None
) -> CMA | SepCMA | CMAwM:
    common = {"n_max_resampling": _RESAMPLING, "population_size": population, "seed": 0}
    bounds = np.tile([0.0, 1.0], (len(mean), 1))
    if any(levels):
        counts = np.array(levels, np.float64)
        steps = np.divide(1.0, counts, out=np.zeros_like(counts), where=counts > 0)
        # a cell's value is its middle
        bounds += np.outer(steps / 2, [1.0, -1.0])
        mean = np.clip(mean, bounds[:, 0], bounds[:, 1])
        return CMAwM(mean=mean, sigma=sigma, bounds=bounds, steps=steps, cov=cov, **common)
    if len(mean) <= FULL_COVARIANCE_GENES:
        return CMA(mean=mean, sigma=sigma, bounds=bounds, cov=cov, **common)
    separable = SepCMA(mean=mean, sigma=sigma, bounds=bounds, **common)
    if cov is not None:
        separable._C = np.diag(cov).copy()
    return separable
