"""`evomerge` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


class Command:
    """`evomerge` in a process of its own, its standard error read line by line."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("EVOMERGE_STORE", None)
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "evomerge.cli.main", *map(str, arguments)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.folder = folder
        self.said = ""

    def until(self, word: str) -> None:
        """Read standard error up to a line that holds the word."""
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.said += line
            if word in line:
                return
        raise AssertionError(f"ended without {word!r}: {self.said}")

    def end(self) -> tuple[int, str, str]:
        """Exit code, standard output, all of standard error."""
        out, rest = self.popen.communicate()
        return self.popen.returncode, out, self.said + rest


def done(folder: Path, *arguments: object) -> tuple[int, str, str]:
    return Command(folder, *arguments).end()
