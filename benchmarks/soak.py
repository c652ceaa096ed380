"""SIGKILL to controllers and workers at random, real processes, until so many have died.

    python benchmarks/soak.py [--kills 100] [--seed 0] [--store URL]

A study of a fast scorer runs again and again from where it was killed; when one ends the next one
starts. Each must end with the very trial table of an uninterrupted run in memory, nothing evaluated
to the end twice, nothing told twice. Prints one line for each study; exit code 1 if one differs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from evomerge.errors import WorkerLost
from evomerge.merging.recipe import Recipe
from evomerge.service import local, local_worker
from evomerge.service.study import build_controller, controlling, open_study
from evomerge.spec import StudySpec
from evomerge.store import open_store
from evomerge.store.base import StudyStore
from evomerge.testing.synthetic import (
    SyntheticExecutor,
    synthetic_inspection,
    synthetic_score,
    synthetic_spec,
    table,
)
from evomerge.trial import State

TRIALS, WORKERS = 60, 3
CONTROLLERS_SHARE = 0.4  # of all kills; the others strike workers
EARLY_SHARE = 0.1  # of all kills may strike before there is a worker
AGAIN = 75  # a controller's exit code when the worker that checked the spec was killed
LONGEST_S = 1.5  # between two kills, from when there are workers


def spec_of(study: int) -> StudySpec:
    """Study number `study`: no trial is ever given up, however often its workers are killed."""
    return synthetic_spec(
        name=f"soak-{study}",
        budget={"trials": TRIALS, "finalists": 3},
        sampler={"name": "cmaes", "population": 6, "seed": study},
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


def be_controller(url: str, study: int) -> None:
    """Create or resume the study and run it to its end."""
    local._COMMAND = (sys.executable, __file__, "worker")  # type: ignore[assignment]
    spec, store = spec_of(study), open_store(url)
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

    def __init__(self, url: str, seed: int) -> None:
        self._url = url
        self._random = random.Random(seed)
        self._popen: subprocess.Popen[bytes] | None = None
        self.kills = {"controller": 0, "worker": 0}

    def run(self, study: int, kills: int) -> None:
        """One study to its end; kills on the way until there were so many in all."""
        while self._start(study) is None:
            if sum(self.kills.values()) >= kills:
                self._wait()
            else:
                if self._random.random() > EARLY_SHARE:
                    self._await_workers()
                time.sleep(self._random.uniform(0, LONGEST_S))
                self._kill()

    def _start(self, study: int) -> int | None:
        """See that a controller runs; its exit code if it came to the end by itself."""
        if self._popen is not None and self._popen.poll() is None:
            return None
        if self._popen is not None and self._popen.returncode == 0:
            self._popen = None
            return 0
        if self._popen is not None and self._popen.returncode not in (-signal.SIGKILL, AGAIN):
            raise SystemExit(f"the controller failed with exit code {self._popen.returncode}")
        command = [sys.executable, __file__, "controller", self._url, str(study)]
        self._popen = subprocess.Popen(command)
        return None

    def _wait(self) -> None:
        assert self._popen is not None
        self._popen.wait()

    def _await_workers(self) -> None:
        assert self._popen is not None
        while self._popen.poll() is None and not self._workers():
            time.sleep(0.05)

    def _workers(self) -> list[psutil.Process]:
        assert self._popen is not None
        try:
            return psutil.Process(self._popen.pid).children()
        except psutil.NoSuchProcess:
            return []

    def _kill(self) -> None:
        assert self._popen is not None
        workers = self._workers()
        if workers and self._random.random() > CONTROLLERS_SHARE:
            self.kills["worker"] += _killed(self._random.choice(workers))
        elif self._popen.poll() is None:
            self._popen.kill()
            self._popen.wait()
            self.kills["controller"] += self._popen.returncode < 0
            psutil.wait_procs(workers, timeout=60)


def _killed(process: psutil.Process) -> bool:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def differences(store: StudyStore, study: int) -> list[str]:
    """What is wrong with a study that was killed and ended."""
    spec, alone = spec_of(study), open_store("memory://")
    executor = SyntheticExecutor(WORKERS)
    record = open_study(spec, alone, executor)
    with controlling(record, alone) as token:
        build_controller(record, alone, executor, token).run()
    trials = store.trials(spec.name)
    attempts = [attempt for trial in trials for attempt in trial.attempts]
    complete = [(a.trial, a.part) for a in attempts if a.state is State.COMPLETE]
    told = [t.tell_order for t in trials if t.kind == "search"]
    found = {
        "the table is not the uninterrupted run's": table(trials) != table(alone.trials(spec.name)),
        "an evaluation is there twice": len(complete) != len(set(complete)),
        "tells are missing or double": sorted(n for n in told if n is not None)
        != list(range(len(told))),
        "an attempt is open": any(a.state is State.RUNNING for a in attempts),
        "results were refused": store.refusals(spec.name) != {},
    }
    return [words for words, is_so in found.items() if is_so]


def main() -> int:
    """Run the soak; 1 if a study differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", default=None, help="a store URL; SQLite in a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = options.store or f"sqlite:///{Path(folder) / 'soak.db'}"
        soak, wrong, study = Soak(url, options.seed), [], 0
        while not study or sum(soak.kills.values()) < options.kills:
            soak.run(study, options.kills)
            store = open_store(url)
            wrong = differences(store, study)
            trials = store.trials(f"soak-{study}", outcomes=False)
            lost = sum(a.state is State.FAIL for t in trials for a in t.attempts)
            verdict = "; ".join(wrong) or "equal to the uninterrupted run"
            print(
                f"soak-{study}: {len(trials)} trials, {lost} attempts cut off; so far killed: "
                f"{soak.kills['controller']} controllers, {soak.kills['worker']} workers; "
                f"{verdict}",
                flush=True,
            )
            store.close()
            if wrong:
                return 1
            study += 1
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        be_worker(sys.argv[2])
    elif sys.argv[1:2] == ["controller"]:
        be_controller(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(main())
