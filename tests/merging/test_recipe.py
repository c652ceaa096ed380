"""Recipes: one canonical form for one meaning; files are read, or refused with every fault."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from evomerge.errors import SpecError
from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.merging.recipe_file import load_recipe

RECIPE = Recipe(
    "ties",
    ModelRef("/models/base", "b" * 64),
    (
        Source("sort", ModelRef("/models/sort"), {"weight": 1, "density": [0.2, 0.8]}),
        Source("add", ModelRef("org/add", "a" * 64), {"weight": [{"type": "mlp", "value": 1}]}),
    ),
    {"lambda": 1},
    dtype="bfloat16",
    seed=3,
)


def test_json_brings_the_same_recipe_back() -> None:
    again = Recipe.from_json(json.loads(json.dumps(RECIPE.to_json())))
    assert again.digest == RECIPE.digest
    assert again.to_json() == RECIPE.to_json()


def test_the_digest_is_the_sha256_of_the_canonical_json() -> None:
    expected = (
        '{"base":"' + "b" * 64 + '","dtype":"bfloat16","method":"ties","parameters":{"lambda":1.0},'
        '"seed":3,"sources":[{"digest":"/models/sort","name":"sort","parameters":'
        '{"density":[0.2,0.8],"weight":1.0}},{"digest":"' + "a" * 64 + '","name":"add",'
        '"parameters":{"weight":[{"type":"mlp","value":1.0}]}}]}'
    )
    assert RECIPE.canonical() == expected
    assert RECIPE.digest == hashlib.sha256(expected.encode()).hexdigest()


@pytest.mark.parametrize(
    "same",
    [
        replace(RECIPE, parameters={"lambda": 1.0}),
        replace(RECIPE, base=ModelRef("/moved/base", "b" * 64)),
        replace(RECIPE, sources=(replace(RECIPE.sources[0]), RECIPE.sources[1])),
    ],
)
def test_one_meaning_has_one_digest(same: Recipe) -> None:
    assert same.digest == RECIPE.digest


@pytest.mark.parametrize(
    "other",
    [
        replace(RECIPE, parameters={"lambda": 1.0000000000000002}),
        replace(RECIPE, parameters={}),
        replace(RECIPE, base=ModelRef("/models/base", "c" * 64)),
        replace(RECIPE, base=None),
        replace(RECIPE, sources=RECIPE.sources[::-1]),
        replace(RECIPE, dtype=None),
        replace(RECIPE, seed=4),
        replace(RECIPE, method="linear"),
    ],
)
def test_another_meaning_has_another_digest(other: Recipe) -> None:
    assert other.digest != RECIPE.digest


def test_minus_zero_is_zero() -> None:
    zero, minus = (replace(RECIPE, parameters={"lambda": value}) for value in (0.0, -0.0))
    assert zero.digest == minus.digest


def test_digests_are_filled_in_by_path() -> None:
    known = RECIPE.with_digests({"/models/sort": "5" * 64})
    assert known.sources[0].model.digest == "5" * 64
    assert known.base == RECIPE.base
    assert known.sources[1] == RECIPE.sources[1]


def test_a_recipe_follows_its_models_by_content_when_they_move() -> None:
    known = RECIPE.with_digests({"/models/sort": "5" * 64})
    moved = known.located({"5" * 64: "/elsewhere/sort", "6" * 64: "/elsewhere/other"})
    assert moved.sources[0].model.path == "/elsewhere/sort"
    assert moved.sources[1] == RECIPE.sources[1]
    assert moved.digest == known.digest


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_is_read_and_its_paths_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "zoo" / "sort").mkdir(parents=True)
    recipe = load_recipe(
        _write(
            tmp_path / "r.yaml",
            """
            method: ties
            base: zoo
            sources:
              sort: {path: zoo/sort, weight: 0.8, density: [0.2, 0.4]}
              add: org/add
            parameters: {lambda: 1}
            seed: 2
            """,
        )
    )
    assert recipe == Recipe(
        "ties",
        ModelRef(str(tmp_path / "zoo")),
        (
            Source(
                "sort",
                ModelRef(str(tmp_path / "zoo" / "sort")),
                {"weight": 0.8, "density": [0.2, 0.4]},
            ),
            Source("add", ModelRef("org/add")),
        ),
        {"lambda": 1.0},
        seed=2,
    )


def test_the_json_of_a_recipe_is_a_recipe_file(tmp_path: Path) -> None:
    path = _write(tmp_path / "r.json", json.dumps(RECIPE.to_json()))
    assert load_recipe(path).to_json() == RECIPE.to_json()


def test_a_source_named_twice_in_a_list_is_not_lost(tmp_path: Path) -> None:
    document = RECIPE.to_json()
    document["sources"][1]["name"] = "sort"
    path = _write(tmp_path / "r.json", json.dumps(document))
    assert [source.name for source in load_recipe(path).sources] == ["sort", "sort"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[]", "a recipe is a mapping"),
        ("{method: ties}", "missing key 'sources'"),
        ("{sources: {a: b}}", "missing key 'method'"),
        ("{method: ties, sources: {a: b}, sed: 1}", "unknown key 'sed'; did you mean 'seed'?"),
        ("{method: ties, sources: []}", "sources: expected a mapping"),
        ("{method: ties, sources: [a, b]}", "sources: expected a mapping"),
        ("{method: ties, sources: {a: {weight: 1}}}", "sources.a: missing key 'path'"),
        ("{method: ties, sources: {a: 3}}", "sources.a: expected a path"),
        ("{method: ties, base: {digest: x}, sources: {a: b}}", "base: expected a path"),
        ("{method: ties, sources: {a: b}, seed: many}", "seed: expected a whole number"),
        ("{method: 3, sources: {a: b}}", "method: expected a name, got 3"),
        ("{method: ties, sources: {a: b}, dtype: 16}", "dtype: expected a name, got 16"),
        ("{method: ties, sources: {a: b}, parameters: 3}", "parameters: expected a mapping"),
        ("{method: ties, sources: {a: {path: b, weight: .nan}}}", "sources.a.weight: nan is not"),
        ("{method: ties, sources: {a: {path: b, weight: []}}}", "sources.a.weight: [] is neither"),
    ],
)
def test_a_fault_is_named(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_recipe(_write(tmp_path / "r.yaml", text))
    assert any(problem in line for line in caught.value.problems)


def test_all_faults_at_once(tmp_path: Path) -> None:
    text = "{mthod: ties, seed: 1.5, sources: {a: {weight: 1}, b: {path: x, weight: .inf}}}"
    with pytest.raises(SpecError) as caught:
        load_recipe(_write(tmp_path / "r.yaml", text))
    assert len(caught.value.problems) == 5
