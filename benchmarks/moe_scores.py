"""Losses of one mixture of experts with its experts merged in many ways.

`merged` goes the way of a user: a whole checkpoint on disk, in any form. `planned` is for searches:
routing is watched once, and what a plan says is written into one live model. Knows nothing of which
ways are tried.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from kept import Kept
from moe_mixtral import Parts, examples
from torch import Tensor
from torch.nn import functional

from evomerge.checkpoints import Checkpoint
from evomerge.merging.fitted.calibration import batches
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.experts.export import ExpertProblem, merge_experts
from evomerge.merging.structure.experts.layers import expert_layers
from evomerge.merging.structure.experts.merge import MergedExperts
from evomerge.merging.structure.experts.plan import Aligner, LayerPlan, plan_experts
from evomerge.merging.structure.experts.settings import ExpertSettings
from evomerge.merging.structure.experts.statistics import LayerStatistics, routing_statistics

BATCH = 256


@dataclass(frozen=True)
class Scored:
    """A merged model: losses in nats for each predicted token, by part, and experts by layer."""

    losses: dict[str, float]
    experts: Sequence[int]


class MoeScores:
    """Everything that is measured on one model."""

    def __init__(self, folder: Path, parts: Parts, seed: int) -> None:
        self.seed = seed
        self._kept = Kept(folder.with_suffix(".jsonl"))
        self.model = Checkpoint.open(str(folder))
        self.layers = expert_layers(self.model)
        self._parts = {name: examples(tokens) for name, tokens in parts.items()}
        self._network = Network(self.model)
        self._aligner = Aligner(self.model, self.layers)

    @cached_property
    def seen(self) -> list[LayerStatistics]:
        """What the calibration part shows of the routing."""
        data = self._parts["calibration"]
        network = Network(self.model)
        return routing_statistics(network, self.model, self.layers, data, batch_size=BATCH)

    @property
    def usage(self) -> list[Tensor]:
        """The share [E] of every expert, by layer."""
        return [layer.usage() for layer in self.seen]

    def full(self, part: str) -> float:
        """The loss of the model as it was trained."""
        return self._loss(Network(self.model), part)

    def kept(self, key: str, make: Callable[[], Scored]) -> Scored:
        """What was scored under this key before; made unless it was."""
        return Scored(**self._kept.get(key, lambda: asdict(make())))

    def merged(self, settings: ExpertSettings) -> Scored:
        """The report loss of what `merge_experts` writes."""
        return self.kept(settings.model_dump_json(), lambda: self._merged(settings))

    def _merged(self, settings: ExpertSettings) -> Scored:
        problem = ExpertProblem(self.model, self._parts["calibration"], settings, seed=self.seed)
        with tempfile.TemporaryDirectory() as scratch:
            plans = merge_experts(problem, Path(scratch) / "merged")
            network = Network(Checkpoint.open(str(Path(scratch) / "merged")))
            return Scored({"report": self._loss(network, "report")}, counts(plans))

    def plan(self, settings: ExpertSettings) -> list[LayerPlan]:
        """What would become of the experts."""
        return plan_experts(
            self.model, self.layers, self.seen, settings, seed=self.seed, aligner=self._aligner
        )

    def planned(
        self, plans: Sequence[LayerPlan], settings: ExpertSettings, parts: Sequence[str]
    ) -> Scored:
        """The losses of a plan on some parts."""
        merged = MergedExperts(self.model, self.layers, plans, settings, aligner=self._aligner)
        for layer in self.layers:
            names = [layer.name(e, role) for e in range(layer.experts) for role in layer.roles]
            self._network.become(merged, names)
        losses = {part: self._loss(self._network, part) for part in parts}
        return Scored(losses, counts(plans))

    @torch.no_grad()
    def _loss(self, network: Network, part: str) -> float:
        total, tokens = 0.0, 0
        for batch in batches(self._parts[part], BATCH):
            logits = network.logits(batch)[batch.counted]
            targets = batch.targets[batch.counted]
            total += float(functional.cross_entropy(logits, targets, reduction="sum"))
            tokens += len(targets)
        return total / tokens


def counts(plans: Sequence[LayerPlan]) -> tuple[int, ...]:
    """How many experts each layer keeps."""
    return tuple(len(plan.groups.members) for plan in plans)
