"""The claims of the store contract: what running studies ask of the workers that they share.

Collected through `store_contract.StoreContract`; uses nothing but the protocol.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from evomerge.store.base import StudyStore
from evomerge.testing.store_builders import LEASE, NOW, StudyUnderTest, claim

MINE = claim()


class TestsOfClaims:
    """claim, claims, withdraw."""

    def test_a_claim_comes_back_as_it_was_made_before_there_is_a_study(
        self, store: StudyStore
    ) -> None:
        assert store.claims(now=NOW) == []
        store.claim(MINE)
        assert store.claims(now=NOW) == [MINE]

    def test_a_study_has_one_claim_and_the_last_one_holds(self, store: StudyStore) -> None:
        store.claim(MINE)
        other = replace(MINE, token="c2", pool="pool-b", priority=-3, wanted=0, held=0, worker={})
        store.claim(other)
        assert store.claims(now=NOW) == [other]

    def test_claims_come_oldest_first_then_by_name(self, store: StudyStore) -> None:
        later = NOW + timedelta(microseconds=1)
        made = [replace(MINE, study=study, since=since)
                for study, since in (("b", later), ("c", NOW), ("a", later))]  # fmt: skip
        for each in made:
            store.claim(each)
        assert [each.study for each in store.claims(now=NOW)] == ["c", "a", "b"]

    def test_a_lapsed_claim_is_none_and_may_be_made_anew(self, store: StudyStore) -> None:
        store.claim(MINE)
        assert store.claims(now=NOW + LEASE - timedelta(microseconds=1)) == [MINE]
        assert store.claims(now=NOW + LEASE) == []
        longer = replace(MINE, lease_until=NOW + 2 * LEASE)
        store.claim(longer)
        assert store.claims(now=NOW + LEASE) == [longer]

    def test_a_claim_is_withdrawn_by_its_own_token_only(self, store: StudyStore) -> None:
        other = replace(MINE, study="t", token="c2")
        for each in (MINE, other):
            store.claim(each)
        store.withdraw("s", "c2")
        store.withdraw("nope", "c1")
        assert store.claims(now=NOW) == [MINE, other]
        store.withdraw("s", "c1")
        assert store.claims(now=NOW) == [other]

    def test_a_study_is_neither_held_nor_changed_by_its_claim(self, study: StudyUnderTest) -> None:
        before = study.everything()
        study.store.claim(replace(MINE, token="of-another"))
        assert study.everything()[:-1] == before[:-1]
        study.start()
        study.finish()
