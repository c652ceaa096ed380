"""mergekit's files: each key means what it means in mergekit 0.1.5, or is refused by name.

Expected coefficients are what mergekit 0.1.5 itself used for a Llama of five layers, worked out
from its merged weights; `benchmarks/against_mergekit.py` compares the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.errors import SpecError
from evomerge.merging.layout import layout
from evomerge.merging.mergekit_methods import METHODS
from evomerge.merging.methods import registry
from evomerge.merging.methods.registry import coefficients
from evomerge.merging.recipe import Recipe
from evomerge.merging.recipe_file import load_recipe

NAMES = (
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{part}.weight"
        for layer in range(5)
        for part in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm")
    ),
    "model.norm.weight",
    "lm_head.weight",
)
POSITIVE = {"sign_tie": "positive"}
TO_BASE = "base_model: base\ndtype: float32\nmerge_method: "


@pytest.fixture
def read(tmp_path: Path) -> Any:
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        config = {"model_type": "llama", "num_hidden_layers": 5}
        (tmp_path / name / "config.json").write_text(json.dumps(config))

    def load(text: str) -> Recipe:
        file = tmp_path / "merge.yml"
        file.write_text(text)
        return load_recipe(file)

    return load


def course(recipe: Recipe, name: str, part: str, source: str | None = None) -> list[float]:
    """A parameter at the embeddings, in `part` of the five layers, in the norm and the head."""
    names = [n for n in NAMES if "layers" not in n or part in n]
    places = layout(NAMES)
    found = []
    for tensor in names:
        known = coefficients(recipe, places[tensor], (4,))
        value = known.source[name][known.names.index(source)] if source else known.recipe[name]
        found.append(round(float(value), 6))
    return found


def test_ties_with_its_defaults_written_out(read: Any, tmp_path: Path) -> None:
    recipe = read(
        "models: [{model: base}, {model: a, parameters: {weight: 1, density: 0.5}},"
        " {model: org/far, parameters: {weight: 0.3}}]\n"
        f"parameters: {{int8_mask: true}}\n{TO_BASE}ties"
    )
    assert recipe.to_json() == {
        "method": "ties",
        "base": {"path": str(tmp_path / "base"), "digest": None},
        "sources": [
            {
                "name": "a",
                "path": str(tmp_path / "a"),
                "digest": None,
                "parameters": {"weight": 1.0, "density": 0.5},
            },
            {
                "name": "far",
                "path": "org/far",
                "digest": None,
                "parameters": {"weight": 0.3, "density": 1.0},
            },
        ],
        "parameters": {
            "normalize": True,
            "lambda": 1.0,
            "scope": "tensor",
            "ties_at_threshold": "exact",
            "sign_tie": "positive",
            "aggregate": "mean",
        },
        "dtype": "float32",
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("linear", {"normalize": True}),
        ("task_arithmetic", {"normalize": False, "lambda": 1.0}),
        ("dare_linear", {"normalize": False, "lambda": 1.0, "rescale": "l1"}),
        (
            "dare_ties",
            {
                "normalize": False,
                "lambda": 1.0,
                "rescale": "l1",
                "sign_tie": "positive",
                "aggregate": "mean",
            },
        ),
    ],
)
def test_the_defaults_of_a_method(method: str, expected: dict[str, Any], read: Any) -> None:
    recipe = read(f"models: [{{model: a}}]\nparameters: {{weight: 0.5}}\n{TO_BASE}{method}")
    assert recipe.parameters == expected


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("nuslerp", "{}", {"vectors": "tensor", "origin": "base"}),
        ("nuslerp", "{nuslerp_flatten: false}", {"vectors": "row", "origin": "base"}),
        (
            "nuslerp",
            "{nuslerp_flatten: false, nuslerp_row_wise: true}",
            {"vectors": "column", "origin": "base"},
        ),
        ("nuslerp", "{nuslerp_row_wise: true}", {"vectors": "tensor", "origin": "base"}),
        ("multislerp", "{eps: 1e-9}", {"normalize": True, "origin": "base"}),
        ("karcher", "{max_iter: 20}", {"origin": "zero"}),
        ("ramplus_tl", "{r: 0.3}", {"r": 0.3, "alpha": 0.2, "epsilon": 1e-5}),
        ("sce", "{select_topk: 0.6}", {"density": 0.6, **POSITIVE, "uniform_below": 1e-6}),
        ("model_stock", "{filter_wise: true}", {"vectors": "row", "cosine": "free"}),
    ],
)
def test_parameters_that_have_another_name_here(
    method: str, given: str, expected: dict[str, Any], read: Any
) -> None:
    if (METHODS[method].ours or method) not in registry.METHODS:
        pytest.skip(f"no {method} here")
    weighted = METHODS[method].source
    weights = ", parameters: {weight: 0.5}" if weighted else ""
    models = f"models: [{{model: a{weights}}}, {{model: b{weights}}}]"
    recipe = read(f"{models}\nparameters: {given}\n{TO_BASE}{method}")
    assert recipe.parameters == expected
    assert len(recipe.sources) == (3 if method == "karcher" else 2)


def test_switches(read: Any) -> None:
    text = (
        "models: [{model: a, parameters: {weight: 1}}]\nparameters: {normalize: 1, rescale: %s}\n"
    )
    assert read(f"{text % 'false'}{TO_BASE}dare_ties").parameters["rescale"] == "none"
    assert read(f"{text % 'true'}{TO_BASE}dare_ties").parameters["rescale"] == "l1"
    assert read(f"{text % 'true'}{TO_BASE}task_arithmetic").parameters["normalize"] is True


def test_a_gradient_runs_over_the_layers_and_is_at_its_start_outside(read: Any) -> None:
    recipe = read(
        f"models: [{{model: a, parameters: {{weight: [0.1, 0.9]}}}}]\n{TO_BASE}task_arithmetic"
    )
    assert course(recipe, "weight", "mlp", "a") == [0.1, 0.1, 0.3, 0.5, 0.7, 0.9, 0.1, 0.1]


def test_filters_and_the_less_specific_place_where_none_fits(read: Any) -> None:
    recipe = read(
        "models: [{model: a, parameters: {weight: [{filter: q_proj, value: 0.1}]}}]\n"
        "parameters:\n  weight: [{filter: down, value: 0.4}, {filter: '*', value: 0.6}]\n"
        "  lambda: [{filter: q_proj, value: 0.1}, {value: [0.5, 0.7]}]\n"
        f"{TO_BASE}task_arithmetic"
    )
    assert course(recipe, "weight", "q_proj", "a") == [0.6, *[0.1] * 5, 0.6, 0.6]
    assert course(recipe, "weight", "down", "a") == [0.6, *[0.4] * 5, 0.6, 0.6]
    assert course(recipe, "weight", "norm", "a") == [0.6] * 8
    assert course(recipe, "lambda", "down") == [0.5, 0.5, 0.55, 0.6, 0.65, 0.7, 0.5, 0.5]
    assert course(recipe, "lambda", "q_proj") == [0.5, *[0.1] * 5, 0.5, 0.5]


SLICES = """
slices:
- sources:
  - {model: base, layer_range: [0, 2]}
  - {model: a, layer_range: [0, 2], parameters: {weight: [0.1, 0.2]}}
