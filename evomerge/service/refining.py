"""Refine a study's best trial on this machine: models, data and gradients. Needs torch.

Knows nothing of terminals; what comes out is data that a controller records.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evomerge.calibration.entries import CalibrationSpec
from evomerge.calibration.load import load_calibration
from evomerge.calibration.request import tokenizer_of
from evomerge.checkpoints.adapted import open_models
from evomerge.documents import read_yaml
from evomerge.errors import SpecError, UserError
from evomerge.merging.fitted.calibration import Calibration
from evomerge.merging.fitted.gradient import Loss, MergeLoss
from evomerge.merging.recipe import Recipe
from evomerge.scoring.tasks import load_tasks
from evomerge.service.artifacts import seen_items
from evomerge.service.refinement import Progress, Refinement, descend, last_gain
from evomerge.service.study import Models, decoder
from evomerge.space import load_space
from evomerge.space.layer_weights import LayerWeights
from evomerge.spec import StudySpec
from evomerge.store.base import StudyRecord
from evomerge.trial import Genome, Trial


def refine(
    record: StudyRecord,
    origin: Trial,
    trials: Sequence[Trial],
    calibration: Calibration,
    *,
    loss: Loss,
    steps: int,
    device: str,
    progress: Progress = lambda done, total: None,
) -> Refinement | None:
    """Gradient steps from a trial's genome; None where none of them lowers the loss.

    Raises MergeError for a space whose merge is not linear in weights of sources.
    """
    assert origin.genome is not None
    assert origin.values is not None
    models, space = Models.of(record), load_space(record.spec["space"])
    opened = open_models((models.base.path, *(m.path for m in models.sources.values())))
    sources = list(models.sources)
    weights = LayerWeights(space, sources, opened[models.base.path].names)
    started_s, decode = time.perf_counter(), decoder(record)
    objective = MergeLoss(decode(origin.genome), opened, calibration, loss=loss, device=device)

    def decoded(genome: Genome) -> Recipe:
        return decode(genome)

    genome, before, after, evaluations = descend(
        origin.genome, weights, objective, decoded, steps=steps, progress=progress
    )
    if genome == origin.genome:
        return None
    seconds = time.perf_counter() - started_s
    evolved = last_gain(trials, seconds)
    return Refinement(
        origin=origin.number,
        value=origin.values[0],
        genome=genome,
        loss=loss,
        calibration=calibration.digest,
        steps=steps,
        evaluations=evaluations,
        before=before,
        after=after,
        seconds=seconds,
        flops=objective.flops,
        evolution_seconds=evolved[0],
        evolution_gain=evolved[1],
    )


def read_calibration(path: Path, spec: StudySpec) -> Calibration:
    """The data that a YAML file names under `calibration`, as a recipe that is fitted does.

    Held out are the items that the study selects or reports on. Raises SpecError, and UserError
    for data that holds one of them after all.
    """
    document: Any = read_yaml(path)
    found = document.get("calibration") if isinstance(document, dict) else None
    faults: list[str] = []
    wanted = CalibrationSpec.read(found, list(spec.sources), path.resolve().parent, faults)
    if wanted is None:
        raise SpecError(str(path), faults)
    objective, base = spec.objective, open_models([spec.base])[spec.base]
    held_out = tuple(dict.fromkeys((*wanted.held_out, *(t.task for t in objective.tasks))))
    wanted = wanted.model_copy(
        update={
            "split": objective.split,
            "held_out": held_out,
            "include_path": wanted.include_path or objective.include_path,
        }
    )
    data = load_calibration(
        wanted, sorted(spec.sources), tokenizer_of(base), seed=spec.sampler.seed
    )
    if lines := seen_items(data.items, load_tasks(objective)):
        raise UserError(f"{path}: holds {lines[0]}; take other data")
    return data
