"""`evomerge refine` in this process: real models and gradients, made-up scores."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.cli import main as command_line
from evomerge.cli import running
from evomerge.service.worker import Worker
from evomerge.store import open_store
from evomerge.store.base import Controller
from evomerge.testing.synthetic import SyntheticExecutor


class _Executor(SyntheticExecutor):
    def __init__(self, workers: Any) -> None:
        super().__init__()

    def inspect(self, spec: Any) -> Any:
        return Worker().inspect(spec)


class _Point:
    name = "local"

    def load(self) -> type[_Executor]:
        return _Executor


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def evomerge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line: exit code, standard output and standard error."""
    monkeypatch.setattr(running, "entry_points", lambda group: [_Point()])

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evomerge", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            command_line.main()
        captured = capsys.readouterr()
        return int(str(left.value.code)), captured.out, captured.err

    return call


@pytest.fixture
def folder(tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evomerge: Call) -> Path:
    """A working directory with a study that is over, and a file of data."""
    monkeypatch.chdir(tmp_path)
    spec = {
        "name": "s",
        "base": str(tiny_zoo / "base"),
        "sources": {name: str(tiny_zoo / name) for name in ("compare", "sort")},
        "objective": {"include_path": str(tiny_zoo / "tasks"), "tasks": ["compare", "sort"]},
        "budget": {"trials": 3, "finalists": 1},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(spec))
    path = str(tiny_zoo / "tasks")
    entries = {n: {"task": n, "include_path": path, "count": 4} for n in ("compare", "sort")}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"calibration": entries}))
    assert evomerge("run", "s.yaml")[0] == 0
    return tmp_path


def test_a_refined_trial_is_scored_and_reported_and_made_once(folder, evomerge):
    code, out, err = evomerge(
        "refine", "s", "--calibration", "data.yaml", "--steps", 2, "--trial", 14, "--json"
    )
    assert code == 0, err
    assert "refined trial 14" in err
    report = json.loads(out)
    (gained,) = report["refinements"]
    assert (gained["origin"], gained["trial"], gained["state"]) == (14, 17, "COMPLETE")
    assert gained["after"] < gained["before"]
    assert report["trials"]["search"]["complete"] == 3
    rows = json.loads(evomerge("trials", "s", "--json")[1])
    assert [row["kind"] for row in rows[14:]] == ["search", "search", "search", "refined"]
    again = evomerge("refine", "s", "--calibration", "data.yaml", "--steps", 2, "--trial", 14)
    assert again[0] == 0
    assert "trial 14 is refined so already" in again[2]
    assert json.loads(evomerge("trials", "s", "--json")[1]) == rows


def test_what_cannot_be_refined_is_one_line(folder, evomerge):
    def refused(*arguments: object) -> str:
        code, out, err = evomerge("refine", "s", *arguments)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        return err

    assert "s.yaml: calibration: expected" in refused("--calibration", "s.yaml")
    assert "trial 2 has no genome" in refused("--calibration", "data.yaml", "--trial", 2)
    until = datetime.now(UTC) + timedelta(seconds=30)
    other = Controller("t", "elsewhere", 1, 0.0, until)
    open_store("sqlite:///evomerge.db").acquire("s", other, now=datetime.now(UTC), force=False)
    assert "is being run" in refused("--calibration", "data.yaml")
