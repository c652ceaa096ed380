"""Running out of memory: the batch is halved, what is done stays, and outcomes are the same.

Out of memory is injected into the n-th forward pass, and once it is real: a process whose address
space has a limit.
"""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small_exam import BATCH_SIZE, Exam

from evomerge.errors import OutOfMemory
from evomerge.scoring.resident import ResidentScorer
from evomerge.scoring.room import Room, is_out_of_memory, twice
from evomerge.spec import Evaluation, Objective

TASKS = [
    {"task": "choice", "metric": "acc_norm"},
    {"task": "choice_shots"},
    {"task": "continue", "metric": "acc"},
    {"task": "generate", "metric": "exact_match,tidy"},
]
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


def scorer(exam: Exam, tasks: list[Any] = TASKS, **options: Any) -> ResidentScorer:
    wanted = Objective(tasks=tasks, include_path=str(exam.tasks))
    evaluation = Evaluation(batch_size=BATCH_SIZE, **options)
    return ResidentScorer(*exam.load(), wanted, evaluation)


@contextmanager
def failing(model: Any, fails: Callable[[int, int], Exception | None]) -> Iterator[list[int]]:
    """`fails(n, rows)` says what the n-th forward pass, of so many rows, raises. The list holds the
    rows of all passes."""
    seen: list[int] = []

    def before(_module: Any, inputs: Any, options: Any) -> None:
        rows = len(inputs[0] if inputs else options["input_ids"])
        seen.append(rows)
        if (error := fails(len(seen), rows)) is not None:
            raise error

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("share_context", [True, False])
def test_outcomes_do_not_depend_on_where_memory_ran_out(exam: Exam, share_context: bool) -> None:
    calm = scorer(exam, share_context=share_context)
    with failing(calm._engine.model, lambda n, rows: None) as seen:
        expected = calm.score_all()
    for place in range(1, len(seen), len(seen) // 4):
        error = ERRORS[place % len(ERRORS)]
        shaken = scorer(exam, share_context=share_context)
        with failing(shaken._engine.model, lambda n, rows: error if n == place else None) as again:  # noqa: B023
            score = shaken.score_all()
        assert shaken._engine.room.batch_size == BATCH_SIZE // 2
        assert shaken.batch_size == BATCH_SIZE, "what a cold run is to be given"
        for name, task in expected.tasks.items():
            assert score.tasks[name].outcomes == task.outcomes, (name, place)
        assert max(again[place:]) <= 2 * (BATCH_SIZE // 2)


def test_what_was_done_is_not_done_again(exam: Exam) -> None:
    """Of plain log-likelihoods every row but those of the batch that failed is read once."""
    resident = scorer(exam, [{"task": "continue", "metric": "acc"}], share_context=False)
    with failing(resident._engine.model, lambda n, rows: None) as calm:
        resident.score_all()
    with failing(resident._engine.model, lambda n, rows: ERRORS[0] if n == 4 else None) as shaken:
        resident.score_all()
    assert sum(shaken) == sum(calm) + shaken[3]
    assert shaken[:4] == calm[:4]
    assert set(shaken[4:-1]) == {BATCH_SIZE // 2}


def test_the_smaller_batch_stays_for_the_next_candidate(exam: Exam) -> None:
    resident = scorer(exam, [{"task": "continue", "metric": "acc"}], share_context=False)
    fits = BATCH_SIZE // 4
    with failing(resident._engine.model, lambda n, rows: ERRORS[0] if rows > fits else None) as one:
        first = resident.score_all()
    with failing(resident._engine.model, lambda n, rows: ERRORS[0] if rows > fits else None) as two:
        assert resident.score_all() == first
    assert one[:2] == [BATCH_SIZE, BATCH_SIZE // 2]
    assert max(two) == fits
    assert resident._engine.room.batch_size == fits


@pytest.mark.parametrize("task", ["continue", "generate"])
def test_where_one_item_does_not_fit_the_reason_is_one_line(exam: Exam, task: str) -> None:
    resident = scorer(exam, [task])
    everything = failing(resident._engine.model, lambda n, rows: ERRORS[0])
    with everything as seen, pytest.raises(OutOfMemory) as caught:
        resident.score_all()
    message = str(caught.value)
    asked = f"`batch_size` was {BATCH_SIZE}"
    for part in ("batch of 1", asked, "cpu has", "GiB free", "20.00 MiB"):
        assert part in message
    assert str(exam.checkpoint) in message
    assert "\n" not in message
    assert len(seen) == len({BATCH_SIZE >> k for k in range(BATCH_SIZE.bit_length())})


@pytest.mark.parametrize("task", ["beams", "sampled"])
def test_what_depends_on_the_batch_is_never_asked_in_another(exam: Exam, task: str) -> None:
    """Beams of `transformers` do: at half the batch one of these 60 items comes out otherwise."""
    resident = scorer(exam, [task])
    third = failing(resident._engine.model, lambda n, rows: ERRORS[0] if n == 3 else None)
    with third as seen, pytest.raises(OutOfMemory, match="smaller `batch_size`"):
        resident.score_all()
    assert len(seen) == 3


def test_the_failed_batch_is_freed_before_the_next() -> None:
    room, kept = Room(4, torch.nn.Linear(1, 1)), []

    def run(start: int, batch_size: int) -> tuple[int, int]:
        tensor = torch.zeros(batch_size)
        assert all(one() is None for one in kept), "the batch before is still in memory"
        kept.append(weakref.ref(tensor))
        if batch_size > 1:
            raise MemoryError
        return start + batch_size, batch_size

    assert list(room.batches(2, run)) == [1, 1]
    assert len(kept) == 4


def test_other_errors_pass() -> None:
    def run(start: int, batch_size: int) -> tuple[int, int]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(Room(4, None).batches(2, run))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_what_cannot_be_halved_is_tried_twice() -> None:
    answers: list[Any] = [MemoryError(), 7, MemoryError(), MemoryError()]

    def action() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert twice(action, "the merge", "cpu") == 7
    with pytest.raises(
        OutOfMemory, match=r"the merge does not fit: cpu has .* GiB free .MemoryError"
    ):
        twice(action, "the merge", "cpu")


_LIMITED = """
import resource, sys
import torch
from evomerge.scoring.room import Room

torch.set_num_threads(1)
room = Room(1 << 16, torch.nn.Linear(1, 1))
rows = 1 << 16
torch.ones(16, 1 << 12).exp()  # what torch loads only when it first computes
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (256 << 20),) * 2)

def run(start, size):
    stop = min(start + size, rows)
    return stop, float(torch.ones(stop - start, 1 << 12).exp().sum(dtype=torch.float64))

total = sum(room.batches(rows, run))
print(room.batch_size, total / rows / (1 << 12))
"""


def test_memory_that_really_runs_out() -> None:
    """2 GiB of numbers in an address space with 256 MiB to spare."""
    done = subprocess.run([sys.executable, "-c", _LIMITED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    batch_size, mean = done.stdout.split()
    assert 0 < int(batch_size) <= (256 << 20) // (2 * 4 << 12)
    assert float(mean) == pytest.approx(2.718281828, abs=1e-6)
