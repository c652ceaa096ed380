"""Every block of the README is run, in order, with the zoo for the user's models.

What is changed before it is run is in `SUBSTITUTIONS` and `NOT_RUN_HERE`, with the reason.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SUBSTITUTIONS = {"trials: 200": "trials: 6"}  # a test need not wait for a good merge
NOT_RUN_HERE = {
    "make demo": "its command, `evomerge demo`, is what the kill test runs",
    "make test": "this runs in it",
    "ray start --head": "a test starts no cluster that others could join; Ray starts its own",
    "evomerge dashboard": "it runs until Ctrl-C, and has a test of its own below",
}


def blocks(language: str) -> list[str]:
    return [
        body for kind, body in BLOCK.findall((ROOT / "README.md").read_text()) if kind == language
    ]


def commands() -> list[str]:
    lines = [line.partition("#")[0].strip() for body in blocks("sh") for line in body.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def folder(real_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(real_zoo, folder / "zoo")
    study, recipe, regmean = blocks("yaml")
    for old, new in SUBSTITUTIONS.items():
        assert old in study
        study = study.replace(old, new)
    (folder / "study.yaml").write_text(study)
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "regmean.yaml").write_text(regmean)
    return folder


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}


def test_every_command_of_the_readme_runs(folder: Path) -> None:
    run = [line for line in commands() if line not in NOT_RUN_HERE]
    assert len(run) + len(NOT_RUN_HERE) == len(commands())
    for line in run:
        line = line.replace("RAY_ADDRESS=auto ", "")
        done = subprocess.run(
            line, shell=True, cwd=folder, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    page = (folder / "report.html").read_text()
    assert "my-study" in page
    for export in ("merged", "merged-by-ties"):
        assert _loads(folder / export)


def test_the_dashboard_of_the_readme_answers(folder: Path) -> None:
    command = [sys.executable, "-m", "evomerge.cli.main", "dashboard", "--port", "0"]
    with subprocess.Popen(
        command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stderr is not None
            url = next(word for line in server.stderr for word in line.split() if "http://" in word)
            assert b"my-study" in _get(url.replace("/dashboard", "/api/studies"))
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)


def test_the_first_two_commands_of_the_readme_are_make_demo_and_make_test() -> None:
    assert commands()[:2] == ["make demo", "make test"]


def test_every_link_of_the_readme_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def _loads(folder: Path) -> bool:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return bool(model(**tokenizer("s", return_tensors="pt")).logits.isfinite().all())


def _get(url: str) -> bytes:
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return bytes(answer.read())
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
