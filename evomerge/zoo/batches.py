"""Items to tensors: mixtures of skills, batches, and exact-match accuracy.

Knows nothing of training or files. Batches are padded on the right: under a causal mask no token
sees a later one, so no attention mask is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from evomerge.zoo.skills import Draw, Item, Split, draw_from
from evomerge.zoo.vocabulary import EOS_ID, PAD_ID, encode

IGNORED = -100

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Token ids `[item, position]` and, shifted to the position that predicts them, the labels.

    Labels are `IGNORED` everywhere but on the answer and its end-of-text token.
    """

    tokens: Tensor
    labels: Tensor


def make_batch(items: Sequence[Item]) -> Batch:
    """Return the items as one batch, padded to its longest line."""
    lines = [(encode(item.prompt), [*encode(item.answer), EOS_ID]) for item in items]
    width = max(len(prompt) + len(answer) for prompt, answer in lines) - 1
    tokens = torch.full((len(lines), width), PAD_ID)
    labels = torch.full((len(lines), width), IGNORED)
    for row, (prompt, answer) in enumerate(lines):
        seen = prompt + answer[:-1]
        tokens[row, : len(seen)] = torch.tensor(seen)
        labels[row, len(prompt) - 1 : len(seen)] = torch.tensor(answer)
    return Batch(tokens, labels)


class Mixture:
    """An endless stream of training batches, each item's skill drawn by its weight."""

    def __init__(
        self, skills: Mapping[str, Draw], weights: Mapping[str, float], rng: Random
    ) -> None:
        self._draws = [skills[name] for name in weights]
        self._weights = list(weights.values())
        self._rng = rng

    def next_batch(self, size: int) -> Batch:
        """Draw `size` training items."""
        draws = self._rng.choices(self._draws, weights=self._weights, k=size)
        return make_batch([draw_from(draw, Split.TRAIN, self._rng) for draw in draws])


def exact_match(logits: Logits, batch: Batch) -> Tensor:
    """Return for each item whether greedy generation gives exactly its answer, `[item]` bool.

    Greedy decoding gives the answer if and only if each answer token is the most likely one after
    the right tokens before it, so one forward pass over the right answers decides it.
    """
    with torch.no_grad():
        chosen = logits(batch.tokens).argmax(dim=-1)  # [item, position]
    return ((chosen == batch.labels) | (batch.labels == IGNORED)).all(dim=1)
