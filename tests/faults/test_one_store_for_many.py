"""Several studies in one store, each with its controller, at once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from run_synthetic import rows, run_synthetic

from evomerge.store import open_store
from evomerge.testing.synthetic import SyntheticExecutor, synthetic_spec
from evomerge.trial import State

SPECS = [
    synthetic_spec(
        name=f"study-{seed}",
        budget={"trials": 8, "finalists": 2},
        sampler={"name": "cmaes", "population": 4, "seed": seed},
    )
    for seed in range(4)
]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_studies_that_share_a_store_end_as_they_would_alone(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    if kind == "postgresql":
        url = request.getfixturevalue("postgres_url")
    open_store(url).close()
    failures: list[Exception] = []

    def search(place: int) -> None:
        store = open_store(url)
        try:
            assert run_synthetic(SPECS[place], store, SyntheticExecutor(2, seed=place))
        except Exception as error:
            failures.append(error)
        finally:
            store.close()

    threads = [threading.Thread(target=search, args=(n,)) for n in range(len(SPECS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    shared = open_store(url)
    for spec in SPECS:
        alone = open_store("memory://")
        run_synthetic(spec, alone, SyntheticExecutor(2))
        # a baseline that another study scored first is answered from the store: same scores
        assert rows(shared, spec) == rows(alone, spec)
        attempts = [a for t in shared.trials(spec.name) for a in t.attempts]
        assert all(a.state is State.COMPLETE for a in attempts)
    shared.close()
