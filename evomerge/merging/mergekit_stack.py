"""The structure of a mergekit merge file: its slices, models and settings, before any method.

A `models` file is one slice of all layers. What is malformed or not supported is collected as
lines of text. Knows no merge method and no recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.checkpoints.files import find_folder, read_config
from evomerge.errors import CheckpointError
from evomerge.spec import locate, nearest

Rules = list[tuple[str | None, Any]]
"""(filter or None, scalar or gradient): the first that fits a tensor counts; None fits all."""

_LAYOUTS = ("models", "slices", "modules")
_KEYS = (
    *_LAYOUTS,
    "merge_method",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Slice:
    """A run of layers (None: all of them): each model's own parameters, and the slice's."""

    where: str
    layers: tuple[int, int] | None
    models: Mapping[str, tuple[str, Mapping[str, Any]]]
    parameters: Mapping[str, Any]
    base: str | None


def unsupported(document: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a file's top-level keys, but for the method's and the models'."""
    for key in document:
        if key not in _KEYS:
            yield f"unknown key {key!r}{nearest(str(key), _KEYS)}"
    if document.get("modules") is not None:
        yield "modules: models of several modules are not supported; merge one stack of layers"
    if document.get("chat_template") is not None:
        yield "chat_template: not supported; the base's is kept, so set it in the result"
    for key in ("dtype", "out_dtype"):
        if document.get(key) not in (None, *_DTYPES):
            yield f"{key}: expected {', '.join(_DTYPES)}, got {document[key]!r}"
    if not isinstance(document.get("parameters") or {}, Mapping):
        yield "parameters: expected a mapping"
    yield from _tokenizer_faults(document)


def _tokenizer_faults(document: Mapping[str, Any]) -> Iterator[str]:
    given, key = document.get("tokenizer_source"), "tokenizer_source"
    settings = document.get("tokenizer")
    if isinstance(settings, Mapping):
        given, key = settings.get("source"), "tokenizer.source"
        for other in settings:
            if other != "source" and settings[other]:
                yield f"tokenizer.{other}: not supported; the base's tokenizer is kept as it is"
    if given not in (None, "base", document.get("base_model")):
        yield (
            f"{key}: {given!r} is not supported; the result has the base's tokenizer (the first "
            "model's where there is no base_model): write `base`, or leave it out"
        )


def read_slices(document: Mapping[str, Any], folder: Path, faults: list[str]) -> list[Slice]:
    """The slices of a file, in order; adds to `faults` whatever is not one stack of layers."""
    given = [key for key in _LAYOUTS if document.get(key) is not None]
    if len(given) != 1:
        faults.append(f"expected one of models and slices, got {' and '.join(given) or 'neither'}")
        return []
    if given == ["models"]:
        models = _sources("models", document["models"], folder, faults)
        return [Slice("", None, models, {}, None)]
    if given == ["slices"]:
        return _stack(document["slices"], folder, faults)
    return []


def _stack(entries: Any, folder: Path, faults: list[str]) -> list[Slice]:
    """The slices of a file, refused unless they are one stack of the models' own layers."""
    if not isinstance(entries, list) or not entries:
        faults.append("slices: expected a list")
        return []
    count = len(faults)
    slices = [_slice(f"slices.{i}", entry, folder, faults) for i, entry in enumerate(entries)]
    if len(faults) > count:
        return []
    stack = [part for part in slices if part is not None]
    end = 0
    for part in stack:
        assert part.layers is not None
        if part.layers[0] != end:
            faults.append(f"{part.where}: {_FRANKENMERGE.format(end, part.layers[0])}")
            return stack
        end = part.layers[1]
        if set(part.models) != set(stack[0].models):
            faults.append(f"{part.where}.sources: other models than in slices.0; list all of them")
    layers = _layer_count(stack[0])
    if layers is not None and layers != end:
        faults.append(f"{stack[-1].where}: the slices end at layer {end}, the models have {layers}")
    return stack


_FRANKENMERGE = (
    "expected to begin at layer {0}, begins at {1}; slices that repeat, skip or move layers make "
    "another architecture, which is not supported"
)


