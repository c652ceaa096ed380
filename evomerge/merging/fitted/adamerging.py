"""The fit of AdaMerging: how much of each task vector, learned from what the merge itself predicts.

Knows nothing of how the merge is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from evomerge.merging.compute import BLOCK_SIZE, Operands
from evomerge.merging.fitted.artifact import Draft
from evomerge.merging.fitted.base import Fitter, Problem, Settings, Watch, learned_names
from evomerge.merging.fitted.calibration import Batch
from evomerge.merging.fitted.descent import Descent, Rows, endless_batch
from evomerge.merging.fitted.network import Network
from evomerge.merging.methods.adamerging import agreeing_votes
from evomerge.merging.methods.base import Block, Blocks, Coefficients
from evomerge.merging.methods.combination import moved, weighted_sum
from evomerge.merging.methods.election import tie_sign
from evomerge.merging.methods.selection import Cut
from evomerge.merging.methods.ties import PRESETS, Ties

_AUTHORS = PRESETS["ties-ref"]


class AdaMergingSettings(Settings):
    """`granularity`: a coefficient for each tensor and source, or for each source (`task`).
    `plus_plus` learns factors of the entries that TIES selects, at `density`, over the model.
    `loss`: the entropy of what the merge predicts, or its divergence from the source whose data it
    is (`kl`). `clamp` keeps coefficients in [0, 1]; one that leaves has no gradient any more.
    A step takes a batch of each source's data."""

    granularity: Literal["layer", "task"] = "layer"
    plus_plus: bool = False
    density: float = Field(default=0.2, gt=0, le=1)
    loss: Literal["entropy", "kl"] = "entropy"
    init: float = 0.3
    clamp: bool = True
    lr: float = Field(default=1e-3, ge=0)
    steps: int = Field(default=500, ge=0)
    batch_size: int = Field(default=16, ge=1)


class AdaMergingFit(Fitter):
    """Learn λ by gradient descent on unlabelled data.

        θˡ(λ) = θ₀ˡ + Σᵢ clamp(λᵢˡ, 0, 1)·τᵢˡ           ++: TIES' share of τᵢˡ
        L(λ)  = Σₖ mean over source k's batch of H(softmax(z))          z: logits of θ(λ)
                                     | of KL(softmax(zₖ) ‖ softmax(z))  zₖ: logits of source k
        ∂L/∂λᵢˡ = ⟨∂L/∂θˡ, τᵢˡ⟩ where 0 ≤ λᵢˡ ≤ 1, else 0

    Means run over the tokens that a loss counts. Adam, β = (0.9, 0.999), no decay. A coefficient is
    float64, its gradient is summed in float64. One copy of the weights; with `kl` it takes turns.
    Artifact: a tensor [s] float64 for each tensor learned, as clamped; facts `sources`, `start`,
    `selection` (TIES' trims and sign at a tie), `curve` by source, `at_zero` and `at_one` (shares).

    Source: Yang et al. 2024, arXiv:2310.02575, and the authors' code.
    """

    name = "adamerging"
    summary = "a coefficient for each tensor and source, by minimal entropy of predictions"
    settings = AdaMergingSettings
    needs_base = True
    needs_gradients = True

    def fit(self, problem: Problem, settings: Any, draft: Draft, watch: Watch) -> None:
        network = Network(problem.anchor, device=problem.device)
        selection = _Selection.of(problem, network, settings) if settings.plus_plus else None
        training = _Training(problem, settings, network, selection)
        descent = Descent({"lambda": training.raw}, settings.lr, draft)
        with network.gradients(training.take):
            descent.run(settings.steps, training.step, watch, lambda: network.flops)
        found = training.effective.detach()
        ends = {"at_zero": float((found <= 0).double().mean())}
        ends |= {"at_one": float((found >= 1).double().mean())}
        if settings.clamp and sum(ends.values()) > 0:
            watch.note(
                f"{ends['at_zero']:.0%} of the coefficients ended at 0 and {ends['at_one']:.0%} at"
                " 1, where the clamp lets no gradient through (`clamp: false` has none)"
            )
        facts = {
            "sources": list(problem.sources),
            "start": settings.init,
            "selection": selection.to_json() if selection else None,
            "curve": descent.curve,
            **ends,
        }
        tensors = {name: found[training.rows[name]].clone() for name in training.names}
        draft.finish(tensors, facts, flops=network.flops)


class _Selection:
    """What TIES keeps of every task vector, trimmed over the whole model; computed when asked."""

    def __init__(self, trims: dict[str, tuple[Cut, ...]], tie: int) -> None:
        self.trims = trims
        self.tie = tie

    @classmethod
    def of(cls, problem: Problem, network: Network, settings: AdaMergingSettings) -> _Selection:
        """The authors' selection: all that equals the threshold is kept, ties go by majority."""

        def model() -> Iterator[tuple[Coefficients, Blocks]]:
            for name in sorted(learned_names(problem, network)):
                yield _ties_coefficients(problem, name, settings.density), _blocks(problem, name)

        survey = Ties().survey(model)
        assert survey is not None
        rule = str(_AUTHORS["sign_tie"])
        return cls(dict(survey.trims), tie_sign(rule, survey.balance))

    def to_json(self) -> dict[str, Any]:
        cuts = {n: [[cut.pattern, cut.last] for cut in row] for n, row in self.trims.items()}
        return {"tie": self.tie, "trims": cuts}


