"""Tiny mixtures of experts on disk, with a tokenizer, and token sequences to run them on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import small_llama
import tiny_models
import torch
from torch import Tensor

from evomerge.merging.fitted.calibration import Example

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]


def folder(family: str, place: Path, *, seed: int = 0) -> Path:
    """A model whose weights are of a size that keeps its answers tame, in float32."""
    model = tiny_models.causal(family, seed=seed, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    model.save_pretrained(place)
    small_llama.tokenizer().save_pretrained(place)
    return place


def examples(count: int = 10, seed: int = 0) -> list[Example]:
    """Sequences of five to nine tokens, so that a batch is padded."""
    dice = random.Random(seed)
    return [
        Example(tuple(dice.randrange(3, 48) for _ in range(dice.randint(5, 9))))
        for _ in range(count)
    ]


@torch.no_grad()
def logits(model: Any, found: list[Example]) -> list[Tensor]:
    """The logits [t, v] of every sequence, run alone."""
    return [model(input_ids=torch.tensor([e.tokens]), use_cache=False).logits[0] for e in found]