def _slice(where: str, entry: Any, folder: Path, faults: list[str]) -> Slice | None:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("sources"), list):
        faults.append(f"{where}: expected a mapping with `sources`")
        return None
    known = ("sources", "base_model", "parameters", "residual_weight")
    for key in entry:
        if key not in known:
            faults.append(f"{where}: unknown key {key!r}{nearest(str(key), known)}")
    if entry.get("residual_weight") is not None:
        faults.append(f"{where}.residual_weight: not supported; remove it")
    ranges = {
        tuple(source["layer_range"])
        for source in entry["sources"]
        if isinstance(source, Mapping) and _is_range(source.get("layer_range"))
    }
    models = _sources(f"{where}.sources", entry["sources"], folder, faults, ranged=True)
    if len(ranges) != 1:
        faults.append(f"{where}.sources: expected one layer_range for all, [first, end]")
        return None
    base = entry.get("base_model")
    base = None if base is None else read_model(f"{where}.base_model", base, folder, faults)
    return Slice(where, ranges.pop(), models, entry.get("parameters") or {}, base)


def _is_range(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)


def _layer_count(part: Slice) -> int | None:
    """The number of layers of the first model, None if its config cannot be had or says nothing."""
    try:
        config = read_config(find_folder(next(iter(part.models))))
    except CheckpointError:
        return None  # opening the checkpoint will say why
    inner = config.get("text_config") or config
    count = inner.get("num_hidden_layers", inner.get("n_layer"))
    return count if isinstance(count, int) else None


def _sources(
    where: str, entries: Any, folder: Path, faults: list[str], *, ranged: bool = False
) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Each model with its place in the file and its own parameters."""
    if not isinstance(entries, list) or not entries:
        faults.append(f"{where}: expected a list of models")
        return {}
    known = ("model", "parameters", "layer_range") if ranged else ("model", "parameters")
    models: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for index, entry in enumerate(entries):
        place = f"{where}.{index}"
        if not isinstance(entry, Mapping) or "model" not in entry:
            faults.append(f"{place}: expected a mapping with `model`")
            continue
        faults += [
            f"{place}: unknown key {key!r}{nearest(str(key), known)}"
            for key in entry
            if key not in known
        ]
        model = read_model(f"{place}.model", entry["model"], folder, faults)
        if model in models:
            faults.append(f"{place}.model: {entry['model']!r} is listed twice")
        elif model is not None:
            models[model] = (place, entry.get("parameters") or {})
    return models


def read_model(where: str, entry: Any, folder: Path, faults: list[str]) -> str | None:
    """A path or the name of a model on the hub, as `ModelRef` wants it."""
    revision = None
    if isinstance(entry, Mapping):
        inner = entry.get("model")
        revision = inner.get("revision") if isinstance(inner, Mapping) else None
        adapter = entry.get("lora")
        entry = inner.get("path") if isinstance(inner, Mapping) else inner
        if adapter is not None:
            entry = f"{entry}+{adapter}"
    if not isinstance(entry, str):
        faults.append(f"{where}: expected a path or the name of a model on the hub, got {entry!r}")
        return None
    found = locate(entry, folder) or entry
    if found != entry or Path(entry).exists():
        return found
    if "+" in entry:
        faults.append(
            f"{where}: {entry!r} is a model with a LoRA adapter, which is not supported; merge the "
            "adapter into its model first (peft: merge_and_unload)"
        )
    elif "@" in entry or revision is not None:
        faults.append(
            f"{where}: {entry!r} names a revision, which is not supported; download that revision "
            "and give its folder"
        )
    return found


def read_setting(where: str, setting: Any, faults: list[str]) -> Rules:
    """A parameter's setting as (filter or None, scalar or gradient), up to what fits everything."""
    if not (isinstance(setting, list) and setting and isinstance(setting[0], Mapping)):
        return [(None, _scalar_or_gradient(where, setting, faults))]
    rules: Rules = []
    for index, rule in enumerate(setting):
        if not isinstance(rule, Mapping) or "value" not in rule or set(rule) - {"filter", "value"}:
            faults.append(f"{where}.{index}: expected {{filter, value}}, got {rule!r}")
            continue
        wanted = rule.get("filter")
        wanted = None if wanted == "*" else wanted
        value = _scalar_or_gradient(f"{where}.{index}.value", rule["value"], faults)
        rules.append((wanted, value))
        if wanted is None:
            break
    return rules


def _scalar_or_gradient(where: str, value: Any, faults: list[str]) -> Any:
    entries = value if isinstance(value, list) else [value]
    if entries and all(isinstance(entry, bool | int | float) for entry in entries):
        return entries if len(entries) > 1 else entries[0]
    faults.append(f"{where}: expected a number or a list of numbers, got {value!r}")
    return 0.0
