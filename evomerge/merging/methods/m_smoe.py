"""M-SMoE: the experts of one mixture merged in groups, by what a routing fit has seen.

How experts are compared, grouped and averaged is `evomerge.merging.structure`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

from evomerge.checkpoints.weights import Model
from evomerge.merging.methods.base import Fitted, Parameter
from evomerge.merging.methods.structural import Built, Resolve, StructuralMethod
from evomerge.merging.recipe import BASE, Recipe
from evomerge.merging.structure.experts.settings import Similarity

# Those of correlation need the inputs themselves, which no artifact holds.
_SIMILARITY = tuple(
    base for base in get_args(Similarity) if not base.startswith("neuron_correlation")
)


class MSmoe(StructuralMethod):
    """Each group of experts becomes one, written in the place of every member.

        E = Σᵢ aᵢ·Pᵢ(Eᵢ) / Σᵢ aᵢ,   a = usage^exponent

    Pᵢ brings the neurons of an expert into the order of a reference. The router stays as it is.
    The result has the shapes of the model; `evomerge merge` with `experts:` writes a small one.

    Source: Li et al. 2024, arXiv:2310.01334; clusters: Chen et al. 2025, arXiv:2410.08589. Ours:
    layers' shares in place of the published allocation, the exponent, alignment to the dominant,
    rows by their length where experts are cut to a rank.
    """

    name = "m_smoe"
    summary = "experts of one mixture merged in groups around the most used ones"
    formula = "E = Σᵢ aᵢ·Pᵢ(Eᵢ) / Σᵢ aᵢ over a group,  a = usage^exponent"
    parameters = (
        Parameter("keep", "recipe", "float", 4.0, "experts for each layer, on average", low=1.0),
        Parameter(
            "allocation",
            "recipe",
            "choice",
            "adaptive",
            "adaptive: by usage over all layers, as published; shares: by `share`",
            choices=("adaptive", "shares"),
        ),
        Parameter(
            "share",
            "recipe",
            "float",
            1.0,
            "with `allocation: shares`, how many experts a layer keeps in proportion to others",
            low=1e-3,
        ),
        Parameter(
            "groups",
            "recipe",
            "choice",
            "dominant",
            "dominant: around the most used; clusters: hierarchical (HC-SMoE, with `similarity:"
            " outputs` and `alignment: none`); prune: grouped as dominant, and the most used"
            " stands for all",
            choices=("dominant", "clusters", "prune"),
        ),
        Parameter(
            "similarity",
            "recipe",
            "choice",
            "router_logits",
            "what experts are compared by",
            choices=_SIMILARITY,
        ),
        Parameter(
            "usage",
            "recipe",
            "choice",
            "count",
            "count: tokens sent to an expert; gate_mass: the sum of their gate values",
            choices=("count", "gate_mass"),
        ),
        Parameter("exponent", "recipe", "float", 1.0, "of usage; 0 weighs all alike", low=0.0),
        Parameter(
            "alignment",
            "recipe",
            "choice",
            "first",
            "whose order of neurons experts take: first (as published), dominant, none",
            choices=("first", "dominant", "none"),
        ),
        Parameter(
            "rank",
            "recipe",
            "float",
            0.0,
            "of MC-SMoE: matrices become a product of that rank, on average, and rows; 0: whole",
            low=0.0,
        ),
        Parameter(
            "rank_share",
            "recipe",
            "float",
            1.0,
            "the rank of a layer in proportion to others, the numbers in all staying the same",
            low=1e-3,
        ),
        Parameter(
            "density",
            "recipe",
            "float",
            0.1,
            "with `rank`, the share of rows, the longest, of what the product leaves",
            low=0.0,
            high=1.0,
        ),
    )
    needs_base = False
    takes_base = True
    max_sources = 1
    artifact = "routing"

    def published(self, recipe: Recipe) -> Recipe:
        keep = recipe.parameters.get("keep", self.parameters[0].default)
        if isinstance(keep, int | float):  # the adaptive rule takes whole numbers
            keep = float(round(keep))
        size = {k: v for k, v in recipe.parameters.items() if k in ("rank", "density")}
        return replace(recipe, parameters={"keep": keep, **size})

    def build(self, members: Mapping[str, Model], fitted: Fitted | None, resolve: Resolve) -> Built:
        from evomerge.merging.structure.experts.model import (
            ExpertModel,  # it needs the live network
        )

        assert fitted is not None  # a recipe without is refused
        (model,) = (model for name, model in members.items() if name != BASE)
        return ExpertModel(model, fitted, resolve)
