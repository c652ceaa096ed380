"""What there is to hear of a study beside its scores: restarts of its sampler, refused results.

Restarts are a function of the tells, so a replay finds them again. Whoever only reads a study must
not have to replay it: the controller keeps its sampler's restarts in the study's inspection, under
`RESTARTS`, written anew whenever they differ. Knows nothing of terminals and HTML.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from evomerge.sampling.base import Restart, Sampler
from evomerge.store.base import Refusal, StudyRecord, StudyStore

RESTARTS = "restarts"


class RestartLog:
    """Keeps a study's restarts in the store, and tells each that is new to `note`."""

    def __init__(
        self,
        store: StudyStore,
        record: StudyRecord,
        controller: str,
        sampler: Sampler,
        note: Callable[[str], object],
    ) -> None:
        self._store = store
        self._record = record
        self._controller = controller
        self._sampler = sampler
        self._note = note
        self._kept = restarts_of(record)

    def update(self) -> None:
        """Write down what the sampler says by now, where that is news."""
        restarts = self._sampler.restarts
        if restarts == tuple(self._kept):
            return
        inspection = {**self._record.inspection, RESTARTS: [asdict(r) for r in restarts]}
        self._store.update_study(
            self._record.name, self._record.spec, inspection, controller=self._controller
        )
        for restart in restarts[len(self._kept) :]:
            self._note(f"study {self._record.name}: {restart_text(restart)}")
        self._kept = list(restarts)


def restarts_of(record: StudyRecord) -> list[Restart]:
    """The restarts that were written down, in their order."""
    return [Restart(**restart) for restart in record.inspection.get(RESTARTS, ())]


def kept_restarts(record: StudyRecord) -> dict[str, Any]:
    """The part of an inspection that says what was restarted."""
    return {key: value for key, value in record.inspection.items() if key == RESTARTS}


def restart_text(restart: Restart) -> str:
    """A restart in one clause."""
    return (
        f"restart {restart.number} after {restart.trials} trials, population "
        f"{restart.population_before} to {restart.population_after}: {restart.reason}"
    )


def restart_texts(restarts: Sequence[Restart], most: int) -> list[str]:
    """The last `most` of them, one a line, and how many there were before."""
    earlier = len(restarts) - most
    before = [f"{earlier} restarts before"] if earlier > 1 else []
    return [*before, *map(restart_text, restarts[earlier if earlier > 1 else 0 :])]


def refusals_text(refused: Mapping[Refusal, int]) -> str:
    """How many results were refused and why; empty where none was."""
    return ", ".join(f"{refused[kind]} {kind}" for kind in _KINDS if refused.get(kind))


_KINDS: tuple[Refusal, ...] = ("late", "repeated", "stray")
