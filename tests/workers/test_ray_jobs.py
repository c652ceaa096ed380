"""Ray Jobs behind a token, as from a laptop: submitted, killed in mid-search, submitted again.

A head and a node with a GPU by name, each a `ray start` of its own; the job server, real models
and a real PostgreSQL. Compared is the final table, bit for bit, with that of a run without Ray.
Needs Ray's job server: pip install -c constraints.txt -c docker/constraints.txt 'ray[default]'.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from postgres_server import ForeignPostgres

pytest.importorskip("ray")
pytest.importorskip("aiohttp_cors", reason="no job server: pip install 'ray[default]'")

from evomerge.errors import StoreError
from evomerge.store import open_store
from evomerge.testing.synthetic import table
from evomerge.trial import State, Trial

pytestmark = pytest.mark.slow
TRIALS = 12
DEADLINE_S = 240.0  # nothing is timed: this ends a test that hangs
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
EVOMERGE = [sys.executable, "-m", "evomerge.cli.main"]


@dataclass(frozen=True)
class Cluster:
    """Where it is and what opens it; `store` is what its head knows as EVOMERGE_STORE."""

    address: str
    jobs: str
    environment: dict[str, str]
    store: str

    def job(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        asked = [*RAY, "job", command, "--address", self.jobs, *arguments]
        return subprocess.run(
            asked, env=self.environment, capture_output=True, text=True, timeout=DEADLINE_S
        )

    def asked(self, path: str, method: str = "GET") -> Any:
        """What the job server answers; a command line of Ray's takes seconds to start."""
        key = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(f"{self.jobs}/api/jobs/{path}", headers=key, method=method)
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return json.load(answer)

    def runs(self, name: str) -> bool:
        return self.asked(name)["status"] in ("PENDING", "RUNNING")

    def submit(self, name: str, study: Path, *options: str) -> subprocess.CompletedProcess[str]:
        folder = ["--working-dir", str(study.parent)]
        entry = ["--", "evomerge", "run", study.name, "--executor", "ray"]
        return self.job("submit", "--submission-id", name, *folder, *options, *entry)


