"""Read a recipe file: our YAML, the JSON that `evomerge best` prints, or mergekit's YAML.

Collects every problem of the text; which parameters a method takes is checked by
`evomerge.merging.methods.registry.check`. Opens no checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evomerge.documents import read_yaml
from evomerge.errors import SpecError
from evomerge.merging.mergekit_methods import is_mergekit
from evomerge.merging.recipe import SELECTORS, Group, ModelRef, Recipe, Source
from evomerge.merging.values import Value, check_selector, is_layer_range, normalise
from evomerge.spec import locate, nearest
from evomerge.tokenizer_choice import TokenizerChoice, read_tokenizer

FIT_KEYS = ("calibration", "fit")
"""What says how an artifact is fitted, not how it is applied: `fitted.request` reads these."""

_KEYS = (
    "method",
    "base",
    "sources",
    "parameters",
    "dtype",
    "seed",
    "groups",
    "slices",
    "tokenizer",
    "chat_template",
    "artifact",
    *FIT_KEYS,
)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file: YAML, the JSON that `evomerge best` prints, or mergekit's YAML.

        method: ties
        base: zoo/base
        sources:
          sort: {path: zoo/sort, weight: 0.8, density: 0.3}
          reverse: zoo/reverse
        parameters: {lambda: 1.0}
        groups:                           # tensors with a method of their own; the first fits
          - {type: attention, layers: [0, 4], method: linear, sources: {sort: {weight: 2}}}

    A frankenmerge stacks runs of layers [first, end) of its sources:

        method: passthrough
        sources: {a: models/a, b: models/b}
        slices: [{a: [0, 16]}, {b: [8, 24]}]

    Relative paths are taken from the file's folder. Raises SpecError with every problem.
    """
    document = read_yaml(path)
    if isinstance(document, dict) and isinstance(document.get("recipe"), dict):
        document = document["recipe"]  # all that `evomerge best --json` prints
    if not isinstance(document, dict):
        raise SpecError(str(path), ["a recipe is a mapping with `method`, `base`, `sources`"])
    folder = path.resolve().parent
    if is_mergekit(document):
        from evomerge.merging.mergekit_yaml import read_mergekit  # its methods import recipes

        return read_mergekit(document, folder, subject=str(path))
    faults = [
        f"unknown key {key!r}{nearest(str(key), _KEYS)}" for key in document if key not in _KEYS
    ]
    faults += [f"missing key {key!r}" for key in ("method", "sources") if key not in document]
    faults += list(_mistyped(document))
    base = _read_model("base", document.get("base"), folder, faults)
    artifact = _read_model("artifact", document.get("artifact"), folder, faults)
    sources = tuple(_read_sources(document.get("sources"), folder, faults))
    parameters = _read_parameters(document.get("parameters") or {}, "parameters", faults)
    groups = tuple(_read_groups(document.get("groups") or [], faults))
    slices = tuple(_read_slices(document.get("slices") or [], faults))
    tokenizer = document.get("tokenizer")
    choice = None if tokenizer is None else _tokenizer(tokenizer, faults)
    if faults:
        raise SpecError(str(path), faults)
    return Recipe(
        method=document["method"],
        base=base,
        sources=sources,
        parameters=parameters,
        dtype=document.get("dtype"),
        seed=document.get("seed", 0),
        groups=groups,
        slices=slices,
        tokenizer=choice,
        chat_template=document.get("chat_template"),
        artifact=artifact,
    )


def _tokenizer(document: Any, faults: list[str]) -> TokenizerChoice:
    """A choice as a user writes it, or as `Recipe.to_json` does."""
    try:
        return TokenizerChoice.from_json(document)
    except (KeyError, TypeError):
        return read_tokenizer(document, faults)


def _mistyped(document: Mapping[str, Any]) -> Iterator[str]:
    for key in ("method", "dtype", "chat_template"):
        if not isinstance(document.get(key), str | None):
            yield f"{key}: expected a name, got {document[key]!r}"
    if type(document.get("seed", 0)) is not int:
        yield f"seed: expected a whole number, got {document['seed']!r}"


