"""DARE: worked by hand on known draws, against an oracle, and its statistics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from evomerge.merging.methods.dare_linear import DareLinear
from evomerge.merging.methods.dare_ties import DareTies
from evomerge.merging.methods.masks import draws, mask_key
from evomerge.testing.merge_laws import Case, merged

TENSOR = "model.layers.0.mlp.up_proj.weight"


def uniforms(seed: int, source: str, count: int) -> Tensor:
    """u in [0, 1), float64: what the masks are defined by."""
    return draws(mask_key(seed, source, TENSOR), 0, count).double() / 2**32


def case(seed: int = 0, size: int = 300, **parameters: float | bool | str) -> Case:
    generator = torch.Generator().manual_seed(11)
    base = torch.randn(size, generator=generator)
    sources = {n: base + torch.randn(size, generator=generator) * 0.1 for n in ("a", "b", "c")}
    return Case(base, sources, parameters, seed=seed)


def test_by_hand() -> None:
    assert (uniforms(750, "a", 4) >= 0.5).tolist() == [False, False, True, True]
    assert (uniforms(750, "b", 4) >= 0.5).tolist() == [False, True, False, True]
    sources = {
        "a": torch.tensor([2.0, 3.0, 0.0, 5.0]),
        "b": torch.tensor([10.0, 4.0, 4.0, 0.0]),
    }
    small = Case(torch.ones(4), sources, {"density": 0.5, "lambda": 0.5}, seed=750)
    # kept and doubled: a [0, 0, -2, 8], b [0, 6, 0, -2]; half their sum is [0, 3, -1, 3]
    assert merged(DareLinear(), small).tolist() == [1.0, 4.0, 0.0, 4.0]
    # the last weight elects +, so only a's 8 counts
    assert merged(DareTies(), small).tolist() == [1.0, 4.0, 0.0, 5.0]
    # a mean over who agrees does not feel a common weight
    mean = small.given(normalize=True, weight=2.0)
    assert merged(DareTies(), mean).tolist() == [1.0, 4.0, 0.0, 5.0]


@pytest.mark.parametrize("rescale", ["unbiased", "l1", "none"])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
def test_linear_against_the_formula_in_float64(rescale: str, density: float) -> None:
    weights = {"a": 0.5, "b": -0.25, "c": 1.0}
    drawn = case(3, rescale=rescale, density=density)
    drawn = Case(drawn.base, drawn.sources, drawn.parameters, _weights(weights), 3)
    expected = drawn.base.double()
    for name, source in drawn.sources.items():
        tau = (source - drawn.base).double()
        thinned = torch.where(uniforms(3, name, 300) >= 1 - density, tau, 0.0)
        factor = {
            "unbiased": 1 / density,
            "l1": (tau.abs().sum() / thinned.abs().sum()).item(),
            "none": 1.0,
        }[rescale]
        expected = expected + weights[name] * factor * thinned
    found = merged(DareLinear(), drawn).double()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_ties_against_the_formula_in_float64() -> None:
    weights = {"a": 0.5, "b": 0.25, "c": 1.0}
    drawn = Case(*_inputs(), {"density": 0.4, "normalize": True}, _weights(weights), 3)
    thinned = {}
    for name, source in drawn.sources.items():
        tau = (source - drawn.base).double()
        thinned[name] = torch.where(uniforms(3, name, 300) >= 0.6, tau, 0.0) / 0.4
    expected = drawn.base.double().clone()
    for j in range(300):
        votes = {name: weights[name] * tau[j].item() for name, tau in thinned.items()}
        agree = [name for name, vote in votes.items() if vote * sum(votes.values()) > 0]
        if agree:
            expected[j] += sum(votes[n] for n in agree) / sum(weights[n] for n in agree)
    assert torch.allclose(merged(DareTies(), drawn).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("sign_tie", "first"), [("majority", -2.0), ("positive", 2.0), ("zero", 0.0)]
)
def test_ties_at_a_zero_sum_of_votes(sign_tie: str, first: float) -> None:
    sources = {"a": -torch.ones(10), "b": -torch.ones(10)}
    sources["a"][0], sources["b"][0] = 2.0, -2.0
    small = Case(torch.zeros(10), sources, {"sign_tie": sign_tie})
    found = merged(DareTies(), small, block_size=3)
    assert found.tolist() == [first] + [-2.0] * 9


def test_unbiased_with_the_variance_of_the_formula() -> None:
    # E[τ̃] = τ and Var[τ̃] = τ²·p/(1 − p), over seeds
    density, seeds = 0.3, 2000
    tau = torch.linspace(-1, 1, 21)
    small = Case(torch.zeros(21), {"a": tau}, {"density": density})
    runs = torch.stack(
        [merged(DareLinear(), Case(small.base, small.sources, small.parameters, seed=s))
         for s in range(seeds)]
    ).double()  # fmt: skip
    variance = tau.double() ** 2 * (1 - density) / density
    assert ((runs.mean(0) - tau).abs() <= 4 * (variance / seeds).sqrt() + 1e-7).all()
    # fourth central moment of a scaled Bernoulli, for the error of a sample variance
    kurtosis = (1 - 3 * density * (1 - density)) / (density * (1 - density))
    error = variance * ((kurtosis - 1) / seeds) ** 0.5
    assert ((runs.var(0) - variance).abs() <= 4 * error + 1e-7).all()


def test_noise_of_a_merge_is_what_the_gram_matrix_says() -> None:
    # E‖Σ wᵢτ̃ᵢ‖² = wᵀGw + Σ wᵢ²·p/(1 − p)·Gᵢᵢ
    size, density, weights = 200_000, 0.5, {"a": 0.7, "b": 0.4}
    generator = torch.Generator().manual_seed(2)
    shared = torch.randn(size, generator=generator)
    sources = {n: shared + torch.randn(size, generator=generator) for n in weights}
    drawn = Case(torch.zeros(size), sources, {"density": density}, _weights(weights))
    found = merged(DareLinear(), drawn).double().square().sum().item()
    total = sum(w * sources[n].double() for n, w in weights.items())
    assert isinstance(total, Tensor)
    expected = total.square().sum().item()
    for name, weight in weights.items():
        own = sources[name].double().square().sum().item()
        expected += weight**2 * (1 - density) / density * own
    assert math.isclose(found, expected, rel_tol=0.02)


def test_l1_is_restored_in_every_draw() -> None:
    for seed in range(20):
        base, sources = _inputs()
        one = Case(torch.zeros(300), {"a": sources["a"] - base}, {"density": 0.3}, seed=seed)
        found = merged(DareLinear(), one.given(rescale="l1"))
        expected = one.sources["a"].abs().double().sum()
        assert math.isclose(found.abs().double().sum(), expected, rel_tol=1e-6)


@pytest.mark.parametrize("rescale", ["unbiased", "l1", "none"])
@pytest.mark.parametrize("method", [DareLinear(), DareTies()])
def test_density_zero_is_the_base(method: DareLinear | DareTies, rescale: str) -> None:
    drawn = case(density=0.0, rescale=rescale)
    assert torch.equal(merged(method, drawn), drawn.base)


def test_l1_leaves_a_task_vector_of_no_norm_alone() -> None:
    tiny = Case(torch.zeros(4), {"a": torch.full((4,), 1e-9)}, {"density": 0.5, "rescale": "l1"})
    assert set(merged(DareLinear(), tiny).tolist()) <= {0.0, torch.tensor(1e-9).item()}


def test_a_source_keeps_its_mask_whoever_is_merged_with_it() -> None:
    drawn = case(density=0.5)
    alone = Case(drawn.base, {"b": drawn.sources["b"]}, drawn.parameters)
    others = drawn.given(weight=0.0)
    others = Case(others.base, others.sources, others.parameters, {"b": {"weight": 1.0}})
    assert torch.equal(merged(DareLinear(), alone), merged(DareLinear(), others))


def _weights(weights: dict[str, float]) -> dict[str, dict[str, float | bool | str]]:
    return {name: {"weight": weight} for name, weight in weights.items()}


def _inputs() -> tuple[Tensor, dict[str, Tensor]]:
    drawn = case()
    return drawn.base, dict(drawn.sources)
