"""Chooses how log-likelihoods are computed: with shared contexts where that pays, else plainly.

Sharing is tried on a few windows of each task first and given up where the model answers
otherwise than without it; items that its rounding might decide are computed again as lm-eval
computes them. So outcomes do not depend on it. Knows windows and items, nothing of metrics.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evomerge.scoring.key_values import is_exact, shareable_tokens
from evomerge.scoring.loglikelihood import Answer, LoglikelihoodPlan, Window
from evomerge.scoring.near_ties import Choice, NearTies
from evomerge.scoring.room import Room, is_out_of_memory
from evomerge.scoring.shared_context import NEAR, SharedContextPlan, Tokens, split

# Sharing has to save this part of the tokens: its passes are smaller and more.
_SAVED = 0.2
_TRIED_CONTEXTS = 2  # of the longest and of the shortest each
_TRIED_ENDINGS = 8


@dataclass(frozen=True)
class Layout:
    """How windows are laid out in batches."""

    room: Room
    max_length: int
    device: torch.device

    def plain(self, windows: Sequence[Window]) -> LoglikelihoodPlan:
        return LoglikelihoodPlan(
            windows, room=self.room, max_length=self.max_length, device=self.device
        )

    def shared(self, windows: Sequence[Window], prefix: int | None = None) -> SharedContextPlan:
        return SharedContextPlan(
            windows,
            room=self.room,
            max_length=self.max_length,
            device=self.device,
            shared=prefix,
        )


class Likelihoods:
    """Fixed windows, to be answered by whatever weights a model has.

    `tasks` holds for each task its items, an item being its choices; windows that are in none of
    them are always computed plainly.
    """

    def __init__(
        self, windows: Sequence[Window], tasks: Sequence[Sequence[Sequence[Choice]]], layout: Layout
    ) -> None:
        self._windows = windows
        self._layout = layout
        self._tasks = [_Task(windows, items, layout) for items in tasks]

    def run(self, model: Any) -> list[Answer]:
        """One answer for each window. Raises NonFiniteModel."""
        answers: dict[int, Answer] = {}
        doubtful: set[int] = set()
        for task in self._tasks:
            if task.shares(model):
                doubtful |= task.run(model, answers)
        if doubtful:
            again = self._all.run_some(model, doubtful)
            answers.update((window, again[window]) for window in doubtful)
        rest = tuple(w for w in range(len(self._windows)) if w not in answers)
        if rest:
            plain = self._all if len(rest) == len(self._windows) else self._plain(rest)
            answers.update(zip(rest, plain.run(model), strict=True))
        return [answers[window] for window in range(len(self._windows))]

    @functools.cached_property
    def _all(self) -> LoglikelihoodPlan:
        return self._layout.plain(self._windows)

    @functools.lru_cache(maxsize=1)  # noqa: B019  (as long-lived as its one entry)
    def _plain(self, chosen: tuple[int, ...]) -> LoglikelihoodPlan:
        return self._layout.plain([self._windows[w] for w in chosen])


class _Task:
    """One task's windows; whether they are worth sharing, and whether the model can."""

    def __init__(
        self, windows: Sequence[Window], items: Sequence[Sequence[Choice]], layout: Layout
    ) -> None:
        self._numbers = [choice.window for item in items for choice in item]
        self._windows = [windows[number] for number in self._numbers]
        self._layout = layout
        self._parts = [split(window, layout.max_length) for window in self._windows]
        self._near_ties = NearTies(items, NEAR)
        self._works: bool | None = None if self._pays() else False

    def shares(self, model: Any) -> bool:
        """Whether shared contexts are worth it and right; found out at the first call."""
        if self._works is None:
            self._works = self._plan.reach <= shareable_tokens(model) and self._try(model)
        return self._works

    def run(self, model: Any, answers: dict[int, Answer]) -> set[int]:
        """Answer the task's windows; return those that rounding may have decided."""
        own, doubtful = self._plan.run(model)
        answers.update(zip(self._numbers, own, strict=True))
        if not is_exact(model):
            return set()  # everything is near a tie
        values = {n: value for n, (value, _) in zip(self._numbers, own, strict=True)}
        return self._near_ties.find(values) | {self._numbers[place] for place in doubtful}

    @functools.cached_property
    def _plan(self) -> SharedContextPlan:
        return self._layout.shared(self._windows)

    def _pays(self) -> bool:
        plain = sum(len(row) for row in {context + fed for context, fed in self._parts})
        contexts = {context for context, _ in self._parts}
        shared = sum(map(len, contexts)) + sum(len(fed) for _, fed in set(self._parts))
        shared -= self._plan.shared * (len(contexts) - 1) if contexts else 0
        return shared <= (1 - _SAVED) * plain

    def _try(self, model: Any) -> bool:
        """Whether a few windows, the longest and the shortest, get the answers they should."""
        tried = [self._windows[place] for place in self._tried()]
        expected = self._layout.plain(tried).run(model)
        try:
            found, _ = self._layout.shared(tried, self._plan.shared).run(model)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            return False  # a model that does not take another's keys and values
        allowed = 1e-3 if is_exact(model) else 0.05
        return all(
            abs(a - b) <= allowed * (1 + abs(a))
            for (a, _), (b, _) in zip(expected, found, strict=True)
        )

    def _tried(self) -> list[int]:
        places: dict[Tokens, list[int]] = {}
        for place, (context, _) in enumerate(self._parts):
            places.setdefault(context, []).append(place)
        order = sorted(places, key=lambda context: (-len(context), context))
        chosen = dict.fromkeys([*order[:_TRIED_CONTEXTS], *order[-_TRIED_CONTEXTS:]])
        return [place for context in chosen for place in places[context][:_TRIED_ENDINGS]]


def may_share(model: Any, wanted: bool | str) -> bool:
    """Whether to share contexts: `auto` only where no outcome can depend on it."""
    return is_exact(model) if wanted == "auto" else bool(wanted)