def begin(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def cluster(postgres: ForeignPostgres) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets lie in it
    ports = free_ports(5)
    address, jobs = f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"
    environment = without_token() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0a1b" * 16}
    database = postgres.create()
    store = postgres.url(database)
    head = [
        *("--head", "--num-cpus=0", f"--port={ports[0]}", f"--dashboard-port={ports[1]}"),
        *(f"--dashboard-agent-listen-port={ports[2]}", f"--ray-client-server-port={ports[3]}"),
        *("--dashboard-host=127.0.0.1", f"--temp-dir={folder}"),
    ]
    node = [f"--address={address}", "--num-cpus=2", "--num-gpus=1",
            f"--dashboard-agent-listen-port={ports[4]}"]  # fmt: skip
    try:
        with started(head, environment | {"EVOMERGE_STORE": store}, folder):
            until_healthy(jobs)
            with started(node, environment, folder):
                yield Cluster(address, jobs, environment, store)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        postgres.drop(database)


@contextlib.contextmanager
def started(arguments: list[str], environment: dict[str, str], folder: Path) -> Iterator[None]:
    """A Ray node that ends with the block, and nothing of any other cluster with it."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [*RAY, "start", "--block", "--node-ip-address=127.0.0.1", *arguments],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield
    finally:
        tree = [process, *psutil.Process(process.pid).children(recursive=True)]
        for one in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def without_token() -> dict[str, str]:
    """This environment, as of somebody who was told nothing about the cluster."""
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    kept.pop("EVOMERGE_STORE", None)
    own = {"PATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**kept, **own, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_TOKEN_PATH": os.devnull}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def until_healthy(jobs: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{jobs}/api/gcs_healthz", timeout=5).close()
            return
        time.sleep(0.1)
    pytest.fail("the head's dashboard did not come up")


@pytest.fixture(scope="module")
def study(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study file alone in its folder, which is what Ray uploads."""
    path = tmp_path_factory.mktemp("study") / "study.yaml"
    spec = {
        "name": "submitted",
        "base": str(tiny_zoo / "base"),
        "sources": {name: str(tiny_zoo / name) for name in ("compare", "sort")},
        "objective": {"include_path": str(tiny_zoo / "tasks"), "tasks": ["compare"]},
        "sampler": {"name": "cmaes", "population": 4, "seed": 5},
        "budget": {"trials": TRIALS, "finalists": 1},
        "workers": {"count": 2, "num_cpus": 1, "num_gpus": 0.5},
    }
    path.write_text(yaml.safe_dump(spec))
    return path


def trials(url: str) -> list[Trial]:
    try:
        return list(open_store(url, create=False).trials("submitted"))
    except StoreError:
        return []  # not there yet


def until_midway(cluster: Cluster) -> None:
    """Wait until some of the search's trials are finished, and one runs."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and cluster.runs("first"):
        states = [trial.state for trial in trials(cluster.store) if trial.kind == "search"]
        if sum(state.finished for state in states) >= 3 and State.RUNNING in states:
            return
        time.sleep(0.02)
    pytest.fail(cluster.job("logs", "first").stdout)


def until_stopped(cluster: Cluster) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while cluster.runs("first"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert cluster.asked("first")["status"] == "STOPPED"


def test_a_job_that_is_stopped_in_mid_search_goes_on_when_submitted_again(
    cluster: Cluster, study: Path, tmp_path: Path
) -> None:
    at_once = '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "0"}}'  # SIGKILL on the heels of SIGTERM
    first = cluster.submit("first", study, "--no-wait", "--runtime-env-json", at_once)
    assert first.returncode == 0, first.stderr
    until_midway(cluster)
    cluster.asked("first/stop", "POST")
    until_stopped(cluster)
    assert sum(t.state.finished for t in trials(cluster.store) if t.kind == "search") < TRIALS

    undisturbed = f"sqlite:///{tmp_path}/undisturbed.db"
    command = [*EVOMERGE, "run", str(study), "--store", undisturbed, "--workers", "1"]
    alone = begin(command, without_token())
    second = cluster.submit("second", study)
    assert second.returncode == 0, second.stdout + second.stderr
    _out, said = alone.communicate(timeout=DEADLINE_S)
    assert alone.returncode == 0, said
    assert table(trials(cluster.store)) == table(trials(undisturbed))


TOKENS = {
    "none": {"RAY_AUTH_MODE": "token"},
    "another": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "dead" * 16},
    "no authentication": {"RAY_AUTH_MODE": "disabled"},
}


def test_who_has_not_the_token_is_refused_and_told_so(cluster: Cluster, study: Path) -> None:
    command = [*EVOMERGE, "run", str(study), "--executor", "ray", "--store", "memory://"]
    place = without_token() | {"RAY_ADDRESS": cluster.address}
    strangers = {name: begin(command, place | token) for name, token in TOKENS.items()}
    for name, stranger in strangers.items():
        _out, said = stranger.communicate(timeout=DEADLINE_S)
        last = said.splitlines()[-1]
        assert last.startswith(f"evomerge: cannot join Ray at {cluster.address}: "), name
        assert "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in last, name
        assert "Traceback" not in said
        assert stranger.returncode == 2, name


def test_a_token_that_lies_here_is_used_unasked(cluster: Cluster, tmp_path: Path) -> None:
    """`ray start --head` turns tokens on by itself where one lies; who joins it must do so too."""
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text(cluster.environment["RAY_AUTH_TOKEN"])
    nowhere = without_token() | {"RAY_ADDRESS": cluster.address}
    home = nowhere | {"HOME": str(tmp_path)}
    del home["RAY_AUTH_TOKEN_PATH"]
    places = {
        "home": home,
        "path": nowhere | {"RAY_AUTH_TOKEN_PATH": str(file)},
        "environment": nowhere | {"RAY_AUTH_TOKEN": file.read_text()},
    }
    join = (
        "from evomerge.spec import Workers; from workers.executor import RayExecutor; "
        "RayExecutor(Workers(), actor=object).close(now=True)"
    )
    joining = {name: begin([sys.executable, "-c", join], place) for name, place in places.items()}
    for name, process in joining.items():
        _out, said = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, f"{name}: {said}"
        assert "gcs_client" not in said, name


def test_a_job_without_the_token_is_refused(cluster: Cluster, study: Path) -> None:
    stranger = Cluster(cluster.address, cluster.jobs, without_token(), cluster.store)
    refused = stranger.submit("stranger", study, "--no-wait")
    assert refused.returncode != 0
    assert "uthentication" in refused.stdout + refused.stderr
