"""mergekit-evolve's files as studies: the genome's shape, start and fixed parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.errors import SpecError
from evomerge.merging.layout import layout
from evomerge.merging.recipe import ModelRef
from evomerge.merging.values import resolve
from evomerge.space import check_space, load_space
from evomerge.space.mergekit_evolve import is_mergekit_evolve, read_mergekit_evolve
from evomerge.spec import StudySpec

# the shape of the file in mergekit-evolve's own guide
GUIDE = """
genome:
  models: [org/a, org/b, org/c]
  merge_method: dare_ties
  base_model: base
  tokenizer_source: base
  layer_granularity: 2
  normalize: false
  allow_negative_weights: false
  smooth: false
  filters: [self_attn, mlp]
tasks:
  - name: first
    weight: 0.5
  - name: second
    metric: "exact_match,strict"
limit: 1000
num_fewshot: 4
"""


@pytest.fixture
def read(tmp_path: Path) -> Any:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"num_hidden_layers": 6}))

    def load(text: str, **genome: Any) -> tuple[StudySpec, list[str]]:
        document = yaml.safe_load(text)
        document["genome"].update(genome)
        path = tmp_path / "my evolve.yml"
        assert is_mergekit_evolve(document)
        converted, notes = read_mergekit_evolve(document, path)
        spec, faults = StudySpec.examine_document(converted, path)
        assert spec is not None
        assert not faults
        assert isinstance(spec.space, dict)
        assert check_space(load_space(spec.space), list(spec.sources)) == []
        return spec, notes

    return load


def test_the_guides_file(read: Any, tmp_path: Path) -> None:
    spec, notes = read(GUIDE)
    assert spec.name == "my-evolve"
    assert spec.base == str(tmp_path / "base")
    assert spec.sources == {"a": "org/a", "b": "org/b", "c": "org/c"}
    assert spec.objective.num_fewshot == 4
    assert [(t.task, t.metric, t.weight) for t in spec.objective.tasks] == [
        ("first", "acc,none", 0.5),
        ("second", "exact_match,strict", 1.0),
    ]
    assert spec.budget.trials == 100
    assert spec.sampler.sigma0 == pytest.approx(1 / 6, abs=1e-4)
    assert [note.partition(":")[0] for note in notes] == [
        "limit",
        "apply_chat_template is off here, and on by default in mergekit-evolve",
        "budget",
    ]


def test_the_genome_has_mergekits_shape_and_start(read: Any) -> None:
    """(3 groups of layers, 3 models, 2 filters and the rest, weight and density) = 54 numbers."""
    spec, _ = read(GUIDE)
    genes = load_space(spec.space).genes(list(spec.sources))
    assert len(genes) == 3 * 3 * (2 + 1) * 2
    starts = {gene.name.partition("[")[0]: (gene.low, gene.init, gene.high) for gene in genes}
    assert starts == {"weight": (0.0, 1 / 3, 1.0), "density": (0.0, 1.0, 1.0)}


def test_each_number_acts_where_mergekits_does(read: Any) -> None:
    spec, _ = read(GUIDE)
    space = load_space(spec.space)
    sources = {name: ModelRef(path) for name, path in spec.sources.items()}
    genome = space.encode({"weight[b][attention][1]": 0.9, "weight[b][rest][0]": 0.7}, [*sources])
    recipe = space.decode(genome, base=ModelRef("base"), sources=sources, dtype=None, seed=0)
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(6)]
    names += [
        "model.embed_tokens.weight",
        "model.layers.1.input_layernorm.weight",
        "lm_head.weight",
    ]
    places = layout(names)
    value = recipe.sources[1].parameters["weight"]
    found = [resolve(value, places[name]) for name in names]
    third = 1 / 3
    assert found == pytest.approx([third, third, 0.9, 0.9, third, third, 0.7, 0.7, third])
    assert recipe.parameters == {
        "normalize": False,
        "lambda": 1.0,
        "rescale": "l1",
        "sign_tie": "positive",
        "aggregate": "mean",
    }


@pytest.mark.parametrize(
    ("method", "normalize"),
    [("linear", True), ("task_arithmetic", False), ("ties", True), ("dare_ties", True)],
)
def test_the_default_of_normalize(method: str, normalize: bool, read: Any) -> None:
    spec, _ = read(GUIDE, merge_method=method, normalize=None)
    assert spec.space["recipe"]["normalize"] is normalize


def test_one_set_for_the_whole_model_negative_weights_and_smooth(read: Any) -> None:
    spec, _ = read(GUIDE, layer_granularity=0, filters=None, allow_negative_weights=True)
    weight = {"per": ["source"], "low": -1.0, "high": 1.0, "init": 1 / 3}
    assert spec.space["source"]["weight"] == [weight]
    assert spec.sampler.sigma0 == pytest.approx(1 / 12, abs=1e-4)
    spec, _ = read(GUIDE, smooth=True)
    assert spec.space["source"]["weight"][0]["knots"] == 3


def test_slerp_of_two(read: Any) -> None:
    genome = {"merge_method": "slerp", "models": ["base", "org/b"], "filters": None}
    spec, notes = read(GUIDE, **genome, base_model=None)
    t = {"blocks": 3, "low": 0.0, "high": 1.0, "init": 0.5}
    assert spec.space == {"method": "slerp", "recipe": {"t": [t]}}
    assert list(spec.sources) == ["base", "b"]
    assert any("base stands as the base" in note for note in notes)


def test_the_base_is_no_source_of_task_vectors(read: Any) -> None:
    spec, _ = read(GUIDE, models=["base", "x/a", "y/a"])
    assert spec.sources == {"a": "x/a", "a_2": "y/a"}


@pytest.mark.parametrize(
    ("genome", "top", "problem"),
    [
        ({"merge_method": "della"}, {}, "genome.merge_method: unknown 'della'"),
        ({"models": []}, {}, "genome.models: expected a list"),
        ({"models": ["a+b"]}, {}, "names an adapter or a revision"),
        ({"base_model": None}, {}, "genome.base_model: missing"),
        ({"tokenizer_source": "union"}, {}, "genome.tokenizer_source"),
        ({"layer_granularity": 4}, {}, "4 does not divide the 6 layers"),
        ({"layer_granularity": -1}, {}, "layer_granularity: expected a whole number"),
        ({"base_model": "nowhere"}, {}, "the number of layers cannot be read"),
        ({"filters": ["q_proj"]}, {}, "'q_proj' is no tensor type"),
        ({"filters": ["attn", "self_attn"]}, {}, "select the same type"),
        ({"merge_method": "slerp"}, {}, "slerp merges two models here, not 3"),
        ({"merge_method": "slerp"}, {}, "slerp has neither filters nor smooth"),
        ({"model": "a"}, {}, "genome: unknown key 'model'; did you mean 'models'?"),
        ({}, {"tasks": []}, "tasks: expected a list"),
        ({}, {"tasks": [{"task": "x"}]}, "tasks.0: expected a task's name"),
        ({}, {"tasks": [{"name": "x", "weight": -1}]}, "write the weight without its sign"),
        ({}, {"tasks": [{"name": "x", "wieght": 1}]}, "unknown key 'wieght'"),
        ({}, {"apply_chat_template": True}, "apply_chat_template: true is not supported"),
        ({}, {"shufle": True}, "unknown key 'shufle'; did you mean 'shuffle'?"),
    ],
)
def test_what_is_refused(
    genome: dict[str, Any], top: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"num_hidden_layers": 6}))
    document = yaml.safe_load(GUIDE)
    document["genome"].update(genome)
    document.update(top)
    with pytest.raises(SpecError) as caught:
        read_mergekit_evolve(document, tmp_path / "evolve.yml")
    assert any(problem in line for line in caught.value.problems), caught.value.problems
