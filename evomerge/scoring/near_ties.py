"""Items whose best answer is nearly a tie: there the last digits of two log-likelihoods decide.

Knows how lm-eval compares the choices of an item (as they are, per character, per byte, less the
unconditional log-likelihood) and nothing of models. A metric of a task's own that compares
otherwise is not foreseen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Choice:
    """One request of an item: its window's number and its text as lm-eval has it."""

    window: int
    context: str
    continuation: str


class NearTies:
    """The items of some tasks, ready to be looked through. `items` holds each one's choices."""

    def __init__(self, items: Sequence[Sequence[Choice]], tolerance: float) -> None:
        self._tolerance = tolerance
        by_count: dict[tuple[int, bool], list[Sequence[Choice]]] = {}
        for item in items:
            if len(item) > 1:
                by_count.setdefault((len(item), _is_mutual(item)), []).append(item)
        self._groups = [_Group(group, mutual) for (_, mutual), group in by_count.items()]

    def find(self, values: Mapping[int, float]) -> set[int]:
        """All windows of the items that are nearly a tie by some way of comparing."""
        return {w for group in self._groups for w in group.find(values, self._tolerance)}


def _is_mutual(item: Sequence[Choice]) -> bool:
    """Whether the item's second half asks for the same answers without the context."""
    half = len(item) // 2
    return len(item) == 2 * half and all(
        (a.continuation, b.context) == (b.continuation, "")
        for a, b in zip(item[:half], item[half:], strict=True)
    )


class _Group:
    """Items of k choices each."""

    def __init__(self, items: Sequence[Sequence[Choice]], mutual: bool) -> None:
        self._mutual = mutual
        self._windows = np.array([[c.window for c in item] for item in items])  # [n, k]
        same: dict[tuple[str, str], int] = {}
        self._identity = np.array(
            [[same.setdefault((c.context, c.continuation), len(same)) for c in i] for i in items]
        )
        texts = [[c.continuation for c in item] for item in items]
        self._lengths = [
            np.array([[max(1, len(text)) for text in item] for item in texts]),
            np.array([[max(1, len(text.encode())) for text in item] for item in texts]),
        ]

    def find(self, values: Mapping[int, float], tolerance: float) -> list[int]:
        likelihoods = np.array([[values[w] for w in item] for item in self._windows.tolist()])
        tied = self._tied(likelihoods, self._identity, tolerance)
        for lengths in self._lengths:
            allowed = tolerance / lengths.min(axis=1, keepdims=True)
            tied |= self._tied(likelihoods / lengths, self._identity, allowed)
        if self._mutual:
            half = likelihoods.shape[1] // 2
            difference = likelihoods[:, :half] - likelihoods[:, half:]
            tied |= self._tied(difference, self._identity[:, :half], 2 * tolerance)
        windows: list[int] = self._windows[tied].ravel().tolist()
        return windows

    def _tied(
        self,
        values: NDArray[np.float64],
        identity: NDArray[np.int64],
        allowed: float | NDArray[np.float64],
    ) -> NDArray[np.bool_]:
        """Which items [n] have a second choice, other than the best, that comes near to it."""
        best = values.argmax(axis=1)[:, None]
        near = values >= np.take_along_axis(values, best, axis=1) - allowed
        other = identity != np.take_along_axis(identity, best, axis=1)
        tied: NDArray[np.bool_] = (near & other).any(axis=1)
        return tied
