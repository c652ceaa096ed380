"""mergekit's files on the command line: merged, searched and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_llama import save
from stored import store_study

from evomerge.cli.main import main as command_line
from evomerge.cli.running import load_spec
from evomerge.merging.layout import layout
from evomerge.merging.methods.registry import coefficients
from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.merging.recipe_file import load_recipe
from evomerge.store.sql import SqlStore

MERGE = """
models:
  - model: base
  - model: a
    parameters: {weight: [0.2, 0.6]}
  - model: b
    parameters: {weight: [{filter: mlp, value: 0.5}, {value: 0}]}
merge_method: task_arithmetic
base_model: base
dtype: float32
"""
EVOLVE = """
genome: {models: [a, b], merge_method: ties, base_model: base}
tasks: [{name: compare, metric: "acc,none"}]
limit: 100
"""


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`evomerge ARGUMENTS...`: its exit code."""

    def run(arguments: list[str]) -> int:
        monkeypatch.setattr("sys.argv", ["evomerge", *arguments])
        with pytest.raises(SystemExit) as caught:
            command_line()
        return int(caught.value.code or 0)

    return run


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        save(folder / name, seed=seed, dtype=torch.float32)
    return folder


def test_merge_takes_mergekits_file(models: Path, tmp_path: Path, call: Any) -> None:
    """θ₀ + Σ wᵢ·τᵢ, with mergekit's weights for two layers worked out by hand."""
    (models / "merge.yml").write_text(MERGE)
    assert call(["merge", str(models / "merge.yml"), str(tmp_path / "out")]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    base, a, b = (load_file(models / name / "model.safetensors") for name in ("base", "a", "b"))
    for name, tensor in merged.items():
        weight = 0.6 if "layers.1" in name else 0.2
        other = 0.5 if "mlp" in name else 0.0
        task_vectors = weight * (a[name] - base[name]) + other * (b[name] - base[name])
        torch.testing.assert_close(tensor, base[name] + task_vectors)


def test_run_takes_mergekit_evolves_file(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models / "evolve.yml"
    path.write_text(EVOLVE)
    spec = load_spec(path, "local")
    assert (spec.name, spec.base) == ("evolve", str(models / "base"))
    assert spec.objective.tasks[0].metric == "acc,none"
    assert "evolve.yml: limit: 100 is not used" in capsys.readouterr().err


def test_best_writes_mergekits_file(
    models: Path, tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tuple(
        Source(name, ModelRef(str(models / name)), {"weight": [0.2, 0.8]}) for name in ("a", "b")
    )
    recipe = Recipe("task_arithmetic", ModelRef(str(models / "base")), sources)
    url = f"sqlite:///{tmp_path}/store.db"
    store_study(SqlStore(url))
    monkeypatch.setattr(Recipe, "from_json", lambda document: recipe)  # models that are there
    file = tmp_path / "winner.yml"
    assert call(["best", "zoo-ties", "--store", url, "--mergekit", str(file)]) == 0
    monkeypatch.undo()
    again = load_recipe(file)
    places = layout(["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"])
    for place in places.values():
        assert coefficients(again, place, (1,)) == coefficients(recipe, place, (1,))
    assert again.dtype == "float32"


def test_merge_refuses_a_genome(
    models: Path, capsys: pytest.CaptureFixture[str], call: Any
) -> None:
    (models / "evolve.yml").write_text(EVOLVE)
    assert call(["merge", str(models / "evolve.yml"), "out"]) == 2
    assert "evomerge run FILE" in capsys.readouterr().err
