"""Claims that several processes make at one moment; none of them is lost or refused."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from evomerge.store import open_store
from evomerge.testing.store_builders import NOW, claim

CONTROLLERS, ROUNDS = 4, 10


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_first_claims_at_one_moment(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    if kind == "postgresql":
        url = request.getfixturevalue("postgres_url")
    open_store(url).close()
    together = threading.Barrier(CONTROLLERS)
    failures: list[Exception] = []

    def control(place: int) -> None:
        store = open_store(url)
        try:
            for turn in range(ROUNDS):
                together.wait()
                store.claim(replace(claim(), study=f"contested {turn}", token=str(place)))
                store.claim(replace(claim(), study=f"of {place}", wanted=turn))
        except Exception as error:
            failures.append(error)
            together.abort()
        finally:
            store.close()

    threads = [threading.Thread(target=control, args=(place,)) for place in range(CONTROLLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    store = open_store(url)
    found = {each.study: each for each in store.claims(now=NOW)}
    store.close()
    assert len(found) == ROUNDS + CONTROLLERS
    assert {found[f"of {place}"].wanted for place in range(CONTROLLERS)} == {ROUNDS - 1}
