"""AdamW, and MoFO: AdamW that moves, of each tensor, only the entries of largest momentum.

Knows nothing of what it minimises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class AdamW:
    """Steps of AdamW on tensors by name, in place.

        u ← β₁u + (1−β₁)g,  v ← β₂v + (1−β₂)g²
        m ← m − η·w·m − η·(u/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε)

    With `alpha` (MoFO) moments are those of all entries, and only entries with |u| at least the
    k-th largest of their tensor move or decay, k = max(1, ⌈α·n⌉); equals at the threshold all do.

    Source: arXiv:1711.05101; MoFO: arXiv:2407.20999. DAM's released code takes k = ⌊α·n⌋ and stops
    with an error where that is 0.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        *,
        rate: float,
        weight_decay: float,
        alpha: float | None = None,
    ) -> None:
        self.values = values
        self.steps = 0
        self.first = {name: torch.zeros_like(value) for name, value in values.items()}
        self.second = {name: torch.zeros_like(value) for name, value in values.items()}
        self._rate, self._weight_decay, self._alpha = rate, weight_decay, alpha

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """One step. `gradients` has the shapes of the values."""
        self.steps += 1
        one, two = (1 - beta**self.steps for beta in BETAS)
        for name, value in self.values.items():
            gradient, u, v = gradients[name], self.first[name], self.second[name]
            u.mul_(BETAS[0]).add_(gradient, alpha=1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            update = (u / one) / ((v / two).sqrt() + EPSILON) + self._weight_decay * value
            if self._alpha is not None:
                update *= moving(u, self._alpha)
            value.sub_(update, alpha=self._rate)

    def state(self) -> dict[str, Tensor]:
        """Moments by name, for `restore`."""
        first = {f"first/{name}": value for name, value in self.first.items()}
        return first | {f"second/{name}": value for name, value in self.second.items()}

    def restore(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Go on from what `state` gave after that many steps."""
        self.steps = steps
        for name in self.values:
            self.first[name].copy_(state[f"first/{name}"])
            self.second[name].copy_(state[f"second/{name}"])


def moving(momentum: Tensor, alpha: float) -> Tensor:
    """Where |u| is among its max(1, ⌈α·n⌉) largest, equals included; bool, in u's shape."""
    size = momentum.abs()
    count = min(max(1, math.ceil(alpha * size.numel())), size.numel())
    return size >= size.flatten().topk(count).values[-1]
