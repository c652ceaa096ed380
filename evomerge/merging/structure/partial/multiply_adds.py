"""What the layers of a live network cost: multiplications with an addition, by a forward pass.

Measures; what a partially merged network costs is worked out from it in `budget`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evomerge.merging.structure.partial.budget import Term
from evomerge.merging.structure.permutations.linear_layers import Layer, Modules, weight_axes
from evomerge.merging.structure.permutations.permutation import Bind, Spec
from evomerge.merging.structure.permutations.units import Shapes

Run = Callable[[], object]
"""One forward pass, on inputs of its own choice."""


def positions(modules: Modules, run: Run) -> dict[str, int]:
    """How often a forward pass uses each entry of a layer's weight [o, i, *kernel], times the area
    of the kernel: the layer does positions·o·i multiply-adds. By the name of the weight.

    Layers that the pass does not come to have 0; what is no linear layer is left out.
    """
    found: dict[str, int] = {}
    handles = []
    try:
        for name, module in modules.items():
            if (axes := weight_axes(module)) is not None:
                found[name] = 0
                hook = partial(_count, found, name, axes[0])
                handles.append(module.register_forward_hook(hook))
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def counted(run: Run) -> float:
    """Multiply-adds of one forward pass, of its products of matrices, convolutions and attention.

    As torch counts them: zeros are multiplied like other numbers, and what works on one entry at a
    time (norms, activations, biases) is free. Attention is computed as plain products of matrices,
    since torch counts it in no other form on a CPU; causal or not, all of it.
    """
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops()) / 2


def layer_terms(
    spec: Spec,
    layers: Mapping[str, Layer],
    shapes: Shapes,
    uses: Mapping[str, int],
    widening: Collection[str],
) -> Iterator[Term]:
    """What each layer costs, by the groups on its two axes that may be widened; `uses` are those of
    `positions`. A group that has part of an axis shares the layer with what has the rest."""
    owners = _owners(spec, shapes, widening)
    for name, layer in layers.items():
        shape = shapes[name]
        cost = float(uses[name] * shape[layer.out_axis] * shape[layer.in_axis])
        for out_group, out_share in owners(name, layer.out_axis):
            for in_group, in_share in owners(name, layer.in_axis):
                yield Term(cost * out_share * in_share, out_group, in_group)


def _owners(
    spec: Spec, shapes: Shapes, widening: Collection[str]
) -> Callable[[str, int], list[tuple[str | None, float]]]:
    """The groups that have an axis, each with its share of it; what none has is None's."""
    parts: dict[tuple[str, int], dict[str, int]] = {}
    for group in (spec[name] for name in sorted(widening)):
        for bind in group.binds:
            if isinstance(bind, Bind) and bind.select is None:
                held = parts.setdefault((bind.param, bind.axis), {})
                held[group.name] = held.get(group.name, 0) + bind.index.numel()

    def owners(name: str, axis: int) -> list[tuple[str | None, float]]:
        held, size = parts.get((name, axis), {}), shapes[name][axis]
        rest = size - sum(held.values())
        found: list[tuple[str | None, float]] = [(g, n / size) for g, n in held.items()]
        return [*found, (None, rest / size)] if rest else found

    return owners


def _count(
    found: dict[str, int], name: str, out_axis: int, module: nn.Module, inputs: object, out: Tensor
) -> None:
    weight: Tensor = module.weight  # type: ignore[assignment]
    found[name] += out.numel() // weight.shape[out_axis] * math.prod(weight.shape[2:])
