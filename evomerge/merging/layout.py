"""Where a tensor sits in a network: its layer, its depth and its type, read off its name.

Knows no architecture: a layer is the first number in a tensor's dotted name, and a type is told
by the words that checkpoints of all families share.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

TensorType = Literal["attention", "mlp", "norm", "embedding", "head", "other"]
TENSOR_TYPES: tuple[TensorType, ...] = get_args(TensorType)

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
# first match wins: `self_attn.q_norm` is a norm, `mlp.gate` an mlp
_WORDS: tuple[tuple[TensorType, re.Pattern[str]], ...] = (
    ("norm", re.compile(r"norm|(?:^|\.)ln_|layernorm")),
    ("head", re.compile(r"lm_head|embed_out|(?:^|\.)score\.|classifier")),
    ("embedding", re.compile(r"embed|(?:^|\.)w[tp]e\.")),
    ("attention", re.compile(r"attn|attention")),
    ("mlp", re.compile(r"mlp|ffn|feed_forward|expert|moe|(?:^|\.)fc\d?\.|intermediate|dense")),
)


@dataclass(frozen=True)
class Place:
    """A tensor's place: `layer` is None outside the layers; `depth` runs from 0 to 1.

    Embeddings lie at depth 0; the final norm and the head at depth 1.
    """

    name: str
    type: TensorType
    layer: int | None
    depth: float


def tensor_type(name: str) -> TensorType:
    """The type of a tensor, by its name: attention, mlp, norm, embedding, head or other."""
    lowered = name.lower()
    return next((kind for kind, words in _WORDS if words.search(lowered)), "other")


def layer_of(name: str) -> int | None:
    """The number of the layer a tensor belongs to, None outside the layers."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def layout(names: Iterable[str]) -> Mapping[str, Place]:
    """The place of every tensor of one model."""
    names = list(names)
    last = max((layer for name in names if (layer := layer_of(name)) is not None), default=0)
    return {name: _place(name, last) for name in names}


def _place(name: str, last: int) -> Place:
    kind, layer = tensor_type(name), layer_of(name)
    if layer is None:
        return Place(name, kind, None, 0.0 if kind == "embedding" else 1.0)
    return Place(name, kind, layer, layer / last if last else 0.0)
