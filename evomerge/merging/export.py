"""Write a recipe's merged model to disk as an ordinary Hugging Face checkpoint.

What is in the folder and in which order it is made; how tensors stream is `stream`, how the folder
comes to be there whole or not at all is `aside`. Knows no live model and no study.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

import evomerge
from evomerge.checkpoints.chat_templates import chat_template, write_chat_template
from evomerge.checkpoints.files import INDEX, WEIGHTS
from evomerge.checkpoints.tokenizer_files import GENERATION, write_json
from evomerge.checkpoints.tokenizer_writer import (
    output_generation_config,
    write_tokenizer,
)
from evomerge.checkpoints.weights import Model
from evomerge.checkpoints.writer import Entry, header, in_order, write_file
from evomerge.errors import CandidateError, MergeError
from evomerge.merging.aside import Aside, check_free, flush, written_aside
from evomerge.merging.fitted.artifact import DOCUMENT
from evomerge.merging.inspection import Inspection
from evomerge.merging.merge import Merge, open_merge
from evomerge.merging.methods.base import MergeMethod
from evomerge.merging.model_card import model_card
from evomerge.merging.recipe import Recipe
from evomerge.merging.stream import merged_tensors
from evomerge.threads import one_thread

RECIPE_FILE = "evomerge_recipe.json"
ARTIFACT_FILE = "evomerge_artifact.json"

CONFIG = "config.json"

_FROM_DONOR = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
SHARD_BYTES = 5_000_000_000
"""Bytes of a weight file, unless the user says otherwise; the hub's own limit is ten times that."""

_COMPANION_BYTES = 1 << 20
"""Room for config, model card and index, on top of weights and tokenizer."""


Progress = Callable[[int, int], None]
"""Told the bytes read and written so far, and all there are to be."""


def export(
    recipe: Recipe,
    directory: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    note: Callable[[str], object] = lambda line: None,
) -> Recipe:
    """Merge and write `directory`; returns the recipe with the digests of its models.

    `note` is told what becomes of the sources' structure, where the method changes it.
    Beside weights, config and tokenizer it holds a model card, the recipe, and of an artifact that
    the recipe applies what it was fitted on and what was found out. Tensors stream:
    memory holds a few of the largest, whatever the model. After an error nothing is left behind; an
    export that was killed or interrupted goes on, when it is called again for the same thing, with
    the weight file that was cut off.

    Raises ExportError if the directory exists and is not empty or cannot be written; SpecError with
    every reason why the checkpoints do not fit; NonFiniteTensor for NaN in an input; MergeError for
    NaN or an overflow in the result; CheckpointError if a model is not the one that the recipe has
    the digest of.
    """
    check_free(directory)
    merge = open_merge(recipe)
    shards = cut(merge, shard_bytes)
    purpose = _purpose(merge, shards)
    inspection = Inspection(merge)
    with written_aside(directory, purpose, _needed_bytes(shards, merge.donor)) as aside:
        with _threads_for(merge):
            _Writer(merge, inspection, shards, aside, progress).write()
        known = _with_artifact(inspection.known(), merge)
        _write_companions(merge, known, aside.folder)
    if merge.structure is not None:
        note(merge.structure)
    return known


def _threads_for(merge: Merge) -> AbstractContextManager[None]:
    """torch's own threads only where a method is carried out by torch: beside kernels, and stages
    that overlap anyway, they spin and cost more than the merge."""
    methods = {type(merge.method(name)) for name in filter(merge.is_merged, merge.names)}
    fused = all(method.program is not MergeMethod.program for method in methods)
    return one_thread() if fused else nullcontext()


def _purpose(merge: Merge, shards: Mapping[str, list[Entry]]) -> str:
    """What makes two exports the same: recipe, files of the inputs, files of the result."""
    inputs = {
        path: [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in model.files]
        for path, model in merge.models.items()
    }
    result = {name: [entry.name for entry in entries] for name, entries in shards.items()}
    known = [evomerge.__version__, merge.recipe.to_json(), inputs, result]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


