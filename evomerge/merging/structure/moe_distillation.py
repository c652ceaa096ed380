"""Distillation after experts were merged: the loss, and steps of AdamW that survive a crash.

Knows neither which parameters are trained nor how their gradients are found.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from evomerge.merging.fitted.calibration import Batch
from evomerge.merging.fitted.dam_losses import Teacher, kl


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    batch: Batch,
    *,
    weight: float = 0.2,
    temperature: float = 2.0,
) -> Tensor:
    """What the merged model should answer, and how the whole one answers it.

        L = CE + w·KL,   CE = mean over tokens that count of −ln softmax(z)[target]
        KL as in `divergence`

    Shapes: student's and teacher's logits [b, t, v]; returns a scalar.

    Source: Li et al. 2024, arXiv:2310.01334, and the authors' code: w = 0.2, T = 2.
    """
    counted = batch.counted
    loss = cross_entropy(student[counted], batch.targets[counted])
    if weight == 0:
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
