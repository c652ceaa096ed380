"""A mergekit-evolve file as a study's spec: its genome becomes an inline search space.

Genes have bounds where mergekit-evolve folds with |x| and clamps; docs/from-mergekit.md lists every
difference. Knows no merge method's code and opens no checkpoint, but reads the number of layers off
a config where `layer_granularity` asks for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from evomerge.errors import SpecError
from evomerge.merging.mergekit_methods import CHOICES, DECIDED, METHODS
from evomerge.spec import locate, nearest

TRIALS = 100
"""mergekit-evolve's default of --max-fevals."""
SIGMA0 = 0.1667
"""mergekit-evolve's step, 1/6 of a weight of 1."""

_KEYS = (
    "genome",
    "tasks",
    "limit",
    "num_fewshot",
    "shuffle",
    "random_init",
    "apply_chat_template",
    "fewshot_as_multiturn",
    "include_path",
)
_GENOME_KEYS = (
    "models",
    "merge_method",
    "base_model",
    "tokenizer_source",
    "layer_granularity",
    "normalize",
    "allow_negative_weights",
    "filters",
    "smooth",
)
_METHODS = ("linear", "task_arithmetic", "ties", "dare_ties", "slerp")
_NORMALISED = ("linear", "ties", "dare_ties")
_DECIDED = {
    "ties": ("scope", "ties_at_threshold", "sign_tie", "aggregate"),
    "dare_ties": ("sign_tie", "aggregate"),
}
# the filters that mergekit-evolve's files use, as the tensor types that they select
_TYPES = {
    "self_attn": "attention",
    "attn": "attention",
    "attention": "attention",
    "mlp": "mlp",
    "feed_forward": "mlp",
    "norm": "norm",
    "layernorm": "norm",
    "embed": "embedding",
    "embed_tokens": "embedding",
    "lm_head": "head",
}


