"""PLeaS of tiny Llamas: every variant gives a loss, and a second run trains and fits nothing."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
SIZES = {"steps": 4, "batch": 4, "length": 8, "calibration": 7, "report": 5}


@pytest.fixture
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("pleas_llama")
    sys.path.remove(str(FOLDER))


def test_what_was_measured_is_kept(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ["average", "pleas most, parallel", "pleas 1.2, sequential, own"]
    every = bench.variants()
    monkeypatch.setattr(bench, "variants", lambda: {name: every[name] for name in chosen})
    found = bench.measured(bench.Setup(**SIZES), 0, tmp_path, same_base=False)
    assert list(found) == ["model a", "model b", "ensemble (mean logits)", *chosen]
    assert all(math.isfinite(loss) for losses in found.values() for loss in losses)
    monkeypatch.setattr(bench.Trained, "_train", None)
    monkeypatch.setattr(bench.Trained, "merged", None)
    assert bench.measured(bench.Setup(**SIZES), 0, tmp_path, same_base=False) == found
    assert len(bench.page({0: found}).splitlines()) == 2 + len(found)


def test_models_and_parts_have_other_sequences(bench: ModuleType, tmp_path: Path) -> None:
    trained = bench.Trained(bench.Setup(**SIZES), 1, tmp_path, same_base=True)
    assert not torch.equal(trained.calibration["a"][:5], trained.report["a"])
    factor, offset = trained.rules[1]
    tokens = trained.report["b"]
    follows = tokens[:, 1:] == (factor * tokens[:, :-1] + offset) % bench.TOKENS
    assert follows.float().mean() > 0.8
