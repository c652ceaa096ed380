"""The fit of a learned soup: how much of each model, for every tensor, by gradient descent.

Knows nothing of how the average is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from evomerge.merging.fitted.artifact import Draft
from evomerge.merging.fitted.base import Fitter, Problem, Settings, Watch, learned_names
from evomerge.merging.fitted.descent import Descent, Rows, endless_batch
from evomerge.merging.fitted.network import Network
from evomerge.merging.methods.combination import weighted_sum


class LearnedSoupSettings(Settings):
    """`granularity`: shares for each tensor (`layer`, the authors' by-layer soup), or for the whole
    model. `epochs` over the examples of all sources together."""

    granularity: Literal["layer", "model"] = "layer"
    lr: float = Field(default=0.05, ge=0)
    epochs: int = Field(default=5, ge=0)
    batch_size: int = Field(default=16, ge=1)


class LearnedSoupFit(Fitter):
    """Learn shares that sum to 1 by gradient descent on held-out answers.

        θˡ = Σᵢ αᵢˡ·θᵢˡ,  αˡ = softmax(aˡ)
        L  = mean cross-entropy of β·z over the answers' tokens        z: logits of θ
        ∂L/∂aᵢˡ = αᵢˡ·(dᵢ − Σⱼ αⱼˡ·dⱼ),  dᵢ = ⟨∂L/∂θˡ, θᵢˡ − θ₁ˡ⟩

    a starts equal, so that the first soup is the uniform one; β at 1. AdamW without decay. What is
    subtracted in dᵢ cancels, and keeps small differences of models out of large inner products.
    β only helps the learning: the merge leaves logits as they are. Sums of gradients in float64.
    Artifact: a tensor α [s] float64 for each tensor learned; facts `sources`, `beta`, `curve`.

    Source: Wortsman et al. 2022, arXiv:2203.05482, appendix I, and the authors' code.
    """

    name = "learned_soup"
    summary = "the shares of an average, for each tensor, by cross-entropy on held-out answers"
    settings = LearnedSoupSettings
    needs_labels = True
    needs_gradients = True

    def fit(self, problem: Problem, settings: Any, draft: Draft, watch: Watch) -> None:
        network = Network(problem.anchor, device=problem.device)
        training = _Training(problem, settings, network)
        descent = Descent({"a": training.raw, "beta": training.beta}, settings.lr, draft)
        with network.gradients(training.take):
            descent.run(training.steps, training.step, watch, lambda: network.flops)
        alpha = training.raw.detach().softmax(1)
        tensors = {name: alpha[training.rows[name]].clone() for name in training.names}
        facts = {
            "sources": list(problem.sources),
            "beta": float(training.beta.detach()),
            "curve": descent.curve,
        }
        draft.finish(tensors, facts, flops=network.flops)


class _Training:
    """One descent: what is learned, what it averages to, and how its gradient is found."""

    def __init__(self, problem: Problem, settings: LearnedSoupSettings, network: Network) -> None:
        self._problem = problem
        self._settings = settings
        self._network = network
        examples = [e for name in problem.sources for e in problem.calibration.of(name)]
        self._examples = list(dict.fromkeys(examples))
        self.steps = settings.epochs * math.ceil(len(self._examples) / settings.batch_size)
        self.names = learned_names(problem, network)
        self.rows = Rows(self.names, shared=settings.granularity == "model")
        self.raw = torch.zeros(self.rows.count, len(problem.sources), dtype=torch.float64)
        self.beta = torch.ones((), dtype=torch.float64, requires_grad=True)
        self._products = torch.zeros_like(self.raw)

    def step(self, number: int) -> dict[str, float]:
        """The loss, with its gradient left in `raw.grad` and `beta.grad`."""
        size, seed = self._settings.batch_size, self._problem.seed
        batch = endless_batch(self._examples, number, size, seed=seed).to(self._problem.device)
        alpha = self.raw.softmax(1)
        self._write(alpha)
        self._products.zero_()
        self.beta.grad = None
        logits = self._network.logits(batch)[batch.counted]
        scaled = logits * self.beta.to(logits)
        loss = torch.nn.functional.cross_entropy(scaled, batch.targets[batch.counted])
        value = self._network.backward(loss, batch, what=f"learned soup, step {number}")
        mean = (alpha * self._products).sum(1, keepdim=True)
        self.raw.grad = alpha * (self._products - mean)
        return {"loss": value}

    def take(self, name: str, gradient: Tensor) -> None:
        """Add ⟨∂L/∂θˡ, θᵢˡ − θ₁ˡ⟩ for every source."""
        if name not in self.rows:
            return
        first: Tensor | None = None
        for column, weight in enumerate(self._weights(name)):
            if first is None:
                first = weight
                continue
            product = weight.sub_(first).mul_(gradient).sum(dtype=torch.float64)
            self._products[self.rows[name], column] += product.cpu()

    def _write(self, alpha: Tensor) -> None:
        """Make the network the average with these shares."""
        for name in self.names:
            merged = weighted_sum(self._weights(name), alpha[self.rows[name]].tolist())
            assert merged is not None
            self._network.write(name, merged)

    def _weights(self, name: str) -> Iterator[Tensor]:
        models = self._problem.sources.values()
        return (self._problem.weight(model, name) for model in models)
