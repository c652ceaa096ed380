"""A real PostgreSQL for tests: started here from the system's binaries, or one that is named.

`EVOMERGE_TEST_POSTGRES` names a server by its URL, with the right to create databases: tests make
their own there and touch no other. Without it a server is started in a temporary folder, reached
over a socket in that folder alone, and stopped by its process id.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

DEADLINE_S = 120.0  # nothing is timed: this ends a server that does not come up
_names = itertools.count()


class ForeignPostgres:
    """A server that somebody else runs."""

    def __init__(self, url: str) -> None:
        self.admin = sa.make_url(url)

    def create(self) -> str:
        """A new, empty database; its name."""
        name = f"evomerge_test_{os.getpid()}_{next(_names)}"
        self._run(f"CREATE DATABASE {name} TEMPLATE template0")
        return name

    def drop(self, name: str) -> None:
        """Remove a database, whoever is connected to it."""
        self._run(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def url(self, name: str) -> str:
        """The store URL of a database."""
        return self.admin.set(database=name).render_as_string(hide_password=False)

    def _run(self, statement: str) -> None:
        engine = sa.create_engine(self.admin, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)
        engine.dispose()


class Postgres(ForeignPostgres):
    """A server of our own: it can be stopped, killed and started again."""

    def __init__(self, binaries: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="evomerge-postgres-"))
        self._binaries = binaries
        self._popen: subprocess.Popen[bytes] | None = None
        self._log = (self.folder / "log").open("wb")
        super().__init__(f"postgresql+psycopg://postgres@/postgres?host={self.folder}")
        if _user():
            shutil.chown(self.folder, "postgres", "postgres")
        self._call("initdb", "-D", "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "-N",
                   "--locale=C")  # fmt: skip

    def start(self) -> None:
        """Start it and wait until it answers."""
        # no fsync: the machine does not lose its power here, and a killed server needs none
        settings = {"listen_addresses": "", "unix_socket_directories": str(self.folder),
                    "fsync": "off", "shared_buffers": "16MB", "max_connections": "60"}  # fmt: skip
        options = [f"--{name}={value}" for name, value in settings.items()]
        self._popen = self._start("postgres", "-D", "data", *options)
        deadline = time.monotonic() + DEADLINE_S
        while not self._answers():
            if self._popen.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no PostgreSQL: {(self.folder / 'log').read_text()}")
            time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """SIGQUIT: at once, with a recovery at the next start; SIGINT: after a checkpoint."""
        if self._popen is not None:
            self._popen.send_signal(how)
            self._popen.wait()
            self._popen = None

    def kill(self) -> None:
        """SIGKILL to the postmaster; every other process of it ends when it notices."""
        if self._popen is not None:
            others = psutil.Process(self._popen.pid).children()
            self.stop(signal.SIGKILL)
            psutil.wait_procs(others, timeout=DEADLINE_S)  # they hold what the next one needs

    def drop(self, name: str) -> None:
        """Nothing: it takes a second, and all of them go with the server."""

    def dump(self, url: str) -> None:
        """Back a database up, as pg_dump does while it is in use."""
        name = sa.make_url(url).database or ""
        self._call("pg_dump", "-h", str(self.folder), "-U", "postgres", "-Fc", "-f", "dump", name)

    def restore(self, url: str) -> None:
        """Put a database back to its last backup, as pg_restore does, under whoever uses it."""
        name = sa.make_url(url).database or ""
        self._call("pg_restore", "-h", str(self.folder), "-U", "postgres", "--clean",
                   "--single-transaction", "-d", name, "dump")  # fmt: skip

    def close(self) -> None:
        """Stop it and remove everything."""
        self.stop()
        self._log.close()
        shutil.rmtree(self.folder)

    def _answers(self) -> bool:
        try:
            self._run("SELECT 1")
        except sa.exc.OperationalError:
            return False
        return True

    def _start(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [str(self._binaries / program), *arguments]
        return subprocess.Popen(
            command, cwd=self.folder, stdout=self._log, stderr=self._log, **_user()
        )

    def _call(self, program: str, *arguments: str) -> None:
        if self._start(program, *arguments).wait() != 0:
            raise RuntimeError(f"{program}: {(self.folder / 'log').read_text()}")


def _user() -> dict[str, object]:
    """PostgreSQL refuses to run as root, so root runs it as its own user."""
    if os.geteuid() != 0:
        return {}
    return {"user": "postgres", "group": "postgres", "extra_groups": []}


def binaries() -> Path | None:
    """Debian keeps them out of the PATH."""
    beside = shutil.which("initdb")
    places = [Path(beside).resolve().parent] if beside else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").exists()), None)


def missing() -> str | None:
    """Why there can be no server here."""
    if binaries() is None:
        return "no PostgreSQL: apt-get install postgresql, or set EVOMERGE_TEST_POSTGRES"
    if os.geteuid() == 0 and subprocess.run(["id", "postgres"], capture_output=True).returncode:
        return "PostgreSQL does not run as root, and there is no user `postgres`"
    return None


@pytest.fixture(scope="session")
def postgres() -> Iterator[ForeignPostgres]:
    """A PostgreSQL server, shared by the tests of one process."""
    pytest.importorskip("psycopg", reason="no psycopg: pip install 'evomerge[postgres]'")
    named = os.environ.get("EVOMERGE_TEST_POSTGRES")
    if named:
        yield ForeignPostgres(named)
        return
    why, found = missing(), binaries()
    if why or found is None:
        pytest.skip(why or "no PostgreSQL")
    server = Postgres(found)
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def own_postgres(postgres: ForeignPostgres) -> Postgres:
    """A server that a test may stop; whoever does starts it again."""
    if not isinstance(postgres, Postgres):
        pytest.skip("the server of EVOMERGE_TEST_POSTGRES is not ours to stop")
    return postgres


@pytest.fixture(scope="session")
def migrated(postgres: ForeignPostgres) -> Iterator[str]:
    """The name of a database with evomerge's tables."""
    from evomerge.store import open_store

    name = postgres.create()
    open_store(postgres.url(name)).close()
    yield name
    postgres.drop(name)


@pytest.fixture
def postgres_url(postgres: ForeignPostgres, migrated: str) -> str:
    """A store with nothing in it. One database, emptied: to make one takes a second."""
    from evomerge.store.tables import metadata

    engine = sa.create_engine(postgres.url(migrated))
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())
    engine.dispose()
    return postgres.url(migrated)


@pytest.fixture
def empty_postgres_url(postgres: ForeignPostgres) -> Iterator[str]:
    """A database without tables."""
    name = postgres.create()
    yield postgres.url(name)
    postgres.drop(name)