- sources:
  - {model: base, layer_range: [2, 3]}
  - {model: a, layer_range: [2, 3], parameters: {weight: [0.3, 0.4]}}
- sources:
  - {model: base, layer_range: [3, 5]}
  - {model: a, layer_range: [3, 5], parameters: {weight: [0.6, 0.7, 0.8]}}
"""


def test_slices_of_one_stack(read: Any) -> None:
    recipe = read(f"{SLICES}{TO_BASE}task_arithmetic")
    assert course(recipe, "weight", "mlp", "a") == [0.1, 0.1, 0.2, 0.4, 0.6, 0.8, 0.6, 0.6]


def test_a_slices_own_parameters_and_one_slice_for_all(read: Any) -> None:
    one = (
        "slices: [{sources: [{model: a, layer_range: [0, 5]}, {model: base, layer_range: [0, 5]}],"
        " parameters: {t: [0, 1]}}]\nparameters: {t: 0.7}\n"
    )
    recipe = read(f"{one}{TO_BASE}slerp")
    assert [source.name for source in recipe.sources] == ["base", "a"]
    assert course(recipe, "t", "mlp") == [0, 0, 0.25, 0.5, 0.75, 1, 0, 0]


def test_layers_of_two_models_stacked(read: Any, tmp_path: Path) -> None:
    recipe = read("""
slices:
- sources: [{model: a, layer_range: [0, 3]}]
- sources: [{model: b, layer_range: [1, 4]}]
- sources: [{model: b, layer_range: [2, 5], parameters: {scale: [{filter: down, value: 0}]}}]
merge_method: passthrough
dtype: float32
parameters: {scale: 1.0}
""")
    assert [source.model.path for source in recipe.sources] == [str(tmp_path / n) for n in "ab"]
    assert recipe.slices == ({"a": (0, 3)}, {"b": (1, 4)}, {"b": (2, 5)})
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(9)]
    places = layout(names)
    part = Recipe("passthrough", None, recipe.sources[1:])
    scales = [coefficients(part, places[n], (4,)).source["scale"] for n in names[3:]]
    assert scales == [(1,)] * 3 + [(0,)] * 3


def test_a_stack_of_merges_with_a_gradient_in_one_slice(read: Any) -> None:
    """Depth runs over the slice, wherever in the result that lies."""
    recipe = read("""
