"""What layers of a live network are given and give, and as rows that a weight is multiplied with.

Rows are all positions of all examples; a convolution's are unfolded. Knows no merge and no sums.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from evomerge.merging.structure.permutations.activations import Live
from evomerge.merging.structure.permutations.linear_layers import Layer

_RECENT = 16
"""Tensors that are remembered in a survey, to tell that another layer is given the same."""

Calls = list[tuple[Tensor, Tensor]]
"""(input, output) of a layer, for each time that it ran in one forward pass."""

_Take = Callable[[str, Tensor, Tensor], None]


class _Enough(Exception):
    """Every layer that was asked for has run."""


def captured(live: Live, batch: Any, times: Mapping[str, int]) -> dict[str, Calls]:
    """Inputs and outputs of layers in one forward pass, which ends when each has run so often.

    They are copies, for a network may overwrite its activations. Layers that are given one tensor
    share one copy.
    """
    found: dict[str, Calls] = {name: [] for name in times}
    seen: list[tuple[Tensor, int, Tensor]] = []  # held, lest another tensor gets its identity

    def take(name: str, x: Tensor, y: Tensor) -> None:
        copy = next((c for t, version, c in seen if t is x and version == x._version), None)
        if copy is None:
            copy = x.detach().clone()
            seen.append((x, x._version, copy))
        found[name].append((copy, y.detach().clone()))
        if all(len(calls) >= times[other] for other, calls in found.items()):
            raise _Enough

    _forward(live, batch, times, take)
    return found


@dataclass(frozen=True)
class Run:
    """One run of a layer: numbers of the tensors that it was given and gave. Equal numbers are one
    tensor, not written to in between."""

    given: int
    gave: int


def survey(live: Live, batch: Any, names: Collection[str]) -> dict[str, list[Run]]:
    """The runs of layers in a forward pass, layers in the order in which they first ran."""
    found: dict[str, list[Run]] = {}
    recent: deque[tuple[Tensor, int, int]] = deque(maxlen=_RECENT)
    count = 0

    def number(tensor: Tensor) -> int:
        nonlocal count
        known = (n for t, version, n in recent if t is tensor and version == tensor._version)
        if (same := next(known, None)) is not None:
            return same
        count += 1
        recent.append((tensor, tensor._version, count))
        return count

    def take(name: str, x: Tensor, y: Tensor) -> None:
        found.setdefault(name, []).append(Run(number(x), number(y)))

    _forward(live, batch, names, take)
    return found


def _forward(live: Live, batch: Any, names: Collection[str], take: _Take) -> None:
    handles = []
    try:
        for name in names:
            hook = partial(_told, take, name)
            handles.append(live.modules[name].register_forward_hook(hook))
        with torch.no_grad():
            live.run(batch)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _told(take: _Take, name: str, _: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
    take(name, inputs[0], out)


def units_axis(module: nn.Module) -> int:
    """The axis of what a layer is given and gives along which its units lie."""
    return 1 if isinstance(module, nn.Conv1d | nn.Conv2d) else -1


def unfolding(module: nn.Module) -> tuple[Any, ...]:
    """What a convolution's rows depend on beside its input."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return ()
    return (module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode)


def kernel_area(module: nn.Module) -> int:
    """How many columns of a layer's rows belong to one of its inputs."""
    return math.prod(module.kernel_size) if isinstance(module, nn.Conv1d | nn.Conv2d) else 1


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Shapes: [b, ..., c] or [b, c, *places] -> [n, c·area], in the order of the weight's."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return x.flatten(0, -2)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    size, step, spread = module.kernel_size, module.stride, module.dilation
    if isinstance(module, nn.Conv1d):
        x, size, step, spread = x[:, :, None], (1, *size), (1, *step), (1, *spread)
    columns = functional.unfold(x, size, dilation=spread, stride=step)  # [b, c·area, places]
    return columns.movedim(1, -1).flatten(0, -2)


def output_rows(module: nn.Module, y: Tensor) -> Tensor:
    """Shapes: [b, ..., c] or [b, c, *places] -> [n, c]."""
    return y.movedim(units_axis(module), -1).flatten(0, -2)


def as_matrix(layer: Layer, weight: Tensor) -> Tensor:
    """A weight as it multiplies rows [outputs, c·area]."""
    return weight.movedim((layer.out_axis, layer.in_axis), (0, 1)).flatten(1)


def from_matrix(layer: Layer, matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """A weight of this shape from its matrix."""
    axes = layer.out_axis, layer.in_axis
    moved = torch.empty(shape, device="meta").movedim(axes, (0, 1)).shape
    return matrix.reshape(moved).movedim((0, 1), axes)
