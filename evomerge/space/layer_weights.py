"""From genomes to weights by source and tensor and back: Jacobians, and the nearest genome.

For spaces of merge methods that are linear in one number for each source. Knows no data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares

from evomerge.checkpoints.weights import Model
from evomerge.merging.fitted.linear_merges import Directions, check_linear, shares
from evomerge.merging.layout import layout
from evomerge.merging.methods import registry
from evomerge.merging.recipe import ModelRef, Recipe
from evomerge.space.space import Space
from evomerge.trial import Genome

Array = NDArray[np.float64]
_STEP = 1e-5  # of a gene; what decodes is linear in most genes and smooth in all


class LayerWeights:
    """The shares that genomes of a space stand for: c [s, l], sources sorted, tensors as given.

    Raises MergeError for a space whose merges are not linear in them.
    """

    def __init__(self, space: Space, sources: Sequence[str], tensors: Sequence[str]) -> None:
        self.space = space
        self.sources = tuple(sources)
        self.names = sorted(sources)
        self.tensors = tuple(tensors)
        places = layout(tensors)
        self._places = [places[name] for name in self.tensors]
        self._genes = space.genes(self.sources)
        check_linear(self._decode(space.start(self.sources)))

    def at(self, genome: Sequence[float]) -> Array:
        """c [s, l] of a genome [genes]."""
        recipe = self._decode(genome)
        columns = [
            shares(recipe.method, registry.coefficients(recipe, place, (1,)))
            for place in self._places
        ]
        return np.array(columns, np.float64).reshape(len(self._places), len(self.names)).T

    def jacobian(self, genome: Sequence[float]) -> Array:
        """∂c/∂genome [s, l, genes]: central differences, one-sided at a bound; 0 for a discrete
        gene, which has no slope. Exact to rounding in genes that c is linear in."""
        columns = []
        for index, gene in enumerate(self._genes):
            low, high = max(genome[index] - _STEP, 0.0), min(genome[index] + _STEP, 1.0)
            if gene.levels:
                columns.append(np.zeros((len(self.names), len(self.tensors))))
                continue
            above, below = (self.at(_moved(genome, index, to)) for to in (high, low))
            columns.append((above - below) / (high - low))
        return np.stack(columns, axis=-1)

    def chain(self, genome: Sequence[float], gradients: Mapping[str, Mapping[str, float]]) -> Array:
        """∂L/∂genome [genes] from ∂L/∂c by source and tensor; a tensor without is no part of L."""
        flow = np.array(
            [[gradients[s].get(name, 0.0) for name in self.tensors] for s in self.names]
        )
        chained: Array = np.einsum("sl,slg->g", flow, self.jacobian(genome))
        return chained

    @property
    def free(self) -> list[int]:
        """The genes that have a slope: those that are not discrete."""
        return [index for index, gene in enumerate(self._genes) if not gene.levels]

    def _decode(self, genome: Sequence[float]) -> Recipe:
        models = {name: ModelRef(name) for name in self.sources}
        return self.space.decode(genome, base=ModelRef(""), sources=models, dtype=None, seed=0)


@dataclass(frozen=True)
class Projection:
    """The genome [genes] nearest to given weights; `distance` is ‖W(genome) − W‖ / ‖W − O‖ over
    all tensors, 0 where the weights lie in the space."""

    genome: Genome
    distance: float


def project(
    weights: LayerWeights, wanted: Mapping[str, Mapping[str, float]], metric: Mapping[str, Array]
) -> Projection:
    """The genome whose merge is nearest to the merge with the weights `wanted`, in least squares.

        min Σ_l (c_l(u) − c*_l)ᵀ G_l (c_l(u) − c*_l)  over u in [0, 1]^genes,   G_l = ⟨D_i, D_j⟩

    which is ‖W(u) − W*‖². `metric` holds G_l [s, s] by tensor; a tensor that `wanted` or `metric`
    lacks has no part. From the space's start; discrete genes stay there. Trust region reflective
    (Branch, Coleman and Li 1999).
    """
    start = np.array(weights.space.start(weights.sources))
    known = [set(wanted[source]) for source in weights.names]
    places = [
        place
        for place, name in enumerate(weights.tensors)
        if name in metric and all(name in tensors for tensors in known)
    ]
    names = [weights.tensors[place] for place in places]
    target = np.array([[wanted[source][name] for name in names] for source in weights.names])
    roots = np.stack([_root(metric[name]) for name in names])  # [l, s, s]
    free = weights.free

    def genome(x: Array) -> Genome:
        moved = start.copy()
        moved[free] = np.clip(x, 0.0, 1.0)
        return tuple(moved.tolist())

    def residuals(x: Array) -> Array:
        return _residuals(roots, weights.at(genome(x))[:, places] - target)

    def slopes(x: Array) -> Array:
        jacobian = weights.jacobian(genome(x))[:, places][..., free]
        rows: Array = np.einsum("lts,slg->ltg", roots, jacobian).reshape(-1, len(free))
        return rows

    found = least_squares(
        residuals, start[free], slopes, (0.0, 1.0), xtol=1e-15, ftol=1e-15, gtol=1e-15
    )
    whole = float(np.linalg.norm(_residuals(roots, target)))
    distance = float(np.linalg.norm(found.fun)) / whole if whole else 0.0
    return Projection(genome(found.x), distance)


def metric_of(
    recipe: Recipe, models: Mapping[str, Model], tensors: Sequence[str]
) -> dict[str, Array]:
    """G_l [s, s] = ⟨D_{i,l}, D_{j,l}⟩ of each tensor, in float64."""
    directions = Directions(recipe, models)
    found = {}
    for name in tensors:
        rows = torch.stack([row.reshape(-1).double() for row in directions.of(name)])
        found[name] = np.array((rows @ rows.T).tolist())
    return found


def _residuals(roots: Array, off: Array) -> Array:
    """R_l·off_l of every tensor, flat; roots [l, s, s], off [s, l]."""
    flat: Array = np.einsum("lts,sl->lt", roots, off).reshape(-1)
    return flat


def _root(gram: Array) -> Array:
    """R with RᵀR = G, of a G that rounding may have left a little indefinite."""
    values, vectors = np.linalg.eigh(gram)
    rooted: Array = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
    return rooted


def _moved(genome: Sequence[float], index: int, to: float) -> Genome:
    return tuple(to if i == index else float(u) for i, u in enumerate(genome))
