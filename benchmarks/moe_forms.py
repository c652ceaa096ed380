"""What the three forms of a model with merged experts weigh, and how long they compute.

Times are CPU seconds of one thread, as a share of the full model's in the same round: forms take
turns in an order that is drawn anew, and the median over the rounds stands for all of them. Knows
nothing of losses.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from moe_mixtral import TOKENS
from torch import Tensor

from evomerge.checkpoints import Checkpoint
from evomerge.merging.fitted.calibration import Example
from evomerge.merging.structure.experts.export import ExpertProblem, merge_experts
from evomerge.merging.structure.experts.remapped import load_remapped
from evomerge.merging.structure.experts.settings import ExpertSettings

FULL = "full"
FORMS = ("replicated", "remapped", "collapsed")
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")  # transformers takes the first by itself
KEEP, BATCH, PROMPT, DECODED = 4, 4, 32, 16


@dataclass(frozen=True)
class Form:
    """`times` are shares of the full model's, by implementation: prefill, decoding."""

    weights_bytes: int
    parameters: int
    times: Mapping[str, tuple[float, float]]


def forms(model: Path, rounds: int) -> dict[str, Form]:
    """The full model, and its three forms with half of the experts."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {FULL: model, **{form: Path(scratch) / form for form in FORMS}}
        for form in FORMS:
            write(model, form, folders[form])
        times = {each: timed(folders, each, rounds) for each in IMPLEMENTATIONS}
        return {
            name: Form(
                sum(path.stat().st_size for path in folder.glob("*.safetensors")),
                sum(tensor.numel() for tensor in loaded(name, folder, "eager").parameters()),
                {each: times[each][name] for each in IMPLEMENTATIONS},
            )
            for name, folder in folders.items()
        }


def write(model: Path, form: str, folder: Path) -> None:
    """As many experts in every layer, so that all forms hold the same."""
    settings = ExpertSettings.model_validate({"keep": KEEP, "allocation": "uniform", "form": form})
    data = [Example(tuple(row)) for row in prompts(PROMPT).tolist()]
    merge_experts(ExpertProblem(Checkpoint.open(str(model)), data, settings), folder)


def loaded(name: str, folder: Path, implementation: str) -> Any:
    from transformers import AutoModelForCausalLM

    if name == "remapped":
        return load_remapped(folder, experts_implementation=implementation)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", experts_implementation=implementation
    ).eval()


@torch.no_grad()
def timed(
    folders: Mapping[str, Path], implementation: str, rounds: int
) -> dict[str, tuple[float, float]]:
    """Prefill and decoding of every form, as shares of the full model's."""
    models = {name: loaded(name, folder, implementation) for name, folder in folders.items()}
    dice = random.Random(0)
    shares: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for model in models.values():
        passes(model)
    for _ in range(rounds):
        order = dice.sample(list(models), len(models))
        found = {name: passes(models[name]) for name in order}
        for name, (prefill, decoding) in found.items():
            shares[name].append((prefill / found[FULL][0], decoding / found[FULL][1]))
    return {
        name: (median(prefill for prefill, _ in known), median(decoding for _, decoding in known))
        for name, known in shares.items()
    }


def passes(model: Any) -> tuple[float, float]:
    """Seconds for a batch of prompts, and for the tokens that follow them, one by one."""
    out, prefill = seconds(lambda: model(input_ids=prompts(PROMPT), use_cache=True))
    following = prompts(DECODED)

    def decode() -> None:
        cache = out.past_key_values
        for tokens in following.split(1, dim=1):
            cache = model(input_ids=tokens, past_key_values=cache, use_cache=True).past_key_values

    return prefill, seconds(decode)[1]


def seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    made = work()
    return made, time.process_time() - began


def prompts(length: int) -> Tensor:
    """Tokens [b, t], the same in every call."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(TOKENS, (BATCH, length), generator=generator)
