"""A layer and the batch norm right behind it as one affine layer, and apart again.

Tensors of one norm in, tensors of one norm out. Knows no data and no least squares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evomerge.merging.structure.permutations.linear_layers import Modules
from evomerge.merging.structure.permutations.permutation import State
from evomerge.merging.structure.refit.layer_rows import Run


def batch_norms(modules: Modules) -> list[str]:
    """Stored names of the weights of batch norms that keep running statistics."""
    return [
        n for n, m in modules.items() if isinstance(m, _BatchNorm) and m.running_mean is not None
    ]


def norm_names(norm: str) -> list[str]:
    """Names of a batch norm's weight, bias, running mean and variance, by that of its weight."""
    prefix = norm.removesuffix("weight")
    return [f"{prefix}{end}" for end in ("weight", "bias", "running_mean", "running_var")]


def followers(runs: Mapping[str, Sequence[Run]], norms: Sequence[str]) -> dict[str, str]:
    """The batch norm that is given what a layer gave, by the layer; both run once."""
    once = {name: found[0] for name, found in runs.items() if len(found) == 1}
    by_input = {once[name].given: name for name in norms if name in once}
    return {
        name: by_input[run.gave]
        for name, run in once.items()
        if name not in norms and run.gave in by_input
    }


@dataclass(frozen=True, eq=False)
class Followed:
    """A batch norm as s·y + t of its running statistics: s = γ/√(σ² + ε), t = β − s·μ.

    Shapes: scale s and shift t float64 [o].
    """

    name: str
    scale: Tensor
    shift: Tensor
    epsilon: float

    @classmethod
    def of(cls, norm: str, module: nn.Module, state: State) -> Followed:
        """The norm whose tensors have these names in `state`; the module says ε."""
        weight, bias, mean, variance = (state[key].double() for key in norm_names(norm))
        epsilon = float(module.eps)  # type: ignore[arg-type]
        scale = weight / (variance + epsilon).sqrt()
        return cls(norm, scale, bias - scale * mean, epsilon)

    def joined(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[s·W | s·b + t] of a layer [o, d] with its bias: [o, d + 1]."""
        shift = self.shift if bias is None else self.shift + self.scale * bias
        return torch.cat([weight * self.scale[:, None], shift[:, None]], 1)

    def parted(
        self, joined: Tensor, gram: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """W [o, d] of the layer, and the tensors of the norm to go with it, by name: its
        statistics are those of the layer's outputs on the data, so that it is the same function
        whether these are measured again or not.

        Shapes: joined [o, d + 1]; gram XᵀX [d + 1, d + 1], X with a column of ones. The layer keeps
        its `bias`.
        """
        scale = torch.where(self.scale != 0, self.scale, 1.0)
        weight = joined[:, :-1] / scale[:, None]
        rows = gram[-1, -1]
        mean = gram[-1, :-1] / rows
        products = gram[:-1, :-1] - rows * mean[:, None] * mean
        variance = ((weight @ products) * weight).sum(1).clamp_min(0) / (rows - 1).clamp_min(1)
        mean = weight @ mean
        held = (
            scale * (variance + self.epsilon).sqrt(),
            joined[:, -1] + scale * mean,
            mean if bias is None else mean + bias,
            variance,
        )
        return weight, dict(zip(norm_names(self.name), held, strict=True))
