"""The donor's tokenizer changed to the output vocabulary, as the contents of a `tokenizer.json`.

Changes tokens, ids and merges; how text is normalised and cut into words stays the donor's. Reads
and writes no file.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from evomerge.checkpoints.tokenizer_files import TokenizerFile
from evomerge.checkpoints.tokenizer_merges import merges_of, new_merges
from evomerge.checkpoints.vocabulary import Vocabulary
from evomerge.errors import CheckpointError

_log = logging.getLogger(__name__)


def edited_tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
    """The donor's `tokenizer.json` with the output's tokens and ids.

    All tokens are in the model's own vocabulary, added ones too: the library numbers an added
    token that is not there itself. Raises CheckpointError where Unigram's ids would have gaps.
    """
    files = {name: model.file for name, model in vocabulary.models.items()}
    donor = files[vocabulary.donor]
    document: dict[str, Any] = copy.deepcopy(dict(donor.document))
    document["added_tokens"] = _added(vocabulary, files)
    _edit_model(document["model"], vocabulary, files)
    _renumber(document.get("post_processor"), vocabulary.ids)
    padding = document.get("padding")
    if padding:
        padding["pad_id"] = vocabulary.ids.get(padding["pad_token"], padding["pad_id"])
    return document


def _edit_model(
    model: dict[str, Any], vocabulary: Vocabulary, files: Mapping[str, TokenizerFile]
) -> None:
    donor, ids = files[vocabulary.donor], vocabulary.ids
    if donor.kind == "Unigram":
        model["vocab"] = _scored(vocabulary, files)
        if model.get("unk_id") is not None:
            model["unk_id"] = ids[donor.document["model"]["vocab"][model["unk_id"]][0]]
        return
    model["vocab"] = dict(sorted(ids.items(), key=lambda entry: entry[1]))
    if donor.kind == "BPE":
        kept = [
            (left, right)
            for left, right in merges_of(donor)
            if {left, right, left + right} <= ids.keys()
        ]
        model["merges"] = [[*pair] for pair in kept + _appended(vocabulary, files)]


def _appended(vocabulary: Vocabulary, files: Mapping[str, TokenizerFile]) -> list[tuple[str, str]]:
    donor = files[vocabulary.donor]
    added = {entry["content"] for file in files.values() for entry in file.added}
    new = vocabulary.ids.keys() - donor.ids.keys() - added
    others = [file for name, file in files.items() if name != vocabulary.donor]
    found = new_merges(donor, others, new)
    if found.unreached:
        _log.warning(
            "union: %d of %d new tokens are never made from text with the tokenizer of %s, for"
            " instance %r",
            len(found.unreached),
            len(new),
            donor.path,
            found.unreached[0],
        )
    return found.merges


def _scored(vocabulary: Vocabulary, files: Mapping[str, TokenizerFile]) -> list[tuple[str, float]]:
    """Pieces with their log-probabilities: the donor's, else the first owner's."""
    donor = files[vocabulary.donor]
    if sorted(vocabulary.ids.values()) != list(range(len(vocabulary.ids))):
        raise CheckpointError(
            f"{donor.path}: some ids below its largest have no token, which Unigram cannot have;"
            " choose `tokenizer: {source: base}` or one of the models"
        )
    scores: dict[str, float] = {}
    for file in [donor, *files.values()]:
        for token, score in file.document["model"]["vocab"]:
            scores.setdefault(token, score)
    lowest = min(scores.values(), default=0.0)  # an added token is found before any piece
    in_order = sorted(vocabulary.ids, key=vocabulary.ids.__getitem__)
    return [(token, scores.get(token, lowest)) for token in in_order]


def _added(vocabulary: Vocabulary, files: Mapping[str, TokenizerFile]) -> list[dict[str, Any]]:
    """The donor's added tokens, then the others' that are new or special, by id.

    A source's plain added token that is an ordinary one of the donor stays ordinary: looking for
    it everywhere would cut the donor's text in another way.
    """
    donor, ids = files[vocabulary.donor], vocabulary.ids
    chosen = {entry["content"]: entry for entry in donor.added}
    if vocabulary.keeps_ids:
        for entry in (entry for file in files.values() for entry in file.added):
            if entry["content"] not in donor.ids or entry.get("special"):
                chosen.setdefault(entry["content"], entry)
    kept = [{**entry, "id": ids[token]} for token, entry in chosen.items() if token in ids]
    return sorted(kept, key=lambda entry: int(entry["id"]))


def _renumber(processor: Any, ids: Mapping[str, int]) -> None:
    """Give a post-processor's special tokens their ids of the output vocabulary."""
    for step in _processors(processor):
        for key in ("sep", "cls"):
            if key in step:
                step[key] = [step[key][0], ids.get(step[key][0], step[key][1])]
        for special in (step.get("special_tokens") or {}).values():
            numbered = zip(special["tokens"], special["ids"], strict=True)
            special["ids"] = [ids.get(token, index) for token, index in numbered]


def _processors(processor: Any) -> Iterator[dict[str, Any]]:
    if isinstance(processor, dict):
        yield processor
        for inner in processor.get("processors") or ():
            yield from _processors(inner)
