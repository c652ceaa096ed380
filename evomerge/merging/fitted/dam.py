"""The fit of DAM: a coefficient for each column and source, learned by gradient descent so that the
merged model keeps each source's logits on that source's data.

Knows nothing of how the merge is written afterwards.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from evomerge.errors import UserError
from evomerge.merging.fitted.artifact import Draft
from evomerge.merging.fitted.base import Fitter, Problem, Settings, Watch
from evomerge.merging.fitted.dam_training import Training
from evomerge.merging.fitted.granularity import Granularity, Kind
from evomerge.merging.fitted.heap import return_large_blocks
from evomerge.merging.fitted.network import Network
from evomerge.merging.methods.mergers import NonLinearity

_SAVE_EVERY_S = 30.0


class DamSettings(Settings):
    """What is trained, on which loss, and how; see docs/methods/dam.md."""

    granularity: Granularity = "column"
    non_linearity: NonLinearity = "identity"
    anchor: Literal["none", "base"] = "none"
    train: tuple[Kind, ...] = Field(default=("linears", "biases"), min_length=1)
    initial: Literal["uniform", "random"] = "uniform"

    kl: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=2.0, gt=0)
    mse: float = Field(default=0.0, ge=0)
    entropy: float = Field(default=0.0, ge=0)
    similarity: float = Field(default=0.01, ge=0)
    l1: float = Field(default=0.0, ge=0)
    l2: float = Field(default=0.0, ge=0)
    overlap: float = Field(default=0.0, ge=0)
    weighted_overlap: float = Field(default=0.0, ge=0)
    tokens: Literal["answer", "all"] = "answer"

    teacher: Literal["live", "cached"] = "live"
    top_k: int = Field(default=128, ge=1)
    tail: bool = True
    cache: Path | None = Field(default=None, exclude=True)  # where it lies changes no number

    optimizer: Literal["adamw", "mofo"] = "mofo"
    alpha: float = Field(default=0.3, gt=0, le=1)
    learning_rate: float = Field(default=1e-2, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    epochs: int = Field(default=4, ge=1)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    checkpointing: bool = False


class DamFit(Fitter):
    """Minimise, over the coefficients m alone, on each source's data and its own logits,

        L = Σᵢ (kl·KLᵢ + mse·MSEᵢ + entropy·Hᵢ)
            + Σ over modules of (similarity·cos + l1·‖m‖₁ + l2·‖m‖₂ + overlap + weighted_overlap)

    A step takes a batch of each source. Artifact: m by tensor, [s, g] float32, sources in the order
    of their names; facts `anchor`, `non_linearity`, `granularity`, `axes` (of the trained tensors),
    `averaged` (the others), `steps`, `curve` (each term, its mean over `every` steps).

    Source: arXiv:2410.08371 and its released code; docs/methods/dam.md lists every difference.
    """

    name = "dam"
    summary = "coefficients by column and source that keep each source's logits on its data"
    settings = DamSettings
    needs_gradients = True

    def fit(self, problem: Problem, settings: Any, draft: Draft, watch: Watch) -> None:
        _check(problem, settings)
        return_large_blocks()
        network = Network(
            problem.anchor, device=problem.device, checkpointing=settings.checkpointing
        )
        training = Training(network, problem, settings, watch)
        if draft.state is not None:
            training.restore(*draft.state)
        saved_s = time.monotonic()
        while training.step < training.steps:
            training.advance()
            watch.progress(training.step, training.steps)
            if time.monotonic() - saved_s >= _SAVE_EVERY_S:
                draft.save(*training.state(), flops=network.flops)
                saved_s = time.monotonic()
        draft.finish(training.tensors(), training.facts(), flops=network.flops)


def _check(problem: Problem, settings: DamSettings) -> None:
    if problem.base is None and (settings.anchor == "base" or settings.weighted_overlap):
        wanted = "anchor: base" if settings.anchor == "base" else "weighted_overlap"
        raise UserError(f"dam: `{wanted}` looks at task vectors; give the recipe a `base`")
    if settings.cache is not None and settings.teacher == "live":
        raise UserError("dam: `cache` is of no use to a live teacher; add `teacher: cached`")
    if not (settings.kl or settings.mse or settings.entropy):
        raise UserError("dam: no loss looks at the data; give kl, mse or entropy a weight")
    for name in problem.sources:
        problem.calibration.of(name)
