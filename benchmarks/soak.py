"""SIGKILL at random to controllers, workers and the database, real processes, until enough died.

    python benchmarks/soak.py [--kills 100] [--seed 0] [--trials 60] [--postgres]

A study of a fast scorer runs again and again from where it was killed; when one ends the next one
starts, each under the next of the three schedules, and no fewer than one under each. In order
(generational, pipelined) each must end with the very trial table of an uninterrupted run in memory.
Asynchronous, every genome must be proposed again from the recorded tells, after each death of a
controller and at the end, and no tell or genome that was recorded may change. Every trial is
evaluated to the end once, told once, and has its recipe's score. The store is SQLite in a temporary
folder, or a PostgreSQL server of its own whose postmaster is killed too. Prints one line for each
study; exit code 1 if one differs.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from evomerge.errors import StudyNotFound, WorkerLost
from evomerge.merging.recipe import Recipe
from evomerge.service import local, local_worker
from evomerge.service.study import build_controller, controlling, open_study
from evomerge.spec import StudySpec
from evomerge.store import open_store
from evomerge.store.base import StudyStore
from evomerge.testing.replay import in_order_told, proposed_again
from evomerge.testing.synthetic import (
    Row,
    SyntheticExecutor,
    synthetic_inspection,
    synthetic_score,
    synthetic_spec,
    table,
)
from evomerge.trial import State, Trial

if TYPE_CHECKING:
    from postgres_server import Postgres

WORKERS = 3
SCHEDULES = ("generational", "pipelined", "asynchronous")
CONTROLLERS_SHARE = 0.4  # of all kills; the others strike workers
SERVERS_SHARE = 0.15  # of the kills while workers run, where the database is a server of ours
EARLY_SHARE = 0.2  # of all kills may strike before an attempt starts
AGAIN = 75  # a controller's exit code when the worker that checked the spec was killed
LONGEST_S = 1.0  # between two kills, from when an attempt starts


def spec_of(study: int, trials: int) -> StudySpec:
    """Study number `study`: no trial is ever given up, however often its workers are killed."""
    schedule = SCHEDULES[study % len(SCHEDULES)]
    return synthetic_spec(
        name=f"soak-{study}",
        budget={"trials": trials, "finalists": 3},
        sampler={"name": "cmaes", "population": 6, "seed": study, "schedule": schedule},
        workers={"count": WORKERS, "max_attempts": 1_000_000},
    )


class FastWorker:
    """Scores as SyntheticExecutor does, in a process of its own, in a tenth of a second."""

    def __init__(self, *, beat: Callable[[], None] = lambda: None) -> None:
        self._beat = beat
        self.name = f"soak:{os.getpid()}"
        self._tasks: list[str] = []

    def inspect(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        return synthetic_inspection(StudySpec.model_validate(spec))

    def prepare(self, spec: Mapping[str, Any], **_: Any) -> None:
        self._tasks = [task["task"] for task in spec["objective"]["tasks"]]

    def run(self, token: str, recipe: Mapping[str, Any], part: Any) -> dict[str, Any]:
        time.sleep(random.lognormvariate(-2.3, 0.8))
        self._beat()
        score = synthetic_score(Recipe.from_json(recipe), part, self._tasks)
        return {"token": token, "worker": self.name, "score": score.to_json(), "seconds": {}}


def be_worker(parent: str) -> None:
    """What LocalExecutor starts here instead of a worker with a model."""
    local_worker.Worker = FastWorker  # type: ignore[assignment,misc]
    sys.argv[1:] = [parent]
    local_worker.main()


def be_controller(url: str, study: int, trials: int) -> None:
    """Create or resume the study and run it to its end."""
    local._COMMAND = (sys.executable, __file__, "worker")  # type: ignore[assignment]
    spec, store = spec_of(study, trials), open_store(url)
    executor = local.LocalExecutor(spec.workers)
    try:
        record = open_study(spec, store, executor)
    except WorkerLost:
        sys.exit(AGAIN)
    with controlling(record, store) as token:
        build_controller(record, store, executor, token).run()
    executor.close(now=True)


class Soak:
    """Controllers one after another, and what kills them."""

    def __init__(self, url: str, seed: int, trials: int, server: Postgres | None) -> None:
        self._url, self._trials, self._server = url, trials, server
        self._random = random.Random(seed)
        self._popen: subprocess.Popen[bytes] | None = None
        self.kills = {"controller": 0, "worker": 0, "server": 0}

    @property
    def killed(self) -> int:
        """How many processes were killed in all."""
        return sum(self.kills.values())

    def run(self, study: int, kills: int, watched: Watched) -> None:
        """One study to its end; kills on the way until there were `kills` in all."""
        while self._start(study) is None:
            if self.killed >= kills:
                self._wait()
            else:
                if self._random.random() > EARLY_SHARE:
                    self._await_attempt(watched)
                time.sleep(self._random.uniform(0, LONGEST_S))
                self._kill(watched)

    def _start(self, study: int) -> int | None:
        """See that a controller runs; its exit code if it came to the end by itself."""
        if self._popen is not None and self._popen.poll() is None:
            return None
        if self._popen is not None and self._popen.returncode == 0:
            self._popen = None
            return 0
        if self._popen is not None and self._popen.returncode not in (-signal.SIGKILL, AGAIN):
            raise SystemExit(f"the controller failed with exit code {self._popen.returncode}")
        which = (self._url, str(study), str(self._trials))
        self._popen = subprocess.Popen([sys.executable, __file__, "controller", *which])
        return None

    def _wait(self) -> None:
        assert self._popen is not None
        self._popen.wait()

    def _await_attempt(self, watched: Watched) -> None:
        assert self._popen is not None
        before = watched.attempts()
        while self._popen.poll() is None and watched.attempts() == before:
            time.sleep(0.05)

    def _workers(self) -> list[psutil.Process]:
        assert self._popen is not None
        try:
            return psutil.Process(self._popen.pid).children()
        except psutil.NoSuchProcess:
            return []

    def _kill(self, watched: Watched) -> None:
        assert self._popen is not None
        workers = self._workers()
        server_next = not self.kills["server"] or self._random.random() < SERVERS_SHARE
        if workers and self._server and server_next:
            self._server.kill()
            time.sleep(self._random.uniform(0, LONGEST_S))
            self._server.start()
            self.kills["server"] += 1
        elif workers and self._random.random() > CONTROLLERS_SHARE:
            self.kills["worker"] += _killed(self._random.choice(workers))
        elif self._popen.poll() is None:
            self._popen.kill()
            self._popen.wait()
            self.kills["controller"] += self._popen.returncode < 0
            psutil.wait_procs(workers, timeout=60)
            watched.look()


def _killed(process: psutil.Process) -> bool:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


class Watched:
    """A study of the soak as it lies in the store: what was there before, and what is wrong."""

    def __init__(self, store: StudyStore, spec: StudySpec) -> None:
        self._store, self._spec = store, spec
        self._genomes: list[object] = []
        self._told: list[int] = []
        self.looks = 0
        self.wrong: set[str] = set()

    def attempts(self) -> int:
        """How many were started so far."""
        try:
            trials = self._store.trials(self._spec.name, outcomes=False)
        except StudyNotFound:
            return 0
        return sum(len(trial.attempts) for trial in trials)

    def look(self) -> None:
        """Compare the record with what it was, and with what is proposed again from it."""
        try:
            trials = _searched(self._store.trials(self._spec.name, outcomes=False))
        except StudyNotFound:
            return
        self.looks += 1
        genomes = [trial.genome for trial in trials]
        told = [trial.number for trial in in_order_told(trials)]
        self._note("a genome has changed", genomes[: len(self._genomes)] != self._genomes)
        self._note("a tell has changed", told[: len(self._told)] != self._told)
        if self._spec.sampler.schedule == "asynchronous" and trials:
            again = proposed_again(self._spec, trials)
            self._note("the record is not what a replay proposes", again != genomes)
        self._genomes, self._told = genomes, told

    def end(self) -> tuple[int, int]:
        """Compare the finished study with what must come of it: trials, attempts cut off."""
        self.look()
        name, spec = self._spec.name, self._spec
        trials = self._store.trials(name)
        attempts = [attempt for trial in trials for attempt in trial.attempts]
        complete = [(a.trial, a.part) for a in attempts if a.state is State.COMPLETE]
        scored = [(t.number, part) for t in trials for part in t.scores]
        self._note("an evaluation is there twice", len(complete) != len(set(complete)))
        self._note("a score is there without its evaluation", not {*complete} <= {*scored})
        self._note("tells are missing", len(self._told) != spec.budget.trials)
        self._note("an attempt is open", any(a.state is State.RUNNING for a in attempts))
        self._note("results were refused", self._store.refusals(name) != {})
        self._note("a score is not its recipe's", any(map(self._is_wrong, trials)))
        if spec.sampler.schedule != "asynchronous":
            same = table(trials) == _uninterrupted(spec)
            self._note("the table is not the uninterrupted run's", not same)
        return len(trials), sum(a.state is State.FAIL for a in attempts)

    def _is_wrong(self, trial: Trial) -> bool:
        recipe, tasks = Recipe.from_json(trial.recipe), [t.task for t in self._spec.objective.tasks]
        return not trial.scores or any(
            score != synthetic_score(recipe, part, tasks) for part, score in trial.scores.items()
        )

    def _note(self, words: str, is_so: bool) -> None:
        if is_so:
            self.wrong.add(words)


def _searched(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.kind == "search"]


def _uninterrupted(spec: StudySpec) -> list[Row]:
    store, executor = open_store("memory://"), SyntheticExecutor(WORKERS)
    record = open_study(spec, store, executor)
    with controlling(record, store) as token:
        build_controller(record, store, executor, token).run()
    return table(store.trials(spec.name))


def main() -> int:
    """Run the soak; 1 if a study differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--postgres", action="store_true")
    options = parser.parse_args()
    with _database(options.postgres) as (url, server):
        return _soak(options, url, server)


