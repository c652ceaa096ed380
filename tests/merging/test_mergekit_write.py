"""Recipes as mergekit files: read back, every tensor has the parameters it had."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import SpecError
from evomerge.merging.layout import layout
from evomerge.merging.mergekit_write import write_mergekit
from evomerge.merging.mergekit_yaml import read_mergekit
from evomerge.merging.methods.registry import coefficients
from evomerge.merging.recipe import ModelRef, Recipe, Source

NAMES = (
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{part}.weight"
        for layer in range(4)
        for part in ("self_attn.q_proj", "self_attn.q_norm", "mlp.down_proj", "input_layernorm")
    ),
    "model.norm.weight",
    "lm_head.weight",
)
BASE, A, B = ModelRef("/m/base"), ModelRef("/m/a"), ModelRef("/m/b")
MERGEKIT = {
    "scope": "tensor",
    "ties_at_threshold": "exact",
    "sign_tie": "positive",
    "aggregate": "mean",
}
BY_TYPE = [
    {"type": "attention", "value": [0.2, 0.8]},
    {"type": "norm", "value": 0.1},
    {"type": "embedding", "value": 0.9},
    {"value": {"blocks": [0.3, 0.7]}},
]


def recipe(method: str, a: Any, b: Any, **parameters: Any) -> Recipe:
    sources = Source("a", A, {"weight": a}), Source("b", B, {"weight": b})
    return Recipe(method, BASE, sources, parameters, "float32")


@pytest.mark.parametrize(
    "written",
    [
        recipe("linear", 0.5, 0.25),
        recipe("task_arithmetic", BY_TYPE, 0.5, **{"lambda": [0.0, 1.0, 0.5]}),
        recipe("task_arithmetic", [{"filter": "q_", "value": 0.5}, {"value": 0.0}], 0.5),
        recipe("ties", [0.1, 0.9], BY_TYPE, density={"blocks": [0.2, 0.6]}, **MERGEKIT),
        recipe("dare_linear", 0.5, 0.1, rescale="none"),
        replace(
            recipe("slerp", 0, 0),
            sources=(Source("b", B), Source("a", A)),
            parameters={"t": BY_TYPE},
        ),
        recipe("nuslerp", 0.3, 0.9, vectors="column"),
        recipe("nuslerp", 0.3, 0.9, vectors="row", origin="base"),
    ],
    ids=lambda recipe: recipe.method,
)
def test_read_back_every_tensor_has_its_parameters(written: Recipe) -> None:
    document = write_mergekit(written, NAMES)
    again = read_mergekit(document, Path("/"))
    places = layout(NAMES)
    for name in NAMES:
        before, after = (coefficients(r, places[name], (4,)) for r in (written, again))
        assert (after.names, after.order) == (before.names, before.order)
        assert after.source == before.source
        assert after.recipe == before.recipe


def test_a_document_worked_by_hand() -> None:
    weight = [{"type": "mlp", "value": [0.0, 0.6]}, {"type": "embedding", "value": 0.3}]
    written = recipe("task_arithmetic", [*weight, {"value": 1.0}], 0.5)
    document = write_mergekit(replace(written, dtype="bfloat16"), NAMES)
    weights = [entry["sources"][1]["parameters"]["weight"] for entry in document["slices"]]
    assert weights[0] == [
        {"filter": "mlp", "value": 0.0},
        {"filter": "embed_tokens", "value": 0.3},
        {"value": 1.0},
    ]
    assert weights[1] == [{"filter": "mlp", "value": pytest.approx(0.2)}, {"value": 1.0}]
    assert [entry["sources"][0] for entry in document["slices"]] == [
        {"model": "/m/base", "layer_range": [layer, layer + 1]} for layer in range(4)
    ]
    assert (document["dtype"], document["out_dtype"]) == ("float32", "bfloat16")
    assert write_mergekit(replace(written, dtype=None), NAMES, dtype="float16")["out_dtype"]


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        (recipe("dare_linear", 1, 1), "rescale: mergekit has no 'unbiased'"),
        (
            recipe("ties", 1, 1, **{**MERGEKIT, "scope": "global"}),
            "scope: mergekit's ties has only 'tensor', the recipe 'global'",
        ),
        (recipe("ties", 1, 1), "sign_tie: mergekit's ties has only 'positive'"),
        (recipe("tsv_m", 1, 1), "method: mergekit has no 'tsv_m'"),
        (replace(recipe("linear", 1, 1), sources=(Source("x", A), Source("y", A))), "same model"),
        (recipe("karcher", 1, 2), "weight: mergekit's karcher has only 1.0"),
    ],
)
def test_what_mergekit_cannot_express(written: Recipe, problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        write_mergekit(written, NAMES)
    assert problem in str(caught.value)
