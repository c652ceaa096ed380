"""The fit of Fisher merging: how sharply each weight of each source decides what it answers.

Knows nothing of the average that is weighed by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from evomerge.errors import MergeError
from evomerge.merging.fitted.artifact import Draft
from evomerge.merging.fitted.base import (
    Fitter,
    Problem,
    Settings,
    Watch,
    learned_names,
    merged_names,
)
from evomerge.merging.fitted.calibration import Example, batch
from evomerge.merging.fitted.network import Network
from evomerge.merging.methods.fisher import fisher_key
from evomerge.merging.methods.masks import DRAW_BITS, draws, mask_key

SAVED_EVERY = 256
"""Examples between two saves, each of one copy of the model: a few percent of the work even on a
fast GPU, and what a crash can cost."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class FisherSettings(Settings):
    """`labels`: the tokens whose probability is differentiated are drawn from the `model` itself
    (the Fisher information), or are the `data`'s (the empirical one). `dtype` of the artifact.
    `checkpointing` recomputes activations in place of keeping them."""

    labels: Literal["model", "data"] = "model"
    dtype: Literal["float32", "bfloat16"] = "float32"
    checkpointing: bool = False


class FisherFit(Fitter):
    """The diagonal of each source's Fisher information, from one backward pass for each example.

        Fᵢ = (1/n)·Σₓ (∂ log p(yₓ | x, θᵢ) / ∂θᵢ)²      y ~ p(· | x, θᵢ), or the data's y

    log p is summed over the tokens that count. A drawn token follows the data before it, and its
    draw is keyed by seed, source and example. Sums are float32, of one source at a time, beside one
    live model. Artifact: Fᵢ of every learned tensor; facts `norms` and `means`: ‖Fᵢ‖₂ and the mean
    entry, over the whole model, by source.

    Source: Matena and Raffel 2022, arXiv:2111.09832. They take the expectation over all
    labels of a classifier; that over the answers of a language model can only be sampled.
    """

    name = "fisher"
    summary = "diagonal Fisher information of every weight, for each source"
    settings = FisherSettings
    needs_gradients = True

    def fit(self, problem: Problem, settings: Any, draft: Draft, watch: Watch) -> None:
        chosen = {name: problem.calibration.of(name) for name in problem.sources}
        network = Network(
            problem.anchor, device=problem.device, checkpointing=settings.checkpointing
        )
        done, total = 0, sum(map(len, chosen.values()))
        for source, examples in chosen.items():
            if source not in draft.kept:
                for _ in _summed(source, examples, network, problem, settings, draft):
                    done += 1
                    watch.progress(done, total)
            else:
                done += len(examples)
        facts = {
            fact: {source: draft.kept[source][fact] for source in sorted(chosen)}
            for fact in ("norms", "means")
        }
        draft.finish({}, facts, flops=network.flops)


def _summed(
    source: str,
    examples: Sequence[Example],
    network: Network,
    problem: Problem,
    settings: FisherSettings,
    draft: Draft,
) -> Iterator[None]:
    """Keep one source's Fisher information; yields after every example."""
    network.become(problem.sources[source], merged_names(problem))
    saved, notes = draft.state or ({}, {})
    begun = notes["count"] if notes.get("source") == source else 0
    sums = {
        name: saved[name].to(network.device, copy=True)
        if begun
        else torch.zeros(network.shape(name), device=network.device)
        for name in learned_names(problem, network)
    }
    del saved

    def square(name: str, gradient: Tensor) -> None:
        if name in sums:
            sums[name].addcmul_(gradient, gradient)

    with network.gradients(square):
        for count, example in enumerate(examples, 1):
            if count > begun:
                _differentiate(network, example, mask_key(problem.seed, source, str(example)),
                               settings.labels)  # fmt: skip
                if count % SAVED_EVERY == 0 and count < len(examples):
                    notes = {"source": source, "count": count}
                    draft.save(sums, notes, flops=network.flops)
            yield
    for name, total in sums.items():
        sums[name] = (total / len(examples)).to(_DTYPES[settings.dtype])
    draft.keep(
        source,
        {fisher_key(source, name): values for name, values in sums.items()},
        _size_of(sums, source),
        flops=network.flops,
    )


def _differentiate(network: Network, example: Example, key: int, labels: str) -> None:
    """One backward pass of log p of an example's answer."""
    one = batch([example]).to(network.device)
    logits = network.logits(one)[one.counted]  # [n, v]
    targets = one.targets[one.counted]
    if labels == "model":
        targets = drawn(logits.detach(), key)
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    network.backward(loss, one, what="fisher")


def drawn(logits: Tensor, key: int) -> Tensor:
    """A token for each row, with its probability. Shapes: logits [n, v]; returns [n].

    u < Σ_{k ≤ y} pₖ for the first such y, u being the key's counter-based uniform number.
    """
    uniform = draws(key, 0, len(logits), device=logits.device).double() / 2**DRAW_BITS
    cumulated = logits.double().softmax(-1).cumsum(-1)
    heights = (uniform * cumulated[:, -1])[:, None]
    found = torch.searchsorted(cumulated, heights, right=True)[:, 0]
    return found.clamp_max(logits.shape[1] - 1)


def _size_of(fishers: dict[str, Tensor], source: str) -> dict[str, float]:
    squares = sum(float(values.double().square().sum()) for values in fishers.values())
    total = sum(float(values.double().sum()) for values in fishers.values())
    if not total > 0:
        raise MergeError(
            f"{source}: every gradient is 0 on its calibration data; it is certain of every"
            " answer: give it other data"
        )
    count = sum(values.numel() for values in fishers.values())
    return {"norms": squares**0.5, "means": total / count}
