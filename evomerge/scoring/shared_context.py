"""Log-likelihoods with every distinct context run once and all its endings attending to it.

The tokens that all contexts begin with (instructions, few-shot examples) are run once for all.
Knows nothing of tasks and items, and does not know whether the model at hand can share:
`likelihoods` sees to that. Sums are rounded as `loglikelihood` rounds them, but the model's passes
have other shapes, so values differ from it in the last digits; near ties are reported.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evomerge.scoring.key_values import Segment, empty_cache, read_once, shared_cache
from evomerge.scoring.loglikelihood import Answer, Window, accepts_logits_to_keep, check_finite
from evomerge.scoring.room import Room

# Rows of a pass for each one of the batch size: they are short, and what they share is expanded
# for one layer at a time.
_ROWS = 2
_EVEN = 0.85  # of the longest row's tokens
# Log-probabilities nearer than this are a tie that rounding may have decided.
NEAR = 1e-3

Tokens = tuple[int, ...]
_Found = tuple[int, float, bool, bool]  # window, log-likelihood, is greedy, nearly a tie


@dataclass(frozen=True)
class Pass:
    """One forward pass: `inputs` and `positions` [b, s], padded on the right.

    `mask` [b, past + s] covers what is in the cache as well; None where nothing is and causality
    hides the padding. Row i attends to row `parents`[i] of the pass before. Logits of the columns
    `keep` [p] are computed; of these b * p positions `picks` [t] give the log-probabilities of
    `tokens` [t].
    """

    inputs: Tensor
    positions: Tensor
    mask: Tensor | None
    parents: Tensor | None
    keep: Tensor
    picks: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Batch:
    """Contexts of one pass, the passes of their endings, and which tokens make which window.

    `places` [k, c] are those of `windows` [k] among all t tokens of the passes; t pads them.
    """

    contexts: Pass
    endings: tuple[Pass, ...]
    windows: tuple[int, ...]
    places: Tensor


@dataclass(frozen=True)
class _Ending:
    """What is fed behind a context: a continuation without its last token, and its windows."""

    context: int
    tokens: Tokens
    windows: tuple[int, ...]


class SharedContextPlan:
    """Windows in batches of contexts and of endings, ready to be run against any weights.

    A pass reads at most as many tokens as `batch_size` rows of the longest window.
    """

    def __init__(
        self,
        windows: Sequence[Window],
        *,
        room: Room,
        max_length: int,
        device: torch.device,
        shared: int | None = None,
    ) -> None:
        self._windows = windows
        self._device = device
        self._room = room
        self._parts = [split(window, max_length) for window in windows]
        self._longest = max(len(context) + len(fed) for context, fed in self._parts)
        contexts: dict[Tokens, list[int]] = {}
        for number, (context, _) in enumerate(self._parts):
            contexts.setdefault(context, []).append(number)
        self._contexts = contexts
        self.shared = common_prefix(list(contexts)) if shared is None else shared
        self._prefix = torch.tensor([next(iter(contexts))[: self.shared]], device=device)
        self._order = sorted(contexts, key=lambda context: (-len(context), context))
        self._batches: dict[tuple[int, int], tuple[int, Batch]] = {}

    @property
    def reach(self) -> int:
        """The most keys, padding included, that a row of any pass attends to."""
        start, reach = 0, 0
        while start < len(self._order):
            start, batch = self._prepared(start, self._room.batch_size)
            reach = max(reach, *map(self._reach, (batch.contexts, *batch.endings)))
        return reach

    def run(self, model: Any) -> tuple[list[Answer], set[int]]:
        """One answer for each window, and the windows whose being greedy is nearly a tie.

        Raises NonFiniteModel or OutOfMemory.
        """
        answers: list[Answer] = [(0.0, False)] * len(self._windows)
        doubtful: set[int] = set()
        runner = _Runner(model)
        before = [read_once(model, self._prefix)] if self.shared else []

        def run(start: int, batch_size: int) -> tuple[int, list[_Found]]:
            stop, batch = self._prepared(start, batch_size)
            return stop, list(runner.batch(batch, before))

        for found in self._room.batches(len(self._order), run):
            for window, value, greedy, doubt in found:
                answers[window] = (value, greedy)
                if doubt:
                    doubtful.add(window)
        return answers, doubtful

    def _reach(self, one: Pass) -> int:
        return int((one.inputs if one.mask is None else one.mask).shape[1])

    def _prepared(self, start: int, batch_size: int) -> tuple[int, Batch]:
        """Where the batch that begins there ends, and the batch, laid out when first needed."""
        if (start, batch_size) not in self._batches:
            stop = self._stop([len(c) - self.shared for c in self._order], start, batch_size)
            batch = self._batch(self._order[start:stop], batch_size)
            self._batches[start, batch_size] = stop, batch
        return self._batches[start, batch_size]

    def _stop(self, lengths: Sequence[int], start: int, batch_size: int) -> int:
        """Where a slice of what comes longest first ends, within the rows and tokens of a pass.

        One of at least `batch_size` rows ends where padding would become noticeable.
        """
        longest = lengths[start]
        most = max(1, min(_ROWS * batch_size, batch_size * self._longest // longest))
        stop = start + 1
        while stop < min(start + most, len(lengths)) and (
            stop - start < batch_size or lengths[stop] >= _EVEN * longest
        ):
            stop += 1
        return stop

    def _batch(self, contexts: Sequence[Tokens], batch_size: int) -> Batch:
        windows, parts = self._contexts, self._parts
        places: dict[int, list[int]] = {}
        wanted: list[tuple[int, int, int]] = []
        for row, context in enumerate(contexts):
            for window in windows[context]:
                places[window] = [len(wanted)]
                first = self._windows[window].continuation[0]
                wanted.append((row, len(context) - self.shared - 1, first))
        count = len(wanted)
        rests = [context[self.shared :] for context in contexts]
        starts = [self.shared] * len(rests)
        seen = torch.ones(len(rests), self.shared, dtype=torch.long) if self.shared else None
        first_pass = self._pass(rests, starts, wanted, seen)
        fed = [(row, parts[w][1], w) for row, c in enumerate(contexts) for w in windows[c]]
        endings = []
        for chosen in self._ending_chunks(fed, batch_size):
            endings.append(self._ending_pass(chosen, contexts, places, count))
            count += len(endings[-1].tokens)
        length = max(map(len, places.values()))
        padded = [own + [count] * (length - len(own)) for own in places.values()]
        return Batch(
            first_pass, tuple(endings), tuple(places), torch.tensor(padded, device=self._device)
        )

    def _ending_chunks(
        self, fed: Sequence[tuple[int, Tokens, int]], batch_size: int
    ) -> Iterator[Sequence[_Ending]]:
        distinct: dict[tuple[int, Tokens], list[int]] = {}
        for row, tokens, window in fed:
            if tokens:
                distinct.setdefault((row, tokens), []).append(window)
        endings = [_Ending(row, tokens, tuple(own)) for (row, tokens), own in distinct.items()]
        endings.sort(key=lambda ending: -len(ending.tokens))
        lengths, start = [len(ending.tokens) for ending in endings], 0
        while start < len(endings):
            stop = self._stop(lengths, start, batch_size)
            yield endings[start:stop]
            start = stop

    def _ending_pass(
        self,
        endings: Sequence[_Ending],
        contexts: Sequence[Tokens],
        places: dict[int, list[int]],
        count: int,
    ) -> Pass:
        wanted: list[tuple[int, int, int]] = []
        for row, ending in enumerate(endings):
            for window in ending.windows:
                targets = self._windows[window].continuation[1:]
                places[window] += range(count + len(wanted), count + len(wanted) + len(targets))
                wanted += [(row, column, token) for column, token in enumerate(targets)]
        starts = [len(contexts[ending.context]) for ending in endings]
        seen = torch.arange(max(map(len, contexts))) < torch.tensor(starts)[:, None]
        parents = torch.tensor([ending.context for ending in endings])
        return self._pass([e.tokens for e in endings], starts, wanted, seen.long(), parents)

    def _pass(
        self,
        rows: Sequence[Tokens],
        starts: Sequence[int],
        wanted: Sequence[tuple[int, int, int]],
        seen: Tensor | None,
        parents: Tensor | None = None,
    ) -> Pass:
        """Lay out rows that follow `starts` tokens each; `wanted` is (row, column, next token)."""
        length = max(map(len, rows))
        inputs = torch.zeros(len(rows), length, dtype=torch.long)
        for row, tokens in enumerate(rows):
            inputs[row, : len(tokens)] = torch.tensor(tokens)
        # padding takes the row's last position: one further on may be beyond the model's length
        own = torch.minimum(torch.arange(length), torch.tensor([[len(r) - 1] for r in rows]))
        keep = sorted({column for _, column, _ in wanted})
        kept = {column: place for place, column in enumerate(keep)}
        mask = None if seen is None else torch.cat([seen, torch.ones_like(inputs)], dim=1)

        def move(values: Any) -> Tensor:
            return torch.as_tensor(values, device=self._device)

        return Pass(
            inputs=move(inputs),
            positions=move(own + torch.tensor(starts)[:, None]),
            mask=None if mask is None else move(mask),
            parents=None if parents is None else move(parents),
            keep=move(keep),
            picks=move([row * len(keep) + kept[column] for row, column, _ in wanted]),
            tokens=move([token for _, _, token in wanted]),
        )


def split(window: Window, max_length: int) -> tuple[Tokens, Tokens]:
    """A window's context and what is fed behind it, cut from the left as lm-eval cuts them."""
    inputs = window.inputs(max_length)
    context = len(inputs) - len(window.continuation) + 1
    return inputs[:context], inputs[context:]


