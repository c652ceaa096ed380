"""What a merge asks of a model: its tensors by name, wherever and however they are stored.

A `Checkpoint` is one such model; a model behind an adapter or with its layers stacked anew is
another. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from evomerge.checkpoints.checkpoint import Progress, Scan


class Weights(Protocol):
    """The tensors of one model.

    `path` is what the user called it; `folder` holds its tokenizer and the other small files.
    `names` are sorted and hold each tied weight once, under its canonical name; `tied_names` maps
    the other names to the canonical ones.
    """

    @property
    def path(self) -> str: ...
    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def tied_names(self) -> Mapping[str, str]: ...
    @property
    def non_float_names(self) -> tuple[str, ...]: ...
    def __contains__(self, name: object) -> bool: ...
    def tensor(self, name: str) -> Tensor:
        """Read only. Raises MissingTensor."""

    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def companion(self, name: str) -> Path:
        """Where the small file of that name lies, if there is one."""


class Model(Weights, Protocol):
    """The tensors of one model on disk, and what else lies there."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files."""

    def scan(self, progress: Progress | None = None) -> Scan:
        """Digest of the contents, and tensors with NaN or infinity."""
