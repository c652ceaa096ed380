"""The resident scorer: tasks loaded and tokenised once, a live model scored as often as asked.

Knows nothing of recipes, merging, trials and stores: somebody else writes the weights. Outcomes
equal, item by item, those of a cold `lm_eval` command on the same weights, batch size and dtype.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.errors import TaskError
from evomerge.scoring.engine import Engine, Program, Repeated, Reply
from evomerge.scoring.margins import Margins
from evomerge.scoring.tasks import LoadedTask, LoadedTasks, load_tasks, seed_everything
from evomerge.spec import Evaluation, Objective
from evomerge.trial import Part, Score, TaskScore

_AUTO_BATCH = 128  # beyond, a two-core machine gains nothing
_AUTO_TOKENS = 8_192  # in one batch, the room for answers included


class ResidentScorer:
    """Scores whatever weights `model` now has, on one part of every task's items.

    `model` is a causal language model of transformers, on its device and in its dtype already;
    `evaluation` gives the batch size ("auto" depends on the items only, never on free memory).
    Raises TaskError where the tasks cannot be used.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        objective: Objective,
        evaluation: Evaluation,
        *,
        tasks: LoadedTasks | None = None,
    ) -> None:
        self._tasks = tasks or load_tasks(objective)
        self._engine = Engine(
            model, tokenizer, batch_size=1, share_context=evaluation.share_context
        )
        self._engine.set_batch_size(
            auto_batch_size(self._engine.longest(self._instances()))
            if evaluation.batch_size == "auto"
            else evaluation.batch_size
        )
        self._exams: dict[Part, _Exam] = {}

    @property
    def batch_size(self) -> int:
        """The batch size in use: what a cold `lm_eval` run needs to give the same outcomes."""
        return self._engine.batch_size

    @property
    def fitting_batch_size(self) -> int:
        """The batch size that memory had room for so far; outcomes do not depend on it."""
        return self._engine.room.batch_size

    def items(self) -> Mapping[str, tuple[str, ...]]:
        """For each task the content hashes of its items, in the task's own order."""
        return self._tasks.items()

    def score(self, part: Part) -> Score:
        """Score the model as it is now. The same weights give the same Score.

        Raises NonFiniteModel when the model computes NaN or infinity, OutOfMemory when it does
        not fit, TaskError when a task's own code fails.
        """
        if part not in self._exams:
            self._exams[part] = _Exam(self._tasks, self._engine, self._tasks.positions(part))
        return self._exams[part].take()

    def score_all(self) -> Score:
        """Score the model on all items, whatever their part."""
        everything = {task.name: list(range(len(task.hashes))) for task in self._tasks.tasks}
        return _Exam(self._tasks, self._engine, everything).take()

    def _instances(self) -> list[Any]:
        return [r for task in self._tasks.tasks for requests in task.requests for r in requests]


