"""What DAM's merged model learns from: the logits of each source on its own data.

Live, the network is made each source in turn at every step; cached, the largest logits of all data
are computed once, a source at a time, and may be kept in a folder for other fits of the same
sources and data. Either way there is one network. Knows no loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from evomerge.errors import MergeError
from evomerge.merging.fitted.artifact import (
    DOCUMENT,
    Artifact,
    Draft,
    Provenance,
    draft,
    open_artifact,
)
from evomerge.merging.fitted.base import Problem, Watch, made_from, merged_names
from evomerge.merging.fitted.calibration import Batch, batch
from evomerge.merging.fitted.dam_losses import Teacher
from evomerge.merging.fitted.network import Network

_KIND = "dam_teacher"


def counting(rows: Batch, tokens: str) -> Tensor:
    """Which of a batch's places a loss counts, [b, t] bool: all real tokens, or the answer's."""
    return rows.counted if tokens == "answer" else rows.attention.bool()


class Teachers(Protocol):
    """Knows what the sources say of their examples."""

    def of(self, drawn: Mapping[str, Sequence[int]]) -> dict[str, Teacher]:
        """Logits at the tokens that count, of examples by their numbers, for each source."""


class Live:
    """Whole logits, computed when they are asked for; the network is then the last source."""

    def __init__(self, network: Network, problem: Problem, tokens: str) -> None:
        self._network, self._problem, self._tokens = network, problem, tokens

    @torch.no_grad()
    def of(self, drawn: Mapping[str, Sequence[int]]) -> dict[str, Teacher]:
        found = {}
        for name, numbers in drawn.items():
            self._network.become(self._problem.sources[name], merged_names(self._problem))
            examples = self._problem.calibration.of(name)
            rows = batch([examples[number] for number in numbers])
            logits = self._network.logits(rows)
            found[name] = Teacher(logits[counting(rows, self._tokens).to(logits.device)])
        return found


class Cached:
    """The k largest logits of every token that counts, by source and example."""

    def __init__(self, tensors: Mapping[str, Tensor] | Artifact, device: str) -> None:
        self._tensors, self._device = tensors, device

    def of(self, drawn: Mapping[str, Sequence[int]]) -> dict[str, Teacher]:
        return {name: self._joined(name, numbers) for name, numbers in drawn.items()}

    def _joined(self, name: str, numbers: Sequence[int]) -> Teacher:
        def whole(part: str) -> Tensor | None:
            keys = [f"{name}/{number}/{part}" for number in numbers]
            if keys[0] not in self._tensors:
                return None
            return torch.cat([self._read(key) for key in keys]).to(self._device)

        logits = whole("logits")
        assert logits is not None
        return Teacher(logits, whole("ids"), whole("tail"))

    def _read(self, key: str) -> Tensor:
        return (
            self._tensors.tensor(key) if isinstance(self._tensors, Artifact) else self._tensors[key]
        )


class Cache:
    """Makes a cache for a problem, in memory or in a folder.

    In a folder it is made once: an attempt that was cut off is gone on with, source by source, and
    a cache of other sources, data or settings is refused with MergeError.
    """

    def __init__(
        self,
        network: Network,
        problem: Problem,
        *,
        top_k: int,
        temperature: float,
        tail: bool,
        tokens: str,
        batch_size: int,
        watch: Watch,
    ) -> None:
        self._network, self._problem, self._watch = network, problem, watch
        self._top_k, self._temperature, self._tail = top_k, temperature, tail
        self._tokens, self._batch_size = tokens, batch_size

    def kept(self, folder: Path | None) -> Cached:
        """The cache in `folder`, made if it is not there; in memory without a folder."""
        if folder is None:
            made: dict[str, Tensor] = {}
            for name in self._problem.sources:
                made |= self._source(name)
            return Cached(made, self._problem.device)
        if not (folder / DOCUMENT).is_file():
            with draft(folder, self._provenance) as work:
                self._make(work)
        artifact = open_artifact(folder)
        if different := self._provenance.differences(artifact.provenance):
            raise MergeError(
                f"{folder}: a teacher cache made for other {', '.join(different)};"
                " remove it, or name another folder as `cache`"
            )
        return Cached(artifact, self._problem.device)

    def _make(self, work: Draft) -> None:
        tensors, notes = work.state or ({}, {})
        flops = self._network.flops
        for name in self._problem.sources:
            if name not in notes.get("done", []):
                tensors |= self._source(name)
                notes = {"done": [*notes.get("done", []), name]}
                work.save(tensors, notes, flops=self._network.flops - flops)
        work.finish(tensors, {}, flops=self._network.flops - flops)

    @torch.no_grad()
    def _source(self, name: str) -> dict[str, Tensor]:
        self._network.become(self._problem.sources[name], merged_names(self._problem))
        examples = self._problem.calibration.of(name)
        found: dict[str, Tensor] = {}
        for start in range(0, len(examples), self._batch_size):
            rows = batch(examples[start : start + self._batch_size])
            mask = counting(rows, self._tokens)
            for number, (logits, places) in enumerate(
                zip(self._network.logits(rows).cpu(), mask, strict=True), start
            ):
                found |= self._tensors(f"{name}/{number}", logits[places])
        self._watch.note(f"teacher: logits of {name} on {len(examples)} examples")
        return found

    def _tensors(self, key: str, logits: Tensor) -> dict[str, Tensor]:
        top = Teacher.top(logits, self._top_k, self._temperature, tail=self._tail)
        parts = {"logits": top.logits, "ids": top.ids, "tail": top.tail}
        return {f"{key}/{part}": tensor for part, tensor in parts.items() if tensor is not None}

    @property
    def _provenance(self) -> Provenance:
        settings = {
            "top_k": self._top_k,
            "temperature": self._temperature,
            "tail": self._tail,
            "tokens": self._tokens,
            "batch_size": self._batch_size,
        }
        return made_from(_KIND, self._problem, settings, seed=0)  # nothing is drawn
