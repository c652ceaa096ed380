"""Proof that a permutation specification is right: it is tried on a network with random weights.

A random permutation of every group at once must leave what the network computes, and leaving out
any one bind must change it, so that none is missing and none is idle. Knows no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.errors import MergeError
from evomerge.merging.structure.permutations.permutation import (
    Bind,
    Group,
    Spec,
    Stacked,
    State,
    apply,
    move,
    random_permutations,
)

Compute = Callable[[State], Tensor]
"""What the network computes with these tensors, on inputs of the caller's choice."""

FLOAT64 = 1e-6
"""Norms of some architectures compute in float32 whatever the model's dtype."""
FLOAT32 = 1e-4
_DETECTED = 10.0


@dataclass(frozen=True)
class Report:
    """Changes of the output, relative to its largest value.

    `preserved`: with every group permuted. `dropped`: by "group: tensor axis", with that one bind
    left out; about zero for the inert.
    """

    preserved: float
    dropped: Mapping[str, float]


def check(
    spec: Spec, state: State, compute: Compute, *, tolerance: float = FLOAT64, seed: int = 0
) -> Report:
    """Try a specification on a network: a forward pass for each bind.

    Weights should be random, those of norms and biases too: where two units are alike, nothing
    shows that they have changed places. Raises MergeError with the first group that does not
    preserve the function, or the first bind that does nothing.
    """
    spec.check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()})
    trial = _Trial(state, compute)
    permutations = _disorder(spec, torch.Generator().manual_seed(seed))
    preserved = trial.change(apply(spec, state, permutations))
    if not preserved <= tolerance:
        _blame(spec, trial, tolerance)
        raise MergeError(
            f"permuting all groups together changes the function by {preserved:.2g}, though none"
            " does alone: two of them move the same places"
        )
    dropped: dict[str, float] = {}
    for group in spec.groups:
        if group.size > 1:
            dropped |= _dropped(group, trial, tolerance)
    return Report(preserved, dropped)


class _Trial:
    def __init__(self, state: State, compute: Compute) -> None:
        self.state = state
        self._compute = compute
        with torch.no_grad():
            self._wanted = compute(state).double()

    def change(self, state: State) -> float:
        """max|y − y₀| / max|y₀|."""
        with torch.no_grad():
            found = self._compute(state).double()
        return float((found - self._wanted).abs().max() / self._wanted.abs().max())


def _blame(spec: Spec, trial: _Trial, tolerance: float) -> None:
    for group in spec.groups:
        change = trial.change(apply(spec, trial.state, {group.name: _rolled(group)}))
        if not change <= tolerance:
            raise MergeError(
                f"permutation group {group.name}: permuting its {group.size} units changes the"
                f" function by {change:.2g} of its largest value (at most {tolerance:g} is"
                " rounding); a tensor that has these units is not bound, or is bound wrongly"
            )


def _dropped(group: Group, trial: _Trial, tolerance: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for bind in group.binds:
        rest = (other for other in group.binds if other is not bind)
        change = trial.change(move(trial.state, rest, _rolled(group)))
        label = f"{group.name}: {_label(bind)}"
        if bind.inert and not change <= tolerance:
            raise MergeError(f"{label} is called inert, but the function depends on it")
        if not bind.inert and not change > _DETECTED * tolerance:
            raise MergeError(
                f"{label}: without this bind the function changes by no more than {change:.2g}, so"
                " nothing shows that it belongs to the group; remove it, or try random weights"
            )
        found[label] = change
    return found


def _disorder(spec: Spec, generator: torch.Generator) -> dict[str, Tensor]:
    """A random permutation of every group, none of them the identity."""
    drawn = random_permutations(spec, generator)
    for group in spec.groups:
        if torch.equal(drawn[group.name], torch.arange(group.size)):
            drawn[group.name] = _rolled(group)
    return drawn


def _rolled(group: Group) -> Tensor:
    """A permutation that leaves no unit in its place."""
    return torch.roll(torch.arange(group.size), 1)


def _label(bind: Bind | Stacked) -> str:
    if isinstance(bind, Stacked):
        return f"{bind.params[0]} and its like"
    return f"{bind.param} axis {bind.axis}" + (f" {bind.select}" if bind.select else "")
