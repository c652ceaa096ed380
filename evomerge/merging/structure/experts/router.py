"""One router row for each group of experts, in place of one for each expert.

The routing of the merged model is then no longer the same function: this is what a small, plain
checkpoint costs. Knows no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from evomerge.checkpoints.weights import Weights
from evomerge.merging.fitted.calibration import Example
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.experts.grouping import Groups
from evomerge.merging.structure.experts.layers import ExpertLayer
from evomerge.merging.structure.experts.watch import watch_routing

RIDGE = 1e-2
"""Of the least squares, as a share of the mean of the diagonal."""


def collapsed(weight: Tensor, groups: Groups, how: Literal["dominant", "mean"]) -> Tensor:
    """A router [K, d] float32 of a router [E, d]: of each group the leader's row, or the mean. Of
    its bias likewise, [K] of [E]."""
    rows = weight.float()
    if how == "mean":
        return torch.stack([rows[list(members)].mean(0) for members in groups.members])
    return rows[[groups.leaders[members[0]] for members in groups.members]]


class LogSumExpFit:
    """Rows whose logits are nearest, in squares, to the total mass of each group.

        yₖ = log Σ over group k of exp(x·wᵢ + bᵢ) − bₖ
        W  = argmin Σ ‖xW'ᵀ − y‖² + λ‖W' − W₀‖²,   λ = ridge·mean(diag XᵀX)

    W₀ are the mean rows; b is 0 of a router without a bias, else the group has its leader's, bₖ.
    Shapes: x [n, d], w [E, d], b [E], W [K, d]. Sums and the solution in float64.
    Ours: the published methods keep all E rows.
    """

    def __init__(self, weight: Tensor, groups: Groups, bias: Tensor | None = None) -> None:
        self._weight, self._groups = weight.float(), groups
        self._bias = (weight.new_zeros(len(weight)) if bias is None else bias).double()
        self._kept = collapsed(self._bias, groups, "dominant").double()
        width, count = weight.shape[1], len(groups.members)
        self._inputs = torch.zeros(width, width, dtype=torch.float64)
        self._targets = torch.zeros(width, count, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in the inputs [n, d] of the router."""
        rows = rows.double().cpu()
        logits = functional.linear(rows, self._weight.double(), self._bias)
        masses = [logits[:, list(m)].logsumexp(1) for m in self._groups.members]
        self._inputs += rows.T @ rows
        self._targets += rows.T @ (torch.stack(masses, 1) - self._kept)

    def solve(self, ridge: float = RIDGE) -> Tensor:
        """The router [K, d] float32."""
        start = collapsed(self._weight, self._groups, "mean").double()
        damping = ridge * self._inputs.diagonal().mean().clamp(min=1e-12)
        left = self._inputs + damping * torch.eye(len(self._inputs), dtype=torch.float64)
        rows: Tensor = torch.linalg.solve(left, self._targets + damping * start.T).T
        return rows.float()


def collapsed_routers(
    network: Network | None,
    model: Weights,
    layers: Sequence[ExpertLayer],
    groups: Sequence[Groups],
    how: Literal["dominant", "mean", "logsumexp"],
    examples: Sequence[Example],
    *,
    batch_size: int,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Tensor]:
    """A router [K, d] for every layer; `logsumexp` alone needs the network, and runs the
    examples through it again."""
    weights = [model.tensor(layer.router[0]) for layer in layers]
    if how != "logsumexp":
        return [collapsed(w, g, how) for w, g in zip(weights, groups, strict=True)]
    assert network is not None
    names = [layer.router_bias for layer in layers]
    biases = [None if name is None else model.tensor(name) for name in names]
    fits = [LogSumExpFit(*each) for each in zip(weights, groups, biases, strict=True)]

    def take(at: int, rows: Tensor, chosen: Tensor, gates: Tensor, module: nn.Module) -> None:
        fits[at].add(rows)

    with torch.no_grad():
        watch_routing(network, layers, examples, take, batch_size=batch_size, progress=progress)
    return [fit.solve() for fit in fits]
