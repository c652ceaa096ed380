"""Tell whether checkpoints can be merged: one architecture, one vocabulary, the same tensors.

Reads headers, configs and tokenizers only, never a tensor's contents. NaN is found by
`Checkpoint.scan`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping

from evomerge.checkpoints.weights import Weights
from evomerge.errors import CheckpointError

# Keys that change what the same tensors compute, in the words of several families.
_ARCHITECTURE = (
    "model_type",
    "architectures",
    "hidden_act",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "n_head",
)
_DEPTH = ("num_hidden_layers", "n_layer", "num_layers")
_NAMED = 3  # of one kind of problem, name so many and count the rest


def compare(
    base: Weights,
    sources: Mapping[str, Weights],
    *,
    partial: bool = False,
    aligned: bool = False,
    advice: str = "choose a vocabulary: `tokenizer: union`",
) -> list[str]:
    """Every reason why `sources` cannot be merged onto `base`, a line each; empty if none.

    A tensor that only a source has is ignored in merging: it is logged, not reported. `partial`
    sources need not have all of the base's tensors; `aligned` ones are seen in one vocabulary. The
    `advice` is for sources of another vocabulary.
    """
    problems: list[str] = []
    for name, source in sources.items():
        other = list(_architecture(base, name, source))
        problems += other
        # Of another architecture, every tensor would differ: one line says it all.
        if not other:
            if not partial:
                problems += _missing(base, name, source)
            problems += [*_tensors(base, name, source), *_tying(base, name, source)]
        if not aligned:
            problems += (f"{fault}; {advice}" for fault in _vocabulary(base, name, source))
    return problems


def other_depths(base: Weights, sources: Mapping[str, Weights]) -> list[str]:
    """A line for each source that has more or fewer layers than the base, for those who look at
    whole models and not, as a merge does, at the tensors that all have."""
    depths = [(name, key) for name in sources for key in _DEPTH if key in base.config]
    return [
        f"source {name!r}: {key} is {sources[name].config.get(key)!r}, {base.path} has"
        f" {base.config[key]!r}; it needs models of one depth"
        for name, key in depths
        if sources[name].config.get(key) != base.config[key]
    ]


def _architecture(base: Weights, name: str, source: Weights) -> Iterator[str]:
    for key in _ARCHITECTURE:
        ours, theirs = base.config.get(key), source.config.get(key)
        if key in base.config and key in source.config and ours != theirs:
            yield (
                f"source {name!r}: {key} is {theirs!r}, base {base.path} has {ours!r};"
                " all sources must share the base's architecture"
            )


def _missing(base: Weights, name: str, source: Weights) -> Iterator[str]:
    missing = [n for n in base.names if n not in source and n not in base.non_float_names]
    if missing:
        yield (
            f"source {name!r}: lacks {_some(missing)}, which base {base.path} has;"
            " take the whole checkpoint"
        )


def _tensors(base: Weights, name: str, source: Weights) -> Iterator[str]:
    both = [n for n in base.names if n in source]
    differ = [n for n in both if base.shape(n) != source.shape(n)]
    yield from (
        f"{n}: base is {list(base.shape(n))}, source {name!r} is {list(source.shape(n))};"
        " all sources must share the base's architecture and vocabulary size"
        for n in differ[:_NAMED]
    )
    if len(differ) > _NAMED:
        yield f"source {name!r}: {len(differ) - _NAMED} more tensors have another shape"
    yield from (
        f"{n}: base is {base.dtype(n)}, source {name!r} is {source.dtype(n)}; one holds numbers"
        " to merge, the other does not"
        for n in both
        if base.dtype(n).is_floating_point != source.dtype(n).is_floating_point
    )
    if extra := [n for n in source.names if n not in base]:
        logging.getLogger(__name__).warning(
            "source %r: %s not in base %s: ignored", name, _some(extra), base.path
        )


def _tying(base: Weights, name: str, source: Weights) -> Iterator[str]:
    for alias, canonical in base.tied_names.items():
        if {alias, canonical} <= set(source.names):
            yield (
                f"source {name!r}: stores {alias} apart from {canonical}, which base {base.path}"
                " ties; untie the base (tie_word_embeddings: false, both tensors saved)"
            )


def _vocabulary(base: Weights, name: str, source: Weights) -> Iterator[str]:
    """Conflicts only: a token that one side lacks, at an id the other does not use, is harmless."""
    ours, theirs = token_ids(base), token_ids(source)
    moved = [token for token, at in ours.items() if theirs.get(token, at) != at]
    taken = {at: token for token, at in ours.items()}
    replaced = [t for t, at in theirs.items() if t not in ours and taken.get(at, t) != t]
    if moved:
        token = min(moved, key=lambda t: ours[t])
        yield (
            f"source {name!r}: token {token!r} has id {theirs[token]}, in base {base.path} it is"
            f" {ours[token]} ({len(moved)} tokens differ)"
        )
    elif replaced:
        token = min(replaced, key=lambda t: theirs[t])
        yield (
            f"source {name!r}: id {theirs[token]} is token {token!r}, in base {base.path} it is"
            f" {taken[theirs[token]]!r} ({len(replaced)} ids differ)"
        )


def token_ids(checkpoint: Weights) -> dict[str, int]:
    """The id of every token by `tokenizer.json`; empty if the checkpoint has none."""
    path = checkpoint.companion("tokenizer.json")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, log-probability], the id is the place
            vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
        added = {entry["content"]: entry["id"] for entry in document.get("added_tokens") or ()}
        return {**vocabulary, **added}
    except (FileNotFoundError, NotADirectoryError):  # a raw state dict's folder is its file
        return {}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path}: not a tokenizer file ({error!r})") from error


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
