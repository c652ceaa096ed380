"""Write a model whose tensors are computed one at a time into a folder that is written aside.

Knows nothing of what the tensors are made of.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from evomerge.checkpoints.weights import Model
from evomerge.checkpoints.writer import Entry, write_file
from evomerge.errors import NonFiniteTensor
from evomerge.merging.aside import Aside, flush
from evomerge.merging.export import CONFIG, Outline, companions, cut, write_index

Progress = Callable[[str, int, int], object]
"""Told what is being done, how much of it is done and how much there is."""


class Computed(Outline, Protocol):
    """A model whose tensors are computed when they are asked for."""

    @property
    def config(self) -> Mapping[str, Any]: ...
    def tensor(self, name: str) -> Tensor: ...


def write_model(
    model: Computed,
    donor: Model,
    aside: Aside,
    shard_bytes: int,
    progress: Callable[[int, int], object],
) -> None:
    """Weight files of up to `shard_bytes`, index and config; tokenizer and the other small files
    are copied from `donor`.

    Weight files that an earlier attempt finished are left. `progress` is told the bytes written and
    all there are.
    """
    shards = cut(model, shard_bytes)
    total = sum(entry.nbytes for entries in shards.values() for entry in entries)
    done = 0
    for file_name, entries in shards.items():
        if file_name in aside.finished:
            done += sum(entry.nbytes for entry in entries)
            continue
        for size in write_file(aside.folder / file_name, entries, _flat(model, entries)):
            done += size
            progress(done, total)
        aside.finish(file_name, None)
    write_index(aside.folder, shards)
    write_text(aside.folder / CONFIG, json.dumps(dict(model.config), indent=2))
    for path in companions(donor):
        flush(Path(shutil.copyfile(path, aside.folder / path.name)))


def write_text(path: Path, text: str) -> None:
    """A text file that ends in a line break, on the disk when this returns."""
    path.write_text(text + "\n", encoding="utf-8")
    flush(path)


def finite_digest(model: Model) -> str:
    """The digest of a model. Raises NonFiniteTensor for NaN or infinity in it."""
    scan = model.scan()
    if scan.non_finite:
        raise NonFiniteTensor(f"{scan.non_finite[0]}: {model.path} holds NaN or infinity in it")
    return scan.digest


def _flat(model: Computed, entries: Sequence[Entry]) -> Iterator[Tensor]:
    return (model.tensor(entry.name).reshape(-1) for entry in entries)
