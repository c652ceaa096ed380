"""A recipe's parameters over a model, each as grids of layers and tensor types, one for a source.

Knows nothing of merge methods beyond one name: `weight` is a source's share wherever a method has
it. A cell is the mean over its tensors, so rules by tensor name show as what they amount to.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from evomerge.merging.layout import TENSOR_TYPES, Place, layout
from evomerge.merging.recipe import Recipe
from evomerge.merging.values import Value, leaves, resolve

Cell = tuple[str, str]  # tensor type, column
WHOLE = "the whole recipe"
"""The title of a parameter that no source has of its own."""


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
    """A parameter, and a grid for each source that has it; one for all where they are the same."""

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

    @property
    def constants(self) -> dict[str, float] | None:
        """Each grid's one value by its title; None where one varies over the model."""
        found = {grid.title: {round(v, 9) for v in grid.cells.values()} for grid in self.grids}
        if any(len(values) != 1 for values in found.values()):
            return None
        return {title: next(iter(values)) for title, values in found.items()}

    def _values(self) -> list[float]:
        return [value for grid in self.grids for value in grid.cells.values()]


def coefficients(
    recipe: Recipe, tensors: Sequence[str], searched: Collection[str] = ()
) -> tuple[Coefficients, ...]:
    """The recipe's `searched` numeric parameters over a model with these tensors, the main first.

    Of a recipe with none of them the main one alone; empty if it has no numeric parameter.
    """
    places = list(layout(tensors).values())
    main, numeric = _main_parameter(recipe), _numeric_parameters(recipe)
    shown = [n for n in searched if n in numeric] or [n for n in numeric if n == main]
    shown.sort(key=lambda name: name != main)
    return tuple(_over_model(recipe, name, places) for name in shown)


def _over_model(recipe: Recipe, parameter: str, places: Sequence[Place]) -> Coefficients:
    shared = recipe.parameters.get(parameter)
    if parameter != "weight" and not any(parameter in s.parameters for s in recipe.sources):
        return Coefficients(parameter, (_grid(WHOLE, shared, places),))
    values = {s.name: s.parameters.get(parameter, shared) for s in recipe.sources}
    grids = [_grid(name, value, places) for name, value in values.items() if value is not None]
    if len(grids) == len(recipe.sources) > 1 and all(g.cells == grids[0].cells for g in grids):
        grids = [replace(grids[0], title="every source")]
    return Coefficients(parameter, tuple(grids))


def typical_tensors(layers: int) -> list[str]:
    """Names that stand for a model of which only the number of layers is known."""
    inner = ("self_attn", "mlp", "input_layernorm")
    names = [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in inner]
    return ["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"]


def _main_parameter(recipe: Recipe) -> str | None:
    """`weight`, else a source's own first number, else `t`, else the recipe's first number."""
    numeric = _numeric_parameters(recipe)
    own = [name for name in numeric if any(name in s.parameters for s in recipe.sources)]
    if "weight" in numeric:
        return "weight"
    if own:
        return own[0]
    return "t" if "t" in numeric else next(iter(numeric), None)


def _numeric_parameters(recipe: Recipe) -> list[str]:
    """The sources' first, then the recipe's own."""
    every = [*(s.parameters for s in recipe.sources), recipe.parameters]
    return list(dict.fromkeys(n for found in every for n, v in found.items() if _numeric(v)))


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
