"""The gradient of a loss in every source's share of every tensor, from one pass over the data.

    W_l = O_l + Σᵢ c_{i,l}·D_{i,l}   ⇒   ∂L/∂c_{i,l} = ⟨∂L/∂W_l, D_{i,l}⟩

Knows no search space: `evomerge.space.layer_weights` chains these to genes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from evomerge.checkpoints.weights import Model
from evomerge.merging.fitted.calibration import Batch, Calibration, batches
from evomerge.merging.fitted.linear_merges import Directions, check_linear
from evomerge.merging.fitted.network import Network
from evomerge.merging.merge import Merge
from evomerge.merging.recipe import Recipe

Loss = Literal["answers", "sources"]
LayerGradients = dict[str, dict[str, float]]
"""∂L/∂c by source and tensor."""


class MergeLoss:
    """A loss of merges of these models, and its gradient in their shares.

        answers    Lₖ = mean over examples of source k of the mean of −ln p(token)
        sources    Lₖ = the same mean of KL(pₖ ‖ p), pₖ what source k itself predicts
        L = mean over sources k of Lₖ

    Only tokens that count are counted (`Example.predicted`). Weights are merged in float32 and not
    rounded. Besides the network holds one gradient of all weights, and for `sources` what each
    predicts: 4 bytes for each counted token and word of the vocabulary.

    Source: that of DAM's coefficients (arXiv:2410.08371), which holds for every linear merge.
    """

    def __init__(
        self,
        recipe: Recipe,
        models: Mapping[str, Model],
        calibration: Calibration,
        *,
        loss: Loss = "answers",
        batch_size: int = 32,
        device: str = "cpu",
    ) -> None:
        check_linear(recipe)
        self._models = models
        anchor = recipe.base or recipe.sources[0].model
        self._network = Network(models[anchor.path], device=device)
        names = sorted(source.name for source in recipe.sources)
        cut = {name: list(batches(calibration.of(name), batch_size)) for name in names}
        self._batches = [(name, batch) for name in names for batch in cut[name]]
        self._shares = {name: 1 / (len(names) * len(calibration.of(name))) for name in names}
        self._wanted = self._predicted(recipe) if loss == "sources" else None

    @property
    def flops(self) -> float:
        """What passes through the network have cost so far."""
        return self._network.flops

    def value(self, recipe: Recipe) -> float:
        """L of a recipe's merge."""
        with torch.no_grad():
            return float(sum(float(loss) for loss, _ in self._losses(recipe)))

    def gradient(self, recipe: Recipe) -> tuple[float, LayerGradients]:
        """L of a recipe's merge, and ∂L/∂c of every tensor that the network learns.

        Raises MergeError for a merge that is not linear, and for a loss that is not finite.
        """
        check_linear(recipe)
        summed: dict[str, Tensor] = {}

        def take(name: str, gradient: Tensor) -> None:
            summed[name] = summed[name].add_(gradient) if name in summed else gradient.clone()

        value = 0.0
        with self._network.gradients(take):
            for loss, batch in self._losses(recipe):
                value += self._network.backward(loss, batch, what="gradient of shares")
        return value, self._dots(recipe, summed)

    def _dots(self, recipe: Recipe, summed: Mapping[str, Tensor]) -> LayerGradients:
        directions = Directions(recipe, self._models)
        found: LayerGradients = {name: {} for name in directions.names}
        for name, gradient in summed.items():
            flat = gradient.reshape(-1).cpu().double()
            for source, direction in zip(directions.names, directions.of(name), strict=True):
                found[source][name] = float(flat.dot(direction.reshape(-1).double()))
        return found

    def _losses(self, recipe: Recipe) -> Iterator[tuple[Tensor, Batch]]:
        """Each batch's part of L, in order; they add up to it."""
        self._write(Merge(replace(recipe, dtype="float32"), self._models))
        for number, (source, batch) in enumerate(self._batches):
            batch = batch.to(self._network.device)
            logits = self._network.logits(batch)
            rows = _rows(logits, batch, self._wanted[number] if self._wanted else None)
            yield self._shares[source] * rows.sum(), batch

    def _write(self, merge: Merge) -> None:
        for name in filter(merge.is_merged, merge.names):
            self._network.write(name, merge.tensor(name))

    @torch.no_grad()
    def _predicted(self, recipe: Recipe) -> list[Tensor]:
        """What the source that each batch belongs to predicts of it: ln pₖ [counted, v]."""
        found, written = [], ""
        for source, batch in self._batches:
            if source != written:
                alone = tuple(s for s in recipe.sources if s.name == source)
                self._write(Merge(Recipe("linear", recipe.base, alone, {"weight": 1.0}, "float32"),
                                  self._models))  # fmt: skip
                written = source
            logits = self._network.logits(batch.to(self._network.device))
            found.append(log_softmax(logits[batch.counted.to(logits.device)], -1).cpu())
        return found


def _rows(logits: Tensor, batch: Batch, wanted: Tensor | None) -> Tensor:
    """Each example's mean loss over its counted tokens [b]."""
    counted = logits[batch.counted]
    if wanted is None:
        tokens = cross_entropy(counted, batch.targets[batch.counted], reduction="none")
    else:
        ours, theirs = log_softmax(counted, -1), wanted.to(counted.device)
        tokens = kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    count = batch.counted.sum(1)
    row = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    return torch.zeros(len(count), device=count.device).index_add(0, row, tokens) / count
