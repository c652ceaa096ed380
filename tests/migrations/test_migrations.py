"""Migrations: one head, equal to the tables, beside Optuna's in one database, and not too new."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from evomerge.errors import SchemaTooNew, StoreError
from evomerge.store import migrations, open_store
from evomerge.store.engine import make_engine, transaction
from evomerge.store.migrations import REVISIONS, VERSION_TABLE, script_location, upgrade
from evomerge.store.tables import metadata
from evomerge.testing.store_builders import StudyUnderTest, record


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        found: str = request.getfixturevalue("empty_postgres_url")
        return found
    return f"sqlite:///{tmp_path}/store.db"


def tables(url: str) -> set[str]:
    engine = sa.create_engine(url)
    found = set(sa.inspect(engine).get_table_names())
    engine.dispose()
    return found


def run(url: str, monkeypatch: pytest.MonkeyPatch, action: str, revision: str) -> None:
    """An alembic command as a developer types it: on the database that EVOMERGE_STORE names."""
    monkeypatch.setenv("EVOMERGE_STORE", url)
    config = Config()
    config.set_main_option("script_location", str(script_location()))
    getattr(command, action)(config, revision)


def test_there_is_one_head_and_the_code_knows_every_revision() -> None:
    scripts = ScriptDirectory(str(script_location()))
    assert scripts.get_heads() == [REVISIONS[-1]]
    assert tuple(script.revision for script in scripts.walk_revisions())[::-1] == REVISIONS


def test_upgrading_from_empty_gives_the_tables(url: str) -> None:
    open_store(url)
    with make_engine(url).connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert compare_metadata(context, metadata) == []
    assert tables(url) == {*metadata.tables, VERSION_TABLE}


def test_down_and_up_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(url, monkeypatch, "upgrade", "head")
    assert set(metadata.tables) < tables(url)
    run(url, monkeypatch, "downgrade", "base")
    assert tables(url) == {VERSION_TABLE}
    upgrade(url)
    open_store(url).create_study(record())


def test_an_upgrade_keeps_what_the_first_schema_held(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = StudyUnderTest(open_store(url))
    study.start()
    before = study.everything()
    study.store.close()
    run(url, monkeypatch, "downgrade", "0001")
    assert upgrade(url) == REVISIONS[-1]
    study.store = open_store(url)
    assert study.everything() == before
    study.finish()


def test_upgrading_what_is_new_already_keeps_it(url: str) -> None:
    study = StudyUnderTest(open_store(url))
    before = study.everything()
    assert upgrade(url) == REVISIONS[-1]
    assert study.everything() == before


def test_a_newer_schema_is_refused_and_left_alone(url: str) -> None:
    open_store(url)
    with sa.create_engine(url).begin() as connection:
        connection.exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    for use in (open_store, upgrade):
        with pytest.raises(SchemaTooNew, match=r"9999.*upgrade evomerge"):
            use(url)


def test_an_older_schema_names_the_command(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(url)
    monkeypatch.setattr(migrations, "REVISIONS", (*REVISIONS, "9998"))
    with pytest.raises(StoreError, match="evomerge db upgrade"):
        open_store(url)


def test_an_upgrade_that_fails_leaves_an_empty_store(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(command, "upgrade", fail)
        with pytest.raises(OSError, match="disk full"):
            open_store(url)
    assert tables(url) == set()
    open_store(url)


@pytest.mark.parametrize("first", ["evomerge", "optuna"])
def test_optunas_tables_live_in_the_same_database(
    url: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if first == "evomerge":
        open_store(url)
    theirs = optuna.create_study(study_name="theirs", storage=url)
    theirs.add_trial(optuna.trial.create_trial(value=1.0))
    study = StudyUnderTest(open_store(url))
    before = study.everything()
    optuna.storages.RDBStorage(url).upgrade()
    upgrade(url)
    assert study.everything() == before
    assert optuna.load_study(study_name="theirs", storage=url).best_value == 1.0
    run(url, monkeypatch, "downgrade", "base")
    assert optuna.load_study(study_name="theirs", storage=url).best_value == 1.0


def test_autogenerate_does_not_see_optunas_tables(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(url)
    optuna.create_study(storage=url)
    monkeypatch.setenv("EVOMERGE_STORE", url)
    config = Config()
    config.set_main_option("script_location", str(script_location()))
    command.check(config)


def test_a_store_is_opened_while_another_process_writes(url: str) -> None:
    open_store(url)
    with transaction(make_engine(url), write=True):
        open_store(url)
