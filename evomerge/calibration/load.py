"""Load calibration data: drawn by content, tokenised as lm-eval does, apart from held-out items.

Knows nothing of what a fit does with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evomerge.calibration.entries import CalibrationSpec, Entry
from evomerge.calibration.passages import Passage, read_passages, scored_passages
from evomerge.errors import UserError
from evomerge.merging.fitted.calibration import Calibration, Example


def load_calibration(
    spec: CalibrationSpec, sources: Sequence[str], tokenizer: Any, *, seed: int = 0
) -> Calibration:
    """Examples for every source.

    Which of an entry's passages are drawn depends on their content and the seed, not on their
    order. A passage whose record or whose words are those of a held-out item is left out: held out
    are the selection and report items of every task that the spec names. Raises UserError.
    """
    held_out = _HeldOut(spec)
    loaded: dict[Entry, tuple[tuple[Example, ...], str]] = {}
    for source in sources:
        entry = spec.of(source)
        if entry is None:
            raise UserError(f"calibration: no data for source {source!r}")
        if entry not in loaded:
            loaded[entry] = _load(entry, spec, held_out, tokenizer, seed)
    found = {source: loaded[entry] for source in sources if (entry := spec.of(source))}
    return Calibration(
        {source: examples for source, (examples, _) in found.items()},
        {source: words for source, (_, words) in found.items()},
    )


class _HeldOut:
    """The items that no calibration data may hold."""

    def __init__(self, spec: CalibrationSpec) -> None:
        entries = [e for e in (spec.shared, *spec.own.values()) if e is not None]
        paths: Mapping[str, str | None] = {e.place: e.include_path for e in entries if e.task}
        places = (spec.include_path, *(e.include_path for e in entries))
        shared_path = next(filter(None, places), None)
        passages = [
            passage
            for task in dict.fromkeys((*paths, *spec.held_out))
            for passage in scored_passages(task, paths.get(task, shared_path), spec.split)
        ]
        self._items = {passage.item for passage in passages}
        self._texts = {passage.text_hash for passage in passages}
        self._words = [" ".join((p.prompt + p.answer).split()) for p in passages]

    def has(self, passage: Passage) -> bool:
        """Whether the passage is a held-out item: the same record, or the same words."""
        return passage.item in self._items or passage.text_hash in self._texts

    def inside(self, text: str) -> int:
        """How many held-out items stand word for word in a longer text."""
        words = f" {' '.join(text.split())} "
        return sum(f" {item} " in words for item in self._words if item)


def _load(
    entry: Entry, spec: CalibrationSpec, held_out: _HeldOut, tokenizer: Any, seed: int
) -> tuple[tuple[Example, ...], str]:
    passages = read_passages(entry, spec.split)
    if entry.kind == "text":
        return _pieces(entry, passages[0], held_out, tokenizer, seed)
    free = [passage for passage in passages if not held_out.has(passage)]
    distinct = {passage.text_hash: passage for passage in free}
    drawn = _draw(distinct, entry.count, seed)
    examples = (_encode(distinct[key], tokenizer, entry.tokens) for key in drawn)
    kept = tuple(example for example in examples if example.predicted)
    left_out = len(passages) - len(free)
    words = f"{len(kept)} of {len(distinct)} from {entry.kind} {entry.place}"
    return kept, f"{words}; {left_out} held out" if left_out else words


def _pieces(
    entry: Entry, whole: Passage, held_out: _HeldOut, tokenizer: Any, seed: int
) -> tuple[tuple[Example, ...], str]:
    if count := held_out.inside(whole.answer):
        raise UserError(
            f"{entry.place}: holds {count} of the items that the result is scored on; take them"
            " out, or take another text"
        )
    ids = tokenizer.encode(whole.answer, verbose=False)
    cuts = (ids[i : i + entry.tokens] for i in range(0, len(ids), entry.tokens))
    pieces = {_key(map(str, cut)): tuple(cut) for cut in cuts if len(cut) > 1}
    drawn = _draw(pieces, entry.count, seed)
    examples = tuple(Example(pieces[key], 0, key) for key in drawn)
    return examples, f"{len(examples)} of {len(pieces)} pieces of text {entry.place}"


def _draw(keys: Iterable[str], count: int, seed: int) -> list[str]:
    """`count` of the keys, the same ones in whatever order they come."""
    return sorted(keys, key=lambda key: _key((str(seed), key)))[:count]


def _key(parts: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _encode(passage: Passage, tokenizer: Any, most: int) -> Example:
    """Tokens as lm-eval scores them: white space before the answer is the answer's."""
    prompt = passage.prompt.rstrip()
    whole = _tokens(passage.prompt + passage.answer, tokenizer)
    before = _length(prompt, tokenizer) if prompt else 0
    if passage.ends and tokenizer.eos_token_id not in (None, *whole[-1:]):
        whole = [*whole, tokenizer.eos_token_id]
    cut = max(0, min(len(whole) - most, before - 1))  # of the prompt's beginning
    return Example(tuple(whole[cut:][:most]), max(0, before - cut), passage.item)


def _length(prompt: str, tokenizer: Any) -> int:
    """Tokens of a prompt, but for the end that tokenizers of encoder-decoders put behind it."""
    ids, end = _tokens(prompt, tokenizer), tokenizer.eos_token
    closed = ids[-1:] == [tokenizer.eos_token_id] and not prompt.endswith(end or "\n")
    return len(ids) - closed


def _tokens(text: str, tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token
    special = not (bos and text.startswith(bos))
    ids: list[int] = tokenizer.encode(text, add_special_tokens=special, verbose=False)
    return ids
