"""The recipe: sources, merge method and parameters, enough to rebuild a model.

A recipe is data. Its canonical JSON has one form for one meaning, and the digest of that form is
the recipe's identity. Knows nothing of tensors; which parameters a method takes is checked by
`evomerge.merging.methods.check`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evomerge.documents import read_yaml
from evomerge.errors import SpecError
from evomerge.merging.mergekit_methods import is_mergekit
from evomerge.merging.values import Value, normalise
from evomerge.spec import locate, nearest


@dataclass(frozen=True)
class ModelRef:
    """A checkpoint: where it lies and, once known, the digest of its contents."""

    path: str
    digest: str | None = None

    @property
    def identity(self) -> str:
        """The digest of the contents where known, so that a moved checkpoint is the same one."""
        return self.digest or self.path


@dataclass(frozen=True)
class Source:
    """A fine-tuned model with the parameters that are its own."""

    name: str
    model: ModelRef
    parameters: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A merge. `sources` keep their order (SLERP runs from the first to the second).

    `dtype` is what merged float tensors are rounded to, once; None keeps the base's dtype.
    `seed` keys the masks of stochastic methods.
    """

    method: str
    base: ModelRef | None
    sources: tuple[Source, ...]
    parameters: Mapping[str, Value] = field(default_factory=dict)
    dtype: str | None = None
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON data."""
        return {
            "method": self.method,
            "base": _model_json(self.base),
            "sources": [
                {
                    "name": source.name,
                    **(_model_json(source.model) or {}),
                    "parameters": {k: normalise(v) for k, v in source.parameters.items()},
                }
                for source in self.sources
            ],
            "parameters": {k: normalise(v) for k, v in self.parameters.items()},
            "dtype": self.dtype,
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Recipe:
        base = document["base"]
        return cls(
            method=document["method"],
            base=ModelRef(base["path"], base["digest"]) if base else None,
            sources=tuple(
                Source(entry["name"], ModelRef(entry["path"], entry["digest"]), entry["parameters"])
                for entry in document["sources"]
            ),
            parameters=document["parameters"],
            dtype=document["dtype"],
            seed=document["seed"],
        )

    def canonical(self) -> str:
        """Canonical JSON: sorted keys, no spaces, shortest round-trip floats, models by digest."""
        document = self.to_json()
        document["base"] = self.base.identity if self.base else None
        for entry, source in zip(document["sources"], self.sources, strict=True):
            del entry["path"]
            entry["digest"] = source.model.identity
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, as 64 hex digits."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    def with_digests(self, digests: Mapping[str, str]) -> Recipe:
        """The same recipe with the contents' digests of its models, by path."""
        return self._with_models(lambda m: replace(m, digest=digests.get(m.path, m.digest)))

    def located(self, places: Mapping[str, str]) -> Recipe:
        """The same recipe with its models where `places` (path by digest) says they now lie."""
        return self._with_models(lambda m: replace(m, path=places.get(m.digest or "", m.path)))

    def _with_models(self, change: Callable[[ModelRef], ModelRef]) -> Recipe:
        return replace(
            self,
            base=change(self.base) if self.base else None,
            sources=tuple(replace(s, model=change(s.model)) for s in self.sources),
        )


_KEYS = ("method", "base", "sources", "parameters", "dtype", "seed")


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file: YAML, the JSON that `evomerge best` prints, or mergekit's YAML.

        method: ties
        base: zoo/base
        sources:
          sort: {path: zoo/sort, weight: 0.8, density: 0.3}
          reverse: zoo/reverse
        parameters: {lambda: 1.0}

    Relative paths are taken from the file's folder. Raises SpecError with every problem.
    """
    document = read_yaml(path)
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
    sources = tuple(_read_sources(document.get("sources"), folder, faults))
    parameters = _read_parameters(document.get("parameters") or {}, "parameters", faults)
    if faults:
        raise SpecError(str(path), faults)
    return Recipe(
        method=document["method"],
        base=base,
        sources=sources,
        parameters=parameters,
        dtype=document.get("dtype"),
        seed=document.get("seed", 0),
    )


def _model_json(model: ModelRef | None) -> dict[str, Any] | None:
    return None if model is None else {"path": model.path, "digest": model.digest}


def _mistyped(document: Mapping[str, Any]) -> Iterator[str]:
    for key in ("method", "dtype"):
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
