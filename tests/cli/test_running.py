"""A study in the foreground, on real models: Ctrl-C, a second controller, a changed spec."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest
import yaml
from commands import Command, done

pytestmark = pytest.mark.slow


def write_spec(folder: Path, zoo: Path, *, trials: int, seed: int = 0) -> Path:
    path = folder / f"study-{trials}-{seed}.yaml"
    spec = {
        "name": "s",
        "base": str(zoo / "base"),
        "sources": {name: str(zoo / name) for name in ("compare", "sort")},
        "objective": {"include_path": str(zoo / "tasks"), "tasks": ["compare"]},
        "sampler": {"name": "random", "population": 2, "seed": seed},
        "budget": {"trials": trials, "finalists": 1},
    }
    path.write_text(yaml.safe_dump(spec))
    return path


def trials(folder: Path) -> list[tuple[object, ...]]:
    rows = json.loads(done(folder, "trials", "s", "--json")[1])
    return [(row["number"], row["genome"], row["recipe_digest"], row["scores"]) for row in rows]


def hold(controller: Command) -> psutil.Process:
    """Suspend its worker, so that an attempt runs that does not end by itself."""
    (worker,) = psutil.Process(controller.popen.pid).children()
    worker.suspend()
    while "RUNNING" not in done(controller.folder, "status", "s", "--json")[1]:
        pass
    return worker


def test_a_study_that_is_stopped_in_every_way_ends_as_if_it_never_was(
    tiny_zoo: Path, tmp_path: Path
) -> None:
    spec = write_spec(tmp_path, tiny_zoo, trials=400)

    first = Command(tmp_path, "run", spec)
    first.until("phase=")
    worker = hold(first)
    code, out, err = done(tmp_path, "run", spec)
    assert (code, out) == (2, "")
    assert f"study 's' is being run by process {first.popen.pid} on " in err
    first.popen.send_signal(signal.SIGINT)
    worker.resume()
    code, out, err = first.end()
    assert (code, out) == (130, "")
    assert "stopped; nothing is lost. To go on: evomerge resume s\n" in err

    second = Command(tmp_path, "resume", "s")
    second.until("phase=")
    worker = hold(second)
    second.popen.send_signal(signal.SIGINT)
    second.until("press Ctrl-C again to stop now")
    second.popen.send_signal(signal.SIGTERM)
    code, out, err = second.end()
    assert (code, out) == (130, "")
    assert "stopped at once" in err
    assert err.endswith("To go on: evomerge resume s\n")
    assert not worker.is_running()

    code, out, err = done(tmp_path, "run", write_spec(tmp_path, tiny_zoo, trials=400, seed=1))
    assert (code, out) == (2, "")
    assert "study 's' exists with another spec" in err
    assert "  - sampler.seed: 0 -> 1\n" in err

    scored = json.loads(done(tmp_path, "status", "s", "--json")[1])["trials"]["finished"]
    more = write_spec(tmp_path, tiny_zoo, trials=scored + 4)
    code, out, err = done(tmp_path, "run", more, "--json")
    assert code == 0, err
    assert json.loads(out)["trials"]["search"]["complete"] == scored + 4
    assert done(tmp_path, "run", more, "--json")[:2] == (0, out)

    other = tmp_path / "uninterrupted"
    other.mkdir()
    assert done(other, "run", more, "--json")[0] == 0
    assert trials(tmp_path) == trials(other)
    assert done(tmp_path, "best", "s", "--export", "winner")[0] == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "winner")
    ids = AutoTokenizer.from_pretrained(tmp_path / "winner")("1 2", return_tensors="pt")
    assert model(ids["input_ids"]).logits.isfinite().all()
