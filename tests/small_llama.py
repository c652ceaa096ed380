"""Random Llama checkpoints of a few thousand weights, built where a test needs them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

TOKENS = ("<pad>", "<s>", "</s>", *(f"w{index}" for index in range(61)))

logging.disable_progress_bar()


def build(
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    tie: bool = False,
    extra: Mapping[str, torch.Tensor] | None = None,
    **config: Any,
) -> LlamaForCausalLM:
    """A random model; `extra` are persistent buffers of its inner model."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(TOKENS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tie,
        "max_position_embeddings": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **config})).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones when new: a merge of ones proves nothing
                parameter.add_(0.1 * torch.randn_like(parameter))
    for name, tensor in (extra or {}).items():
        model.model.register_buffer(name, tensor)
    return model


def save(
    folder: Path, *, tokens: tuple[str, ...] = TOKENS, shard: str = "5GB", **options: Any
) -> Path:
    """A checkpoint of `build(**options)` with a word tokenizer; returns its folder."""
    build(**options).save_pretrained(folder, max_shard_size=shard)
    tokenizer(tokens).save_pretrained(folder)
    return folder


def tokenizer(tokens: tuple[str, ...] = TOKENS) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=tokens[0], bos_token=tokens[1], eos_token=tokens[2]
    )
