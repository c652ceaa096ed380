"""Log-likelihoods of continuations, computed over batches that were prepared once.

Knows nothing of tasks and items: token windows in, (log-likelihood, is greedy) pairs out. Batches
are composed, padded and rounded as lm-eval's HFLM does, so that ties fall alike; only logits that
a continuation needs are computed, and equal windows are computed once.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evomerge.errors import NonFiniteModel
from evomerge.scoring.room import Room

Answer = tuple[float, bool]  # log-likelihood, and whether greedy search would say the same
_Found = tuple[tuple[int, ...], list[float], list[bool]]  # windows, and their answers by parts


@dataclass(frozen=True)
class Window:
    """A continuation to score behind a context, both as token ids; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def inputs(self, max_length: int) -> tuple[int, ...]:
        """What the model reads: all but the last token, cut from the left to `max_length`."""
        return (self.context + self.continuation)[-(max_length + 1) :][:-1]


@dataclass(frozen=True)
class Segments:
    """The continuations of one length in a batch.

    `places` [k, c] index the batch's selected positions, `tokens` [k, c] are the continuations'
    tokens, `windows` [k] the numbers of the windows they answer.
    """

    windows: tuple[int, ...]
    places: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Batch:
    """One forward pass: `inputs` [b, s] padded on the right with 0.

    Only the positions `keep` [p] of every row get logits, of which `rows` [u] and `columns` [u]
    select those that some continuation needs.
    """

    inputs: Tensor
    keep: Tensor
    rows: Tensor
    columns: Tensor
    segments: tuple[Segments, ...]


class LoglikelihoodPlan:
    """Windows in batches, ready to be run against whatever weights a model has.

    Sorting (longest first, then by token ids) and sharing of rows are HFLM's
    (`_loglikelihood_tokens` of lm-eval 0.4.13).
    """

    def __init__(
        self, windows: Sequence[Window], *, room: Room, max_length: int, device: torch.device
    ) -> None:
        self._windows = windows
        self._room = room
        self._device = device
        rows = _rows(windows, max_length)
        longest = {key: max((windows[i] for i in shared), key=_reach) for key, shared in rows}
        rows.sort(key=lambda row: _sort_key(longest[row[0]]))
        self._rows = rows
        self._batches: dict[tuple[int, int], Batch] = {}

    def run(self, model: Any) -> list[Answer]:
        """One answer for each window. Raises NonFiniteModel or OutOfMemory."""
        answers = self.run_some(model, range(len(self._windows)))
        return [answers[window] for window in range(len(self._windows))]

    def run_some(self, model: Any, wanted: Collection[int]) -> dict[int, Answer]:
        """Answers for the wanted windows and all that share a batch with one of them."""
        answers: dict[int, Answer] = {}
        slices_logits = accepts_logits_to_keep(model)

        def run(start: int, batch_size: int) -> tuple[int, list[_Found]]:
            stop = min(start + batch_size, len(self._rows))
            if not any(w in wanted for _, shared in self._rows[start:stop] for w in shared):
                return stop, []
            return stop, list(_run(self._batch(start, stop), model, slices_logits))

        for found in self._room.batches(len(self._rows), run):
            for windows, sums, greedy in found:
                answers.update(zip(windows, zip(sums, greedy, strict=True), strict=True))
        return answers

    def _batch(self, start: int, stop: int) -> Batch:
        """The batch of some rows, laid out when it is first needed."""
        if (start, stop) not in self._batches:
            rows = self._rows[start:stop]
            self._batches[start, stop] = _batch(rows, self._windows, self._device)
        return self._batches[start, stop]


def accepts_logits_to_keep(model: Any) -> bool:
    """Whether the model can compute the logits of chosen positions only."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def check_finite(logits: Tensor) -> None:
    """Raise NonFiniteModel where logits hold NaN or infinity."""
    # a sum is one pass; it may overflow without any of them being infinite
    if not (logits.sum(dtype=torch.float32).isfinite() or logits.isfinite().all()):
        raise NonFiniteModel(
            "the merged model computes NaN or infinity on the task's items; "
            "its coefficients are probably far outside those of the sources"
        )


def _reach(window: Window) -> int:
    return len(window.continuation)


def _sort_key(window: Window) -> tuple[int, tuple[int, ...]]:
    tokens = window.context + window.continuation
    return -len(tokens), tokens


def _rows(
    windows: Sequence[Window], max_length: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Distinct model inputs, each with the numbers of the windows it answers."""
    shared: dict[tuple[int, ...], list[int]] = {}
    for number, window in enumerate(windows):
        shared.setdefault(window.inputs(max_length), []).append(number)
    return [(key, tuple(numbers)) for key, numbers in shared.items()]


def _batch(
    rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    windows: Sequence[Window],
    device: torch.device,
) -> Batch:
    length = max(len(tokens) for tokens, _ in rows)
    inputs = torch.zeros(len(rows), length, dtype=torch.long)
    first = min(len(tokens) - _reach(windows[i]) for tokens, shared in rows for i in shared)
    selected: dict[tuple[int, int], int] = {}
    by_length: dict[int, list[tuple[int, list[int]]]] = {}
    for row, (tokens, shared) in enumerate(rows):
        inputs[row, : len(tokens)] = torch.tensor(tokens)
        for number in shared:
            reach = _reach(windows[number])
            columns = range(len(tokens) - reach - first, len(tokens) - first)
            places = [selected.setdefault((row, column), len(selected)) for column in columns]
            by_length.setdefault(reach, []).append((number, places))
    kept = max(column for _, column in selected) + 1
    return Batch(
        inputs=inputs.to(device),
        keep=torch.arange(first, first + kept, device=device),
        rows=torch.tensor([row for row, _ in selected], device=device),
        columns=torch.tensor([column for _, column in selected], device=device),
        segments=tuple(_segments(group, windows, device) for group in by_length.values()),
    )


def _segments(
    group: Sequence[tuple[int, list[int]]], windows: Sequence[Window], device: torch.device
) -> Segments:
    return Segments(
        windows=tuple(number for number, _ in group),
        places=torch.tensor([places for _, places in group], device=device),
        tokens=torch.tensor([windows[number].continuation for number, _ in group], device=device),
    )


def _run(batch: Batch, model: Any, slices_logits: bool) -> Iterator[_Found]:
    if slices_logits:
        logits = model(batch.inputs, use_cache=False, logits_to_keep=batch.keep).logits
    else:
        logits = model(batch.inputs).logits[:, batch.keep]
    logits = logits[batch.rows, batch.columns]  # [u, vocabulary]
    check_finite(logits)
    # in the model's own dtype, as HFLM: in bfloat16 the rounding decides between near choices
    log_probabilities = F.log_softmax(logits, dim=-1)
    greedy = log_probabilities.argmax(dim=-1)  # [u]
    for segments in batch.segments:
        values = log_probabilities[segments.places, segments.tokens]  # [k, c]
        matches = (greedy[segments.places] == segments.tokens).all(dim=-1)
        yield segments.windows, values.sum(dim=-1).float().tolist(), matches.tolist()
