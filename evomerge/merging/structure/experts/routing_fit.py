"""The fit of `m_smoe`: what the routers and experts of one model do on calibration data.

Knows nothing of how experts are grouped and merged by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from pydantic import Field
from torch import Tensor

from evomerge.errors import MergeError
from evomerge.merging.fitted.artifact import Draft
from evomerge.merging.fitted.base import Fitter, Problem, Settings, Watch
from evomerge.merging.fitted.network import Network
from evomerge.merging.methods.base import Fitted
from evomerge.merging.structure.experts.gradients import add_gradients
from evomerge.merging.structure.experts.layers import expert_layers
from evomerge.merging.structure.experts.plan import Aligner
from evomerge.merging.structure.experts.statistics import LayerStatistics, routing_statistics


class RoutingSettings(Settings):
    """`batch_size` is the most examples in a forward pass. `outputs` has every expert compute every
    token, as `similarity: outputs` and `output_mse` need it: E / k times the work. `gradients` runs
    backward passes for `gradients` and `weight_gradients`."""

    batch_size: int = Field(default=8, ge=1)
    outputs: bool = True
    gradients: bool = False


class RoutingFit(Fitter):
    """`LayerStatistics` of every layer of experts of one source, watched on its calibration data.

    Gradients are compared with neurons in the order of the first expert.

    Memory: one live model in float32; the statistics do not grow with the data. Artifact: for each
    layer and statistic one tensor, float64; facts `layers`, the layers' names in order of depth,
    and `tokens`, how many were watched.

    Source: Li et al. 2024, arXiv:2310.01334, sec. 3.1; see `routing_statistics`.
    """

    name = "routing"
    summary = "how tokens are routed to experts, and what the experts are compared by"
    settings = RoutingSettings

    def fit(self, problem: Problem, settings: Any, draft: Draft, watch: Watch) -> None:
        (source, model), *others = problem.sources.items()
        if others:
            raise MergeError("a routing fit watches one model; the recipe has several sources")
        layers = expert_layers(model)
        network = Network(model, device=problem.device)
        examples = problem.calibration.of(source)
        seen = routing_statistics(
            network,
            model,
            layers,
            examples,
            batch_size=settings.batch_size,
            outputs=settings.outputs,
            progress=watch.progress,
        )
        if settings.gradients:
            aligner = Aligner(model, layers)
            add_gradients(
                network,
                model,
                layers,
                seen,
                examples,
                order=lambda at, expert: aligner.order(at, expert, 0),
                batch_size=settings.batch_size,
                progress=watch.progress,
            )
        tensors = {
            f"{layer.prefix}/{name}": tensor
            for layer, statistics in zip(layers, seen, strict=True)
            for name, tensor in _tensors(statistics)
        }
        facts = {"layers": [layer.prefix for layer in layers], "tokens": seen[0].tokens}
        draft.finish(tensors, facts, flops=network.flops)


def read_statistics(fitted: Fitted) -> list[LayerStatistics]:
    """What a routing fit has left, in order of depth."""
    return [
        LayerStatistics(**_read(fitted, prefix), tokens=int(fitted.facts["tokens"]))
        for prefix in fitted.facts["layers"]
    ]


def _tensors(statistics: LayerStatistics) -> Iterator[tuple[str, Tensor]]:
    for field in fields(statistics):
        value = getattr(statistics, field.name)
        if isinstance(value, Tensor):
            yield field.name, value


def _read(fitted: Fitted, prefix: str) -> Mapping[str, Any]:
    names = (field.name for field in fields(LayerStatistics))
    return {name: fitted.tensor(key) for name in names if (key := f"{prefix}/{name}") in fitted}
