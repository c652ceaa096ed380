"""Greedy generation over prepared batches of prompts.

Knows nothing of tasks and items: prompts as token ids in, texts out. Gives what lm-eval's HFLM
gives through `transformers`' generate (left padding, end-of-sequence tokens, stop strings looked
for in the decoded tail, text cut at the first of them), without its cost per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.scoring.loglikelihood import accepts_logits_to_keep, check_finite

# what `generate` may be configured with and still be plain greedy search
_HARMLESS = {
    "_from_model_config",
    "bos_token_id",
    "cache_implementation",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "use_cache",
}


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, already cut to the model's length, and its text (for the order)."""

    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Stopping:
    """When a text ends: after `max_tokens`, at an end token, or at one of the stop strings."""

    strings: tuple[str, ...]
    max_tokens: int


@dataclass(frozen=True)
class Batch:
    """One run of the decoder: `inputs` and `mask` [b, s], padded on the left."""

    prompts: tuple[int, ...]
    inputs: Tensor
    mask: Tensor


def can_decode(model: Any) -> bool:
    """Whether `decode` equals the model's own `generate` without sampling."""
    parameters = inspect.signature(model.forward).parameters
    if not {"past_key_values", "position_ids", "attention_mask"} <= parameters.keys():
        return False
    if getattr(model, "_is_stateful", False) or model.config.is_encoder_decoder:
        return False
    config = model.generation_config
    return set(config.to_diff_dict()) <= _HARMLESS and config.cache_implementation is None


class GenerationPlan:
    """Prompts that share their stopping rule, in batches, ready to be run.

    Longest first, then by text, as HFLM sorts them (`generate_until` of lm-eval 0.4.13).
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        stopping: Stopping,
        *,
        batch_size: int,
        pad_token: int,
        device: torch.device,
    ) -> None:
        self._count = len(prompts)
        self._stopping = stopping
        order = sorted(
            range(len(prompts)), key=lambda i: (-len(prompts[i].tokens), prompts[i].text)
        )
        self._batches = [
            _batch(order[start : start + batch_size], prompts, pad_token, device)
            for start in range(0, len(order), batch_size)
        ]

    def run(self, model: Any, tokenizer: Any) -> list[str]:
        """One text for each prompt. Raises NonFiniteModel."""
        texts = [""] * self._count
        ends = _end_tokens(model)
        for batch in self._batches:
            decoded = _Decoder(model, tokenizer, self._stopping, ends).decode(batch)
            for prompt, tokens in zip(batch.prompts, decoded, strict=True):
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                texts[prompt] = _cut(text, self._stopping.strings)
        return texts


def _end_tokens(model: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)


def _cut(text: str, strings: Sequence[str]) -> str:
    for string in strings:
        if string:
            text = text.split(string)[0]
    return text


def _batch(
    chosen: Sequence[int], prompts: Sequence[Prompt], pad_token: int, device: torch.device
) -> Batch:
    length = max(len(prompts[i].tokens) for i in chosen)
    inputs = torch.full((len(chosen), length), pad_token, dtype=torch.long)
    mask = torch.zeros(len(chosen), length, dtype=torch.long)
    for row, i in enumerate(chosen):
        tokens = prompts[i].tokens
        inputs[row, length - len(tokens) :] = torch.tensor(tokens)
        mask[row, length - len(tokens) :] = 1
    return Batch(tuple(chosen), inputs.to(device), mask.to(device))


class _Decoder:
    """Decodes one batch; once half of its rows have ended the others go on without them."""

    def __init__(
        self, model: Any, tokenizer: Any, stopping: Stopping, ends: frozenset[int]
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._ends = ends
        self._max_tokens = stopping.max_tokens
        self._keep_last = {"logits_to_keep": 1} if accepts_logits_to_keep(model) else {}
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in stopping.strings]
        self._stops = [
            (text, len(tokens) + 2)  # HFLM looks two tokens further back than the text is long
            for text, tokens in zip(stopping.strings, ids, strict=True)
            if not (len(tokens) == 1 and tokens[0] in ends)
        ]

    def decode(self, batch: Batch) -> list[list[int]]:
        """The new tokens of every row, up to and with the one that ended it."""
        from transformers import DynamicCache

        rows: list[list[int]] = [[] for _ in batch.prompts]
        going = list(range(len(rows)))  # rows that have not ended
        places = going  # where they are in the model's batch
        cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        inputs, mask = batch.inputs, batch.mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        for step in range(self._max_tokens):
            inputs = self._next_tokens(inputs, mask, positions, cache)  # [active, 1]
            places, going = self._append(rows, places, going, inputs[:, 0].tolist())
            if not going or step + 1 == self._max_tokens:
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
            positions = positions[:, -1:] + 1
            if 2 * len(going) <= len(mask):
                chosen = torch.tensor(places, device=mask.device)
                cache.batch_select_indices(chosen)
                inputs, mask, positions = inputs[chosen], mask[chosen], positions[chosen]
                places = list(range(len(going)))
        return rows

    def _next_tokens(self, inputs: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        logits = self._model(
            inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self._keep_last,
        ).logits[:, -1]
        check_finite(logits)
        chosen: Tensor = logits.float().argmax(dim=-1, keepdim=True)
        return chosen

    def _append(
        self, rows: list[list[int]], places: list[int], going: list[int], tokens: list[int]
    ) -> tuple[list[int], list[int]]:
        """Append a token to each row that goes on; return the places and rows that still do."""
        pairs = list(zip(places, going, strict=True))
        for place, row in pairs:
            rows[row].append(tokens[place])
        pairs = [(place, row) for place, row in pairs if not self._ended(rows[row])]
        return [place for place, _ in pairs], [row for _, row in pairs]

    def _ended(self, tokens: list[int]) -> bool:
        if tokens[-1] in self._ends:
            return True
        return any(text in self._tokenizer.decode(tokens[-n:]) for text, n in self._stops)
