"""Permutation groups of T5 and its like: encoder and decoder, dense or with experts (Switch).

By the names that checkpoints have on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from evomerge.merging.structure.architectures.expert_units import experts
from evomerge.merging.structure.permutations.permutation import Group
from evomerge.merging.structure.permutations.units import (
    Place,
    Shapes,
    blocks,
    bound,
    channels,
    fixed,
    layers,
    prefix_of,
)

_ATTENTIONS = ("SelfAttention.", "EncDecAttention.")
_MLPS = ("DenseReluDense.", "mlp.")
_IN = ("wi.weight", "wi_0.weight", "wi_1.weight")
_OUT = "wo.weight"


def t5(config: Mapping[str, Any], shapes: Shapes) -> Iterator[Group]:
    """T5, mT5, UMT5 and Switch Transformers, tied embeddings or not; an encoder alone.

    One residual stream: both halves read the same embedding. Layers that share a relative position
    bias share the order of their heads. Of an encoder alone the stream is what it gives out.
    """
    prefix = prefix_of(shapes, "shared.weight")
    stacks = {half: layers(shapes, f"{prefix}{half}.block.") for half in ("encoder", "decoder")}
    places = [(f"{prefix}shared.weight", 1), ("lm_head.weight", 1)]
    for half, every in stacks.items():
        places += [(f"{prefix}{half}.embed_tokens.weight", 1)]
        places += [(f"{prefix}{half}.final_layer_norm.weight", 0)]
        places += [place for block in every for place in _stream_places(block, shapes)]
    yield (channels if stacks["decoder"] else fixed)("residual", places, shapes)
    heads = int(config["num_heads"])
    for every in stacks.values():
        for attentions in _alike(every, shapes):
            yield from _heads(attentions, heads, shapes)
        for layer in (layer for block in every for layer in layers(shapes, f"{block}layer.")):
            yield from _inner(layer, shapes)


def _stream_places(block: str, shapes: Shapes) -> Iterator[Place]:
    """Where a block reads the residual stream, and where it writes to it."""
    for layer in layers(shapes, f"{block}layer."):
        yield f"{layer}layer_norm.weight", 0
        for attention in _ATTENTIONS:
            yield from ((f"{layer}{attention}{x}.weight", 1) for x in "qkv")
            yield f"{layer}{attention}o.weight", 0
        yield f"{layer}mlp.router.classifier.weight", 1
        for mlp in _MLPS:
            for one in (layer + mlp, *layers(shapes, f"{layer}{mlp}experts.expert_")):
                yield from ((one + weight, 1) for weight in _IN)
                yield one + _OUT, 0


def _alike(every: list[str], shapes: Shapes) -> list[list[str]]:
    """The attentions of a stack, those together whose heads share a relative position bias: a
    layer without its own uses that of the layer before it."""
    found: list[list[str]] = []
    crossing = []
    for block in every:
        own = f"{block}layer.0.SelfAttention."
        if not found or f"{own}relative_attention_bias.weight" in shapes:
            found.append([])
        found[-1].append(own)
        cross = f"{block}layer.1.EncDecAttention."
        crossing += [[cross]] if f"{cross}q.weight" in shapes else []
    return found + crossing


def _heads(attentions: list[str], heads: int, shapes: Shapes) -> Iterator[Group]:
    every = blocks(heads, shapes[f"{attentions[0]}q.weight"][0] // heads)
    name = f"{attentions[0]}heads"
    bias = f"{attentions[0]}relative_attention_bias.weight", 1
    places = [
        (f"{a}{x}.weight", axis)
        for a in attentions
        for x, axis in zip("qkvo", (0, 0, 0, 1), strict=True)
    ]
    whole = bound(shapes, every, *places) + bound(shapes, blocks(heads), bias)
    yield Group(name, "heads", heads, whole)
    for unit in range(heads):
        index = every[unit][:, None]
        for attention in attentions:
            q, k, v, o = (f"{attention}{x}.weight" for x in "qkvo")
            inside = f"{attention}heads.{unit}"
            pairs, values = (
                bound(shapes, index, (q, 0), (k, 0)),
                bound(shapes, index, (v, 0), (o, 1)),
            )
            yield Group(f"{inside}.qk", "qk", len(index), pairs, name, unit)
            yield Group(f"{inside}.value", "value", len(index), values, name, unit)


def _inner(layer: str, shapes: Shapes) -> Iterator[Group]:
    for mlp in (layer + part for part in _MLPS):
        if (out := f"{mlp}{_OUT}") in shapes:
            neurons = blocks(shapes[out][1])
            places = [(mlp + weight, 0) for weight in _IN]
            binds = bound(shapes, neurons, *places, (out, 1))
            yield Group(mlp[:-1], "mlp", len(neurons), binds)
    routers = tuple(f"{layer}mlp.router.classifier.{x}" for x in ("weight", "bias"))
    yield from experts(f"{layer}mlp.experts.expert_", _IN[:1], _OUT, routers, shapes)
