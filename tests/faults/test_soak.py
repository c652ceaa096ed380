"""A short soak: real controllers and workers, killed at random. The long one is a benchmark."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"
KILLS = 8


@pytest.mark.slow
def test_killed_at_random_for_a_while_the_study_ends_as_it_would_have() -> None:
    command = [sys.executable, str(SOAK), "--kills", str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal to the uninterrupted run") == len(done.stdout.splitlines())
