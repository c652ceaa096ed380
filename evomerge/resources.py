"""Where the files that are not Python modules lie: search spaces and migrations.

In a checkout they are top-level folders; a wheel carries them inside the package (`setup.py`).
Knows nothing of what is in them.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def search_spaces_directory() -> Path:
    """The folder of the search spaces that evomerge ships."""
    return _shipped("search_spaces")


def migrations_directory() -> Path:
    """The folder with alembic's `env.py` and `versions/`."""
    return _shipped("alembic")


def _shipped(folder: str) -> Path:
    installed = _PACKAGE / f"_{folder}"
    return installed if installed.is_dir() else _PACKAGE.parent / folder
