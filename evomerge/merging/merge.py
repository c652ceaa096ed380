"""A recipe bound to its checkpoints: every tensor of the merged model, one at a time.

Writes no file and knows no live model; the numbers are computed in `compute`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.errors import MergeError, ShapeMismatch, SpecError
from evomerge.merging.compute import BLOCK_SIZE, Operands, merge_tensor
from evomerge.merging.layout import layout
from evomerge.merging.methods import registry
from evomerge.merging.methods.base import Blocks, Coefficients
from evomerge.merging.recipe import ModelRef, Recipe
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

    It has the tensors of the anchor: the base, or the first source of a recipe without base. Float
    tensors are merged in float32 and rounded once, to nearest even, to the recipe's dtype (the
    anchor's own where the recipe names none); all others are the anchor's.

    Raises SpecError for a recipe that its method refuses, MergeError for a model of the recipe
    that is not among `checkpoints` (by path).
    """

    def __init__(
        self,
        recipe: Recipe,
        checkpoints: Mapping[str, Checkpoint],
        *,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        if problems := _problems(recipe):
            raise SpecError("recipe", problems)
        self.recipe = recipe
        self.base = _find(recipe.base, checkpoints) if recipe.base else None
        self.sources = {s.name: _find(s.model, checkpoints) for s in recipe.sources}
        self.anchor = self.base or next(iter(self.sources.values()))
        self.names = self.anchor.names
        self._method = registry.get(recipe.method)
        self._block_size = block_size
        self._places = layout(self.names)

    def is_merged(self, name: str) -> bool:
        """Whether a tensor is merged; if not, it is copied from the anchor."""
        tensor = self.anchor.tensor(name)
        return tensor.is_floating_point() and tensor.numel() > 0 and not _COMPUTED.search(name)

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
            return
        coefficients = self.coefficients(name)
        operands = self._operands(coefficients)
        survey, size = self._survey, self._block_size
        merge_tensor(self._method, coefficients, operands, survey, out, block_size=size)

    def tensor(self, name: str) -> Tensor:
        """One tensor of the merged model, in its shape and dtype. Raises as `write` does."""
        shape = self.shape(name)
        out = torch.empty(shape, dtype=self.dtype(name))
        self.write(name, out.view(-1))
        return out

    def coefficients(self, name: str) -> Coefficients:
        """The recipe's parameters, resolved for one merged tensor."""
        return registry.coefficients(self.recipe, self._places[name], self.shape(name))

    def fingerprint(self, name: str) -> Hashable | None:
        """What a merged tensor is a function of, given the same files: equal means equal values.

        None if the tensor depends on the whole model.
        """
        models = (self.anchor.path, *(source.path for source in self.sources.values()))
        if not self.is_merged(name):
            return models[:1]
        if self._survey is not None:
            return None
        known = self.coefficients(name)
        source = tuple(sorted(known.source.items()))
        recipe = tuple(sorted(known.recipe.items()))
        parameters = (known.names, known.order, source, recipe, known.seed)
        return (self.recipe.method, self.dtype(name), models, parameters)

    @cached_property
    def _survey(self) -> Any:
        def model() -> Iterable[tuple[Coefficients, Blocks]]:
            for name in filter(self.is_merged, self.names):
                coefficients = self.coefficients(name)
                yield coefficients, self._operands(coefficients).blocks(self._block_size)

        return self._method.survey(model)

    def _operands(self, coefficients: Coefficients) -> Operands:
        """What one tensor is merged from, its sources in the order of the coefficients."""
        name = coefficients.tensor
        for source, checkpoint in self.sources.items():
            if checkpoint.shape(name) != self.shape(name):
                raise ShapeMismatch(
                    f"{name}: {self.anchor.path} is {list(self.shape(name))}, source {source!r} is"
                    f" {list(checkpoint.shape(name))}; all sources must share the base's"
                    " architecture"
                )
        wanted = self._method.needs_base or self._method.takes_base
        base = self.anchor.tensor(name).reshape(-1) if self.base and wanted else None
        sources = (self.sources[source].tensor(name).reshape(-1) for source in coefficients.names)
        return Operands(base, tuple(sources))


def _problems(recipe: Recipe) -> list[str]:
    problems = list(registry.check(recipe))
    if recipe.dtype is not None and recipe.dtype not in DTYPES:
        problems.append(f"dtype: {recipe.dtype!r}{nearest(recipe.dtype, DTYPES)}")
    return problems


def _find(model: ModelRef, checkpoints: Mapping[str, Checkpoint]) -> Checkpoint:
    if model.path not in checkpoints:
        raise MergeError(f"{model.path}: the recipe needs it, open are {', '.join(checkpoints)}")
    return checkpoints[model.path]
