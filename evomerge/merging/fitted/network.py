"""A live model in which merged weights are tried on data, and whose gradients are taken.

Speaks of weights by their stored names, whatever transformers fuses or renames. Holds one copy of
the weights, and of one gradient at a time. Knows no recipe and no fitted method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.weights import Weights
from evomerge.errors import MergeError
from evomerge.merging.binding import bind
from evomerge.merging.conversion import Part, places
from evomerge.merging.fitted.calibration import Batch
from evomerge.merging.fitted.encoder_decoder import Sides, sides
from evomerge.merging.materialise import load_model

TakeGradient = Callable[[str, Tensor], None]
"""Is handed ∂L/∂W of a stored tensor, in its stored shape, float32; must not keep it."""


class Network:
    """The model of `anchor` in float32, its weights `anchor`'s until others are written; also of
    one behind an adapter, of which transformers loads the base alone.

    `learned` are the stored names of the float tensors that are parameters of the model.
    `flops` counts what forward and backward passes cost, by 2·P and 4·P for each token. `model` is
    a live model of the anchor's shape, to be used in place of one loaded from its folder.
    """

    def __init__(
        self,
        anchor: Weights,
        *,
        device: str = "cpu",
        checkpointing: bool = False,
        model: Any = None,
    ) -> None:
        loaded = model is None
        if loaded:
            model, _ = load_model(anchor, "float32", device, encoder_decoder=True)
        self.model: Any = model
        if checkpointing:
            _recompute_activations(self.model)
            self.model.train()  # without it, transformers checkpoints nothing
            _without_dropout(self.model)
        self.device = device
        self.flops = 0.0
        self._targets = bind(self.model, anchor)
        live = {
            key: tensor.detach() for key, tensor in self.model.state_dict(keep_vars=True).items()
        }
        self._parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        shapes = {name: anchor.shape(name) for name in anchor.names}
        found = places(self.model, shapes, live)
        self.parts: dict[str, tuple[Part, ...]] = {
            name: parts
            for name, parts in found.items()
            if all(part.key in self._parameters for part in parts)
        }
        self.learned = tuple(self.parts)
        self._shapes = shapes
        self._size = sum(parameter.numel() for parameter in self._parameters.values())
        if loaded and not isinstance(anchor, Checkpoint):
            self.become(anchor, anchor.names)

    def write(self, name: str, values: Tensor) -> None:
        """Set a stored tensor, given in its stored shape; one that the live model computes for
        itself (rotary frequencies of older checkpoints) has no place there and is left."""
        if (target := self._targets.get(name)) is not None:
            with torch.no_grad():
                target.copy_(values.reshape(-1).to(self.device, torch.float32))

    def become(self, model: Weights, names: Iterable[str]) -> None:
        """Set these tensors to a model's."""
        for name in names:
            self.write(name, model.tensor(name))

    def module(self, name: str) -> tuple[str, nn.Module] | None:
        """The module that has a stored tensor for one of its parameters as a whole, and its name;
        None where several tensors make up one parameter."""
        parts = self.parts[name]
        key = parts[0].key
        if len(parts) > 1 or self._parameters[key].shape != self._shapes[name]:
            return None
        path, _, _ = key.rpartition(".")
        module: nn.Module = self.model.get_submodule(path)
        return path, module

    def logits(self, batch: Batch) -> Tensor:
        """Logits [b, t, v] in float32; of an encoder-decoder, 0 at places before the answer."""
        batch = batch.to(self.device)
        self.flops += 2.0 * self._size * int(batch.attention.sum())
        logits: Tensor = self.model(**self.inputs(batch), use_cache=False).logits.float()
        if self._is_encoder_decoder:
            return self._sides(batch).spread(logits, batch.tokens.shape[1])
        return logits

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the model is called with for a batch. An encoder-decoder's decoder is given the
        tokens that count, its encoder those before them; the masks are 1 on real tokens."""
        if not self._is_encoder_decoder:
            return {"input_ids": batch.tokens, "attention_mask": batch.attention}
        found = self._sides(batch)
        return {
            "input_ids": found.encoder,
            "attention_mask": found.encoder_mask,
            "decoder_input_ids": found.decoder,
            "decoder_attention_mask": found.decoder_mask,
        }

    def _sides(self, batch: Batch) -> Sides:
        config = self.model.config
        start, end = config.decoder_start_token_id, config.eos_token_id
        start = config.pad_token_id if start is None else start
        return sides(batch, start=start or 0, end=end if type(end) is int else None)

    @property
    def _is_encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    def backward(self, loss: Tensor, batch: Batch, *, what: str) -> float:
        """Gradients of a scalar loss, handed to whoever `gradients` named; the loss's value.

        Raises MergeError for a loss that is NaN or infinite, before any gradient is taken.
        """
        value = float(loss.detach())
        if not math.isfinite(value):
            raise MergeError(f"{what}: the loss is {value:g}; lower the learning rate, or look for"
                             " NaN in what the sources compute")  # fmt: skip
        self.flops += 4.0 * self._size * int(batch.attention.sum())
        loss.backward()  # type: ignore[no-untyped-call]
        return value

    @contextmanager
    def gradients(self, take: TakeGradient, *, of: Collection[str] = ()) -> Iterator[None]:
        """While the block runs, each backward pass hands every learned tensor's gradient to `take`,
        one at a time, and keeps none. Where `of` names stored tensors, theirs alone are computed,
        and those of what the live model has in one piece with them."""
        collect = _Collector(self, take)
        handles = []
        keys = {part.key for name in of for part in self.parts[name]} or self._parameters.keys()
        for key in keys:
            parameter = self._parameters[key]
            parameter.requires_grad_(True)
            hook = partial(collect, key)
            register: Any = parameter.register_post_accumulate_grad_hook
            handles.append(register(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in self._parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        return self._shapes[name]


class _Collector:
    """Turns gradients of live parameters into those of stored tensors."""

    def __init__(self, network: Network, take: TakeGradient) -> None:
        self._network = network
        self._take = take
        self._by_key: dict[str, list[str]] = {}
        for name, parts in network.parts.items():
            for key in dict.fromkeys(part.key for part in parts):
                self._by_key.setdefault(key, []).append(name)
        self._halves: dict[str, tuple[Tensor, set[str]]] = {}  # of tensors in several parameters

    def __call__(self, key: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        flat = parameter.grad.contiguous().view(-1)
        parameter.grad = None
        for name in self._by_key.get(key, ()):
            parts, shape = self._network.parts[name], self._network.shape(name)
            if len(parts) == 1 and parts[0].is_run:
                start = parts[0].live_start
                self._take(name, flat[start : start + math.prod(shape)].view(shape))
            else:
                self._gather(name, key, flat)

    def _gather(self, name: str, key: str, flat: Tensor) -> None:
        parts, shape = self._network.parts[name], self._network.shape(name)
        fresh = flat.new_empty(math.prod(shape)), {part.key for part in parts}
        whole, missing = self._halves.setdefault(name, fresh)
        for part in (part for part in parts if part.key == key):
            stored = whole.as_strided(part.sizes, part.stored_strides, part.stored_start)
            stored.copy_(flat.as_strided(part.sizes, part.live_strides, part.live_start))
        missing.discard(key)
        if not missing:
            del self._halves[name]
            self._take(name, whole.view(shape))


def _recompute_activations(model: Any) -> None:
    newer = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.20 and later
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
