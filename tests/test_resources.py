"""A wheel, built and unpacked elsewhere, finds its migrations and search spaces."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from evomerge.resources import migrations_directory, search_spaces_directory

ROOT = Path(__file__).parents[1]
SOURCES = ("alembic", "evomerge", "search_spaces", "workers", "pyproject.toml", "setup.py")
PROGRAM = """
from evomerge.resources import migrations_directory, search_spaces_directory
from evomerge.store import open_store
open_store("sqlite:///store.db").close()
print(migrations_directory(), search_spaces_directory(), sep="\\n")
"""


def test_a_checkout_finds_its_own_folders() -> None:
    assert migrations_directory() == ROOT / "alembic"
    assert search_spaces_directory() == ROOT / "search_spaces"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of a wheel of this checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    (source / "README.md").touch()
    wheels, unpacked = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("unpacked")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "--wheel-dir", str(wheels), str(source)], check=True)
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(unpacked)
    return unpacked


@pytest.mark.parametrize("folder", ["alembic", "search_spaces"])
def test_a_wheel_holds_the_same_files(unpacked: Path, folder: str) -> None:
    assert files(unpacked / "evomerge" / f"_{folder}") == files(ROOT / folder)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name[0] != "."
    }


def test_an_installed_wheel_creates_a_store(unpacked: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=True,
    )
    package = unpacked / "evomerge"
    assert done.stdout.split() == [str(package / "_alembic"), str(package / "_search_spaces")]
    assert (tmp_path / "store.db").exists()
