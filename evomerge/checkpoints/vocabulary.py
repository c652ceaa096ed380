"""The vocabulary of a merged model: which token has which row, and which row of each source it is.

Tokens are matched by their strings. Reads tokenizers and headers, never a tensor's contents: rows
are fetched in `aligned_rows`, files written in `tokenizer_writer`.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from evomerge.checkpoints.tokenizer_files import (
    GENERATION,
    TokenizerFile,
    read_json,
    read_tokenizer_file,
)
from evomerge.checkpoints.tokenizer_merges import parts
from evomerge.checkpoints.vocabulary_tensors import embedding_rows
from evomerge.checkpoints.weights import Model
from evomerge.errors import MergeError
from evomerge.spec import nearest
from evomerge.tokenizer_choice import BASE, INTERSECTION, UNION, TokenizerChoice

Rows = NDArray[np.int64]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelTokens:
    """A model's tokenizer and how many rows its embedding has.

    `named` are tokens that its configs name by id. A token whose id is beyond the rows has none.
    """

    file: TokenizerFile
    rows: int
    named: frozenset[str] = frozenset()

    @cached_property
    def ids(self) -> dict[str, int]:
        """Row by token, for the tokens that have one."""
        return {token: index for token, index in self.file.ids.items() if index < self.rows}


@dataclass(frozen=True)
class Vocabulary:
    """The output vocabulary and where it comes from.

    `donor` is the model whose tokenizer is written: as it is, or edited. `ids` is the row of every
    token; a row of none is padding. `kept` are tokens of an intersection that not all models have.
    """

    choice: TokenizerChoice
    donor: str
    rows: int
    ids: Mapping[str, int]
    models: Mapping[str, ModelTokens]
    kept: tuple[str, ...] = ()

    @property
    def is_edited(self) -> bool:
        """Whether the written tokenizer is another than the donor's."""
        return dict(self.ids) != self.models[self.donor].ids and self.choice.source in (
            UNION,
            INTERSECTION,
        )

    @property
    def keeps_ids(self) -> bool:
        """Whether the donor's tokens, and so its rows of padding, stay where they are."""
        return self.choice.source != INTERSECTION

    @property
    def is_trivial(self) -> bool:
        """Whether every model has exactly these rows already, so that nothing is to be aligned."""
        return not self.choice.tokens and all(
            model.rows == self.rows and model.ids == self.ids for model in self.models.values()
        )

    @cached_property
    def source_rows(self) -> Mapping[str, Rows]:
        """By model, for each output row its row with the same token, -1 where it has none."""
        found = {}
        for name, model in self.models.items():
            found[name] = np.full(self.rows, -1, dtype=np.int64)
            shared = self.ids.keys() & model.ids.keys()
            found[name][[self.ids[token] for token in shared]] = [model.ids[t] for t in shared]
        return found


def plan_vocabulary(choice: TokenizerChoice, models: Mapping[str, Model]) -> Vocabulary:
    """Work out the vocabulary of a merge of `models`, in the recipe's order, `base` first if any.

    Raises MergeError for a choice that does not fit the models, CheckpointError for a model whose
    tokenizer is missing, broken, or of a kind that cannot be edited.
    """
    return plan(choice, {name: read_tokens(model) for name, model in models.items()})


def read_tokens(checkpoint: Model) -> ModelTokens:
    """A checkpoint's tokenizer and number of rows. Raises CheckpointError."""
    file = read_tokenizer_file(checkpoint)
    generation = read_json(checkpoint.companion(GENERATION))
    named = file.named(checkpoint.config) | file.named(generation)
    return ModelTokens(file, embedding_rows(checkpoint), frozenset(named))


def plan(choice: TokenizerChoice, models: Mapping[str, ModelTokens]) -> Vocabulary:
    """As `plan_vocabulary`, of models that have been read."""
    donor = _donor(choice, models)
    kept: tuple[str, ...] = ()
    if choice.source == UNION:
        _check_union(donor, models)
        ids = _union(donor, models)
    elif choice.source == INTERSECTION:
        _check_union(donor, models)
        ids, kept = _intersection(donor, models)
    else:
        ids = _with_rows(models[donor].file.ids, models.values())
    vocabulary = Vocabulary(choice, donor, _rows(choice, donor, ids, models), ids, models, kept)
    _check_rules(vocabulary)
    return vocabulary


