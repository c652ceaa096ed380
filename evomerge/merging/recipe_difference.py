"""How two recipes differ: method, models, and parameters for each source, over the model if known.

Compares what a recipe means, not how it is written: defaults filled in, models by digest. Opens no
checkpoint; a model's tensor names come from the caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.errors import MergeError
from evomerge.merging.difference import flat
from evomerge.merging.layout import TENSOR_TYPES, Place, TensorType, layout
from evomerge.merging.methods import registry
from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.merging.values import Scalar, Value, fits, normalise, resolve

ABSENT = None
"""What a method without a parameter has as its value."""


@dataclass(frozen=True)
class Cell:
    """The distinct values that a parameter takes over the tensors of one type in one layer."""

    type: TensorType
    layer: int | None
    a: tuple[Scalar, ...]
    b: tuple[Scalar, ...]


@dataclass(frozen=True)
class ParameterDifference:
    """A parameter of one source (None: of the recipe), as each recipe has it, defaults included.

    A side is None if its method has no such parameter. `cells` are where the values differ over the
    model; empty where that is not known, or the same everywhere.
    """

    source: str | None
    parameter: str
    a: Value | None
    b: Value | None
    cells: tuple[Cell, ...] = ()


@dataclass(frozen=True)
class RecipeDifference:
    """How recipe B differs from recipe A. `settings` are all keys but sources and parameters."""

    settings: dict[str, tuple[Any, Any]]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    parameters: tuple[ParameterDifference, ...]

    @property
    def identical(self) -> bool:
        """Whether both say the same: what they merge is then the same model."""
        return not (self.settings or self.only_a or self.only_b or self.parameters)


def recipe_difference(a: Recipe, b: Recipe, tensors: Sequence[str] = ()) -> RecipeDifference:
    """Compare two valid recipes; given a model's tensor names, also over its types and layers.

    A source is the same one if the digests agree or, where one is not known, the paths; what is
    left over is paired by name.
    """
    pairs = _paired(a.sources, b.sources)
    matched_a, matched_b = [one.name for one, _ in pairs], [other.name for _, other in pairs]
    groups = [group.where for recipe in (a, b) for group in recipe.groups]
    # A group's tensors have the group's parameters; `settings` has the groups themselves.
    places = [p for p in layout(tensors).values() if not any(fits(where, p) for where in groups)]
    settings = {**dict(_settings(a, b)), **dict(_source_settings(pairs, b))}
    return RecipeDifference(
        settings={key: pair for key, pair in settings.items() if pair[0] != pair[1]},
        only_a=tuple(s.name for s in a.sources if s.name not in matched_a),
        only_b=tuple(s.name for s in b.sources if s.name not in matched_b),
        parameters=tuple(_parameters(a, b, pairs, places)),
    )


def _settings(a: Recipe, b: Recipe) -> Iterator[tuple[str, tuple[Any, Any]]]:
    ours, theirs = _flat_settings(a), _flat_settings(b)
    for key in dict.fromkeys([*ours, *theirs]):
        yield key, (ours.get(key), theirs.get(key))
    if not _same_model(a.base, b.base):
        yield "base", (_named(a.base), _named(b.base))


def _flat_settings(recipe: Recipe) -> dict[str, Any]:
    """A recipe by dotted keys, groups and slices by their number; no models, no parameters."""
    document = recipe.to_json()
    numbered = {
        key: {str(index): entry for index, entry in enumerate(value)}
        if isinstance(value, list)
        else value
        for key, value in document.items()
    }
    apart = ("base", "sources", "parameters")
    return flat({key: value for key, value in numbered.items() if key not in apart})


def _source_settings(
    pairs: Sequence[tuple[Source, Source]], b: Recipe
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Sources that go by another name (it keys masks) or hold another model; another order."""
    for one, other in pairs:
        yield f"sources.{one.name}.name", (one.name, other.name)
        if not _same_model(one.model, other.model):
            yield f"sources.{one.name}", (_named(one.model), _named(other.model))
    matched = [other.name for _, other in pairs]
    kept = [source.name for source in b.sources if source.name in matched]
    if kept != matched:
        yield "order of sources", (matched, kept)


def _paired(ours: Sequence[Source], theirs: Sequence[Source]) -> list[tuple[Source, Source]]:
    """Pairs in A's order: first by model and name, then by model, then by name."""
    left, found = list(theirs), {}
    for by_model, by_name in ((True, True), (True, False), (False, True)):
        for one in (source for source in ours if source.name not in found):
            for other in left:
                same_model = not by_model or _same_model(one.model, other.model)
                if same_model and (not by_name or one.name == other.name):
                    left.remove(other)
                    found[one.name] = other
                    break
    return [(one, found[one.name]) for one in ours if one.name in found]


def _same_model(one: ModelRef | None, other: ModelRef | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.digest and other.digest:
        return one.digest == other.digest
    return one.path == other.path


def _named(model: ModelRef | None) -> str | None:
    if model is None:
        return None
    if model.digest is None:
        return model.path
    return f"{model.path} ({model.digest[:12]})"


def _parameters(
    a: Recipe, b: Recipe, pairs: Sequence[tuple[Source, Source]], places: Sequence[Place]
) -> Iterator[ParameterDifference]:
    scopes = {
        p.name: p.scope for recipe in (b, a) for p in registry.facts(recipe.method).parameters
    }
    for name in sorted(scopes):
        sides = pairs if scopes[name] == "source" else [(None, None)]
        for one, other in sides:
            values = _value(a, name, one), _value(b, name, other)
            if values[0] == values[1]:
                continue
            cells = tuple(_cells(*values, places))
            if cells or not places or ABSENT in values:
                yield ParameterDifference(one.name if one else None, name, *values, cells)


def _value(recipe: Recipe, name: str, source: Source | None) -> Value | None:
    """A source's own value wins over the recipe's, the recipe's over the default."""
    declared = {p.name: p for p in registry.facts(recipe.method).parameters}
    if name not in declared:
        return ABSENT
    value = recipe.parameters.get(name, declared[name].default)
    return normalise(value if source is None else source.parameters.get(name, value))


def _cells(a: Value | None, b: Value | None, places: Sequence[Place]) -> Iterator[Cell]:
    """Where two values differ, if both are there; nothing for two that are scalars everywhere."""
    if a is ABSENT or b is ABSENT:
        return
    groups: dict[tuple[int, TensorType], list[tuple[Scalar, Scalar]]] = {}
    for place in places:
        layer = -1 if place.layer is None else place.layer
        pair = _resolved(a, place), _resolved(b, place)
        groups.setdefault((layer, place.type), []).append(pair)
    for layer, kind in sorted(groups, key=lambda cell: (cell[0], TENSOR_TYPES.index(cell[1]))):
        values = groups[layer, kind]
        if any(one != other for one, other in values):
            ours, theirs = (tuple(dict.fromkeys(side)) for side in zip(*values, strict=True))
            yield Cell(kind, None if layer < 0 else layer, ours, theirs)


def _resolved(value: Value, place: Place) -> Scalar:
    try:
        return resolve(value, place)
    except ValueError as error:
        raise MergeError(str(error)) from None
