"""Passthrough: one model as it is, the way layers of several models are stacked into one.

Knows nothing of slices: which model is passed through where is the recipe's business.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from evomerge.merging.kernels.program import Program, Row
from evomerge.merging.methods.base import Block, Coefficients, MergeMethod, Parameter


class Passthrough(MergeMethod):
    """Take one model, each tensor times a factor.

        θ = s·θ₁

    Shapes: as in `MergeMethod`; the product runs in float32. With s = 1 the result is the source
    bit for bit; s = 0 is a tensor of zeros, so that a residual block whose output projection has it
    computes the identity.
    There is one source per tensor: a recipe with `slices` names it slice by slice.

    Source: mergekit's `passthrough` and its `scale`; stacking layers of fine-tunes ("frankenmerge")
    goes back to community models such as Goliath 120B.
    """

    name = "passthrough"
    summary = "one model as it is; with `slices`, layers of several models stacked into one"
    formula = "θ = s·θ₁"
    parameters = (Parameter("scale", "source", "float", 1.0, "factor of the tensor"),)
    needs_base = False
    min_sources = 1
    max_sources = 1

    def program(self, coefficients: Coefficients, prepared: Any) -> Program:
        (scale,) = coefficients.floats("scale")
        if scale == 1:
            return Program(rows=(), origin="zero", copies=0)
        return Program(rows=(Row(0, scale),), origin="zero")

    def merge(self, block: Block, coefficients: Coefficients, prepared: Any) -> Tensor:
        (scale,) = coefficients.floats("scale")
        return block.sources[0].clone() if scale == 1 else block.sources[0] * scale
