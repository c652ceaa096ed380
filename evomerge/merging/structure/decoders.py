"""Permutation groups of decoders: Llama and its like, their mixtures of experts, and GPT-2.

By the names that checkpoints have on disk. Under rotary positions the channels of queries and keys
have no freedom: each pair turns at a speed of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from evomerge.merging.structure.permutation import Bind, Group, Stacked
from evomerge.merging.structure.units import Shapes, blocks, bound, layers, prefix_of

_NORMS = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "pre_feedforward_layernorm.weight",
    "post_feedforward_layernorm.weight",
)
_EXPERT = {  # gate, up and down of one expert, by the mixture's name on disk
    "block_sparse_moe.": ("w1.weight", "w3.weight", "w2.weight"),
    "mlp.": ("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
}


def decoder(config: Mapping[str, Any], shapes: Shapes) -> Iterator[Group]:
    """Llama, Mistral, Qwen2, Qwen3, Gemma and their mixtures, tied embeddings or not.

    Residual stream, and in each layer MLP neurons, key-value heads with their query heads and value
    channels, experts with their neurons.
    """
    prefix = prefix_of(shapes, "layers.0.self_attn.q_proj.weight")
    every = layers(shapes, f"{prefix}layers.")
    stream = blocks(shapes[f"{prefix}norm.weight"][0])
    ends = [(f"{prefix}embed_tokens.weight", 1), ("lm_head.weight", 1), ("score.weight", 1)]
    places = [*ends, (f"{prefix}norm.weight", 0)]
    for layer in every:
        places += _stream_places(layer, shapes)
    yield Group("residual", "residual", len(stream), bound(shapes, stream, *places))
    for layer in every:
        yield from _attention(f"{layer}self_attn.", int(config["num_attention_heads"]), shapes)
        for part in ("mlp.", "mlp.shared_expert."):
            yield from _mlp(layer + part, shapes)
        for mixture, names in _EXPERT.items():
            yield from _experts(layer + mixture, names, shapes)


def _stream_places(layer: str, shapes: Shapes) -> Iterator[tuple[str, int]]:
    """Where a layer reads the residual stream, and where it writes to it."""
    yield from ((f"{layer}{norm}", 0) for norm in _NORMS)
    yield from ((f"{layer}self_attn.{x}_proj.weight", 1) for x in "qkv")
    yield from ((f"{layer}self_attn.o_proj.{x}", 0) for x in ("weight", "bias"))
    for part in ("mlp.", "mlp.shared_expert."):
        yield from ((f"{layer}{part}{x}_proj.weight", 1) for x in ("gate", "up"))
        yield from ((f"{layer}{part}down_proj.{x}", 0) for x in ("weight", "bias"))
    yield f"{layer}mlp.shared_expert_gate.weight", 1
    for mixture, (gate, up, down) in _EXPERT.items():
        yield f"{layer}{mixture}gate.weight", 1
        for expert in layers(shapes, f"{layer}{mixture}experts."):
            yield from ((expert + gate, 1), (expert + up, 1), (expert + down, 0))


def _mlp(mlp: str, shapes: Shapes) -> Iterator[Group]:
    if f"{mlp}up_proj.weight" in shapes:
        neurons = blocks(shapes[f"{mlp}up_proj.weight"][0])
        places = [(f"{mlp}{x}_proj.{y}", 0) for x in ("gate", "up") for y in ("weight", "bias")]
        places.append((f"{mlp}down_proj.weight", 1))
        yield Group(mlp[:-1], "mlp", len(neurons), bound(shapes, neurons, *places))


def _attention(attention: str, heads: int, shapes: Shapes) -> Iterator[Group]:
    """Key-value heads with the query heads that read them; query heads, value channels inside."""
    queries = shapes[f"{attention}q_proj.weight"][0]
    dim = queries // heads
    kv = shapes[f"{attention}k_proj.weight"][0] // dim
    each = heads // kv
    q, k, v = ([(f"{attention}{x}_proj.{y}", 0) for y in ("weight", "bias")] for x in "qkv")
    o = f"{attention}o_proj.weight", 1
    name = f"{attention}kv"
    yield Group(
        name,
        "kv",
        kv,
        bound(shapes, blocks(kv, dim), *k, *v) + bound(shapes, blocks(kv, each * dim), *q, o),
    )
    for unit in range(kv):
        index = blocks(each, dim, unit * each * dim)
        query = bound(shapes, index, *q, o)
        yield Group(f"{name}.{unit}.query", "query", each, query, name, unit)
        channels = bound(shapes, blocks(dim, 1, unit * dim), *v) + bound(shapes, index.T, o)
        yield Group(f"{name}.{unit}.value", "value", dim, channels, name, unit)


def _experts(mixture: str, names: tuple[str, ...], shapes: Shapes) -> Iterator[Group]:
    experts = layers(shapes, f"{mixture}experts.")
    if not experts:
        return
    stacked = tuple(Stacked(tuple(expert + name for expert in experts)) for name in names)
    router = bound(shapes, blocks(len(experts)), (f"{mixture}gate.weight", 0))
    group = f"{mixture}experts"
    yield Group(group, "experts", len(experts), router + stacked)
    gate, up, down = names
    for unit, expert in enumerate(experts):
        neurons = blocks(shapes[expert + gate][0])
        places = (expert + gate, 0), (expert + up, 0), (expert + down, 1)
        binds = bound(shapes, neurons, *places)
        yield Group(f"{group}.{unit}.neurons", "neurons", len(neurons), binds, group, unit)


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
