"""Compressed experts in a live model: transformers' own arithmetic, on U V + S in place of W.

transformers keeps the experts of a layer as tensors with a row for each, and multiplies by one row
at a time; those of Switch as modules. Here a row, or a module's weight, is an object that answers
to `torch.nn.functional.linear` without ever building W. Knows no training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from evomerge.errors import CheckpointError, MergeError, ShapeMismatch
from evomerge.merging.conversion import Part, places
from evomerge.merging.structure.experts.compression import Compressed


class CompressedMatrix(nn.Module):
    """The matrix [m, n] of one expert: compressed ones on top of each other.

    Stands where torch expects a tensor: `linear(x, matrix)` is (U V + S) x; any other operation is
    given the whole matrix.
    """

    def __init__(self, stacked: Sequence[Compressed]) -> None:
        super().__init__()
        self._count = len(stacked)
        for number, matrix in enumerate(stacked):
            for part in ("u", "v", "values"):
                self.register_parameter(f"{part}{number}", nn.Parameter(getattr(matrix, part)))
            self.register_buffer(f"rows{number}", matrix.rows)

    @property
    def stacked(self) -> list[Compressed]:
        """The matrices from top to bottom."""
        return [
            Compressed(*(getattr(self, f"{part}{number}") for part in ("u", "v", "rows", "values")))
            for number in range(self._count)
        ]

    def dense(self) -> Tensor:
        """The whole matrix [m, n]."""
        return torch.cat([matrix.dense() for matrix in self.stacked])

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is nn.functional.linear and not kwargs:
            x, matrix, bias = (*args, None)[:3]
            if isinstance(matrix, cls) and isinstance(x, Tensor) and bias is None:
                return torch.cat([part.times(x) for part in matrix.stacked], -1)
        return func(*map(_whole, args), **{key: _whole(value) for key, value in kwargs.items()})


class CompressedStack(nn.ModuleList):
    """The matrices of a layer's experts, in the place of a tensor [K, m, n]."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(int(index) if isinstance(index, Tensor) else index)


Shapes = Mapping[str, tuple[int, ...]]
"""Of a layer's tensors by name: [K, m, n] of all its experts, or [m, n] of one."""


def shapes_of(module: nn.Module) -> Shapes:
    """Of the tensors of a layer's experts."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def hollow(module: nn.Module) -> None:
    """Make the tensors of a layer's experts empty, so that they take no memory."""
    for name, shape in shapes_of(module).items():
        at, _, key = name.rpartition(".")
        owner = module.get_submodule(at)
        empty = getattr(owner, key).new_empty(*shape[:-2], 0, 0)
        setattr(owner, key, nn.Parameter(empty))


def install(model: nn.Module, layers: Mapping[str, Shapes], path: Path, *, dense: bool) -> None:
    """Give layers of experts, by their live names, the matrices of a file, in the dtype and where
    their tensors are, which are dropped; or, with `dense`, fill those with whole matrices.

    Raises CheckpointError for a file that cannot be read or does not fit the model.
    """
    stored = _read(path)
    live = {
        f"{at}.{key}": torch.empty(shape, device="meta")
        for at, shapes in layers.items()
        for key, shape in shapes.items()
    }
    try:
        found = places(model, {name: matrix.shape for name, matrix in stored.items()}, live)
    except (MergeError, ShapeMismatch) as error:
        raise CheckpointError(f"{path}: {error}; export it again") from error
    by_key: dict[str, dict[Part, Compressed]] = {key: {} for key in live}
    for name, matrix in stored.items():
        for part in found.get(name, ()):
            by_key[part.key][part] = matrix
    for key, matrices in by_key.items():
        count = sum(math.prod(part.sizes) for part in matrices)
        if count != live[key].numel():
            raise CheckpointError(f"{path}: does not hold all matrices of {key}; export it again")
        if dense:
            _fill(model.get_parameter(key), matrices)
        else:
            _replace(model, key, _stack(path, live[key], matrices, model.get_parameter(key)))


def _read(path: Path) -> dict[str, Compressed]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    names = sorted({name.rpartition(".")[0] for name in tensors})
    try:
        return {name: Compressed.read(name, tensors) for name in names}
    except KeyError as error:
        raise CheckpointError(f"{path}: has no tensor {error}; export it again") from None


@torch.no_grad()
def _fill(tensor: Tensor, matrices: Mapping[Part, Compressed]) -> None:
    for part, matrix in matrices.items():
        whole = matrix.to(tensor.dtype, tensor.device).dense().contiguous()
        target = tensor.as_strided(part.sizes, part.live_strides, part.live_start)
        target.copy_(whole.as_strided(part.sizes, part.stored_strides, part.stored_start))


def _stack(
    path: Path, shape: Tensor, matrices: Mapping[Part, Compressed], like: Tensor
) -> CompressedStack | CompressedMatrix:
    height, width = shape.shape[-2:]
    experts: list[list[Compressed]] = [[] for _ in range(shape.numel() // (height * width))]
    for part in sorted(matrices, key=lambda part: part.live_start):
        if not part.is_run or matrices[part].shape[1] != width:
            raise CheckpointError(
                f"{path}: transformers has {part.key} in another order; load it with `dense=True`"
            )
        at = part.live_start // (height * width)
        experts[at].append(matrices[part].to(like.dtype, like.device))
    stacks = [CompressedMatrix(expert) for expert in experts]
    return CompressedStack(stacks) if shape.ndim == 3 else stacks[0]


def _replace(model: nn.Module, key: str, stack: nn.Module) -> None:
    at, _, name = key.rpartition(".")
    module = model.get_submodule(at)
    delattr(module, name)
    setattr(module, name, stack)


def _whole(value: Any) -> Any:
    return value.dense() if isinstance(value, CompressedMatrix) else value
