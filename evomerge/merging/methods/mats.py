"""MaTS: RegMean's least squares, approached by conjugate gradients from a simpler merge.

Knows nothing of data: the inner products of the layers' inputs are an artifact's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evomerge.merging.kernels.program import Program
from evomerge.merging.methods.base import Block, Blocks, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.gram import (
    WEIGHT,
    System,
    average,
    by_inputs,
    is_layer,
    off_diagonal,
    system,
)
from evomerge.merging.methods.linear import Linear
from evomerge.merging.methods.matrices import active, gathered
from evomerge.merging.methods.simpler import with_parameters
from evomerge.merging.methods.task_arithmetic import TaskArithmetic

_DONE = 1e-12
"""An output whose residual has shrunk by this factor is solved; going on would add up rounding."""


def mats(problem: System, *, iterations: int) -> Tensor:
    """Take K steps of conjugate gradients towards the solution of RegMean's system.

        S·Δ = R,  Δ₀ = 0:   Pₖ = Rₖ + βₖ·Pₖ₋₁,   Δₖ₊₁ = Δₖ + αₖ·Pₖ,   W = W₀ + Δ_K

    Shapes: returns W [d, o] float64. α and β are each output's own: its least squares do not
    depend on those of others. The error ⟨Δ − Δ*, S·(Δ − Δ*)⟩ of each output falls with every step;
    K = 0 is W₀. Directions without data stay as they are in W₀.

    Source: Tam, Bansal, Raffel 2024, arXiv:2312.04339, with the Gram matrices of RegMean.
    In the released code for comparisons the start called average is a sum; ours is an average.
    """
    residual = problem.right.clone()
    delta = torch.zeros_like(residual)
    direction = residual.clone()
    norms = residual.square().sum(0)  # [o]
    goal = norms * _DONE**2
    for _ in range(iterations):
        if not bool((norms > goal).any()):
            break
        moved = problem.left @ direction
        curvature = (direction * moved).sum(0)
        step = torch.where((norms > goal) & (curvature > 0), norms / curvature, 0.0)
        delta += direction * step
        residual -= moved * step
        before, norms = norms, residual.square().sum(0)
        direction = residual + direction * torch.where(before > 0, norms / before, 0.0)
    return problem.start + delta


class MaTS(MergeMethod):
    """`mats` as a plug-in; tensors without a Gram matrix stay as they are in the start."""

    name = "mats"
    summary = "a few steps from a simple merge towards what regmean solves for"
    formula = "S·(W − W₀) = Σᵢ wᵢ·G̃ᵢ·(Wᵢ − W₀), S = Σᵢ wᵢ·G̃ᵢ, by K conjugate gradients from W₀"
    parameters = (
        WEIGHT,
        Parameter(
            "iterations",
            "recipe",
            "float",
            50.0,
            "steps of conjugate gradients, rounded; 0 is the start itself",
            low=0.0,
            high=10_000.0,
        ),
        Parameter(
            "init",
            "recipe",
            "choice",
            "average",
            "where the steps start",
            choices=("average", "task_arithmetic"),
            base_choices=("task_arithmetic",),
        ),
        Parameter(
            "lambda", "recipe", "float", 0.3, "factor of the task vectors, of `task_arithmetic`"
        ),
        off_diagonal(1.0),
    )
    needs_base = False
    takes_base = True
    artifact = "gram"

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> Tensor | None:
        """The merged layer, flat in float32; None for what stays as in the start."""
        iterations = round(coefficients.number("iterations"))
        averaged = coefficients.choice("init") == "average"
        if iterations == 0 or (averaged and len(active(coefficients)) < 2):
            return None
        if not active(coefficients) or not is_layer(coefficients):
            return None
        method, known = _start(coefficients)

        def row(block: Block) -> Tensor:
            return method.merge(block, known, None)

        start = average(blocks, coefficients) if averaged else gathered(blocks, coefficients, row)
        solved = mats(system(start, blocks, coefficients), iterations=iterations)
        return by_inputs(solved, coefficients).float().flatten()

    def program(self, coefficients: Coefficients, prepared: Any) -> Program | None:
        if prepared is not None:
            return None
        method, known = _start(coefficients)
        return method.program(known, None)

    def merge(self, block: Block, coefficients: Coefficients, prepared: Tensor | None) -> Tensor:
        if prepared is not None:
            return prepared[block.start : block.start + block.sources.shape[1]].clone()
        method, known = _start(coefficients)
        return method.merge(block, known, None)


def _start(coefficients: Coefficients) -> tuple[Linear | TaskArithmetic, Coefficients]:
    if coefficients.choice("init") == "average":
        return Linear(), with_parameters(coefficients, normalize=True)
    return TaskArithmetic(), with_parameters(coefficients, normalize=False)
