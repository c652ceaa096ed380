"""Tiny mixtures of experts on disk, with a tokenizer, and token sequences to run them on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import small_llama
import tiny_models
import torch
import transformers
from torch import Tensor

from evomerge.merging.fitted.calibration import Example

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]
GROUPED = ["deepseek_v2", "deepseek_v3"]
"""Those whose routers choose among groups of experts."""
UNGROUPED = {"deepseek_v2-1", "deepseek_v3-1"}
"""The same with one group, so that their routers can be collapsed."""
SWITCH = "switch"
EVERY = [*FAMILIES, *GROUPED, *sorted(UNGROUPED), SWITCH]


def folder(family: str, place: Path, *, seed: int = 0) -> Path:
    """A model whose weights are of a size that keeps its answers tame, in float32."""
    model = built(family, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.mul_(0.1)  # else the same experts are chosen for every token
    model.save_pretrained(place)
    small_llama.tokenizer().save_pretrained(place)
    return place


def built(family: str, *, seed: int = 0) -> Any:
    """A random model of a family, in memory."""
    if family == SWITCH:
        return tiny_models.randomised(_switch(), seed)
    name, _, groups = family.partition("-")
    options = {"n_group": 1, "topk_group": 1} if groups else {}
    return tiny_models.causal(name, seed=seed, dtype=torch.float32, **options)


def loaded(place: Path, **options: Any) -> Any:
    """The model of a folder, by transformers alone."""
    config = transformers.AutoConfig.from_pretrained(place)
    kind = "Seq2SeqLM" if config.is_encoder_decoder else "CausalLM"
    auto = getattr(transformers, f"AutoModelFor{kind}")
    return auto.from_pretrained(place, dtype=torch.float32, **options).eval()


def _switch() -> Any:
    config = transformers.SwitchTransformersConfig(
        vocab_size=48, d_model=16, d_kv=4, d_ff=24, num_heads=4, num_layers=2,
        num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        num_experts=4, expert_capacity=4, decoder_start_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config)


def examples(count: int = 10, seed: int = 0) -> list[Example]:
    """Sequences of five to nine tokens, so that a batch is padded."""
    dice = random.Random(seed)
    return [
        Example(tuple(dice.randrange(3, 48) for _ in range(dice.randint(5, 9))))
        for _ in range(count)
    ]


@torch.no_grad()
def logits(model: Any, found: list[Example]) -> list[Tensor]:
    """The logits [t, v] of every sequence, run alone. An encoder-decoder reads its first half,
    closed by the end of a sequence, and is asked for the second."""
    if not model.config.is_encoder_decoder:
        rows = [torch.tensor([e.tokens]) for e in found]
        return [model(input_ids=row, use_cache=False).logits[0] for row in rows]
    made = []
    for example in found:
        half = (len(example.tokens) + 1) // 2
        said = torch.tensor([[*example.tokens[:half], 2]])
        asked = torch.tensor([[0, *example.tokens[half:-1]]])
        out = model(input_ids=said, decoder_input_ids=asked, use_cache=False)
        made.append(out.logits[0])
    return made
