"""The fit of `pleas`: which unit is which, what layers are given, and what each group is worth.

All that a partial merge needs of data, whatever is merged and whatever stays apart; and, where it
is asked for, one such merge refit layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from evomerge.errors import MergeError
from evomerge.merging.fitted.artifact import Draft
from evomerge.merging.fitted.base import Fitter, Problem, Settings, Watch
from evomerge.merging.fitted.calibration import Batch
from evomerge.merging.fitted.gram import linear_layers as own_layers
from evomerge.merging.fitted.network import Network
from evomerge.merging.methods.gram import packed
from evomerge.merging.structure.architectures.families import spec_of
from evomerge.merging.structure.architectures.permutation_fit import Similarity
from evomerge.merging.structure.architectures.trial_network import prove
from evomerge.merging.structure.partial.widening import Widening
from evomerge.merging.structure.permutations.activations import Live, activation_matching
from evomerge.merging.structure.permutations.linear_layers import linear_layers
from evomerge.merging.structure.permutations.matching import weight_matching
from evomerge.merging.structure.permutations.permutation import in_place
from evomerge.merging.structure.pleas.allocation import units_apart
from evomerge.merging.structure.pleas.live import Batches, in_order, shapes_of, state_of, watched
from evomerge.merging.structure.pleas.model import (
    Pair,
    gram_key,
    order_key,
    sequential_key,
    similarity_key,
)
from evomerge.merging.structure.pleas.sequential import SequentialSettings, refit_in_turn
from evomerge.merging.structure.pleas.worth import tried, worth
from evomerge.merging.structure.refit.joint_gram import joined
from evomerge.merging.structure.refit.layer_rows import captured, survey


class PleasSettings(Settings):
    """`similarity` is what makes two units alike: their `weights`, or the `correlation`, `inner`
    product or squared `distance` of what they compute. `batch_size` is the most examples in a
    forward pass. `grams` are needed for parallel least squares, and hold (2d + 1)² / 2 numbers for
    each input of d; `worth` is needed for the published budget, and runs the data 2·groups + 2
    times. `sequential` asks for one merge, of a given budget, to be refit layer by layer."""

    similarity: Similarity = "weights"
    batch_size: int = Field(default=4, ge=1)
    grams: bool = True
    worth: bool = True
    sequential: SequentialSettings | None = None

    @model_validator(mode="after")
    def _known_worth(self) -> PleasSettings:
        if self.sequential and self.sequential.allocation == "programme" and not self.worth:
            raise ValueError("sequential.allocation: programme needs `worth`; take uniform")
        return self


class PleasFit(Fitter):
    """What is known of two models a and b, in the order of their names.

    Artifact: for each group of units the `order` that brings b's beside a's and the `similarity` of
    the pairs; for each distinct input of a linear layer ZᵀZ / n, Z = [Z_a | Z_b | 1], of n tokens,
    packed in float32, sums in float64; facts `layers` and `inputs`, which of these each layer is
    given, `rows`, how many tokens there were, `length`, of how many a sequence has on average, and
    `worth`: what the models score, minus the loss for each token, with all units `merged`, all
    `separate`, and with each group treated the other way. With `sequential`, the tensors that were
    refit one after another, without the zeros that fill a checkpoint up, and what stayed `apart`.
    Memory: two live models in float32, the matrices, and what all layers are given of one batch;
    three live models for `sequential`. Goes on after each of matching, inputs and sequential, and
    after each merge whose worth was found.

    Source: PLeaS, Nasery et al. 2024, arXiv:2407.02447. There accuracies stand for the score, and
    unsquared distances for the squared; that sums suffice for every choice of units is ours, and so
    is `sequential`.
    """

    name = "pleas"
    summary = "which unit of one model is which of another's, and what their layers are given"
    settings = PleasSettings

    def fit(self, problem: Problem, settings: Any, draft: Draft, watch: Watch) -> None:
        if len(problem.sources) != 2:
            raise MergeError(f"pleas merges two models, the recipe has {len(problem.sources)}")
        a, _ = problem.sources.values()
        prove(a.config)
        _Stages(problem, settings, draft, watch).run()


class _Stages:
    """The stages of a fit, each of which is kept once it is done."""

    def __init__(
        self, problem: Problem, settings: PleasSettings, draft: Draft, watch: Watch
    ) -> None:
        self.problem, self.settings, self.draft, self.watch = problem, settings, draft, watch
        self.a, self.b = problem.sources.values()
        examples = [e for name in problem.sources for e in problem.calibration.of(name)]
        # What is meant for both stands under each name.
        self.data = Batches(list(dict.fromkeys(examples)), settings.batch_size)
        self.flops = 0.0
        self._check_budget()

    def _check_budget(self) -> None:
        """Raise MergeError, before anything is run, for models that cannot be widened and for a
        budget that they cannot reach."""
        shapes = shapes_of(self.a)
        spec = in_place(spec_of(self.a.config, shapes))
        costs = Widening.of(self.a.config, spec).costs(spec, shapes, self._length)
        if (asked := self.settings.sequential) is not None:
            try:
                costs.allowance(asked.budget)
            except MergeError as error:
                raise MergeError(f"fit.sequential: {error}") from None

    @property
    def _length(self) -> float:
        """Tokens of a sequence, on average."""
        lengths = [len(example.tokens) for example in self.data.examples]
        return sum(lengths) / len(lengths)

    def run(self) -> None:
        kept = self.draft.kept
        if "matching" not in kept:
            self._keep("matching", self._matched(), {})
        orders = self.draft.part("matching")
        if "inputs" not in kept:
            self._keep("inputs", *self._inputs(orders))
        facts = {**self.draft.kept["inputs"], "worth": None, "sequential": None}
        pair = Pair(self.a, self.b, _Known(facts, orders))
        if self.settings.worth:
            if "worth" not in kept:
                self._keep("worth", {}, self._worth(pair))
            facts["worth"] = self.draft.kept["worth"]
        if (asked := self.settings.sequential) is not None:
            if "sequential" not in kept:
                self._keep("sequential", *self._in_turn(pair, asked, orders, facts["worth"]))
            facts["sequential"] = self.draft.kept["sequential"]
        self.draft.finish({}, facts, flops=self.flops)

    def _keep(self, part: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        self.draft.keep(part, tensors, notes, flops=self.flops)
        self.draft.state = None  # it was of this part

    def _matched(self) -> dict[str, Tensor]:
        self.watch.note("matching units")
        shapes = shapes_of(self.a)
        spec = in_place(spec_of(self.a.config, shapes))
        if self.settings.similarity == "weights":
            found = weight_matching(spec, state_of(self.a), state_of(self.b))
        else:
            networks = [Network(model, device=self.problem.device) for model in (self.a, self.b)]
            one, two = (watched(each, shapes) for each in networks)
            found = activation_matching(
                spec, one, two, self.data, statistic=self.settings.similarity
            )
            self.flops += sum(each.flops for each in networks)
        tensors = {order_key(g): order.to(torch.int32) for g, order in found.permutations.items()}
        return tensors | {similarity_key(g): s for g, s in found.similarity.items()}

    def _inputs(self, orders: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """ZᵀZ / n of every distinct input, and what is told of the layers and the data."""
        device, shapes = self.problem.device, shapes_of(self.a)
        one, two = Network(self.a, device=device), in_order(self.b, orders, device=device)
        layers = linear_layers({n: one_module(one, n) for n in own_layers(one)}, shapes)
        inputs: dict[str, str] = {}
        tensors: dict[str, Tensor] = {}
        if self.settings.grams:
            live = [watched(each, shapes) for each in (one, two)]
            inputs = _shared(live[0], next(iter(self.data)), layers)
            tensors = self._summed(live, inputs)
        self.flops += one.flops + two.flops
        return tensors, {
            "layers": {name: asdict(layer) for name, layer in layers.items()},
            "inputs": inputs,
            "rows": sum(len(e.tokens) for e in self.data.examples) if inputs else 0,
            "length": self._length,
        }

    def _summed(self, live: Sequence[Live], inputs: Mapping[str, str]) -> dict[str, Tensor]:
        self.watch.note("summing what layers are given")
        sums, rows = dict[str, Tensor](), 0
        total = sum(len(example.tokens) for example in self.data.examples)
        once = dict.fromkeys(sorted(set(inputs.values())), 1)
        for batch in self.data:
            found = [captured(each, batch, once) for each in live]
            for name in once:
                z = joined(*(_rows(calls[name]) for calls in found))
                sums[name] = sums.get(name, 0) + z.T @ z
            rows += int(batch.attention.sum())
            self.watch.progress(rows, total)
        for name, gram in sums.items():
            width = len(gram) // 2
            if rows <= width:
                raise MergeError(
                    f"{name}: reads {width} inputs, and the data has {rows} tokens; least squares"
                    f" need more of them than inputs: name more data, or fit with `grams: false`"
                )
            if not bool(gram.isfinite().all()):
                raise MergeError(f"the input of {name} is NaN or infinite on the calibration data")
        return {gram_key(name): packed(gram / rows) for name, gram in sums.items()}

    def _worth(self, pair: Pair) -> dict[str, Any]:
        self.watch.note("finding out what each group is worth kept apart")
        _, state = self.draft.state or ({}, {})
        before, total = self.flops, len(tried({g.name: g.size for g in pair.widening.groups}))

        def scored(scores: Mapping[str, float], flops: float) -> None:
            self.flops = before + flops
            self.draft.save({}, {"scores": dict(scores)}, flops=self.flops)
            self.watch.progress(len(scores), total)

        known = state.get("scores", {})
        return worth(pair, self.data, known, device=self.problem.device, scored=scored)

    def _in_turn(
        self,
        pair: Pair,
        asked: SequentialSettings,
        orders: Mapping[str, Tensor],
        worth: Mapping[str, Any] | None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.watch.note("refitting layer by layer")
        apart = units_apart(pair.costs, asked.budget, asked.allocation, worth=worth)
        refit, flops = refit_in_turn(
            pair,
            apart,
            self.problem,
            asked,
            orders,
            batch_size=self.settings.batch_size,
            progress=self.watch.progress,
        )
        self.flops += flops
        tensors = {sequential_key(name): tensor for name, tensor in refit.items()}
        return tensors, {**asked.model_dump(), "apart": apart}


@dataclass(frozen=True)
class _Known:
    """What a fit knows before it is an artifact."""

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]


def one_module(network: Network, name: str) -> nn.Module:
    """The live layer of a stored weight."""
    found = network.module(name)
    assert found is not None  # it has a stored tensor to itself
    return found[1]


def _shared(live: Live, batch: Batch, layers: Iterable[str]) -> dict[str, str]:
    """For each layer the first one that is given the same."""
    firsts: dict[tuple[int, ...], str] = {}
    seen = survey(live, batch, tuple(layers))
    keys = {name: tuple(run.given for run in runs) for name, runs in seen.items()}
    return {name: firsts.setdefault(key, name) for name, key in keys.items()}


def _rows(calls: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([x.reshape(-1, x.shape[-1]) for x, _ in calls]).double().cpu()