class Outline(Protocol):
    """What a model's tensors are called, and how large they are."""

    @property
    def names(self) -> Sequence[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...


class _Writer:
    """Writes the weight files that are not there yet, and their index."""

    def __init__(
        self,
        merge: Merge,
        inspection: Inspection,
        shards: Mapping[str, list[Entry]],
        aside: Aside,
        progress: Progress | None,
    ) -> None:
        self._merge, self._inspection = merge, inspection
        self._shards, self._aside = shards, aside
        self._progress = progress or (lambda done, total: None)
        self._done = 0
        written = sum(entry.nbytes for entries in shards.values() for entry in entries)
        self._total = written + sum(map(inspection.nbytes, merge.names))

    def write(self) -> None:
        """Raises MergeError for NaN or an overflow, NonFiniteTensor for NaN in an input."""
        try:
            for file_name, entries in self._shards.items():
                if file_name in self._aside.finished:
                    self._skip(file_name, entries)
                else:
                    self._write_file(file_name, entries)
        except CandidateError as error:
            raise MergeError(str(error)) from error
        write_index(self._aside.folder, self._shards)

    def _write_file(self, file_name: str, entries: list[Entry]) -> None:
        names = [entry.name for entry in entries]
        tensors = merged_tensors(self._merge, names, self._inspection.fetch, self._inspection.look)
        elements = (self._released(name, tensor) for name, tensor in tensors)
        for size in write_file(self._aside.folder / file_name, entries, elements):
            self._advance(size)
        self._aside.finish(file_name, self._inspection.notes(names))

    def _released(self, name: str, tensor: Tensor) -> Tensor:
        self._inspection.release(name)
        self._advance(self._inspection.nbytes(name))
        return tensor.view(-1)

    def _skip(self, file_name: str, entries: list[Entry]) -> None:
        """An earlier attempt wrote this file, and knew its inputs' digests."""
        self._inspection.remember(self._aside.finished[file_name])
        self._advance(sum(e.nbytes + self._inspection.nbytes(e.name) for e in entries))

    def _advance(self, size: int) -> None:
        self._done += size
        self._progress(self._done, self._total)


def cut(merge: Outline, shard_bytes: int) -> dict[str, list[Entry]]:
    """The tensors of every weight file, by file name; a file holds up to `shard_bytes`."""
    groups: list[list[Entry]] = [[]]
    room = shard_bytes
    for name in merge.names:
        entry = Entry(name, merge.dtype(name), merge.shape(name))
        if groups[-1] and entry.nbytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(entry)
        room -= entry.nbytes
    if len(groups) == 1:
        return {WEIGHTS: in_order(groups[0])}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": in_order(group)
        for number, group in enumerate(groups, 1)
    }


def write_index(folder: Path, shards: Mapping[str, list[Entry]]) -> None:
    """Say which weight file holds each tensor; one file alone needs no index."""
    if len(shards) == 1:
        return
    index = {
        "metadata": {"total_size": sum(e.nbytes for es in shards.values() for e in es)},
        "weight_map": dict(sorted((e.name, name) for name, es in shards.items() for e in es)),
    }
    _write_text(folder / INDEX, json.dumps(index, indent=2))


def _needed_bytes(shards: Mapping[str, list[Entry]], donor: Model) -> int:
    weights = sum(len(header(shard)) + sum(e.nbytes for e in shard) for shard in shards.values())
    tokenizer = sum(path.stat().st_size for path in companions(donor))
    return weights + tokenizer + _COMPANION_BYTES


def companions(donor: Model) -> list[Path]:
    """The small files of a model that any copy of it has: tokenizer and generation config."""
    return [path for name in _FROM_DONOR if (path := donor.companion(name)).is_file()]


def _write_companions(merge: Merge, recipe: Recipe, folder: Path) -> None:
    """Config, tokenizer, model card and recipe."""
    if merge.config:  # a raw state dict has none
        _write_text(folder / CONFIG, json.dumps(merge.config, indent=2))
    _write_text(folder / RECIPE_FILE, json.dumps(recipe.to_json(), indent=2))
    _write_text(folder / "README.md", model_card(recipe))
    if merge.artifact is not None:
        shutil.copyfile(merge.artifact.folder / DOCUMENT, folder / ARTIFACT_FILE)
        flush(folder / ARTIFACT_FILE)
    for path in _write_tokenizer(merge, folder):
        flush(path)


def _write_tokenizer(merge: Merge, folder: Path) -> list[Path]:
    """Tokenizer, generation config and chat template; returns the paths written."""
    written = [shutil.copyfile(path, folder / path.name) for path in companions(merge.donor)]
    vocabulary, members = merge.vocabulary, merge.members
    if vocabulary is not None:
        for path in written:
            path.unlink()
        written = write_tokenizer(folder, vocabulary, members)
        generation = output_generation_config(vocabulary, members)
        if generation is not None:
            written.append(write_json(folder / GENERATION, generation))
    if merge.recipe.chat_template is not None:
        text = chat_template(merge.recipe.chat_template, list(members.values()))
        written += write_chat_template(folder, text) if text is not None else []
    return written


def _with_artifact(recipe: Recipe, merge: Merge) -> Recipe:
    """The recipe with the digest of the artifact it applies."""
    if recipe.artifact is None or merge.artifact is None:
        return recipe
    return replace(recipe, artifact=replace(recipe.artifact, digest=merge.artifact.digest))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
    flush(path)
