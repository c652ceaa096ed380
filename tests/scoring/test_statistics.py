"""The statistics against worked examples, other people's code and simulation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from evomerge.scoring.statistics import (
    Comparison,
    compare,
    compare_with_each,
    holm,
    mcnemar_exact,
    sign_flip_test,
    wilson_interval,
)
from evomerge.trial import Score, TaskScore


def score(*tasks: Sequence[float], higher: bool = True) -> Score:
    return Score(
        {
            f"t{number}": TaskScore("acc", float(np.mean(x)), None, len(x), higher, tuple(x))
            for number, x in enumerate(tasks)
        }
    )


def paired(b: int, c: int, both: int = 30) -> tuple[Score, Score]:
    """b items only the first gets right, c only the second, and as many both."""
    first = [1.0] * b + [0.0] * c + [1.0] * both
    second = [0.0] * b + [1.0] * c + [1.0] * both
    return score(first), score(second)


def test_mcnemar_reproduces_the_published_value() -> None:
    assert mcnemar_exact(29, 27) == pytest.approx(0.8939, abs=5e-5)
    assert mcnemar_exact(29, 27) == mcnemar_exact(27, 29)
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(5, 0) == 2 / 32


@pytest.mark.parametrize(("b", "c"), [(29, 27), (12, 3), (1, 0), (0, 0), (40, 10), (7, 7)])
def test_one_binary_task_is_mcnemars_exact_test(b: int, c: int) -> None:
    assert compare(*paired(b, c), {"t0": 1.0}).p_value == pytest.approx(mcnemar_exact(b, c))


def test_sign_flips_equal_plain_enumeration() -> None:
    values = np.array([0.3, -0.1, 0.7, 0.25, 0.05, -0.4, 0.3, 0.9])
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(values))
    ]
    expected = np.mean(np.array(sums) >= abs(values.sum()) - 1e-12)
    assert sign_flip_test(values) == pytest.approx(expected)


def test_drawn_signs_agree_with_scipy() -> None:
    values = np.random.default_rng(3).normal(0.15, 1, 80)
    theirs = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=50_000, rng=4
    ).pvalue
    assert sign_flip_test(values) == pytest.approx(theirs, abs=0.01)
    assert sign_flip_test(values) == sign_flip_test(values)


def test_a_drawn_p_value_is_never_zero() -> None:
    assert sign_flip_test(np.random.default_rng(1).uniform(0.9, 1.1, 200)) == 1 / 100_001


def test_holm_by_hand() -> None:
    # sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04, then the running maximum
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    """Holm's paper states the procedure, not adjusted values: stop at the first p > a / (m - i)."""
    generator = np.random.default_rng(8)
    for _ in range(200):
        p_values = list(generator.uniform(0, 0.1, size=generator.integers(1, 7)))
        alpha = float(generator.uniform(0.01, 0.2))
        rejected: set[int] = set()
        for i, index in enumerate(np.argsort(p_values)):
            if p_values[index] > alpha / (len(p_values) - i):
                break
            rejected.add(int(index))
        assert {i for i, p in enumerate(holm(p_values)) if p <= alpha} == rejected


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (81, 263)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson_interval(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)


def test_the_difference_is_the_weighted_mean_of_task_means() -> None:
    ours, theirs = score([1, 1, 0, 1], [0.5, 0.5]), score([1, 0, 0, 0], [0.0, 0.5])
    result = compare(ours, theirs, {"t0": 1.0, "t1": 3.0})
    assert result.difference == pytest.approx((0.5 + 3 * 0.25) / 4)
    assert result.n == 6


def test_swapping_turns_the_sign_and_nothing_else() -> None:
    ours, theirs = paired(20, 9)
    one, other = compare(ours, theirs, {"t0": 1.0}), compare(theirs, ours, {"t0": 1.0})
    assert (one.difference, one.p_value) == (-other.difference, other.p_value)
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]))


def test_where_lower_is_better_a_fall_is_an_improvement() -> None:
    ours, theirs = score([1.0, 2.0, 1.5], higher=False), score([2.0, 2.5, 2.5], higher=False)
    assert compare(ours, theirs, {"t0": 1.0}).difference == pytest.approx(2.5 / 3)


def test_equal_outcomes_are_no_certainty() -> None:
    low, high = compare(*paired(0, 0), {"t0": 1.0}).interval
    assert low < 0 < high


