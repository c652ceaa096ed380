"""A model seen in another way: all that a view does not change is the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.weights import Weights


class Seen:
    """`Weights` that hand on what they are asked; a view says what is different."""

    def __init__(self, model: Weights) -> None:
        self._model = model

    @property
    def path(self) -> str:
        return self._model.path

    @property
    def folder(self) -> Path:
        return self._model.folder

    @property
    def config(self) -> dict[str, Any]:
        return self._model.config

    @property
    def names(self) -> tuple[str, ...]:
        return self._model.names

    @property
    def tied_names(self) -> Mapping[str, str]:
        return self._model.tied_names

    @property
    def non_float_names(self) -> tuple[str, ...]:
        return self._model.non_float_names

    def companion(self, name: str) -> Path:
        return self._model.companion(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def tensor(self, name: str) -> Tensor:
        """Read only. Raises MissingTensor."""
        return self._model.tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._model.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._model.dtype(name)
