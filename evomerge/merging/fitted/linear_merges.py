"""Merges that are linear in one number for each source: which number, and what it multiplies.

    W = O + Σᵢ cᵢ·Dᵢ        of one tensor: shares cᵢ, directions Dᵢ

A task vector, a thinned one, a model, what a fit learned of one. Knows no loss and no search space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from evomerge.checkpoints.weights import Model
from evomerge.errors import MergeError
from evomerge.merging.merge import Merge
from evomerge.merging.methods import linear, task_arithmetic
from evomerge.merging.methods.base import Coefficients
from evomerge.merging.recipe import Recipe


def _of_task_vectors(known: Coefficients) -> list[float]:
    weights, scale = known.floats("weight"), known.number("lambda")
    return task_arithmetic.shares_of(weights, scale=scale, normalize=known.flag("normalize"))


def _of_models(known: Coefficients) -> list[float]:
    return linear.shares(known.floats("weight"), normalize=known.flag("normalize"))


def _of_fitted(known: Coefficients) -> list[float]:
    """How much of what a fit learned of each source."""
    return list(known.floats("scale"))


_SHARES: Mapping[str, Callable[[Coefficients], list[float]]] = MappingProxyType(
    {
        "task_arithmetic": _of_task_vectors,
        "dare_linear": _of_task_vectors,
        "linear": _of_models,
        "dam": _of_fitted,
        "adamerging": _of_fitted,
    }
)
# what makes a source's share 1, and every other parameter neutral
_UNIT: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "task_arithmetic": ("weight", {"normalize": False, "lambda": 1.0}),
        "dare_linear": ("weight", {"normalize": False, "lambda": 1.0}),
        "linear": ("weight", {"normalize": False}),
        "dam": ("scale", {}),
        "adamerging": ("scale", {}),
    }
)
LINEAR = tuple(_SHARES)
"""The merge methods that are linear in one number for each source."""
WEIGHTED = ("task_arithmetic", "dare_linear", "linear")
"""Those of them whose number is the weight of a task vector or a model."""


def shares(method: str, known: Coefficients) -> list[float]:
    """cᵢ of one tensor, for every source [s] in the order of `known.names`, in float64."""
    return _SHARES[method](known)


def check_linear(recipe: Recipe) -> None:
    """Raise MergeError unless the merge of every tensor is linear in its sources' shares."""
    methods = [recipe.method, *(group.method for group in recipe.groups)]
    for method in methods:
        if method not in LINEAR:
            raise MergeError(
                f"{method} is not linear in a weight for each source, so it has no gradient here;"
                f" these are: {', '.join(LINEAR)}"
            )
    if recipe.groups or recipe.slices:
        raise MergeError("gradients are of recipes without `groups` and `slices`")


class Directions:
    """Dᵢ of every tensor: the merge with one share 1 and the others 0, less that with none.

    What else a recipe says of the merge stays: DARE's masks follow its seed and densities. In
    float32, exact where the checkpoints are in half precision.
    """

    def __init__(self, recipe: Recipe, models: Mapping[str, Model]) -> None:
        self.names = sorted(source.name for source in recipe.sources)
        self._units = [Merge(_unit(recipe, name), models) for name in self.names]
        self._origin = Merge(_unit(recipe, None), models)

    def of(self, name: str) -> list[Tensor]:
        """Dᵢ of one tensor, float32, for every source [s] in the order of names."""
        origin = self._origin.tensor(name)
        return [unit.tensor(name) - origin for unit in self._units]


def _unit(recipe: Recipe, chosen: str | None) -> Recipe:
    """The recipe with the share 1 of one source, and 0 of all others."""
    parameter, neutral = _UNIT[recipe.method]
    sources = tuple(
        replace(s, parameters={**s.parameters, parameter: float(s.name == chosen)})
        for s in recipe.sources
    )
    parameters = {**recipe.parameters, **neutral}
    return replace(recipe, sources=sources, parameters=parameters, dtype="float32")
