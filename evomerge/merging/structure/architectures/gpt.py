"""Permutation groups of the GPT family: GPT-2, and GPT-NeoX as the Pythia models are.

By the names that checkpoints have on disk. Queries, keys and values share one tensor: in GPT-2 all
queries come before all keys, in GPT-NeoX head follows head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from evomerge.merging.structure.permutations.permutation import Bind, Group
from evomerge.merging.structure.permutations.units import Shapes, blocks, bound, layers, prefix_of

_BOTH = ("weight", "bias")


def gpt2(config: Mapping[str, Any], shapes: Shapes) -> Iterator[Group]:
    """GPT-2: weights are stored [in, out], queries, keys and values beside each other in c_attn."""
    prefix = prefix_of(shapes, "wte.weight")
    every = layers(shapes, f"{prefix}h.")
    width = shapes[f"{prefix}wte.weight"][1]
    places = [(f"{prefix}wte.weight", 1), (f"{prefix}wpe.weight", 1), ("lm_head.weight", 1)]
    norms = [f"{prefix}ln_f.", *(f"{layer}{x}." for layer in every for x in ("ln_1", "ln_2"))]
    places += [(norm + x, 0) for norm in norms for x in ("weight", "bias")]
    for layer in every:
        places += [(f"{layer}{x}.weight", 0) for x in ("attn.c_attn", "mlp.c_fc")]
        places += [(f"{layer}{x}.c_proj.weight", 1) for x in ("attn", "mlp")]
        places += [(f"{layer}{x}.c_proj.bias", 0) for x in ("attn", "mlp")]
    yield Group("residual", "residual", width, bound(shapes, blocks(width), *places))
    heads = int(config["n_head"])
    for layer in every:
        yield from _gpt2_attention(f"{layer}attn.", width, heads, shapes)
        mlp = f"{layer}mlp."
        neurons = blocks(shapes[f"{mlp}c_fc.weight"][1])
        places = [(f"{mlp}c_fc.weight", 1), (f"{mlp}c_fc.bias", 0), (f"{mlp}c_proj.weight", 0)]
        yield Group(mlp[:-1], "mlp", len(neurons), bound(shapes, neurons, *places))


def _gpt2_attention(attention: str, width: int, heads: int, shapes: Shapes) -> Iterator[Group]:
    dim = width // heads
    q, k, v = (blocks(heads, dim, start) for start in (0, width, 2 * width))
    joint, out = f"{attention}c_attn.", f"{attention}c_proj.weight"

    def owns(index: torch.Tensor) -> tuple[Bind, ...]:
        return bound(shapes, index, (f"{joint}weight", 1), (f"{joint}bias", 0))

    name = f"{attention}heads"
    whole = owns(torch.cat([q, k, v], 1)) + bound(shapes, q, (out, 0))
    yield Group(name, "heads", heads, whole)
    for unit in range(heads):
        pairs = owns(torch.stack([q[unit], k[unit]], 1))
        yield Group(f"{name}.{unit}.qk", "qk", dim, pairs, name, unit)
        values = owns(v[unit][:, None]) + bound(shapes, q[unit][:, None], (out, 0))
        yield Group(f"{name}.{unit}.value", "value", dim, values, name, unit)


def gpt_neox(config: Mapping[str, Any], shapes: Shapes) -> Iterator[Group]:
    """GPT-NeoX: of the channels of queries and keys, those that do not turn with the position may
    change places."""
    prefix = prefix_of(shapes, "embed_in.weight")
    every = layers(shapes, f"{prefix}layers.")
    width = shapes[f"{prefix}embed_in.weight"][1]
    places = [(f"{prefix}embed_in.weight", 1), ("embed_out.weight", 1), ("score.weight", 1)]
    norms = [f"{layer}{x}_layernorm." for layer in every for x in ("input", "post_attention")]
    places += [(norm + y, 0) for norm in (f"{prefix}final_layer_norm.", *norms) for y in _BOTH]
    for layer in every:
        places += [(f"{layer}{x}.weight", 1) for x in ("attention.query_key_value", _UP)]
        places += [(f"{layer}{x}.{y}", 0) for x in ("attention.dense", _DOWN) for y in _BOTH]
    yield Group("residual", "residual", width, bound(shapes, blocks(width), *places))
    for layer in every:
        yield from _neox_attention(f"{layer}attention.", config, shapes)
        neurons = blocks(shapes[f"{layer}{_UP}.weight"][0])
        inner = [*((f"{layer}{_UP}.{y}", 0) for y in _BOTH), (f"{layer}{_DOWN}.weight", 1)]
        yield Group(f"{layer}mlp", "mlp", len(neurons), bound(shapes, neurons, *inner))


_UP, _DOWN = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"


def _neox_attention(attention: str, config: Mapping[str, Any], shapes: Shapes) -> Iterator[Group]:
    heads, out = int(config["num_attention_heads"]), f"{attention}dense.weight"
    dim = shapes[out][1] // heads
    joint = [(f"{attention}query_key_value.{y}", 0) for y in _BOTH]
    every, read = blocks(heads, 3 * dim), blocks(heads, dim)
    turning = int(dim * _rotary_share(config))
    name = f"{attention}heads"
    whole = bound(shapes, every, *joint) + bound(shapes, read, (out, 1))
    yield Group(name, "heads", heads, whole)
    for unit in range(heads):
        queries, keys, values = every[unit].view(3, dim)
        pairs = bound(shapes, torch.stack([queries, keys], 1)[turning:], *joint)
        yield Group(f"{name}.{unit}.qk", "qk", dim - turning, pairs, name, unit)
        channels = bound(shapes, values[:, None], *joint)
        channels += bound(shapes, read[unit][:, None], (out, 1))
        yield Group(f"{name}.{unit}.value", "value", dim, channels, name, unit)


def _rotary_share(config: Mapping[str, Any]) -> float:
    """The share of a head's channels that turn; all of them where the config does not say."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return float(rope.get("partial_rotary_factor", config.get("rotary_pct", 1.0)))
