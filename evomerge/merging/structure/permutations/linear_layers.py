"""The layers of a live network that multiply by a weight, and which axis of it they read.

Knows torch's and transformers' layers, by the names that their weights are stored by. No group of
units and no activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from evomerge.merging.conversion import places
from evomerge.merging.structure.permutations.units import Shapes

Modules = Mapping[str, nn.Module]
"""Layers of a live network by the stored name of their weight."""


@dataclass(frozen=True)
class Layer:
    """y = W x + b, for every position of a convolution as well: W of stored name `weight`, whose
    outputs lie along `out_axis` and whose inputs along `in_axis`; b of stored name `bias`."""

    weight: str
    bias: str | None
    out_axis: int
    in_axis: int


def linear_layers(modules: Modules, shapes: Shapes) -> dict[str, Layer]:
    """The layers among them that are linear in one input, by the stored name of their weight.

    A grouped or transposed convolution is none: its weight does not read whole inputs.
    """
    found = {}
    for weight, module in modules.items():
        if (axes := weight_axes(module)) is not None:
            bias = f"{weight.removesuffix('weight')}bias"
            found[weight] = Layer(weight, bias if bias in shapes else None, *axes)
    return found


def weight_axes(module: nn.Module | None) -> tuple[int, int] | None:
    """The axes (outputs, inputs) of a layer's weight; None for what is no linear layer."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return 1, 0
    if isinstance(module, nn.Linear):
        return 0, 1
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1:
        return 0, 1
    return None


def modules_of(model: nn.Module, shapes: Shapes) -> dict[str, nn.Module]:
    """The layers of a transformers model whose weight is one stored tensor, by its name."""
    live = {key: t.detach() for key, t in model.state_dict(keep_vars=True).items()}
    found = {}
    for name, parts in places(model, shapes, live).items():
        path, _, parameter = parts[0].key.rpartition(".")
        if len(parts) == 1 and parameter == "weight" and live[parts[0].key].shape == shapes[name]:
            found[name] = model.get_submodule(path)
    return found


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of any network of torch modules, by the name of their weight in its state."""
    return {
        f"{path}.weight": module
        for path, module in model.named_modules()
        if getattr(module, "weight", None) is not None
    }
