"""Arrays shared between processes: never wrong, whatever happens to the folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evomerge.merging.prepared import CACHE, Prepared, cache_folder


def test_what_one_process_put_another_maps(tmp_path: Path) -> None:
    program = (
        "import sys, numpy as np; from pathlib import Path;"
        " from evomerge.merging.prepared import Prepared;"
        " Prepared(Path(sys.argv[1])).put('table', np.arange(12).reshape(2, 6))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    found = Prepared(tmp_path).get("table")
    assert isinstance(found, np.memmap)
    assert not found.flags.writeable
    assert np.array_equal(found, np.arange(12).reshape(2, 6))
    assert Prepared(tmp_path).get("other") is None


@pytest.mark.parametrize("kept", [0, 1, 60, 127])
def test_a_broken_file_is_as_good_as_none(tmp_path: Path, kept: int) -> None:
    Prepared(tmp_path).put("table", np.arange(100))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:kept])
    store = Prepared(tmp_path)
    assert store.get("table") is None
    store.put("table", np.arange(100))
    assert np.array_equal(Prepared(tmp_path).get("table"), np.arange(100))


def test_an_empty_array_is_kept(tmp_path: Path) -> None:
    Prepared(tmp_path).put("none", np.zeros((2, 0), np.int64))
    found = Prepared(tmp_path).get("none")
    assert found is not None
    assert found.shape == (2, 0)


def test_a_folder_that_cannot_be_made_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Prepared(tmp_path / "file" / "cache")
    store.put("table", np.arange(3))
    assert np.array_equal(store.get("table"), np.arange(3))


def test_the_folder_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv(CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "evomerge"
