"""The contract of a merge method that changes structure: it is asked for the whole model.

Its tensors are made from several of the sources', or have other shapes than those. Knows nothing of
files, of live models and of studies.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

from evomerge.checkpoints.weights import Model, Weights
from evomerge.errors import MergeError
from evomerge.merging.methods.base import Coefficients, Fitted, MethodFacts
from evomerge.merging.recipe import Recipe

Resolve = Callable[[str], Coefficients]
"""A recipe's parameters where a stored tensor of the donor lies."""


def throughout(name: str, seen: Sequence[Coefficients]) -> Any:
    """A parameter that has one value for the whole model: of recipe scope that, of source scope one
    for each source. Raises MergeError where it differs between places."""
    found = {at.recipe[name] if name in at.recipe else at.source[name] for at in seen}
    if len(found) > 1:
        raise MergeError(f"{name}: differs between layers; it has one value for the whole model")
    return found.pop()


class Built(Weights, Protocol):
    """The model that a recipe describes, computed tensor by tensor when it is asked for one."""

    @property
    def config(self) -> dict[str, Any]:
        """That of the result."""

    @property
    def structure(self) -> str:
        """What has become of the sources' structure, in a line for a person."""

    def fingerprint(self, name: str) -> Hashable:
        """What a tensor is a function of: equal means equal values, whatever the recipe."""


class StructuralMethod(MethodFacts):
    """A merge method that changes structure. Instances hold no state."""

    @abstractmethod
    def published(self, recipe: Recipe) -> Recipe:
        """A recipe of it with what its paper says in place of what is ours, of the same size."""

    @abstractmethod
    def build(self, members: Mapping[str, Model], fitted: Fitted | None, resolve: Resolve) -> Built:
        """The merged model; `members` are the recipe's models by name, the base's is `base`.

        Computes no tensor yet. Raises MergeError where models, artifact and parameters do not fit.
        """