def auto_batch_size(longest_tokens: int) -> int:
    """The largest power of two up to 128 whose batches hold at most 8,192 tokens."""
    fits = max(1, _AUTO_TOKENS // max(1, longest_tokens))
    return min(_AUTO_BATCH, 1 << (fits.bit_length() - 1))


@dataclass(frozen=True)
class _Section:
    """One task's part of an exam: its items' requests, and which replies are theirs."""

    task: LoadedTask
    requests: tuple[tuple[Any, ...], ...]
    margins: Margins
    first: int
    last: int


class _Exam:
    """The requests of some items of every task, laid out in batches."""

    def __init__(
        self, tasks: LoadedTasks, engine: Engine, positions: Mapping[str, Sequence[int]]
    ) -> None:
        instances: list[Any] = []
        self._sections = []
        for task in tasks.tasks:
            requests = tuple(task.requests[i] for i in positions[task.name])
            first = len(instances)
            instances += [request for item in requests for request in item]
            self._sections.append(
                _Section(task, requests, _margins(task, requests), first, len(instances))
            )
        self._program: Program = engine.prepare(instances)

    def take(self) -> Score:
        replies = self._program.run()
        seed_everything()  # a task's own metric may draw
        return Score(
            {
                section.task.name: _mark(section, replies[section.first : section.last])
                for section in self._sections
            }
        )


def _margins(loaded: LoadedTask, requests: Sequence[Sequence[Any]]) -> Margins:
    with _own_code_named(loaded):
        return Margins(loaded.task, loaded.metric, [item[0].doc for item in requests])


def _mark(section: _Section, replies: Sequence[Reply]) -> TaskScore:
    """Filter replies and aggregate as lm-eval does, on this section's items only."""
    loaded = section.task
    with _own_code_named(loaded):
        answers = _answers(section, replies)
        contributions = _contributions(section, answers)
        aggregate = _aggregation(loaded)
        value = float(aggregate(contributions))
    return TaskScore(
        metric=loaded.metric,
        value=value,
        stderr=_stderr(aggregate, contributions),
        n=len(contributions),
        higher_is_better=loaded.higher_is_better,
        outcomes=_outcomes(aggregate, contributions),
        margin=section.margins.mean(answers),
    )


@contextlib.contextmanager
def _own_code_named(loaded: LoadedTask) -> Iterator[None]:
    """Turn whatever a task's own code raises into TaskError."""
    try:
        yield
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(
            f"task {loaded.name!r}: its own scoring failed: {type(error).__name__}: {error}"
        ) from error


def _answers(section: _Section, replies: Sequence[Reply]) -> list[list[Any]]:
    """The replies to each item's requests, behind the task's filter."""
    loaded = section.task
    flat = [request for item in section.requests for request in item]
    for request, reply in zip(flat, replies, strict=True):
        # lm-eval appends to these lists, and its filters take what was appended first
        repeated = reply if isinstance(reply, Repeated) else [reply] * (request.repeats or 1)
        request.resps = list(repeated)
        request.filtered_resps = {}
    for ensemble in loaded.task._filters:
        if ensemble.name == loaded.filter:
            ensemble.apply(flat)
    return [
        [request.filtered_resps[loaded.filter] for request in item] for item in section.requests
    ]


def _contributions(section: _Section, answers: Sequence[list[Any]]) -> list[Any]:
    loaded = section.task
    values = []
    for item, replies in zip(section.requests, answers, strict=True):
        metrics = loaded.task.process_results(item[0].doc, replies)
        if loaded.metric not in metrics:
            raise TaskError(
                f"task {loaded.name!r} gives no metric {loaded.metric!r}; "
                f"it gives {', '.join(sorted(metrics))}"
            )
        values.append(metrics[loaded.metric])
    return values


def _aggregation(loaded: LoadedTask) -> Callable[[list[Any]], float]:
    from lm_eval.api.metrics import mean

    aggregate: Callable[[list[Any]], float] = loaded.task.aggregation().get(loaded.metric, mean)
    return aggregate


def _stderr(aggregate: Callable[[list[Any]], float], contributions: list[Any]) -> float | None:
    """lm-eval's closed form where there is one; never its bootstrap, which forks processes."""
    from lm_eval.api.metrics import acc_all, acc_all_stderr, mean, mean_stderr

    forms = {mean: mean_stderr, acc_all: acc_all_stderr}
    if aggregate not in forms or len(contributions) < 2:
        return None
    return float(forms[aggregate](contributions))


def _outcomes(
    aggregate: Callable[[list[Any]], float], contributions: list[Any]
) -> tuple[float, ...]:
    """The metric's value on each item alone; empty where it has none, as for a correlation."""
    from lm_eval.api.metrics import mean

    try:
        if aggregate is mean:
            values = tuple(float(c) for c in contributions)
        else:
            values = tuple(float(aggregate([c])) for c in contributions)
    except (ArithmeticError, IndexError, TypeError, ValueError):
        return ()
    return values if all(map(math.isfinite, values)) else ()
