"""Every file of `search_spaces/` is a test case."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.merging.layout import layout
from evomerge.merging.methods.registry import ALL, check, coefficients
from evomerge.merging.recipe import ModelRef, Recipe
from evomerge.space import Space, check_space, load_space, shipped_spaces

NAMES = [
    "adamerging",
    "dam",
    "dare_ties_blocks",
    "fisher",
    "learned_soup",
    "m_smoe",
    "mats",
    "pleas",
    "regmean",
    "sens_merging",
    "slerp_depth",
    "source_depth",
    "source_scalar",
    "ties_blocks",
]
_PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "input_layernorm")
TENSORS = [
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.{part}.weight" for layer in range(8) for part in _PARTS),
    "model.norm.weight",
    "lm_head.weight",
]


def sources(space: Space) -> list[str]:
    return ["math", "code", "chat"][: ALL[space.method].max_sources]


def decoded(space: Space, genome: tuple[float, ...]) -> Recipe:
    models = {name: ModelRef(f"zoo/{name}") for name in sources(space)}
    fitted = ModelRef("fitted") if ALL[space.method].artifact else None
    return space.decode(
        genome, base=ModelRef("zoo/base"), sources=models, artifact=fitted, dtype=None, seed=7
    )


def all_coefficients(recipe: Recipe) -> list[object]:
    """What the recipe means to each tensor of a small Llama."""
    found = (coefficients(recipe, place, (4, 4)) for place in layout(TENSORS).values())
    return [(dict(each.source), dict(each.recipe)) for each in found]


def test_these_are_shipped():
    assert shipped_spaces() == NAMES


@pytest.fixture(params=NAMES)
def space(request: pytest.FixtureRequest) -> Space:
    return load_space(request.param)


def test_it_fits_its_method_and_says_what_it_is_for(space):
    assert check_space(space, sources(space)) == []
    assert len(space.about) > 40


def test_written_out_it_is_the_same_space(space):
    assert load_space(space.to_json()) == space


def test_start_and_corners_are_recipes_the_registry_takes(space):
    count = len(space.genes(sources(space)))
    for genome in (space.start(sources(space)), (0.0,) * count, (1.0,) * count):
        assert check(decoded(space, genome)) == []


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_genome_is_a_recipe_with_a_stable_digest(name, data):
    space = load_space(name)
    count = len(space.genes(sources(space)))
    genome = tuple(data.draw(st.lists(st.floats(0, 1), min_size=count, max_size=count)))
    recipe = decoded(space, genome)
    assert check(recipe) == []
    assert recipe.digest == decoded(load_space(space.to_json()), genome).digest
    assert recipe.digest == Recipe.from_json(recipe.to_json()).digest


def test_every_gene_changes_the_recipe_and_some_tensor(space):
    start = space.start(sources(space))
    before = decoded(space, start)
    for index, gene in enumerate(space.genes(sources(space))):
        moved = tuple(0.9 if i == index else u for i, u in enumerate(start))
        after = decoded(space, moved)
        assert after.digest != before.digest, gene.name
        assert all_coefficients(after) != all_coefficients(before), f"{gene.name} has no effect"


def test_it_starts_from_a_sound_merge(space):
    """Neither the base nor a sum of whole task vectors; SLERP starts half way, a mean of what a fit
    has learned with equal weights."""
    for own, shared in all_coefficients(decoded(space, space.start(sources(space)))):
        if ALL[space.method].artifact:
            assert all(len(set(each)) == 1 for each in own.values())
            continue
        strengths = [shared["t"]] if space.method == "slerp" else own["weight"]
        assert all(0.3 - 1e-12 <= strength <= 0.5 for strength in strengths)
        assert shared.get("normalize") is not True, "a common factor of the weights would cancel"
