"""What merge methods share that see a tensor as one matrix: gathering it, and its factors.

Everything is float64 and by LAPACK: deterministic for one number of threads. Knows no method.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from evomerge.merging.methods.base import Block, Blocks, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.combination import moved, sole, task_vectors, weighted_sum

NO_DIRECTION = 1e-9
"""A singular value this small beside the largest is rounding; its vectors mean nothing."""

TOLERANCE = Parameter(
    "tolerance",
    "recipe",
    "float",
    NO_DIRECTION,
    "singular values up to this share of the largest are noise and dropped: 0.01 tells a LoRA from "
    "the rounding of bfloat16 weights",
    low=0.0,
    high=1.0,
)


def gathered(blocks: Blocks, coefficients: Coefficients, row: Callable[[Block], Tensor]) -> Tensor:
    """A whole tensor in float64, `row` [n] being its part in a block. Shapes: returns the shape."""
    whole: Tensor | None = None
    for block in blocks():
        part = row(block)
        if whole is None:
            whole = torch.empty(coefficients.size, dtype=torch.float64, device=part.device)
        whole[block.start : block.start + part.numel()] = part
    assert whole is not None
    return whole.view(coefficients.shape)


def directions(matrix: Tensor, tolerance: float = NO_DIRECTION) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD U·diag(σ)·V without the directions of σ ≤ ε·σ₁, ε being the tolerance.

    Shapes: matrix [m, n]; returns U [m, k], σ [k] descending, V [k, n]; k = 0 for a zero matrix.
    """
    u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
    count = int((sigma > tolerance * sigma[0]).sum())
    return u[:, :count], sigma[:count], v[:count]


def polar(matrix: Tensor) -> Tensor:
    """The orthogonal polar factor U·V of a matrix, on the directions that it has.

    Shapes: [m, k] -> [m, k]. Of all matrices with orthonormal columns the nearest, if the columns
    are independent; where they are not, a partial isometry.
    """
    u, _, v = directions(matrix)
    return u @ v


class MatrixMethod(MergeMethod):
    """A method that merges matrices as wholes, and averages all other tensors.

    Sources of weight 0 take no part: N counts the others. The parameters must include `weight` and
    `lambda`.
    """

    @abstractmethod
    def merged(self, blocks: Blocks, coefficients: Coefficients) -> Tensor:
        """The merged task vector τ_m of a matrix, before λ. Shapes: returns [m, n] float64."""

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: object) -> Tensor | None:
        """λ·τ_m of a matrix, flat in float32; None where `merge` needs nothing."""
        scale = coefficients.number("lambda")
        if not is_matrix(coefficients) or scale == 0 or not active(coefficients):
            return None
        return (self.merged(blocks, coefficients) * scale).float().flatten()

    def merge(self, block: Block, coefficients: Coefficients, prepared: Tensor | None) -> Tensor:
        assert block.base is not None
        if prepared is not None:
            return moved(block.base, prepared[block.start : block.start + len(block.base)])
        if is_matrix(coefficients):
            return block.base.clone()
        return _averaged(block.base, block.sources, coefficients)


def is_matrix(coefficients: Coefficients) -> bool:
    """Whether a tensor is merged as a matrix: the authors leave CLIP's `text_projection` out."""
    return len(coefficients.shape) == 2 and "text_projection" not in coefficients.tensor


def active(coefficients: Coefficients) -> list[int]:
    """The indices of the sources that have a weight."""
    weights = coefficients.floats("weight")
    return [index for index, weight in enumerate(weights) if weight != 0]


def weighted_task_vectors(blocks: Blocks, coefficients: Coefficients) -> Iterator[Tensor]:
    """wᵢ·τᵢ of each active source, whole, one at a time. Shapes: yields [m, n] float64."""
    weights = coefficients.floats("weight")
    return (task_vector(blocks, coefficients, i) * weights[i] for i in active(coefficients))


def task_vector(blocks: Blocks, coefficients: Coefficients, index: int) -> Tensor:
    """τᵢ of one source, whole. Shapes: returns [m, n] float64."""

    def row(block: Block) -> Tensor:
        assert block.base is not None
        return block.sources[index] - block.base

    return gathered(blocks, coefficients, row)


def _averaged(base: Tensor, sources: Tensor, coefficients: Coefficients) -> Tensor:
    """θ₀ + λ·Σᵢ wᵢ·τᵢ / N over the N active sources. Shapes: base [n], sources [s, n]."""
    count = max(len(active(coefficients)), 1)
    scale = coefficients.number("lambda")
    shares = [scale * weight / count for weight in coefficients.floats("weight")]
    only = sole(shares)
    if only is not None:
        return sources[only].clone()
    return moved(base, weighted_sum(task_vectors(base, sources), shares))
