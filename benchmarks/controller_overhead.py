"""What the controller costs for each trial: 1,000 trials, 60 genes, SQLite, an instant scorer.

    python benchmarks/controller_overhead.py [--trials 1000]

Prints CPU and wall milliseconds a trial, everything included (ask, decode, store, tell, Optuna
mirror, progress), beside the 20 ms target, and the share of a bare loop of the same store commits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import sqlalchemy as sa

from evomerge.service.study import build_controller, controlling, open_study
from evomerge.space import Gene
from evomerge.store import open_store
from evomerge.store.base import StudyRecord
from evomerge.store.mirror import OptunaMirror
from evomerge.testing.synthetic import SyntheticExecutor, synthetic_spec

TARGET_MS = 20.0
_BLOCKS = 15  # x 4 sources = 60 genes


def main() -> None:
    """Run the study and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    trials = parser.parse_args().trials
    spec = synthetic_spec(
        sources={name: f"/models/{name}" for name in ("add", "copy", "reverse", "sort")},
        space={
            "method": "task_arithmetic",
            "source": {
                "weight": [
                    {"per": "source", "blocks": _BLOCKS, "low": 0.0, "high": 1.0, "init": 0.4}
                ]
            },
        },
        sampler={"name": "cmaes", "seed": 1},
        budget={"trials": trials},
    )
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'study.db'}"
        cpu_ms, wall_ms, evaluations = _search(spec, url)
        bare_ms = _bare_commits(Path(folder) / "bare.db", 2 * evaluations) * 2
    print(f"{trials} trials, 60 genes, SQLite, one process")
    print(f"controller        {cpu_ms:6.2f} ms CPU a trial, {wall_ms:6.2f} ms wall")
    print(f"target            {TARGET_MS:6.2f} ms CPU: {'met' if cpu_ms < TARGET_MS else 'MISSED'}")
    print(f"two bare commits  {bare_ms:6.2f} ms CPU: the controller costs {cpu_ms / bare_ms:.1f}x")


def _search(spec, url: str) -> tuple[float, float, int]:  # type: ignore[no-untyped-def]
    store, executor = open_store(url), SyntheticExecutor(2)
    record = open_study(spec, store, executor)

    def mirror(record: StudyRecord, genes: Sequence[Gene]) -> OptunaMirror:
        return OptunaMirror(url, record.name, directions=1, gene_names=[g.name for g in genes])

    with controlling(record, store) as token:
        controller = build_controller(record, store, executor, token, make_mirror=mirror)
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        assert controller.run()
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    evaluations = sum(len(t.scores) for t in store.trials(spec.name, outcomes=False))
    trials = spec.budget.trials
    return 1000 * cpu_s / trials, 1000 * wall_s / trials, evaluations


def _bare_commits(path: Path, count: int) -> float:
    """CPU milliseconds of one commit of one small row, with the store's own settings."""
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        connection.exec_driver_sql("CREATE TABLE rows (id INTEGER PRIMARY KEY, body TEXT)")
    cpu_s = time.process_time()
    for _ in range(count):
        with engine.begin() as connection:
            connection.exec_driver_sql("INSERT INTO rows (body) VALUES (?)", ("x" * 500,))
    return 1000 * (time.process_time() - cpu_s) / count


if __name__ == "__main__":
    main()