class _Training:
    """One descent: what is learned, what it merges to, and how its gradient is found."""

    def __init__(
        self,
        problem: Problem,
        settings: AdaMergingSettings,
        network: Network,
        selection: _Selection | None,
    ) -> None:
        self._problem = problem
        self._settings = settings
        self._network = network
        self._selection = selection
        self.names = learned_names(problem, network)
        self.rows = Rows(self.names, shared=settings.granularity == "task")
        shape = self.rows.count, len(problem.sources)
        self.raw = torch.full(shape, settings.init, dtype=torch.float64)
        self.raw.grad = torch.zeros_like(self.raw)
        self._batches: dict[str, Batch] = {}

    @property
    def effective(self) -> Tensor:
        """The coefficients [rows, s] as the merge has them."""
        return self.raw.clamp(0, 1) if self._settings.clamp else self.raw

    def step(self, number: int) -> dict[str, float]:
        """The losses by source, with their gradient left in `raw.grad`."""
        assert self.raw.grad is not None
        self.raw.grad.zero_()
        data = {source: self._batch(source, number) for source in self._problem.sources}
        targets = {s: self._teach(s, b) for s, b in data.items()} if self._taught else {}
        self._write()
        losses = {}
        for source, batch in data.items():
            logits = self._network.logits(batch)[batch.counted]
            loss = divergence(targets[source], logits) if self._taught else entropy(logits)
            what = f"adamerging, step {number}, source {source!r}"
            losses[source] = self._network.backward(loss, batch, what=what)
        if self._settings.clamp:
            self.raw.grad[(self.raw < 0) | (self.raw > 1)] = 0
        return losses

    def take(self, name: str, gradient: Tensor) -> None:
        """Add ⟨∂L/∂θˡ, τᵢˡ⟩ to the gradient of every source's coefficient."""
        if name not in self.rows:
            return
        assert self.raw.grad is not None
        for column, tau in enumerate(self._task_vectors(name)):
            product = tau.mul_(gradient).sum(dtype=torch.float64)
            self.raw.grad[self.rows[name], column] += product.cpu()

    @property
    def _taught(self) -> bool:
        return self._settings.loss == "kl"

    def _batch(self, source: str, number: int) -> Batch:
        examples, seed = self._problem.calibration.of(source), self._problem.seed
        size = self._settings.batch_size
        found = endless_batch(examples, number, size, seed=seed, name=source)
        return found.to(self._problem.device)

    @torch.no_grad()
    def _teach(self, source: str, batch: Batch) -> Tensor:
        """A source's own logits on its batch, at the places that count [n, v]."""
        self._network.become(self._problem.sources[source], self.names)
        return self._network.logits(batch)[batch.counted]

    def _write(self) -> None:
        """Make the network the merge of the coefficients."""
        shares = self.effective.tolist()
        assert self._problem.base is not None
        for name in self.names:
            base = self._problem.weight(self._problem.base, name)
            tau = weighted_sum(self._task_vectors(name), shares[self.rows[name]])
            self._network.write(name, moved(base, tau))

    def _task_vectors(self, name: str) -> Iterator[Tensor]:
        """τᵢ of one tensor, or TIES' share of it, for each source, in its shape; may be changed."""
        problem = self._problem
        if self._selection is None:
            yield from (problem.task_vector(source, name) for source in problem.sources)
            return
        assert problem.base is not None
        base = problem.weight(problem.base, name)
        rows = [problem.weight(model, name).view(-1) for model in problem.sources.values()]
        block = Block(base.view(-1), torch.stack(rows), 0)
        votes = agreeing_votes(block, self._selection.trims[name], self._selection.tie)
        yield from (vote.view(base.shape) for vote in votes)


def entropy(logits: Tensor) -> Tensor:
    """Mean of H(softmax(z)), in nats. Shapes: logits [n, v]."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def divergence(teacher: Tensor, logits: Tensor) -> Tensor:
    """Mean of KL(softmax(teacher) ‖ softmax(z)), in nats. Shapes: both [n, v]."""
    told, logs = teacher.log_softmax(-1), logits.log_softmax(-1)
    return (told.exp() * (told - logs)).sum(-1).mean()


def _ties_coefficients(problem: Problem, name: str, density: float) -> Coefficients:
    count = len(problem.sources)
    return Coefficients(
        tensor=name,
        shape=problem.anchor.shape(name),
        names=tuple(problem.sources),
        order=tuple(range(count)),
        source={"weight": (1.0,) * count, "density": (density,) * count},
        recipe={**_AUTHORS, "lambda": 1.0},
        seed=0,
    )


def _blocks(problem: Problem, name: str) -> Blocks:
    assert problem.base is not None
    rows = tuple(model.tensor(name).reshape(-1) for model in problem.sources.values())
    return Operands(problem.base.tensor(name).reshape(-1), rows).blocks(BLOCK_SIZE)
