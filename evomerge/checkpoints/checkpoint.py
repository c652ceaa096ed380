"""One checkpoint, lazily: names, shapes and memory-mapped tensors.

Nothing is read before it is asked for, and what is read stays shared between processes. Knows
nothing of merging and never writes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.checkpoints.digest import TensorHash, combine
from evomerge.checkpoints.files import find_folder, open_weights, read_config, weight_files
from evomerge.checkpoints.pages import populate, release
from evomerge.checkpoints.tying import tied_pairs
from evomerge.errors import MissingTensor

Progress = Callable[[float], None]
"""Told the fraction done, from 0 to 1."""

# What may differ between two copies of one model.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
# Files beside config and weights that may change what a model answers.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_CHUNK = 1 << 20
_THREADS = 8  # more would wait for memory


@dataclass(frozen=True)
class Scan:
    """What one pass over all bytes tells: the digest, and which tensors hold NaN or infinity."""

    digest: str
    non_finite: tuple[str, ...]


@dataclass(frozen=True)
class Look:
    """What one tensor's bytes tell: their digest, and whether they are free of NaN and infinity."""

    digest: str
    finite: bool


class Checkpoint:
    """A model on disk. `path` is what the user called it, `folder` where it lies.

    The folder of a raw state dict is its file, which has no companions.

    A weight that is tied to another is known under one name, the canonical one, wherever the
    checkpoint stores it: `names` holds canonical names only, `tied_names` maps the others to them.
    """

    def __init__(self, path: str, folder: Path, config: dict[str, Any], files: dict[str, Any]):
        self.path = path
        self.folder = folder
        self.config = config
        self._files = files
        self._views: dict[str, Tensor] = {}
        self._inspected: dict[str, Look] = {}

    @classmethod
    def open(cls, path: str) -> Checkpoint:
        """Open a folder, or a model on the hub by its id.

        A safetensors file, or a folder of them without config.json, is a raw state dict: its
        config is empty. A revision of a model on the hub is named by `org/name@revision`.

        Raises CheckpointError, naming the file that is missing or broken; PickleRefused.
        """
        folder = find_folder(path)
        return cls(path, folder, read_config(folder), open_weights(folder))

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, by name."""
        return tuple(weight_files(self.folder))

    def companion(self, name: str) -> Path:
        """Where the file of that name lies, if there is one."""
        return self.folder / name

    @cached_property
    def tied_names(self) -> Mapping[str, str]:
        """Canonical name by alias, for every weight that shares another one's values."""
        pairs = tied_pairs(self.config, self.folder) if self.config else {}
        tied = {}
        for target, source in pairs.items():
            if source not in self._files:
                target, source = source, target
            if source in self._files and self._equal(target, source):
                tied[target] = source
        return tied

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted, each tied weight once."""
        return tuple(sorted(set(self._files) - set(self.tied_names)))

    @cached_property
    def non_float_names(self) -> tuple[str, ...]:
        """Names of the tensors that hold integers or booleans: these are never merged."""
        return tuple(n for n in self.names if not self.tensor(n).is_floating_point())

    def __contains__(self, name: object) -> bool:
        return name in self._files or name in self.tied_names

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file: costs no memory. Read only: a write would corrupt later reads.

        Raises MissingTensor.
        """
        if name not in self._views:
            stored = name if name in self._files else self.tied_names.get(name)
            if stored is None:
                raise MissingTensor(f"{name}: not in checkpoint {self.path}")
            self._views[name] = self._files[stored].get_tensor(stored)
        return self._views[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self.tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor as stored."""
        return self.tensor(name).dtype

    def blocks(self, name: str, size: int) -> Iterator[Tensor]:
        """The elements of a tensor in flat order as float32, `size` at a time, in fresh memory."""
        for block in _cut(self.tensor(name), size):
            yield block.to(torch.float32, copy=True)

    def scan(self, progress: Progress | None = None) -> Scan:
        """Read every byte once: digest of the contents, and tensors with NaN or infinity.

        The digest is a BLAKE3 tree over config, tokenizer, generation config and every tensor's
        name, dtype, shape and bytes; see `digest.combine`. How the weights are cut into shards,
        and where they lie, does not change it.
        """
        if "_scanned" not in self.__dict__:
            self._scanned = self._scan(progress or (lambda fraction: None))
        return self._scanned

    def digest(self) -> str:
        """BLAKE3 of the contents, as 64 hex digits; see `scan`."""
        return self.scan().digest

    def preamble(self) -> bytes:
        """What a digest covers beside the tensors: config and companions that are there, by name.

        What a mere re-save changes is left out.
        """
        parts = [_canonical(self.config)]
        for name, digest in companions(self.folder).items():
            parts += [name.encode(), digest]
        return b"\0".join(parts)

    def inspect(self, name: str) -> Look:
        """Look at one tensor for the scan, ahead of it: `scan` does not read it again."""
        name = self.tied_names.get(name, name)
        if name not in self._inspected:
            tensor, finite = self.tensor(name), True
            hashed = TensorHash(name, tensor.dtype, tuple(tensor.shape))
            for chunk in _cut(tensor, _CHUNK):  # small enough to be in the cache for a second look
                hashed.update(chunk)
                finite = finite and is_finite(chunk)
            self._inspected[name] = Look(hashed.hexdigest(), finite)
        return self._inspected[name]

    def remember(self, digests: Mapping[str, str]) -> None:
        """Take over the digests of tensors that were inspected before, and found finite."""
        self._inspected |= {name: Look(digest, finite=True) for name, digest in digests.items()}

    def fetch(self, name: str) -> None:
        """Have a tensor read from the disk, so that a thread that computes need not wait for it."""
        populate(self.tensor(name))

    def release(self, name: str) -> None:
        """Take a tensor's pages out of this process's memory until it is read again."""
        release(self.tensor(name))

    def _scan(self, progress: Progress) -> Scan:
        total = sum(self.tensor(name).nbytes for name in self.names) or 1
        looks, done = {}, 0
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "scan") as pool:
            try:
                inspected = pool.map(self._fetched, self.names)
                for name, look in zip(self.names, inspected, strict=True):
                    looks[name] = look
                    done += self.tensor(name).nbytes
                    progress(done / total)
            except BaseException:
                pool.shutdown(cancel_futures=True)  # an interrupt need not wait for all the rest
                raise
        digest = combine(self.preamble(), {name: look.digest for name, look in looks.items()})
        return Scan(digest, tuple(name for name, look in looks.items() if not look.finite))

    def _fetched(self, name: str) -> Look:
        if name not in self._inspected:
            self.fetch(name)
        return self.inspect(name)

    def _equal(self, target: str, source: str) -> bool:
        """Whether a checkpoint that stores both weights of a tied pair stores them equal.

        Where they differ, transformers does not tie them, whatever the config says.
        """
        if target not in self._files:
            return True
        one, other = (self._files[name].get_tensor(name) for name in (target, source))
        return torch.equal(one, other)


def companions(folder: Path) -> dict[str, bytes]:
    """SHA-256 of every file beside config and weights that may change what a model answers."""
    paths = (folder / name for name in _COMPANIONS)
    return {p.name: hashlib.sha256(_contents(p)).digest() for p in paths if p.exists()}


def _contents(path: Path) -> bytes:
    if not path.name.endswith("_config.json"):
        return path.read_bytes()
    try:
        return _canonical(json.loads(path.read_bytes()))
    except ValueError:
        return path.read_bytes()


def _canonical(config: dict[str, Any]) -> bytes:
    return json.dumps(settled(config), sort_keys=True).encode()


def settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what may differ between two copies of one model."""
    return {key: value for key, value in config.items() if key not in _VOLATILE}


def _cut(tensor: Tensor, size: int) -> Iterator[Tensor]:
    flat = tensor.reshape(-1)
    return (flat[start : start + size] for start in range(0, len(flat), size))


def is_finite(values: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity; integers always are."""
    if not values.is_floating_point() or not values.numel():
        return True
    if values.itemsize == 1:  # no reduction of float8 exists
        values = values.float()
    if values.is_cpu:
        return _is_finite_in_memory(values)
    low, high = torch.aminmax(values)  # one pass without temporaries; NaN propagates
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _is_finite_in_memory(values: Tensor) -> bool:
    """By bit patterns, in numpy: torch would wake its threads for each chunk, and they spin."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
    infinity = torch.tensor(torch.inf, dtype=values.dtype).view(bits).item()
    patterns = values.reshape(-1).view(bits).numpy()
    return bool((patterns & np.iinfo(patterns.dtype).max).max() < infinity)
