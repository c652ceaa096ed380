"""Permutation groups of a decoder's attention under rotary positions: grouped queries, latent.

The channels that turn with the position have no freedom: each pair turns at a speed of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from evomerge.merging.structure.permutations.permutation import Bind, Group
from evomerge.merging.structure.permutations.units import Shapes, blocks, bound

_BOTH = ("weight", "bias")


def grouped_query(attention: str, heads: int, shapes: Shapes) -> Iterator[Group]:
    """Key-value heads with the query heads that read them; query heads, value channels inside.

    Queries, keys and values have weights of their own or lie one after another in qkv_proj. A norm
    as wide as all queries or keys (OLMo) moves with their heads.
    """
    out = f"{attention}o_proj.weight", 1
    dim = shapes[out[0]][1] // heads
    rows = _Rows(attention, heads * dim, shapes)
    kv = rows.kv // dim
    each = heads // kv
    queries, keys = blocks(kv, each * dim), blocks(kv, dim)
    name = f"{attention}kv"
    yield Group(name, "kv", kv, rows.bound(q=queries, k=keys, v=keys) + bound(shapes, queries, out))
    for unit in range(kv):
        index = blocks(each, dim, unit * each * dim)
        query = rows.bound(q=index) + bound(shapes, index, out)
        yield Group(f"{name}.{unit}.query", "query", each, query, name, unit)
        channels = rows.bound(v=blocks(dim, 1, unit * dim)) + bound(shapes, index.T, out)
        yield Group(f"{name}.{unit}.value", "value", dim, channels, name, unit)


class _Rows:
    """Where the outputs of queries, keys and values stand."""

    def __init__(self, attention: str, queries: int, shapes: Shapes) -> None:
        self.shapes = shapes
        self._fused = f"{attention}qkv_proj"
        self._is_fused = f"{self._fused}.weight" in shapes
        rows = shapes[f"{self._fused}.weight" if self._is_fused else f"{attention}k_proj.weight"][0]
        self.kv = (rows - queries) // 2 if self._is_fused else rows
        self._starts = {"q": 0, "k": queries, "v": queries + self.kv}
        self._places = {x: [(f"{attention}{x}_proj.{y}", 0) for y in _BOTH] for x in "qkv"}
        for x, width in (("q", queries), ("k", self.kv)):
            if shapes.get(norm := f"{attention}{x}_norm.weight") == (width,):
                self._places[x].append((norm, 0))

    def bound(self, **parts: Tensor) -> tuple[Bind, ...]:
        """The binds of rows [n, m] of q, k or v, counted from the first of each."""
        if self._is_fused:
            index = torch.cat([each + self._starts[x] for x, each in parts.items()], 1)
            return bound(self.shapes, index, *((f"{self._fused}.{y}", 0) for y in _BOTH))
        found = (bound(self.shapes, each, *self._places[x]) for x, each in parts.items())
        return tuple(bind for binds in found for bind in binds)


def latent(attention: str, config: Mapping[str, Any], shapes: Shapes) -> Iterator[Group]:
    """Multi-head latent attention (DeepSeek): the ranks of the compressed queries, and of keys and
    values; heads; and inside each the channels of queries and keys without position, and of values.

    The rotary key is one for all heads and keeps its order.
    """
    kv_a, kv_b = f"{attention}kv_a_proj_with_mqa.", f"{attention}kv_b_proj.weight"
    for x, down, up in (("q", f"{attention}q_a_proj.", f"{attention}q_b_proj.weight"),
                        ("kv", kv_a, kv_b)):  # fmt: skip
        if up in shapes:
            rank = blocks(shapes[up][1])
            places = [(f"{down}{y}", 0) for y in _BOTH]
            norm = f"{attention}{x}_a_layernorm.weight", 0
            binds = bound(shapes, rank, *places, norm, (up, 1))
            yield Group(f"{attention}{x}_rank", "rank", len(rank), binds)
    yield from _latent_heads(attention, config, shapes)


def _latent_heads(attention: str, config: Mapping[str, Any], shapes: Shapes) -> Iterator[Group]:
    heads, plain = int(config["num_attention_heads"]), int(config["qk_nope_head_dim"])
    places = [(f"{attention}{x}.weight", 0) for x in ("q_proj", "q_b_proj")]
    both, out = (f"{attention}kv_b_proj.weight", 0), (f"{attention}o_proj.weight", 1)
    values = blocks(heads, shapes[out[0]][1] // heads)
    width = plain + values.shape[1]
    (query,) = (place for place in places if place[0] in shapes)
    queries = blocks(heads, shapes[query[0]][0] // heads)
    keys = blocks(heads, width)
    name = f"{attention}heads"
    whole = bound(shapes, queries, query) + bound(shapes, keys, both) + bound(shapes, values, out)
    yield Group(name, "heads", heads, whole)
    for unit in range(heads):
        channels = keys[unit][:, None]
        pairs = bound(shapes, queries[unit][:plain, None], query)
        pairs += bound(shapes, channels[:plain], both)
        yield Group(f"{name}.{unit}.qk", "qk", plain, pairs, name, unit)
        read = bound(shapes, channels[plain:], both) + bound(shapes, values[unit][:, None], out)
        yield Group(f"{name}.{unit}.value", "value", values.shape[1], read, name, unit)