slices:
- sources: [{model: base, layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}]
- sources:
  - {model: base, layer_range: [1, 4]}
  - {model: a, layer_range: [2, 5], parameters: {weight: [0.0, 1.0]}}
  - {model: a, layer_range: [0, 3], parameters: {weight: 0.5}}
merge_method: task_arithmetic
base_model: base
parameters: {weight: 2}
""")
    assert recipe.slices == (
        {"base": (0, 2), "a": (0, 2)},
        {"base": (1, 4), "a": (2, 5), "a_2": (0, 3)},
    )
    assert course(recipe, "weight", "mlp", "a")[1:6] == [2.0, 2.0, 0.0, 0.5, 1.0]
    assert course(recipe, "weight", "mlp", "a_2")[3:6] == [0.5] * 3


def test_adapters_and_revisions_are_models(read: Any, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    recipe = read(
        "models: [{model: a+lora}, {model: {model: {path: b}, lora: {path: lora}}},"
        " {model: org/far@v1}, {model: {model: {path: org/far, revision: v2}}}]\n"
        f"parameters: {{weight: 1}}\n{TO_BASE}ties"
    )
    assert [source.model.path for source in recipe.sources] == [
        f"{tmp_path / 'a'}+{tmp_path / 'lora'}",
        f"{tmp_path / 'b'}+{tmp_path / 'lora'}",
        "org/far@v1",
        "org/far@v2",
    ]
    assert [source.name for source in recipe.sources] == ["lora", "lora_2", "far@v1", "far@v2"]


def test_a_file_of_one_module(read: Any) -> None:
    """mergekit-evolve writes its results so."""
    plain = read(f"{SLICES}{TO_BASE}task_arithmetic")
    inner = SLICES.strip().replace("\n", "\n    ")
    wrapped = read(f"modules:\n  default:\n    {inner}\n{TO_BASE}task_arithmetic")
    assert wrapped.to_json() == plain.to_json()


def test_slerp_whose_slices_start_from_either_model(read: Any) -> None:
    text = """
slices:
- sources: [{model: a, layer_range: [0, 2]}, {model: base, layer_range: [0, 2]}]
  base_model: base
  parameters: {t: 0.2}
- sources: [{model: a, layer_range: [2, 5]}, {model: base, layer_range: [2, 5]}]
  base_model: a
