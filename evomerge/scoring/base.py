"""The contract of a scorer: it holds prepared tasks and scores whatever weights the model now has.

Knows nothing of recipes, merging, trials or stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from evomerge.trial import Part, Score


class Scorer(Protocol):
    """Scores a live model on one part of every task's items."""

    def items(self) -> Mapping[str, tuple[str, ...]]:
        """For each task the content hashes of its items, in the task's own order."""

    def score(self, part: Part) -> Score:
        """Score the model as it is now. Deterministic: the same weights give the same Score.

        Raises NonFiniteModel when the model computes NaN or infinity, OutOfMemory when it does
        not fit.
        """
