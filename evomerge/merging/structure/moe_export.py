"""Merge the experts of a checkpoint by what calibration data shows, and write the result.

The folder comes to be there whole or not at all; a merge that was cut off goes on when it is called
again for the same thing, without running the model again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

import evomerge
from evomerge.checkpoints.weights import Model
from evomerge.checkpoints.writer import Entry
from evomerge.errors import MergeError
from evomerge.merging.aside import Aside, check_free, written_aside
from evomerge.merging.export import SHARD_BYTES, companions
from evomerge.merging.fitted.calibration import Example
from evomerge.merging.fitted.network import Network, network_of
from evomerge.merging.structure.moe_grouping import Groups
from evomerge.merging.structure.moe_layers import ExpertLayer, expert_layers
from evomerge.merging.structure.moe_merge import MergedExperts
from evomerge.merging.structure.moe_plan import LayerPlan, check_settings, plan_experts
from evomerge.merging.structure.moe_router import collapsed_routers
from evomerge.merging.structure.moe_settings import ExpertSettings
from evomerge.merging.structure.moe_statistics import routing_statistics
from evomerge.merging.structure.weight_files import (
    Progress,
    finite_digest,
    write_model,
    write_text,
)

EXPERTS_FILE = "evomerge_experts.json"
"""What was merged with what, and why: settings, usage, groups and weights of every layer."""

_ROOM = 1 << 20


@dataclass(frozen=True)
class ExpertProblem:
    """A model and the data that its routing is watched on; `described` says where that is from."""

    model: Model
    examples: Sequence[Example]
    settings: ExpertSettings
    described: str = ""
    seed: int = 0
    device: str = "cpu"


def merge_experts(
    problem: ExpertProblem,
    directory: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda what, done, total: None,
) -> list[LayerPlan]:
    """Write the model with its experts merged to `directory`; returns what became of each layer.

    Beside weights, config and tokenizer it holds `EXPERTS_FILE`. The model is run in float32; the
    weights stream, so that memory then holds a few tensors.

    Raises ExportError if the directory exists and is not empty or cannot be written; MergeError for
    a model without experts, settings that do not fit it, or data that the model answers with NaN;
    NonFiniteTensor for NaN in the model.
    """
    check_free(directory)
    model, settings = problem.model, problem.settings
    layers = expert_layers(model)
    check_settings(model, layers, settings)
    if not problem.examples:
        raise MergeError("calibration: no examples; the routing of experts cannot be watched")
    digest = finite_digest(model)
    with written_aside(directory, _purpose(problem, digest, shard_bytes), _size(model)) as aside:
        plans, routers = _planned(problem, layers, digest, aside, progress)
        merged = MergedExperts(model, layers, plans, settings, routers=routers)
        told = partial(progress, "merging experts")
        write_model(merged, model, aside, shard_bytes, told)
    return plans


def _planned(
    problem: ExpertProblem,
    layers: Sequence[ExpertLayer],
    digest: str,
    aside: Aside,
    progress: Progress,
) -> tuple[list[LayerPlan], list[Tensor]]:
    """Groups and collapsed routers; only what an earlier attempt did not leave is measured."""
    model, settings = problem.model, problem.settings
    path = aside.folder / EXPERTS_FILE
    known = EXPERTS_FILE in aside.finished
    collapses = settings.form == "collapsed"
    network = None
    if not known or (collapses and settings.router == "logsumexp"):
        network = network_of(model, problem.device)
    if known:
        plans = _read_plans(path)
    else:
        assert network is not None
        plans, document = _measured(problem, layers, network, progress)
        write_text(path, json.dumps({"model": digest, **document}, indent=1))
        aside.finish(EXPERTS_FILE, None)
    if not collapses:
        return plans, []
    routers = collapsed_routers(
        network,
        model,
        layers,
        [plan.groups for plan in plans],
        settings.router,
        problem.examples,
        batch_size=settings.batch_size,
        progress=lambda done, total: progress("fitting routers", done, total),
    )
    return plans, routers


def _measured(
    problem: ExpertProblem, layers: Sequence[ExpertLayer], network: Network, progress: Progress
) -> tuple[list[LayerPlan], dict[str, Any]]:
    settings = problem.settings
    seen = routing_statistics(
        network,
        problem.model,
        layers,
        problem.examples,
        batch_size=settings.batch_size,
        outputs=settings.compared_by == "outputs",
        progress=lambda done, total: progress("watching the routing", done, total),
    )
    plans = plan_experts(problem.model, layers, seen, settings, seed=problem.seed)
    document = {
        "evomerge": evomerge.__version__,
        "settings": settings.model_dump(),
        "seed": problem.seed,
        "calibration": {"described": problem.described, "digest": _data_digest(problem.examples)},
        "tokens": seen[0].tokens,
        "layers": [
            {
                "layer": layer.prefix,
                "usage": statistics.usage(settings.usage).tolist(),
                "leaders": list(plan.groups.leaders),
                "weights": list(plan.weights),
            }
            for layer, statistics, plan in zip(layers, seen, plans, strict=True)
        ],
    }
    return plans, document


def _read_plans(path: Path) -> list[LayerPlan]:
    document = json.loads(path.read_text(encoding="utf-8"))
    return [
        LayerPlan(Groups(tuple(layer["leaders"])), tuple(layer["weights"]))
        for layer in document["layers"]
    ]


def _purpose(problem: ExpertProblem, digest: str, shard_bytes: int) -> str:
    """What makes two merges the same."""
    known = [evomerge.__version__, digest, problem.settings.model_dump(), problem.seed,
             _data_digest(problem.examples), shard_bytes]  # fmt: skip
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _data_digest(examples: Sequence[Example]) -> str:
    rows = [[list(example.tokens), example.answer] for example in examples]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def _size(model: Model) -> int:
    """Bytes of the largest form, and of what lies beside it."""
    entries = (Entry(name, model.dtype(name), model.shape(name)) for name in model.names)
    weights = sum(entry.nbytes for entry in entries)
    return weights + sum(path.stat().st_size for path in companions(model)) + _ROOM