merge_method: slerp
parameters: {t: [0.3, 0.5]}
"""
    recipe = read(text)
    assert recipe.dtype is None
    assert course(recipe, "t", "mlp") == [0.2, 0.2, 0.2, 0.7, 0.6, 0.5, 0.7, 0.7]


def test_slerp_starts_from_the_base_listed_or_not(read: Any) -> None:
    for models in ("[{model: a}]", "[{model: a}, {model: base}]"):
        recipe = read(f"models: {models}\nparameters: {{t: 0.3}}\n{TO_BASE}slerp")
        assert [source.name for source in recipe.sources] == ["base", "a"]
        assert recipe.parameters == {"t": 0.3}


def test_the_base_is_one_more_model_of_a_linear_merge(read: Any) -> None:
    recipe = read(f"models: [{{model: a}}]\nparameters: {{weight: 0.7}}\n{TO_BASE}linear")
    assert [source.name for source in recipe.sources] == ["base", "a"]
    assert course(recipe, "weight", "mlp", "base") == [0.7] * 8


def test_out_dtype_is_what_the_result_is_rounded_to(read: Any) -> None:
    text = f"models: [{{model: a, parameters: {{weight: 1}}}}]\n{TO_BASE}ties\nout_dtype: bfloat16"
    assert read(text).dtype == "bfloat16"


def test_two_models_whose_folders_share_a_name(read: Any) -> None:
    models = "[{model: x/a, parameters: {weight: 1}}, {model: y/a, parameters: {weight: 1}}]"
    assert [s.name for s in read(f"models: {models}\n{TO_BASE}ties").sources] == ["a", "a_2"]


WEIGHTED = "models: [{model: a, parameters: {weight: 1}}]\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"{WEIGHTED}merge_method: ties", "base_model: missing"),
        (f"models: [{{model: a}}]\n{TO_BASE}ties", "models.0: ties needs 'weight'"),
        (f"{WEIGHTED}{TO_BASE}tise", "merge_method: unknown 'tise'; did you mean 'ties'?"),
        (f"{WEIGHTED}{TO_BASE}ties\nmodules: {{a: {{}}, b: {{}}}}", "modules: "),
        (f"{WEIGHTED}{TO_BASE}ties\nchat_template: [chatml]", "chat_template: expected a name"),
        (f"{WEIGHTED}{TO_BASE}ties\ntokenizer_source: [a]", "tokenizer_source: base, union, inter"),
        (f"{WEIGHTED}{TO_BASE}ties\ntokenizer: {{source: b}}", "tokenizer: 'b' is not one of the"),
        (
            f"{WEIGHTED}{TO_BASE}ties\ntokenizer: {{source: base, tokens: {{x: {{}}}}}}",
            "tokenizer.tokens.x: ",
        ),
        (
            f"{WEIGHTED}{TO_BASE}ties\ntokenizer: {{source: base}}\ntokenizer_source: base",
            "tokenizer: give it or tokenizer_source, not both",
        ),
        (f"{WEIGHTED}{TO_BASE}ties\nout_dtype: int8", "out_dtype: expected float32"),
        (f"{WEIGHTED}{TO_BASE}ties\nmerge: 1", "unknown key 'merge'"),
        (f"{WEIGHTED}{TO_BASE}ties\nparameters: {{rescale: true}}", "rescale: our ties cannot"),
        (f"{WEIGHTED}{TO_BASE}ties\nparameters: {{gamma: 1}}", "parameters.gamma: ties has no"),
        (
            f"models: [{{model: a, parameters: {{weight: 1, lambda: 2}}}}]\n{TO_BASE}ties",
            "models.0.parameters.lambda: belongs to the merge",
        ),
        (
            f"models: [{{model: {{path: [a]}}, parameters: {{weight: 1}}}}]\n{TO_BASE}ties",
            "models.0.model: expected a path",
        ),
        (f"{WEIGHTED}slices: []\n{TO_BASE}ties", "expected one of models and slices, got models a"),
        (f"models: [{{model: a}}, {{model: a}}]\n{TO_BASE}ties", "models.1.model: 'a' is listed"),
        (
            f"{SLICES.replace('a, layer_range: [2, 3]', 'a, layer_range: [1, 3]')}{TO_BASE}ties",
            "slices.1.sources: expected layer_range [first, end] of one length for all",
        ),
        (f"{SLICES.replace('[3, 5]', '[5, 3]')}{TO_BASE}ties", "slices.2.sources: expected layer"),
        (
            f"{SLICES.replace('{model: base, layer_range: [2, 3]}', '')}{TO_BASE}ties",
            "slices.1.sources",
        ),
        ("models: [{model: a}, {model: b}]\nmerge_method: slerp\nparameters: {t: 1}", "base_model"),
        (f"models: [{{model: a}}]\n{TO_BASE}slerp", "slerp needs 't'"),
        (
            "models: [{model: a, parameters: {weight: [{filter: q, value: 1}]}}]\n"
            f"{TO_BASE}ties",
            "end its filters with a bare value",
        ),
        (
            f"models: [{{model: a, parameters: {{weight: x}}}}]\n{TO_BASE}ties",
            "weight: expected a n",
        ),
        ("genome: {models: [a]}", "`evomerge run FILE`"),
    ],
)
def test_what_is_refused_and_how(text: str, problem: str, read: Any) -> None:
    with pytest.raises(SpecError) as caught:
        read(text)
    assert any(problem in line for line in caught.value.problems), caught.value.problems


def test_every_problem_in_one_go(read: Any) -> None:
    text = f"models: [{{model: 3}}, {{mode: b}}]\nchat_template: []\ndtype: int4\n{TO_BASE}tis"
    with pytest.raises(SpecError) as caught:
        read(text.replace("dtype: float32\n", ""))
    assert len(caught.value.problems) == 5


def test_yaml_of_a_real_file(read: Any) -> None:
    """The gradient-slerp example that mergekit's users start from."""
    curves = [
        {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
        {"value": 0.5},
    ]
    sources = [{"model": name, "layer_range": [0, 5]} for name in ("base", "b")]
    document = {
        "slices": [{"sources": sources}],
        "merge_method": "slerp",
        "base_model": "base",
        "parameters": {"t": curves},
        "dtype": "float16",
    }
    recipe = read(yaml.safe_dump(document))
    assert course(recipe, "t", "self_attn") == [0.5, 0, 0.5, 0.3, 0.7, 1, 0.5, 0.5]
    assert course(recipe, "t", "mlp") == [0.5, 1, 0.5, 0.7, 0.3, 0, 0.5, 0.5]
    assert course(recipe, "t", "input_layernorm") == [0.5] * 8
