"""The structure of a mergekit merge file: its slices, models and settings, before any method.

A `models` file is one slice of all layers. What is malformed or not supported is collected as
lines of text. Knows no merge method and no recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.checkpoints.files import find_folder, read_config
from evomerge.errors import CheckpointError
from evomerge.merging.values import is_layer_range
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


Layers = tuple[int, int]


@dataclass(frozen=True, order=True)
class Use:
    """A model where a file names it: for the `number`-th time within one slice."""

    path: str
    number: int = 1


@dataclass(frozen=True)
class Slice:
    """A run of layers of the result (None: all of them): its models' parameters, and its own.

    `models` are each model's place in the file and parameters, `runs` the layers that it has there.
    """

    where: str
    layers: Layers | None
    models: Mapping[Use, tuple[str, Mapping[str, Any]]]
    runs: Mapping[Use, Layers]
    parameters: Mapping[str, Any]
    base: str | None


def with_one_module(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """A file of one module, as mergekit-evolve writes its results, without that level."""
    modules = document.get("modules")
    if not isinstance(modules, Mapping) or len(modules) != 1:
        return document
    (inner,) = modules.values()
    if not isinstance(inner, Mapping):
        return document
    return {key: value for key, value in document.items() if key != "modules"} | dict(inner)


def unsupported(document: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a file's top-level keys, but for the method's and the models'."""
    for key in document:
        if key not in _KEYS:
            yield f"unknown key {key!r}{nearest(str(key), _KEYS)}"
    if document.get("modules") is not None:
        yield "modules: models of several modules are not supported; merge one stack of layers"
    if not isinstance(document.get("chat_template"), str | None):
        yield f"chat_template: expected a name or a template, got {document['chat_template']!r}"
    if document.get("tokenizer") is not None and document.get("tokenizer_source") is not None:
        yield "tokenizer: give it or tokenizer_source, not both"
    for key in ("dtype", "out_dtype"):
        if document.get(key) not in (None, *_DTYPES):
            yield f"{key}: expected {', '.join(_DTYPES)}, got {document[key]!r}"
    if not isinstance(document.get("parameters") or {}, Mapping):
        yield "parameters: expected a mapping"


def read_slices(document: Mapping[str, Any], folder: Path, faults: list[str]) -> list[Slice]:
    """The slices of a file, in order, as they lie in the result."""
    given = [key for key in _LAYOUTS if document.get(key) is not None]
    if len(given) != 1:
        faults.append(f"expected one of models and slices, got {' and '.join(given) or 'neither'}")
        return []
    if given == ["models"]:
        models, _ = _sources("models", document["models"], folder, faults)
        return [Slice("", None, models, {}, {}, None)]
    if given == ["slices"]:
        return _stack(document["slices"], folder, faults)
    return []


def is_whole(slices: Sequence[Slice]) -> bool:
    """Whether the result is made of all layers of its models, each where it was.

    If not, it is another architecture: a stack of layers of the models.
    """
    first = slices[0]
    for part in slices:
        if set(part.models) != set(first.models) or any(use.number > 1 for use in part.models):
            return False
        if any(run != part.layers for run in part.runs.values()):
            return False
    end = slices[-1].layers
    return end is None or _layer_count(first) in (None, end[1])


def _stack(entries: Any, folder: Path, faults: list[str]) -> list[Slice]:
    if not isinstance(entries, list) or not entries:
        faults.append("slices: expected a list")
        return []
    stack: list[Slice] = []
    end = 0
    for index, entry in enumerate(entries):
        part = _slice(f"slices.{index}", entry, end, folder, faults)
        if part is not None and part.layers is not None:
            stack.append(part)
            end = part.layers[1]
    return stack if len(stack) == len(entries) else []


def _slice(where: str, entry: Any, start: int, folder: Path, faults: list[str]) -> Slice | None:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("sources"), list):
        faults.append(f"{where}: expected a mapping with `sources`")
        return None
    known = ("sources", "base_model", "parameters", "residual_weight")
    for key in entry:
        if key not in known:
            faults.append(f"{where}: unknown key {key!r}{nearest(str(key), known)}")
    if entry.get("residual_weight") is not None:
        faults.append(f"{where}.residual_weight: not supported; remove it")
    models, runs = _sources(f"{where}.sources", entry["sources"], folder, faults, ranged=True)
    lengths = {end - first for first, end in runs.values()}
    if len(runs) != len(models) or len(lengths) != 1:
        faults.append(f"{where}.sources: expected layer_range [first, end] of one length for all")
        return None
    base = entry.get("base_model")
    base = None if base is None else read_model(f"{where}.base_model", base, folder, faults)
    layers = (start, start + lengths.pop())
    return Slice(where, layers, models, runs, entry.get("parameters") or {}, base)


def _layer_count(part: Slice) -> int | None:
    """The number of layers of the first model, None if its config cannot be had or says nothing."""
    try:
        config = read_config(find_folder(next(iter(part.models)).path))
    except CheckpointError:
        return None  # opening the checkpoint will say why
    inner = config.get("text_config") or config
    count = inner.get("num_hidden_layers", inner.get("n_layer"))
    return count if isinstance(count, int) else None


def _sources(
    where: str, entries: Any, folder: Path, faults: list[str], *, ranged: bool = False
) -> tuple[dict[Use, tuple[str, Mapping[str, Any]]], dict[Use, Layers]]:
    """Each model with its place in the file and its own parameters, and its layers."""
    models: dict[Use, tuple[str, Mapping[str, Any]]] = {}
    runs: dict[Use, Layers] = {}
    if not isinstance(entries, list) or not entries:
        faults.append(f"{where}: expected a list of models")
        return models, runs
    known = ("model", "parameters", "layer_range") if ranged else ("model", "parameters")
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
        path = read_model(f"{place}.model", entry["model"], folder, faults)
        if path is None:
            continue
        use = Use(path, 1 + sum(other.path == path for other in models))
        if use.number > 1 and not ranged:
            faults.append(f"{place}.model: {entry['model']!r} is listed twice")
            continue
        models[use] = (place, entry.get("parameters") or {})
        if ranged and is_layer_range(entry.get("layer_range")):
            first, end = entry["layer_range"]
            runs[use] = (first, end)
    return models, runs


def read_model(where: str, entry: Any, folder: Path, faults: list[str]) -> str | None:
    """A path, MODEL+ADAPTER or the name of a model on the hub, as `ModelRef` wants it."""
    model, adapter = entry, None
    if isinstance(entry, Mapping):
        model, adapter = entry.get("model"), entry.get("lora")
    parts = [_named(model), *([_named(adapter)] if adapter is not None else [])]
    if None in parts:
        faults.append(f"{where}: expected a path or the name of a model on the hub, got {entry!r}")
        return None
    return locate("+".join(part for part in parts if part), folder)


def _named(entry: Any) -> str | None:
    """A name, or {path, revision}, as name or name@revision."""
    if not isinstance(entry, Mapping):
        return entry if isinstance(entry, str) else None
    path, revision = entry.get("path"), entry.get("revision")
    if not isinstance(path, str):
        return None
    return path if revision is None else f"{path}@{revision}"


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
