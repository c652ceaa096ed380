"""Two fine-tunes of one random model of a family of `tiny_models`, in float32, and data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import small_llama
import small_problems
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from evomerge.merging.fitted.base import Problem
from evomerge.merging.fitted.calibration import Example
from evomerge.merging.recipe import ModelRef, Recipe, Source

FAMILIES = ["llama", "llama-tied", "gpt2", "qwen2", "mixtral"]


def folders(family: str, root: Path) -> dict[str, str]:
    """A base, and `a` and `b` near it, each folder by its name."""
    origin = {k: t.clone() for k, t in _state(family, 0).items()}
    for seed, name in enumerate(("base", "a", "b")):
        model = tiny_models.causal(family, dtype=torch.float32)
        noise = _state(family, seed)
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                tensor.copy_(0.3 * origin[key] + 0.15 * noise[key])
        model.save_pretrained(root / name)
        small_llama.tokenizer().save_pretrained(root / name)
    return {name: str(root / name) for name in ("base", "a", "b")}


def problem(family: str, root: Path, *, count: int = 16) -> Problem:
    """What a fit is given of them."""
    return opened(folders(family, root), count=count)


def opened(found_folders: dict[str, str], *, count: int = 16) -> Problem:
    """Models, and examples of five or eight tokens, the answer from the third on."""
    found = small_problems.problem(found_folders)
    data = {name: _examples(seed, count) for seed, name in enumerate(found.sources)}
    return replace(found, calibration=replace(found.calibration, examples=data))


def recipe(found: Problem, method: str, artifact: Path, **parameters: Any) -> Recipe:
    """The merge of a problem's sources by what a fit of it left."""
    assert found.base is not None
    sources = tuple(Source(name, ModelRef(model.path)) for name, model in found.sources.items())
    reference = ModelRef(str(artifact))
    return Recipe(method, ModelRef(found.base.path), sources, parameters, artifact=reference)


def live(found: Problem, source: str, dtype: torch.dtype = torch.float32) -> Any:
    """A source as transformers loads it."""
    model = AutoModelForCausalLM.from_pretrained(found.sources[source].folder, dtype=dtype)
    return model.eval()


def _state(family: str, seed: int) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = tiny_models.causal(
        family, seed=seed, dtype=torch.float32
    ).state_dict()
    return state


def _examples(seed: int, count: int) -> tuple[Example, ...]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 48, (count, 8), generator=generator).tolist()
    return tuple(Example(tuple(row[: 8 - 3 * (i % 2)]), 2) for i, row in enumerate(rows))
