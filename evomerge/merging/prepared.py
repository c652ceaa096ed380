"""A folder of arrays that all workers of a machine share: found out once, mapped by all.

Names are hashes of what an array is about, so a folder may serve any number of studies and be
deleted at any time. Knows nothing of what the arrays mean.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CACHE = "EVOMERGE_CACHE"
"""The environment variable that says where the folder is."""


def cache_folder() -> Path:
    """The machine's own: $EVOMERGE_CACHE, or evomerge in the user's cache folder."""
    if CACHE in os.environ:
        return Path(os.environ[CACHE])
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "evomerge"


class Prepared:
    """Keeps arrays by key, in memory and in the folder.

    What is in the folder is mapped: one copy in memory, however many processes read it. A folder
    that cannot be written to costs the sharing and nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, NDArray[Any]] = {}

    def get(self, key: str) -> NDArray[Any] | None:
        """The array kept under a key; None if there is none."""
        if key not in self._known:
            try:
                self._known[key] = np.load(self._path(key), mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError):  # none, or one that a power cut broke
                return None
        return self._known[key]

    def put(self, key: str, array: NDArray[Any]) -> None:
        """Keeps an array under a key. Two processes that do so at once do no harm."""
        self._known[key] = array
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._folder, suffix=".partial")
        except OSError:
            return
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, array, allow_pickle=False)
            os.replace(name, self._path(key))
        except BaseException as error:
            Path(name).unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            return
        self._known.pop(key, None)  # the next reader maps it, as all others do

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.npy"
