"""LoRA adapters on tiny random models, made and merged by peft: what ours is held against."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import small_llama
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

peft = pytest.importorskip("peft")


def llama(folder: Path, **options: Any) -> Path:
    return small_llama.save(folder, **{"dtype": torch.float32, "attention_bias": True, **options})


def gpt2(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    size = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return _save(GPT2LMHeadModel(GPT2Config(**size, **ends, **options)), folder)


def mixtral(folder: Path) -> Path:
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return _save(MixtralForCausalLM(MixtralConfig(**size, **heads)), folder)


def _save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def train(
    base: Path, folder: Path, *, seed: int = 0, dtype: torch.dtype | None = None, **lora: Any
) -> Path:
    """An adapter with random values wherever training would have changed them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(load(base), peft.LoraConfig(**lora))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        if dtype is not None:
            model = model.to(dtype)
        model.save_pretrained(folder)
    return folder


def load(base: Path) -> PreTrainedModel:
    """The model in float32."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def adapted(base: Path, *adapters: Path) -> Any:
    """The base with adapters, the first one active; named 0, 1, ..."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(load(base), adapters[0], adapter_name="0")
        for index, adapter in enumerate(adapters[1:], 1):
            model.load_adapter(adapter, adapter_name=str(index))
    return model.eval()


def merged(base: Path, adapter: Path, folder: Path) -> Path:
    """A checkpoint of what peft merges, in float32."""
    model = adapted(base, adapter).merge_and_unload()
    return _save(model, folder)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(torch.arange(3, 15)[None]).logits
