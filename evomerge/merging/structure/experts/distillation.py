"""Distillation after experts were merged: the loss, and steps of AdamW that survive a crash.

Knows neither which parameters are trained nor how their gradients are found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from evomerge.merging.fitted.base import Watch
from evomerge.merging.fitted.calibration import Batch
from evomerge.merging.fitted.dam_losses import Teacher, kl
from evomerge.merging.fitted.descent import Descent, Saves


def distillation_loss(
    student: Tensor,
    teacher: Tensor | None,
    batch: Batch,
    *,
    weight: float = 0.2,
    temperature: float = 2.0,
) -> Tensor:
    """What the merged model should answer, and how the whole one answers it.

        L = CE + w·KL,   CE = mean over tokens that count of −ln softmax(z)[target]
        KL as in `divergence`; without a teacher CE alone

    Shapes: student's and teacher's logits [b, t, v]; returns a scalar.

    Source: Li et al. 2024, arXiv:2310.01334, and the authors' code: w = 0.2, T = 2.
    """
    counted = batch.counted
    loss = cross_entropy(student[counted], batch.targets[counted])
    if teacher is None or weight == 0:
        return loss
    return loss + weight * divergence(student, teacher, batch, temperature=temperature)


def divergence(
    student: Tensor, teacher: Tensor, batch: Batch, *, temperature: float = 2.0
) -> Tensor:
    """How far the student is from the teacher.

        KL = (1/b)·Σ over tokens that count of KL(softmax(y/T) ‖ softmax(z/T))

    z are the student's logits, y the teacher's, [b, t, v] each. A sum over the tokens of an example
    and a mean over examples (`batchmean`), and not times T²: both as the authors have it. It grows
    with the length of the examples.
    """
    found, wanted = student[batch.counted], teacher[batch.counted]
    scale = max(len(found), 1) / (temperature**2 * len(batch.tokens))
    return kl(found, Teacher(wanted), temperature) * scale


def learning_rate(step: int, *, peak: float, warmup: int, steps: int) -> float:
    """Of step 0, 1, ...: rises evenly from 0 through the warm-up, then falls evenly to 0 at the
    end. A warm-up as long as all steps only rises."""
    if step < warmup:
        return peak * step / warmup
    return peak * (steps - step) / max(steps - warmup, 1)


def distil(
    parameters: Mapping[str, Tensor],
    step: Callable[[int], float],
    saves: Saves,
    *,
    steps: int,
    peak: float,
    warmup: int = 16,
    after: Callable[[int], object] = lambda number: None,
    carried: Mapping[str, Tensor] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[float]:
    """Train parameters, in place, by AdamW (ε 10⁻⁶, β 0.9 and 0.98, weight decay 0.01); the losses
    of all steps.

    `step` is told its number, from 0, sets every parameter's `.grad` and tells the loss; `after`
    is told how many steps were taken, after each. `carried` are other tensors that both change in
    place. What an earlier attempt has saved is gone on with, bit for bit.

    Source: Li et al. 2024, arXiv:2310.01334, appendix, and the authors' code.
    """
    optimiser = torch.optim.AdamW(
        list(parameters.values()), lr=peak, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01
    )
    descent = Descent(parameters, peak, saves, optimiser=optimiser, carried=carried)
    taken = 0

    def stepped(number: int) -> dict[str, float]:
        nonlocal taken
        taken = number + 1
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(number, peak=peak, warmup=warmup, steps=steps)
        return {"loss": step(number)}

    def moved(*_: object) -> None:
        after(taken)

    optimiser.register_step_post_hook(moved)
    descent.run(steps, stepped, Watch(progress=progress), lambda: 0.0)
    return descent.curve.get("loss", [])
