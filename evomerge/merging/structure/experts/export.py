"""Merge the experts of a checkpoint by what calibration data shows, and write the result.

The folder comes to be there whole or not at all; a merge that was cut off goes on when it is called
again for the same thing, without running the model again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

import evomerge
from evomerge.checkpoints.weights import Model
from evomerge.checkpoints.writer import Entry
from evomerge.errors import MergeError
from evomerge.merging.aside import Aside, check_free, flush, written_aside
from evomerge.merging.export import SHARD_BYTES, companions
from evomerge.merging.fitted.calibration import Example
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.experts.compress import (
    check_compressible,
    compress_experts,
    saved_bytes,
)
from evomerge.merging.structure.experts.compressed_model import CompressedModel
from evomerge.merging.structure.experts.gradients import add_gradients
from evomerge.merging.structure.experts.grouping import Groups
from evomerge.merging.structure.experts.layers import ExpertLayer, expert_layers
from evomerge.merging.structure.experts.merge import MergedExperts
from evomerge.merging.structure.experts.plan import (
    Aligner,
    LayerPlan,
    aligner_of,
    check_settings,
    compared_in,
    plan_experts,
)
from evomerge.merging.structure.experts.router import collapsed_routers
from evomerge.merging.structure.experts.router_distillation import distilled_routers
from evomerge.merging.structure.experts.saves import AsideSaves
from evomerge.merging.structure.experts.settings import ExpertSettings
from evomerge.merging.structure.experts.statistics import routing_statistics
from evomerge.merging.structure.weight_files import (
    Computed,
    Progress,
    finite_digest,
    write_model,
    write_text,
)

EXPERTS_FILE = "evomerge_experts.json"
"""What was merged with what, and why: settings, usage, groups and weights of every layer."""

_ROOM = 1 << 20
_ORDERS = "orders.safetensors"
_ROUTERS = "routers.safetensors"


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

    Beside weights, config and tokenizer it holds `EXPERTS_FILE`, and of a compression
    `COMPRESSION_FILE`. The model is run in float32; the
    weights stream, so that memory then holds a few tensors.

    Raises ExportError if the directory exists and is not empty or cannot be written; MergeError for
    a model without experts, settings that do not fit it, or data that the model answers with NaN;
    NonFiniteTensor for NaN in the model.
    """
    check_free(directory)
    model, settings = problem.model, problem.settings
    layers = expert_layers(model)
    check_settings(model, layers, settings)
    check_compressible(model, layers, settings)
    if not problem.examples:
        raise MergeError("calibration: no examples; the routing of experts cannot be watched")
    digest = finite_digest(model)
    needed = _size(model) + saved_bytes(model, settings)
    with written_aside(directory, _purpose(problem, digest, shard_bytes), needed) as aside:
        plans, aligner = _planned(problem, layers, digest, aside, progress)
        routers = _routers(problem, layers, plans, aligner, aside, progress)
        merged = MergedExperts(model, layers, plans, settings, routers=routers, aligner=aligner)
        saves = AsideSaves(aside, "compression")
        written = _compressed(merged, problem, layers, plans, aligner, aside, saves, progress)
        write_model(written, model, aside, shard_bytes, partial(progress, "merging experts"))
        saves.drop()
        for name in {_ORDERS, _ROUTERS} & aside.finished.keys():
            aside.drop(name)
    return plans


def _compressed(
    merged: MergedExperts,
    problem: ExpertProblem,
    layers: Sequence[ExpertLayer],
    plans: Sequence[LayerPlan],
    aligner: Aligner,
    aside: Aside,
    saves: AsideSaves,
    progress: Progress,
) -> Computed:
    """The merged model, compressed if that was asked for."""
    settings = problem.settings
    if settings.compress is None:
        return merged
    remapped = settings.model_copy(update={"form": "remapped"})
    found = compress_experts(
        problem.model,
        layers,
        plans,
        settings,
        MergedExperts(problem.model, layers, plans, remapped, aligner=aligner),
        problem.examples,
        saves,
        seed=problem.seed,
        device=problem.device,
        progress=progress,
    )
    model = CompressedModel(merged, found, layers, plans, settings)
    model.write_compressed(aside)
    return model


