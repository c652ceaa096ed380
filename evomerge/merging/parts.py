"""Which tensors of a merge have a method, or sources, of their own: groups and slices.

A group gives the tensors of a type, name or range of layers another merge method. Slices stack
runs of layers of the sources into a model of another depth. Together they cut a recipe into parts,
each of them a plain recipe. Opens no checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from evomerge.merging.layout import Place
from evomerge.merging.recipe import BASE, Group, Recipe
from evomerge.merging.values import check_selector, fits, within

PartKey = tuple[int | None, int | None]
"""(index of the group, index of the slice)."""


@dataclass(frozen=True)
class Part:
    """A plain recipe for some tensors of the whole; `where` names it in messages."""

    where: str
    recipe: Recipe


def parts(recipe: Recipe) -> dict[PartKey, Part]:
    """Every part of a recipe; (None, None) alone for a recipe without groups and slices."""
    groups: list[tuple[int | None, Recipe]] = [(None, replace(recipe, groups=(), slices=()))]
    groups += [(index, _of_group(recipe, group)) for index, group in enumerate(recipe.groups)]
    slices = range(len(recipe.slices)) if recipe.slices else [None]
    found = {}
    for group, plain in groups:
        for index in slices:
            where = [f"groups.{group}"] if group is not None else []
            where += [f"slices.{index}"] if index is not None else []
            present = plain if index is None else _of_slice(plain, recipe.slices[index])
            found[group, index] = Part(".".join(where), present)
    return found


def part_of(recipe: Recipe, place: Place) -> PartKey:
    """The part that a tensor belongs to: the first group that fits, the slice of its layer."""
    group = next((i for i, g in enumerate(recipe.groups) if fits(g.where, place)), None)
    return group, _slice_of(recipe, place)


def place_in(recipe: Recipe, key: PartKey, place: Place) -> Place:
    """A tensor's place as its group sees it: in a range of layers, depth runs over the range."""
    group, _ = key
    return place if group is None else within(recipe.groups[group].where, place)


def faults(recipe: Recipe) -> Iterator[str]:
    """What is wrong with the groups and slices themselves, a line each."""
    names = {source.name for source in recipe.sources}
    for index, group in enumerate(recipe.groups):
        yield from (f"groups.{index}: {fault}" for fault in _selector_faults(group.where))
        for name in group.sources or ():
            if name not in names:
                yield f"groups.{index}.sources.{name}: no such source in the recipe"
    if recipe.slices and BASE in names:
        yield "sources.base: in a recipe with slices, `base` is the base; name the source otherwise"
    for index, ranges in enumerate(recipe.slices):
        yield from (f"slices.{index}: {fault}" for fault in _slice_faults(ranges, names, recipe))


def _of_group(recipe: Recipe, group: Group) -> Recipe:
    chosen = recipe.sources
    if group.sources is not None:
        own = group.sources
        chosen = tuple(
            replace(source, parameters=own[source.name])
            for source in recipe.sources
            if source.name in own
        )
    else:
        chosen = tuple(replace(source, parameters={}) for source in chosen)
    return replace(
        recipe,
        method=group.method,
        sources=chosen,
        parameters=group.parameters,
        groups=(),
        slices=(),
    )


def _of_slice(recipe: Recipe, ranges: Mapping[str, tuple[int, int]]) -> Recipe:
    return replace(
        recipe,
        base=recipe.base if BASE in ranges else None,
        sources=tuple(source for source in recipe.sources if source.name in ranges),
    )


def _slice_of(recipe: Recipe, place: Place) -> int | None:
    if not recipe.slices:
        return None
    if place.layer is None:
        return 0 if place.depth == 0 else len(recipe.slices) - 1
    end = 0
    for index, ranges in enumerate(recipe.slices):
        end += slice_length(ranges)
        if place.layer < end:
            return index
    raise IndexError(place.layer)


def slice_length(ranges: Mapping[str, tuple[int, int]]) -> int:
    """The number of layers of a slice."""
    first, end = next(iter(ranges.values()))
    return end - first


def _selector_faults(where: Mapping[str, Any]) -> Iterator[str]:
    if not where:
        yield "fits every tensor; give it a `type`, `filter` or `layers`"
    try:
        check_selector(where)
    except ValueError as error:
        yield str(error)


def _slice_faults(
    ranges: Mapping[str, tuple[int, int]], names: set[str], recipe: Recipe
) -> Iterator[str]:
    unknown = [name for name in ranges if name not in names and name != BASE]
    if unknown:
        yield f"{unknown[0]!r} is no source of the recipe"
    if BASE in ranges and recipe.base is None:
        yield "names the base, and the recipe has none"
    lengths = {end - first for first, end in ranges.values()}
    if len(lengths) > 1:
        yield f"layer ranges of one length expected, got {dict(ranges)}"