def common_prefix(contexts: Sequence[Tokens]) -> int:
    """How many tokens all contexts begin with, at least one short of the shortest."""
    shortest = min(map(len, contexts)) - 1
    pairs = zip(min(contexts)[:shortest], max(contexts)[:shortest], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


class _Runner:
    """Runs passes on one model, each with the cache it shares."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._slices_logits = accepts_logits_to_keep(model)

    def batch(self, batch: Batch, before: list[Segment]) -> Iterator[_Found]:
        """(window, log-likelihood, is greedy, nearly a tie) for each window of a batch."""
        cache = shared_cache(before) if before else empty_cache(self._model)
        found = [self._tokens(batch.contexts, cache)]
        length = batch.contexts.inputs.shape[1]
        for ending in batch.endings:
            segments = [*before, Segment(cache, length, ending.parents)]
            found.append(self._tokens(ending, shared_cache(segments)))
        values, matches, near = (torch.cat(kind) for kind in zip(*found, strict=True))
        totals = F.pad(values, (0, 1))[batch.places].sum(dim=-1)
        greedy = F.pad(matches, (0, 1), value=True)[batch.places].all(dim=-1)
        likely = F.pad(matches | near, (0, 1), value=True)[batch.places].all(dim=-1)
        doubt = likely & F.pad(near, (0, 1))[batch.places].any(dim=-1)
        columns = (totals.float(), greedy, doubt)
        yield from zip(batch.windows, *(column.tolist() for column in columns), strict=True)

    def _tokens(self, one: Pass, cache: Any) -> tuple[Tensor, Tensor, Tensor]:
        """For each wanted token its log-probability, whether it is the most probable, and whether
        that is nearly a tie; all [t]."""
        logits = self._logits(one, cache)
        log_probabilities = F.log_softmax(logits.flatten(0, 1), dim=-1)  # [b * p, vocabulary]
        values = log_probabilities[one.picks, one.tokens]  # [t]
        check_finite(values)  # NaN where a logit of the position is NaN or infinite
        near = values >= log_probabilities.amax(dim=-1)[one.picks] - NEAR
        matches = torch.zeros_like(near)
        (places,) = near.nonzero(as_tuple=True)  # few: what is said is seldom what is probable
        if len(places):
            rows = log_probabilities[one.picks[places]]
            matches[places] = rows.argmax(dim=-1) == one.tokens[places]
            second = rows.topk(2, dim=-1).values[:, 1]
            near[places] = ~matches[places] | (second >= values[places] - NEAR)
        return values, matches, near

    def _logits(self, one: Pass, cache: Any) -> Tensor:
        sliced = {"logits_to_keep": one.keep} if self._slices_logits else {}
        logits: Tensor = self._model(
            one.inputs,
            position_ids=one.positions,
            attention_mask=one.mask,
            past_key_values=cache,
            use_cache=True,
            **sliced,
        ).logits
        return logits if sliced else logits[:, one.keep]
