"""The inspection: everything about a spec that needs its checkpoints and tasks to be opened.

Runs in a worker, before any model is loaded, and reports every problem at once. What it returns is
recorded with the study: digests, items, the metric of each task, the scorer's fingerprint.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from evomerge.checkpoints.adapted import Bases, open_model
from evomerge.checkpoints.compare import compare
from evomerge.checkpoints.weights import Model, Weights
from evomerge.errors import SpecError, TaskError, UserError
from evomerge.merging.layout import layer_of
from evomerge.merging.methods.registry import STRUCTURAL
from evomerge.merging.recipe import ModelRef
from evomerge.scoring.fingerprint import fingerprint_digest, scorer_fingerprint
from evomerge.scoring.tasks import LoadedTasks, load_tasks
from evomerge.service.artifacts import checked_artifact, inspect_artifact, projected
from evomerge.space import Space, check_space, load_space
from evomerge.spec import StudySpec


def inspect(spec: StudySpec, device: str) -> dict[str, Any]:
    """What a study must record of its checkpoints and tasks, as JSON.

    Raises SpecError with every problem of the space, the checkpoints and the tasks.
    """
    problems: list[str] = []
    space = _space(spec, problems)
    models = _models(spec, problems)
    tasks = _tasks(spec, problems)
    scans = {path: model.scan() for path, model in models.items()}
    for path, scan in scans.items():
        problems += [f"{path}: tensor {name} holds NaN or infinity" for name in scan.non_finite]
    digests = {path: scan.digest for path, scan in scans.items()}
    if space is not None:
        digests |= inspect_artifact(spec, space.method, digests, tasks, problems)
    start = _start(spec, space, models, digests, tasks, problems)
    if problems or tasks is None or space is None:
        raise SpecError(f"study {spec.name!r}", problems)
    base = models[spec.base]
    dtype = spec.evaluation.dtype if spec.evaluation.dtype != "auto" else _dtype(base)
    fingerprint = scorer_fingerprint(
        tasks,
        batch_size=spec.evaluation.batch_size,
        dtype=dtype,
        device=device,
        threads=spec.workers.num_cpus,
        share_context=spec.evaluation.share_context,
    )
    return {
        **start,
        **_published(spec, space, digests, dtype),
        "digests": digests | {found["path"]: found["digest"] for found in start.values()},
        "dtype": dtype,
        "layers": max((n for name in base.names if (n := layer_of(name)) is not None), default=-1)
        + 1,
        "space": space.to_json(),
        "items": {name: list(hashes) for name, hashes in tasks.items().items()},
        "metrics": {task.name: f"{task.metric},{task.filter}" for task in tasks.tasks},
        "fingerprint": fingerprint,
        "scorer_digest": fingerprint_digest(fingerprint),
    }


def _space(spec: StudySpec, problems: list[str]) -> Space | None:
    try:
        space = load_space(spec.space)
        problems += check_space(space, list(spec.sources))
    except SpecError as error:
        problems += [f"{error.subject}: {line}" for line in error.problems]
        return None
    return space


def _start(
    spec: StudySpec,
    space: Space | None,
    models: Mapping[str, Model],
    digests: Mapping[str, str],
    tasks: LoadedTasks | None,
    problems: list[str],
) -> dict[str, dict[str, Any]]:
    """`{"start": where the search starts}`, if an artifact says so and all else is in order."""
    path = spec.sampler.start
    if path is None:
        return {}
    artifact = checked_artifact("sampler.start", path, spec, digests, tasks, problems)
    if artifact is None or problems or space is None:
        return {}
    try:
        found = projected(artifact, space, spec, models)
    except UserError as error:
        problems.append(f"sampler.start: {error}")
        return {}
    return {"start": {"path": path, "digest": artifact.digest, **found}}


def _published(
    spec: StudySpec, space: Space, digests: Mapping[str, str], dtype: str
) -> dict[str, dict[str, Any]]:
    """`{"published": the recipe}` of a space's method as it was published, if that changes the
    models' structure, at the space's start."""
    method = STRUCTURAL.get(space.method)
    if method is None:
        return {}

    def model(path: str) -> ModelRef:
        return ModelRef(path, digests[path])

    recipe = space.decode(
        space.start(list(spec.sources)),
        base=model(spec.base),
        sources={name: model(path) for name, path in spec.sources.items()},
        dtype=dtype,
        seed=spec.sampler.seed,
        artifact=model(spec.artifact) if spec.artifact else None,
    )
    return {"published": method.published(recipe).to_json()}


def _models(spec: StudySpec, problems: list[str]) -> dict[str, Model]:
    """The models that can be opened, by path; faults of the others go to `problems`."""
    models: dict[str, Model] = {}
    bases: Bases = {}  # adapters of one base share it: it is read once
    for path in (spec.base, *spec.sources.values()):
        try:
            models[path] = open_model(path, bases)
        except UserError as error:
            problems.append(str(error))
    if spec.base in models:
        sources = {name: models[p] for name, p in spec.sources.items() if p in models}
        problems += compare(models[spec.base], sources)
    return models


def _tasks(spec: StudySpec, problems: list[str]) -> LoadedTasks | None:
    try:
        return load_tasks(spec.objective)
    except TaskError as error:
        problems += error.args
        return None


def _dtype(base: Weights) -> str:
    """The dtype that most of the base's elements have, e.g. `bfloat16`."""
    sizes: Counter[str] = Counter()
    for name in base.names:
        if name not in base.non_float_names:
            sizes[str(base.dtype(name)).removeprefix("torch.")] += math.prod(base.shape(name))
    return sizes.most_common(1)[0][0]
