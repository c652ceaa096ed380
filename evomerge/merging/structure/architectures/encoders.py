"""Permutation groups of encoders with multi-head attention: ViT and BERT.

By the names that checkpoints have on disk. Without rotary positions the channels of queries and
keys of one head may change places, together. A key's bias adds the same to all scores of a query,
which the softmax takes away again: the function does not depend on it. Where no head reads the
residual stream it is what the network gives out, and keeps its order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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

_BOTH = ("weight", "bias")
_SELF = ("query", "key", "value")


def vit(config: Mapping[str, Any], shapes: Shapes) -> Iterator[Group]:
    """ViT with any head on the class token; a pooler's output keeps its order."""
    prefix = prefix_of(shapes, "embeddings.cls_token")
    embeddings = f"{prefix}embeddings."
    tokens = [(embeddings + x, 2) for x in ("cls_token", "mask_token", "position_embeddings")]
    patches = [(f"{embeddings}patch_embeddings.projection.{x}", 0) for x in _BOTH]
    every = layers(shapes, f"{prefix}encoder.layer.")
    norms = [f"{layer}layernorm_{x}" for layer in every for x in ("before", "after")]
    places = [*tokens, *patches]
    places += [(f"{norm}.{x}", 0) for norm in (*norms, f"{prefix}layernorm") for x in _BOTH]
    read = [("classifier.weight", 1), (f"{prefix}pooler.dense.weight", 1)]
    places += _stream_places(every, "attention.attention.")
    has_head = "classifier.weight" in shapes
    yield (channels if has_head else fixed)("residual", [*places, *read], shapes)
    yield from _layers(every, "attention.attention.", int(config["num_attention_heads"]), shapes)


def bert(config: Mapping[str, Any], shapes: Shapes) -> Iterator[Group]:
    """BERT with a classifier of the sequence or of tokens, or with the masked-word head, whose
    decoder is the embedding unless the checkpoint keeps it apart."""
    prefix = prefix_of(shapes, "embeddings.word_embeddings.weight")
    embeddings = f"{prefix}embeddings."
    words = ("word", "position", "token_type")
    every = layers(shapes, f"{prefix}encoder.layer.")
    norms = [f"{layer}{x}" for layer in every for x in ("attention.output.", "output.")]
    places = [(f"{embeddings}{x}_embeddings.weight", 1) for x in words]
    places += [(f"{norm}LayerNorm.{x}", 0) for norm in (embeddings, *norms) for x in _BOTH]
    head, pooler = "cls.predictions.", f"{prefix}pooler.dense."
    transformed = [(f"{head}transform.{x}.{y}", 0) for x in ("dense", "LayerNorm") for y in _BOTH]
    read = [(f"{head}transform.dense.weight", 1), ("cls.seq_relationship.weight", 1)]
    pooled = [*((pooler + x, 0) for x in _BOTH), ("classifier.weight", 1)]
    has_pooler = f"{pooler}weight" in shapes
    read.append((f"{pooler}weight", 1) if has_pooler else ("classifier.weight", 1))
    if (apart := f"{head}decoder.weight") not in shapes:
        read += transformed
    places += _stream_places(every, "attention.self.")
    has_head = "classifier.weight" in shapes or f"{head}transform.dense.weight" in shapes
    yield (channels if has_head else fixed)("residual", [*places, *read], shapes)
    yield from _layers(every, "attention.self.", int(config["num_attention_heads"]), shapes)
    if apart in shapes:
        yield channels("head", [*transformed, (apart, 1)], shapes)
    if has_pooler and "classifier.weight" in shapes:
        yield channels("pooler", pooled, shapes)


def _stream_places(every: list[str], attention: str) -> Iterator[Place]:
    for layer in every:
        yield from ((f"{layer}{attention}{x}.weight", 1) for x in _SELF)
        yield from ((f"{layer}attention.output.dense.{x}", 0) for x in _BOTH)
        yield f"{layer}intermediate.dense.weight", 1
        yield from ((f"{layer}output.dense.{x}", 0) for x in _BOTH)


def _layers(every: list[str], attention: str, heads: int, shapes: Shapes) -> Iterator[Group]:
    for layer in every:
        out = f"{layer}attention.output.dense"
        yield from multi_head(layer + attention, _SELF, out, heads, shapes)
        neurons = [(f"{layer}intermediate.dense.{x}", 0) for x in _BOTH]
        index = blocks(shapes[neurons[0][0]][0])
        places = [*neurons, (f"{layer}output.dense.weight", 1)]
        yield Group(f"{layer}mlp", "mlp", len(index), bound(shapes, index, *places))


def multi_head(
    attention: str, names: tuple[str, str, str], out: str, heads: int, shapes: Shapes
) -> Iterator[Group]:
    """Heads, and inside each the channels of queries and keys, and those of values.

    `names` are those of queries, keys and values behind `attention`; `out` is what reads the heads.
    """
    dim, read = shapes[f"{out}.weight"][1] // heads, (f"{out}.weight", 1)
    query, _, value = ([(f"{attention}{x}.{y}", 0) for y in _BOTH] for x in names)
    key, key_bias = ((f"{attention}{names[1]}.{y}", 0) for y in _BOTH)
    name, every = f"{attention}heads", blocks(heads, dim)
    whole = bound(shapes, every, *query, key, *value, read)
    yield Group(name, "heads", heads, whole + bound(shapes, every, key_bias, inert=True))
    for unit in range(heads):
        index = every[unit][:, None]
        pairs = bound(shapes, index, *query, key) + bound(shapes, index, key_bias, inert=True)
        yield Group(f"{name}.{unit}.qk", "qk", dim, pairs, name, unit)
        values = bound(shapes, index, *value, read)
        yield Group(f"{name}.{unit}.value", "value", dim, values, name, unit)
