"""What a fit may have learned of a random case: an artifact for each kind, in memory.

Used by the laws of merge methods, which know no data.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Learned:
    """An artifact that lies in no folder."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def tensor(self, name: str) -> Tensor:
        """One of its tensors."""
        return self.tensors[name]


Draw = Callable[[random.Random, str, tuple[int, ...], Sequence[str]], Learned]
"""Of (dice, tensor's name, its shape, the sources' names)."""


def _greedy_soup(
    dice: random.Random, tensor: str, shape: tuple[int, ...], names: Sequence[str]
) -> Learned:
    return Learned({"ingredients": dice.sample(sorted(names), dice.randint(1, len(names)))})


LEARNED: Mapping[str, Draw] = MappingProxyType({"greedy_soup": _greedy_soup})
"""By the kind of artifact."""
