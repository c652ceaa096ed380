"""The contract of a study store, on margins: kept with each score, handed out with each tell.

A part of `store_contract`, whose fixtures it needs.
"""

from __future__ import annotations

import math

import pytest

from evomerge.spec import PARTS
from evomerge.store.base import Tell
from evomerge.testing.store_builders import ODD_FLOATS, StudyUnderTest, new_trial, score
from evomerge.trial import Part


class TestsOfMargins:
    """finish, reuse, known_score, trials and told, as far as margins go."""

    @pytest.mark.parametrize("margin", [*ODD_FLOATS, None])
    @pytest.mark.parametrize("part", PARTS)
    def test_a_margin_comes_back(
        self, study: StudyUnderTest, part: Part, margin: float | None
    ) -> None:
        known = score(margin=margin)
        study.start(0, part)
        study.finish(result=known)
        study.reuse(1, part, known)
        for outcomes in (True, False):
            for trial in study.store.trials("s", outcomes=outcomes):
                assert trial.scores[part].tasks["add"].margin == margin
                assert trial.scores[part].tasks["wiki"].margin is None
        assert study.store.known_score("scorer-1", "digest-0", part) == known

    @pytest.mark.parametrize("margin", [math.nan, math.inf, -math.inf])
    def test_a_margin_that_is_not_finite_is_no_margin(
        self, study: StudyUnderTest, margin: float
    ) -> None:
        study.start()
        study.finish(result=score(margin=margin))
        assert study.trial().scores["search"].tasks["add"].margin is None

    def test_a_tell_has_the_margins_of_the_search_items(self, study: StudyUnderTest) -> None:
        study.store.create_trials("s", [new_trial(2), new_trial(3)], controller="c1")
        for number, margin in enumerate((-1 / 3, None, 0.1 + 0.2)):
            study.start(number, token=f"search {number}")
            study.finish(f"search {number}", score(margin=margin))
        study.start(0, "selection", token="selection 0")
        study.finish("selection 0", score(margin=9.0))
        study.store.mark_told("s", {2: 3, 1: 5, 0: 8, 3: 9}, controller="c1")
        margins = {2: {"add": 0.1 + 0.2}, 1: {}, 0: {"add": -1 / 3}, 3: {}}
        for limit in (1, 2, 9):
            told: list[Tell] = []
            while page := study.store.told("s", after=told[-1].order if told else -1, limit=limit):
                told += page
            assert {tell.number: tell.margins for tell in told} == margins
