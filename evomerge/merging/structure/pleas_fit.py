"""The fit of `pleas`: which unit is which, what layers are given, and what each group is worth.

All that a partial merge needs of data, whatever is merged and whatever stays apart. Knows nothing
of budgets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from evomerge.checkpoints.skeleton import blank
from evomerge.checkpoints.weights import Model, Weights
from evomerge.errors import MergeError
from evomerge.merging.fitted.artifact import Draft
from evomerge.merging.fitted.base import Fitter, Problem, Settings, Watch
from evomerge.merging.fitted.calibration import Batch, Example, batches
from evomerge.merging.fitted.gram import even_batches
from evomerge.merging.fitted.gram import linear_layers as own_layers
from evomerge.merging.fitted.network import Network
from evomerge.merging.methods.gram import packed
from evomerge.merging.structure.activations import Live, activation_matching
from evomerge.merging.structure.families import spec_of
from evomerge.merging.structure.fit import Similarity
from evomerge.merging.structure.joint_gram import joined
from evomerge.merging.structure.layer_rows import captured, survey
from evomerge.merging.structure.linear_layers import linear_layers, modules_of
from evomerge.merging.structure.matching import weight_matching
from evomerge.merging.structure.permutation import apply, in_place
from evomerge.merging.structure.pleas_model import (
    Pair,
    PleasModel,
    Refitting,
    gram_key,
    order_key,
    similarity_key,
)
from evomerge.merging.structure.trial_network import prove
from evomerge.merging.structure.units import Shapes


class PleasSettings(Settings):
    """`similarity` is what makes two units alike: their `weights`, or the `correlation`, `inner`
    product or squared `distance` of what they compute. `batch_size` is the most examples in a
    forward pass. `grams` are needed for least squares, and hold (2d + 1)² / 2 numbers for each
    input of d; `worth` is needed for the published budget, and runs the data 2·groups + 2 times."""

    similarity: Similarity = "distance"
    batch_size: int = Field(default=4, ge=1)
    grams: bool = True
    worth: bool = True


class PleasFit(Fitter):
    """What is known of two models a and b, in the order of their names.

    Artifact: for each group of units the `order` that brings b's beside a's and the `similarity` of
    the pairs; for each distinct input of a linear layer ZᵀZ / n, Z = [Z_a | Z_b | 1], of n tokens,
    packed in float32, sums in float64; facts `layers` and `inputs`, which of these each layer is
    given, `rows`, how many tokens there were, `length`, of how many a sequence has on average, and
    `worth`: what the models score, minus the loss for each token, with all units `merged`, all
    `separate`, and with each group treated the other way. Memory: two live models in float32, the
    matrices, and what all layers are given of one batch.

    Source: PLeaS, Nasery et al. 2024, arXiv:2407.02447. There accuracies stand for the score, and
    unsquared distances for the squared; that sums suffice for every choice of units is ours.
    """

    name = "pleas"
    summary = "which unit of one model is which of another's, and what their layers are given"
    settings = PleasSettings

    def fit(self, problem: Problem, settings: Any, draft: Draft, watch: Watch) -> None:
        if len(problem.sources) != 2:
            raise MergeError(f"pleas merges two models, the recipe has {len(problem.sources)}")
        a, b = problem.sources.values()
        prove(a.config)
        examples = [e for name in problem.sources for e in problem.calibration.of(name)]
        examples = list(dict.fromkeys(examples))  # what is meant for both stands under each name
        if "matching" not in draft.kept:
            tensors, flops = _matched(a, b, examples, settings, problem.device)
            draft.keep("matching", tensors, {}, flops=flops)
        orders = draft.part("matching")
        if "inputs" not in draft.kept:
            tensors, notes, flops = _inputs(a, b, orders, examples, settings, problem.device, watch)
            draft.keep("inputs", tensors, notes, flops=flops)
        facts = dict(draft.kept["inputs"])
        worth, flops = None, 0.0
        if settings.worth:
            pair = Pair(a, b, _Known(facts, orders))
            worth, flops = _worth(pair, examples, settings.batch_size, problem.device, watch)
        draft.finish({}, {**facts, "worth": worth}, flops=flops)


@dataclass(frozen=True)
class _Known:
    """What a fit knows before it is an artifact."""

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]


def _matched(
    a: Model, b: Model, examples: Sequence[Example], settings: PleasSettings, device: str
) -> tuple[dict[str, Tensor], float]:
    shapes = {name: a.shape(name) for name in a.names}
    spec = in_place(spec_of(a.config, shapes))
    flops = 0.0
    if settings.similarity == "weights":
        matching = weight_matching(spec, _state(a), _state(b))
    else:
        networks = [Network(model, device=device) for model in (a, b)]
        one, two = (Live(modules_of(each.model, shapes), each.logits) for each in networks)
        cut = even_batches(examples, settings.batch_size)
        matching = activation_matching(spec, one, two, cut, statistic=settings.similarity)
        flops = sum(each.flops for each in networks)
    tensors = {order_key(g): order.to(torch.int32) for g, order in matching.permutations.items()}
    return tensors | {similarity_key(g): s for g, s in matching.similarity.items()}, flops


def _inputs(
    a: Model,
    b: Model,
    orders: Mapping[str, Tensor],
    examples: Sequence[Example],
    settings: PleasSettings,
    device: str,
    watch: Watch,
) -> tuple[dict[str, Tensor], dict[str, Any], float]:
    """ZᵀZ / n of every distinct input, and what is told of the layers and the data."""
    one, two = Network(a, device=device), Network(b, device=device)
    shapes = {name: a.shape(name) for name in a.names}
    _bring_into_order(two, b, shapes, orders)
    layers = linear_layers({n: one_module(one, n) for n in own_layers(one)}, shapes)
    live = [Live(modules_of(each.model, shapes), each.logits) for each in (one, two)]
    sums, rows, inputs = dict[str, Tensor](), 0, dict[str, str]()
    total = sum(len(example.tokens) for example in examples)
    for batch in even_batches(examples, settings.batch_size) if settings.grams else ():
        inputs = inputs or _shared(live[0], batch, layers)
        once = dict.fromkeys(sorted(set(inputs.values())), 1)
        found = [captured(each, batch, once) for each in live]
        for name in found[0]:
            z = joined(*(_rows(calls[name]) for calls in found))
            sums[name] = sums.get(name, 0) + z.T @ z
        rows += int(batch.attention.sum())
        watch.progress(rows, total)
    tensors = {}
    for name, gram in sums.items():
        if not bool(gram.isfinite().all()):
            raise MergeError(f"the input of {name} is NaN or infinite on the calibration data")
        tensors[gram_key(name)] = packed(gram / rows)
    notes = {
        "layers": {name: asdict(layer) for name, layer in layers.items()},
        "inputs": inputs,
        "rows": rows,
        "length": total / len(examples),
    }
    return tensors, notes, one.flops + two.flops


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


def _bring_into_order(
    network: Network, model: Model, shapes: Shapes, orders: Mapping[str, Tensor]
) -> None:
    spec = in_place(spec_of(model.config, shapes))
    permutations = {g.name: orders[order_key(g.name)].long() for g in spec.groups}
    for name, tensor in apply(spec, _state(model), permutations).items():
        network.write(name, tensor)


@torch.no_grad()
def _worth(
    pair: Pair, examples: Sequence[Example], batch_size: int, device: str, watch: Watch
) -> tuple[dict[str, Any], float]:
    sizes = {group.name: group.size for group in pair.widening.groups}
    none = dict.fromkeys(sizes, 0)
    tried = {"merged": none, "separate": sizes}
    for name, size in sizes.items():
        tried[f"merged but {name}"] = {**none, name: size}
        tried[f"separate but {name}"] = {**sizes, name: 0}
    scores, flops = {}, 0.0
    for done, (what, apart) in enumerate(tried.items(), 1):
        model = PleasModel(pair, apart, Refitting(least_squares=False))
        network = widened_network(model, device=device)
        scores[what] = _score(network, examples, batch_size)
        flops += network.flops
        watch.progress(done, len(tried))
    return {
        "merged": scores["merged"],
        "separate": scores["separate"],
        "merged_except": {name: scores[f"merged but {name}"] for name in sizes},
        "separate_except": {name: scores[f"separate but {name}"] for name in sizes},
    }, flops


def widened_network(model: PleasModel, *, device: str = "cpu") -> Network:
    """The merged model, live in float32."""
    made = blank(model, otherwise="it cannot be run", dtype=torch.float32, device=device)
    network = Network(model, device=device, model=made)
    network.become(model, model.names)
    return network


def _score(network: Network, examples: Sequence[Example], batch_size: int) -> float:
    """Minus the mean loss for each token that counts."""
    total, count = 0.0, 0
    for part in batches(examples, batch_size):
        logits = network.logits(part).cpu()
        counted = logits[part.counted].double()
        total += float(cross_entropy(counted, part.targets[part.counted], reduction="sum"))
        count += len(counted)
    return -total / count


def _state(model: Weights) -> dict[str, Tensor]:
    return {name: model.tensor(name) for name in model.names}
