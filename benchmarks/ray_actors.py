"""Real Ray actors that sleep instead of scoring: how busy one controller keeps them.

    python benchmarks/ray_actors.py [--actors 50] [--trials 1000] [--median-s 2]
        [--schedule asynchronous]

Sleeps are log-normal (σ 0.7). An actor is busy while it sleeps, so that what Ray and the controller
take between two jobs counts as idle. The store is SQLite in a temporary folder. Prints the share of
the actors' time that was used, from when all had a job to when the last job was handed out, and the
controller's CPU time for a result, Ray's own threads in its process included. Exits with 1 if a
target is missed.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.service.executor import Event, Job
from evomerge.service.study import build_controller, controlling, open_study
from evomerge.spec import StudySpec, Workers
from evomerge.store import open_store
from evomerge.testing.synthetic import synthetic_inspection, synthetic_spec
from evomerge.trial import Score, TaskScore
from workers.executor import RayExecutor

SIGMA, SOURCES, GENES = 0.7, 4, 100
UTILISATION = 0.95


class Sleeper:
    """A WorkerActor that sleeps, and says when it began and ended."""

    def __init__(self, board: Any) -> None:
        self._random = random.Random(os.getpid())
        self._tasks: list[str] = []
        self._mean = 0.0

    def ready(self) -> None:
        """See WorkerActor.ready."""

    def prepare(self, setup: Mapping[str, Any]) -> None:
        """See WorkerActor.prepare. The study's name says how long its evaluations last."""
        self._tasks = [task["task"] for task in setup["spec"]["objective"]["tasks"]]
        self._mean = float(setup["spec"]["name"].split("-")[-1])

    def run(self, token: str, recipe: Mapping[str, Any], part: str) -> dict[str, Any]:
        """See WorkerActor.run. Half of 40 items are right."""
        began_s = time.time()
        time.sleep(self._mean * self._random.lognormvariate(0.0, SIGMA))
        task = TaskScore("acc", 0.5, None, 40, True, (0.0, 1.0) * 20)
        seconds = {"began": began_s, "ended": time.time()}
        score = Score(dict.fromkeys(self._tasks, task)).to_json()
        return {"token": token, "worker": "ray", "score": score, "seconds": seconds}


class Watched(RayExecutor):
    """Notes when actors were busy, and what this process had spent by then."""

    def __init__(self, workers: Workers) -> None:
        super().__init__(workers, actor=Sleeper)
        self._count, self._under_way = workers.count, 0
        self.full: tuple[float, float, int] | None = None  # wall, CPU, results
        self.last = (0.0, 0.0, 0)
        self.spans: list[tuple[float, float]] = []

    def inspect(self, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        return synthetic_inspection(StudySpec.model_validate(spec))

    def submit(self, job: Job) -> None:
        super().submit(job)
        self._under_way += 1
        if job.part == "search":
            self.last = (time.time(), time.process_time(), len(self.spans))
            if self.full is None and self._under_way == self._count:
                self.full = self.last

    def poll(self, timeout_s: float) -> Sequence[Event]:
        events = super().poll(timeout_s)
        self._under_way -= len(events)
        self.spans += [(event.seconds["began"], event.seconds["ended"]) for event in events]
        return events


def main() -> int:
    """Run the study and print the figures; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--actors", type=int, default=50)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--median-s", type=float, default=2.0)
    parser.add_argument("--schedule", default="asynchronous")
    options = parser.parse_args()
    weight = {"per": "source", "blocks": GENES // SOURCES, "low": 0.0, "high": 1.0, "init": 0.4}
    spec = synthetic_spec(
        name=f"sleeping-{options.median_s}",
        sources={name: f"/models/{name}" for name in ("add", "copy", "reverse", "sort")},
        space={"method": "task_arithmetic", "source": {"weight": [weight]}},
        sampler={
            "name": "cmaes",
            "population": max(4, options.actors // 2),
            "schedule": options.schedule,
        },
        budget={"trials": options.trials, "finalists": 1},
        workers={"count": options.actors},
    )
    executor = Watched(spec.workers)
    try:
        _run(spec, executor)
    finally:
        executor.close(now=True)
    return _print(options, executor)


def _run(spec: StudySpec, executor: RayExecutor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(f"sqlite:///{Path(folder) / 'study.db'}")
        record = open_study(spec, store, executor)
        with controlling(record, store) as token:
            controller = build_controller(record, store, executor, token)
            while executor.free() < spec.workers.count:  # it takes a while to start them all
                executor.poll(1.0)
            controller.run()
        store.close()


def _print(options: argparse.Namespace, executor: Watched) -> int:
    if executor.full is None:
        raise SystemExit("the actors never all had a job; take more trials or fewer actors")
    (began_s, cpu_began_s, before), (ended_s, cpu_ended_s, after) = executor.full, executor.last
    busy_s = sum(max(0.0, min(end, ended_s) - max(begin, began_s)) for begin, end in executor.spans)
    used = busy_s / (options.actors * (ended_s - began_s))
    results = after - before
    each_ms = 1000 * (cpu_ended_s - cpu_began_s) / results
    print(f"{options.schedule}: {options.actors} Ray actors, {results} results in "
          f"{ended_s - began_s:.0f} s")  # fmt: skip
    print(f"controller and Ray driver  {each_ms:8.2f} ms CPU a result")
    met = used >= UTILISATION
    print(f"actors busy                {used:8.1%}   target >= {UTILISATION:.0%}   "
          f"{'met' if met else 'MISSED'}")  # fmt: skip
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
