"""The Pareto front, against Optuna's and against its definition."""

from __future__ import annotations

import optuna
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.sampling.pareto import pareto_front

coordinate = st.integers(0, 4).map(float)


def test_worked_example():
    values = [(1.0, 5.0), (2.0, 4.0), (2.0, 3.0), None, (0.0, 5.0), (3.0, float("nan")), (2.0, 4.0)]
    assert pareto_front(values) == [0, 1, 6]


def test_one_objective_is_the_maximum():
    assert pareto_front([(1.0,), (3.0,), None, (3.0,)]) == [1, 3]


def test_nothing_gives_nothing():
    assert pareto_front([]) == pareto_front([None]) == []


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(coordinate, coordinate, coordinate), min_size=1, max_size=12))
def test_it_is_optunas(values):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=["maximize"] * 3)
    for point in values:
        study.add_trial(optuna.trial.create_trial(values=point, params={}, distributions={}))
    assert pareto_front(values) == sorted(trial.number for trial in study.best_trials)
