"""Puts the top-level folders alembic/ and search_spaces/ into the wheel, inside the package.

Everything else about the build is in pyproject.toml. `evomerge.resources` finds the folders.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("alembic", "search_spaces")


class BuildWithFolders(build_py):
    """`build_py`, and then a copy of each shipped folder; an editable install needs none."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in SHIPPED:
            target = Path(self.build_lib) / "evomerge" / f"_{folder}"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))


setup(cmdclass={"build_py": BuildWithFolders})
