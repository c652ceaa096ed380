"""The fits by the kind of artifact they write."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from evomerge.errors import MergeError
from evomerge.merging.fitted.adamerging import AdaMergingFit
from evomerge.merging.fitted.base import Fitter
from evomerge.merging.fitted.dam import DamFit
from evomerge.merging.fitted.fisher import FisherFit
from evomerge.merging.fitted.gram import GramFit
from evomerge.merging.fitted.greedy_soup import GreedySoupFit
from evomerge.merging.fitted.learned_soup import LearnedSoupFit
from evomerge.merging.fitted.sensitivity import SensitivityFit
from evomerge.merging.structure.architectures.permutation_fit import PermutationFit
from evomerge.merging.structure.experts.routing_fit import RoutingFit
from evomerge.merging.structure.pleas.fit import PleasFit
from evomerge.spec import nearest

_ALL: tuple[Fitter, ...] = (
    GreedySoupFit(),
    GramFit(),
    FisherFit(),
    SensitivityFit(),
    AdaMergingFit(),
    LearnedSoupFit(),
    DamFit(),
    PermutationFit(),
    RoutingFit(),
    PleasFit(),
)
FITTERS: Mapping[str, Fitter] = MappingProxyType({fitter.name: fitter for fitter in _ALL})


def get(kind: str) -> Fitter:
    """The fit that writes artifacts of that kind. Raises MergeError for an unknown kind."""
    if kind not in FITTERS:
        raise MergeError(f"unknown kind of artifact {kind!r}{nearest(kind, FITTERS)}")
    return FITTERS[kind]