def _planned(
    problem: ExpertProblem,
    layers: Sequence[ExpertLayer],
    digest: str,
    aside: Aside,
    progress: Progress,
) -> tuple[list[LayerPlan], Aligner]:
    """Groups, and orders of neurons, as far as they cannot be had without running the model."""
    model, settings = problem.model, problem.settings
    path, orders = aside.folder / EXPERTS_FILE, aside.folder / _ORDERS
    by_data = settings.alignment_by == "activations"
    if EXPERTS_FILE in aside.finished and (not by_data or _ORDERS in aside.finished):
        known = _read_orders(load_file(orders)) if by_data else {}
        return _read_plans(path), Aligner(model, layers, orders=known)
    network = Network(model, device=problem.device)
    plans, aligner, document = _measured(problem, layers, network, progress)
    if by_data:
        aligner.of_plans(plans, settings)
        named = {"/".join(map(str, key)): order for key, order in aligner.orders.items()}
        _keep(aside, _ORDERS, named)
    write_text(path, json.dumps({"model": digest, **document}, indent=1))
    aside.finish(EXPERTS_FILE, None)
    return plans, aligner


def _read_orders(tensors: Mapping[str, Tensor]) -> dict[tuple[int, int, int], Tensor]:
    found = {}
    for key, order in tensors.items():
        at, expert, reference = map(int, key.split("/"))
        found[at, expert, reference] = order
    return found


def _routers(
    problem: ExpertProblem,
    layers: Sequence[ExpertLayer],
    plans: Sequence[LayerPlan],
    aligner: Aligner,
    aside: Aside,
    progress: Progress,
) -> list[Tensor]:
    """A router for every layer; none where they stay as they are."""
    model, settings = problem.model, problem.settings
    distils, collapses = settings.router == "distilled", settings.form == "collapsed"
    if not collapses and not distils:
        return []
    if _ROUTERS in aside.finished:
        known = load_file(aside.folder / _ROUTERS)
        return [known[layer.prefix] for layer in layers]
    routers = [model.tensor(layer.router[0]) for layer in layers]
    if collapses:
        routers = _collapsed(problem, layers, plans, progress)
    saves = AsideSaves(aside, "router")
    if distils:
        seen = settings if collapses else settings.model_copy(update={"form": "replicated"})
        routers = distilled_routers(
            model,
            MergedExperts(model, layers, plans, seen, routers=routers, aligner=aligner),
            layers,
            problem.examples,
            saves,
            steps=settings.router_steps,
            learning_rate=settings.router_learning_rate,
            batch_size=settings.batch_size,
            seed=problem.seed,
            device=problem.device,
            progress=partial(progress, "training routers"),
        )
    _keep(aside, _ROUTERS, {layer.prefix: r for layer, r in zip(layers, routers, strict=True)})
    saves.drop()
    return routers


def _collapsed(
    problem: ExpertProblem,
    layers: Sequence[ExpertLayer],
    plans: Sequence[LayerPlan],
    progress: Progress,
) -> list[Tensor]:
    model, settings = problem.model, problem.settings
    how = "logsumexp" if settings.router == "distilled" else settings.router
    return collapsed_routers(
        Network(model, device=problem.device) if how == "logsumexp" else None,
        model,
        layers,
        [plan.groups for plan in plans],
        how,
        problem.examples,
        batch_size=settings.batch_size,
        progress=partial(progress, "fitting routers"),
    )


def _keep(aside: Aside, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Tensors that need not be computed again if this attempt is cut off."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, aside.folder / name)
    flush(aside.folder / name)
    aside.finish(name, None)


def _measured(
    problem: ExpertProblem, layers: Sequence[ExpertLayer], network: Network, progress: Progress
) -> tuple[list[LayerPlan], Aligner, dict[str, Any]]:
    model, settings = problem.model, problem.settings
    seen = routing_statistics(
        network,
        model,
        layers,
        problem.examples,
        batch_size=settings.batch_size,
        outputs=settings.needs_outputs,
        inputs=settings.needs_inputs,
        progress=partial(progress, "watching the routing"),
    )
    aligner = aligner_of(model, layers, seen, settings)
    if settings.needs_gradients:
        add_gradients(
            network,
            model,
            layers,
            seen,
            problem.examples,
            order=partial(compared_in, aligner, settings),
            batch_size=settings.batch_size,
            progress=partial(progress, "taking gradients"),
        )
    plans = plan_experts(model, layers, seen, settings, seed=problem.seed, aligner=aligner)
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
    return plans, aligner, document


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
