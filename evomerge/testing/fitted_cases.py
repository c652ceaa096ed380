"""What a fit may have learned of a random case: an artifact for each kind, in memory.

Used by the laws of merge methods, which know no data.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from evomerge.merging.methods.sens_merging import layer_name


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


def _sensitivity(
    dice: random.Random, tensor: str, shape: tuple[int, ...], names: Sequence[str]
) -> Learned:
    layers, count = [layer_name(tensor), "head"], len(names)

    def matrix(width: int) -> Tensor:
        rows = [[dice.random() for _ in range(width)] for _ in names]
        return torch.tensor(rows, dtype=torch.float64)

    tensors = {"elementwise": matrix(2), "inner": matrix(2), "distances": matrix(count)}
    return Learned({"sources": sorted(names), "layers": layers}, tensors)


def _dam(dice: random.Random, tensor: str, shape: tuple[int, ...], names: Sequence[str]) -> Learned:
    axis = dice.randrange(len(shape))
    groups = dice.choice([g for g in range(1, shape[axis] + 1) if shape[axis] % g == 0])
    rows = [[dice.uniform(-0.5, 1.0) for _ in range(groups)] for _ in names]
    facts = {
        "anchor": dice.choice(["none", "base"]),
        "non_linearity": dice.choice(["identity", "tanh", "sigmoid", "relu"]),
        "axes": {tensor: axis},
        "averaged": [],
    }
    return Learned(facts, {tensor: torch.tensor(rows)})


def _adamerging(
    dice: random.Random, tensor: str, shape: tuple[int, ...], names: Sequence[str]
) -> Learned:
    """Every other one of ++, each source trimmed at some magnitude of up to 0.002."""
    found = torch.tensor([dice.random() for _ in names], dtype=torch.float64)
    thresholds = torch.tensor([dice.uniform(0, 2e-3) for _ in names]).view(torch.int32).tolist()
    trims = {tensor: [[pattern, dice.randrange(math.prod(shape))] for pattern in thresholds]}
    selection = {"tie": dice.choice([-1, 0, 1]), "trims": trims} if dice.random() > 0.5 else None
    facts = {"sources": sorted(names), "start": 0.3, "selection": selection}
    return Learned(facts, {tensor: found})


def _learned_soup(
    dice: random.Random, tensor: str, shape: tuple[int, ...], names: Sequence[str]
) -> Learned:
    raw = torch.tensor([dice.gauss(0, 2) for _ in names], dtype=torch.float64)
    return Learned({"sources": sorted(names)}, {tensor: raw.softmax(0)})


LEARNED: Mapping[str, Draw] = MappingProxyType(
    {
        "greedy_soup": _greedy_soup,
        "sensitivity": _sensitivity,
        "dam": _dam,
        "adamerging": _adamerging,
        "learned_soup": _learned_soup,
    }
)
"""By the kind of artifact."""
