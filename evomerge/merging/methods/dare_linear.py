"""DARE with a weighted sum: drop entries of task vectors at random, rescale, add to the base.

Knows nothing of checkpoints, devices or studies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from evomerge.merging.kernels.program import Program, Row, copy_of
from evomerge.merging.methods.base import Block, Blocks, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.combination import moved, sole, weighted_sum
from evomerge.merging.methods.dropping import DROP_PARAMETERS, Drop, drops
from evomerge.merging.methods.task_arithmetic import shares_of


def dare_linear(
    base: Tensor,
    sources: Tensor,
    drops: Sequence[Drop],
    *,
    weights: Sequence[float],
    scale: float = 1.0,
    normalize: bool = False,
    start: int = 0,
) -> Tensor:
    """Move the base along a weighted sum of randomly thinned task vectors.

        τ̃ᵢ = fᵢ·mᵢ⊙(θᵢ − θ₀)           (mᵢ and fᵢ: `dropping.drops`)
        θ  = θ₀ + λ·Σᵢ wᵢ·τ̃ᵢ            (normalize: wᵢ/Σw in place of wᵢ)

    Shapes: base [n], sources [s, n] float32 from flat index `start`; drops and weights [s]; returns
    [n] float32. The coefficients λ·wᵢ·fᵢ are computed in float64, the rest in float32.
    With every λ·wᵢ = 0 the result is the base bit for bit; with one λ·wᵢ = 1, the others 0 and
    density 1 it is that source bit for bit. E[θ] is task arithmetic's θ if fᵢ = 1/dᵢ.

    Source: Yu et al. 2024, arXiv:2311.03099, sec. 3. mergekit's `dare_linear` is `rescale: l1`.
    """
    shares = shares_of(weights, scale=scale, normalize=normalize)
    only = sole(shares)
    if only is not None and drops[only].density >= 1:
        return sources[only].clone()
    active = [index for index, share in enumerate(shares) if share != 0]
    thinned = (drops[index].thinned(sources[index] - base, start) for index in active)
    return moved(base, weighted_sum(thinned, [shares[i] * drops[i].factor for i in active]))


class DareLinear(MergeMethod):
    """`dare_linear` as a plug-in."""

    name = "dare_linear"
    summary = "the base plus a weighted sum of task vectors, thinned at random and rescaled"
    formula = "θ = θ₀ + λ·Σᵢ wᵢ·fᵢ·mᵢ⊙(θᵢ − θ₀),  mᵢ ~ Bernoulli(dᵢ),  fᵢ = 1/dᵢ"
    parameters = (
        Parameter("weight", "source", "float", 1.0, "factor of the source's task vector"),
        *DROP_PARAMETERS,
        Parameter("normalize", "recipe", "bool", False, "divide by the sum of the weights"),
        Parameter("lambda", "recipe", "float", 1.0, "factor of the summed task vectors"),
    )

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> tuple[Drop, ...]:
        return drops(blocks, coefficients)

    def program(self, coefficients: Coefficients, prepared: tuple[Drop, ...]) -> Program:
        shares = shares_of(
            coefficients.floats("weight"),
            scale=coefficients.number("lambda"),
            normalize=coefficients.flag("normalize"),
        )
        only = sole(shares)
        if only is not None and prepared[only].density >= 1:
            return copy_of(only)
        rows = (
            Row(index, share * drop.factor, draw=drop.draw)
            for index, (share, drop) in enumerate(zip(shares, prepared, strict=True))
            if share != 0
        )
        return Program(tuple(rows), "base")

    def merge(self, block: Block, coefficients: Coefficients, prepared: tuple[Drop, ...]) -> Tensor:
        assert block.base is not None
        return dare_linear(
            block.base,
            block.sources,
            prepared,
            weights=coefficients.floats("weight"),
            scale=coefficients.number("lambda"),
            normalize=coefficients.flag("normalize"),
            start=block.start,
        )
