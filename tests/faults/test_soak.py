"""A short soak: real controllers and workers, killed at random. The long one is a benchmark."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from postgres_server import missing

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
@pytest.mark.parametrize("store", ["sqlite", "postgres"])
def test_killed_at_random_for_a_while_each_search_ends_as_it_would_have(store: str) -> None:
    if store == "postgres" and missing():
        pytest.skip(missing() or "")
    options = ["--postgres"] if store == "postgres" else []
    command = [sys.executable, str(SOAK), "--kills", "6", "--trials", "18", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 3
    assert all("nothing lost, nothing twice, the same search" in line for line in lines)
    assert store == "sqlite" or " 0 servers" not in lines[-1]
