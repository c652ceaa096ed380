"""The fit of a greedy soup: which models to average, by what each adds on held-out data.

Knows nothing of how the average is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from evomerge.merging.fitted.artifact import Draft
from evomerge.merging.fitted.base import Fitter, Problem, Settings, Watch, merged_names
from evomerge.merging.fitted.calibration import Batch, Example, batches
from evomerge.merging.fitted.network import Network


class GreedySoupSettings(Settings):
    """`metric` is what an ingredient must raise on the calibration data of all sources together:
    the share of answers whose every token is the most likely one, or minus the mean loss."""

    metric: Literal["accuracy", "loss"] = "accuracy"
    batch_size: int = Field(default=16, ge=1)


class GreedySoupFit(Fitter):
    """Sort models by held-out merit; take each in turn if it strictly raises the soup's.

        S = {best};  for each next m by merit:  S ← S ∪ {m} if merit(mean(S ∪ {m})) > merit(S)

    N models cost N evaluations, and N − 1 of soups. Models of equal merit keep their names' order.
    Artifact: facts `ingredients`, `alone` (merit of each model) and `steps`.

    Source: Wortsman et al. 2022, arXiv:2203.05482, Recipe 1 and the authors' code, which takes
    equals in reverse order of the input.
    """

    name = "greedy_soup"
    summary = "which models to average, each kept if it raises held-out accuracy"
    settings = GreedySoupSettings
    needs_labels = True

    def fit(self, problem: Problem, settings: Any, draft: Draft, watch: Watch) -> None:
        _, notes = draft.state or ({}, {})
        merits: dict[str, float] = dict(notes)  # by the soup's ingredients
        network = Network(problem.anchor, device=problem.device)
        examples = [e for name in problem.sources for e in problem.calibration.of(name)]
        examples = list(dict.fromkeys(examples))

        def merit(chosen: Sequence[str]) -> float:
            key = " ".join(sorted(chosen))
            if key not in merits:
                _stir(network, problem, chosen)
                merits[key] = _merit(network, examples, settings)
                draft.save({}, merits, flops=network.flops)
            watch.progress(len(merits), 2 * len(problem.sources) - 1)
            return merits[key]

        alone = {name: merit([name]) for name in problem.sources}
        order = sorted(alone, key=lambda name: (-alone[name], name))
        ingredients, best, steps = order[:1], alone[order[0]], []
        for name in order[1:]:
            found = merit([*ingredients, name])
            steps.append({"added": name, "merit": found, "kept": found > best})
            if found > best:
                ingredients, best = [*ingredients, name], found
        facts = {"ingredients": sorted(ingredients), "alone": alone, "steps": steps}
        draft.finish({}, facts, flops=network.flops)


def _stir(network: Network, problem: Problem, chosen: Sequence[str]) -> None:
    """Make the network the average of the chosen models, in the order of their names."""
    for name in merged_names(problem):
        rows = [problem.weight(problem.sources[source], name) for source in sorted(chosen)]
        mean = torch.zeros_like(rows[0])
        for row in rows:
            mean += row * (1 / len(rows))
        network.write(name, mean)


@torch.no_grad()
def _merit(network: Network, examples: Sequence[Example], settings: GreedySoupSettings) -> float:
    cut = batches(examples, settings.batch_size)
    found = [_merits(network.logits(batch).cpu(), batch, settings.metric) for batch in cut]
    return float(torch.cat(found).double().mean())


def _merits(logits: Tensor, batch: Batch, metric: str) -> Tensor:
    """For each example [b] whether its answer is right, or minus its mean loss."""
    if metric == "accuracy":
        right = (logits.argmax(-1) == batch.targets) | ~batch.counted
        return right.all(1).float()
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch.targets, reduction="none"
    )
    return -(losses * batch.counted).sum(1) / batch.counted.sum(1)
