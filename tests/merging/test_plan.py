"""What a merge would do, against what it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_llama
from safetensors.torch import load_file

from evomerge.merging.export import cut, export
from evomerge.merging.merge import open_merge
from evomerge.merging.plan import Plan, plan
from evomerge.merging.recipe import Group, ModelRef, Recipe, Source


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: small_llama.save(root / name, seed=s) for s, name in enumerate(("base", "a", "b"))
    }


def _recipe(folders: dict[str, Path], method: str, **options: object) -> Recipe:
    sources = tuple(Source(name, ModelRef(str(folders[name])), {"weight": 0.5}) for name in "ab")
    return Recipe(method, ModelRef(str(folders["base"])), sources, **options)


def _plan(recipe: Recipe, shard_bytes: int = 10**9) -> Plan:
    merge = open_merge(recipe)
    return plan(merge, files=len(cut(merge, shard_bytes)))


def test_bytes_and_files_are_those_of_the_export(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = _recipe(folders, "ties")
    planned = _plan(recipe, 20_000)
    export(recipe, tmp_path / "out", shard_bytes=20_000)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert planned.files == len(files)
    assert planned.written == sum(t.nbytes for path in files for t in load_file(path).values())
    stored = load_file(folders["base"] / "model.safetensors").values()
    assert planned.read == dict.fromkeys(map(str, folders.values()), sum(t.nbytes for t in stored))


def test_operations_are_those_of_the_formula(folders: dict[str, Path]) -> None:
    """A sum of two weighted models: two products and one sum for every element."""
    planned = _plan(_recipe(folders, "linear"))
    stored = load_file(folders["base"] / "model.safetensors").values()
    assert planned.elements == sum(t.numel() for t in stored)
    assert planned.flops == 3 * planned.elements
    # two differences, two products, one sum, and the base's
    assert _plan(_recipe(folders, "task_arithmetic")).flops == 6 * planned.elements


def test_a_singular_value_decomposition_grows_with_the_side(tmp_path: Path) -> None:
    costs = []
    for side in (96, 192):
        folders = {
            name: small_llama.save(tmp_path / f"{name}{side}", seed=s, hidden_size=side)
            for s, name in enumerate(("base", "a", "b"))
        }
        only = Group({"filter": "o_proj"}, "iso_c")
        recipe = _recipe(folders, "linear")
        linear, mixed = _plan(recipe), _plan(Recipe(**{**vars(recipe), "groups": (only,)}))
        costs.append((mixed.flops - linear.flops) / side**2)
    assert costs[1] / costs[0] == pytest.approx(2, rel=0.1)


def test_methods_are_counted_by_tensor(folders: dict[str, Path]) -> None:
    group = Group({"type": "mlp"}, "linear", {}, {"a": {}})
    planned = _plan(_recipe(folders, "ties", groups=(group,)))
    assert planned.methods == {"ties": planned.tensors - 6, "linear": 6}
