"""`evomerge diff` on the command line: what it prints, its exit codes, bad input in one line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_llama
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import Checkpoint
from evomerge.cli.main import main as command_line
from evomerge.merging.difference import difference

UP = "model.layers.1.mlp.up_proj.weight"
RECIPE = """
method: task_arithmetic
base: base
sources:
  a: {path: a, weight: [0.2, 0.6]}
  b: {path: b, weight: 0.3}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        small_llama.save(folder / name, seed=seed)
    (folder / "one.yaml").write_text(RECIPE)
    (folder / "two.yaml").write_text(RECIPE.replace("0.6", "0.8").replace("0.3", "0.4"))
    return folder


@pytest.fixture
def call(models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`evomerge diff ARGUMENTS...` among the models: exit code, standard output, standard error."""
    monkeypatch.chdir(models)

    def run(*arguments: str, command: str = "diff") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["evomerge", command, *arguments])
        with pytest.raises(SystemExit) as caught:
            command_line()
        said = capsys.readouterr()
        return int(caught.value.code or 0), said.out, said.err

    return run


def test_two_checkpoints(call: Any) -> None:
    code, out, _ = call("a", "b")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["layer", "type", "tensors", "|B-A|/|A|", "cosine", "max", "|B-A|", "changed"] in rows
    found = difference(Checkpoint.open("a"), Checkpoint.open("b"))
    for group in found.by_type_and_layer():
        assert group.distance.relative_norm is not None
        layer = "-" if group.layer is None else str(group.layer)
        (row,) = [row for row in rows if row[:2] == [layer, group.type]]
        assert row[2:4] == [str(group.tensors), f"{group.distance.relative_norm:.3g}"]
    assert out.splitlines()[-1] == "21 of 21 tensors differ"


def test_a_base_adds_the_task_vectors(call: Any) -> None:
    _, out, _ = call("a", "b", "--base", "base")
    assert "cos(a, b)" in out
    assert "same sign" in out
    assert "same sign" not in call("a", "b")[1]


def test_json_holds_every_figure(call: Any) -> None:
    code, out, _ = call("a", "b", "--base", "base", "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["a"], document["b"], document["base"]) == ("a", "b", "base")
    assert (document["compared"], document["identical"]) == ("models", False)
    assert len(document["tensors"]) == document["total"]["tensors"] == 21
    tensor = next(t for t in document["tensors"] if t["name"] == UP)
    a, b, base = (
        load_file(f"{name}/model.safetensors")[UP].double() for name in ("a", "b", "base")
    )
    assert tensor["relative_norm"] == pytest.approx(float((b - a).norm() / a.norm()), 1e-12)
    cosine = torch.cosine_similarity((a - base).flatten(), (b - base).flatten(), dim=0)
    assert tensor["task_vectors"]["cosine"] == pytest.approx(float(cosine), 1e-12)
    assert (tensor["type"], tensor["layer"]) == ("mlp", 1)
    assert sum(group["entries"] for group in document["groups"]) == document["total"]["entries"]


def test_exit_code_is_that_of_diff_only_when_asked(call: Any) -> None:
    assert call("a", "b")[0] == 0
    assert call("a", "b", "--exit-code")[0] == 1
    assert call("a", "a", "--exit-code")[0] == 0
    assert call("one.yaml", "two.yaml", "--exit-code")[0] == 1
    assert call("one.yaml", "one.yaml", "--exit-code")[0] == 0


def test_a_checkpoint_is_itself(call: Any) -> None:
    _, out, _ = call("a", "a")
    assert out.splitlines()[-1] == "identical: 21 tensors bit for bit, and nothing else differs"
    assert "|B-A|" not in out


def test_an_export_is_its_recipe(call: Any, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert call("one.yaml", out, command="merge")[0] == 0
    assert call("one.yaml", out, "--exit-code")[0] == 0
    assert call(f"{out}/evomerge_recipe.json", out, "--exit-code")[0] == 0
    assert call("two.yaml", out, "--exit-code")[0] == 1


def test_two_recipes(call: Any) -> None:
    code, out, _ = call("one.yaml", "two.yaml")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0
    assert ["b", "weight", "0.3", "0.4"] in rows
    assert ["a", "weight", "1", "mlp", "0.6", "0.8"] in rows
    assert not [row for row in rows if row[:3] == ["a", "weight", "0"]]
    document = json.loads(call("one.yaml", "two.yaml", "--json")[1])
    assert document["compared"] == "recipes"
    assert document["parameters"][0]["a"] == [0.2, 0.6]
    cells = document["parameters"][0]["cells"]
    assert {"type": "mlp", "layer": 1, "a": [0.6], "b": [0.8]} in cells


def test_recipes_whose_models_are_elsewhere(call: Any, tmp_path: Path) -> None:
    for name in ("one.yaml", "two.yaml"):
        text = Path(name).read_text().replace("path: ", "path: gone/")
        (tmp_path / name).write_text(text.replace("base: ", "base: gone/"))
    code, out, _ = call(str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml"))
    assert code == 0
    assert "[0.2, 0.6]" in out
    assert "not on this machine" in out


def test_an_adapter_on_its_base(call: Any, tmp_path: Path) -> None:
    import small_adapters  # skips where peft is not installed

    base = small_adapters.llama(tmp_path / "base")
    adapter = small_adapters.train(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    document = json.loads(call(str(base), f"{base}+{adapter}", "--json")[1])
    changed = [tensor["name"] for tensor in document["tensors"] if tensor["changed"]]
    assert changed == [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(2)]


def test_nan_is_named(call: Any, tmp_path: Path) -> None:
    tensors = load_file("a/model.safetensors")
    tensors[UP][0, 0] = math.nan
    shutil.copytree("a", tmp_path / "nan")
    save_file(tensors, tmp_path / "nan" / "model.safetensors")
    code, out, _ = call("a", str(tmp_path / "nan"))
    assert code == 0
    assert f"{UP}: NaN or infinity in 0 entries of A and 1 of B" in out
    json.loads(call("a", str(tmp_path / "nan"), "--json")[1], parse_constant=pytest.fail)


def test_other_architectures(call: Any, tmp_path: Path) -> None:
    small_llama.save(tmp_path / "wide", hidden_size=48, intermediate_size=80)
    code, out, _ = call("a", str(tmp_path / "wide"), "--exit-code")
    assert code == 1
    assert ["hidden_size", "32", "48"] in [line.split() for line in out.splitlines()]
    assert out.splitlines()[-1].startswith("no tensor has the same name and shape in both")
    assert len(out.splitlines()) < 30


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "a"], "nowhere: no such folder"),
        (["a", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["a", "weights.bin"], "weights.bin: "),
        (["a", "b", "--base", "nowhere"], "nowhere: no such folder"),
        (["one.yaml", "two.yaml", "--base", "base"], "two recipes are compared by what they say"),
        (["a", "bad.yaml"], "unknown merge method 'tiess'"),
    ],
)
def test_bad_input_is_one_line(models: Path, call: Any, arguments: list[str], said: str) -> None:
    (models / "weights.bin").write_bytes(b"")
    (models / "bad.yaml").write_text(RECIPE.replace("task_arithmetic", "tiess"))
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1
