"""A large study on the real controller and store, its workers in virtual time.

    python benchmarks/scale.py [--trials 10000] [--workers 1000] [--genes 100]
        [--schedule asynchronous] [--population N] [--median-s 60] [--recorded 0] [--store URL]

Evaluations last log-normal times (σ 0.7, median `--median-s`) of virtual time; what the controller
spends of CPU time is put on that clock, so utilisation is what a cluster would see. Everything a
real run has is on: store (SQLite in a temporary folder unless `--store` names another), decoding,
Optuna mirror, progress view. With `--recorded` the study goes on from that many finished trials,
which are written in bulk: what 100,000 trials cost is then measured in minutes. The whole of it,

    python benchmarks/scale.py --trials 100000

takes from a quarter of an hour. Prints the controller's time, store and memory between one row and
the next, the time from a resume to its first dispatch, and what writes cost beside a bare INSERT;
exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import sqlalchemy as sa

from evomerge.service.executor import Job
from evomerge.service.progress import PlainView
from evomerge.service.study import Models, build_controller, controlling, open_study
from evomerge.space import Gene, load_space
from evomerge.spec import StudySpec
from evomerge.store import open_store
from evomerge.store.base import StudyRecord
from evomerge.store.engine import make_engine, transaction
from evomerge.store.mirror import OptunaMirror
from evomerge.store.rows import score_columns, trial_columns
from evomerge.store.sql import SqlStore
from evomerge.store.tables import attempts, scores, studies, trials
from evomerge.testing.store_builders import StudyUnderTest
from evomerge.testing.synthetic import synthetic_spec
from evomerge.testing.virtual_time import VirtualExecutor
from evomerge.trial import NewTrial, Score, TaskScore

SIGMA, SOURCES = 0.7, 4
UTILISATION, RATIO, RESUME_S, GROWTH = 0.95, 1.5, 60.0, 1.1


@dataclass(frozen=True)
class Sample:
    """The state of a run when `trials` evaluations were in."""

    trials: int
    cpu_s: float  # the controller's own
    rss_mb: float
    store_mb: float


class Sampled(VirtualExecutor):
    """Takes a sample of this process whenever one of `marks` results is in."""

    def __init__(
        self, workers: int, median_s: float, url: str, *, recorded: int, marks: Sequence[int]
    ) -> None:
        generator = random.Random(0)
        mu = math.log(median_s)
        super().__init__(workers, lambda: generator.lognormvariate(mu, SIGMA))
        self._url, self._recorded, self._marks = url, recorded, list(marks)
        self.samples: list[Sample] = []

    def poll(self, timeout_s: float) -> Sequence:  # type: ignore[type-arg]
        events = super().poll(timeout_s)
        if self._marks and self.finished >= self._marks[0]:
            self._marks.pop(0)
            cpu_s = time.process_time() - self.own_s
            trials, store_mb = self._recorded + self.finished, _store_mb(self._url)
            self.samples.append(Sample(trials, cpu_s, _rss_mb(), store_mb))
            if len(self.samples) > 1:
                _print_sample(*self.samples[-2:])
        return events


class FirstJob(Exception):
    """Ends a resumed run."""


class UpToFirstJob(VirtualExecutor):
    """Stops a study where it would dispatch."""

    def submit(self, job: Job) -> None:
        raise FirstJob


def main() -> int:
    """Run the study and print the figures; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--genes", type=int, default=100)
    parser.add_argument("--median-s", type=float, default=60.0)
    parser.add_argument("--recorded", type=int, default=0)
    parser.add_argument("--schedule", default="asynchronous")
    parser.add_argument("--population", type=int, help="half of the workers if absent")
    parser.add_argument("--store", help="an empty database; SQLite in a temporary folder if absent")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = options.store or f"sqlite:///{Path(folder) / 'study.db'}"
        return _measure(options, url)


