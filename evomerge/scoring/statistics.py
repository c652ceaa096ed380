"""Is one candidate better than another on the same items? Paired, stratified by task.

Knows nothing of studies, models or tasks: two Scores on the same part in, a Comparison out. Needs
numpy and scipy only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from evomerge.trial import Score, TaskScore

Floats = NDArray[np.float64]

_EXACT_LIMIT = 200_000  # sign patterns that are enumerated; beyond, they are drawn
_DRAWS = 100_000
_CHUNK = 2_000_000  # random numbers held at once
_SEED = 20240607


@dataclass(frozen=True)
class Comparison:
    """A candidate against a reference on the same items; positive means the candidate is better.

    `difference` is the weighted mean over tasks of the mean paired difference, `interval` its
    confidence interval. `p_value` is two-sided; `p_adjusted` is Holm's over all comparisons of
    one table, and equals `p_value` where there is only one.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    p_adjusted: float
    n: int

    def is_improvement(self, alpha: float = 0.05) -> bool:
        """Whether the candidate may be called better: a positive difference beyond chance."""
        return self.difference > 0 and self.p_adjusted < alpha


def compare(
    candidate: Score,
    reference: Score,
    weights: Mapping[str, float],
    *,
    confidence: float = 0.95,
) -> Comparison:
    """Compare two scores of the same part, task weights as in the objective.

    Raises ValueError where a task has fewer than two per-item outcomes or their numbers differ.
    """
    differences = {
        name: _paired_differences(name, candidate.tasks[name], reference.tasks[name])
        for name in weights
    }
    total = math.fsum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    difference = math.fsum(shares[name] * float(d.mean()) for name, d in differences.items())
    p_value = sign_flip_test(
        np.concatenate([shares[name] / d.size * d for name, d in differences.items()])
    )
    return Comparison(
        difference=difference,
        interval=_interval(difference, differences, shares, confidence),
        p_value=p_value,
        p_adjusted=p_value,
        n=sum(d.size for d in differences.values()),
    )


def compare_with_each(
    candidate: Score,
    references: Mapping[str, Score],
    weights: Mapping[str, float],
    *,
    confidence: float = 0.95,
) -> dict[str, Comparison]:
    """Compare a candidate with each of several references; `p_adjusted` is Holm's over them all."""
    rows = {
        name: compare(candidate, reference, weights, confidence=confidence)
        for name, reference in references.items()
    }
    adjusted = holm([row.p_value for row in rows.values()])
    return {
        name: replace(row, p_adjusted=p)
        for (name, row), p in zip(rows.items(), adjusted, strict=True)
    }


