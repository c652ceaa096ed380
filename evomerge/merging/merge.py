"""A recipe bound to its checkpoints: every tensor of the merged model, streamed in blocks.

The one place where merged values are computed and rounded, so a live model and an exported
checkpoint cannot differ. Writes nothing and knows no live model.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.checkpoint import Checkpoint, is_finite
from evomerge.errors import MergeError, NonFiniteModel, ShapeMismatch, SpecError
from evomerge.merging.layout import layout
from evomerge.merging.methods import registry
from evomerge.merging.methods.base import Block, Blocks, Coefficients
from evomerge.merging.recipe import ModelRef, Recipe
from evomerge.spec import nearest

BLOCK_SIZE = 1 << 17
"""Elements per block: a block of base, sources and result stays in a core's cache."""

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

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The elements of a merged tensor in flat order, in its dtype, a block at a time.

        Raises NonFiniteModel if a merged value is NaN, or infinite once rounded; ShapeMismatch.
        """
        if not self.is_merged(name):
            yield self.anchor.tensor(name).reshape(-1).to(self.dtype(name))
            return
        coefficients = self.coefficients(name)
        blocks = self._inputs(coefficients)
        prepared = self._method.prepare(blocks, coefficients, self._survey)
        for block in blocks():
            yield self._rounded(name, self._method.merge(block, coefficients, prepared))

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
                yield coefficients, self._inputs(coefficients)

        return self._method.survey(model)

    def _inputs(self, coefficients: Coefficients) -> Blocks:
        """Streams the blocks of one tensor, its sources in the order of the coefficients."""
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
        sources = [self.sources[source].tensor(name).reshape(-1) for source in coefficients.names]

        def blocks() -> Iterator[Block]:
            for start in range(0, coefficients.size, self._block_size):
                cut = slice(start, start + self._block_size)
                # Copies, even of float32: no method can write into a file's pages.
                base_block = base[cut].to(torch.float32, copy=True) if base is not None else None
                block = torch.empty(len(sources), len(sources[0][cut]))
                for row, source in zip(block, sources, strict=True):
                    row.copy_(source[cut])
                yield Block(base=base_block, sources=block, start=start)

        return blocks

    def _rounded(self, name: str, merged: Tensor) -> Tensor:
        rounded = merged.to(self.dtype(name))
        if is_finite(rounded):
            return rounded
        if is_finite(merged):
            raise NonFiniteModel(
                f"{name}: a merged value of {float(merged.abs().max()):g} is beyond"
                f" {rounded.dtype}'s largest, {torch.finfo(rounded.dtype).max:g};"
                " merge to bfloat16 or float32"
            )
        raise NonFiniteModel(f"{name}: {self.recipe.method} computed NaN or infinity")


def _problems(recipe: Recipe) -> list[str]:
    problems = list(registry.check(recipe))
    if recipe.dtype is not None and recipe.dtype not in DTYPES:
        problems.append(f"dtype: {recipe.dtype!r}{nearest(recipe.dtype, DTYPES)}")
    return problems


def _find(model: ModelRef, checkpoints: Mapping[str, Checkpoint]) -> Checkpoint:
    if model.path not in checkpoints:
        raise MergeError(f"{model.path}: the recipe needs it, open are {', '.join(checkpoints)}")
    return checkpoints[model.path]