def _measure(options: argparse.Namespace, url: str) -> int:
    budget = options.recorded + options.trials
    spec = _spec(options, budget)
    if options.recorded:
        _record(spec, url, options.recorded)
    executor = Sampled(
        options.workers,
        options.median_s,
        url,
        recorded=options.recorded,
        marks=_marks(options.workers, options.trials),
    )
    print(f"{'evaluations':>12}{'ms CPU each':>13}{'MB memory':>11}{'kB store each':>15}")
    wall_s = _run(spec, url, executor)
    utilisation = executor.searched_busy_s / (options.workers * executor.searched_s)
    resume_s, resume_cpu_s = _resume(_spec(options, budget + options.workers), url)
    study = f"{options.trials} trials after {options.recorded}, {options.workers} workers"
    print(f"\n{options.schedule}: {study}, {options.genes} genes, {wall_s:.0f} s")
    print(f"resumed in {resume_s:.1f} s, {resume_cpu_s:.1f} s of CPU time")
    _print_writes(url)
    return _print_targets(executor.samples, utilisation, resume_s)


def _marks(workers: int, trials: int) -> list[int]:
    """When to look: from when each worker had a trial to when none waits for a worker any more."""
    steps = (digit * 10**power for power in range(2, 9) for digit in (1, 2, 5))
    return [step for step in steps if workers <= step < trials - workers] + [trials - workers]


