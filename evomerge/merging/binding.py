"""Bind a live model's memory to the names of a checkpoint, so that merges are written in place.

Knows no recipe: what is written, and when, is `materialise`'s business.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.checkpoints.weights import Weights
from evomerge.errors import MergeError, MissingTensor, ShapeMismatch
from evomerge.merging.conversion import Part, places

# Older checkpoints hold the rotary frequencies of every layer; models now compute them.
_STALE = (r"rotary_emb\.inv_freq$",)


@dataclass(frozen=True)
class Scattered:
    """The memory of a tensor that a model keeps in another order, or in several tensors.

    `pieces` pairs live memory with the walk over the stored tensor that fills it: both have the
    live view's sizes; the walk is given as (start, strides) in flat elements.
    """

    pieces: tuple[tuple[Tensor, int, tuple[int, ...]], ...]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the live memory."""
        return self.pieces[0][0].dtype

    def copy_(self, values: Tensor) -> None:
        """Write the elements of the whole tensor, given flat in the checkpoint's order [n]."""
        for live, start, strides in self.pieces:
            live.copy_(values.as_strided(live.shape, strides, values.storage_offset() + start))


Target = Tensor | Scattered
"""The live memory of a stored tensor: a flat view [n] in the same order where there is one."""


def bind(model: torch.nn.Module, checkpoint: Weights) -> dict[str, Target]:
    """The model's parameters and persistent buffers, by the checkpoint's names.

    A stored tensor goes where transformers would load it, whatever it renames, stacks or splits:
    an expert of the checkpoint is a region of the model's fused experts. Raises MissingTensor for
    a tensor that only one side has, ShapeMismatch, and MergeError where the model ties weights
    that the checkpoint does not, or where loading would change values.
    """
    live = {key: tensor.detach() for key, tensor in model.state_dict(keep_vars=True).items()}
    try:
        found = places(model, {name: checkpoint.shape(name) for name in checkpoint.names}, live)
    except (MergeError, ShapeMismatch) as error:
        raise type(error)(f"{checkpoint.path}: {error}") from error
    for name in checkpoint.names:
        if name not in found and not _ignorable(name, model, checkpoint):
            raise MissingTensor(f"{name}: {checkpoint.path} has it, the live model does not")
    _check_filled(live, found, checkpoint)
    return {name: _target(parts, live) for name, parts in found.items()}


def _check_filled(
    live: Mapping[str, Tensor], found: Mapping[str, tuple[Part, ...]], checkpoint: Weights
) -> None:
    """Every live tensor is filled, and by one name only, though several may share its memory."""
    fillers = {part.key: name for name, parts in found.items() for part in parts}
    owners = {_place(live[key]): key for key in fillers if live[key].numel()}
    for key, tensor in live.items():
        if not tensor.numel():
            continue
        if (owner := owners.get(_place(tensor))) is None:
            raise MissingTensor(f"{key}: the live model has it, {checkpoint.path} does not")
        if key in fillers and owner != key:
            raise MergeError(
                f"{fillers[key]}: the live model ties it to {fillers[owner]}, {checkpoint.path}"
                " keeps them apart; load the model from the recipe's own base"
            )


def _target(parts: tuple[Part, ...], live: Mapping[str, Tensor]) -> Target:
    if len(parts) == 1 and parts[0].is_run:
        flat = live[parts[0].key].view(-1)
        return flat[parts[0].live_start :][: math.prod(parts[0].sizes)]
    return Scattered(tuple(_piece(part, live[part.key].view(-1)) for part in parts))


def _piece(part: Part, flat: Tensor) -> tuple[Tensor, int, tuple[int, ...]]:
    start = int(flat.storage_offset()) + part.live_start
    region = flat.as_strided(part.sizes, part.live_strides, start)
    return region, part.stored_start, part.stored_strides


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.data_ptr()


def _ignorable(name: str, model: torch.nn.Module, checkpoint: Weights) -> bool:
    """A tensor that a checkpoint may hold though the model has no use for it."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    known = name in checkpoint.non_float_names
    return known or any(re.search(pattern, name) for pattern in (*patterns, *_STALE))
