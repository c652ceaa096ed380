"""A disk that fills up under the store or the report: one clear line, and nothing is lost."""

from __future__ import annotations

import contextlib
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from kill_points import SPEC, WORKERS_BEFORE
from kill_points import run as run_here
from kill_points import uninterrupted as whole
from run_synthetic import rows
from synthetic_processes import Place, Process, held_in_mid_search, uninterrupted

from evomerge.errors import StoreError
from evomerge.store import open_store
from evomerge.store.sql import SqlStore
from evomerge.testing.synthetic import SyntheticExecutor
from evomerge.trial import State

pytestmark = pytest.mark.slow
FULL = "database or disk is full; free some space and run the same command again"


def says_so_and_goes_on(place: Place, full: Process, make_room: Callable[[], Process]) -> None:
    assert full.end() == 2
    assert full.last_line.startswith("evomerge: sqlite:///")
    assert full.last_line.endswith(FULL)
    assert "Traceback" not in full.said
    scored = [t.number for t in place.trials() if t.scores]
    again = make_room()
    assert again.end() == 0, again.said
    assert place.table() == uninterrupted(place.spec)
    complete = [(a.trial, a.part) for t in place.trials() for a in t.attempts
                if a.state is State.COMPLETE]  # fmt: skip
    assert len(complete) == len(set(complete)), f"nothing of {scored} is scored again"


def test_a_database_that_may_not_grow(tmp_path: Path, run: Callable[..., Process]) -> None:
    place = Place(tmp_path)
    open_store(place.url).close()
    pages = Path(place.url.removeprefix("sqlite:///")).stat().st_size // 4096
    full = run(place, pages=pages + 8)
    says_so_and_goes_on(place, full, lambda: run(place))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as open_file:
        while True:
            open_file.write(bytes(4096))


def test_a_real_disk(tmp_path: Path, small_disk: Path, run: Callable[..., Process]) -> None:
    place = Place(tmp_path, f"sqlite:///{small_disk / 'store.db'}")
    full = held_in_mid_search(place, lambda: run(place))
    filler = small_disk / "filler"
    fill(filler)
    place.let_go("score")

    def make_room() -> Process:
        filler.unlink()
        return run(place)

    says_so_and_goes_on(place, full, make_room)


NO_ROOM = """
CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  IF (SELECT count(*) FROM evomerge_scores) >= 9 THEN
    RAISE EXCEPTION 'could not extend file "base/1/2": No space left on device'
      USING ERRCODE = 'disk_full', HINT = 'Check free disk space.';
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER no_room BEFORE INSERT ON evomerge_scores FOR EACH ROW EXECUTE FUNCTION no_room()
"""


def test_the_servers_disk(postgres_url: str) -> None:
    """What PostgreSQL says of a full disk, said by a trigger."""
    store = SqlStore(postgres_url)
    try:
        execute(store, NO_ROOM)
        with pytest.raises(StoreError, match=r"No space left on device.*free some space") as full:
            run_here(store, SyntheticExecutor(WORKERS_BEFORE))
        assert "\n" not in str(full.value)
        kept = [t for t in store.trials(SPEC.name) if t.scores]
        assert kept
    finally:
        execute(store, "DROP FUNCTION no_room CASCADE")
    assert run_here(store, SyntheticExecutor(3))
    assert rows(store, SPEC) == whole(open_store("memory://"))[0]
    store.close()


def execute(store: SqlStore, statements: str) -> None:
    with store.engine.begin() as connection:
        connection.execute(sa.text(statements))


def test_a_report_that_does_not_fit(tmp_path: Path, run: Callable[..., Process]) -> None:
    place = Place(tmp_path)
    done = run(place)
    assert done.end() == 0, done.said
    before = set(tmp_path.iterdir())

    def almost_full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    store = place.store  # what SQLite keeps beside a database is there while somebody reads it
    store.studies()
    full = place.evomerge("report", place.spec.name, "-o", "page.html", preexec_fn=almost_full)
    assert full.end() == 2, full.said
    assert full.said == "evomerge: cannot write page.html: File too large\n"
    store.close()
    left = {path for path in set(tmp_path.iterdir()) - before if not path.name.startswith("err")}
    assert not {path for path in left if "page" in path.name}

    onto = place.evomerge("report", place.spec.name, "-o", "/dev/full")
    assert onto.end() == 2, onto.said
    assert onto.said == "evomerge: cannot write /dev/full: No space left on device\n"
    assert Path("/dev/full").is_char_device(), "a device is written to, not put aside"
