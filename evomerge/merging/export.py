"""Write a recipe's merged model to disk as an ordinary Hugging Face checkpoint.

Streamed, so that memory is bounded whatever the model's size; written aside and renamed, so that
a folder is there whole or not at all. Knows no live model and no study.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from evomerge.checkpoints.checkpoint import Checkpoint, Progress
from evomerge.checkpoints.compare import compare
from evomerge.checkpoints.files import INDEX, WEIGHTS
from evomerge.checkpoints.weights import Weights
from evomerge.checkpoints.writer import Entry, header, in_order, write_file
from evomerge.errors import (
    CandidateError,
    CheckpointError,
    ExportError,
    MergeError,
    NonFiniteTensor,
    SpecError,
)
from evomerge.merging.merge import Merge
from evomerge.merging.model_card import model_card
from evomerge.merging.recipe import ModelRef, Recipe

RECIPE_FILE = "evomerge_recipe.json"

_FROM_ANCHOR = (
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
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_COMPANION_BYTES = 1 << 20
"""Room for config, model card and index, on top of weights and tokenizer."""


def export(
    recipe: Recipe,
    directory: Path,
    *,
    shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> Recipe:
    """Merge and write `directory`; returns the recipe with the digests of its models.

    Beside weights, config and tokenizer it holds a model card and the recipe. `progress` is told
    the fraction done, the check of the inputs being the first half.

    Raises ExportError if the directory exists and is not empty or cannot be written; SpecError with
    every reason why the checkpoints do not fit; NonFiniteTensor for NaN in an input; MergeError for
    NaN or an overflow in the result. After any error nothing is left behind.
    """
    report = progress or (lambda fraction: None)
    _refuse_existing(directory)
    checkpoints = {model.path: Checkpoint.open(model.path) for model in _models(recipe)}
    merge = Merge(recipe, checkpoints)
    partial = bool(recipe.slices)
    if problems := compare(merge.anchor, merge.sources, partial=partial):
        raise SpecError("recipe", problems)
    known = _checked(recipe, checkpoints, lambda fraction: report(fraction / 2))
    shards = _shards(merge, shard_bytes)
    with _written_aside(directory, _needed_bytes(shards, merge.anchor)) as aside:
        _write_weights(merge, shards, aside, lambda fraction: report((1 + fraction) / 2))
        _write_companions(merge, known, aside)
    return known


def _models(recipe: Recipe) -> list[ModelRef]:
    return [*([recipe.base] if recipe.base else []), *(s.model for s in recipe.sources)]


def _refuse_existing(directory: Path) -> None:
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        raise ExportError(f"{directory}: exists already; give a new folder, or remove it first")


def _checked(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], progress: Progress) -> Recipe:
    """The recipe with its models' digests, once every byte of them has been looked at."""
    digests = {}
    for index, (path, checkpoint) in enumerate(checkpoints.items()):
        share = _share(progress, index, len(checkpoints))
        scan = checkpoint.scan(share)
        if scan.non_finite:
            raise NonFiniteTensor(
                f"{scan.non_finite[0]}: checkpoint {path} holds NaN or infinity there"
                f" ({len(scan.non_finite)} such tensors); leave this model out"
            )
        digests[path] = scan.digest
    for model in _models(recipe):
        if model.digest not in (None, digests[model.path]):
            raise CheckpointError(
                f"{model.path}: not the checkpoint that the recipe was made for: the digest of its"
                f" contents is {digests[model.path][:12]}, the recipe has {model.digest[:12]};"
                " put that checkpoint back"
            )
    return recipe.with_digests(digests)


def _share(progress: Progress, index: int, count: int) -> Progress:
    return lambda fraction: progress((index + fraction) / count)


def _shards(merge: Merge, shard_bytes: int) -> dict[str, list[Entry]]:
    """The tensors of every weight file, by file name."""
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


def _needed_bytes(shards: Mapping[str, list[Entry]], anchor: Weights) -> int:
    weights = sum(len(header(shard)) + sum(e.nbytes for e in shard) for shard in shards.values())
    tokenizer = sum(path.stat().st_size for path in _companions(anchor))
    return weights + tokenizer + _COMPANION_BYTES


def _companions(anchor: Weights) -> list[Path]:
    return [path for name in _FROM_ANCHOR if (path := anchor.folder / name).is_file()]


@contextmanager
def _written_aside(directory: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder beside `directory`: takes its place if the block succeeds, is gone if not."""
    parent = directory.absolute().parent
    aside: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(parent).free < needed_bytes:
            raise _disk_full(directory, needed_bytes)
        prefix = f".{directory.name}."
        aside = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=parent))
        yield aside
        aside.chmod(0o755)  # mkdtemp's folder is for its owner alone
        _flush(aside)
        aside.rename(directory)
        _flush(parent)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise _disk_full(directory, needed_bytes) from error
        raise ExportError(f"{directory}: cannot be written: {error}") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _disk_full(directory: Path, needed_bytes: int) -> ExportError:
    free = shutil.disk_usage(directory.absolute().parent).free
    return ExportError(
        f"{directory}: does not fit on the disk: {needed_bytes / 1e6:,.1f} MB are needed,"
        f" {free / 1e6:,.1f} MB are free; free some space or export elsewhere"
    )


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_weights(
    merge: Merge, shards: Mapping[str, list[Entry]], folder: Path, progress: Progress
) -> None:
    total = sum(entry.nbytes for shard in shards.values() for entry in shard)
    done = 0
    try:
        for file_name, entries in shards.items():
            for written in write_file(folder / file_name, entries, _elements(merge, entries)):
                done += written
                progress(done / total)
    except CandidateError as error:
        raise MergeError(str(error)) from error
    if len(shards) > 1:
        weight_map = {e.name: name for name, entries in shards.items() for e in entries}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_text(folder / INDEX, json.dumps(index, indent=2))


def _elements(merge: Merge, entries: list[Entry]) -> Iterator[Tensor]:
    for entry in entries:
        yield merge.tensor(entry.name).view(-1)


def _write_companions(merge: Merge, recipe: Recipe, folder: Path) -> None:
    config = dict(merge.anchor.config)
    if recipe.dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = recipe.dtype
    _write_text(folder / "config.json", json.dumps(config, indent=2))
    _write_text(folder / RECIPE_FILE, json.dumps(recipe.to_json(), indent=2))
    _write_text(folder / "README.md", model_card(recipe))
    for path in _companions(merge.anchor):
        shutil.copyfile(path, folder / path.name)
        _flush(folder / path.name)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
    _flush(path)
