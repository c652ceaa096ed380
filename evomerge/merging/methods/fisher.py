"""Fisher merging: an average in which each weight counts as much as its source needs it.

Knows nothing of data: the Fisher information is an artifact's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import MergeError
from evomerge.merging.kernels.program import Program
from evomerge.merging.methods.base import Block, Blocks, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.linear import Linear, shares
from evomerge.merging.methods.matrices import active
from evomerge.merging.methods.simpler import with_parameters

_AVERAGE = Linear()


def fisher_key(source: str, tensor: str) -> str:
    """What the Fisher information of a source's tensor is called in an artifact."""
    return f"{tensor} of {source}"


def fisher(
    sources: Sequence[Tensor],
    fishers: Sequence[Tensor],
    *,
    weights: Sequence[float],
    floors: Sequence[float],
    norms: Sequence[float],
) -> Tensor:
    """Average models, each element weighed by its Fisher information.

        θ = Σᵢ wᵢ·fᵢ·θᵢ / Σᵢ wᵢ·fᵢ        fᵢ = max(Fᵢ, φᵢ) / νᵢ

    Shapes: sources and fishers s times [n], weights, floors φ and norms ν [s]; returns [n] float32.
    Everything is computed in float64. Where no source has any information, Σᵢ wᵢ·θᵢ / Σᵢ wᵢ.
    Fishers all equal give that too, and a single source is that source bit for bit.

    Source: Matena and Raffel 2022, arXiv:2111.09832. The authors' code keeps the floor from
    all models but the first, which then wins wherever nothing is known; ours has it on all.
    """
    total = torch.zeros_like(sources[0], dtype=torch.float64)
    merged, mean = torch.zeros_like(total), torch.zeros_like(total)
    rows = zip(sources, fishers, weights, floors, norms, strict=True)
    for source, information, weight, floor, norm in rows:
        share = information.double().clamp_min(floor) * (weight / norm)
        total += share
        merged += share * source
        mean += source.double() * weight
    mean /= sum(weights)
    return torch.where(total > 0, merged / total, mean).float()


class Fisher(MergeMethod):
    """`fisher` as a plug-in; tensors that are not learned (buffers) are averaged."""

    name = "fisher"
    summary = "average weighed, element by element, by each source's Fisher information"
    formula = "θ = Σᵢ wᵢ·fᵢ·θᵢ / Σᵢ wᵢ·fᵢ,  fᵢ = max(Fᵢ, φ·mean(Fᵢ)) / ‖Fᵢ‖"
    parameters = (
        Parameter("weight", "source", "float", 1.0, "share of the source", low=0.0),
        Parameter(
            "floor",
            "recipe",
            "float",
            1e-6,
            "φ: no element's information is less than this share of the model's mean; the larger, "
            "the nearer to the plain average",
            low=0.0,
        ),
        Parameter(
            "normalize",
            "recipe",
            "bool",
            True,
            "divide each source's information by its L2 norm over the whole model",
        ),
    )
    needs_base = False
    artifact = "fisher"

    def prepare(
        self, blocks: Blocks, coefficients: Coefficients, survey: Any
    ) -> list[Tensor] | None:
        """Fᵢ of each active source, flat and as stored; None for what is averaged."""
        assert coefficients.fitted is not None
        keys = [
            fisher_key(coefficients.names[i], coefficients.tensor) for i in active(coefficients)
        ]
        if len(keys) < 2 or not all(key in coefficients.fitted for key in keys):
            return None
        found = [coefficients.fitted.tensor(key).view(-1) for key in keys]
        if any(len(information) != coefficients.size for information in found):
            raise MergeError(
                f"{coefficients.tensor}: the artifact was fitted on tensors of"
                f" {len(found[0])} elements, the merge has {coefficients.size}; fit it on models"
                " with the vocabulary of the merge"
            )
        return found

    def program(self, coefficients: Coefficients, prepared: Any) -> Program | None:
        return None if prepared is not None else _AVERAGE.program(_averaged(coefficients), None)

    def merge(
        self, block: Block, coefficients: Coefficients, prepared: list[Tensor] | None
    ) -> Tensor:
        if prepared is None:
            return _AVERAGE.merge(block, _averaged(coefficients), None)
        assert coefficients.fitted is not None
        facts = coefficients.fitted.facts
        chosen = active(coefficients)
        names = [coefficients.names[index] for index in chosen]
        own = shares(coefficients.floats("weight"), normalize=True)
        norms = facts["norms"] if coefficients.flag("normalize") else dict.fromkeys(names, 1.0)
        end = block.start + block.sources.shape[1]
        return fisher(
            [block.sources[index] for index in chosen],
            [information[block.start : end] for information in prepared],
            weights=[own[index] for index in chosen],
            floors=[coefficients.number("floor") * facts["means"][name] for name in names],
            norms=[norms[name] for name in names],
        )


def _averaged(coefficients: Coefficients) -> Coefficients:
    return with_parameters(coefficients, normalize=True)
