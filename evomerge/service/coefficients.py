"""A recipe's coefficients over a model, as a grid of layers and tensor types for each source.

Knows nothing of merge methods beyond one name: `weight` is a source's share wherever a method has
it. A cell is the mean over its tensors, so rules by tensor name show as what they amount to.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomerge.merging.layout import TENSOR_TYPES, Place, layout
from evomerge.merging.recipe import Recipe
from evomerge.merging.values import Value, leaves, resolve

Cell = tuple[str, str]  # tensor type, column


@dataclass(frozen=True)
class Grid:
    """One source's coefficients (or the recipe's own): `cells` by tensor type and column.

    Columns are `in` (what lies before the layers), each layer's number, and `out`.
    """

    title: str
    types: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[Cell, float]


@dataclass(frozen=True)
class Coefficients:
    """The parameter shown, and a grid for each source that has it."""

    parameter: str
    grids: tuple[Grid, ...]

    @property
    def largest(self) -> float:
        """The largest magnitude of any cell."""
        return max((abs(v) for v in self._values()), default=0.0)

    @property
    def smallest(self) -> float:
        """The smallest value of any cell, with its sign."""
        return min(self._values(), default=0.0)

    def _values(self) -> list[float]:
        return [value for grid in self.grids for value in grid.cells.values()]


def coefficients(recipe: Recipe, tensors: Sequence[str]) -> Coefficients | None:
    """The recipe's main numeric parameter over a model with these tensors; None if it has none."""
    places = list(layout(tensors).values())
    parameter = _main_parameter(recipe)
    if parameter is None:
        return None
    shared = recipe.parameters.get(parameter)
    if parameter != "weight" and not any(parameter in s.parameters for s in recipe.sources):
        return Coefficients(parameter, (_grid("the whole recipe", shared, places),))
    values = {s.name: s.parameters.get(parameter, shared) for s in recipe.sources}
    grids = [_grid(name, value, places) for name, value in values.items() if value is not None]
    return Coefficients(parameter, tuple(grids))


def typical_tensors(layers: int) -> list[str]:
    """Names that stand for a model of which only the number of layers is known."""
    inner = ("self_attn", "mlp", "input_layernorm")
    names = [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in inner]
    return ["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"]


def _main_parameter(recipe: Recipe) -> str | None:
    """`weight`, else a source's own first number, else `t`, else the recipe's first number."""
    own = [name for s in recipe.sources for name, v in s.parameters.items() if _numeric(v)]
    shared = [name for name, v in recipe.parameters.items() if _numeric(v)]
    if "weight" in own or "weight" in shared:
        return "weight"
    if own:
        return own[0]
    return "t" if "t" in shared else next(iter(shared), None)


def _numeric(value: Value) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in leaves(value))


def _grid(title: str, value: Value, places: Sequence[Place]) -> Grid:
    found: dict[Cell, list[float]] = defaultdict(list)
    for place in places:
        number = _number(value, place)
        if number is not None:
            found[place.type, _column(place)].append(number)
    layers = sorted({place.layer for place in places if place.layer is not None})
    used = {column for _, column in found}
    columns = [c for c in ("in", *map(str, layers), "out") if c in used or c.isdigit()]
    return Grid(
        title=title,
        types=tuple(kind for kind in TENSOR_TYPES if any(kind == t for t, _ in found)),
        columns=tuple(columns),
        cells={cell: math.fsum(numbers) / len(numbers) for cell, numbers in found.items()},
    )


def _number(value: Value, place: Place) -> float | None:
    try:
        resolved = resolve(value, place)
    except ValueError:  # no rule for this tensor: it has no cell
        return None
    return float(resolved) if isinstance(resolved, int | float) else None


def _column(place: Place) -> str:
    if place.layer is not None:
        return str(place.layer)
    return "in" if place.depth == 0 else "out"