def _donor(choice: TokenizerChoice, models: Mapping[str, ModelTokens]) -> str:
    if choice.source in models:
        return choice.source
    if choice.source in (BASE, UNION, INTERSECTION):
        return next(iter(models))
    known = (BASE, UNION, INTERSECTION, *models)
    raise MergeError(f"tokenizer: unknown source {choice.source!r}{nearest(choice.source, known)}")


def _check_union(donor: str, models: Mapping[str, ModelTokens]) -> None:
    ours = models[donor].file
    for model in models.values():
        model.file.check_editable("union or intersection")
        if model.file.alphabet != ours.alphabet:
            raise MergeError(
                f"tokenizer: {ours.path} spells text as {_words(ours.alphabet)}, {model.file.path}"
                f" as {_words(model.file.alphabet)}, so their tokens do not mean the same; choose"
                " `tokenizer: {source: base}` or one of the models"
            )


def _words(alphabet: Sequence[str]) -> str:
    return " ".join(filter(None, alphabet))


def _with_rows(ids: Mapping[str, int], models: Iterable[ModelTokens]) -> dict[str, int]:
    """Leave out tokens that no model has a row for: there is nothing to give them."""
    known: set[str] = set().union(*(model.ids for model in models))
    return {token: index for token, index in ids.items() if token in known}


def _union(donor: str, models: Mapping[str, ModelTokens]) -> dict[str, int]:
    """The donor's tokens where they are, then the others' by model, each model's by string.

    By string and not by id: how a source happens to number its tokens changes nothing.
    """
    ids = _with_rows(models[donor].file.ids, models.values())
    end = max(ids.values(), default=-1) + 1
    for model in models.values():
        new = sorted(token for token in model.ids if token not in ids)
        ids.update(zip(new, range(end, end + len(new)), strict=True))
        end += len(new)
    return ids


def _intersection(
    donor: str, models: Mapping[str, ModelTokens]
) -> tuple[dict[str, int], tuple[str, ...]]:
    ours = models[donor]
    shared = {token for token in ours.ids if all(token in m.ids for m in models.values())}
    wanted = shared | ours.file.required() | ours.named
    wanted = (wanted | parts(ours.file, wanted)) & ours.ids.keys()
    kept = tuple(sorted(wanted - shared, key=ours.ids.__getitem__))
    if kept:
        _log.warning(
            "intersection: %d tokens of %s are kept, though not all models have them",
            len(kept),
            ours.file.path,
        )
    in_order = sorted(wanted, key=ours.ids.__getitem__)
    return {token: row for row, token in enumerate(in_order)}, kept


def _rows(
    choice: TokenizerChoice,
    donor: str,
    ids: Mapping[str, int],
    models: Mapping[str, ModelTokens],
) -> int:
    end = max(ids.values(), default=-1) + 1
    if choice.pad_to_multiple_of:
        return -(-end // choice.pad_to_multiple_of) * choice.pad_to_multiple_of
    return end if choice.source == INTERSECTION else max(end, models[donor].rows)


def _check_rules(vocabulary: Vocabulary) -> None:
    for token, rule in vocabulary.choice.tokens.items():
        where = f"tokenizer.tokens.{token}"
        if token not in vocabulary.ids:
            hint = _near(token, vocabulary.ids)
            raise MergeError(f"{where}: the output vocabulary has no such token{hint}")
        if rule.model is not None:
            _check_row(
                where, rule.model, token if rule.token is None else rule.token, vocabulary.models
            )


def _check_row(where: str, name: str, wanted: str | int, models: Mapping[str, ModelTokens]) -> None:
    if name not in models:
        raise MergeError(f"{where}: no model {name!r}{nearest(name, models)}")
    model = models[name]
    if isinstance(wanted, str) and wanted not in model.ids:
        hint = _near(wanted, model.ids)
        raise MergeError(f"{where}: {model.file.path} has no row for token {wanted!r}{hint}")
    if isinstance(wanted, int) and not 0 <= wanted < model.rows:
        raise MergeError(f"{where}: {model.file.path} has rows 0 to {model.rows - 1}, not {wanted}")


def _near(token: str, known: Iterable[str]) -> str:
    """As `nearest`, without listing a hundred thousand tokens if none is near."""
    close = difflib.get_close_matches(token, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
