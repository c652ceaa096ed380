"""RAM: worked by hand and against a count of who changed what, in float64."""

from __future__ import annotations

import pytest
import torch

from evomerge.merging.methods.ram import Ram
from evomerge.testing.merge_laws import Case, merged

SOURCES = {
    "a": torch.tensor([1.0, 4.0, 0.0, 0.01, 5.0]),
    "b": torch.tensor([0.0, 2.0, 0.0, 0.02, -1.0]),
}


def test_by_hand() -> None:
    # changed by a alone, by both, by none, by none (too little), by both
    small = Case(torch.zeros(5), SOURCES, {"epsilon": 0.02})
    assert merged(Ram(), small).tolist() == [1.0, 3.0, 0.0, 0.0, 2.0]
    # a shares two weights and has one alone: 1 + 0.5·min(2/1, 0.8) = 1.4; b has none alone
    plus = merged(Ram(), small.given(r=0.5, alpha=0.8), block_size=2)
    assert plus.tolist() == pytest.approx([1.4, 3.0, 0.0, 0.0, 2.0])


@pytest.mark.parametrize("r", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.2])
def test_against_counts(epsilon: float, r: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, generator=generator)
    sources = {
        n: base + 0.1 * torch.randn(300, generator=generator) * (torch.rand(300) < 0.6)
        for n in "abc"
    }
    given = Case(base, sources, {"epsilon": epsilon, "r": r, "alpha": 0.9})
    taus = [(source - base) for source in sources.values()]
    who = [[i for i, tau in enumerate(taus) if abs(tau[j]) > epsilon] for j in range(300)]
    factors = []
    for i in range(3):
        alone = sum(group == [i] for group in who)
        shared = sum(i in group and len(group) > 1 for group in who)
        factors.append(1 + r * min(shared / alone, 0.9))
    expected = base.double().tolist()
    for j, group in enumerate(who):
        if len(group) == 1:
            expected[j] += factors[group[0]] * taus[group[0]][j].item()
        elif group:
            expected[j] += sum(taus[i][j].item() for i in group) / len(group)
    found = merged(Ram(), given, block_size=7).tolist()
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_what_nobody_changed_enough_is_the_base() -> None:
    base = torch.tensor([1.0, -0.0, 3.0])
    near = {"a": base + 1e-3, "b": base - 1e-3}
    found = merged(Ram(), Case(base, near, {"epsilon": 0.01}))
    assert torch.equal(found, base)
    assert found.signbit().tolist() == [False, True, False]


def test_a_lone_source_is_itself_where_it_moved() -> None:
    base = torch.tensor([0.1, 0.2, 0.3])
    source = torch.tensor([1e4, 0.2001, -7.7])
    found = merged(Ram(), Case(base, {"a": source}, {"epsilon": 0.01}))
    assert torch.equal(found, torch.stack([source[0], base[1], source[2]]))
