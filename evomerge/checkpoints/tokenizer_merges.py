"""The merges of byte-pair encoding: which ones a token needs, and new ones that build new tokens.

Merge rules only; which tokens a vocabulary holds is decided in `vocabulary`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from evomerge.checkpoints.tokenizer_files import TokenizerFile

Pair = tuple[str, str]


@dataclass(frozen=True)
class NewMerges:
    """Merges to append, in order, and the tokens that none of them builds."""

    merges: list[Pair]
    unreached: list[str]


def merges_of(file: TokenizerFile) -> list[Pair]:
    """The merges of a tokenizer, first come first; empty for all but BPE."""
    merges = file.document["model"].get("merges") or ()
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


def parts(file: TokenizerFile, tokens: Iterable[str]) -> set[str]:
    """The tokens that BPE goes through while it builds `tokens`; empty for other models.

    With these kept, and every merge among them, each of `tokens` is built as before.
    """
    if file.kind != "BPE":
        return set()
    ranks = {pair: rank for rank, pair in enumerate(merges_of(file))}
    passed: set[str] = set()
    for token in tokens:
        for symbols in _steps(list(token), ranks):
            passed.update(symbols)
    return passed


def new_merges(
    donor: TokenizerFile, others: Iterable[TokenizerFile], new: Collection[str]
) -> NewMerges:
    """Merges which, appended to the donor's, build the tokens `new` of `others`.

    Coming last they act on what the donor's merges leave, so that the donor's tokens of any text
    are only ever joined, never cut in another way. A token is built by joining two tokens in one
    merge; one that the donor cuts in more, of which no two join to a new token, is not reached.
    """
    waiting = [t for other in others for t in _built_order(other) if t in new]
    waiting = list(dict.fromkeys([*waiting, *sorted(new)]))
    cut = _segments(donor, new)
    ranks: dict[Pair, int] = {}
    while True:
        left = []
        for token in waiting:
            symbols = _last(_steps(cut[token], ranks))
            if "".join(symbols) == token and len(symbols) == 2:
                ranks[symbols[0], symbols[1]] = len(ranks)
            elif symbols != [token]:
                left.append(token)
        if len(left) == len(waiting) or not left:
            return NewMerges(list(ranks), left)
        waiting = left


def _built_order(file: TokenizerFile) -> Iterator[str]:
    return (left + right for left, right in merges_of(file))


def _segments(donor: TokenizerFile, new: Collection[str]) -> dict[str, list[str]]:
    """The donor's tokens of each new one, single characters counting as known."""
    model = dict(donor.document["model"], ignore_merges=False, dropout=None)
    letters = [token for token in new if len(token) == 1]
    end = max(donor.pieces.values(), default=-1) + 1
    model["vocab"] = donor.pieces | {token: end + n for n, token in enumerate(sorted(letters))}
    bare: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": model}
    tokenizer = Tokenizer.from_str(json.dumps(bare)).model
    return {token: [part.value for part in tokenizer.tokenize(token)] for token in new}


def _steps(symbols: list[str], ranks: Mapping[Pair, int]) -> Iterator[list[str]]:
    """What BPE makes of `symbols`, merge after merge: the lowest rank first, leftmost of those."""
    yield symbols
    while len(symbols) > 1:
        places = [
            (ranks[pair], at)
            for at, pair in enumerate(itertools.pairwise(symbols))
            if pair in ranks
        ]
        if not places:
            return
        _, at = min(places)
        symbols = [*symbols[:at], symbols[at] + symbols[at + 1], *symbols[at + 2 :]]
        yield symbols


def _last(steps: Iterable[list[str]]) -> list[str]:
    *_, last = steps
    return last
