"""Write a recipe's merged weights into a live model, in place.

The hot path of a search: the live model is the only private copy of the weights, and tensors whose
parameters did not change since the last write are left alone. Knows nothing of studies and scores.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.errors import CheckpointError, MergeError, MissingTensor, ShapeMismatch
from evomerge.merging.compute import BLOCK_SIZE
from evomerge.merging.merge import DTYPES, Merge
from evomerge.merging.recipe import Recipe

# Older checkpoints hold the rotary frequencies of every layer; models now compute them.
_STALE = (r"rotary_emb\.inv_freq$",)


def load_model(
    checkpoint: Checkpoint, dtype: str | None = None, device: str = "cpu"
) -> tuple[torch.nn.Module, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    `dtype` is a name in `merge.DTYPES`; None takes the checkpoint's own. Code that comes with a
    checkpoint is never run. Raises CheckpointError for what transformers cannot load.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted = DTYPES[dtype] if dtype else "auto"
    try:
        with _no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder, dtype=wanted, use_safetensors=True, trust_remote_code=False
            )
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint.path}: transformers cannot load it: {reason}"
        ) from error
    return model.requires_grad_(False).to(device).eval(), tokenizer


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Materialiser:
    """Writes one recipe after another into `model`.

    `checkpoints` holds every model that the recipes may name, by path. Nothing else may write to
    the model's weights meanwhile.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        checkpoints: Mapping[str, Checkpoint],
        *,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        self._model = model
        self._checkpoints = dict(checkpoints)
        self._block_size = block_size
        self._targets: dict[str, dict[str, Tensor]] = {}
        self._written: dict[str, Hashable] = {}

    @torch.no_grad()
    def write(self, recipe: Recipe) -> None:
        """Make the model the one that `recipe` describes.

        Merged values are rounded once to the recipe's dtype, so the model is the export as
        transformers would load it into the model's dtype. After an error the model is neither
        the old nor the new one, and the next write makes it whole.

        Raises NonFiniteModel, naming the tensor; SpecError, MergeError or CheckpointError for
        a recipe that does not fit the model or its checkpoints.
        """
        merge = Merge(recipe, self._checkpoints, block_size=self._block_size)
        for name, target in self._bound(merge.anchor).items():
            fingerprint = merge.fingerprint(name)
            if fingerprint is not None and self._written.get(name) == fingerprint:
                continue
            self._written.pop(name, None)
            if target.dtype == merge.dtype(name):
                merge.write(name, target)
            else:
                target.copy_(merge.tensor(name).view(-1))
            self._written[name] = fingerprint

    def _bound(self, anchor: Checkpoint) -> dict[str, Tensor]:
        if anchor.path not in self._targets:
            self._targets[anchor.path] = bind(self._model, anchor)
        return self._targets[anchor.path]


def bind(model: torch.nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Flat views of the model's parameters and persistent buffers, by the checkpoint's names.

    The names may differ by the prefix of the inner model (`transformer.h.0` and `h.0`). Raises
    MissingTensor for a tensor that only one side has, ShapeMismatch, and MergeError where the model
    ties weights that the checkpoint does not.
    """
    live = model.state_dict(keep_vars=True)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    keys = {name: _key(name, live, prefix) for name in checkpoint.names}
    unknown = [n for n, key in keys.items() if key is None and not _ignorable(n, model, checkpoint)]
    if unknown:
        raise MissingTensor(f"{unknown[0]}: {checkpoint.path} has it, the live model does not")
    targets = {name: live[key].detach() for name, key in keys.items() if key is not None}
    owners = {_place(target): name for name, target in targets.items() if target.numel()}
    for key, tensor in live.items():
        if tensor.numel() and _place(tensor.detach()) not in owners:
            raise MissingTensor(f"{key}: the live model has it, {checkpoint.path} does not")
    for name, target in targets.items():
        if tuple(target.shape) != checkpoint.shape(name):
            raise ShapeMismatch(
                f"{name}: {checkpoint.path} is {list(checkpoint.shape(name))},"
                f" the live model is {list(target.shape)}"
            )
        if target.numel() and (owner := owners[_place(target)]) != name:
            raise MergeError(
                f"{name}: the live model ties it to {owner}, {checkpoint.path} keeps them apart;"
                " load the model from the recipe's own base"
            )
    return {name: target.view(-1) for name, target in targets.items()}


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.data_ptr()


def _key(name: str, live: Mapping[str, Any], prefix: str) -> str | None:
    spellings = (name, prefix + name, name.removeprefix(prefix))
    return next((spelling for spelling in spellings if spelling in live), None)


def _ignorable(name: str, model: torch.nn.Module, checkpoint: Checkpoint) -> bool:
    """A tensor that a checkpoint may hold though the model has no use for it."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    known = name in checkpoint.non_float_names
    return known or any(re.search(pattern, name) for pattern in (*patterns, *_STALE))
