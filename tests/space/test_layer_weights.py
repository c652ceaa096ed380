"""The genome nearest to given weights: exact where there is one, else bounded least squares."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import lsq_linear

from evomerge.errors import MergeError
from evomerge.space import load_space
from evomerge.space.layer_weights import LayerWeights, project

SOURCES = ["sort", "add", "chat"]
PARTS = ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
TENSORS = [
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.{part}.weight" for layer in range(4) for part in PARTS),
    "model.norm.weight",
]
BLOCKS = {
    "method": "task_arithmetic",
    "source": {"weight": [{"per": "source", "blocks": 2, "low": 0.0, "high": 1.0, "init": 0.3}]},
    "recipe": {"lambda": 1.0},
}


def grams(seed: int) -> dict[str, np.ndarray]:
    """Positive definite metrics of very different sizes."""
    rng = np.random.default_rng(seed)
    rows = {name: rng.normal(size=(3, 8)) * 10 ** rng.uniform(-2, 1) for name in TENSORS}
    return {name: row @ row.T for name, row in rows.items()}


def by_name(weights: LayerWeights, c: np.ndarray) -> dict[str, dict[str, float]]:
    return {
        source: dict(zip(TENSORS, row, strict=True))
        for source, row in zip(weights.names, c.tolist(), strict=True)
    }


@pytest.mark.parametrize("space", ["source_scalar", "source_depth", BLOCKS])
def test_weights_that_lie_in_the_space_are_found_again(space):
    weights = LayerWeights(load_space(space), SOURCES, TENSORS)
    rng = np.random.default_rng(1)
    for seed in range(3):
        genome = rng.uniform(0.2, 0.8, len(weights.space.genes(SOURCES)))
        wanted = weights.at(tuple(genome))
        found = project(weights, by_name(weights, wanted), grams(seed))
        # not the genome itself: some directions of `source_depth` mean nothing
        np.testing.assert_allclose(weights.at(found.genome), wanted, atol=1e-6)
        assert found.distance < 1e-6


def test_others_are_met_as_bounded_least_squares_does():
    weights = LayerWeights(load_space(BLOCKS), SOURCES, TENSORS)
    rng, metric = np.random.default_rng(2), grams(5)
    wanted = rng.uniform(-0.5, 0.5, (3, len(TENSORS))) + np.array([[-0.2], [0.5], [1.2]])
    found = project(weights, by_name(weights, wanted), metric)
    genes = len(found.genome)
    # c is linear in the genes: its columns are what each gene adds
    zero = weights.at((0.0,) * genes)
    columns = [weights.at(tuple(np.eye(genes)[i])) - zero for i in range(genes)]
    roots = [np.linalg.cholesky(metric[name]).T for name in TENSORS]
    rows = [np.concatenate([r @ c[:, i] for i, r in enumerate(roots)]) for c in columns]
    target = np.concatenate([r @ (wanted - zero)[:, i] for i, r in enumerate(roots)])
    oracle = lsq_linear(np.stack(rows, axis=1), target, (0, 1), tol=1e-14)
    assert (oracle.active_mask != 0).any()  # or bounds were not tried
    np.testing.assert_allclose(found.genome, oracle.x, atol=1e-4)
    np.testing.assert_allclose(
        found.distance
        * np.linalg.norm(np.concatenate([r @ wanted[:, i] for i, r in enumerate(roots)])),
        np.sqrt(2 * oracle.cost),
        rtol=1e-6,
    )


def test_tensors_that_the_wanted_weights_lack_have_no_part():
    weights = LayerWeights(load_space("source_scalar"), SOURCES, TENSORS)
    wanted = by_name(weights, weights.at((0.5, 0.25, 0.75)))
    for tensors in wanted.values():
        del tensors["model.norm.weight"]
    found = project(weights, wanted, grams(0))
    np.testing.assert_allclose(found.genome, (0.5, 0.25, 0.75), atol=1e-6)


def test_the_jacobian_is_of_what_decodes_and_holds_at_bounds():
    weights = LayerWeights(load_space("source_depth"), SOURCES, TENSORS)
    genes = len(weights.space.genes(SOURCES))
    for genome in ((0.0,) * genes, (1.0,) * genes, tuple(np.linspace(0.1, 0.9, genes))):
        jacobian = weights.jacobian(genome)
        for gene in range(genes):
            moved = tuple(0.5 if i == gene else u for i, u in enumerate(genome))
            # multilinear: the slope in one gene is the same wherever that gene is
            rise = weights.at(moved) - weights.at(genome)
            expected = jacobian[..., gene] * (moved[gene] - genome[gene])
            np.testing.assert_allclose(rise, expected, atol=1e-9)


def test_discrete_genes_stay_where_they_start():
    values = {**BLOCKS["source"]["weight"][0], "values": [0.1, 0.5, 1.0], "init": 0.5}
    discrete = {key: value for key, value in values.items() if key not in ("low", "high")}
    free = {"low": 0.0, "high": 2.0, "init": 1.0}
    space = load_space({**BLOCKS, "source": {"weight": [discrete]}, "recipe": {"lambda": [free]}})
    weights = LayerWeights(space, SOURCES, TENSORS)
    start = space.start(SOURCES)
    wanted = by_name(weights, np.full((3, len(TENSORS)), 0.8))
    found = project(weights, wanted, grams(0))
    assert found.genome[:-1] == start[:-1]
    assert found.genome[-1] == pytest.approx(0.8)


def test_spaces_of_other_methods_are_refused():
    with pytest.raises(MergeError, match="ties is not linear"):
        LayerWeights(load_space("ties_blocks"), SOURCES, TENSORS)
