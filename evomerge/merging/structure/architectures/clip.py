"""Permutation groups of CLIP: both towers with their projections, or one of them.

By the names that checkpoints have on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from evomerge.merging.structure.architectures.encoders import multi_head
from evomerge.merging.structure.permutations.permutation import Bind, Group
from evomerge.merging.structure.permutations.units import (
    Place,
    Shapes,
    blocks,
    bound,
    channels,
    layers,
    prefix_of,
)

_BOTH = ("weight", "bias")
_ATTENTION = ("q_proj", "k_proj", "v_proj")
_TEXT = "embeddings.token_embedding.weight"
_VISION = "embeddings.patch_embedding.weight"
_PROJECTIONS = ("text_projection.weight", "visual_projection.weight")


def clip(config: Mapping[str, Any], shapes: Shapes) -> Iterator[Group]:
    """The residual stream, heads and neurons of each tower, and the channels that both project to.

    Of a tower without a projection or a classifier the stream is what it gives out, and keeps its
    order; so do the channels that only one tower projects to.
    """
    for first, settings, projection in (
        (_TEXT, "text_config", _PROJECTIONS[0]),
        (_VISION, "vision_config", _PROJECTIONS[1]),
    ):
        if any(name.endswith(first) for name in shapes):
            heads = int(config.get(settings, config)["num_attention_heads"])
            yield from _tower(prefix_of(shapes, first), projection, heads, shapes)
    if all(projection in shapes for projection in _PROJECTIONS):
        yield channels("projection", [(projection, 0) for projection in _PROJECTIONS], shapes)


def _tower(tower: str, projection: str, heads: int, shapes: Shapes) -> Iterator[Group]:
    every = layers(shapes, f"{tower}encoder.layers.")
    yield _stream(tower, every, projection, shapes)
    for layer in every:
        attention = f"{layer}self_attn."
        yield from multi_head(attention, _ATTENTION, f"{attention}out_proj", heads, shapes)
        inner = [(f"{layer}mlp.fc1.{x}", 0) for x in _BOTH]
        neurons = blocks(shapes[inner[0][0]][0])
        binds = bound(shapes, neurons, *inner, (f"{layer}mlp.fc2.weight", 1))
        yield Group(f"{layer}mlp", "mlp", len(neurons), binds)


def _stream(tower: str, every: list[str], projection: str, shapes: Shapes) -> Group:
    """A classifier of images reads the stream itself, before the last norm."""
    heads = ("classifier.weight", projection)
    has_head = any(head in shapes for head in heads)
    width = shapes[f"{tower}embeddings.position_embedding.weight"][1]
    index = blocks(width) if has_head else blocks(1, width)
    binds = bound(shapes, index, *_places(tower, every), *((head, 1) for head in heads))
    binds += _last_norm(tower, index, shapes, inert="classifier.weight" in shapes)
    return Group(f"{tower}residual", "residual", len(index), binds)


def _places(tower: str, every: list[str]) -> Iterator[Place]:
    yield f"{tower}embeddings.class_embedding", 0
    yield f"{tower}embeddings.patch_embedding.weight", 0
    yield from ((f"{tower}embeddings.{x}_embedding.weight", 1) for x in ("token", "position"))
    yield from ((f"{tower}{norm}.{y}", 0) for norm in ("pre_layrnorm", "final_layer_norm")
                for y in _BOTH)  # fmt: skip
    for layer in every:
        yield from ((f"{layer}layer_norm{n}.{y}", 0) for n in (1, 2) for y in _BOTH)
        yield from (
            (f"{layer}{x}.weight", 1) for x in (*map("self_attn.{}".format, _ATTENTION), "mlp.fc1")
        )
        yield from (
            (f"{layer}{x}.{y}", 0) for x in ("self_attn.out_proj", "mlp.fc2") for y in _BOTH
        )


def _last_norm(tower: str, index: Any, shapes: Shapes, *, inert: bool) -> tuple[Bind, ...]:
    places = [(f"{tower}post_layernorm.{y}", 0) for y in _BOTH]
    return bound(shapes, index, *places, inert=inert)
