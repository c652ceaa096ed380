"""The contract of a study store, on scores that answer for other trials.

A part of `store_contract`, whose fixtures it needs.
"""

from __future__ import annotations

import pytest

from evomerge.testing.store_builders import StudyUnderTest, score
from evomerge.trial import State


class TestsOfReuse:
    """reuse, known_score."""

    def test_a_score_is_found_by_scorer_recipe_and_part(self, study: StudyUnderTest) -> None:
        study.start()
        study.finish()
        store = study.store
        assert store.known_score("scorer-1", "digest-0", "search") == score()
        assert store.known_score("scorer-2", "digest-0", "search") is None
        assert store.known_score("scorer-1", "digest-1", "search") is None
        assert store.known_score("scorer-1", "digest-0", "report") is None

    def test_a_score_of_another_study_is_known(self, study: StudyUnderTest) -> None:
        other = StudyUnderTest(study.store, "other")
        other.start(1)
        other.finish()
        assert study.store.known_score("scorer-1", "digest-1", "search") == score()

    def test_the_first_of_several_scores_is_the_known_one(self, study: StudyUnderTest) -> None:
        other = StudyUnderTest(study.store, "other")
        for one, value in ((other, 0.75), (study, 0.25)):
            one.start()
            one.finish(result=score(value))
        assert study.store.known_score("scorer-1", "digest-0", "search") == score(0.25)

    def test_a_reused_score_completes_a_trial_without_an_attempt(
        self, study: StudyUnderTest
    ) -> None:
        study.reuse()
        trial = study.trial()
        assert (trial.state, trial.values, trial.attempts) == (State.COMPLETE, (0.5,), ())
        assert trial.scores == {"search": score()}

    def test_a_reused_score_of_another_part_leaves_the_state(self, study: StudyUnderTest) -> None:
        study.reuse(part="report")
        trial = study.trial()
        assert (trial.state, trial.values) == (State.WAITING, None)
        assert trial.scores == {"report": score()}

    @pytest.mark.parametrize("state", ["running", "complete", "failed"])
    def test_only_a_waiting_trial_is_answered(self, study: StudyUnderTest, state: str) -> None:
        study.start()
        if state == "complete":
            study.finish()
        elif state == "failed":
            study.fail()
        before = study.everything()
        with pytest.raises(ValueError, match="trial 0"):
            study.reuse()
        assert study.everything() == before
