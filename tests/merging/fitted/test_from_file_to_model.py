"""From a recipe file with `calibration` to a checkpoint: every fitted method, by the command line.

What `evomerge merge` writes is what a worker would score, and what `from_pretrained` loads.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small_problems
import torch
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from evomerge.checkpoints.adapted import open_models
from evomerge.cli.main import app
from evomerge.errors import MergeError
from evomerge.merging.export import export
from evomerge.merging.fitted.artifact import open_artifact
from evomerge.merging.materialise import Materialiser, load_model
from evomerge.merging.merge import Merge
from evomerge.merging.methods.registry import METHODS
from evomerge.merging.recipe import Recipe
from evomerge.merging.recipe_file import load_recipe

FITTED = sorted(name for name, method in METHODS.items() if method.artifact)
QUICK = {"dam": {"steps": 2}, "adamerging": {"steps": 2}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return small_problems.models(tmp_path_factory.mktemp("models"))


def recipe_file(folder: Path, folders: dict[str, str], method: str, **keys: object) -> Path:
    words = [" ".join(f"w{(7 * n + k) % 60}" for k in range(6)) for n in range(8)]
    data = folder / "data.jsonl"
    lines = (json.dumps({"prompt": w[:11], "answer": w[11:]}) for w in words)
    data.write_text("\n".join(lines))
    document = {
        "method": method,
        "base": folders["base"],
        "sources": {name: folders[name] for name in ("b", "a")},
        "calibration": {"jsonl": str(data), "prompt": "prompt", "answer": "answer"},
        "fit": QUICK.get(method, {}),
        **keys,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("method", FITTED)
def test_what_is_written_is_what_a_worker_scores(
    tmp_path: Path, folders: dict[str, str], method: str
) -> None:
    path = recipe_file(tmp_path, folders, method)
    run("merge", path, tmp_path / "out")
    artifact = open_artifact(tmp_path / "out.artifact")
    artifact.check_contents()
    written = json.loads((tmp_path / "out" / "evomerge_artifact.json").read_text())
    assert written["digest"] == artifact.digest
    recipe = Recipe.from_json(json.loads((tmp_path / "out" / "evomerge_recipe.json").read_text()))
    assert recipe.artifact is not None
    assert recipe.artifact.digest == artifact.digest
    models = open_models(model.path for model in recipe.models)
    live, _ = load_model(models[folders["base"]])
    Materialiser(live, models).write(recipe)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in live.state_dict().items():
        assert torch.equal(tensor, reloaded[name]), name


@pytest.mark.parametrize("method", FITTED)
def test_block_size_and_the_order_of_sources_change_no_bit(
    tmp_path: Path, folders: dict[str, str], method: str
) -> None:
    path = recipe_file(tmp_path, folders, method)
    run("fit", path, tmp_path / "artifact")
    path = recipe_file(tmp_path, folders, method, artifact=str(tmp_path / "artifact"))
    recipe = load_recipe(path)
    models = open_models(model.path for model in recipe.models)
    whole = Merge(recipe, models)
    turned = Recipe.from_json({**recipe.to_json(), "sources": recipe.to_json()["sources"][::-1]})
    others = [Merge(recipe, models, block_size=size) for size in (13, 1000)]
    for name in whole.names:
        wanted = whole.tensor(name)
        assert bool(wanted.isfinite().all())
        for other in (*others, Merge(turned, models)):
            assert torch.equal(wanted, other.tensor(name)), name


def test_fitted_again_it_is_the_same_and_nothing_is_done(
    tmp_path: Path, folders: dict[str, str]
) -> None:
    path = recipe_file(tmp_path, folders, "greedy_soup")
    run("fit", path, tmp_path / "one")
    run("fit", path, tmp_path / "two")
    digests = {open_artifact(tmp_path / name).digest for name in ("one", "two")}
    assert len(digests) == 1
    before = (tmp_path / "one" / "artifact.json").stat().st_mtime_ns
    run("fit", path, tmp_path / "one")
    assert (tmp_path / "one" / "artifact.json").stat().st_mtime_ns == before


def test_another_request_does_not_take_an_old_artifact(
    tmp_path: Path, folders: dict[str, str]
) -> None:
    path = recipe_file(tmp_path, folders, "greedy_soup")
    run("fit", path, tmp_path / "artifact")
    path = recipe_file(tmp_path, folders, "greedy_soup", fit={"metric": "loss"}, seed=1)
    with pytest.raises(
        Exception, match="fitted with other calibration, settings, seed than the recipe"
    ):
        run("fit", path, tmp_path / "artifact")


def test_an_artifact_of_other_models_is_refused_before_anything_is_written(
    tmp_path: Path, folders: dict[str, str]
) -> None:
    path = recipe_file(tmp_path, folders, "greedy_soup")
    run("fit", path, tmp_path / "artifact")
    swapped = {**folders, "a": folders["b"], "b": folders["a"]}
    path = recipe_file(tmp_path, swapped, "greedy_soup", artifact=str(tmp_path / "artifact"))
    with pytest.raises(MergeError, match="source 'a' was another model when it was fitted"):
        export(load_recipe(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_artifact_of_another_kind_is_refused(tmp_path: Path, folders: dict[str, str]) -> None:
    path = recipe_file(tmp_path, folders, "greedy_soup")
    run("fit", path, tmp_path / "artifact")
    other = next(m for m in FITTED if METHODS[m].artifact != "greedy_soup")
    path = recipe_file(tmp_path, folders, other, artifact=str(tmp_path / "artifact"))
    with pytest.raises(MergeError, match="was fitted as 'greedy_soup'"):
        export(load_recipe(path), tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"fit": {"metrc": "loss"}}, "unknown key 'fit.metrc'; did you mean 'metric'?"),
        ({"fit": {"batch_size": 0}}, "batch_size: expected a number"),
        ({"method": "linear"}, "linear looks at no data"),
        ({"method": "gready_soup"}, "unknown merge method 'gready_soup'; did you mean"),
        ({"calibration": {"a": {"task": "x"}}}, "calibration: no entry for source 'b'"),
        ({"parameters": {"weight": 1}}, "greedy_soup has no parameter 'weight'"),
    ],
)
def test_a_request_that_is_wrong_is_named_before_any_model_is_read(
    tmp_path: Path, folders: dict[str, str], keys: dict[str, object], message: str
) -> None:
    nowhere = dict.fromkeys(folders, "/nowhere")
    path = recipe_file(tmp_path, nowhere, **{"method": "greedy_soup", **keys})
    with pytest.raises(Exception, match=message):
        run("fit", path, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()
