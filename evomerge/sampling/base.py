"""The contract of a sampler.

A sampler works in the unit cube: every gene of a genome lies in [0, 1]. It keeps nothing on disk.
Its state is a function of what it was told, in the order it was told, and each ask draws from a
generator seeded by (study seed, index): so replaying the recorded tells rebuilds it bit for bit.
Knows nothing of recipes, trials' attempts or stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from evomerge.trial import Genome


@dataclass(frozen=True)
class Told:
    """A finished search trial as the sampler sees it.

    `index` counts search trials from 0. `values` are maximised; None is a failed candidate, which
    the sampler must treat as worse than every candidate that has values, never as a number.
    """

    index: int
    genome: Genome
    values: tuple[float, ...] | None


class Sampler(Protocol):
    """Proposes genomes and learns from results."""

    @property
    def population(self) -> int:
        """How many genomes are proposed from one state: the size of a generation."""

    def ask(self, index: int) -> Genome:
        """Genome [genes] number `index`. Asking twice for one index in one state gives the same.

        Generation g = index // population may be asked for only after all of generation g - 1
        was told; else ValueError.
        """

    def tell(self, result: Told) -> None:
        """Take in one result. Results come in the order of their index."""
