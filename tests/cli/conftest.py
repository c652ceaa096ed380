"""`evomerge` called in this process."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from evomerge.cli.main import main


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Exit code, standard output and standard error of a command line."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evomerge", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return int(str(left.value.code)), *capsys.readouterr()

    return run
