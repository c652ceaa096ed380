"""A recipe bound to its checkpoints: every tensor of the merged model, one at a time.

Writes no file and knows no live model; the numbers are computed in `compute`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.adapted import open_models
from evomerge.checkpoints.aligned import Aligned
from evomerge.checkpoints.chat_templates import check_chat_template
from evomerge.checkpoints.compare import compare, token_ids
from evomerge.checkpoints.tokenizer_writer import output_config
from evomerge.checkpoints.vocabulary import Vocabulary, plan_vocabulary
from evomerge.checkpoints.weights import Model, Weights
from evomerge.errors import MergeError, NonFiniteModel, ShapeMismatch, SpecError
from evomerge.merging.compute import BLOCK_SIZE, Operands, merge_tensor
from evomerge.merging.fitted.artifact import Artifact, open_artifact
from evomerge.merging.kernels.facts import Store
from evomerge.merging.layout import layout
from evomerge.merging.methods import registry
from evomerge.merging.methods.base import Blocks, Coefficients, MergeMethod
from evomerge.merging.methods.structural import Built, StructuralMethod
from evomerge.merging.parts import PartKey, part_of, parts, place_in
from evomerge.merging.recipe import BASE, ModelRef, Recipe
from evomerge.merging.stacking import Restacked, Slices, Stack
from evomerge.spec import nearest

# Float buffers that are computed, not learned: scaling one would change the architecture.
_COMPUTED = re.compile(r"(?:^|\.)(?:inv_freq|masked_bias)$")

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Merge:
    """The merged model as a stream of tensors.

    It has the tensors of the anchor: the donor (the base, or the first source of a recipe without
    base); with slices, the stack of their layers. Config and tokenizer are the donor's. Float
    tensors are merged in float32 and rounded once, to nearest even, to the recipe's dtype (the
    anchor's own where the recipe names none); all others are the anchor's.

    What is found out about tensors whatever the coefficients is kept in `store`, if there is one,
    by the digests of the models (by their paths where the recipe has none).

    Raises SpecError for a recipe that its method refuses, MergeError for a model of the recipe
    that is not among `checkpoints` (by path).
    """

    def __init__(
        self,
        recipe: Recipe,
        checkpoints: Mapping[str, Model],
        *,
        block_size: int = BLOCK_SIZE,
        store: Store | None = None,
    ) -> None:
        if problems := _problems(recipe):
            raise SpecError("recipe", problems)
        self.recipe = recipe
        self.models = {model.path: _find(model, checkpoints) for model in recipe.models}
        self.donor = next(iter(self.models.values()))
        self.base: Weights | None = self.models[recipe.base.path] if recipe.base else None
        self.sources: dict[str, Weights] = {
            source.name: self.models[source.model.path] for source in recipe.sources
        }
        self.vocabulary = self._vocabulary(recipe)
        self.anchor: Weights = self.base or next(iter(self.sources.values()))
        if recipe.slices:
            self._stack(recipe.slices)
        self.artifact = self._opened(recipe.artifact) if recipe.artifact else None
        self._built = self._build(registry.STRUCTURAL[recipe.method]) if self.is_built else None
        self.anchor = self._built or self.anchor
        self.names = self.anchor.names
        self._parts = parts(recipe)
        self._surveys: dict[PartKey, Any] = {}
        self._block_size = block_size
        self._store = store
        self._references = {source.name: source.model for source in recipe.sources}
        self._places = layout(self.names)

    @property
    def is_built(self) -> bool:
        """Whether the merge changes structure: the anchor is then the merged model itself."""
        return self.recipe.method in registry.STRUCTURAL

    @property
    def structure(self) -> str | None:
        """What becomes of the sources' structure, in a line; None where it stays as it is."""
        return self._built.structure if self._built is not None else None

    def is_merged(self, name: str) -> bool:
        """Whether a tensor is merged; if not, it is copied from the anchor."""
        if self.is_built:
            return False
        learned = self.anchor.dtype(name).is_floating_point and not _COMPUTED.search(name)
        return learned and math.prod(self.shape(name)) > 0

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a merged tensor."""
        return self.anchor.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that a merged tensor is rounded to."""
        stored = self.anchor.dtype(name)
        if self.recipe.dtype is None or not stored.is_floating_point:
            return stored
        return DTYPES[self.recipe.dtype]

    def write(self, name: str, out: Tensor) -> None:
        """Write one tensor of the merged model into `out` [n], flat and of the merge's dtype.

        Raises NonFiniteModel if a merged value is NaN, or infinite once rounded; ShapeMismatch.
        """
        if not self.is_merged(name):
            out.copy_(self.anchor.tensor(name).reshape(-1))
            if self.is_built and not bool(out.isfinite().all()):
                raise NonFiniteModel(f"{name}: holds NaN or infinity once merged")
            return
        method, coefficients = self.method(name), self.coefficients(name)
        operands = self._operands(coefficients)
        survey, size = self._survey(part_of(self.recipe, self._places[name])), self._block_size
        merge_tensor(method, coefficients, operands, survey, out, block_size=size)

    def tensor(self, name: str) -> Tensor:
        """One tensor of the merged model, in its shape and dtype. Raises as `write` does."""
        out = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.write(name, out.view(-1))
        return out

    @cached_property
    def config(self) -> dict[str, Any]:
        """The merged model's config: the donor's with depth, vocabulary and dtype of the result."""
        config = dict(self.anchor.config)
        if not config:
            return config
        if self.vocabulary is not None:
            before, after = self.donor.config, output_config(self.vocabulary, self.members)
            gone = before.keys() - after.keys()
            changed = {key: value for key, value in after.items() if before.get(key) != value}
            config = {key: value for key, value in config.items() if key not in gone} | changed
        if self.recipe.dtype is not None:
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = self.recipe.dtype
        return config

    @property
    def token_ids(self) -> Mapping[str, int]:
        """The id of every token of the merged model; empty if the donor has no tokenizer."""
        return token_ids(self.donor) if self.vocabulary is None else self.vocabulary.ids

    def nbytes(self, name: str) -> int:
        """Size of a merged tensor."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def inputs(self, name: str) -> list[tuple[Weights, str]]:
        """What one tensor is computed from: models of the recipe, and their own names of it."""
        if self.is_built:
            return []  # several tensors of a model; they are looked at when all is done
        if not self.is_merged(name):
            return [_origin(self.anchor, name)]
        base = [_origin(self.base, name)] if self.base else []
        return base + [self._source(s, name) for s in self.coefficients(name).names]

    def method(self, name: str) -> MergeMethod:
        """The merge method of one tensor."""
        return registry.get(self._part(name).method)

    def coefficients(self, name: str) -> Coefficients:
        """The recipe's parameters, resolved for one merged tensor."""
        place = self._places[name]
        seen = place_in(self.recipe, part_of(self.recipe, place), place)
        known = registry.coefficients(self._part(name), seen, self.shape(name))
        return replace(known, fitted=self.artifact) if self.artifact else known

    def fingerprint(self, name: str) -> Hashable | None:
        """What a merged tensor is a function of, given the same files: equal means equal values.

        None if the tensor depends on the whole model.
        """
        if self._built is not None:
            return self.dtype(name), self._built.fingerprint(name)
        if not self.is_merged(name):
            return self.anchor.path
        if self._survey(part_of(self.recipe, self._places[name])) is not None:
            return None
        known = self.coefficients(name)
        origins = (self._source(source, name) for source in known.names)
        models = tuple((model.path, own) for model, own in origins)
        source = tuple(sorted(known.source.items()))
        recipe = tuple(sorted(known.recipe.items()))
        parameters = (known.names, known.order, source, recipe, known.seed)
        method = self._part(name).method
        seen = repr(self.recipe.tokenizer)
        fitted = self.artifact.digest if self.artifact else None
        return (method, self.dtype(name), self.anchor.path, models, parameters, seen, fitted)

    @property
    def members(self) -> dict[str, Model]:
        """The models by their names in the recipe, the base first."""
        base = {BASE: self.donor} if self.recipe.base else {}
        return base | {s.name: self.models[s.model.path] for s in self.recipe.sources}

    def _opened(self, reference: ModelRef) -> Artifact:
        """The recipe's artifact. Raises MergeError for another one, one of another kind or one of
        other models."""
        artifact = open_artifact(reference.path)
        if reference.digest not in (None, artifact.digest):
            raise MergeError(f"{reference.path}: was fitted again and is another artifact now")
        wanted = {registry.facts(p.recipe.method).artifact for p in parts(self.recipe).values()}
        kind = artifact.provenance.kind
        for other in sorted(filter(None, wanted - {kind})):
            raise MergeError(
                f"{reference.path}: was fitted as {kind!r}, {self.recipe.method} applies {other!r}"
            )
        artifact.check_models(self.recipe)
        return artifact

    def _vocabulary(self, recipe: Recipe) -> Vocabulary | None:
        """The result's vocabulary if the recipe chooses one; all models are then seen in it."""
        if recipe.tokenizer is None:
            return None
        members = self.members
        vocabulary = plan_vocabulary(recipe.tokenizer, members)
        if not vocabulary.is_trivial:
            if self.base is not None:
                self.base = Aligned(BASE, vocabulary, members)
            self.sources = {name: Aligned(name, vocabulary, members) for name in self.sources}
        return vocabulary

    def _build(self, method: StructuralMethod) -> Built:
        places = layout(self.donor.names)

        def resolve(name: str) -> Coefficients:
            return registry.coefficients(self.recipe, places[name], self.donor.shape(name))

        return method.build(self.members, self.artifact, resolve)

    def _stack(self, slices: Slices) -> None:
        """See every model as the slices do."""
        base = Restacked(self.base, BASE, slices) if self.base else None
        own = {name: Restacked(model, name, slices) for name, model in self.sources.items()}
        members = ({BASE: base} if base else {}) | own
        self.base, self.sources = base, {**own}
        self.anchor = Stack(self.donor, members, slices)

    def _part(self, name: str) -> Recipe:
        return self._parts[part_of(self.recipe, self._places[name])].recipe

    def _survey(self, key: PartKey) -> Any:
        """What the method of a part must know of all the tensors of the part."""
        if key not in self._surveys:
            method = registry.get(self._parts[key].recipe.method)
            self._surveys[key] = method.survey(lambda: self._stream(key))
        return self._surveys[key]

    def _stream(self, key: PartKey) -> Iterator[tuple[Coefficients, Blocks]]:
        for name in filter(self.is_merged, self.names):
            if part_of(self.recipe, self._places[name]) == key:
                coefficients = self.coefficients(name)
                yield coefficients, self._operands(coefficients).blocks(self._block_size)

    def _operands(self, coefficients: Coefficients) -> Operands:
        """What one tensor is merged from, its sources in the order of the coefficients."""
        name = coefficients.tensor
        chosen = {s: (self.sources[s], self._stands_for(s, name)) for s in coefficients.names}
        for source, (model, own) in chosen.items():
            if model.shape(own) != self.shape(name):
                raise ShapeMismatch(
                    f"{name}: {self.anchor.path} is {list(self.shape(name))}, source {source!r} is"
                    f" {list(model.shape(own))}; all sources must share the base's"
                    " architecture"
                )
        method = self.method(name)
        wanted = self.base is not None and (method.needs_base or method.takes_base)
        base = self.base.tensor(name).reshape(-1) if self.base and wanted else None
        return Operands(
            base,
            tuple(model.tensor(own).reshape(-1) for model, own in chosen.values()),
            self._store,
            self._key(self.recipe.base, self.base, name) if base is not None else "",
            tuple(self._key(self._references[s], *seen) for s, seen in chosen.items()),
        )

    def _source(self, source: str, name: str) -> tuple[Weights, str]:
        """The model and the tensor in it that a source is merged with."""
        return _origin(self.sources[source], self._stands_for(source, name))

    def _stands_for(self, source: str, name: str) -> str:
        return self.method(name).stands_for(name, source, self.artifact)

    def _key(self, model: ModelRef | None, view: Weights | None, name: str) -> str:
        """What a tensor of a model is, whatever the recipe does with it."""
        assert model is not None
        assert view is not None
        _, own = _origin(view, name)
        seen = self.recipe.tokenizer.to_json() if self.recipe.tokenizer else None
        return json.dumps([model.identity, own, seen])


