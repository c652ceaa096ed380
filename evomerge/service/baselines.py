"""The trials every study starts with, so that a winner is always compared with the obvious merges.

The base, every source, the uniform average, and task arithmetic over a grid of lambda; where the
search changes the models' structure, its method as it was published instead of the last. Pure:
knows nothing of stores and executors.
"""

from __future__ import annotations

from collections.abc import Mapping

from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.trial import Kind, NewTrial

# one lambda for the sum of all task vectors; 1/N, the uniform average, is a baseline of its own
LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def baselines(
    base: ModelRef,
    sources: Mapping[str, ModelRef],
    dtype: str | None,
    *,
    published: Recipe | None = None,
) -> list[NewTrial]:
    """Trials 0 to k: base, each source, uniform average, task arithmetic for each lambda.

    With `published`, the recipe of a method that changes structure, as published: that, and of the
    others those that are different models.
    """
    recipes: list[tuple[Kind, str, Recipe]] = [
        ("base", "base", _task_arithmetic(base, sources, 0.0, dtype))
    ]
    for name, model in sources.items():
        if published is None or model != base:
            recipes.append(("source", name, _one_source(base, sources, name, dtype)))
    if published is None or len(sources) > 1:
        recipes.append(("uniform", "uniform average", _average(base, sources, dtype)))
    if published is not None:
        recipes.append(("published", f"{published.method} as published", published))
    for scale in LAMBDAS if published is None else ():
        recipe = _task_arithmetic(base, sources, scale, dtype)
        recipes.append(("task_arithmetic", f"task arithmetic {scale:g}", recipe))
    return [
        NewTrial(number, kind, label, None, recipe.to_json(), recipe.digest)
        for number, (kind, label, recipe) in enumerate(recipes)
    ]


def _sources(models: Mapping[str, ModelRef]) -> tuple[Source, ...]:
    return tuple(Source(name, model) for name, model in models.items())


def _task_arithmetic(
    base: ModelRef, models: Mapping[str, ModelRef], scale: float, dtype: str | None
) -> Recipe:
    parameters = {"weight": 1.0, "lambda": scale, "normalize": False}
    return Recipe("task_arithmetic", base, _sources(models), parameters, dtype)


def _one_source(
    base: ModelRef, models: Mapping[str, ModelRef], name: str, dtype: str | None
) -> Recipe:
    return Recipe("linear", base, _sources({name: models[name]}), {"weight": 1.0}, dtype)


def _average(base: ModelRef, models: Mapping[str, ModelRef], dtype: str | None) -> Recipe:
    return Recipe("linear", base, _sources(models), {"weight": 1.0, "normalize": True}, dtype)
