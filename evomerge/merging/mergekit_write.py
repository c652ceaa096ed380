"""A recipe as a mergekit merge file that computes the same model.

Every parameter is resolved for every tensor and written back as filters and slices, so that values
of any form can be expressed. Knows no checkpoint: the names of the tensors are handed in.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from evomerge.errors import SpecError
from evomerge.merging.layout import Place, layout
from evomerge.merging.mergekit_methods import CHOICES, DECIDED, METHODS, RENAMED
from evomerge.merging.methods import registry
from evomerge.merging.recipe import Recipe
from evomerge.merging.values import Scalar

Resolved = Mapping[str, Mapping[tuple[str | None, str], Scalar]]
"""By tensor: by (model, or None for the merge's own; mergekit's name of the parameter)."""


def write_mergekit(
    recipe: Recipe, names: Iterable[str], *, dtype: str | None = None
) -> dict[str, Any]:
    """A mergekit document for a model with these tensors, to be dumped as YAML.

    `dtype` is what the result is rounded to where the recipe does not say. mergekit computes in
    float32, as we do. Masks of DARE and the like are other random numbers there. Raises SpecError
    with everything that mergekit cannot express.
    """
    places = layout(names)
    faults = list(dict.fromkeys(_faults(recipe, places)))
    if faults:
        raise SpecError("recipe, as a mergekit file", faults)
    resolved = {name: _resolved(recipe, place) for name, place in places.items()}
    document: dict[str, Any] = {"merge_method": recipe.method}
    base = _base(recipe)
    if base is not None:
        document["base_model"] = base
    document |= _body(recipe, base, resolved, places)
    rounded = recipe.dtype or dtype
    document["dtype"] = "float32"
    if rounded not in (None, "float32"):
        document["out_dtype"] = rounded
    return document


def _faults(recipe: Recipe, places: Mapping[str, Place]) -> Iterator[str]:
    method = METHODS.get(recipe.method)
    if method is None:
        yield f"method: mergekit has no {recipe.method!r}"
        return
    paths = [source.model.path for source in recipe.sources]
    if len(set(paths)) < len(paths):
        yield "sources: two of them are the same model, which mergekit refuses"
    if method.base == "start" and recipe.base is not None and recipe.base.path in paths:
        yield "sources: one of them is the base, which mergekit leaves out"
    known = {RENAMED.get(name, name) for name in (*method.source, *method.recipe)}
    for place in places.values():
        resolved = registry.coefficients(recipe, place, (1,))
        for parameter in registry.get(recipe.method).parameters:
            values = resolved.source.get(parameter.name) or (resolved.recipe[parameter.name],)
            yield from _value_faults(recipe, parameter.name, parameter.default, values, known)


def _value_faults(
    recipe: Recipe, name: str, default: Scalar, values: Sequence[Scalar], known: set[str]
) -> Iterator[str]:
    if name == "rescale" and "unbiased" in values:
        yield "rescale: mergekit has no 'unbiased', it rescales to the L1 norm ('l1') or not at all"
    if name in known:
        return
    if name == "origin":
        if "base" in values and METHODS[recipe.method].base != "start":
            yield f"origin: mergekit's {recipe.method} merges whole models only ('zero')"
        return
    needed = DECIDED.get(name, default)
    for value in values:
        if value != needed:
            yield f"{name}: mergekit's {recipe.method} has only {needed!r}, the recipe {value!r}"


def _base(recipe: Recipe) -> str | None:
    """`base_model`: what the result's config comes from, too."""
    role, first = METHODS[recipe.method].base, recipe.sources[0].model.path
    if role == "first":
        return first
    if role == "model":
        listed = recipe.base and any(s.model.path == recipe.base.path for s in recipe.sources)
        return recipe.base.path if recipe.base and listed else first
    return recipe.base.path if recipe.base and _starts_from_base(recipe) else None


def _starts_from_base(recipe: Recipe) -> bool:
    """A base that is only the donor of config and tokenizer would make task vectors in mergekit."""
    needs = registry.get(recipe.method).needs_base
    return needs or recipe.parameters.get("origin") == "base"


