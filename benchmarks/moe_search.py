"""A search over how many experts each layer keeps, at a fixed size, beside the published rule.

Everything else is M-SMoE as published. What three layers can keep is few enough to try all of it;
then experts are moved between the groups of the best. Candidates are judged on the selection part
alone. Knows nothing of how losses are shown.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from moe_scores import MoeScores, Scored
from torch import Tensor

from evomerge.merging.structure.experts.grouping import Groups
from evomerge.merging.structure.experts.plan import LayerPlan, group_weights
from evomerge.merging.structure.experts.settings import ExpertSettings

RULE, UNIFORM = "the published rule", "the same in each layer"
COUNTS, GROUPS = "search: experts by layer", "search: groups, from there"
MOVES = 40
CHOSEN_ON = "selection"

Plans = list[LayerPlan]


def searched(scores: MoeScores, keep: int, moves: int = MOVES) -> dict[str, Scored]:
    """Both rules and both searches, with their losses on both parts."""
    settings = ExpertSettings(keep=keep)
    uniform = settings.model_copy(update={"allocation": "uniform"})
    size = keep * len(scores.layers)
    arms: dict[str, Callable[[], Plans]] = {
        RULE: lambda: scores.plan(settings),
        UNIFORM: lambda: scores.plan(uniform),
        COUNTS: lambda: best_counts(scores, size),
        GROUPS: lambda: best_groups(scores, size, moves),
    }

    def both(arm: str) -> Scored:
        return scores.planned(arms[arm](), settings, (CHOSEN_ON, "report"))

    return {arm: scores.kept(f"{keep} {arm} {moves}", partial(both, arm)) for arm in arms}


def best_counts(scores: MoeScores, size: int) -> Plans:
    """Every way for the layers to keep `size` experts in all; the best."""
    experts = scores.layers[0].experts

    def loss(counts: tuple[int, ...]) -> float:
        plans = scores.plan(ExpertSettings(keep=counts))
        return scores.kept(f"selection {counts}", lambda: scored(scores, plans)).losses[CHOSEN_ON]

    best = min(allocations(len(scores.layers), experts, size), key=loss)
    return scores.plan(ExpertSettings(keep=best))


def best_groups(scores: MoeScores, size: int, moves: int) -> Plans:
    """A (1+1) search from the best allocation: a change is kept where it is better."""
    dice = random.Random(scores.seed)
    best = best_counts(scores, size)
    loss = merit(scores, best)
    for _ in range(moves):
        candidate = changed(best, scores.usage, dice)
        if (found := merit(scores, candidate)) < loss:
            best, loss = candidate, found
    return best


def merit(scores: MoeScores, plans: Plans) -> float:
    return scored(scores, plans).losses[CHOSEN_ON]


def scored(scores: MoeScores, plans: Plans) -> Scored:
    return scores.planned(plans, ExpertSettings(keep=1), (CHOSEN_ON,))


def allocations(layers: int, experts: int, size: int) -> Iterator[tuple[int, ...]]:
    """Experts kept by layer, at least one in each, `size` in all."""
    each = itertools.product(range(1, experts + 1), repeat=layers)
    return (counts for counts in each if sum(counts) == size)


def changed(plans: Plans, usage: Sequence[Tensor], dice: random.Random) -> Plans:
    """One expert of one layer goes to another group, or changes places with one of it.

    Sizes of the model stay: no group is left empty. Nothing changes where there is one group only.
    """
    at = dice.choice([k for k, plan in enumerate(plans) if len(plan.groups.members) > 1])
    groups = [list(members) for members in plans[at].groups.members]
    origin, target = dice.sample(groups, 2)
    moved = dice.choice(origin)
    if len(origin) == 1 or dice.random() < 0.5:
        back = dice.choice(target)
        target.remove(back)
        origin.append(back)
    origin.remove(moved)
    target.append(moved)
    return [*plans[:at], planned(groups, usage[at], plans[at]), *plans[at + 1 :]]


def planned(groups: Sequence[Sequence[int]], usage: Tensor, old: LayerPlan) -> LayerPlan:
    """Groups led by their most used expert, with the published weights."""
    leaders = [0] * len(usage)
    for members in groups:
        leader = max(members, key=lambda expert: float(usage[expert]))
        for expert in members:
            leaders[expert] = leader
    found = Groups(tuple(leaders))
    return replace(old, groups=found, weights=group_weights(usage, found, ExpertSettings(keep=1)))
