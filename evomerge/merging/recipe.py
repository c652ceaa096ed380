"""The recipe: sources, merge method and parameters, enough to rebuild a model.

A recipe is data. Its canonical JSON has one form for one meaning, and the digest of that form is
the recipe's identity. Knows nothing of tensors; which parameters a method takes is checked by
`evomerge.merging.methods.check`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from evomerge.merging.values import Value, normalise
from evomerge.tokenizer_choice import TokenizerChoice


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
class Group:
    """Tensors with a merge method of their own.

    `where` says which, as a rule of a value does: {type, filter, layers}. `sources` are the ones
    that take part, with their parameters; None: all, without parameters of their own. What a group
    leaves open has the method's default.
    """

    where: Mapping[str, Any]
    method: str
    parameters: Mapping[str, Value] = field(default_factory=dict)
    sources: Mapping[str, Mapping[str, Value]] | None = None


SELECTORS = ("type", "filter", "layers")

BASE = "base"
"""What a slice calls the recipe's base."""


@dataclass(frozen=True)
class Recipe:
    """A merge. `sources` keep their order (SLERP runs from the first to the second).

    `dtype` is what merged float tensors are rounded to, once; None keeps the base's dtype.
    `seed` keys the masks of stochastic methods. The first of `groups` that fits a tensor decides
    its method. `slices` are the runs of layers [first, end) that are stacked, bottom up: for each,
    the run that each source (and `base`) has a part with; without slices, models are merged whole.
    `tokenizer` is the result's vocabulary where the models' differ; without, they must be one.
    `chat_template` is auto, the name of a format, or a template. `artifact` is what a fit learned
    of these very models, for the methods that apply one.
    """

    method: str
    base: ModelRef | None
    sources: tuple[Source, ...]
    parameters: Mapping[str, Value] = field(default_factory=dict)
    dtype: str | None = None
    seed: int = 0
    groups: tuple[Group, ...] = ()
    slices: tuple[Mapping[str, tuple[int, int]], ...] = ()
    tokenizer: TokenizerChoice | None = None
    chat_template: str | None = None
    artifact: ModelRef | None = None

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """The base, if there is one, and the sources' models."""
        return (*([self.base] if self.base else []), *(source.model for source in self.sources))

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON data; of what most recipes lack, only what there is."""
        groups = {"groups": [_group_json(group) for group in self.groups]} if self.groups else {}
        slices = {"slices": [_slice_json(ranges) for ranges in self.slices]} if self.slices else {}
        tokenizer = {"tokenizer": self.tokenizer.to_json()} if self.tokenizer else {}
        template = {"chat_template": self.chat_template} if self.chat_template else {}
        artifact = {"artifact": _model_json(self.artifact)} if self.artifact else {}
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
            **groups,
            **slices,
            **tokenizer,
            **template,
            **artifact,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Recipe:
        base, tokenizer = document["base"], document.get("tokenizer")
        artifact = document.get("artifact")
        return cls(
            method=document["method"],
            base=_model(base),
            sources=tuple(
                Source(entry["name"], ModelRef(entry["path"], entry["digest"]), entry["parameters"])
                for entry in document["sources"]
            ),
            parameters=document["parameters"],
            dtype=document["dtype"],
            seed=document["seed"],
            groups=tuple(_group(entry) for entry in document.get("groups", ())),
            slices=tuple(_slice(entry) for entry in document.get("slices", ())),
            tokenizer=TokenizerChoice.from_json(tokenizer) if tokenizer else None,
            chat_template=document.get("chat_template"),
            artifact=_model(artifact),
        )

    def canonical(self) -> str:
        """Canonical JSON: sorted keys, no spaces, shortest round-trip floats, models by digest."""
        document = self.to_json()
        document["base"] = self.base.identity if self.base else None
        if self.artifact:
            document["artifact"] = self.artifact.identity
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
            artifact=change(self.artifact) if self.artifact else None,
            sources=tuple(replace(s, model=change(s.model)) for s in self.sources),
        )


def _group_json(group: Group) -> dict[str, Any]:
    own = group.sources
    return {
        **group.where,
        "method": group.method,
        "parameters": {k: normalise(v) for k, v in group.parameters.items()},
        "sources": own and {n: {k: normalise(v) for k, v in p.items()} for n, p in own.items()},
    }


def _group(document: Mapping[str, Any]) -> Group:
    where = {key: document[key] for key in SELECTORS if key in document}
    return Group(where, document["method"], document["parameters"], document["sources"])


def _slice_json(ranges: Mapping[str, tuple[int, int]]) -> dict[str, list[int]]:
    return {name: list(run) for name, run in ranges.items()}


def _slice(document: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {name: (first, end) for name, (first, end) in document.items()}


def _model(document: Mapping[str, Any] | None) -> ModelRef | None:
    return ModelRef(document["path"], document["digest"]) if document else None


def _model_json(model: ModelRef | None) -> dict[str, Any] | None:
    return None if model is None else {"path": model.path, "digest": model.digest}
