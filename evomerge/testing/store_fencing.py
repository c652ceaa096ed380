"""The fencing half of the store contract: who may write a study, and what a takeover leaves.

Collected through `store_contract.StoreContract`; uses nothing but the protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

from evomerge.errors import StaleAttempt, StudyBusy, StudyNotFound
from evomerge.testing.store_builders import LEASE, NOW, StudyUnderTest, holder, new_trial
from evomerge.trial import State

WRITES: dict[str, Callable[[StudyUnderTest, str], object]] = {
    "update_study": lambda s, c: s.store.update_study(s.name, {}, {}, controller=c),
    "renew": lambda s, c: s.store.renew(s.name, c, lease_until=NOW),
    "release": lambda s, c: s.store.release(s.name, c),
    "create_trials": lambda s, c: s.store.create_trials(s.name, [new_trial(7)], controller=c),
    "start_attempt": lambda s, c: s.start(1, token="t9", controller=c),
    "renew_attempts": lambda s, c: s.store.renew_attempts(
        s.name, ["t1"], lease_until=NOW, controller=c
    ),
    "finish": lambda s, c: s.finish(controller=c),
    "fail_attempt": lambda s, c: s.fail(controller=c),
    "refuse": lambda s, c: s.store.refuse(s.name, "stray", controller=c),
    "reuse": lambda s, c: s.reuse(1, controller=c),
    "mark_told": lambda s, c: s.store.mark_told(s.name, {0: 0}, controller=c),
}
READS: dict[str, Callable[[StudyUnderTest], object]] = {
    "study": lambda s: s.store.study(s.name),
    "acquire": lambda s: s.store.acquire(s.name, holder(), now=NOW),
    "controller": lambda s: s.store.controller(s.name),
    "trials": lambda s: s.store.trials(s.name),
    "outlines": lambda s: s.store.outlines(s.name, numbers=range(9)),
    "trial": lambda s: s.trial(),
    "refusals": lambda s: s.store.refusals(s.name),
}


class TestsOfFencing:
    """acquire, renew, release, controller, and the token that every write carries."""

    @pytest.mark.parametrize("write", WRITES)
    def test_a_controller_that_was_replaced_writes_nothing(
        self, study: StudyUnderTest, write: str
    ) -> None:
        study.start()
        before = study.everything()
        with pytest.raises(StudyBusy, match="'s'"):
            WRITES[write](study, "c0")
        assert study.everything() == before

    @pytest.mark.parametrize("write", WRITES)
    def test_a_released_study_is_written_by_nobody(self, study: StudyUnderTest, write: str) -> None:
        study.start()
        study.store.release("s", "c1")
        before = study.everything()
        with pytest.raises(StudyBusy):
            WRITES[write](study, "c1")
        assert study.everything() == before

    @pytest.mark.parametrize("call", [*WRITES, *READS])
    def test_an_unknown_study_is_named(self, study: StudyUnderTest, call: str) -> None:
        study.name = "nope"
        with pytest.raises(StudyNotFound, match="'nope'"):
            WRITES[call](study, "c1") if call in WRITES else READS[call](study)

    def test_a_live_lease_refuses_another_controller(self, study: StudyUnderTest) -> None:
        later = NOW + timedelta(seconds=60)
        with pytest.raises(StudyBusy, match=r"4321 on host-a.* 840 s"):
            study.store.acquire("s", holder("c2"), now=later)
        assert study.store.controller("s") == holder()

    def test_force_takes_a_study_whose_lease_is_live(self, study: StudyUnderTest) -> None:
        study.store.acquire("s", holder("c2"), now=NOW, force=True)
        assert study.store.controller("s") == holder("c2")

    def test_a_lapsed_lease_lets_another_controller_in(self, study: StudyUnderTest) -> None:
        study.store.acquire("s", holder("c2"), now=NOW + LEASE)
        assert study.store.controller("s") == holder("c2")

    def test_a_lease_that_lapsed_unnoticed_still_holds(self, study: StudyUnderTest) -> None:
        study.store.renew("s", "c1", lease_until=NOW - LEASE)
        study.start()
        assert study.trial().state is State.RUNNING

    def test_the_same_token_may_acquire_again(self, study: StudyUnderTest) -> None:
        again = holder(until=NOW + 2 * LEASE)
        study.store.acquire("s", again, now=NOW)
        assert study.store.controller("s") == again

    def test_renew_moves_the_lease_alone(self, study: StudyUnderTest) -> None:
        study.store.renew("s", "c1", lease_until=NOW + 2 * LEASE)
        assert study.store.controller("s") == holder(until=NOW + 2 * LEASE)

    def test_release_leaves_no_controller_and_lets_the_next_one_in(
        self, study: StudyUnderTest
    ) -> None:
        study.store.release("s", "c1")
        assert study.store.controller("s") is None
        study.store.acquire("s", holder("c2"), now=NOW)
        assert study.store.controller("s") == holder("c2")

    def test_acquire_closes_what_the_last_controller_left_open(self, study: StudyUnderTest) -> None:
        study.start(0, token="t1")
        study.start(1, token="t2")
        study.finish("t2")
        study.start(1, "report", token="t3")
        later = NOW + 2 * LEASE
        study.store.acquire("s", holder("c2", until=later), now=later)
        searching, reporting = study.trial(0), study.trial(1)
        lost = searching.attempts[0]
        assert (lost.state, lost.finished_at) == (State.FAIL, later)
        assert lost.failure is not None
        assert lost.failure.error == "WorkerLost"
        assert (searching.state, searching.failure) == (State.WAITING, None)
        assert reporting.state is State.COMPLETE
        assert [attempt.state for attempt in reporting.attempts] == [State.COMPLETE, State.FAIL]

    def test_a_result_for_an_attempt_closed_by_acquire_is_refused(
        self, study: StudyUnderTest
    ) -> None:
        study.start()
        study.store.acquire("s", holder("c2"), now=NOW, force=True)
        with pytest.raises(StaleAttempt):
            study.finish(controller="c2")

    def test_acquire_leaves_other_studies_alone(self, study: StudyUnderTest) -> None:
        other = StudyUnderTest(study.store, "other")
        other.start()
        before = other.everything()
        study.store.acquire("s", holder("c2"), now=NOW, force=True)
        assert other.everything() == before