def is_mergekit_evolve(document: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a document is a mergekit-evolve file."""
    return isinstance(document, Mapping) and "genome" in document


def read_mergekit_evolve(
    document: Mapping[str, Any], path: Path
) -> tuple[dict[str, Any], list[str]]:
    """The study's spec as a document, and a line for each thing that is done another way here.

    The study is named after the file. Raises SpecError with every key that is malformed or that we
    do not support.
    """
    faults = list(_key_faults(document))
    genome = document["genome"]
    if not isinstance(genome, Mapping):
        raise SpecError(str(path), [*faults, "genome: expected a mapping"])
    faults += list(_genome_faults(genome, path.resolve().parent))
    tasks = _tasks(document.get("tasks"), faults)
    if faults:
        raise SpecError(str(path), faults)
    spec: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "evolve",
        **_models(genome),
        "space": _space(genome, path.resolve().parent),
        "objective": {"tasks": tasks, "num_fewshot": document.get("num_fewshot")},
        "sampler": {"sigma0": SIGMA0 / (2 if genome.get("allow_negative_weights") else 1)},
        "budget": {"trials": TRIALS},
    }
    if document.get("include_path") is not None:
        spec["objective"]["include_path"] = document["include_path"]
    return spec, list(_notes(document, genome))


def _key_faults(document: Mapping[str, Any]) -> Iterator[str]:
    for key in document:
        if key not in _KEYS:
            yield f"unknown key {key!r}{nearest(str(key), _KEYS)}"
    for key in ("apply_chat_template", "fewshot_as_multiturn"):
        if document.get(key):
            yield f"{key}: true is not supported; prompts are scored as the task writes them"


def _notes(document: Mapping[str, Any], genome: Mapping[str, Any]) -> Iterator[str]:
    if document.get("limit") is not None:
        yield (
            f"limit: {document['limit']} is not used: the items of each task are split into search,"
            " selection and report parts; write a spec with `objective.split` to choose how many"
        )
    if document.get("shuffle"):
        yield "shuffle is not used: items are split by the hash of their content"
    if document.get("random_init"):
        yield "random_init is not used: the search starts at equal weights and density 1"
    if "apply_chat_template" not in document:
        yield "apply_chat_template is off here, and on by default in mergekit-evolve"
    if genome.get("base_model") is None:
        yield f"genome.base_model: none is named; {genome['models'][0]} stands as the base"
    yield f"budget: {TRIALS} trials, as --max-fevals by default"


def _genome_faults(genome: Mapping[str, Any], folder: Path) -> Iterator[str]:
    for key in genome:
        if key not in _GENOME_KEYS:
            yield f"genome: unknown key {key!r}{nearest(str(key), _GENOME_KEYS)}"
    method, models = genome.get("merge_method"), genome.get("models")
    if method not in _METHODS:
        yield f"genome.merge_method: unknown {method!r}{nearest(str(method), _METHODS)}"
    base = genome.get("base_model")
    if not (isinstance(models, list) and models and all(isinstance(m, str) for m in models)):
        yield f"genome.models: expected a list of paths or names of models, got {models!r}"
    else:
        yield from _model_faults([*models, *([base] if base else [])], folder)
        if method == "slerp" and len(models) != 2:
            yield f"genome.models: slerp merges two models here, not {len(models)}; choose two"
    if base is None and method in ("task_arithmetic", "ties", "dare_ties"):
        yield f"genome.base_model: missing; {method} starts from it"
    if genome.get("tokenizer_source") not in (None, "base", base):
        yield "genome.tokenizer_source: the result has the base's tokenizer; write `base`"
    yield from _shape_faults(genome, folder)


def _model_faults(models: Sequence[str], folder: Path) -> Iterator[str]:
    for model in models:
        if locate(model, folder) == model and ("+" in model or "@" in model):
            yield (
                f"genome: {model!r} names an adapter or a revision, which is not supported; merge "
                "or download it first and give its folder"
            )


def _shape_faults(genome: Mapping[str, Any], folder: Path) -> Iterator[str]:
    filters = genome.get("filters") or []
    if not isinstance(filters, list):
        yield f"genome.filters: expected a list, got {filters!r}"
        return
    for wanted in filters:
        if wanted not in _TYPES:
            yield f"genome.filters: {wanted!r} is no tensor type; use some of {', '.join(_TYPES)}"
    kinds = [_TYPES.get(wanted) for wanted in filters]
    if len(set(kinds)) < len(kinds):
        yield "genome.filters: two of them select the same type of tensors; keep one"
    if genome.get("merge_method") == "slerp" and (filters or genome.get("smooth")):
        yield "genome: slerp has neither filters nor smooth in mergekit-evolve; remove them"
    granularity = genome.get("layer_granularity") or 0
    if type(granularity) is not int or granularity < 0:
        yield f"genome.layer_granularity: expected a whole number, got {granularity!r}"
    elif granularity:
        yield from _granularity_faults(genome, granularity, folder)


def _granularity_faults(genome: Mapping[str, Any], granularity: int, folder: Path) -> Iterator[str]:
    count = _layer_count(genome, folder)
    if count is None:
        yield (
            "genome.layer_granularity: the number of layers cannot be read: no config.json in the "
            "base's folder; download the model and give its folder"
        )
    elif count % granularity:
        yield f"genome.layer_granularity: {granularity} does not divide the {count} layers"
    elif count // granularity > 64:
        yield f"genome.layer_granularity: {granularity} makes over 64 groups; take a multiple of it"


def _layer_count(genome: Mapping[str, Any], folder: Path) -> int | None:
    model = genome.get("base_model") or (genome.get("models") or [""])[0]
    try:
        config = json.loads((Path(locate(model, folder) or model) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    count = (config.get("text_config") or config).get("num_hidden_layers")
    return count if isinstance(count, int) else None


def _models(genome: Mapping[str, Any]) -> dict[str, Any]:
    """The base and the sources, each named by the last part of its path."""
    base = genome.get("base_model") or genome["models"][0]
    sources: dict[str, str] = {}
    for model in genome["models"]:
        if model == base and genome["merge_method"] not in ("linear", "slerp"):
            continue  # a task vector of zeros, whatever its weight
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).strip("-._") or "model"
        name, number = stem, 2
        while name in sources:
            name, number = f"{stem}_{number}", number + 1
        sources[name] = model
    return {"base": base, "sources": sources}


def _space(genome: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    method = genome["merge_method"]
    shape = _shape(genome, folder)
    if method == "slerp":
        return {
            "method": method,
            "recipe": {"t": [{**shape, "low": 0.0, "high": 1.0, "init": 0.5}]},
        }
    low = -1.0 if genome.get("allow_negative_weights") else 0.0
    weight = {"low": low, "high": 1.0, "init": 1 / len(genome["models"])}
    per_source = {**shape, "per": ["source", *shape.get("per", [])]}
    source = {"weight": [{**per_source, **weight}]}
    if method in ("ties", "dare_ties"):
        source["density"] = [{**per_source, "low": 0.0, "high": 1.0, "init": 1.0}]
    return {"method": method, "source": source, "recipe": _fixed(genome)}


def _shape(genome: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a factor differs by, beside the source: groups of layers and types of tensors."""
    shape: dict[str, Any] = {}
    granularity = genome.get("layer_granularity") or 0
    groups = (_layer_count(genome, folder) or 0) // granularity if granularity else 1
    if groups > 1:
        shape["knots" if genome.get("smooth") else "blocks"] = groups
    if genome.get("filters"):
        shape["per"] = ["type"]
        shape["types"] = [*(_TYPES[wanted] for wanted in genome["filters"]), "rest"]
    return shape


def _fixed(genome: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that mergekit-evolve does not search, at mergekit's defaults."""
    method, given = genome["merge_method"], genome.get("normalize")
    fixed: dict[str, Any] = {"normalize": method in _NORMALISED if given is None else bool(given)}
    if method != "linear":
        fixed["lambda"] = float(METHODS[method].recipe["lambda"])
    if method == "dare_ties":
        fixed["rescale"] = CHOICES["rescale", METHODS[method].recipe["rescale"]]
    return fixed | {name: DECIDED[name] for name in _DECIDED.get(method, ())}


def _tasks(entries: Any, faults: list[str]) -> list[dict[str, Any]]:
    if not isinstance(entries, list) or not entries:
        faults.append("tasks: expected a list of tasks")
        return []
    tasks = []
    for index, entry in enumerate(entries):
        task = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(task, Mapping) or "name" not in task:
            faults.append(f"tasks.{index}: expected a task's name, or {{name, weight, metric}}")
            continue
        known = ("name", "weight", "metric")
        faults += [
            f"tasks.{index}: unknown key {key!r}{nearest(str(key), known)}"
            for key in task
            if key not in known
        ]
        weight = task.get("weight", 1.0)
        if isinstance(weight, int | float) and weight < 0:
            faults.append(
                f"tasks.{index}.weight: must be above 0; whether less is better is the task's to "
                "say (`higher_is_better`), so write the weight without its sign"
            )
        tasks.append(
            {"task": task["name"], "metric": task.get("metric", "acc,none"), "weight": weight}
        )
    return tasks
