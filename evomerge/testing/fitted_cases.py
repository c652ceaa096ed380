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

from evomerge.merging.methods.fisher import fisher_key
from evomerge.merging.methods.git_rebasin import order_key
from evomerge.merging.methods.gram import gram_key, packed
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


def _gram(
    dice: random.Random, tensor: str, shape: tuple[int, ...], names: Sequence[str]
) -> Learned:
    """Of a layer of either orientation, or of no layer; half of the inputs may be 0 throughout."""
    first = dice.random() < 0.5
    if len(shape) != 2 or shape[first == 0] > 200 or dice.random() < 0.2:
        return Learned({"inputs": {name: {} for name in names}, "inputs_first": []})
    size = shape[0] if first else shape[1]
    generator = torch.Generator().manual_seed(dice.getrandbits(32))
    tensors = {}
    for name in names:
        rows = torch.randn(dice.randint(1, 2 * size), size, generator=generator)
        rows *= torch.rand(size, generator=generator) > dice.choice([0.0, 0.5])
        tensors[gram_key(name, tensor)] = packed(rows.T @ rows / len(rows))
    inputs = {name: {tensor: tensor} for name in names}
    return Learned({"inputs": inputs, "inputs_first": [tensor] * first}, tensors)


def _fisher(
    dice: random.Random, tensor: str, shape: tuple[int, ...], names: Sequence[str]
) -> Learned:
    """Squares over many orders of magnitude, a fifth of them 0."""
    generator = torch.Generator().manual_seed(dice.getrandbits(32))
    tensors = {}
    for name in names:
        values = torch.exp(6 * torch.randn(shape, generator=generator))
        values *= torch.rand(shape, generator=generator) > 0.2
        tensors[fisher_key(name, tensor)] = values
    norms = {name: dice.uniform(0.1, 10) for name in names}
    means = {name: dice.choice([0.0, 0.1, 1.0]) for name in names}
    return Learned({"norms": norms, "means": means}, tensors)


def _permutation(
    dice: random.Random, tensor: str, shape: tuple[int, ...], names: Sequence[str]
) -> Learned:
    """Orders of some axes of some sources."""
    generator = torch.Generator().manual_seed(dice.getrandbits(32))
    tensors = {
        order_key(name, tensor, axis): torch.randperm(size, generator=generator).int()
        for name in names
        for axis, size in enumerate(shape)
        if dice.random() < 0.3
    }
    return Learned({}, tensors)


LEARNED: Mapping[str, Draw] = MappingProxyType(
    {
        "greedy_soup": _greedy_soup,
        "gram": _gram,
        "fisher": _fisher,
        "sensitivity": _sensitivity,
        "dam": _dam,
        "adamerging": _adamerging,
        "learned_soup": _learned_soup,
        "permutation": _permutation,
    }
)
"""By the kind of artifact."""