def _read_model(where: str, entry: Any, folder: Path, faults: list[str]) -> ModelRef | None:
    """A path or hub name, or {path, digest}."""
    if entry is None:
        return None
    document = entry if isinstance(entry, Mapping) else {"path": entry}
    path = document.get("path")
    if not isinstance(path, str):
        faults.append(f"{where}: expected a path or the name of a model on the hub, got {path!r}")
        return None
    return ModelRef(locate(path, folder) or path, document.get("digest"))


def _read_sources(entries: Any, folder: Path, faults: list[str]) -> list[Source]:
    """Sources as a mapping of names, or as the list that `Recipe.to_json` writes."""
    if entries is None:
        return []
    sources = []
    for name, entry in _named(entries, faults):
        where = f"sources.{name}"
        document = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
        if document.get("path") is None:
            faults.append(f"{where}: missing key 'path'")
            continue
        model = _read_model(where, document, folder, faults)
        own = {key: value for key, value in document.items() if key not in ("path", "digest")}
        parameters = _read_parameters(own, where, faults)
        if model is not None:
            sources.append(Source(name, model, parameters))
    return sources


def _named(entries: Any, faults: list[str]) -> list[tuple[str, Any]]:
    """Each source's name and entry; a list may name one twice, which the method's check reports."""
    if isinstance(entries, Mapping) and entries:
        return [(str(name), entry) for name, entry in entries.items()]
    if isinstance(entries, list) and entries and all(isinstance(e, Mapping) for e in entries):
        return [
            (
                str(entry.get("name")),
                {k: v for k, v in entry.items() if k not in ("name", "parameters")}
                | dict(entry.get("parameters") or {}),
            )
            for entry in entries
        ]
    faults.append("sources: expected a mapping of names to paths")
    return []


def _read_parameters(entries: Any, where: str, faults: list[str]) -> dict[str, Value]:
    if not isinstance(entries, Mapping):
        faults.append(f"{where}: expected a mapping")
        return {}
    values: dict[str, Value] = {}
    for name, value in entries.items():
        try:
            values[str(name)] = normalise(value)
        except ValueError as error:
            faults.append(f"{where}.{name}: {error}")
    return values


def _read_groups(entries: Any, faults: list[str]) -> Iterator[Group]:
    if not isinstance(entries, list):
        faults.append("groups: expected a list")
        return
    known = (*SELECTORS, "method", "parameters", "sources")
    for index, entry in enumerate(entries):
        where = f"groups.{index}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
            faults.append(f"{where}: expected a mapping with `method` and type, filter or layers")
            continue
        faults += [
            f"{where}: unknown key {key!r}{nearest(str(key), known)}"
            for key in entry
            if key not in known
        ]
        selector = {key: entry[key] for key in SELECTORS if key in entry}
        try:
            check_selector(selector)
        except ValueError as error:
            faults.append(f"{where}: {error}")
        yield Group(
            selector,
            entry["method"],
            _read_parameters(entry.get("parameters") or {}, f"{where}.parameters", faults),
            _read_own(entry.get("sources"), f"{where}.sources", faults),
        )


def _read_own(entries: Any, where: str, faults: list[str]) -> dict[str, dict[str, Value]] | None:
    """Sources of a group, as names or as a mapping of names to parameters."""
    if entries is None:
        return None
    if isinstance(entries, list):
        entries = {name: {} for name in entries}
    if not isinstance(entries, Mapping):
        faults.append(f"{where}: expected the sources' names, or a mapping of them to parameters")
        return None
    return {
        str(name): _read_parameters(own or {}, f"{where}.{name}", faults)
        for name, own in entries.items()
    }


def _read_slices(entries: Any, faults: list[str]) -> Iterator[dict[str, tuple[int, int]]]:
    if not isinstance(entries, list):
        faults.append("slices: expected a list")
        return
    for index, entry in enumerate(entries):
        if isinstance(entry, Mapping) and entry and all(map(is_layer_range, entry.values())):
            yield {str(name): (run[0], run[1]) for name, run in entry.items()}
        else:
            faults.append(
                f"slices.{index}: expected a mapping of sources to layers [first, end],"
                f" got {entry!r}"
            )
