"""The mirror against Optuna itself: what it loads, and what its own call would have written."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import FrozenTrial
from postgres_server import Postgres

from evomerge.errors import StoreError
from evomerge.store import open_store
from evomerge.store.mirror import KEY, MAX_PARAMETERS, OptunaMirror, open_storage
from evomerge.testing.store_builders import BAD, StudyUnderTest, new_trial, score
from evomerge.trial import State, Trial

fork = multiprocessing.get_context("fork")
GENES = ("scale.math", "scale.code")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        found: str = request.getfixturevalue("empty_postgres_url")
        return found
    return f"sqlite:///{tmp_path}/store.db"


@pytest.fixture
def trials(url: str) -> Iterator[list[Trial]]:
    """A complete, a failed and a waiting search trial, and a baseline with an infinite value."""
    store = open_store(url)
    study = StudyUnderTest(store, trials=3)
    baseline = replace(new_trial(3, genome=None), kind="source", label="math")
    store.create_trials("s", [baseline], controller="c1")
    study.start(0, token="t0")
    study.finish("t0", score(0.25), values=(1 / 3,))
    study.start(1, token="t1")
    study.fail("t1")
    study.start(3, token="t3")
    study.finish("t3", values=(-math.inf,))
    yield list(store.trials("s", outcomes=False))
    store.close()


def mirror(url: str, **changes: Any) -> OptunaMirror:
    arguments: dict[str, Any] = {"directions": 1, "gene_names": GENES, "metric_names": ["mean"]}
    return OptunaMirror(url, "s", **{**arguments, **changes})


def loaded(url: str) -> list[FrozenTrial]:
    return optuna.load_study(study_name="s", storage=url).trials


def test_optuna_loads_every_finished_trial(url: str, trials: list[Trial]) -> None:
    assert mirror(url).sync(trials) == 3
    complete, failed, baseline = loaded(url)
    assert complete.value == 1 / 3
    assert complete.params == {"scale.math": 0.25, "scale.code": 0.75}
    assert complete.duration == timedelta(seconds=2)
    assert complete.user_attrs == {
        KEY: 0,
        "kind": "search",
        "label": "trial 0",
        "recipe": "digest-0",
        "seconds": 1.75,
        "score add": 0.25,
        "score wiki": 12.5,
    }
    assert failed.state is optuna.trial.TrialState.FAIL
    assert failed.user_attrs["error"] == f"NonFiniteModel: {BAD.message}"
    assert (baseline.value, baseline.params) == (-math.inf, {})
    assert (baseline.user_attrs["kind"], baseline.user_attrs["label"]) == ("source", "math")
    study = optuna.load_study(study_name="s", storage=url)
    assert study.best_value == 1 / 3
    assert study.metric_names == ["mean"]


def test_optunas_own_call_leaves_the_same_behind(
    url: str, trials: list[Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror(url).sync(trials)
    slow_url = f"sqlite:///{tmp_path}/slow.db"
    monkeypatch.setattr("evomerge.store.mirror._KNOWN_SCHEMA", "none")
    mirror(slow_url).sync(trials)
    assert mirror(slow_url).sync(trials) == 0
    assert loaded(slow_url) == loaded(url)
    assert _rows(slow_url) == _rows(url)


def _rows(url: str) -> dict[str, list[Any]]:
    engine, found = sa.create_engine(url), sa.MetaData()
    found.reflect(engine)
    tables = (t for t in found.sorted_tables if t.name.startswith("trial"))
    with engine.connect() as connection:
        return {t.name: sorted(map(repr, connection.execute(sa.select(t)))) for t in tables}


def test_a_discrete_gene_is_shown_by_its_value(
    url: str, trials: list[Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"scale.code": (0.1, 0.3, 0.7)}
    mirror(url, values=values).sync(trials)
    first = loaded(url)[0]
    assert first.params == {"scale.math": 0.25, "scale.code": 0.7}  # of the gene 0.75
    assert first.distributions["scale.code"].choices == (0.1, 0.3, 0.7)
    slow_url = f"sqlite:///{tmp_path}/slow.db"
    monkeypatch.setattr("evomerge.store.mirror._KNOWN_SCHEMA", "none")
    mirror(slow_url, values=values).sync(trials)
    assert loaded(slow_url) == loaded(url)
    assert _rows(slow_url) == _rows(url)


def test_no_trial_is_there_twice(url: str, trials: list[Trial]) -> None:
    first = mirror(url)
    first.sync(trials)
    assert first.sync(trials) == 0
    assert mirror(url).sync(trials) == 0
    assert [trial.user_attrs[KEY] for trial in loaded(url)] == [0, 1, 3]


def test_a_mirror_that_was_cut_off_is_completed(url: str, trials: list[Trial]) -> None:
    mirror(url).sync(trials[:1])
    assert mirror(url).sync(trials) == 2
    found = loaded(url)
    assert [trial.user_attrs[KEY] for trial in found] == [0, 1, 3]
    assert [trial.number for trial in found] == [0, 1, 2]


def test_a_batch_cut_off_half_way_leaves_nothing(
    url: str, trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = mirror(url)
    with monkeypatch.context() as patch:
        patch.setattr("evomerge.store.mirror._attribute_rows", _fail)
        with pytest.raises(OSError, match="cut off"):
            cut.sync(trials)
    assert loaded(url) == []
    assert cut.sync(trials) == 3


def _fail(*_: object) -> None:
    raise OSError("cut off")


def test_several_objectives(url: str, trials: list[Trial]) -> None:
    pareto = [
        replace(trial, values=(0.25, -math.inf))
        for trial in trials
        if trial.state is State.COMPLETE
    ]
    mirror(url, directions=2, metric_names=["add", "wiki"]).sync(pareto)
    assert [trial.values for trial in loaded(url)] == [[0.25, -math.inf]] * 2


def test_only_the_first_genes_are_parameters(url: str, trials: list[Trial]) -> None:
    genome = tuple(i / 60 for i in range(60))
    names = [f"gene {i}" for i in range(60)]
    mirror(url, gene_names=names).sync([replace(trials[0], genome=genome)])
    (found,) = loaded(url)
    assert found.params == dict(list(zip(names, genome, strict=True))[:MAX_PARAMETERS])


def test_a_reused_score_has_no_attempts_and_is_mirrored(url: str, trials: list[Trial]) -> None:
    mirror(url).sync([replace(trials[0], attempts=())])
    (found,) = loaded(url)
    assert found.duration == timedelta(0)


def test_a_study_of_the_users_own_is_left_alone(url: str, trials: list[Trial]) -> None:
    theirs = optuna.create_study(study_name="s", storage=url)
    theirs.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(StoreError, match="'s'"):
        mirror(url)
    assert len(loaded(url)) == 1


def test_a_memory_store_has_no_mirror() -> None:
    with pytest.raises(StoreError, match="memory"):
        open_storage("memory://")


def test_an_optuna_schema_that_cannot_be_used_is_a_store_error(url: str) -> None:
    open_storage(url)
    with sa.create_engine(url).begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'v99'")
    with pytest.raises(StoreError, match="Optuna"):
        open_storage(url)


def _mirror_and_die(url: str, trials: list[Trial], nth: int) -> None:
    """Mirror in a process that is killed at the n-th commit of any engine."""
    commits = iter(range(10_000))

    @sa.event.listens_for(sa.engine.Engine, "commit")
    def die(_: sa.Connection) -> None:
        if next(commits) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    mirror(url).sync(trials)
    os._exit(0)


@pytest.mark.slow
def test_kill_9_at_any_commit_of_the_mirror_is_made_good(tmp_path: Path) -> None:
    study = StudyUnderTest(open_store(f"sqlite:///{tmp_path}/source.db"))
    study.start()
    study.finish()
    trials = study.store.trials("s")
    for nth in itertools.count():
        url = f"sqlite:///{tmp_path}/{nth}.db"
        child = fork.Process(target=_mirror_and_die, args=(url, trials, nth))
        child.start()
        child.join()
        mirror(url).sync(trials)
        assert [trial.user_attrs[KEY] for trial in loaded(url)] == [0], nth
        if child.exitcode == 0:
            break
    assert nth > 5


def test_a_mirror_whose_server_is_away_lags_and_catches_up(
    own_postgres: Postgres, empty_postgres_url: str
) -> None:
    study = StudyUnderTest(open_store(empty_postgres_url))
    study.start()
    study.finish()
    trials = study.store.trials("s")
    shown = mirror(empty_postgres_url)
    own_postgres.stop()
    try:
        assert shown.sync(trials) == 0
    finally:
        own_postgres.start()
    assert shown.sync(trials) == 1
    assert len(loaded(empty_postgres_url)) == 1
