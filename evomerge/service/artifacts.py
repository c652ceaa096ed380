"""What a study must know of the artifacts that it names, before any model is loaded.

An artifact must be whole, of these very models, and learned from nothing that the study selects or
reports on. Knows neither stores nor samplers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.checkpoints.weights import Model
from evomerge.errors import MergeError, UserError
from evomerge.merging.fitted.artifact import Artifact, open_artifact
from evomerge.merging.fitted.layer_weights import layer_weights
from evomerge.merging.fitted.linear_merges import WEIGHTED
from evomerge.merging.methods.registry import ALL
from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.scoring.splits import part_of
from evomerge.scoring.tasks import LoadedTasks
from evomerge.space import Space
from evomerge.spec import StudySpec


def inspect_artifact(
    spec: StudySpec,
    method: str,
    digests: Mapping[str, str],
    tasks: LoadedTasks | None,
    problems: list[str],
) -> dict[str, str]:
    """The digest of `spec.artifact` by its path; faults go to `problems`.

    `digests` are those of the models that could be opened, by path. Empty where a method needs no
    artifact, or where what there is will not do.
    """
    wanted = ALL[method].artifact if method in ALL else None
    if method in ALL and (fault := _fault(spec.artifact, method, wanted)):
        problems.append(fault)
    if wanted is None or spec.artifact is None:
        return {}
    found = checked_artifact("artifact", spec.artifact, spec, digests, tasks, problems)
    if found is None:
        return {}
    if found.provenance.kind != wanted:
        problems.append(
            f"artifact: {spec.artifact} was fitted as {found.provenance.kind!r}, the space's"
            f" {method} applies {wanted!r}"
        )
    return {spec.artifact: found.digest}


def checked_artifact(
    key: str,
    path: str,
    spec: StudySpec,
    digests: Mapping[str, str],
    tasks: LoadedTasks | None,
    problems: list[str],
) -> Artifact | None:
    """The artifact that a spec names under `key`; None, with lines in `problems`, if it will not
    do for the study's models and items."""
    try:
        found = open_artifact(Path(path))
        found.check_contents()
        found.check_models(_models(spec, digests))
    except UserError as error:
        problems.append(f"{key}: {error}")
        return None
    lines = seen_items(found.provenance.items, tasks) if tasks else []
    problems += [f"{key}: {path} was fitted on {line}; fit it on other data" for line in lines]
    return None if lines else found


def projected(
    artifact: Artifact, space: Space, spec: StudySpec, models: Mapping[str, Model]
) -> dict[str, Any]:
    """The genome of the space that is nearest to an artifact's weights, as JSON.

    `distance` is how far its merge is from theirs, as a share of how far theirs is from where all
    weights are 0. Raises MergeError where the artifact has no weights, or the space none that a
    merge is linear in.
    """
    from evomerge.space.layer_weights import (
        LayerWeights,
        metric_of,
        project,
    )  # scipy: half a second

    if space.method not in WEIGHTED:
        raise MergeError(
            f"the space's {space.method} is not linear in weights of sources; these are:"
            f" {', '.join(WEIGHTED)}"
        )
    wanted = layer_weights(artifact)
    base, sources = ModelRef(spec.base), {n: ModelRef(p) for n, p in spec.sources.items()}
    genome = space.start(list(sources))
    recipe = space.decode(genome, base=base, sources=sources, dtype=None, seed=spec.sampler.seed)
    named = {name for tensors in wanted.values() for name in tensors}
    tensors = tuple(name for name in models[spec.base].names if name in named)
    weights = LayerWeights(space, list(sources), models[spec.base].names)
    found = project(weights, wanted, metric_of(recipe, models, tensors))
    return {
        "kind": artifact.provenance.kind,
        "genome": list(found.genome),
        "distance": found.distance,
        "cost": dict(artifact.cost),
    }


def seen_items(items: Sequence[str], tasks: LoadedTasks) -> list[str]:
    """Which of the items that a study selects or reports on are among `items`, in words."""
    apart = {h for h in items if part_of(h, tasks.split) != "search"}
    found = {task.name: len(apart & set(task.hashes)) for task in tasks.tasks}
    return [
        f"{count} of the items that task {name!r} selects or reports on"
        for name, count in found.items()
        if count
    ]


def _fault(artifact: str | None, method: str, wanted: str | None) -> str | None:
    if wanted is not None and artifact is None:
        return (
            f"artifact: the space's {method} applies what was learned from data: make it with"
            " `evomerge fit RECIPE.yaml DIR`, then name DIR as `artifact`"
        )
    if wanted is None and artifact is not None:
        return f"artifact: the space's {method} looks at no data; leave it out"
    return None


def _models(spec: StudySpec, digests: Mapping[str, str]) -> Recipe:
    """The study's models as a recipe has them; those that could not be opened are unknown."""
    sources = tuple(Source(n, ModelRef(p, digests.get(p))) for n, p in spec.sources.items())
    return Recipe("linear", ModelRef(spec.base, digests.get(spec.base)), sources)
