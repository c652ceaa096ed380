"""The contract of a study store, as tests: every sentence of `evomerge.store.base` is one here.

A plug-in runs it on its own store by a subclass with a `store` fixture that yields an empty one:

    class TestMyStore(StoreContract):
        @pytest.fixture
        def store(self): ...

Uses nothing but the protocol, so it cannot kill a process or look into a table; what SQL promises
beyond the protocol is tested beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta, timezone

import pytest

from evomerge.errors import StaleAttempt, StudyChanged
from evomerge.store.base import StudyStore, Tell
from evomerge.testing.store_builders import (
    BAD,
    LEASE,
    NOW,
    ODD_FLOATS,
    StudyUnderTest,
    bits,
    new_trial,
    record,
    score,
)
from evomerge.testing.store_claims import TestsOfClaims
from evomerge.testing.store_fencing import TestsOfFencing
from evomerge.testing.store_leases import TestsOfAttemptLeases, TestsOfRefusals
from evomerge.testing.store_margins import TestsOfMargins
from evomerge.testing.store_reuse import TestsOfReuse
from evomerge.trial import Attempt, Failure, Part, Score, State, TaskScore, Trial


class TestsOfStudies:
    """create_study, study, studies, update_study."""

    def test_a_study_comes_back_as_it_was_created(self, store: StudyStore) -> None:
        store.create_study(record())
        assert store.study("s") == record()
        assert list(store.study("s").spec["sources"]) == ["b", "a"]

    def test_a_taken_name_is_refused_and_the_first_study_kept(self, store: StudyStore) -> None:
        store.create_study(record())
        with pytest.raises(StudyChanged, match="'s'"):
            store.create_study(record(scorer="other"))
        assert store.study("s") == record()

    def test_the_same_record_again_changes_nothing(self, store: StudyStore) -> None:
        for _ in range(2):
            store.create_study(record())
        assert list(store.studies()) == [record()]

    def test_studies_are_listed_oldest_first(self, store: StudyStore) -> None:
        for name, minutes in (("b", 2), ("c", 1), ("a", 3)):
            store.create_study(record(name, minutes=minutes))
        assert [study.name for study in store.studies()] == ["c", "b", "a"]

    def test_an_empty_store_has_no_studies(self, store: StudyStore) -> None:
        assert list(store.studies()) == []

    def test_a_new_study_has_no_controller_and_no_trials(self, store: StudyStore) -> None:
        store.create_study(record())
        assert store.controller("s") is None
        assert list(store.trials("s")) == []

    def test_spec_and_inspection_are_replaced(self, study: StudyUnderTest) -> None:
        spec, inspection = {"budget": {"trials": 9}}, {"digests": {"m": "d"}}
        study.store.update_study("s", spec, inspection, controller="c1")
        assert study.store.study("s") == replace(record(), spec=spec, inspection=inspection)

    def test_times_in_another_zone_are_the_same_instants_in_utc(self, store: StudyStore) -> None:
        cest = timezone(timedelta(hours=2))
        store.create_study(replace(record(), created_at=NOW.astimezone(cest)))
        created = store.study("s").created_at
        assert created == NOW
        assert created.utcoffset() is not None


class TestsOfTrials:
    """create_trials, trials, trial."""

    def test_a_new_trial_waits_and_has_everything_it_was_given(self, study: StudyUnderTest) -> None:
        new = new_trial(0)
        assert study.trial() == Trial(
            number=0,
            kind=new.kind,
            label=new.label,
            genome=new.genome,
            recipe=new.recipe,
            recipe_digest=new.recipe_digest,
            state=State.WAITING,
        )

    def test_a_baseline_has_no_genome(self, study: StudyUnderTest) -> None:
        baseline = replace(new_trial(2, genome=None), kind="source", label="math")
        study.store.create_trials("s", [baseline], controller="c1")
        assert study.trial(2).genome is None
        assert (study.trial(2).kind, study.trial(2).label) == ("source", "math")

    def test_every_bit_of_a_genome_comes_back(self, study: StudyUnderTest) -> None:
        study.store.create_trials("s", [new_trial(2, genome=ODD_FLOATS)], controller="c1")
        (genome,) = (trial.genome for trial in study.store.trials("s") if trial.number == 2)
        assert genome is not None
        assert bits(genome) == bits(ODD_FLOATS)

    def test_an_empty_genome_is_not_a_missing_one(self, study: StudyUnderTest) -> None:
        study.store.create_trials("s", [new_trial(2, genome=())], controller="c1")
        assert study.trial(2).genome == ()

    def test_trials_come_in_the_order_of_numbers(self, study: StudyUnderTest) -> None:
        for number in (11, 3, 10, 2):
            study.store.create_trials("s", [new_trial(number)], controller="c1")
        assert [trial.number for trial in study.store.trials("s")] == [0, 1, 2, 3, 10, 11]

    def test_a_range_of_trials_comes_with_what_belongs_to_them(self, study: StudyUnderTest) -> None:
        study.store.create_trials("s", [new_trial(n) for n in (2, 3)], controller="c1")
        for number in range(4):
            study.start(number, token=f"t{number}")
            study.finish(f"t{number}")
        every = list(study.store.trials("s"))
        assert list(study.store.trials("s", numbers=range(1, 3))) == every[1:3]
        assert list(study.store.trials("s", numbers=range(3, 9))) == every[3:]
        assert list(study.store.trials("s", numbers=range(4, 9))) == []

    @pytest.mark.parametrize("attempts", [False, True])
    def test_outlines_are_the_trials_without_what_makes_them_large(
        self, study: StudyUnderTest, attempts: bool
    ) -> None:
        study.store.create_trials("s", [new_trial(n) for n in (2, 3)], controller="c1")
        parts: tuple[tuple[int, Part], ...] = ((0, "search"), (0, "report"), (2, "search"))
        for number, part in parts:
            study.start(number, part, token=f"t{number}{part}")
            study.finish(f"t{number}{part}")
        study.start(1, token="bad")
        study.fail("bad")
        study.store.mark_told("s", {2: 0}, controller="c1")
        for numbers in (range(9), range(1, 3), range(4, 9)):
            assert list(study.store.outlines("s", numbers=numbers, attempts=attempts)) == [
                replace(
                    trial,
                    genome=None,
                    recipe={},
                    attempts=trial.attempts if attempts else (),
                )
                for trial in study.store.trials("s", outcomes=False, numbers=numbers)
            ]

    @pytest.mark.parametrize("numbers", [(2, 1), (2, 2)])
    def test_trials_are_created_all_or_none(
        self, study: StudyUnderTest, numbers: tuple[int, int]
    ) -> None:
        with pytest.raises(ValueError, match="'s'"):
            study.store.create_trials("s", [new_trial(n) for n in numbers], controller="c1")
        assert [trial.number for trial in study.store.trials("s")] == [0, 1]

    def test_creating_no_trials_is_nothing(self, study: StudyUnderTest) -> None:
        study.store.create_trials("s", [], controller="c1")
        assert len(study.store.trials("s")) == 2

    def test_trial_and_trials_say_the_same(self, study: StudyUnderTest) -> None:
        study.start()
        study.finish()
        assert [study.trial(0), study.trial(1)] == list(study.store.trials("s"))

    def test_outcomes_can_be_left_out(self, study: StudyUnderTest) -> None:
        study.start()
        study.finish()
        full, bare = study.trial(), study.store.trials("s", outcomes=False)[0]
        assert bare.scores["search"].tasks["add"] == replace(
            full.scores["search"].tasks["add"], outcomes=()
        )
        assert replace(bare, scores=full.scores) == full

    def test_two_studies_keep_their_trials_apart(self, study: StudyUnderTest) -> None:
        other = StudyUnderTest(study.store, "other", trials=1)
        other.start()
        other.finish(values=(0.75,))
        assert study.trial().state is State.WAITING
        assert other.trial().values == (0.75,)

    @pytest.mark.parametrize("call", ["trial", "start", "reuse", "told"])
    def test_an_unknown_trial_is_named(self, study: StudyUnderTest, call: str) -> None:
        calls: dict[str, Callable[[], object]] = {
            "trial": lambda: study.trial(99),
            "start": lambda: study.start(99),
            "reuse": lambda: study.reuse(99),
            "told": lambda: study.store.mark_told("s", {0: 0, 99: 1}, controller="c1"),
        }
        before = study.everything()
        with pytest.raises(ValueError, match="99"):
            calls[call]()
        assert study.everything() == before


class TestsOfAttempts:
    """start_attempt, finish, fail_attempt."""

    def test_starting_opens_an_attempt_and_the_trial_runs(self, study: StudyUnderTest) -> None:
        attempt = study.start()
        expected = Attempt(0, "search", 1, "t1", State.RUNNING, "w0", NOW, NOW + LEASE)
        assert attempt == expected
        assert study.trial().attempts == (expected,)
        assert study.trial().state is State.RUNNING

    def test_finishing_completes_attempt_and_trial(self, study: StudyUnderTest) -> None:
        started = study.start()
        study.finish()
        trial = study.trial()
        assert (trial.state, trial.values) == (State.COMPLETE, (0.5,))
        assert trial.scores == {"search": score()}
        assert trial.attempts == (
            replace(
                started,
                state=State.COMPLETE,
                worker="w1",
                finished_at=NOW + timedelta(seconds=2),
                seconds={"materialise": 0.25, "score": 1.5},
            ),
        )
        assert trial.seconds == 1.75

    def test_every_bit_of_values_scores_and_outcomes_comes_back(
        self, study: StudyUnderTest
    ) -> None:
        outcomes = (*ODD_FLOATS, math.nan, math.inf, -math.inf)
        study.start()
        study.finish(result=score(1 / 3, outcomes, -1 / 3), values=(*ODD_FLOATS, -math.inf))
        trial = study.store.trials("s")[0]
        task = trial.scores["search"].tasks["add"]
        assert trial.values is not None
        assert bits(trial.values) == bits((*ODD_FLOATS, -math.inf))
        assert bits(task.outcomes) == bits(outcomes)
        assert task.margin is not None
        assert bits((task.value, task.margin)) == bits((1 / 3, -1 / 3))

    def test_a_long_list_of_outcomes_comes_back(self, study: StudyUnderTest) -> None:
        outcomes = tuple(math.sin(i) for i in range(20_000))
        study.start()
        study.finish(result=score(0.5, outcomes))
        assert study.trial().scores["search"].tasks["add"].outcomes == outcomes

    def test_a_stderr_of_nan_is_no_stderr(self, study: StudyUnderTest) -> None:
        task = TaskScore("acc", 1.0, math.nan, 1, True, (1.0,))
        study.start()
        study.finish(result=Score({"add": task}))
        assert study.trial().scores["search"].tasks["add"].stderr is None

    @pytest.mark.parametrize(("value", "task"), [(math.nan, 0.5), (0.5, math.nan)])
    def test_nan_is_no_result(self, study: StudyUnderTest, value: float, task: float) -> None:
        study.start()
        before = study.everything()
        with pytest.raises(ValueError, match="NaN"):
            study.finish(result=score(task), values=(value,))
        assert study.everything() == before

    @pytest.mark.parametrize("again", ["finish", "fail"])
    @pytest.mark.parametrize("first", ["finish", "fail"])
    def test_an_attempt_is_closed_once(self, study: StudyUnderTest, first: str, again: str) -> None:
        calls: dict[str, Callable[[], None]] = {
            "finish": lambda: study.finish(values=(0.125,)),
            "fail": study.fail,
        }
        study.start()
        calls[first]()
        before = study.everything()
        with pytest.raises(StaleAttempt, match="t1"):
            calls[again]()
        assert study.everything() == before

    @pytest.mark.parametrize("call", ["finish", "fail"])
    def test_an_unknown_token_is_refused(self, study: StudyUnderTest, call: str) -> None:
        study.start()
        before = study.everything()
        with pytest.raises(StaleAttempt):
            study.finish("nope") if call == "finish" else study.fail("nope")
        assert study.everything() == before

    def test_a_token_of_another_study_is_refused(self, study: StudyUnderTest) -> None:
        other = StudyUnderTest(study.store, "other")
        other.start(token="theirs")
        with pytest.raises(StaleAttempt):
            study.finish("theirs")

    def test_an_open_attempt_is_the_only_one_on_its_part(self, study: StudyUnderTest) -> None:
        study.start(token="t1")
        before = study.everything()
        with pytest.raises(ValueError, match="open"):
            study.start(token="t2")
        assert study.everything() == before

    def test_a_token_is_used_once(self, study: StudyUnderTest) -> None:
        study.start(0, token="t1")
        study.finish("t1")
        before = study.everything()
        with pytest.raises(ValueError, match="t1"):
            study.start(1, token="t1")
        assert study.everything() == before

    def test_a_scored_part_is_not_started_again(self, study: StudyUnderTest) -> None:
        study.start()
        study.finish()
        with pytest.raises(ValueError, match="scored"):
            study.start(token="t2")

    def test_a_failed_trial_is_not_started_again(self, study: StudyUnderTest) -> None:
        study.start()
        study.fail()
        with pytest.raises(ValueError, match="FAIL"):
            study.start(token="t2")

    def test_a_bad_candidate_fails_its_trial_with_the_reason(self, study: StudyUnderTest) -> None:
        started = study.start()
        study.fail()
        trial = study.trial()
        assert (trial.state, trial.failure, trial.values) == (State.FAIL, BAD, None)
        assert trial.attempts == (
            replace(
                started,
                state=State.FAIL,
                worker="w1",
                finished_at=NOW + timedelta(seconds=2),
                seconds={"score": 0.5},
                failure=BAD,
            ),
        )

    def test_a_lost_attempt_sends_its_trial_back(self, study: StudyUnderTest) -> None:
        study.start()
        study.fail(state=State.WAITING, worker=None)
        trial = study.trial()
        assert (trial.state, trial.failure) == (State.WAITING, None)
        assert trial.attempts[0].failure == BAD
        assert trial.attempts[0].worker == "w0"
        assert study.start(token="t2").number == 2
        study.finish("t2")
        assert [attempt.state for attempt in study.trial().attempts] == ["FAIL", "COMPLETE"]

    @pytest.mark.parametrize("state", [State.RUNNING, State.COMPLETE, State.PRUNED])
    def test_a_failed_attempt_leaves_no_other_state(
        self, study: StudyUnderTest, state: State
    ) -> None:
        study.start()
        before = study.everything()
        with pytest.raises(ValueError, match=state.value):
            study.fail(state=state)
        assert study.everything() == before

    def test_another_part_leaves_the_trial_as_it_is(self, study: StudyUnderTest) -> None:
        study.start(token="t1")
        study.finish("t1")
        assert study.start(0, "selection", token="t2").number == 1
        assert study.trial().state is State.COMPLETE
        study.fail("t2", state=State.WAITING)
        assert study.start(0, "selection", token="t3").number == 2
        study.finish("t3", score(0.25), values=(0.25,))
        trial = study.trial()
        assert (trial.state, trial.values, trial.failure) == (State.COMPLETE, (0.5,), None)
        assert trial.scores == {"search": score(), "selection": score(0.25)}
        assert [(a.part, a.number) for a in trial.attempts] == [
            ("search", 1),
            ("selection", 1),
            ("selection", 2),
        ]

    def test_parts_of_one_trial_may_run_at_once(self, study: StudyUnderTest) -> None:
        study.start(0, "selection", token="t1")
        study.start(0, "report", token="t2")
        study.finish("t2")
        assert set(study.trial().scores) == {"report"}

    def test_a_text_that_no_database_keeps_is_kept_as_far_as_it_can_be(
        self, study: StudyUnderTest
    ) -> None:
        study.start()
        study.fail(why=Failure("Odd", "a\0b \ud800 c \U0001f600"))
        failure = study.trial().failure
        assert failure is not None
        assert (
            failure.message == "a\N{REPLACEMENT CHARACTER}b \N{REPLACEMENT CHARACTER} c \U0001f600"
        )


class TestsOfTells:
    """mark_told, told."""

    def orders(self, study: StudyUnderTest) -> list[int | None]:
        return [trial.tell_order for trial in study.store.trials("s")]

    def test_each_trial_has_its_place(self, study: StudyUnderTest) -> None:
        study.store.mark_told("s", {0: 1, 1: 0}, controller="c1")
        assert self.orders(study) == [1, 0]

    def test_the_same_place_again_changes_nothing(self, study: StudyUnderTest) -> None:
        study.store.mark_told("s", {0: 0}, controller="c1")
        study.store.mark_told("s", {0: 0, 1: 1}, controller="c1")
        assert self.orders(study) == [0, 1]

    @pytest.mark.parametrize("orders", [{1: 1, 0: 2}, {1: 0}])
    def test_no_trial_is_told_twice_and_no_place_taken_twice(
        self, study: StudyUnderTest, orders: dict[int, int]
    ) -> None:
        study.store.mark_told("s", {0: 0}, controller="c1")
        with pytest.raises(ValueError, match=r"told|place"):
            study.store.mark_told("s", orders, controller="c1")
        assert self.orders(study) == [0, None]

    def test_places_may_have_gaps_and_come_in_any_order(self, study: StudyUnderTest) -> None:
        study.store.create_trials("s", [new_trial(2)], controller="c1")
        study.store.mark_told("s", {2: 7, 0: 12}, controller="c1")
        study.store.mark_told("s", {1: 9}, controller="c1")
        assert self.orders(study) == [12, 9, 7]

    def test_tells_come_in_their_order_some_at_a_time(self, study: StudyUnderTest) -> None:
        study.start(0)
        study.finish()
        study.start(1, token="t2")
        study.fail("t2")
        study.store.mark_told("s", {0: 12, 1: 9}, controller="c1")
        first, second = Tell(9, 1, (0.25, 0.75), None), Tell(12, 0, (0.25, 0.75), (0.5,))
        assert list(study.store.told("s", limit=5)) == [first, second]
        assert list(study.store.told("s", limit=1)) == [first]
        assert list(study.store.told("s", after=9, limit=5)) == [second]
        assert list(study.store.told("s", after=12, limit=5)) == []

    def test_marking_nothing_is_nothing(self, study: StudyUnderTest) -> None:
        study.store.mark_told("s", {}, controller="c1")
        assert self.orders(study) == [None, None]


class StoreContract(
    TestsOfStudies,
    TestsOfFencing,
    TestsOfTrials,
    TestsOfAttempts,
    TestsOfAttemptLeases,
    TestsOfRefusals,
    TestsOfReuse,
    TestsOfTells,
    TestsOfMargins,
    TestsOfClaims,
):
    """Every test of the contract. Subclass it with a fixture `store` that yields an empty store."""

    @pytest.fixture
    def study(self, store: StudyStore) -> StudyUnderTest:
        """A study with two waiting trials, run by controller `c1`."""
        return StudyUnderTest(store)
