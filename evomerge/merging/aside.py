"""A folder that is written aside and takes its place when it is whole; what was cut off goes on.

Beside the folder to be, `.NAME.partial` holds the files that are finished and a list of them. The
next attempt at the same thing keeps them; an attempt at anything else begins anew. Knows nothing of
models.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evomerge.errors import ExportError

_STATE = "state.json"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Aside:
    """A folder in the making. `finished` maps its finished files to what was noted with each."""

    def __init__(self, folder: Path, purpose: str) -> None:
        self.folder = folder
        self._purpose = purpose
        self.finished: dict[str, Any] = self._read()

    def finish(self, name: str, note: Any) -> None:
        """Note that a file is whole and on the disk, so that it survives a crash."""
        self.finished[name] = note
        self._write()

    def drop(self, name: str) -> None:
        """Remove a finished file that is needed no more."""
        del self.finished[name]
        self._write()
        (self.folder / name).unlink()

    def clear(self) -> None:
        """Remove every file."""
        for path in self.folder.iterdir():
            path.unlink()
        self.finished = {}

    def move_to(self, directory: Path) -> None:
        """Take the place of `directory`, which must not exist or be empty."""
        (self.folder / _STATE).unlink(missing_ok=True)
        flush(self.folder)
        self.folder.rename(directory)
        flush(directory.absolute().parent)

    def _write(self) -> None:
        document = {"purpose": self._purpose, "finished": self.finished}
        fresh = self.folder / f"{_STATE}.new"
        fresh.write_text(json.dumps(document), encoding="utf-8")
        flush(fresh)
        fresh.rename(self.folder / _STATE)
        flush(self.folder)

    def _read(self) -> dict[str, Any]:
        """What an earlier attempt at the same purpose finished; anything else is removed."""
        try:
            document = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            document = {}
        finished: dict[str, Any] = document.get("finished", {})
        if document.get("purpose") != self._purpose:
            finished = {}
        for path in self.folder.iterdir():
            if path.name not in (_STATE, *finished):
                path.unlink()
        return finished


def check_free(directory: Path) -> None:
    """Raise ExportError if the directory exists and is not empty."""
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        raise ExportError(f"{directory}: exists already; give a new folder, or remove it first")


@contextmanager
def written_aside(directory: Path, purpose: str, needed_bytes: int) -> Iterator[Aside]:
    """A folder beside `directory`: takes its place if the block succeeds, is gone after an error.

    `purpose` says what is being written: finished files of a killed or interrupted attempt with the
    same purpose are kept. Raises ExportError where the disk is full or cannot be written to, or
    where another process is at it.
    """
    parent = directory.absolute().parent
    folder = parent / f".{directory.name}.partial"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        with _locked(folder, directory):
            aside = Aside(folder, purpose)
            kept = sum((folder / name).stat().st_size for name in aside.finished)
            try:
                if shutil.disk_usage(parent).free < needed_bytes - kept:
                    raise _disk_full(directory, needed_bytes)
                yield aside
                aside.move_to(directory)
            except Exception:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            except BaseException:  # interrupted: what is finished need not be done again
                if not aside.finished:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise _disk_full(directory, needed_bytes) from error
        raise ExportError(f"{directory}: cannot be written: {error}") from error


def flush(path: Path) -> None:
    """Have a file's contents, or a folder's entries, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(folder: Path, directory: Path) -> Iterator[None]:
    """The folder for this process alone; the lock goes with the process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ExportError(f"{directory}: another process is writing it") from None
    try:
        yield
    finally:
        os.close(handle)


def _disk_full(directory: Path, needed_bytes: int) -> ExportError:
    free = shutil.disk_usage(directory.absolute().parent).free
    return ExportError(
        f"{directory}: does not fit on the disk: {needed_bytes / 1e6:,.1f} MB are needed,"
        f" {free / 1e6:,.1f} MB are free; free some space or export elsewhere"
    )
