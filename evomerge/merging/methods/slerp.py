"""SLERP: walk from one model to another along the arc between them.

Knows nothing of checkpoints, devices or studies; "from" and "to" are the recipe's order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from evomerge.merging.kernels.program import Program, Row, copy_of
from evomerge.merging.methods.base import (
    Block,
    Blocks,
    Coefficients,
    MergeMethod,
    Parameter,
    facts_of,
)
from evomerge.merging.methods.reductions import totals

PARALLEL = 0.9995
"""Beyond this |cos Ω| the arc is taken for a line (the constant of every implementation)."""


def slerp(first: Tensor, second: Tensor, *, t: float, cosine: float) -> Tensor:
    """Interpolate on the arc from one tensor to another.

        θ = [sin((1−t)·Ω)·a + sin(t·Ω)·b] / sin Ω        cos Ω = ⟨a, b⟩ / (‖a‖·‖b‖)
        θ = (1−t)·a + t·b                                where |cos Ω| > 0.9995

    Shapes: first a and second b, [n] float32; returns [n] float32. a and b are not normalised and
    Ω is the whole tensor's: `cosine` comes from `cosine_of`. Coefficients are computed in float64,
    products and the sum in float32. t = 0 is `first` and t = 1 `second`, bit for bit.

    Source: Shoemake 1985, "Animating rotation with quaternion curves"; the fallback, and one angle
    for a whole weight tensor, are mergekit's. Fine-tunes of one base are nearly parallel (cosines
    of 0.9999), so that for them SLERP mostly is the line.
    """
    near, far = _arc(t, cosine)
    if near == 0 or far == 0:
        return (second if near == 0 else first).clone()
    return first * near + second * far


def cosine_of(blocks: Blocks) -> float:
    """⟨a, b⟩ / (‖a‖·‖b‖) of the two sources' whole tensors, in float64; 0 where a norm is 0."""

    if (facts := facts_of(blocks)) is not None:
        first, dot, second = facts.gram(from_base=False)
        return _cosine(dot, first, second)

    def products(block: Block) -> Tensor:
        a, b = block.sources.double()
        return torch.stack([a * b, a * a, b * b])

    dot, first, second = totals(blocks, products) or (0.0, 0.0, 0.0)
    return _cosine(dot, first, second)


def _cosine(dot: float, first: float, second: float) -> float:
    norms = math.sqrt(first) * math.sqrt(second)
    return dot / norms if norms > 0 else 0.0


class Slerp(MergeMethod):
    """`slerp` as a plug-in."""

    name = "slerp"
    summary = "spherical interpolation from the recipe's first source to its second"
    formula = "θ = [sin((1−t)·Ω)·θ₁ + sin(t·Ω)·θ₂] / sin Ω,  cos Ω = ⟨θ₁, θ₂⟩ / (‖θ₁‖·‖θ₂‖)"
    parameters = (
        Parameter(
            "t",
            "recipe",
            "float",
            0.5,
            "place on the arc: 0 is the first source, 1 the second",
            low=0.0,
            high=1.0,
        ),
    )
    needs_base = False
    min_sources = 2
    max_sources = 2

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> float:
        return cosine_of(blocks)

    def program(self, coefficients: Coefficients, prepared: float) -> Program:
        first, second = (coefficients.order.index(place) for place in (0, 1))
        near, far = _arc(coefficients.number("t"), prepared)
        if near == 0 or far == 0:
            return copy_of(second if near == 0 else first)
        return Program((Row(first, near), Row(second, far)), "zero")

    def merge(self, block: Block, coefficients: Coefficients, prepared: float) -> Tensor:
        # sources lie in name order; the arc runs in the recipe's
        first, second = (block.sources[coefficients.order.index(place)] for place in (0, 1))
        return slerp(first, second, t=coefficients.number("t"), cosine=prepared)


def _arc(t: float, cosine: float) -> tuple[float, float]:
    if t in (0, 1) or abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
