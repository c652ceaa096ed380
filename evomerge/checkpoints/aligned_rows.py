"""Every model's embedding, or head, in the output vocabulary, a block of rows at a time.

Rows are copied bit for bit; means are taken in float32. Memory is a block, whatever the size of
the matrices. Which row is which token was worked out in `vocabulary`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from evomerge.checkpoints.vocabulary import Rows, Vocabulary
from evomerge.errors import ShapeMismatch
from evomerge.tokenizer_choice import BASE

_ZERO, _MEAN, _PADDING = -1, -2, -3
_BLOCK = 1024


class AlignedRows:
    """One tensor's rows in the output vocabulary.

    `matrices` holds it for every model of the vocabulary, [rows of that model, *p]; a matrix may
    be mapped from a file. The row of a model without the token is, in this order: what a rule
    says, the base's, the only owner's, the mean of the owners'. A rule with `force` also replaces
    the rows of models that have the token. A row of padding is the donor's where it has one
    there, for all models; else the mean of the model's rows of tokens, so that in no model a logit
    of padding is the largest.

    Raises ShapeMismatch for matrices of other rows' shapes.
    """

    def __init__(self, vocabulary: Vocabulary, matrices: Mapping[str, Tensor], name: str) -> None:
        self._matrices = {model: matrices[model] for model in vocabulary.models}
        self._vocabulary = vocabulary
        first = self._matrices[vocabulary.donor]
        for model, matrix in self._matrices.items():
            if matrix.shape[1:] != first.shape[1:]:
                raise ShapeMismatch(
                    f"{name}: {vocabulary.donor!r} is {list(first.shape)}, {model!r} is"
                    f" {list(matrix.shape)}; only the number of rows may differ"
                )
        self.shape = (vocabulary.rows, *first.shape[1:])
        self._models = list(self._matrices)
        self._own = {m: self._available(m) for m in self._models}

    def rows(self, model: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of `model` as float32, in fresh memory: [stop - start, *p]."""
        return self._fetch(model, np.arange(start, min(stop, self.shape[0])))

    def elements(self, model: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of `model` in flat order as float32, in fresh memory."""
        width = int(np.prod(self.shape[1:]))
        first, last = start // width, -(-stop // width)
        flat = self.rows(model, first, last).reshape(-1)
        return flat[start - first * width : stop - first * width]

    def _fetch(self, model: str, wanted: Rows) -> Tensor:
        result = torch.zeros(len(wanted), *self.shape[1:])
        owners, rows = self._origin(model, wanted)
        for index, name in enumerate(self._models):
            self._copy(name, result, owners == index, rows)
        self._average(result, wanted, owners == _MEAN)
        if (owners == _PADDING).any():
            result[torch.from_numpy(owners == _PADDING)] = self._padding[model]
        return result

    def _origin(self, model: str, wanted: Rows) -> tuple[Rows, Rows]:
        """For output rows: which model's row stands there (or a code below 0), and which row."""
        owners, rows = self._default[0][wanted], self._default[1][wanted]
        own = self._own[model][wanted]
        has = (own >= 0) & ~self._forced[wanted]
        owners[has], rows[has] = self._models.index(model), own[has]
        return owners, rows

    def _copy(self, model: str, result: Tensor, chosen: np.ndarray, rows: Rows) -> None:
        if chosen.any():
            at, taken = torch.from_numpy(np.flatnonzero(chosen)), torch.from_numpy(rows[chosen])
            result[at] = self._matrices[model].index_select(0, taken).to(torch.float32)

    def _average(self, result: Tensor, wanted: Rows, chosen: np.ndarray) -> None:
        if not chosen.any():
            return
        at = np.flatnonzero(chosen)
        total, count = torch.zeros(len(at), *self.shape[1:]), np.zeros(len(at))
        for model in self._models:
            own = self._own[model][wanted[at]]
            part = torch.zeros_like(total)
            self._copy(model, part, own >= 0, own)
            total += part
            count += own >= 0
        divisor = torch.from_numpy(count).to(torch.float32)
        result[torch.from_numpy(at)] = total / divisor.reshape(-1, *[1] * (total.dim() - 1))

    def _available(self, model: str) -> Rows:
        rows = self._vocabulary.source_rows[model]
        return np.where(rows < len(self._matrices[model]), rows, -1)  # a head may have fewer

    @cached_property
    def _default(self) -> tuple[Rows, Rows]:
        """What stands in the rows of a model without the token."""
        own = np.stack([self._own[model] for model in self._models])  # [m, rows]
        count = (own >= 0).sum(0)
        owners = np.where(count > 1, _MEAN, np.where(count == 1, (own >= 0).argmax(0), _ZERO))
        rows = own.max(0)
        if BASE in self._own:
            base = self._own[BASE]
            owners[base >= 0], rows[base >= 0] = self._models.index(BASE), base[base >= 0]
        self._pad(owners, rows)
        for token, rule in self._vocabulary.choice.tokens.items():
            owners[self._vocabulary.ids[token]], rows[self._vocabulary.ids[token]] = self._ruled(
                token, rule.model, rule.token
            )
        return owners, rows

    def _pad(self, owners: Rows, rows: Rows) -> None:
        padding = np.ones(len(owners), dtype=bool)
        padding[list(self._vocabulary.ids.values())] = False
        at = np.flatnonzero(padding)
        owners[at] = _PADDING
        if self._vocabulary.keeps_ids:
            donor = self._vocabulary.donor
            at = at[at < len(self._matrices[donor])]
            owners[at], rows[at] = self._models.index(donor), at

    def _ruled(self, token: str, model: str | None, row: str | int | None) -> tuple[int, int]:
        if model is None:
            return _ZERO, 0
        if not isinstance(row, int):
            row = self._vocabulary.models[model].ids[token if row is None else row]
        return self._models.index(model), row

    @cached_property
    def _forced(self) -> np.ndarray:
        forced = np.zeros(self.shape[0], dtype=bool)
        for token, rule in self._vocabulary.choice.tokens.items():
            forced[self._vocabulary.ids[token]] = rule.force
        return forced

    @cached_property
    def _padding(self) -> dict[str, Tensor]:
        return {model: self._mean_of_tokens(model) for model in self._models}

    def _mean_of_tokens(self, model: str) -> Tensor:
        tokens = np.sort(np.fromiter(self._vocabulary.ids.values(), dtype=np.int64))
        total = torch.zeros(self.shape[1:], dtype=torch.float64)
        for start in range(0, len(tokens), _BLOCK):
            total += self._fetch(model, tokens[start : start + _BLOCK]).to(torch.float64).sum(0)
        return (total / max(len(tokens), 1)).to(torch.float32)
