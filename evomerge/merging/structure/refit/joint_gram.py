"""Least squares of partially merged layers from sums that do not depend on what is merged.

With Z = [Z_a | Z_b | 1] the inputs of a layer in both networks, ZᵀZ determines the normal equations
of any choice of units: a search sums once and solves often. Knows no network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.merging.structure.partial.partial import BOTH, A, B, Layout, PartialMerge
from evomerge.merging.structure.permutations.linear_layers import Layer
from evomerge.merging.structure.refit.normal_equations import Equations

Get = Callable[[str], Tensor]
"""A stored tensor of one network by its name, in the order of the first."""


def joined(za: Tensor, zb: Tensor) -> Tensor:
    """Rows [n, 2d + 1] of inputs [n, d] of both networks."""
    return torch.cat([za, zb, za.new_ones(len(za), 1)], 1)


@dataclass(frozen=True, eq=False)
class JointLeastSquares:
    """Refits the layers of a partial merge to what both networks' layers gave.

        W = argmin ‖X Wᵀ − Y‖² + λ‖W − W₀‖²,   X = Z S_i,  Y = (Z [W_a W_b b]ᵀ) S_o
        λ = ridge · mean diag XᵀX

    S holds a column for every unit: (w, v) on the pair where it is merged, else one 1; (w, v) are
    the merge's `weights`. W₀ is the partial merge, biases are not under the ridge, and zeros of the
    structure stay zero. In float64.

    Source: PLeaS, Nasery et al. 2024, arXiv:2407.02447, sec. 3: each layer on its own, from the
    original networks' inputs. There by gradient descent; the ridge is ours.
    """

    merge: PartialMerge
    ridge: float

    def solved(self, layer: Layer, gram: Tensor, a: Get, b: Get) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a refit layer, in their stored shapes and dtypes.

        gram: ZᵀZ [2d + 1, 2d + 1] of a layer of d inputs.
        """
        equations, start = self.equations(layer, gram, a, b)
        found = equations.solved(start)
        dtype = a(layer.weight).dtype
        weight = found[:, :-1] if layer.bias is not None else found
        bias = found[:, -1].to(dtype) if layer.bias is not None else None
        return _as_stored(weight, layer).to(dtype), bias

    def equations(self, layer: Layer, gram: Tensor, a: Get, b: Get) -> tuple[Equations, Tensor]:
        """What a layer must solve, and W₀ [o', d'], with the bias as its last column."""
        weight = self.merge.tensor(layer.weight, a(layer.weight), b(layer.weight))
        start = _outputs_first(weight.double(), layer)
        d = (len(gram) - 1) // 2
        inputs = self._selection(self.merge.layout(layer.weight, layer.in_axis), d)
        ones = torch.zeros(len(inputs) + 1, 1, dtype=torch.float64)
        ones[-1] = 1.0
        wide = torch.cat([torch.cat([inputs, torch.zeros_like(inputs[:1])]), ones], 1)
        if layer.bias is None:
            wide = wide[:, :-1]
        else:
            bias = self.merge.tensor(layer.bias, a(layer.bias), b(layer.bias))
            start = torch.cat([start, bias.double()[:, None]], 1)
        targets = self._targets(layer, a, b)
        allowed = self.merge.allowed(layer.weight)
        if allowed is not None:
            allowed = _outputs_first(allowed.expand(weight.shape), layer)
        return Equations(
            gram=wide.T @ gram @ wide,
            cross=wide.T @ gram @ targets,
            square=((gram @ targets) * targets).sum(),
            ridge=self.ridge,
            allowed=allowed,
            bias=layer.bias is not None,
        ), start

    def _targets(self, layer: Layer, a: Get, b: Get) -> Tensor:
        """What the columns of Z are multiplied with to be Y [2d + 1, o']."""
        matrices = [_outputs_first(get(layer.weight).double(), layer) for get in (a, b)]
        o = len(matrices[0])
        biases = [get(layer.bias).double() if layer.bias else torch.zeros(o) for get in (a, b)]
        none = torch.zeros_like(matrices[0].T)
        columns = [torch.cat([matrices[0].T, none]), torch.cat([none, matrices[1].T])]
        whole = torch.cat([torch.cat(columns, 1), torch.cat(biases)[None].double()])
        return whole @ self._selection(self.merge.layout(layer.weight, layer.out_axis), o)

    def _selection(self, layout: Layout | None, size: int) -> Tensor:
        """S [2·size, n'] of an axis."""
        if layout is None:
            layout = Layout(torch.arange(size), torch.full([size], BOTH))
        made = torch.zeros(2 * size, len(layout.origin), dtype=torch.float64)
        columns = torch.arange(len(layout.origin))
        for mine, shift, share in zip((A, B), (0, size), self.merge.weights, strict=True):
            value = torch.where(layout.side == mine, 1.0, 0.0).double()
            value[layout.side == BOTH] = share
            made[layout.origin + shift, columns] += value
        return made


def _outputs_first(matrix: Tensor, layer: Layer) -> Tensor:
    return matrix.movedim((layer.out_axis, layer.in_axis), (0, 1))


def _as_stored(matrix: Tensor, layer: Layer) -> Tensor:
    return matrix.movedim((0, 1), (layer.out_axis, layer.in_axis)).contiguous()
