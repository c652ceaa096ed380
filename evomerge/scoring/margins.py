"""How clearly a model is right on its items: what tells two models apart that a metric cannot.

An item's margin is the log-likelihood of its best right choice less that of its best wrong one,
compared as the metric compares them, so that its sign is the item's outcome:

    acc, f1, mcc       log p(choice | context)
    acc_norm           the same, divided by the choice's characters
    acc_bytes          the same, divided by its bytes
    acc_mutual_info    log p(choice | context) - log p(choice)

Where a task scores one given answer by its log-likelihood, that is the margin. There is none for a
generated answer, for a metric that is a likelihood itself, and where a task's own code scores.
Knows nothing of models, weights or parts, and has no say in outcomes.

Source: `ConfigurableTask.process_results` of lm-eval 0.4.13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Reply = tuple[float, bool]  # a choice's log-likelihood, and whether greedy search would say it


def _one(choice: str) -> int:
    return 1


def _bytes(choice: str) -> int:
    return len(choice.encode())


_LENGTH: Mapping[str, Callable[[str], int]] = {
    "acc": _one,
    "f1": _one,
    "mcc": _one,
    "acc_norm": len,
    "acc_bytes": _bytes,
    "acc_mutual_info": _one,
}


class Margins:
    """The margins of some items of a task; `docs` [n] are lm-eval's documents of them.

    Calls the task's own templates, once, so that whatever they draw is not drawn while it scores.
    """

    def __init__(self, task: Any, metric: str, docs: Sequence[Any]) -> None:
        self._items = [_item(task, metric, doc) for doc in docs]

    def mean(self, answers: Sequence[Sequence[Reply]]) -> float | None:
        """The mean over the items that have a margin, of the filtered replies to each [n].

        None where no item has one. An item has none where no choice or every choice is right, or
        where a choice has no length to divide by.
        """
        found = [
            item(replies)
            for item, replies in zip(self._items, answers, strict=True)
            if item is not None
        ]
        return math.fsum(found) / len(found) if found else None


def _item(task: Any, metric: str, doc: Any) -> Callable[[Sequence[Reply]], float] | None:
    kind = _kind(task)
    if kind == "loglikelihood":
        return _given
    if kind != "multiple_choice" or metric not in _LENGTH:
        return None
    choices: list[str] = task.doc_to_choice(doc)
    right = _right(task, doc, choices)
    lengths = [_LENGTH[metric](choice) for choice in choices]
    if not 0 < len(right) < len(choices) or 0 in lengths:
        return None
    return _Choices(right, tuple(lengths), metric == "acc_mutual_info")


def _kind(task: Any) -> str | None:
    """What a task asks for, where lm-eval's own code scores the replies."""
    from lm_eval.api.task import ConfigurableTask

    own = type(task).process_results is not ConfigurableTask.process_results
    return None if own or callable(task.config.process_results) else str(task.OUTPUT_TYPE)


def _right(task: Any, doc: Any, choices: Sequence[str]) -> frozenset[int]:
    """The places of the right choices; a label that names none is passed over, as by lm-eval."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    labels = gold if isinstance(gold, list) else [gold]
    places = [choices.index(g) if g in choices else -1 for g in labels if isinstance(g, str)]
    places += [int(g) for g in labels if not isinstance(g, str)]
    return frozenset(place for place in places if 0 <= place < len(choices))


def _given(replies: Sequence[Reply]) -> float:
    return float(replies[0][0])


@dataclass(frozen=True)
class _Choices:
    """The margin of an item of k choices, of which `right` are right.

    There may be 2k replies, the last k without the context; `unconditional` takes them off.
    """

    right: frozenset[int]
    lengths: tuple[int, ...]
    unconditional: bool

    def __call__(self, replies: Sequence[Reply]) -> float:
        k = len(self.lengths)
        values = [float(value) for value, _ in replies]
        if self.unconditional:
            values = [a - b for a, b in zip(values[:k], values[k:], strict=True)]
        scaled = [value / length for value, length in zip(values[:k], self.lengths, strict=True)]
        wrong = max(value for place, value in enumerate(scaled) if place not in self.right)
        return max(scaled[place] for place in self.right) - wrong
