"""Recipes in parts: other methods for some tensors, and layers stacked anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_llama
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from evomerge.checkpoints import Checkpoint
from evomerge.errors import EvomergeError, SpecError
from evomerge.merging.export import export
from evomerge.merging.merge import Merge
from evomerge.merging.methods.registry import check
from evomerge.merging.recipe import Group, ModelRef, Recipe, Source
from evomerge.merging.recipe_file import load_recipe

DEPTH = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: small_llama.save(root / name, seed=seed, num_hidden_layers=DEPTH)
        for seed, name in enumerate(("base", "a", "b", "c"))
    }


def _recipe(folders: dict[str, Path], *sources: str, **options: Any) -> Recipe:
    named = tuple(Source(name, ModelRef(str(folders[name]))) for name in sources)
    base = ModelRef(str(folders["base"]))
    return Recipe(**{"method": "ties", "base": base, "sources": named, **options})


def _merge(recipe: Recipe) -> Merge:
    models = [*([recipe.base] if recipe.base else []), *(s.model for s in recipe.sources)]
    return Merge(recipe, {model.path: Checkpoint.open(model.path) for model in models})


def test_a_group_is_merged_by_its_own_method_and_nothing_else_is(folders: dict[str, Path]) -> None:
    whole = _recipe(folders, "a", "b", "c", parameters={"density": 0.5})
    own = {"a": {"weight": 1.0}, "c": {"weight": 3.0}}
    mixed = _merge(
        replace(
            whole,
            groups=(
                Group({"type": "mlp", "layers": (1, 3)}, "linear", {"normalize": True}, own),
                Group({"filter": "k_proj"}, "task_arithmetic", {"lambda": 0.5}),
            ),
        )
    )
    ties = _merge(whole)
    soup = _merge(
        _recipe(
            folders,
            method="linear",
            sources=tuple(Source(n, ModelRef(str(folders[n])), p) for n, p in own.items()),
        )
    )
    arithmetic = _merge(
        _recipe(folders, "a", "b", "c", method="task_arithmetic", parameters={"lambda": 0.5})
    )
    seen = {"linear": 0, "task_arithmetic": 0, "ties": 0}
    for name in mixed.names:
        expected = ties
        if ".mlp." in name and (".1." in name or ".2." in name):
            expected = soup
        elif "k_proj" in name:
            expected = arithmetic
        assert torch.equal(mixed.tensor(name), expected.tensor(name)), name
        assert mixed.method(name) is expected.method(name)
        seen[mixed.method(name).name] += 1
    assert seen == {"linear": 6, "task_arithmetic": 4, "ties": len(mixed.names) - 10}


def test_depth_runs_over_a_groups_layers(folders: dict[str, Path]) -> None:
    group = Group({"layers": (1, 4)}, "task_arithmetic", {"lambda": [0.0, 1.0]})
    merge = _merge(_recipe(folders, "a", groups=(group,)))
    scales = [
        merge.coefficients(f"model.layers.{layer}.mlp.up_proj.weight").number("lambda")
        for layer in (1, 2, 3)
    ]
    assert scales == [0.0, 0.5, 1.0]


def test_groups_of_global_scope_are_surveyed_apart(folders: dict[str, Path]) -> None:
    """A global trim runs over the tensors of its own part only."""
    scope = {"scope": "global", "density": 0.3}
    group = Group({"type": "mlp"}, "ties", scope)
    mixed = _merge(_recipe(folders, "a", "b", groups=(group,), parameters=scope))
    whole = _merge(_recipe(folders, "a", "b", parameters=scope))
    kept = {}
    for merge in (mixed, whole):
        base = Checkpoint.open(str(folders["base"]))
        changed = [merge.tensor(n) != base.tensor(n) for n in merge.names if ".mlp." in n]
        kept[merge] = sum(int(c.sum()) for c in changed) / sum(c.numel() for c in changed)
    assert kept[mixed] != kept[whole]


@pytest.mark.parametrize(
    ("group", "problem"),
    [
        (Group({"type": "mlp"}, "tise"), "groups.0: unknown merge method 'tise'"),
        (Group({"type": "mpl"}, "ties"), "groups.0: unknown tensor type 'mpl'"),
        (Group({}, "ties"), "groups.0: fits every tensor"),
        (Group({"type": "mlp"}, "slerp"), "groups.0: slerp merges exactly 2 sources"),
        (Group({"type": "mlp"}, "ties", {"t": 0.1}), "groups.0: parameters.t: ties has no"),
        (Group({"type": "mlp"}, "ties", {}, {"z": {}}), "groups.0.sources.z: no such source"),
        (
            Group({"type": "mlp"}, "ties", {}, {"a": {"weihgt": 1.0}}),
            "groups.0: sources.a.weihgt: ties has no parameter 'weihgt'",
        ),
    ],
)
def test_a_broken_group_is_refused(folders: dict[str, Path], group: Group, problem: str) -> None:
    faults = check(_recipe(folders, "a", "b", "c", groups=(group,)))
    assert any(fault.startswith(problem) for fault in faults), faults


FRANKEN = """
method: passthrough
sources: {{a: {a}, b: {b}}}
slices:
  - {{a: [0, 3]}}
  - {{b: [1, 4]}}
