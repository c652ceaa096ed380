"""The contract of a sampler.

A sampler works in the unit cube: every gene of a genome lies in [0, 1]; all that a discrete gene
says is which of as many equal cells it lies in as it has levels. It keeps nothing on disk.
Its state is a function of what it was told, in the order it was told, and each ask draws from a
generator seeded by (study seed, index): so replaying the recorded tells rebuilds it bit for bit.
Knows nothing of recipes, trials' attempts or stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from evomerge.trial import Genome

UNLIMITED = 2**31 - 1
"""The horizon of a sampler that may be asked for any genome at any time."""


@dataclass(frozen=True)
class Told:
    """A finished search trial as the sampler sees it.

    `index` counts search trials from 0. `values` are maximised; None is a failed candidate, which
    the sampler must treat as worse than every candidate that has values, never as a number.
    `asked_at` is how many results had been told when the genome was asked for; None is unknown.
    `tiebreak` decides, more being better, between candidates of equal values.
    """

    index: int
    genome: Genome
    values: tuple[float, ...] | None
    asked_at: int | None = None
    tiebreak: float | None = None


@dataclass(frozen=True)
class Restart:
    """The search began again somewhere else, after `trials` results were told, for a reason.

    Restarts are numbered from 1. The populations are those of the run that ended and of the next.
    """

    number: int
    trials: int
    population_before: int
    population_after: int
    reason: str


class Sampler(Protocol):
    """Proposes genomes and learns from results."""

    @property
    def population(self) -> int:
        """How many new results an update waits for. A restart may change it."""

    @property
    def restarts(self) -> tuple[Restart, ...]:
        """Every restart so far; none where a sampler has no such thing."""

    @property
    def horizon(self) -> int:
        """Every genome whose index is below it, and that is not told, may be asked for now."""

    @property
    def ordered(self) -> bool:
        """Whether results are told in the order of their index; else as they come."""

    def ask(self, index: int) -> Genome:
        """Genome [genes] number `index`. Asking twice for one index in one state gives the same.

        Raises ValueError for an index that is not open: at or beyond the horizon, or, where results
        are told in order, of a generation that is wholly told.
        """

    def tell(self, result: Told) -> None:
        """Take in one result, once. Where `ordered`, results come in the order of their index."""
