"""WIDEN: by hand, against the formula in float64, and what tells columns apart."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from evomerge.merging.methods.base import Block, Coefficients
from evomerge.merging.methods.widen import Widen, importance, ranks
from evomerge.testing.merge_laws import Case, merged, random_case


def test_by_hand() -> None:
    # columns of the base [2, 0] and [0, 4]; a grows the first to 3 and turns the second a little,
    # b turns the first by 90 degrees and grows the second to 5
    base = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    a = torch.tensor([[3.0, 3.0], [0.0, 4.0]])  # norms 3 and 5: changes 1, 1; cosines 1, 4/5
    b = torch.tensor([[0.0, 0.0], [2.0, 5.0]])  # norms 2 and 5: changes 0, 1; cosines 0, 1
    # ranks of size: a [0, ½] (equal: by index), b [0, ½]; of direction: a [0, ½], b [½, 0]
    # means ¼: a rank of ½ is important and scores 1
    # size: column 0 softmax(0, 0) = ½, ½; column 1: 1, 1
    # direction: column 0: a 1/(1 + e^½) = 0.37754, b 1; column 1: a 1, b 0.37754
    share = 1 / (1 + math.exp(0.5))
    shares_a, shares_b = [(0.5 + share) / 2, 1.0], [0.75, (1 + share) / 2]
    case = Case(base.flatten(), {"a": a.flatten(), "b": b.flatten()}, shape=(2, 2))
    expected = base + torch.tensor(shares_a) * (a - base) + torch.tensor(shares_b) * (b - base)
    assert torch.allclose(merged(Widen(), case, block_size=3), expected.flatten())


def scores(x: Tensor, ratio: float, calibration: float) -> Tensor:
    mean = x.mean(1, keepdim=True)
    return torch.where(x > ratio * mean, calibration, torch.softmax(x, 0))


def oracle(case: Case, weights: list[float], axis: int | None) -> Tensor:
    """From the formula, in float64; the axis along which a column runs, None for vectors."""
    assert case.shape is not None
    base = case.base.double().view(case.shape)
    models = [case.sources[name].double().view(case.shape) for name in sorted(case.sources)]
    ratio, calibration = float(case.parameters["ratio"]), float(case.parameters["calibration"])
    if axis is None:
        changes = torch.stack([(m - base).abs().flatten() for m in models])
        share = scores(changes, ratio, calibration).view(-1, *case.shape)
    else:
        sizes = [(m.norm(dim=axis) - base.norm(dim=axis)).abs() for m in models]
        cosines = [torch.cosine_similarity(m, base, dim=axis) for m in models]
        parts = []
        for changes in (sizes, [1 - cosine for cosine in cosines]):
            places = torch.stack([x.argsort(stable=True).argsort() / len(x) for x in changes])
            parts.append(scores(places.double(), ratio, calibration))
        share = ((parts[0] + parts[1]) / 2).unsqueeze(axis + 1)
    moved = sum(w * s * (m - base) for w, s, m in zip(weights, share, models, strict=True))
    return (base + float(case.parameters["lambda"]) * moved).flatten()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (1, 30), (40,), (3, 4, 5)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_against_the_formula_in_float64(shape: tuple[int, ...], count: int) -> None:
    for seed in range(5):
        size = math.prod(shape)
        case = random_case(
            seed, method=Widen(), size=size, sources=count, born=torch.float32, spread=0.02
        )
        base = case.base.where(case.base != 0, torch.tensor(0.01))  # no zero column of one entry
        sources = {name: tau + (base - case.base) for name, tau in case.sources.items()}
        case = replace(case, shape=shape, base=base).of(sources)
        weights = [float(case.own[name]["weight"]) for name in sorted(case.sources)]
        expected = oracle(case, weights, 0 if len(shape) == 2 else None)
        found = merged(Widen(), case, block_size=7).double()
        if shape[0] == 1:  # directions of one entry are all equal but for the oracle's rounding
            assert found.isfinite().all()
        else:
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_an_embedding_is_ranked_by_its_tokens() -> None:
    case = random_case(3, method=Widen(), size=60, sources=2, born=torch.float32, spread=0.02)
    case = replace(case, shape=(10, 6)).given(weight=1.0)
    names = tuple(sorted(case.sources))
    shared = {k: v for k, v in case.parameters.items() if k != "weight"}
    known = Coefficients(
        "model.embed_tokens.weight", (10, 6), names, (0, 1), {"weight": (1.0, 1.0)}, shared, 0
    )
    block = Block(case.base, torch.stack([case.sources[name] for name in names]), 0)
    prepared = Widen().prepare(lambda: iter([block]), known, None)
    found = Widen().merge(block, known, prepared)
    assert torch.allclose(found.double(), oracle(case, [1.0, 1.0], 1), rtol=1e-5, atol=1e-7)


def test_importance_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0], [math.log(3), 0.0]], dtype=torch.float64)
    expected = [[0.25, 9.0], [9.0, 1 / (1 + math.e)]]
    found = importance(x, ratio=1.0, calibration=9.0)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64))


def test_ranks_are_shares_and_equal_values_go_by_index() -> None:
    assert ranks(torch.tensor([5.0, 1.0, 5.0, 0.0])).tolist() == [0.5, 0.25, 0.75, 0.0]


def test_a_small_turn_of_a_column_is_told_from_a_smaller_one() -> None:
    # 1 - cos is 5e-19 and 2e-18 here: nothing in float64, unless computed from the difference
    base = torch.eye(2, dtype=torch.float32)
    turned = torch.tensor([[1.0, 1e-9], [2e-9, 1.0]])
    case = Case(base.flatten(), {"a": turned.flatten(), "b": base.flatten()}, shape=(2, 2))
    case = case.given(calibration=2.0)
    # a's first column turns most and ranks ½ (2 in direction); sizes are equal, so that by index
    # its second ranks ½ there
    share = 1 / (1 + math.exp(0.5))
    found = merged(Widen(), case)
    assert found[2].item() == pytest.approx(2e-9 * (2 + 0.5) / 2)
    assert found[1].item() == pytest.approx(1e-9 * (2 + share) / 2)


def test_zero_columns_stay_finite() -> None:
    base = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    sources = {"a": torch.tensor([[0.0, 0.0], [1.0, 0.0]]), "b": base}
    case = Case(base.flatten(), {n: s.flatten() for n, s in sources.items()}, shape=(2, 2))
    assert bool(merged(Widen(), case).isfinite().all())
