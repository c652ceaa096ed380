"""A copy of a network with tensors of other shapes, its modules told so.

Knows torch's layers and transformers' Conv1D by the attributes in which they keep their widths.
What goes into the tensors, and whether the network still computes anything, is not its business.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from evomerge.errors import MergeError
from evomerge.merging.structure.permutations.units import Shapes

_HOW = (
    "what can be is made of torch's Linear, Conv1d to Conv3d (grouped ones by channel only), norms,"
    " PReLU, Embedding and transformers' Conv1D"
)


def resized(model: nn.Module, shapes: Shapes) -> nn.Module:
    """A copy of a network whose state has these shapes; what is not named keeps its own.

    Tensors of another shape hold zeros, and tied ones stay tied; all others hold what they held. A
    bias may be named that a layer has not: it gets one. Raises MergeError for a tensor that the
    network has not, and for a module that cannot be resized.
    """
    made = copy.deepcopy(model)
    live = made.state_dict(keep_vars=True)
    fresh: dict[int | str, Tensor] = {}
    changed: dict[str, nn.Module] = {}
    for name, shape in shapes.items():
        path, _, own = name.rpartition(".")
        old = live[name] if name in live else _bias(made, name)
        if tuple(old.shape) == tuple(shape) and name in live:
            continue
        key = id(old) if name in live else name
        if key not in fresh:
            fresh[key] = _zeros(old, shape)
        changed[path] = made.get_submodule(path)
        setattr(changed[path], own, fresh[key])
    for path, module in changed.items():
        _tell(path, module)
    return made


def _zeros(old: Tensor, shape: tuple[int, ...]) -> Tensor:
    new = torch.zeros(shape, dtype=old.dtype, device=old.device)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _bias(model: nn.Module, name: str) -> Tensor:
    """What a bias is to be like that is not there."""
    path, _, own = name.rpartition(".")
    module: Any = dict(model.named_modules()).get(path)
    if own != "bias" or not isinstance(module, nn.Linear | _ConvNd):
        raise MergeError(f"{name}: this network has no such tensor; it is of another architecture")
    return nn.Parameter(module.weight.new_zeros(0), module.weight.requires_grad)


def _tell(path: str, module: nn.Module) -> None:
    """Set the attributes in which a module keeps the sizes of its tensors."""
    for attribute, size in _sizes(path, module).items():
        setattr(module, attribute, size)


def _sizes(path: str, module: Any) -> Mapping[str, Any]:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, _ConvNd):
        return _channels(path, module)
    if isinstance(module, _NormBase):  # batch and instance norms
        first = module.weight if module.weight is not None else module.running_mean
        return {"num_features": len(first)}
    if isinstance(module, nn.Linear):
        return dict(zip(("out_features", "in_features"), module.weight.shape, strict=True))
    if isinstance(module, Conv1D):
        return dict(zip(("nx", "nf"), module.weight.shape, strict=True))
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": tuple(module.weight.shape)}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": len(module.weight)}
    if isinstance(module, nn.Embedding):
        return dict(zip(("num_embeddings", "embedding_dim"), module.weight.shape, strict=True))
    raise MergeError(f"{path or 'the network'}: {type(module).__name__} cannot be resized; {_HOW}")


def _channels(path: str, module: _ConvNd) -> Mapping[str, int]:
    first, second = module.weight.shape[:2]
    if module.groups == 1:
        is_transposed = isinstance(module, _ConvTransposeNd)
        reads, writes = (first, second) if is_transposed else (second, first)
        return {"in_channels": reads, "out_channels": writes}
    each = module.out_channels // module.in_channels
    if module.groups != module.in_channels or each < 1 or first % each:
        raise MergeError(f"{path}: a convolution of {module.groups} groups of channels cannot be"
                         f" resized; {_HOW}")  # fmt: skip
    return {"in_channels": first // each, "out_channels": first, "groups": first // each}
