"""Small fits: random Llamas that differ a little, and random tokens as data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import small_llama
import torch

from evomerge.checkpoints.adapted import open_model
from evomerge.merging.fitted.base import Problem
from evomerge.merging.fitted.calibration import Calibration, Example


def models(root: Path, names: Sequence[str] = ("a", "b"), **options: Any) -> dict[str, str]:
    """A base and fine-tunes of it, float32, each folder by its name."""
    base = small_llama.build(dtype=torch.float32, **options)
    found = {}
    for number, name in enumerate(("base", *names)):
        generator = torch.Generator().manual_seed(number)
        tuned = small_llama.build(dtype=torch.float32, **options)
        with torch.no_grad():
            for parameter, origin in zip(tuned.parameters(), base.parameters(), strict=True):
                noise = torch.randn(parameter.shape, generator=generator) * 0.02
                parameter.copy_(origin + (noise if number else 0))
        tuned.save_pretrained(root / name)
        small_llama.tokenizer().save_pretrained(root / name)
        found[name] = str(root / name)
    return found


def examples(seed: int, count: int = 4, length: int = 8) -> tuple[Example, ...]:
    """Random tokens; the answer is the last half."""
    generator = torch.Generator().manual_seed(seed)
    high = len(small_llama.TOKENS)
    rows = torch.randint(3, high, (count, length), generator=generator)
    return tuple(Example(tuple(row), length // 2) for row in rows.tolist())


def problem(folders: dict[str, str], *, with_base: bool = True, count: int = 4) -> Problem:
    """What a fit is given of `models`' folders."""
    opened = {name: open_model(path) for name, path in folders.items()}
    sources = {name: model for name, model in sorted(opened.items()) if name != "base"}
    data = {name: examples(seed, count) for seed, name in enumerate(sources)}
    digests = {model.path: model.scan().digest for model in opened.values()}
    described = {name: "random tokens" for name in sources}
    base = opened["base"] if with_base else None
    return Problem(base, sources, digests, Calibration(data, described))