def open_merge(recipe: Recipe) -> Merge:
    """A recipe with its models opened. Raises SpecError with every reason why they do not fit.

    With an artifact, models are read once to make sure that it was fitted on these.
    """
    models = open_models(model.path for model in recipe.models)
    if recipe.artifact:
        unknown = [model.path for model in recipe.models if model.digest is None]
        recipe = recipe.with_digests({path: models[path].scan().digest for path in unknown})
    merge = Merge(recipe, models)
    problems = compare(
        merge.donor if merge.is_built else merge.anchor,
        merge.sources,
        partial=bool(recipe.slices),
        aligned=recipe.tokenizer is not None,
    )
    if problems:
        raise SpecError("recipe", problems)
    return merge


def _problems(recipe: Recipe) -> list[str]:
    problems = registry.check(recipe)
    if recipe.chat_template is not None:
        problem = check_chat_template(recipe.chat_template)
        problems += [problem] if problem else []
    if recipe.dtype is not None and recipe.dtype not in DTYPES:
        problems.append(f"dtype: {recipe.dtype!r}{nearest(recipe.dtype, DTYPES)}")
    return problems


def _origin(view: Weights, name: str) -> tuple[Weights, str]:
    """The model behind a view, and its own name of a tensor."""
    while isinstance(view, Restacked | Stack | Aligned):
        view, name = view.origin(name)
    return view, name


def _find(model: ModelRef, checkpoints: Mapping[str, Model]) -> Model:
    if model.path not in checkpoints:
        raise MergeError(f"{model.path}: the recipe needs it, open are {', '.join(checkpoints)}")
    return checkpoints[model.path]
