"""Calibration data as fitted methods see it: token sequences, and which of their tokens count.

Knows no tokenizer, no task and no file: `evomerge.calibration` reads those.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from evomerge.errors import UserError


@dataclass(frozen=True)
class Example:
    """One sequence. A loss counts the tokens from `answer` on (0: all but the first, which nothing
    predicts). `item` is the content hash of what it was made from.
    """

    tokens: tuple[int, ...]
    answer: int = 0
    item: str = ""

    @property
    def predicted(self) -> range:
        """The positions of the tokens that a loss counts."""
        return range(max(self.answer, 1), len(self.tokens))


@dataclass(frozen=True)
class Batch:
    """Examples side by side, padded on the right.

    tokens [b, t] int64; attention [b, t] int64, 1 on real tokens; counted [b, t] bool: the logits
    at this place predict a token that counts, `targets` [b, t].
    """

    tokens: Tensor
    attention: Tensor
    counted: Tensor
    targets: Tensor

    def to(self, device: str | torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(
            *(t.to(device) for t in (self.tokens, self.attention, self.counted, self.targets))
        )


@dataclass(frozen=True)
class Calibration:
    """Examples for each source, by its name. What is meant for all stands under every name.

    `described` says in words where each came from, for the record.
    """

    examples: Mapping[str, tuple[Example, ...]]
    described: Mapping[str, str]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all examples by source, as 64 hex digits."""
        document = {
            name: [[list(e.tokens), e.answer] for e in examples]
            for name, examples in sorted(self.examples.items())
        }
        return hashlib.sha256(json.dumps(document, separators=(",", ":")).encode()).hexdigest()

    @property
    def counts(self) -> Mapping[str, int]:
        """How many examples each source has."""
        return {name: len(examples) for name, examples in self.examples.items()}

    @property
    def items(self) -> list[str]:
        """Content hashes of what the examples were made from, sorted, each once."""
        every = (example.item for examples in self.examples.values() for example in examples)
        return sorted(set(filter(None, every)))

    def of(self, source: str, *, least: int = 1) -> tuple[Example, ...]:
        """A source's examples. Raises UserError if they are fewer than `least`."""
        found = self.examples.get(source, ())
        if len(found) < least:
            raise UserError(
                f"calibration of source {source!r}: {len(found)} examples,"
                f" at least {least} are needed; name more data or raise `count`"
            )
        return found


def batches(examples: Sequence[Example], size: int) -> Iterator[Batch]:
    """The examples in their order, `size` at a time."""
    for start in range(0, len(examples), size):
        yield batch(examples[start : start + size])


def batch(examples: Sequence[Example]) -> Batch:
    """The examples as one batch, as wide as the longest."""
    shape = len(examples), max(len(e.tokens) for e in examples)
    tokens, attention, targets = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    counted = torch.zeros(shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        tokens[row, :length] = torch.tensor(example.tokens)
        attention[row, :length] = 1
        targets[row, : length - 1] = tokens[row, 1:length]
        predicted = example.predicted
        counted[row, predicted.start - 1 : predicted.stop - 1] = True
    return Batch(tokens, attention, counted, targets)
