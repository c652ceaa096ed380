"""Permutation groups of encoders with multi-head attention: ViT and BERT.

By the names that checkpoints have on disk. Without rotary positions the channels of queries and
keys of one head may change places, together. A key's bias adds the same to all scores of a query,
which the softmax takes away again: the function does not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from evomerge.merging.structure.permutation import Group
from evomerge.merging.structure.units import Shapes, blocks, bound, layers, prefix_of

_BOTH = ("weight", "bias")


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
    yield _residual([*places, *read], every, "attention.attention.", shapes)
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
    yield _residual([*places, *read], every, "attention.self.", shapes)
    yield from _layers(every, "attention.self.", int(config["num_attention_heads"]), shapes)
    if apart in shapes:
        yield _channels("head", [*transformed, (apart, 1)], shapes)
    if has_pooler and "classifier.weight" in shapes:
        yield _channels("pooler", pooled, shapes)


def _channels(name: str, places: list[tuple[str, int]], shapes: Shapes) -> Group:
    index = blocks(shapes[places[0][0]][places[0][1]])
    return Group(name, name, len(index), bound(shapes, index, *places))


def _residual(
    places: list[tuple[str, int]], every: list[str], attention: str, shapes: Shapes
) -> Group:
    for layer in every:
        places += [(f"{layer}{attention}{x}.weight", 1) for x in ("query", "key", "value")]
        places += [(f"{layer}attention.output.dense.{x}", 0) for x in _BOTH]
        places.append((f"{layer}intermediate.dense.weight", 1))
        places += [(f"{layer}output.dense.{x}", 0) for x in _BOTH]
    return _channels("residual", [place for place in places if place[0] in shapes], shapes)


def _layers(every: list[str], attention: str, heads: int, shapes: Shapes) -> Iterator[Group]:
    for layer in every:
        out = f"{layer}attention.output.dense.weight"
        yield from _heads(layer + attention, out, heads, shapes)
        neurons = [(f"{layer}intermediate.dense.{x}", 0) for x in _BOTH]
        index = blocks(shapes[neurons[0][0]][0])
        places = [*neurons, (f"{layer}output.dense.weight", 1)]
        yield Group(f"{layer}mlp", "mlp", len(index), bound(shapes, index, *places))


def _heads(attention: str, out: str, heads: int, shapes: Shapes) -> Iterator[Group]:
    dim = shapes[out][1] // heads
    query, value = ([(f"{attention}{x}.{y}", 0) for y in _BOTH] for x in ("query", "value"))
    key, key_bias = (f"{attention}key.weight", 0), (f"{attention}key.bias", 0)
    name, every = f"{attention}heads", blocks(heads, dim)
    whole = bound(shapes, every, *query, key, *value, (out, 1))
    yield Group(name, "heads", heads, whole + bound(shapes, every, key_bias, inert=True))
    for unit in range(heads):
        channels = every[unit][:, None]
        pairs = bound(shapes, channels, *query, key) + bound(shapes, channels, key_bias, inert=True)
        yield Group(f"{name}.{unit}.qk", "qk", dim, pairs, name, unit)
        values = bound(shapes, channels, *value, (out, 1))
        yield Group(f"{name}.{unit}.value", "value", dim, values, name, unit)
