"""PLeaS: two models, whatever they were trained from, in one of any size from one to both.

Which unit is which, and what layers are given, is an artifact's; how a partial merge is made of it
is `evomerge.merging.structure`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from evomerge.checkpoints.weights import Model
from evomerge.errors import MergeError
from evomerge.merging.methods.base import Fitted, Parameter
from evomerge.merging.methods.structural import Built, Resolve, StructuralMethod, throughout
from evomerge.merging.recipe import BASE, Recipe

if TYPE_CHECKING:
    from evomerge.merging.structure.pleas.model import Refitting


class Pleas(StructuralMethod):
    """Units that are alike are merged, the others kept apart, and every layer refit.

        max Σ_g w_g·r_g  where FLOPs(r) / FLOPs(0) ≤ budget, r_g of a group's units stay apart
        W = argmin ‖X Wᵀ − Y‖² + λ‖W − W₀‖²

    X and Y are what the layer was given and gave in both models, in the merged layout; W₀ is the
    partial merge. With a budget of 1, and no least squares, it is the average of the models once
    their units are in one order.

    Source: Nasery et al. 2024, arXiv:2407.02447. Ours: the ridge, `shares`, the blend, the
    sequential form.
    """

    name = "pleas"
    summary = "two models with their units matched, partially merged on a budget and refit"
    formula = "W = argmin ‖X Wᵀ − Y‖² + λ‖W − W₀‖²,  X, Y in the layout [merged | a | b]"
    parameters = (
        Parameter("weight", "source", "float", 1.0, "share of the model in merged units", low=0.0),
        Parameter(
            "budget",
            "recipe",
            "float",
            1.2,
            "cost of the result, as a multiple of one model's",
            low=1.0,
            high=2.0,
        ),
        Parameter(
            "allocation",
            "recipe",
            "choice",
            "programme",
            "what stays apart within the budget: programme, as published, by what each group is"
            " worth; uniform, the same share of each; shares, in proportion to `share`",
            choices=("programme", "uniform", "shares"),
        ),
        Parameter(
            "share",
            "recipe",
            "float",
            1.0,
            "with `allocation: shares`, how much of a group stays apart in proportion to others",
            low=1e-3,
        ),
        Parameter(
            "least_squares",
            "recipe",
            "choice",
            "parallel",
            "how layers are refit after the merge: parallel, as published, each by what both models"
            " give it; sequential, by what the layers before it give once refit, as the fit has"
            " left them for one budget; none",
            choices=("parallel", "sequential", "none"),
        ),
        Parameter(
            "ridge",
            "recipe",
            "float",
            1e-2,
            "with `least_squares: parallel`, λ as a share of the mean square of the layer's inputs",
            low=1e-6,  # the sums are kept in float32
        ),
        Parameter(
            "blend",
            "recipe",
            "float",
            1.0,
            "how far from the partial merge to the least squares",
            low=0.0,
            high=1.0,
        ),
    )
    needs_base = False
    takes_base = True
    min_sources = 2
    max_sources = 2
    artifact = "pleas"

    def published(self, recipe: Recipe) -> Recipe:
        budget = recipe.parameters.get("budget", self.parameters[1].default)
        sources = tuple(replace(source, parameters={}) for source in recipe.sources)
        return replace(recipe, parameters={"budget": budget}, sources=sources)

    def build(self, members: Mapping[str, Model], fitted: Fitted | None, resolve: Resolve) -> Built:
        from evomerge.merging.structure.pleas.allocation import units_apart
        from evomerge.merging.structure.pleas.model import PleasModel, Refitting, pair_of

        assert fitted is not None  # a recipe without is refused
        names = sorted(name for name in members if name != BASE)
        a, b = (members[name] for name in names)
        pair = pair_of(a, b, fitted)
        here = {g.name: resolve(g.binds[0].params[0]) for g in pair.widening.groups}
        seen = list(here.values())
        budget, allocation = float(throughout("budget", seen)), throughout("allocation", seen)
        shares = {group: at.number("share") for group, at in here.items()}
        worth = fitted.facts["worth"]
        apart = units_apart(pair.costs, budget, allocation, worth=worth, shares=shares)
        refitting = Refitting(
            form=throughout("least_squares", seen),
            ridge=throughout("ridge", seen),
            blend=throughout("blend", seen),
            weights=_weights(*throughout("weight", seen)),
        )
        if refitting.form == "parallel" and not pair.inputs:
            raise MergeError("least_squares: the artifact was fitted with `grams: false`, without"
                             " the sums of parallel ones; fit again, or take `none`")  # fmt: skip
        if refitting.form == "sequential":
            _check_sequential(fitted, apart, refitting)
        return PleasModel(pair, apart, refitting)


def _weights(first: float, second: float) -> tuple[float, float]:
    total = first + second
    if not total > 0:
        raise MergeError("weight: the two models' weights are 0; one must be above")
    return first / total, second / total


def _check_sequential(fitted: Fitted, apart: Mapping[str, int], refitting: Refitting) -> None:
    """Raise MergeError unless the fit has refit this very merge."""
    known = fitted.facts["sequential"]
    if known is None:
        raise MergeError("least_squares: the artifact was fitted without `sequential`; fit with"
                         " `sequential: {budget: ...}`, or take `parallel`")  # fmt: skip
    if known["apart"] != apart:
        raise MergeError(f"least_squares: sequential was fitted for a budget of {known['budget']:g}"
                         f" by allocation {known['allocation']}, where other units stay apart; take"
                         " that, or fit it for this one")  # fmt: skip
    if refitting.weights != (0.5, 0.5):
        raise MergeError("least_squares: sequential was fitted for models of equal weight; leave"
                         " `weight` out, or take `parallel`")  # fmt: skip
