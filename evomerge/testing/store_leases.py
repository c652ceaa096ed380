"""The lease half of the store contract: signs of life, and results that nobody waits for.

Collected through `store_contract.StoreContract`; uses nothing but the protocol.
"""

from __future__ import annotations

from dataclasses import replace

from evomerge.testing.store_builders import LEASE, NOW, StudyUnderTest, holder
from evomerge.trial import State


class TestsOfAttemptLeases:
    """renew_attempts."""

    def test_open_attempts_are_renewed_and_nothing_else(self, study: StudyUnderTest) -> None:
        later = NOW + 2 * LEASE
        first, second = study.start(0, token="t1"), study.start(1, token="t2")
        study.start(0, "report", token="t3")
        study.store.renew_attempts("s", {"t1", "t3", "nope"}, lease_until=later, controller="c1")
        assert study.trial(0).attempts[0] == replace(first, lease_until=later)
        assert study.trial(0).attempts[1].lease_until == later
        assert study.trial(1).attempts == (second,)

    def test_a_closed_attempt_is_left_alone(self, study: StudyUnderTest) -> None:
        study.start()
        study.fail(state=State.WAITING)
        before = study.everything()
        study.store.renew_attempts("s", ["t1"], lease_until=NOW + 2 * LEASE, controller="c1")
        assert study.everything() == before

    def test_an_attempt_of_another_study_is_left_alone(self, study: StudyUnderTest) -> None:
        other = StudyUnderTest(study.store, "other")
        other.start()
        before = other.everything()
        study.store.renew_attempts("s", ["t1"], lease_until=NOW + 2 * LEASE, controller="c1")
        assert other.everything() == before

    def test_a_renewed_attempt_is_finished_as_any_other(self, study: StudyUnderTest) -> None:
        study.start()
        study.store.renew_attempts("s", ["t1"], lease_until=NOW + 2 * LEASE, controller="c1")
        study.finish()
        assert study.trial().attempts[0].state is State.COMPLETE

    def test_renewing_nothing_is_nothing(self, study: StudyUnderTest) -> None:
        study.start()
        before = study.everything()
        study.store.renew_attempts("s", [], lease_until=NOW, controller="c1")
        assert study.everything() == before


class TestsOfRefusals:
    """refuse, refusals."""

    def test_each_reason_is_counted(self, study: StudyUnderTest) -> None:
        assert study.store.refusals("s") == {}
        study.start(0, token="done")
        study.finish("done")
        study.start(1, token="lost")
        study.fail("lost", state=State.WAITING)
        for token, why in (("done", "repeated"), ("lost", "late"), ("nope", "stray")):
            assert study.store.refuse("s", token, controller="c1") == why
        study.store.refuse("s", "lost", controller="c1")
        assert study.store.refusals("s") == {"repeated": 1, "late": 2, "stray": 1}

    def test_a_result_that_is_awaited_is_not_refused(self, study: StudyUnderTest) -> None:
        study.start()
        assert study.store.refuse("s", "t1", controller="c1") is None
        assert study.store.refusals("s") == {}

    def test_what_a_takeover_closed_is_late(self, study: StudyUnderTest) -> None:
        study.start()
        study.store.acquire("s", holder("c2"), now=NOW, force=True)
        assert study.store.refuse("s", "t1", controller="c2") == "late"

    def test_a_token_of_another_study_is_a_stray(self, study: StudyUnderTest) -> None:
        other = StudyUnderTest(study.store, "other")
        other.start(token="theirs")
        assert study.store.refuse("s", "theirs", controller="c1") == "stray"
        assert other.store.refusals("other") == {}

    def test_nothing_but_the_count_changes(self, study: StudyUnderTest) -> None:
        study.start()
        study.finish()
        before = study.everything()
        study.store.refuse("s", "t1", controller="c1")
        assert study.everything()[:3] == before[:3]
