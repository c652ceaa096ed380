"""Iso-CTS: equal strength for the common directions of all tasks and for each task's own.

Knows nothing of checkpoints, layers or blocks: whole matrices in, one out.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from evomerge.merging.methods.base import Blocks, Coefficients, Parameter
from evomerge.merging.methods.iso_c import ISO_PARAMETERS, summed
from evomerge.merging.methods.matrices import (
    NO_DIRECTION,
    TOLERANCE,
    MatrixMethod,
    active,
    directions,
    polar,
    weighted_task_vectors,
)


def iso_cts(
    total: Tensor,
    taus: Iterable[Tensor],
    *,
    count: int,
    common: float = 0.8,
    tolerance: float = NO_DIRECTION,
) -> Tensor:
    """Replace the weakest common directions by task-specific ones, then flatten the spectrum.

        Δ = Σᵢ vᵢ = U·diag(σ)·V,  vᵢ = wᵢ·τᵢ         (thin SVD, r = min(m, n) directions)
        q = round((r − ⌊f·r⌋) / N),  c = r − N·q      (f is `common`; at most ⌊r/N⌋ for q)
        vᵢ − U_c·U_cᵀ·vᵢ = Uᵢ·diag(σᵢ)·Vᵢ             (U_c: the first c columns of U)
        U* = polar[U_c, U₁, ..., U_N],  V* = polar[V_c, V₁, ..., V_N]     (q of each Uᵢ, Vᵢ)
        θ = θ₀ + λ·σ̄·U*·V*                           (σ̄: the mean of all σ concatenated)
        θ = θ₀ + λ·Σᵢ vᵢ / N                         for a tensor that is not a matrix

    Shapes: total Δ [m, n], taus vᵢ N times [m, n], all float64, N is `count`; returns σ̄·U*·V*
    [m, n] float64. λ is applied in float64 too, then the task vector is rounded to float32 and
    added to the base in float32. Whole matrices are held in memory: about 15 in float64.
    With λ = 0 or without a weight the result is the base bit for bit; f = 1 is Iso-C. Halves round
    to even.

    Source: Marczak et al. 2025, arXiv:2502.04959, sec. 4.2. The authors have no weights, and take
    directions of σ = 0, which an SVD picks arbitrarily, for directions; we drop those of
    σ ≤ ε·σ₁ (ε is `tolerance`; what is left of a task is compared with Δ too), and inside `polar`.
    """
    rank = min(total.shape)
    own = min(round((rank - int(common * rank + 1e-9)) / count), rank // count)
    u, sigma, v = directions(total, tolerance)
    kept = rank - count * own
    lefts, spectra, rights = [u[:, :kept].clone()], [sigma[:kept]], [v[:kept].clone()]
    # a task vector inside the span leaves rounding, whose largest σ is no direction either
    least = tolerance * float(sigma[0]) if len(sigma) else 0.0
    for tau in taus:
        u, sigma, v = directions(tau - lefts[0] @ (lefts[0].mT @ tau), tolerance)
        found = min(int((sigma > least).sum()), own)
        lefts.append(u[:, :found].clone())
        spectra.append(sigma[:found])
        rights.append(v[:found].clone())
    strengths = torch.cat(spectra)
    if not len(strengths):
        return torch.zeros_like(total)
    left, right = polar(torch.cat(lefts, dim=1)), polar(torch.cat(rights).mT).mT
    return (left * strengths.mean()) @ right


class IsoCts(MatrixMethod):
    """`iso_cts` as a plug-in."""

    name = "iso_cts"
    summary = "common and task-specific directions of the task vectors, all made equally strong"
    formula = "θ = θ₀ + λ·σ̄·polar[U_c, U₁, ..., U_N]·polar[V_c, V₁, ..., V_N]  (see the page)"
    parameters = (
        *ISO_PARAMETERS,
        Parameter(
            "common",
            "recipe",
            "float",
            0.8,
            "share of the directions that come from the sum; the rest is the tasks' own",
            low=0.0,
            high=1.0,
        ),
        TOLERANCE,
    )

    def merged(self, blocks: Blocks, coefficients: Coefficients) -> Tensor:
        return iso_cts(
            summed(blocks, coefficients),
            weighted_task_vectors(blocks, coefficients),
            count=len(active(coefficients)),
            common=coefficients.number("common"),
            tolerance=coefficients.number("tolerance"),
        )