def _resolved(recipe: Recipe, place: Place) -> dict[tuple[str | None, str], Scalar]:
    known = registry.coefficients(recipe, place, (1,))
    method = METHODS[recipe.method]
    paths = {source.name: source.model.path for source in recipe.sources}
    found: dict[tuple[str | None, str], Scalar] = {
        (paths[source], name): value
        for name in method.source
        if name in known.source
        for source, value in zip(known.names, known.source[name], strict=True)
    }
    for name in method.recipe:
        ours = RENAMED.get(name, name)
        if ours in known.recipe:
            value = known.recipe[ours]
            found[None, name] = value == CHOICES[name, True] if (name, True) in CHOICES else value
    return found


def _body(
    recipe: Recipe, base: str | None, resolved: Resolved, places: Mapping[str, Place]
) -> dict[str, Any]:
    """Models and parameters; slices of layers where a parameter varies over depth."""
    models = [source.model.path for source in recipe.sources]
    if base is not None and base not in models:
        models.insert(0, base)
    if not _varies_over_layers(resolved, places):
        return {
            "models": [_entry(model, resolved) for model in models],
            **_parameters(None, resolved),
        }
    slices = []
    for first, end, part in _runs(resolved, places):
        sources = [{**_entry(model, part), "layer_range": [first, end]} for model in models]
        slices.append({"sources": sources, **_parameters(None, part)})
    return {"slices": slices}


def _varies_over_layers(resolved: Resolved, places: Mapping[str, Place]) -> bool:
    kinds: dict[str, Any] = {}
    return any(
        kinds.setdefault(re.sub(r"\d+", "", name, count=1), values) != values
        for name, values in resolved.items()
        if places[name].layer is not None
    )


def _runs(
    resolved: Resolved, places: Mapping[str, Place]
) -> Iterator[tuple[int, int, dict[str, Mapping[tuple[str | None, str], Scalar]]]]:
    """Runs of equal layers with their tensors; embeddings go with the first, the rest outside the
    layers with the last, as mergekit has it."""
    layers: dict[int, dict[str, Any]] = {}
    for name, place in places.items():
        if place.layer is not None:
            layers.setdefault(place.layer, {})[name] = resolved[name]
    last = max(layers)

    def key(layer: int) -> Any:
        return {name.replace(f".{layer}.", ".", 1): v for name, v in layers[layer].items()}

    for _, run in groupby(sorted(layers), key):
        numbers = list(run)
        part = {name: values for number in numbers for name, values in layers[number].items()}
        for name, place in places.items():
            home = 0 if place.depth == 0 else last
            if place.layer is None and home in numbers:
                part[name] = resolved[name]
        yield numbers[0], numbers[-1] + 1, part


def _entry(model: str, resolved: Resolved) -> dict[str, Any]:
    return {"model": model, **_parameters(model, resolved)}


def _parameters(model: str | None, resolved: Resolved) -> dict[str, Any]:
    names = [name for owner, name in next(iter(resolved.values())) if owner == model]
    settings = {
        name: _setting({tensor: values[model, name] for tensor, values in resolved.items()})
        for name in names
    }
    return {"parameters": settings} if settings else {}


def _setting(values: Mapping[str, Scalar]) -> Any:
    """A scalar, or filters for the tensors that differ from most."""
    counts = Counter(values.values())
    usual = counts.most_common(1)[0][0]
    rules: list[dict[str, Any]] = []
    for value in counts:
        if value != usual:
            wanted = {tensor for tensor in values if values[tensor] == value}
            rules += [
                {"filter": part, "value": value} for part in _parts(wanted, set(values) - wanted)
            ]
    return [*rules, {"value": usual}] if rules else usual


def _parts(wanted: set[str], others: set[str]) -> Iterator[str]:
    """Few parts of names that select the wanted tensors and no others."""
    parts = {part for name in wanted for part in (*name.split("."), name) if not part.isdigit()}
    fair = [part for part in parts if not any(part in other for other in others)]
    fair.sort(key=lambda part: (len(part), part))
    while wanted:
        covers = {part: {name for name in wanted if part in name} for part in fair}
        best = max(covers, key=lambda part: len(covers[part]), default="")
        if not covers.get(best):
            name = min(wanted)
            raise SpecError(
                "recipe, as a mergekit file",
                [f"{name}: no part of its name tells it from tensors with other parameters"],
            )
        yield best
        wanted = wanted - covers[best]
