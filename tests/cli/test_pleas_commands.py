"""`evomerge merge` by pleas: its plan, what is said of the result, and of what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_llama
import torch

WHOLE = {"worth": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        small_llama.save(root / name, seed=seed, dtype=torch.float32)
    small_llama.save(root / "wide", seed=3, dtype=torch.float32, intermediate_size=80)
    (root / "book.txt").write_text(" ".join(f"w{i * 7 % 60}" for i in range(300)))
    (root / "short.txt").write_text("w1")
    return root


def _recipe(folder: Path, parameters: dict[str, Any], **more: Any) -> Path:
    document = {
        "method": "pleas",
        "sources": {"a": "a", "b": "b"},
        "calibration": {"text": "book.txt", "tokens": 16, "count": 12},
        "fit": WHOLE,
        "parameters": {"allocation": "uniform", **parameters},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(document | more))
    return path


def test_plan_and_merge_say_what_stays_apart_and_what_it_costs(
    call: Any, folder: Path, tmp_path: Path
) -> None:
    code, _, said = call("merge", _recipe(folder, {"budget": 1.2}), tmp_path / "out")
    assert code == 0, said
    (line,) = (line for line in said.splitlines() if line.startswith("apart in each layer: "))
    cost, dense = line.split("Cost of ")[1].split(" models, ")
    assert 1.1 < float(cost) <= float(dense.split()[0])
    artifact = tmp_path / "out.artifact"
    path = _recipe(folder, {"budget": 1.2}, artifact=str(artifact))
    code, out, said = call("merge", path, "--plan")
    assert code == 0, said
    assert f"structure {line}\n" in out
    assert "21 by pleas" in out
    assert "FLOPs" not in out
    known = json.loads(call("merge", path, "--plan", "--json")[1])
    assert known["structure"] == line
    assert known["memory"] is None
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert known["written"] < written < known["written"] + 10_000


@pytest.mark.parametrize(
    ("parameters", "more", "words"),
    [
        ({"budget": 1.99}, {}, "must lie between 1 and 1."),
        ({"least_squares": "sequential"}, {}, "fitted without `sequential`"),
        ({"allocation": "programme"}, {}, "fitted without `worth`"),
        ({}, {"fit": {**WHOLE, "grams": False}}, "`grams: false`"),
        (
            {},
            {"fit": {**WHOLE, "sequential": {"budget": 1.99, "allocation": "uniform"}}},
            "fit.sequential: a budget of 1.99",
        ),
        ({}, {"sources": {"a": "a", "b": "wide"}}, "[64, 32], source 'b' is [80, 32]"),
        ({}, {"sources": {"a": "a"}}, "merges exactly 2 sources"),
        ({}, {"calibration": {"text": "short.txt"}}, "name more data"),
    ],
)
def test_what_does_not_fit_is_said(
    call: Any, folder: Path, tmp_path: Path, parameters: Any, more: Any, words: str
) -> None:
    code, _, said = call("merge", _recipe(folder, parameters, **more), tmp_path / "out")
    assert code == 2
    assert words in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
