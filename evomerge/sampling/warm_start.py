"""Where an earlier study says that the good genomes of a related one lie.

Source: Nomura et al. 2021, Warm Starting CMA-ES for Hyperparameter Optimization, arXiv:2012.06932.
The formula is `cmaes.get_warm_start_mgd`'s, which from some 150 genes on multiplies to a
determinant of 0; here its logarithm is taken. Knows nothing of studies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.trial import Genome

GAMMA = 0.1
ALPHA = 0.1
FEWEST = 10
"""How many results an earlier study must have: a tenth of them is used."""


def best_tenth(results: Sequence[tuple[Genome, float]]) -> list[Genome]:
    """The genomes of the ⌊n/10⌋ results of highest value, best first; earlier ones of equals."""
    ranked = sorted(results, key=lambda result: -result[1])
    return [genome for genome, _ in ranked[: math.floor(len(ranked) * GAMMA)]]


def promising_distribution(
    best: Sequence[Genome],
) -> tuple[list[float], float, NDArray[np.float64]]:
    """Mean [genes], σ and C [genes, genes] with det C = 1, from the best genomes [k, genes].

    Σ = α²I + (1/k) Σᵢ (xᵢ - m)(xᵢ - m)ᵀ, m the mean of xᵢ; σ²C = Σ.
    """
    points = np.array(best, np.float64)
    n = points.shape[1]
    mean = points.mean(axis=0)
    off = points - mean
    covariance = ALPHA**2 * np.eye(n) + off.T.dot(off) / len(points)
    logarithm = float(np.linalg.slogdet(covariance)[1])
    # a mean of points of the cube may be rounded out of it
    inside = np.clip(mean, 0.0, 1.0).tolist()
    return inside, math.exp(logarithm / (2 * n)), covariance / math.exp(logarithm / n)