def sign_flip_test(contributions: Floats) -> float:
    """Two-sided p-value of the paired sign-flip permutation test.

    `contributions` [n] are each item's summands of the statistic S = sum(contributions). Under
    the null each item's difference is symmetric about 0, so p = P(|sum(±c)| >= |S|) over
    independent signs. Items of one size |c| enter through the binomial number of their plus
    signs, so the test is exact where the sizes are few (one binary task: McNemar's exact test);
    else it is Monte Carlo with a fixed seed and p = (hits + 1) / (draws + 1).

    Source: Good 2005, Permutation, Parametric and Bootstrap Tests of Hypotheses, ch. 3;
    Phipson & Smyth 2010, doi:10.2202/1544-6115.1585, for the +1.
    """
    nonzero = contributions[contributions != 0]
    if nonzero.size == 0:
        return 1.0
    # rounding makes equal sizes unequal in the last bits: 12 digits join them again
    scale = float(np.abs(nonzero).max())
    sizes, counts = np.unique(np.round(np.abs(nonzero) / scale, 12), return_counts=True)
    threshold = abs(float(np.sum(np.round(nonzero / scale, 12)))) - 1e-9
    if math.prod(int(count) + 1 for count in counts) <= _EXACT_LIMIT:
        return min(1.0, _exact_tail(sizes, counts, threshold))
    return _drawn_tail(sizes, counts, threshold)


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact McNemar p-value for b and c discordant pairs: min(1, 2 P(X <= min(b, c)))
    with X ~ Binomial(b + c, 1/2).

    Source: McNemar 1947, doi:10.1007/BF02295996, in its exact binomial form.
    """
    if b < 0 or c < 0:
        raise ValueError(f"discordant pairs are counts, got b = {b}, c = {c}")
    return float(min(1.0, 2 * stats.binom.cdf(min(b, c), b + c, 0.5))) if b + c else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given.

        p~(i) = max over j <= i of min(1, (m - j + 1) p(j)), p(1) <= ... <= p(m)

    Source: Holm 1979, Scandinavian Journal of Statistics 6:65-70.
    """
    m = len(p_values)
    adjusted = [0.0] * m
    running = 0.0
    for rank, index in enumerate(sorted(range(m), key=p_values.__getitem__)):
        running = max(running, min(1.0, (m - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def wilson_interval(successes: float, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion of `successes` in `n` items.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _paired_differences(name: str, candidate: TaskScore, reference: TaskScore) -> Floats:
    ours, theirs = candidate.outcomes, reference.outcomes
    if len(ours) != len(theirs):
        raise ValueError(f"task {name!r}: {len(ours)} outcomes against {len(theirs)}")
    if len(ours) < 2:
        raise ValueError(f"task {name!r} has {len(ours)} per-item outcomes; a comparison needs 2")
    sign = 1.0 if candidate.higher_is_better else -1.0
    return sign * (np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))


def _interval(
    difference: float,
    differences: Mapping[str, Floats],
    shares: Mapping[str, float],
    confidence: float,
) -> tuple[float, float]:
    """d ± t sqrt(sum_t (w_t² v_t)), v_t the variance of task t's mean difference.

    The degrees of freedom are Welch and Satterthwaite's (Satterthwaite 1946,
    doi:10.2307/3002019).
    """
    variances = {name: shares[name] ** 2 * _variance_of_mean(d) for name, d in differences.items()}
    total = math.fsum(variances.values())
    if total == 0:
        return difference, difference
    freedom = total**2 / math.fsum(v**2 / (differences[n].size - 1) for n, v in variances.items())
    half = float(stats.t.ppf(0.5 + confidence / 2, freedom)) * math.sqrt(total)
    return difference - half, difference + half


def _variance_of_mean(d: Floats) -> float:
    """Variance of the mean of paired differences d [n].

    Where both outcomes are 0 or 1, one discordant pair is added each way (Bonett & Price 2012,
    doi:10.3102/1076998611411915): without it no discordant pair would mean no uncertainty.
    """
    if not np.isin(d, (-1.0, 0.0, 1.0)).all():
        return float(d.var(ddof=1)) / d.size
    plus = (np.count_nonzero(d > 0) + 1) / (d.size + 2)
    minus = (np.count_nonzero(d < 0) + 1) / (d.size + 2)
    return float(plus + minus - (plus - minus) ** 2) / (d.size + 2)


def _exact_tail(sizes: Floats, counts: NDArray[np.int64], threshold: float) -> float:
    sums, chances = np.zeros(1), np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        plus = np.arange(count + 1)
        sums = np.add.outer(sums, size * (2 * plus - count)).ravel()
        chances = np.multiply.outer(chances, stats.binom.pmf(plus, count, 0.5)).ravel()
    return float(chances[np.abs(sums) >= threshold].sum())


def _drawn_tail(sizes: Floats, counts: NDArray[np.int64], threshold: float) -> float:
    generator = np.random.default_rng(_SEED)
    rows = max(1, _CHUNK // sizes.size)
    hits = 0
    for start in itertools.count(0, rows):
        if start >= _DRAWS:
            return (hits + 1) / (_DRAWS + 1)
        draws = min(rows, _DRAWS - start)
        plus = generator.binomial(counts, 0.5, size=(draws, sizes.size))
        hits += int(np.count_nonzero(np.abs((2 * plus - counts) @ sizes) >= threshold))
    raise AssertionError("unreachable")