"""


def test_a_frankenmerge_is_the_stack_of_its_layers(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(FRANKEN.format(**folders))
    export(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    a, b = (load_file(folders[name] / "model.safetensors") for name in "ab")
    expected = {"model.embed_tokens.weight": a["model.embed_tokens.weight"]}
    expected |= {name: b[name] for name in ("model.norm.weight", "lm_head.weight")}
    for layer, (model, own) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        inside = f"model.layers.{own}."
        for name in (name for name in model if name.startswith(inside)):
            expected[name.replace(inside, f"model.layers.{layer}.")] = model[name]
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def test_slices_may_merge_and_leave_sources_out(folders: dict[str, Path]) -> None:
    merge = _merge(
        _recipe(
            folders,
            "a",
            "b",
            method="task_arithmetic",
            slices=({"base": (0, 2), "a": (0, 2)}, {"base": (2, 4), "b": (1, 3), "a": (2, 4)}),
        )
    )
    base, a, b = (load_file(folders[n] / "model.safetensors") for n in ("base", "a", "b"))
    low, high, own = (f"model.layers.{n}.mlp.up_proj.weight" for n in (1, 3, 2))
    assert torch.equal(merge.tensor(low), a[low])
    expected = base[high].float() + (
        (a[high].float() - base[high].float()) + (b[own].float() - base[high].float())
    )
    assert torch.equal(merge.tensor(high), expected.bfloat16())
    assert merge.coefficients(low).names == ("a",)


@pytest.mark.parametrize(
    ("slices", "problem"),
    [
        (({"z": (0, 2)},), "slices.0: 'z' is no source"),
        (({"a": (0, 2), "b": (0, 3)},), "slices.0: layer ranges of one length"),
        (({"a": (0, 9)},), "has 4 layers, the recipe's slices ask for layer 4"),
    ],
)
def test_a_broken_slice_is_refused(
    folders: dict[str, Path], slices: tuple[dict[str, tuple[int, int]], ...], problem: str
) -> None:
    recipe = _recipe(folders, "a", "b", method="linear", base=None, slices=slices)
    with pytest.raises(EvomergeError) as caught:
        _merge(recipe)
    assert problem in str(caught.value)


def test_parts_survive_json_and_leave_other_digests_alone(folders: dict[str, Path]) -> None:
    plain = _recipe(folders, "a", "b")
    assert "groups" not in plain.to_json()
    assert "slices" not in plain.to_json()
    group = Group({"layers": (0, 2)}, "linear", {}, {"a": {"weight": 0.3}})
    recipe = replace(plain, groups=(group,), slices=({"base": (0, 4), "a": (0, 4)},))
    again = Recipe.from_json(recipe.to_json())
    assert again.digest == recipe.digest
    assert again.digest != plain.digest


def test_a_typo_in_a_recipe_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "method: linear\nsources: {a: a}\ngroups: [{typ: mlp, method: linear}]\nslices: [{a: 3}]\n"
    )
    with pytest.raises(SpecError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert "groups.0: unknown key 'typ'; did you mean 'type'?" in caught.value.problems
    assert any(line.startswith("slices.0: expected a mapping") for line in caught.value.problems)
