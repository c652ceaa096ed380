"""Mergers: DAM's coefficients of a tensor, one for each group of its elements and each source.

What an artifact of kind `dam` holds, as numbers; how it was learned is `evomerge.merging.fitted`'s
business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from evomerge.errors import MergeError
from evomerge.merging.methods.base import Fitted

NonLinearity = Literal["identity", "tanh", "sigmoid", "relu"]
NON_LINEARITIES: tuple[NonLinearity, ...] = get_args(NonLinearity)


def activated(kind: str, m: Tensor) -> Tensor:
    """φ(m), what a source's weights are multiplied by."""
    if kind == "identity":
        return m
    functions = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu}
    return functions[kind](m)


def slope(kind: str, m: Tensor) -> Tensor:
    """φ′(m); that of relu is 0 at 0."""
    if kind == "tanh":
        return 1 - torch.tanh(m) ** 2
    if kind == "sigmoid":
        return torch.sigmoid(m) * (1 - torch.sigmoid(m))
    return (m > 0).to(m.dtype) if kind == "relu" else torch.ones_like(m)


def inverse(kind: str, share: float) -> float:
    """The m of which φ(m) = share. Raises MergeError where no finite one is."""
    if kind in ("tanh", "sigmoid") and not 0 < share < 1:
        raise MergeError(f"dam: no finite m has {kind}(m) = {share:g}; use identity or relu")
    if kind == "tanh":
        return math.atanh(share)
    return math.log(share / (1 - share)) if kind == "sigmoid" else share


@dataclass(frozen=True)
class Grid:
    """A tensor cut along one axis into `groups` runs of equal length, each with its coefficient.

    One group is the tensor as a whole.
    """

    shape: tuple[int, ...]
    axis: int
    groups: int

    def view(self, tensor: Tensor) -> Tensor:
        """The tensor as [o, g, r]: what lies before, along and behind the groups."""
        if self.groups == 1:
            return tensor.reshape(1, 1, -1)
        return tensor.reshape(math.prod(self.shape[: self.axis]), self.groups, -1)

    def spread(self, values: Tensor, start: int, count: int) -> Tensor:
        """Values by group [s, g] as those of a run of elements in flat order, [s, count]."""
        behind = math.prod(self.shape[self.axis :]) // self.groups
        period = behind * self.groups
        if period < count:  # copying is cheaper than an index for each element
            skipped = start % period
            once = values.repeat_interleave(behind, dim=1)
            return once.repeat(1, -(-(skipped + count) // period))[:, skipped : skipped + count]
        first, last = start // behind, (start + count - 1) // behind
        found = values[:, torch.arange(first, last + 1) % self.groups]
        skipped = start - first * behind
        whole = found[:, :, None].expand(-1, -1, behind).reshape(len(values), -1)
        return whole[:, skipped : skipped + count]


def factors(fitted: Fitted, name: str, sources: int) -> Tensor | None:
    """φ(m) of a tensor by source and group [s, g], float32; None if it was not trained."""
    if name not in fitted:
        return None
    if (m := fitted.tensor(name)).shape[0] != sources:
        raise MergeError(f"{name}: fitted on {m.shape[0]} sources, the recipe has {sources}")
    return activated(fitted.facts["non_linearity"], m)


def collapse(fitted: Fitted, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """The layer-wise genome nearest to a DAM: {source: {tensor: mean φ(m)}}.

    `names` are the sources' names. The numbers are weights of models for a DAM without anchor, of
    task vectors for one around the base. Tensors that were not trained have 1/N.
    """
    ordered = sorted(names)
    trained = {
        name: activated(fitted.facts["non_linearity"], fitted.tensor(name)).double().mean(1)
        for name in fitted.facts["axes"]
    }
    averaged = {name: 1 / len(ordered) for name in fitted.facts["averaged"]}
    return {
        source: {name: float(means[row]) for name, means in trained.items()} | averaged
        for row, source in enumerate(ordered)
    }
