"""Files written past the page cache hold what was written, byte for byte."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evomerge.checkpoints import direct
from evomerge.checkpoints.direct import SLAB, direct_file


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, SLAB - 1, SLAB, SLAB + 1, 5 * SLAB + 777])
@pytest.mark.parametrize("piece", [1 << 20, SLAB + 4097])
def test_any_size_in_any_pieces(tmp_path: Path, size: int, piece: int) -> None:
    data = os.urandom(size)
    with direct_file(tmp_path / "file") as file:
        for start in range(0, size, piece):
            file.write(memoryview(data)[start : start + piece])
    assert (tmp_path / "file").read_bytes() == data


def test_a_file_system_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refusing(path: object, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, mode)

    monkeypatch.setattr(direct.os, "open", refusing)
    with direct_file(tmp_path / "file") as file:
        file.write(memoryview(b"abc"))
    assert (tmp_path / "file").read_bytes() == b"abc"


def test_a_failed_write_is_reported_by_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(handle: int, data: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(direct.os, "pwrite", failing)
    with pytest.raises(OSError, match="No space"), direct_file(tmp_path / "file") as file:
        file.write(memoryview(bytes(3 * SLAB)))
