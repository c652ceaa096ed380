"""A model seen through an adapter: base weights plus low-rank updates, computed when asked for.

Behaves as a checkpoint, so that an adapter is a source of a merge without a merged copy on disk or
in memory. Knows nothing of merging.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from evomerge.checkpoints.adapter import ADAPTER_CONFIG, Adapter
from evomerge.checkpoints.checkpoint import Checkpoint, Progress, Scan, is_finite
from evomerge.checkpoints.files import find_folder, weight_files
from evomerge.checkpoints.placement import place
from evomerge.errors import CheckpointError, MissingTensor

# What a trainer saves beside an adapter, and what then counts instead of the base's.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class Adapted:
    """A base and an adapter as one model.

    `tensor` gives an adapted weight W + s·B A in float32, as computed, whatever the base's dtype:
    rounded to bfloat16 a small update would be lost in the weight's own rounding. `dtype` is still
    the base's: what a checkpoint of this model would be saved in. The last tensor computed is kept,
    no other.

    A tied weight of which the adapter changes one name only is no longer tied: that is the model
    that PEFT trains and runs (its merge of a LoRA on tied embeddings changes both).
    """

    def __init__(self, base: Checkpoint, adapter: Adapter, path: str | None = None) -> None:
        """Raises CheckpointError for a module the base lacks, ShapeMismatch; logs a warning for an
        adapter whose config names another base."""
        self.path = path or f"{base.path}+{adapter.path}"
        self.folder = base.folder
        self.base = base
        self.adapter = adapter
        self._updates, self._whole = place(adapter, base)
        self._last: tuple[str, Tensor] | None = None
        self.config = self._config()
        _warn_of_other_base(base, adapter)

    @cached_property
    def tied_names(self) -> Mapping[str, str]:
        """Canonical name by alias, for every weight that shares another one's values."""
        return {alias: name for alias, name in self.base.tied_names.items() if self._tied(alias)}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted, each tied weight once."""
        untied = set(self.base.tied_names) - set(self.tied_names)
        return tuple(sorted({*self.base.names, *untied}))

    @property
    def non_float_names(self) -> tuple[str, ...]:
        """Names of the tensors that hold integers or booleans: these are never merged."""
        return self.base.non_float_names

    def __contains__(self, name: object) -> bool:
        return name in self.base

    def tensor(self, name: str) -> Tensor:
        """The base's mapped tensor, or the adapted one in float32. Read only. Raises
        MissingTensor."""
        if name not in self:
            raise MissingTensor(f"{name}: not in checkpoint {self.path}")
        stored = self._changed_name(name)
        if stored not in self._updates:
            return self._unadapted(stored)
        last = self._last
        if last is None or last[0] != stored:
            self._last = last = None  # before the next is computed: never two at a time
            self._last = last = (stored, self._computed(stored))
        return last[1]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; computes nothing."""
        return tuple(self._unadapted(self._changed_name(name)).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the base's tensor."""
        return self.base.dtype(name)

    def blocks(self, name: str, size: int) -> Iterator[Tensor]:
        """The elements of a tensor in flat order as float32, `size` at a time, in fresh memory."""
        flat = self.tensor(name).reshape(-1)
        for start in range(0, len(flat), size):
            yield flat[start : start + size].to(torch.float32, copy=True)

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files of the base and of the adapter."""
        return (*self.base.files, *weight_files(self.adapter.folder))

    def companion(self, name: str) -> Path:
        """Where the file of that name lies, if it exists: a tokenizer file of the adapter's own
        counts instead of the base's."""
        own = self.adapter.folder / name
        return own if name in _TOKENIZER and own.is_file() else self.folder / name

    def scan(self, progress: Progress | None = None) -> Scan:
        """Digest of base and adapter, and tensors with NaN or infinity in either.

        The digest is a SHA-256 of the base's digest, of each factor with the tensor it changes and
        its scale, and of the adapter's own tokenizer files; of the adapter's config it holds what
        changes values.
        """
        if "_scanned" not in self.__dict__:
            self._scanned = self._scan(progress)
        return self._scanned

    def digest(self) -> str:
        """SHA-256 of the contents, as 64 hex digits; see `scan`."""
        return self.scan().digest

    def _scan(self, progress: Progress | None) -> Scan:
        base = self.base.scan(progress)
        bad = {*base.non_finite} - {*self._whole}
        bad |= {name for name, update in self._updates.items() if not update.is_finite()}
        bad |= {name for name, tensor in self._whole.items() if not is_finite(tensor)}
        sha = hashlib.sha256(f"adapted\0{base.digest}".encode())
        for name in sorted({*self._updates, *self._whole}):
            sha.update(f"\0{name}\0".encode())
            for part in self._parts(name):
                sha.update(part)
        for file in filter(Path.is_file, (self.adapter.folder / name for name in _TOKENIZER)):
            sha.update(f"\0{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
        return Scan(sha.hexdigest(), tuple(sorted(bad)))

    def _parts(self, name: str) -> Iterator[bytes]:
        if name in self._whole:
            yield from _described(self._whole[name])
        if name in self._updates:
            update = self._updates[name]
            yield f"{update.scale!r}\0{update.transposed}".encode()
            for tensor in (update.a, update.b, update.magnitude):
                yield from _described(tensor)

    def _unadapted(self, name: str) -> Tensor:
        return self._whole[name] if name in self._whole else self.base.tensor(name)

    def _changed_name(self, name: str) -> str:
        """The name under which the adapter changes a weight, given any of its names."""
        return self.tied_names.get(name, name)

    def _changes(self, name: str) -> bool:
        return name in self._updates or name in self._whole

    def _tied(self, alias: str) -> bool:
        canonical = self.base.tied_names[alias]
        changed = [self._changes(name) for name in (alias, canonical)]
        if all(changed) and not self.adapter.config.get("ensure_weight_tying"):
            return torch.equal(self._computed(alias), self._computed(canonical))
        return all(changed) or not any(changed)

    def _computed(self, name: str) -> Tensor:
        weight = self._unadapted(name)
        return self._updates[name].onto(weight) if name in self._updates else weight

    def _config(self) -> dict[str, Any]:
        """The base's, with the adapter's vocabulary size if it brings resized embeddings."""
        rows = {len(t) for n, t in self._whole.items() if self.base.shape(n) != tuple(t.shape)}
        return {**self.base.config, "vocab_size": max(rows)} if rows else dict(self.base.config)


Bases: TypeAlias = dict[Path, Checkpoint]
"""Checkpoints that are open, by folder: adapters of one base share it."""


def open_models(paths: Iterable[str]) -> dict[str, Checkpoint | Adapted]:
    """Every model of `paths`, by path, as `open_model` opens it; adapters of one base share it."""
    bases: Bases = {}
    return {path: open_model(path, bases) for path in paths}


def open_model(path: str, bases: Bases | None = None) -> Checkpoint | Adapted:
    """A model by its path: a folder, a model on the hub by its id, or `MODEL+ADAPTER`.

    An adapter's path alone will do if its config names the base. Raises what `Checkpoint.open`,
    `Adapter.open` and `Adapted` raise.
    """
    known = {} if bases is None else bases
    model, adapter_path = split_adapter(path)
    if adapter_path is not None:
        return Adapted(_opened(model, known), Adapter.open(adapter_path), path)
    if not (find_folder(path) / ADAPTER_CONFIG).exists():
        return _opened(path, known)
    adapter = Adapter.open(path)
    return Adapted(_opened(_base_of(adapter), known), adapter, path)


def _opened(path: str, bases: Bases) -> Checkpoint:
    folder = find_folder(path)
    if folder not in bases:
        bases[folder] = Checkpoint.open(path)
    return bases[folder]


def split_adapter(path: str) -> tuple[str, str | None]:
    """Model and adapter of `MODEL+ADAPTER`; a folder with a plus in its name is one model."""
    if "+" not in path or Path(path).expanduser().is_dir():
        return path, None
    places = [match.start() for match in re.finditer(r"\+", path)]
    splits = [(path[:at], path[at + 1 :]) for at in reversed(places)]
    there = (pair for pair in splits if all(Path(p).expanduser().is_dir() for p in pair))
    return next(there, splits[0])


def _base_of(adapter: Adapter) -> str:
    named = adapter.settings.base
    advice = f"name its base: BASE+{adapter.path}"
    if not named:
        raise CheckpointError(f"{adapter.path}: its config names no base; {advice}")
    for path in (Path(named).expanduser(), adapter.folder / named):
        if path.is_dir():
            return str(path)
    try:
        return str(find_folder(named))
    except CheckpointError as error:
        raise CheckpointError(
            f"{adapter.path}: its base {named} cannot be found; {advice}"
        ) from error


def _warn_of_other_base(base: Checkpoint, adapter: Adapter) -> None:
    named = adapter.settings.base
    if named and _last(named) != _last(base.path):
        logging.getLogger(__name__).warning(
            "adapter %s was trained on %s, not on %s", adapter.path, named, base.path
        )


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _described(tensor: Tensor | None) -> Iterator[bytes]:
    """A tensor's dtype, shape and contents, for a digest."""
    if tensor is not None:
        yield f"\0{tensor.dtype}\0{list(tensor.shape)}\0".encode()
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