def _spec(options: argparse.Namespace, budget: int) -> StudySpec:
    blocks = options.genes // SOURCES
    weight = {"per": "source", "blocks": blocks, "low": 0.0, "high": 1.0, "init": 0.4}
    return synthetic_spec(
        sources={name: f"/models/{name}" for name in ("add", "copy", "reverse", "sort")},
        space={"method": "task_arithmetic", "source": {"weight": [weight]}},
        sampler={
            "name": "cmaes",
            "seed": 1,
            "population": options.population or max(4, options.workers // 2),
            "schedule": options.schedule,
        },
        budget={"trials": budget},
    )


def _run(spec: StudySpec, url: str, executor: VirtualExecutor) -> float:
    """Run a study to its end; the seconds it took here."""
    store = open_store(url)
    record = open_study(spec, store, executor, clock=executor.clock)
    view, began_s = PlainView(io.StringIO()), time.perf_counter()
    with controlling(record, store, executor.clock) as token:
        controller = build_controller(
            record, store, executor, token,
            make_mirror=_mirror(url), watch=view.update, clock=executor.clock,
        )  # fmt: skip
        controller.run()
    store.close()
    return time.perf_counter() - began_s


def _record(spec: StudySpec, url: str, number: int) -> None:
    """Write finished trials past the controller: every genome at random, one recipe for all."""
    store, executor = SqlStore(url), VirtualExecutor(1, lambda: 1.0)
    record = open_study(spec, store, executor)
    with controlling(record, store) as token:
        build_controller(record, store, executor, token)
        first = len(store.trials(spec.name))
    with transaction(store.engine, write=False) as connection:
        study_id = connection.execute(sa.select(studies.c.id)).scalar_one()
    models, space = Models.of(record), load_space(record.spec["space"])
    generator = random.Random(0)
    genes = len(space.genes(list(models.sources)))
    recipe = space.decode(
        [0.5] * genes, base=models.base, sources=models.sources, dtype=models.dtype, seed=0
    ).to_json()
    ahead = 0 if spec.sampler.schedule != "asynchronous" else 1
    for start in range(0, number, 1000):
        rows: dict[sa.Table, list[dict[str, Any]]] = {trials: [], attempts: [], scores: []}
        for i in range(start, min(start + 1000, number)):
            genome = tuple(generator.random() for _ in range(genes))
            new = NewTrial(first + i, "search", f"trial {first + i}", genome, recipe,
                           f"{generator.getrandbits(256):064x}")  # fmt: skip
            value = generator.random()
            done = {"state": "COMPLETE", "objectives": (value,), "tell_order": i + ahead * (i + 1)}
            rows[trials].append(trial_columns(study_id, new) | done)
            rows[attempts].append(_attempt(study_id, first + i, f"{generator.getrandbits(128):x}"))
            outcomes = tuple(float(generator.random() < value) for _ in range(100))
            task = TaskScore("acc", value, None, 100, True, outcomes)
            scored = Score({named.task: task for named in spec.objective.tasks})
            rows[scores] += score_columns(study_id, first + i, "search", scored)
        with transaction(store.engine, write=True) as connection:
            for table, values in rows.items():
                connection.execute(table.insert(), values)
    store.close()


def _attempt(study_id: int, number: int, token: str) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {"study_id": study_id, "trial": number, "part": "search", "number": 1, "token": token,
            "state": "COMPLETE", "worker": "virtual-0", "started_at": now, "lease_until": now,
            "finished_at": now, "seconds": {"score": 60.0, "controller": 0.01}}  # fmt: skip


def _print_writes(url: str, count: int = 300) -> None:
    """What starts and results of trials take beside a bare INSERT, by turns: medians."""
    store = SqlStore(url)
    study = StudyUnderTest(store, "writes", trials=count)
    bare = sa.Table("bare", sa.MetaData(), sa.Column("body", sa.Text))
    bare.create(store.engine)

    def insert() -> None:
        with transaction(store.engine, write=True) as connection:
            connection.execute(bare.insert(), {"body": "x" * 500})

    times = [
        [_seconds(insert), _seconds(study.start, number, token=str(number)),
         _seconds(study.finish, str(number))]
        for number in range(count)
    ]  # fmt: skip
    bare.drop(store.engine)
    store.close()
    bare_s, start_s, finish_s = (median(column) for column in zip(*times, strict=True))
    print(f"a bare INSERT {1000 * bare_s:.2f} ms; a start takes {start_s / bare_s:.1f} times that, "
          f"a result {finish_s / bare_s:.1f}")  # fmt: skip


def _seconds(call: Callable[..., object], *arguments: Any, **named: Any) -> float:
    began_s = time.perf_counter()
    call(*arguments, **named)
    return time.perf_counter() - began_s


def _mirror(url: str):  # type: ignore[no-untyped-def]
    def make(record: StudyRecord, genes: Sequence[Gene]) -> OptunaMirror:
        return OptunaMirror(url, record.name, directions=1, gene_names=[g.name for g in genes])

    return make


def _resume(spec: StudySpec, url: str) -> tuple[float, float]:
    """From opening the store to the first dispatch, with a larger budget: seconds, CPU seconds."""
    began_s, cpu_began_s = time.perf_counter(), time.process_time()
    try:
        _run(spec, url, UpToFirstJob(1, lambda: 1.0))
    except FirstJob:
        return time.perf_counter() - began_s, time.process_time() - cpu_began_s
    raise AssertionError("the resumed study had nothing to do")


def _print_sample(before: Sample, now: Sample) -> None:
    each, kb = _ms_each(before, now), 1000 * now.store_mb / now.trials
    print(f"{now.trials:12}{each:13.2f}{now.rss_mb:11.0f}{kb:15.2f}", flush=True)


def _ms_each(before: Sample, now: Sample) -> float:
    return 1000 * (now.cpu_s - before.cpu_s) / (now.trials - before.trials)


def _print_targets(samples: Sequence[Sample], utilisation: float, resume_s: float) -> int:
    each = [_ms_each(a, b) for a, b in itertools.pairwise(samples)]
    spread = max(each) / min(each)
    grown = samples[-1].rss_mb / samples[0].rss_mb
    rows = [
        ("workers busy", f"{utilisation:.1%}", f">= {UTILISATION:.0%}", utilisation >= UTILISATION),
        ("time each, most / least", f"{spread:.2f}", f"<= {RATIO}", spread <= RATIO),
        ("memory, end / start", f"{grown:.2f}", f"<= {GROWTH}", grown <= GROWTH),
        ("resume", f"{resume_s:.1f} s", f"< {RESUME_S:.0f} s", resume_s < RESUME_S),
    ]
    for name, found, target, met in rows:
        print(f"{name:24}{found:>10}   target {target:8} {'met' if met else 'MISSED'}")
    return int(not all(met for *_, met in rows))


def _rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _store_mb(url: str) -> float:
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        files = Path(parsed.database or "").parent.glob(Path(parsed.database or "").name + "*")
        return sum(file.stat().st_size for file in files) / 1e6
    engine = make_engine(url)
    with transaction(engine, write=False) as connection:
        size = sa.text("SELECT pg_database_size(current_database())")
        return float(connection.execute(size).scalar_one()) / 1e6


if __name__ == "__main__":
    sys.exit(main())
