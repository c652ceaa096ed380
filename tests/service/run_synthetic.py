"""Runs a synthetic study against a store, the way the command line runs a real one."""

from __future__ import annotations

from typing import Any

from evomerge.service.study import build_controller, controlling, open_study
from evomerge.spec import StudySpec
from evomerge.store.base import StudyStore
from evomerge.testing.synthetic import Row, SyntheticExecutor, table


def run_synthetic(
    spec: StudySpec, store: StudyStore, executor: SyntheticExecutor | None = None, **options: Any
) -> bool:
    """Create or resume, and run; whether it came to its end."""
    executor = executor or SyntheticExecutor()
    record = open_study(spec, store, executor)
    with controlling(record, store) as token:
        return build_controller(record, store, executor, token, **options).run()


def rows(store: StudyStore, spec: StudySpec) -> list[Row]:
    """The study's final trial table."""
    return table(store.trials(spec.name))