@contextmanager
def _database(postgres: bool) -> Iterator[tuple[str, Postgres | None]]:
    """An empty store, and its server if it has one."""
    if not postgres:
        with tempfile.TemporaryDirectory() as folder:
            yield f"sqlite:///{Path(folder) / 'soak.db'}", None
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the tests' own server
    from postgres_server import Postgres, binaries, missing

    found = binaries()
    if found is None:
        raise SystemExit(missing())
    server = Postgres(found)
    try:
        server.start()
        yield server.url(server.create()), server
    finally:
        server.close()


def _soak(options: argparse.Namespace, url: str, server: Postgres | None) -> int:
    soak, study = Soak(url, options.seed, options.trials, server), 0
    store = open_store(url)
    while study < len(SCHEDULES) or soak.killed < options.kills:
        spec = spec_of(study, options.trials)
        watched = Watched(store, spec)
        share = min(1.0, (study + 1) / len(SCHEDULES))  # kills for each schedule, if there are few
        soak.run(study, math.ceil(share * options.kills), watched)
        trials, lost = watched.end()
        dead = ", ".join(f"{count} {kind}s" for kind, count in soak.kills.items())
        print(
            f"{spec.name}: {spec.sampler.schedule}, {trials} trials, {lost} attempts cut off, "
            f"looked at {watched.looks} times; so far killed: {dead}; "
            f"{'; '.join(sorted(watched.wrong)) or 'nothing lost, nothing twice, the same search'}",
            flush=True,
        )
        if watched.wrong:
            return 1
        study += 1
    store.close()
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        be_worker(sys.argv[2])
    elif sys.argv[1:2] == ["controller"]:
        be_controller(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        sys.exit(main())
