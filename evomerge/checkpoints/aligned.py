"""A model seen in the vocabulary of a merge: its embedding and head have the output's rows.

Which row is which token was worked out in `vocabulary`; all other tensors are the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from torch import Tensor

from evomerge.checkpoints.aligned_rows import AlignedRows
from evomerge.checkpoints.seen import Seen
from evomerge.checkpoints.vocabulary import Vocabulary
from evomerge.checkpoints.vocabulary_tensors import vocabulary_tensors
from evomerge.checkpoints.weights import Model, Weights


class Aligned(Seen):
    """The model called `name` among `models`, in `vocabulary`.

    `tensor` gives an aligned matrix in float32: rows are copied or, for tokens that several other
    models have, their mean. `dtype` is still the model's. The last aligned matrix is kept.
    """

    def __init__(self, name: str, vocabulary: Vocabulary, models: Mapping[str, Model]) -> None:
        super().__init__(models[name])
        self._name = name
        self._vocabulary = vocabulary
        self._models = models
        self._last: tuple[str, Tensor] | None = None

    def origin(self, name: str) -> tuple[Weights, str]:
        """The model, and its own name of the tensor."""
        return self._model, name

    def tensor(self, name: str) -> Tensor:
        """Read only. Raises MissingTensor, ShapeMismatch."""
        if name not in self._aligned:
            return self._model.tensor(name)
        if self._last is None or self._last[0] != name:
            matrices = {model: self._models[model].tensor(name) for model in self._models}
            rows = AlignedRows(self._vocabulary, matrices, name)
            self._last = (name, rows.rows(self._name, 0, self._vocabulary.rows))
        return self._last[1]

    def shape(self, name: str) -> tuple[int, ...]:
        own = self._model.shape(name)
        return (self._vocabulary.rows, *own[1:]) if name in self._aligned else own

    @cached_property
    def _aligned(self) -> frozenset[str]:
        return frozenset(vocabulary_tensors(self._models[self._name]))
