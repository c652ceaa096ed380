"""What a command loads: the ones that only read must answer at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from stored import store_study

from evomerge.store.sql import SqlStore

# heavy packages, and what of the lighter ones no reading command needs
HEAVY = ("torch", "transformers", "ray", "lm_eval", "datasets", "optuna", "alembic")
SLOW = ("scipy", "scipy.stats", "numpy", "pandas", "cmaes")

SCRIPT = """
import json, sys
from evomerge.cli.main import main
sys.argv[0] = "evomerge"
try:
    main()
except SystemExit as left:
    print(json.dumps([left.code, sorted(sys.modules)]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("imports") / "evomerge.db"
    store_study(SqlStore(f"sqlite:///{path}"))
    return f"sqlite:///{path}"


def modules(tmp_path: Path, *arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    code, loaded = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    return set(loaded)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]], ids=" ".join)
def test_help_loads_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    loaded = modules(tmp_path, *arguments)
    assert loaded.isdisjoint({*HEAVY, *SLOW, "sqlalchemy"})


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["trials", "zoo-ties"]])
def test_reading_loads_nothing_heavy(tmp_path: Path, store: str, command: list[str]) -> None:
    loaded = modules(tmp_path, *command, "--store", store)
    assert "sqlalchemy" in loaded
    assert loaded.isdisjoint({*HEAVY, *SLOW})


@pytest.mark.parametrize("command", ["best", "report"])
def test_reports_load_no_model_library(tmp_path: Path, store: str, command: str) -> None:
    loaded = modules(tmp_path, command, "zoo-ties", "--store", store)
    assert loaded.isdisjoint(HEAVY)
