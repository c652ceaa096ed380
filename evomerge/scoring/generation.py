"""Greedy generation over prepared batches of prompts.

Knows nothing of tasks and items: prompts as token ids in, texts out. Gives what lm-eval's HFLM
gives through `transformers`' generate (left padding, end-of-sequence tokens, stop strings looked
for in the decoded tail, text cut at the first of them), without its cost per token. What all
prompts begin with is run once where that pays; a batch in which the choice of a token is then
nearly a tie is run again without.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.scoring.key_values import (
    Segment,
    empty_cache,
    growing_cache,
    is_exact,
    read_once,
    shareable_tokens,
)
from evomerge.scoring.loglikelihood import accepts_logits_to_keep, check_finite
from evomerge.scoring.room import Room, is_out_of_memory
from evomerge.scoring.shared_context import common_prefix

# A shared prefix has to save this part of all tokens, those to be written included.
_SAVED = 0.2
# Logits nearer than this are a tie that rounding may have decided. Rounding errors of whole
# texts do not add up, as those of log-likelihoods do.
_NEAR = 1e-4
_TRIED = 2  # of the longest prompts and of the shortest each
_Rows = list[list[int]]  # the new tokens of every row

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
    """One run of the decoder: `inputs` [b, s] padded on the left, behind a prefix that all share.

    `mask` [b, prefix + s] covers the prefix.
    """

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
        room: Room,
        pad_token: int,
        device: torch.device,
        share_prefix: bool = False,
    ) -> None:
        self._prompts = [prompt.tokens for prompt in prompts]
        self._stopping = stopping
        self._room = room
        self._pad_token = pad_token
        self._device = device
        self._order = sorted(
            range(len(prompts)), key=lambda i: (-len(prompts[i].tokens), prompts[i].text)
        )
        self._tried = list(dict.fromkeys([*self._order[:_TRIED], *self._order[-_TRIED:]]))
        self._prefix = self._worthwhile() if share_prefix else 0
        self._works: bool | None = None if self._prefix else False
        self._batches: dict[tuple[int, int, int], Batch] = {}

    def run(self, model: Any, tokenizer: Any) -> list[str]:
        """One text for each prompt. Raises NonFiniteModel or OutOfMemory."""
        texts = [""] * len(self._prompts)
        decoder = _Decoder(model, tokenizer, self._stopping, _end_tokens(model))
        for chosen, decoded in self._decode(decoder, model):
            for prompt, tokens in zip(chosen, decoded, strict=True):
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                texts[prompt] = _cut(text, self._stopping.strings)
        return texts

    def _decode(self, decoder: _Decoder, model: Any) -> Iterator[tuple[Sequence[int], _Rows]]:
        """The prompts of every batch and their new tokens."""
        if self._works is None:
            self._works = self._try(decoder, model)
        prefix = self._read_prefix(model) if self._works else None

        def decode(start: int, batch_size: int) -> tuple[int, tuple[Sequence[int], _Rows]]:
            stop = min(start + batch_size, len(self._order))
            if prefix is not None:
                decoded = decoder.decode(self._prepared(start, stop, self._prefix), prefix)
            if prefix is None or decoder.nearly_tied:
                decoded = decoder.decode(self._prepared(start, stop, 0))
            return stop, (self._order[start:stop], decoded)

        return self._room.batches(len(self._order), decode)

    def _prepared(self, start: int, stop: int, skipped: int) -> Batch:
        """The batch of some prompts without the tokens skipped, laid out when first needed."""
        key = (start, stop, skipped)
        if key not in self._batches:
            self._batches[key] = self._batch(self._order[start:stop], skipped)
        return self._batches[key]

    def _worthwhile(self) -> int:
        """How many tokens all prompts share, if running them once saves enough."""
        count, shared = len(self._prompts), common_prefix(self._prompts)
        tokens = sum(map(len, self._prompts)) + count * self._stopping.max_tokens
        return shared if shared * (count - 1) >= _SAVED * tokens else 0

    def _read_prefix(self, model: Any) -> Segment:
        tokens = self._prompts[0][: self._prefix]
        return read_once(model, torch.tensor([tokens], device=self._device))

    def _try(self, decoder: _Decoder, model: Any) -> bool:
        """Whether a few prompts, the longest and the shortest, begin as they should."""
        if max(map(len, self._prompts)) + self._stopping.max_tokens > shareable_tokens(model):
            return False

        def agrees(start: int, batch_size: int) -> tuple[int, bool]:
            chosen = self._tried[start : start + batch_size]
            return start + len(chosen), self._agrees(chosen, decoder, model)

        return all(self._room.batches(len(self._tried), agrees))

    def _agrees(self, chosen: Sequence[int], decoder: _Decoder, model: Any) -> bool:
        expected = decoder.first_logits(self._batch(chosen, 0))
        try:
            shared = self._batch(chosen, self._prefix)
            found = decoder.first_logits(shared, self._read_prefix(model))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            return False  # a model that does not take another's keys and values
        allowed = 1e-3 if is_exact(model) else 0.05
        return bool(torch.allclose(found, expected, rtol=allowed, atol=allowed))

    def _batch(self, chosen: Sequence[int], skipped: int) -> Batch:
        rows = [self._prompts[i][skipped:] for i in chosen]
        length = max(map(len, rows))
        inputs = torch.full((len(rows), length), self._pad_token, dtype=torch.long)
        mask = torch.zeros(len(rows), skipped + length, dtype=torch.long)
        mask[:, :skipped] = 1
        for row, tokens in enumerate(rows):
            inputs[row, length - len(tokens) :] = torch.tensor(tokens)
            mask[row, skipped + length - len(tokens) :] = 1
        return Batch(tuple(chosen), inputs.to(self._device), mask.to(self._device))


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


class _Decoder:
    """Decodes one batch; once half of its rows have ended the others go on without them."""

    def __init__(
        self, model: Any, tokenizer: Any, stopping: Stopping, ends: frozenset[int]
    ) -> None:
        self.nearly_tied = False  # whether rounding may have decided what was decoded last
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

    def decode(self, batch: Batch, prefix: Segment | None = None) -> _Rows:
        """The new tokens of every row, up to and with the one that ended it."""
        rows: list[list[int]] = [[] for _ in batch.prompts]
        going = list(range(len(rows)))  # rows that have not ended
        places = going  # where they are in the model's batch
        inputs, mask, positions, cache = self._start(batch, prefix)
        self.nearly_tied = False
        for step in range(self._max_tokens):
            logits = self._logits(inputs, mask, positions, cache)
            if prefix is not None and is_exact(self._model):
                self.nearly_tied |= _nearly_tied(logits[places])
            inputs = logits.argmax(dim=-1, keepdim=True)  # [active, 1]
            places, going = self._append(rows, places, going, inputs[:, 0].tolist())
            if self.nearly_tied or not going or step + 1 == self._max_tokens:
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
            positions = positions[:, -1:] + 1
            if 2 * len(going) <= len(mask):
                chosen = torch.tensor(places)  # layers may lie on several devices
                cache.batch_select_indices(chosen)
                inputs, mask, positions = inputs[chosen], mask[chosen], positions[chosen]
                places = list(range(len(going)))
        return rows

    def first_logits(self, batch: Batch, prefix: Segment | None = None) -> Tensor:
        """Logits [b, vocabulary] of every row's first new token."""
        return self._logits(*self._start(batch, prefix))

    def _start(self, batch: Batch, prefix: Segment | None) -> tuple[Tensor, Tensor, Tensor, Any]:
        rows, length = batch.inputs.shape
        cache = growing_cache(prefix, rows) if prefix else empty_cache(self._model)
        positions = (batch.mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return batch.inputs, batch.mask, positions, cache

    def _logits(self, inputs: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        logits: Tensor = self._model(
            inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self._keep_last,
        ).logits[:, -1]
        check_finite(logits)
        return logits.float()

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


def _nearly_tied(logits: Tensor) -> bool:
    """Whether in any row [b, vocabulary] the second choice comes near to the first."""
    first, second = logits.topk(2, dim=-1).values.unbind(dim=-1)
    return bool((second >= first - _NEAR).any())
