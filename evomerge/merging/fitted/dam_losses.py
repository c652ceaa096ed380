"""DAM's losses: of merged logits against a teacher's, and of the coefficients among themselves.

Logits are those of n tokens that count, [n, v]; padding never gets here. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Teacher:
    """A source's logits at n tokens: the k that are kept [n, k], largest first, with the ids that
    they are of; `tail` [n] is logsumexp of all others, each divided by the temperature.

    Without `ids` they are of the whole vocabulary, in its order. Without `tail` the others are
    ignored, and softmaxes are of the kept ones alone.
    """

    logits: Tensor
    ids: Tensor | None = None
    tail: Tensor | None = None

    @classmethod
    def top(cls, logits: Tensor, k: int, temperature: float, *, tail: bool) -> Teacher:
        """The k largest of whole logits [n, v]."""
        k = min(k, logits.shape[1])
        kept, ids = logits.topk(k, dim=1)
        rest = _outside(logits / temperature, ids) if tail and k < logits.shape[1] else None
        return cls(kept, ids.int(), rest)


def kl(merged: Tensor, teacher: Teacher, temperature: float) -> Tensor:
    """T²·mean over tokens of KL(softmax(t/T) ‖ softmax(z/T)).

    With a `tail` everything that was not kept is one more outcome.
    """
    wanted = _outcomes(teacher.logits / temperature, teacher.tail)
    found = merged / temperature
    if teacher.ids is not None:
        ids = teacher.ids.long()
        tail = None if teacher.tail is None else _outside(found, ids)
        found = _outcomes(found.gather(1, ids), tail)
    total: Tensor = _Divergence.apply(found, wanted)  # type: ignore[no-untyped-call]
    return total * (temperature**2 / max(len(merged), 1))


def mse(merged: Tensor, teacher: Teacher) -> Tensor:
    """Mean over tokens, and over the logits that are kept, of (z − t)²."""
    found = merged if teacher.ids is None else merged.gather(1, teacher.ids.long())
    return ((found - teacher.logits) ** 2).mean(1).sum() / max(len(merged), 1)


def entropy(merged: Tensor, temperature: float) -> Tensor:
    """T²·mean over tokens of the entropy of softmax(z/T)."""
    logs = (merged / temperature).log_softmax(1)
    return -(logs.exp() * logs).sum() * (temperature**2 / max(len(merged), 1))


def similarity(m: Tensor) -> Tensor:
    """Mean over pairs of sources of cos(mᵢ, mⱼ), of [s, g]; 0 where cosines are constant."""
    if m.shape[0] < 2 or m.shape[1] < 2:
        return m.new_zeros(())
    unit = torch.nn.functional.normalize(m, dim=1, eps=1e-8)
    pairs = len(m) * (len(m) - 1) / 2
    return (unit @ unit.T).triu(1).sum() / pairs


def l1(m: Tensor) -> Tensor:
    """Σᵢ ‖mᵢ‖₁ of [s, g]."""
    return m.abs().sum()


def l2(m: Tensor) -> Tensor:
    """Σᵢ ‖mᵢ‖₂ of [s, g], not squared."""
    norms: Tensor = torch.linalg.vector_norm(m, dim=1)
    return norms.sum()


def overlap(m: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over pairs of sources of Σ_c w_c·min(|mᵢ[c]|, |mⱼ[c]|), of [s, g]; `weights` [s, s, g].

    A lone source overlaps with nothing: 0.
    """
    if m.shape[0] < 2:
        return m.new_zeros(())
    pairs = list(combinations(range(m.shape[0]), 2))
    terms = [torch.minimum(m[i].abs(), m[j].abs()) for i, j in pairs]
    if weights is not None:
        terms = [term * weights[i, j] for term, (i, j) in zip(terms, pairs, strict=True)]
    return torch.stack([term.sum() for term in terms]).mean()


def angle_weights(products: Tensor) -> Tensor:
    """sin²(2θ) of columns whose inner products are [s, s, g]: 1 at 45°, 0 if parallel or
    orthogonal, and where a column is 0."""
    norms = products.diagonal().T.sqrt()  # [s, g]
    lengths = norms[:, None] * norms[None]
    cosine = torch.where(lengths > 0, products / lengths.clamp_min(1e-30), 0.0)
    return (4 * cosine**2 * (1 - cosine**2)).clamp_min(0)


class _Divergence(torch.autograd.Function):
    """Σ KL(softmax(t) ‖ softmax(z)) by rows, with the gradient softmax(z) − softmax(t).

    Where z is t, value and gradient are exactly 0; autograd's is a rounding, which Adam would blow
    up to a whole step.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, t: Tensor) -> Tensor:
        found, wanted = z.log_softmax(1), t.log_softmax(1)
        ctx.save_for_backward(found, wanted)
        total: Tensor = (wanted.exp() * (wanted - found)).sum()
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        found, wanted = ctx.saved_tensors
        return gradients[0] * (found.exp() - wanted.exp()), None


def _outcomes(kept: Tensor, tail: Tensor | None) -> Tensor:
    """The kept logits, with the tail as a last column if there is one."""
    return kept if tail is None else torch.cat([kept, tail[:, None]], 1)


def _outside(scaled: Tensor, ids: Tensor) -> Tensor:
    """logsumexp [n] of the logits of all other ids."""
    return scaled.scatter(1, ids.long(), float("-inf")).logsumexp(1)
