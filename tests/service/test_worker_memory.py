"""A worker whose memory runs out, with a merge and a scorer that are made up."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from evomerge.errors import NonFiniteModel, OutOfMemory
from evomerge.merging.recipe import ModelRef
from evomerge.service.baselines import baselines
from evomerge.service.wire import event_of
from evomerge.service.worker import Worker
from evomerge.testing.synthetic import synthetic_spec
from evomerge.trial import Score

TRIAL = baselines(ModelRef("/base", "b"), {"add": ModelRef("/add", "a")}, "float32")[0]


class Scorer:
    """Needs batches of `fits` items at most."""

    def __init__(self, fits: int) -> None:
        self.fitting_batch_size = 16
        self._fits = fits

    def score(self, part: Any) -> Score:
        while self.fitting_batch_size > max(self._fits, 1):
            self.fitting_batch_size //= 2
        if not self._fits:
            raise OutOfMemory("a batch of 1 does not fit")
        return Score({})


class Materialiser:
    """Raises one error after another, then works."""

    def __init__(self, errors: list[Exception]) -> None:
        self._errors = errors

    def write(self, recipe: Any) -> None:
        if self._errors:
            raise self._errors.pop(0)


def worker(errors: list[Exception], fits: int = 16) -> Callable[[], Any]:
    made = Worker("gpu-7")
    spec = synthetic_spec(evaluation={"device": "cpu"}).model_dump(mode="json")
    made.prepare(spec, {}, "float32")
    materialiser, scorer = Materialiser(errors), Scorer(fits)
    made._resident = SimpleNamespace(  # type: ignore[assignment]
        fitting=lambda recipe: (lambda: materialiser.write(recipe), scorer)
    )
    return lambda: event_of(made.run("token", TRIAL.recipe, "search"))


def test_a_smaller_batch_is_noted_once() -> None:
    run = worker([], fits=4)
    first, second = run(), run()
    assert first.score == second.score
    assert first.score is not None
    (note,) = first.notes
    assert note == "cpu ran out of memory with a batch of 16; this worker goes on with 4"
    assert second.notes == ()


def test_too_little_memory_for_one_item_is_no_fault_of_the_candidate() -> None:
    event = worker([], fits=0)()
    assert event.failure is not None
    assert event.failure.error == "OutOfMemory"
    assert not event.candidate
    assert len(event.notes) == 1


@pytest.mark.parametrize("error", [MemoryError, lambda: RuntimeError("CUDA out of memory")])
def test_a_merge_without_room_is_tried_again(error: Callable[[], Exception]) -> None:
    assert worker([error()])().score is not None
    event = worker([error(), error()])()
    assert event.failure is not None
    assert event.failure.error == "OutOfMemory"
    assert event.failure.message.startswith("merging into the model does not fit: cpu has ")
    assert not event.candidate


def test_a_bad_candidate_is_not_tried_again() -> None:
    run = worker([NonFiniteModel("NaN"), MemoryError()])
    assert run().candidate
    assert run().score is not None, "the second error was met by the second job"
