"""Keys and values that many rows of a batch share, behind transformers' own cache interface.

Knows no architecture: a model that asks its cache for every layer's keys and values gets them,
whoever computed them. Knows nothing of tasks, windows and batches.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from evomerge.scoring.loglikelihood import accepts_logits_to_keep

UNLIMITED = 2**62
_NEEDED = {"past_key_values", "position_ids", "attention_mask", "use_cache"}


def shareable_tokens(model: Any) -> int:
    """Up to how many tokens, padding included, a row may attend to shared keys and values.

    0 where the model has no standard cache of keys and values; its sliding window where it has
    one, since the window counts padding between the parts of a row.
    """
    parameters = inspect.signature(model.forward).parameters.keys()
    if not parameters >= _NEEDED:
        return 0
    if getattr(model, "_is_stateful", False) or model.config.is_encoder_decoder:
        return 0
    try:
        layers = empty_cache(model).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        return 0  # a kind of layer that transformers itself has no growing cache for
    return min(map(_shareable, layers), default=0)


def is_exact(model: Any) -> bool:
    """Whether the model's rounding is fine enough for near ties to be rare."""
    return model.dtype in (torch.float32, torch.float64)


def empty_cache(model: Any) -> Any:
    """transformers' own growing cache for a model."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _shareable(layer: Any) -> int:
    if type(layer) is DynamicSlidingWindowLayer:
        return int(layer.sliding_window)
    return UNLIMITED if type(layer) in (DynamicLayer, DummyLayer) else 0


@dataclass(frozen=True)
class Segment:
    """Every layer's keys and values [b, heads, s, d] of `tokens` s tokens.

    Row i of a batch reads row `rows`[i] of them; without `rows` its own, or the only one.
    """

    cache: Any
    tokens: int
    rows: Tensor | None = None


def read_once(model: Any, tokens: Tensor) -> Segment:
    """Keys and values of a row of tokens [1, s] that other rows begin with."""
    cache = empty_cache(model)
    length = tokens.shape[1]
    model(
        tokens,
        position_ids=torch.arange(length, device=tokens.device)[None],
        past_key_values=cache,
        use_cache=True,
        **({"logits_to_keep": 1} if accepts_logits_to_keep(model) else {}),
    )
    return Segment(cache, length)


def growing_cache(segment: Segment, rows: int) -> Any:
    """A cache that holds the segment's one row for every row, and grows pass by pass."""
    cache = copy.copy(segment.cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in cache.layers:
        if not isinstance(layer, DummyLayer):
            layer.keys = layer.keys.expand(rows, -1, -1, -1)
            layer.values = layer.values.expand(rows, -1, -1, -1)
    return cache


def shared_cache(segments: Sequence[Segment]) -> Any:
    """A cache for one forward pass: it reads the segments, in their order, and then its own."""
    layers = segments[0].cache.layers
    return Cache(
        layers=[
            layer if isinstance(layer, DummyLayer) else _SharedLayer(segments, number)
            for number, layer in enumerate(layers)
        ]
    )


class _SharedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's cache; it keeps what the pass adds, and never a copy of what is shared."""

    def __init__(self, segments: Sequence[Segment], number: int) -> None:
        super().__init__()
        self._parts = [(segment.cache.layers[number], segment.rows) for segment in segments]
        self._tokens = sum(segment.tokens for segment in segments)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        self.is_initialized = True
        keys = [(layer.keys, rows) for layer, rows in self._parts]
        values = [(layer.values, rows) for layer, rows in self._parts]
        return self._joined(keys, key_states), self._joined(values, value_states)

    def get_seq_length(self) -> int:
        return self._tokens + (self.keys.shape[-2] if self.is_initialized else 0)

    def _joined(self, parts: Sequence[tuple[Tensor, Tensor | None]], own: Tensor) -> Tensor:
        """What is shared and what is new, each copied once."""
        batch, heads, length, size = own.shape
        joined = own.new_empty(batch, heads, self._tokens + length, size)
        start = 0
        for states, rows in parts:
            place = joined[:, :, start : start + states.shape[-2]]
            if rows is None:
                place.copy_(states)
            else:
                # rows are where inputs are; the layer may be elsewhere
                torch.index_select(states, 0, rows.to(states.device), out=place)
            start += states.shape[-2]
        joined[:, :, start:] = own
        return joined
