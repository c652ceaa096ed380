"""Rows of a layer of two networks made into those of the merged one, and summed.

A layer's inputs X and outputs Y at each unit of the merged network are the mean of those of the two
networks, or those of one. Knows neither how activations are had nor what becomes of the sums.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from evomerge.merging.structure.partial.partial import Layout
from evomerge.merging.structure.refit.layer_rows import input_rows, kernel_area, output_rows
from evomerge.merging.structure.refit.normal_equations import Gram, Products

Pair = tuple[float, float]

_BLOCK = 1 << 24
"""Numbers of X that are unfolded at a time: 128 MiB in float64."""


@dataclass(frozen=True)
class View:
    """Shares of (a, b) in X and in Y: at merged units, and at units that one network has alone."""

    inputs: Pair
    outputs: Pair
    alone: Pair


def mixed(
    layout: Layout | None, a: Tensor, b: Tensor, shares: Pair, alone: Pair, axis: int
) -> Tensor:
    """Activations of two networks as the units of a merged one have them on an axis; float64."""
    a, b = a.double(), b.double()
    if layout is None:
        return shares[0] * a + shares[1] * b
    origin, side = layout.origin.to(a.device), layout.side.to(a.device)
    of_a = a.new_tensor([shares[0], alone[0], 0.0])[side]  # by BOTH, A, B
    of_b = a.new_tensor([shares[1], 0.0, alone[1]])[side]
    a, b = (t.index_select(axis, origin).movedim(axis, -1) for t in (a, b))
    return (of_a * a + of_b * b).movedim(-1, axis)


@dataclass(eq=False)
class Site:
    """Layers that are given the same, by name: one XᵀX, and XᵀY of each."""

    names: list[str]
    gram: Gram | None = None
    products: dict[str, Products] = field(default_factory=dict)

    def add(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        """Count what one of the layers is given and is to give; what all are given is counted with
        the first."""
        step = max(1, _BLOCK * len(x) // max(1, x.numel() * kernel_area(module)))
        for some, wanted in zip(torch.split(x, step), torch.split(y, step), strict=True):
            rows, outputs = input_rows(module, some), output_rows(module, wanted)
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
            width = rows.shape[1]
            if name == self.names[0]:
                self.gram = self.gram or Gram(rows.new_zeros(width, width))
                self.gram.add(rows)
            if name not in self.products:
                zeros = rows.new_zeros(width, outputs.shape[1])
                self.products[name] = Products(zeros, rows.new_zeros(()))
            self.products[name].add(rows, outputs)
