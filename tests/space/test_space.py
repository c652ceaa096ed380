"""The grammar, the genes and decoding, on spaces small enough to work by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit

from evomerge.errors import SpecError
from evomerge.merging.recipe import ModelRef
from evomerge.space import load_space, show
from evomerge.space.scales import from_unit, to_unit

SCALE = {"name": "scale", "per": "source", "low": 0.0, "high": 2.0, "init": 0.5}
CURVE = {
    "name": "curve",
    "per": "type",
    "types": ["mlp", "embedding"],
    "knots": 2,
    "low": 0.5,
    "high": 1.5,
    "init": 1.0,
}
DENSITY = {"blocks": 2, "low": 0.01, "high": 1.0, "init": 0.1, "scale": "log"}
DOCUMENT = {
    "method": "ties",
    "source": {"weight": [SCALE, CURVE], "density": [DENSITY]},
    "recipe": {"lambda": 1, "normalize": False},
}
MODELS = {"b": ModelRef("zoo/b"), "a": ModelRef("zoo/a")}


def decode(document, genome, models=MODELS):
    space = load_space(document)
    return space.decode(genome, base=ModelRef("zoo/base"), sources=models, dtype=None, seed=3)


def faults(document) -> list[str]:
    with pytest.raises(SpecError) as error:
        load_space(document)
    return error.value.problems


def test_genes_by_parameter_then_factor_then_source_type_and_depth():
    genes = load_space(DOCUMENT).genes(["b", "a"])
    assert {gene.name: gene.does for gene in genes} == {
        "density[0]": "density from depth 0 to 0.5",
        "density[1]": "density from depth 0.5 to 1",
        "weight.scale[b]": "factor on weight of source b",
        "weight.scale[a]": "factor on weight of source a",
        "weight.curve[mlp][0]": "factor on weight in mlp tensors at the first layer",
        "weight.curve[mlp][1]": "factor on weight in mlp tensors at the last layer",
        "weight.curve[embedding]": "factor on weight in embedding tensors",
    }


def test_decoding_worked_by_hand():
    recipe = decode(DOCUMENT, (0.0, 1.0, 0.25, 1.0, 0.0, 0.5, 1.0))
    assert recipe.parameters == {"lambda": 1.0, "normalize": False}
    assert [source.name for source in recipe.sources] == ["b", "a"]
    assert recipe.sources[1].parameters == {
        "density": {"blocks": [0.01, 1.0]},
        "weight": [
            {"type": "mlp", "value": [2.0 * 0.5, 2.0 * 1.0]},
            {"type": "embedding", "value": 2.0 * 1.5},
            {"value": 2.0},
        ],
    }
    assert recipe.sources[0].parameters["weight"][0] == {"type": "mlp", "value": [0.25, 0.5]}
    assert recipe.canonical() == (
        '{"base":"zoo/base","dtype":null,"method":"ties",'
        '"parameters":{"lambda":1.0,"normalize":false},"seed":3,"sources":['
        '{"digest":"zoo/b","name":"b","parameters":{"density":{"blocks":[0.01,1.0]},'
        '"weight":[{"type":"mlp","value":[0.25,0.5]},{"type":"embedding","value":0.75},'
        '{"value":0.5}]}},'
        '{"digest":"zoo/a","name":"a","parameters":{"density":{"blocks":[0.01,1.0]},'
        '"weight":[{"type":"mlp","value":[1.0,2.0]},{"type":"embedding","value":3.0},'
        '{"value":2.0}]}}]}'
    )


def test_a_type_not_listed_keeps_the_factor_at_its_start():
    t = {"per": "type", "types": ["mlp"], "low": 0.0, "high": 1.0, "init": 0.25}
    recipe = decode({"method": "slerp", "recipe": {"t": [t]}}, (1.0,))
    assert recipe.parameters == {"t": [{"type": "mlp", "value": 1.0}, {"value": 0.25}]}


def test_the_rest_shares_genes():
    factor = {"per": "type", "types": ["mlp", "rest"], "low": 0.0, "high": 1.0, "init": 0.5}
    space = load_space({"method": "linear", "source": {"weight": [factor]}})
    assert [gene.name for gene in space.genes(["a"])] == ["weight[mlp]", "weight[rest]"]
    recipe = space.decode(
        [0.2, 0.9], base=ModelRef("b"), sources={"a": ModelRef("a")}, dtype=None, seed=0
    )
    expected = [{"type": "mlp", "value": 0.2}, {"value": 0.9}]
    assert recipe.sources[0].parameters["weight"] == expected


def test_the_genome_does_not_depend_on_the_order_of_keys():
    turned = {
        key: dict(reversed(value.items())) if isinstance(value, dict) else value
        for key, value in reversed(DOCUMENT.items())
    }
    genome = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    assert decode(turned, genome).digest == decode(DOCUMENT, genome).digest


def test_encode_and_decode_are_inverse():
    space = load_space(DOCUMENT)
    genome = space.encode({"weight.scale[a]": 1.25, "density[1]": 0.02}, ["b", "a"])
    recipe = decode(DOCUMENT, genome)
    assert recipe.sources[1].parameters["weight"][2]["value"] == pytest.approx(1.25)
    assert recipe.sources[1].parameters["density"]["blocks"] == pytest.approx([0.1, 0.02])
    assert recipe.sources[0].parameters["weight"][2]["value"] == pytest.approx(0.5)


@pytest.mark.parametrize("values", [{"weight.scale[c]": 1.0}, {"weight.scale[a]": 2.5}])
def test_encode_refuses_what_is_not_in_the_space(values):
    with pytest.raises(ValueError, match="scale"):
        load_space(DOCUMENT).encode(values, ["a", "b"])


@pytest.mark.parametrize("genome", [(0.5,) * 6, (0.5,) * 6 + (1.01,), (0.5,) * 6 + (float("nan"),)])
def test_decode_refuses_what_is_no_genome(genome):
    with pytest.raises(ValueError, match="gene"):
        decode(DOCUMENT, genome)


@given(st.floats(0, 1), st.floats(0.01, 0.4), st.floats(0.5, 0.99))
def test_scales(u, low, high):
    assert from_unit(u, low=low, high=high, scale="linear") == pytest.approx(low + u * (high - low))
    log = low * (high / low) ** u
    assert from_unit(u, low=low, high=high, scale="log") == pytest.approx(log)
    mixed = expit(logit(low) + u * (logit(high) - logit(low)))
    assert from_unit(u, low=low, high=high, scale="logit") == pytest.approx(mixed)
    for scale in ("linear", "log", "logit"):
        value = from_unit(u, low=low, high=high, scale=scale)
        assert low <= value <= high
        assert to_unit(value, low=low, high=high, scale=scale) == pytest.approx(u, abs=1e-9)
        ends = [from_unit(end, low=low, high=high, scale=scale) for end in (0.0, 1.0)]
        assert ends == [low, high]


ascending = st.lists(
    st.floats(-1e6, 1e6).map(lambda x: x + 0.0), min_size=2, max_size=70, unique=True
).map(sorted)


@given(ascending, st.floats(0, 1), st.integers(0, 69))
def test_a_discrete_gene_is_exactly_one_of_its_values(values, u, place):
    level = place % len(values)
    document = {
        "method": "ties",
        "source": {"density": [{"values": values, "init": values[level]}]},
    }
    space = load_space(document)
    assert load_space(space.to_json()) == space
    (gene,) = space.genes(["a"])
    assert (gene.levels, gene.low, gene.high) == (len(values), values[0], values[-1])
    # exactly the value written, and back to the middle of its cell
    (start,) = space.start(["a"])
    assert gene.value(start) == gene.init == values[level]
    assert start == (level + 0.5) / len(values)
    recipe = decode(document, (u,), models={"a": ModelRef("a")})
    found = recipe.sources[0].parameters["density"]
    assert found in values
    assert values.index(found) == sum(u >= k / len(values) for k in range(1, len(values)))
    assert gene.value(gene.unit(found)) == found
    assert [gene.value(end) for end in (0.0, 1.0)] == [values[0], values[-1]]


def test_values_on_runs_of_depth_beside_a_factor_for_each_source():
    document = {
        "method": "ties",
        "source": {
            "weight": [{**DISCRETE, "name": "step", "blocks": 2}, {**SCALE, "name": "own"}],
        },
    }
    recipe = decode(document, (0.2, 0.9, 0.5, 0.25))
    assert [source.parameters["weight"] for source in recipe.sources] == [
        {"blocks": [0.1, 0.5]},
        {"blocks": [0.5 * 0.1, 0.5 * 0.5]},
    ]
    space = load_space(document)
    genome = space.encode({"weight.step[1]": 0.5}, ["b", "a"])
    assert genome[:2] == (0.5, 2.5 / 3)
    with pytest.raises(ValueError, match=r"weight.step\[1\]: 0.2 is not one of 0.1, 0.3, 0.5"):
        space.encode({"weight.step[1]": 0.2}, ["b", "a"])


def test_every_fault_of_a_document_is_reported_at_once():
    document = {
        "methd": "ties",
        "source": {
            "weight": [
                {**SCALE, "low": 3.0},
                {**CURVE, "types": ["mpl"]},
                {"name": "x", "lo": 0.0, "low": 0.0, "high": "1", "init": 0.5},
            ],
            "density": [{**DENSITY, "low": 0.0, "init": 0.0}],
            "other": [{**SCALE, "init": 5.0}],
            "empty": [],
            "nothing": None,
        },
    }
    assert faults(document) == [
        "missing key 'method'",
        "source.weight.0: low must be below high, got low 3 and high 2",
        "source.weight.1.types: unknown type 'mpl'; did you mean 'mlp'?",
        "source.weight.2.high: expected a number, got '1'",
        "unknown key 'source.weight.2.lo'; did you mean 'low'?",
        "source.density.0: scale log needs low > 0, got low 0",
        "source.other.0: init 5 lies outside [0, 2]",
        "source.empty: expected at least one factor",
        "source.nothing: expected a fixed value, a choice {choices, init}, or a list of factors"
        " {low, high, init, ...}",
        "unknown key 'methd'; did you mean 'method'?",
    ]


@pytest.mark.parametrize(
    ("factors", "fault"),
    [
        ([SCALE, {**SCALE}], "several factors are named 'scale'"),
        ([SCALE, DENSITY], "each of several factors needs a name"),
        ([CURVE, {**DENSITY, "name": "block"}], "only one factor of a parameter may vary"),
        ([{**SCALE, "per": ["type"]}], "per type needs types"),
        ([{**SCALE, "types": ["mlp"]}], "types is given, but per does not hold type"),
        ([{**CURVE, "blocks": 3}], "knots and blocks are two ways"),
        ([{**CURVE, "types": ["mlp", "mlp"]}], "type 'mlp' is listed twice"),
        ([{**SCALE, "per": ["source", "source"]}], "per lists 'source' twice"),
        ([{**SCALE, "scale": "logit"}], "scale logit needs 0 < low"),
        ([{**SCALE, "low": float("nan")}], "finite number"),
        ([{**SCALE, "low": True}], "a number"),
        ([{**CURVE, "knots": 1}], "greater than or equal to 2"),
        (float("inf"), "finite number"),
    ],
)
def test_each_fault_is_named(factors, fault):
    found = faults({"method": "ties", "source": {"weight": factors}})
    assert len(found) == 1
    assert found[0].startswith("source.weight")
    assert fault in found[0]


DISCRETE = {"values": [0.1, 0.3, 0.5], "init": 0.3}


@pytest.mark.parametrize(
    ("factor", "fault"),
    [
        ({**DISCRETE, "low": 0.1}, "values stand in place of low; give one or the other"),
        ({**DISCRETE, "high": 1, "scale": "log"}, "values stand in place of high and scale"),
        ({**DISCRETE, "init": 0.44}, "init 0.44 is none of the values; the nearest is 0.5"),
        ({**DISCRETE, "knots": 3}, "values with knots: between two knots lies what is no value"),
        ({"values": [0.5, 0.1], "init": 0.1}, "values must ascend, each once; got 0.5 before 0.1"),
        ({"values": [1, 1.0], "init": 1}, "values must ascend, each once; got 1 before 1"),
        ({"values": [0.5], "init": 0.5}, "values holds one number; write it as the parameter's"),
        ({"values": ["a", 1], "init": 1}, "expected a number, got 'a'"),
        ({"values": 3, "init": 3}, "expected a list, got 3"),
        ({"valeus": [0.1, 0.3], "init": 0.3}, "valeus'; did you mean 'values'?"),
        ({"values": [], "init": 0.3}, "missing low and high; a factor has low and high, or values"),
        ({"low": 0.0, "init": 0.3}, "missing high; a factor has low and high, or values"),
    ],
)
def test_each_fault_of_values_is_named(factor, fault):
    found = faults({"method": "ties", "source": {"density": [factor]}})
    assert len(found) == 1
    assert "source.density.0" in found[0]
    assert fault in found[0]


def test_a_space_that_searches_nothing_is_refused():
    assert "nothing is searched" in faults({"method": "ties", "source": {"weight": 0.5}})[0]


def test_unknown_names_and_files():
    assert "did you mean 'source_depth'?" in faults("source_dept")[0]
    assert "known: adamerging, dam, dare_ties_blocks" in faults("source_dept")[0]
    assert "known: adamerging, dam, dare_ties_blocks" in faults("zzz")[0]
    assert faults("nowhere/space.yaml") == ["no such file"]


def test_a_file_is_read_like_a_mapping(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: linear\nsource: {weight: [{low: 0, high: 1, init: 0.5}]}\n")
    assert load_space(str(path)).genes(["a"])[0].name == "weight"
    path.write_text("- method\n")
    assert "is a mapping" in faults(str(path))[0]


def test_show_needs_no_sources():
    rows = show(load_space("source_scalar"))
    assert [row["name"] for row in rows] == ["weight[source_1]", "weight[source_2]"]
    assert rows[1] == {
        "index": 1,
        "name": "weight[source_2]",
        "low": 0.0,
        "high": 1.5,
        "init": 0.4,
        "scale": "linear",
        "values": None,
        "does": "weight of source source_2",
    }
    assert [row["name"] for row in show(load_space("source_scalar"), ["x"])] == ["weight[x]"]


def test_spaces_and_their_genomes_need_no_torch():
    code = (
        "import sys; from evomerge.space import load_space, show; show(load_space('ties_blocks'));"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'optuna', 'cmaes')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


CHOICES = {
    "method": "m_smoe",
    "recipe": {
        "keep": 2.0,
        "similarity": {"choices": ["router_logits", "outputs", "features"], "init": "outputs"},
    },
}


def test_a_choice_is_one_gene_with_a_cell_for_each_word():
    space = load_space(CHOICES)
    (gene,) = space.genes(["a"])
    assert (gene.name, gene.levels, gene.shown) == ("similarity", 3, tuple(SIMILARITIES))
    assert space.start(["a"]) == (0.5,)
    found = [decode(CHOICES, (u,)).parameters["similarity"] for u in (0.0, 0.34, 0.5, 0.67, 1.0)]
    assert found == ["router_logits", "outputs", "outputs", "features", "features"]
    assert load_space(space.to_json()) == space
    (row,) = show(space, ["a"])
    assert (row["values"], row["init"]) == (SIMILARITIES, "outputs")


SIMILARITIES = CHOICES["recipe"]["similarity"]["choices"]


def test_a_switch_is_a_choice_of_true_and_false():
    document = {"method": "ties", "recipe": {"normalize": {"choices": [False, True], "init": True}}}
    assert [decode(document, (u,)).parameters["normalize"] for u in (0.2, 0.8)] == [False, True]
    assert load_space(document).start(["a"]) == (0.75,)


@pytest.mark.parametrize(
    ("choice", "fault"),
    [
        ({"choices": ["a"], "init": "a"}, "fewer than two"),
        ({"choices": ["a", "b", "a"], "init": "a"}, "lists 'a' twice"),
        ({"choices": ["a", "b"], "init": "c"}, "init 'c' is none of the choices"),
        ({"choices": ["a", "b"], "init": "a", "low": 0}, "low"),
        ({"choices": ["a", 2], "init": "a"}, "choices"),
    ],
)
def test_faults_of_a_choice(choice, fault):
    (line,) = faults({"method": "m_smoe", "recipe": {"similarity": choice}})[:1]
    assert "recipe.similarity" in line
    assert fault in line