def test_holm_is_applied_over_the_references() -> None:
    ours, theirs = paired(20, 6)
    rows = compare_with_each(ours, {"a": theirs, "b": theirs, "c": ours}, {"t0": 1.0})
    p = mcnemar_exact(20, 6)
    assert rows["a"].p_adjusted == pytest.approx(3 * p)
    assert rows["c"].p_adjusted == 1.0
    assert compare(ours, theirs, {"t0": 1.0}).p_adjusted == pytest.approx(p)


def test_scores_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="3 outcomes against 2"):
        compare(score([1, 0, 1]), score([1, 0]), {"t0": 1.0})
    with pytest.raises(ValueError, match="needs 2"):
        compare(score([1]), score([0]), {"t0": 1.0})


def _simulated(
    generator: np.random.Generator,
    sizes: Sequence[int],
    rates: tuple[float, float],
    agreement: float,
) -> tuple[Score, Score]:
    """Binary outcomes; an item is answered alike by both candidates with a chance."""
    ours, theirs = [], []
    for n in sizes:
        shared = generator.random(n) < agreement
        luck = generator.random((2, n))
        luck[1][shared] = luck[0][shared]
        ours.append((luck[0] < rates[0]).astype(float))
        theirs.append((luck[1] < rates[1]).astype(float))
    return score(*ours), score(*theirs)


@pytest.mark.parametrize(
    ("sizes", "weights", "rates", "agreement"),
    [
        ((200,), (1.0,), (0.6, 0.5), 0.5),
        ((200, 120, 80), (1.0, 2.0, 0.5), (0.55, 0.55), 0.3),
        ((60, 300), (1.0, 1.0), (0.7, 0.6), 0.0),
    ],
)
def test_intervals_cover_the_truth_as_often_as_they_say(
    sizes: Sequence[int], weights: Sequence[float], rates: tuple[float, float], agreement: float
) -> None:
    generator = np.random.default_rng(11)
    named = {f"t{i}": w for i, w in enumerate(weights)}
    runs = 2000
    hits = 0
    for _ in range(runs):
        low, high = _interval_only(*_simulated(generator, sizes, rates, agreement), named)
        hits += low <= rates[0] - rates[1] <= high
    assert 0.93 <= hits / runs <= 0.97


def test_intervals_of_continuous_outcomes_cover_the_truth() -> None:
    generator = np.random.default_rng(12)
    named = {"t0": 1.0, "t1": 2.0}
    runs = 2000
    hits = 0
    for _ in range(runs):
        theirs = [generator.gamma(2.0, 1.0, 80), generator.gamma(1.0, 2.0, 40)]
        ours = [x + generator.normal(0.1, 0.7, x.size) for x in theirs]
        low, high = _interval_only(score(*ours), score(*theirs), named)
        hits += low <= 0.1 <= high
    assert 0.93 <= hits / runs <= 0.97


def _interval_only(ours: Score, theirs: Score, weights: dict[str, float]) -> tuple[float, float]:
    from evomerge.scoring import statistics

    pairs = {n: np.subtract(ours.tasks[n].outcomes, theirs.tasks[n].outcomes) for n in weights}
    total = sum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    difference = math.fsum(shares[n] * float(d.mean()) for n, d in pairs.items())
    return statistics._interval(difference, pairs, shares, 0.95)


def test_a_study_of_pure_noise_reports_no_improvement() -> None:
    """The best of 100 equally good candidates, scored again on fresh items, is not 'better'."""
    generator = np.random.default_rng(13)
    runs, candidates, search, report = 200, 100, 100, (80, 60)
    weights = {"t0": 1.0, "t1": 1.0}
    looked_better, called_better = 0, 0
    for _ in range(runs):
        searched = generator.integers(0, 2, (candidates, search)).mean(axis=1)
        fresh = [generator.integers(0, 2, (candidates, n)).astype(float) for n in report]
        best = int(searched.argmax())
        baselines = {str(i): score(*(task[i] for task in fresh)) for i in range(4) if i != best}
        rows = compare_with_each(score(*(task[best] for task in fresh)), baselines, weights)
        looked_better += wilson_interval(search * searched[best], search)[0] > 0.5
        called_better += any(row.is_improvement() for row in rows.values())
    assert looked_better > 0.8 * runs  # the luck that a report must not believe
    assert called_better <= 0.05 * runs


def test_an_improvement_needs_a_positive_difference() -> None:
    assert Comparison(0.1, (0.0, 0.2), 0.01, 0.04, 9).is_improvement()
    assert not Comparison(0.1, (0.0, 0.2), 0.01, 0.06, 9).is_improvement()
    assert not Comparison(-0.1, (-0.2, 0.0), 0.01, 0.04, 9).is_improvement()
