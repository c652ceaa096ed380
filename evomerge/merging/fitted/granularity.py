"""Which tensors of a network are trained, and how each is cut into groups that share a coefficient.

Told by the live model's modules and its config, so that no architecture is named here beyond the
words that attention layers share. Knows no data.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from torch import nn

from evomerge.merging.fitted.network import Network
from evomerge.merging.methods.mergers import Grid

Granularity = Literal["column", "row", "head", "tensor", "layer"]
Kind = Literal["linears", "embeddings", "norms", "biases"]

_ATTENTION = re.compile(r"attn|attention")
_QUERY = re.compile(r"(?:^|\.)(?:q_proj|query)$")
_KEY_VALUE = re.compile(r"(?:^|\.)(?:k_proj|v_proj|key|value)$")
_JOINED = re.compile(r"(?:^|\.)(?:qkv_proj|query_key_value|c_attn)$")
_OUT = re.compile(r"(?:^|\.)(?:o_proj|out_proj|dense|c_proj)$")


def kind_of(network: Network, name: str) -> Kind:
    """What a stored tensor is a weight of.

    A tied head counts as the embedding that it is. What is the weight of no module is told by its
    axes: a matrix is linear, a vector a bias.
    """
    _, module = network.module(name) or ("", None)
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if module is not None and "norm" in type(module).__name__.lower():
        return "norms"
    return "linears" if len(network.shape(name)) > 1 else "biases"


def grid_of(network: Network, name: str, granularity: Granularity) -> Grid:
    """The groups of a stored tensor.

    column: inputs of a linear layer, dimensions of an embedding, entries of a norm; a bias is one.
    row: outputs of a linear layer, entries of its bias, tokens of an embedding, entries of a norm.
    head: of the query, key, value and output of attention, outputs (of the output: inputs) by head.
    What has none of these is one group.
    """
    shape = network.shape(name)
    whole = Grid(shape, 0, 1)
    found = network.module(name)
    if found is None or not shape or granularity in ("tensor", "layer"):
        return whole
    path, module = found
    if granularity == "head":
        return _by_head(network, path, module, shape) or whole
    if (axes := _axes(module, shape)) is None:
        return whole
    axis = axes[granularity == "row"]
    return whole if axis is None else Grid(shape, axis, shape[axis])


def _axes(module: nn.Module, shape: tuple[int, ...]) -> tuple[int | None, int] | None:
    """The axes of (inputs, outputs) of a module's parameter."""
    if "norm" in type(module).__name__.lower():
        return len(shape) - 1, len(shape) - 1
    if isinstance(module, nn.Embedding):
        return 1, 0
    if not _is_linear(module):
        return None
    if len(shape) == 1:
        return None, 0
    return (0, 1) if _stores_inputs_first(module) else (1, 0)


def _by_head(network: Network, path: str, module: nn.Module, shape: tuple[int, ...]) -> Grid | None:
    axes = _axes(module, shape)
    config: Any = network.model.config
    heads = getattr(config, "num_attention_heads", None)
    if axes is None or not _is_linear(module) or not _ATTENTION.search(path) or not heads:
        return None
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    inputs, outputs = axes
    if _OUT.search(path):  # its bias belongs to no head
        return _heads(shape, inputs, size, heads) if inputs is not None else None
    if _QUERY.search(path):
        return _heads(shape, outputs, size, heads)
    if _KEY_VALUE.search(path):
        return _heads(shape, outputs, size, shared)
    if _JOINED.search(path):
        return _heads(shape, outputs, size, heads + 2 * shared, 3 * heads)
    return None


def _heads(shape: tuple[int, ...], axis: int, size: int, *counts: int) -> Grid | None:
    """Cut into heads of `size` along an axis that has one of these numbers of them."""
    count = shape[axis] // size
    return Grid(shape, axis, count) if count in counts and count * size == shape[axis] else None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _stores_inputs_first(module)


def _stores_inputs_first(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
