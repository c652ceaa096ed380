"""Write a recipe's merged weights into a live model, in place.

The hot path of a search: the live model is the only private copy of the weights, and tensors whose
parameters did not change since the last write are left alone. Knows nothing of studies and scores.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.skeleton import skeleton
from evomerge.checkpoints.weights import Model, Weights
from evomerge.errors import CheckpointError
from evomerge.merging.binding import Target, bind
from evomerge.merging.compute import BLOCK_SIZE
from evomerge.merging.kernels.facts import Memory, Store
from evomerge.merging.merge import DTYPES, Merge
from evomerge.merging.placement import spread
from evomerge.merging.recipe import Recipe


def load_model(
    checkpoint: Weights,
    dtype: str | None = None,
    device: str = "cpu",
    *others: str,
    encoder_decoder: bool = False,
) -> tuple[torch.nn.Module, Any]:
    """A causal language model in evaluation mode, and its tokenizer; with `encoder_decoder`, one of
    that kind where its config says so.

    `dtype` is a name in `merge.DTYPES`; None takes the checkpoint's own. With `others` the layers
    are spread over all devices; inputs go to the first. Code that comes with a checkpoint is never
    run. Raises CheckpointError for what transformers cannot load.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    two_sided = encoder_decoder and checkpoint.config.get("is_encoder_decoder")
    auto: Any = AutoModelForSeq2SeqLM if two_sided else AutoModelForCausalLM
    wanted = DTYPES[dtype] if dtype else "auto"
    placed: dict[str, Any] = {}
    if others:
        empty = skeleton(checkpoint, otherwise="it cannot be spread over several devices")
        placed["device_map"] = spread(empty, (device, *others), DTYPES[dtype] if dtype else None)
    try:
        with no_progress_bars():
            model = auto.from_pretrained(
                checkpoint.folder,
                dtype=wanted,
                use_safetensors=True,
                trust_remote_code=False,
                **placed,
            )
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint.path}: transformers cannot load it: {reason}"
        ) from error
    model = model.requires_grad_(False).eval()
    return model if placed else model.to(device), tokenizer


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """While the block runs, transformers draws none."""
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
    the model's weights meanwhile. `store` keeps what does not depend on coefficients (thresholds,
    inner products) from one write to the next, and may outlive the process; this Materialiser's own
    memory does where there is none, and for a recipe that names a model by its path alone: what is
    there later may be another model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        checkpoints: Mapping[str, Model],
        *,
        block_size: int = BLOCK_SIZE,
        store: Store | None = None,
    ) -> None:
        self._model = model
        self._checkpoints = dict(checkpoints)
        self._block_size = block_size
        self._memory = Memory()
        self._store = store or self._memory
        self._targets: dict[str, dict[str, Target]] = {}
        self._written: dict[str, Hashable] = {}

    @torch.no_grad()
    def write(self, recipe: Recipe, merge: Merge | None = None) -> None:
        """Make the model the one that `recipe` describes; `merge` is the recipe bound to the
        checkpoints, if the caller has it already.

        Merged values are rounded once to the recipe's dtype, so the model is the export as
        transformers would load it into the model's dtype. After an error the model is neither
        the old nor the new one, and the next write makes it whole.

        Raises NonFiniteModel, naming the tensor; SpecError, MergeError or CheckpointError for
        a recipe that does not fit the model or its checkpoints.
        """
        known = all(model.digest for model in recipe.models)
        store = self._store if known else self._memory
        if merge is None:
            merge = Merge(recipe, self._checkpoints, block_size=self._block_size, store=store)
        for name, target in self._bound(merge.anchor).items():
            fingerprint = merge.fingerprint(name)
            if fingerprint is not None and self._written.get(name) == fingerprint:
                continue
            self._written.pop(name, None)
            if isinstance(target, Tensor) and target.dtype == merge.dtype(name):
                merge.write(name, target)
            else:
                target.copy_(merge.tensor(name).view(-1))
            self._written[name] = fingerprint

    def _bound(self, anchor: Weights) -> dict[str, Target]:
        if anchor.path not in self._targets:
            self._targets[anchor.path] = bind(self._model, anchor)
        return self._targets[anchor.path]
