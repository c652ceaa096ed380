"""The CPU kernels against the methods' own torch functions, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from random_programs import (
    DTYPES,
    assert_same_bits,
    bits,
    by_torch,
    random_program,
    values,
    votes_of,
)

from evomerge.merging.kernels import (
    cpu,
    drawing,
    formats,
    fused,
    magnitudes,
    norms,
    products,
)
from evomerge.merging.kernels.facts import Facts, Memory
from evomerge.merging.kernels.program import Draw, Election, Program, Row
from evomerge.merging.methods.base import Block
from evomerge.merging.methods.dropping import Drop
from evomerge.merging.methods.election import signs, tie_sign
from evomerge.merging.methods.reductions import totals
from evomerge.merging.methods.selection import KEEP_NONE, Cut, Quota
from evomerge.merging.methods.spheres import gram

PROBE = 1 << 16
COPY = Program((Row(0, 1.0),), "zero")


@pytest.mark.parametrize("seed", range(300))
def test_random_programs_give_the_bits_of_torch(seed: int) -> None:
    chance = random.Random(seed)
    size = chance.choice([1, 2, 37, 511, 512, 513, 1061, 4099])
    one = chance.choice([None, torch.bfloat16])
    dtypes = [one or chance.choice(DTYPES) for _ in range(chance.choice([2, 4, 5, 7, 10]))]
    base, *sources = (values(chance, dtype, size) for dtype in dtypes)
    program = random_program(chance, len(sources), size)
    wanted = by_torch(program, base, sources, chance.choice(DTYPES))
    out = torch.full_like(wanted, 7)
    assert cpu.run(program, base, sources, out) == bool(wanted.isfinite().all())
    if wanted.isfinite().all():
        assert_same_bits(out, wanted)


@pytest.mark.parametrize("rule", ["majority", "authors"])
@pytest.mark.parametrize("lean", [-1, 0, 1])
def test_a_tie_that_is_not_known_is_the_balance_of_the_whole_tensor(rule: str, lean: int) -> None:
    """The start of the tensor leans one way, the whole another: the guess is wrong."""
    size = 3 * PROBE
    chance = random.Random(lean)
    base, first, second = (values(chance, torch.bfloat16, size) for _ in range(3))
    first[:PROBE] = first[:PROBE].abs() * -lean
    first[PROBE:] = first[PROBE:].abs() * lean
    program = Program(
        (Row(0, 0.5, 0.5), Row(1, 0.5, 0.5)), "base", Election(0, "mean", True, 1.0, rule=rule)
    )
    balance = int(signs(votes_of(program, base, [first, second])).sum())
    assert program.election is not None
    known = replace(program.election, tie=tie_sign(rule, balance), rule=None)
    out = torch.empty(size)
    assert cpu.run(program, base, [first, second], out)
    wanted = by_torch(replace(program, election=known), base, [first, second], torch.float32)
    assert_same_bits(out, wanted)
    assert cpu.balance(program, base, [first, second]) == balance


@pytest.mark.parametrize("sources", [1, 3, 6])
@pytest.mark.parametrize("votes", [True, False])
def test_equal_magnitudes_are_counted_on_the_way(sources: int, votes: bool) -> None:
    size = 5000
    chance = random.Random(sources)
    base, *models = (values(chance, torch.bfloat16, size) for _ in range(sources + 1))
    rows, located = [], []
    for index, model in enumerate(models):
        patterns = bits((model.float() - base.float()).abs())
        pattern = int(torch.tensor(0.25).view(torch.int32))
        places = (patterns == pattern).nonzero().flatten()
        equal = chance.choice([1, len(places) // 2, len(places)])
        rows.append(Row(index, 0.3, 0.3, cut=Cut(pattern, -1, equal)))
        located.append(Row(index, 0.3, 0.3, cut=Cut(pattern, int(places[equal - 1]))))
    vote = Election(1, "mean", True, 1.0) if votes else None
    out = torch.empty(size)
    assert cpu.run(Program(tuple(rows), "base", vote), base, models, out)
    wanted = by_torch(Program(tuple(located), "base", vote), base, models, torch.float32)
    assert_same_bits(out, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_value_of_a_dtype_is_read_exactly(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    out = torch.empty(len(finite))
    assert cpu.run(COPY, None, [finite], out)
    assert_same_bits(out, finite.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_exponent_is_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    exponents = torch.arange(2**9, dtype=torch.int64) << 23
    fractions = torch.tensor(
        [*range(4), 0x1FFF, 0x2000, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x18000]
    )
    patterns = (exponents[:, None] + fractions).flatten().to(torch.int32)
    x = patterns.view(torch.float32)
    x = x[x.to(dtype).isfinite()]
    out = torch.empty(len(x), dtype=dtype)
    assert cpu.run(COPY, None, [x], out)
    assert_same_bits(out, x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_rounds_to_infinity_is_told(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    limit = {torch.float16: 65520.0, torch.bfloat16: float.fromhex("0x1.ffp127")}
    for value in (largest, -largest, limit.get(dtype, float("inf")), float("nan")):
        x = torch.zeros(1000)
        x[777] = value
        out = torch.empty(1000, dtype=dtype)
        assert cpu.run(COPY, None, [x], out) == bool(x.to(dtype).isfinite().all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("aggregate", ["mean", "sum", "max"])
@pytest.mark.parametrize("sources", [2, 5])
def test_a_source_that_is_not_finite_is_told_of(value: float, aggregate: str, sources: int) -> None:
    models = [torch.ones(600, dtype=torch.bfloat16) for _ in range(sources)]
    models[1][599] = value
    base = torch.zeros(600, dtype=torch.bfloat16)
    for tie in (-1, 0, 1):
        vote = Election(tie, aggregate, True, 1.0)  # type: ignore[arg-type]
        for program in (
            Program(tuple(Row(i, 0.5, 0.5) for i in range(sources)), "base", vote),
            Program(tuple(Row(i, 0.5) for i in range(sources)), "base"),
        ):
            assert not cpu.run(program, base, models, torch.empty(600))


def test_copies_bases_and_nothing() -> None:
    base = torch.tensor([-0.0, 1.0, 3e-41])
    source = torch.tensor([-0.0, 2.0, -3e-41])
    out = torch.empty(3)
    for program, wanted in (
        (Program((), "base"), base),
        (Program((), "zero"), torch.zeros(3)),
        (Program((), "base", copies=0), source),
    ):
        assert cpu.run(program, base, [source], out)
        assert_same_bits(out, wanted)
    assert cpu.run(COPY, None, [torch.empty(0)], torch.empty(0))


def test_a_nan_of_any_payload_is_told_of() -> None:
    x = torch.full((100,), 2**31 - 1, dtype=torch.int32).view(torch.float32)
    assert not cpu.run(COPY, None, [x], torch.empty(100, dtype=torch.bfloat16))


def test_a_source_that_is_left_out_but_not_finite_is_told_of() -> None:
    base = torch.zeros(600, dtype=torch.bfloat16)
    models = [torch.ones(600, dtype=torch.bfloat16) for _ in range(2)]
    models[1][77] = float("inf")
    nothing = Row(1, 0.5, 0.5, cut=KEEP_NONE)
    never = Row(1, 0.5, 0.5, draw=Draw(3, 2**32))
    for row in (nothing, never):
        for vote in (None, Election(1, "mean", True, 1.0)):
            program = Program((Row(0, 0.5, 0.5), row), "base", vote)
            assert not cpu.run(program, base, models, torch.empty(600))


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels for vectors of half the lanes that this machine has at most."""
    made = fused.compiled, magnitudes.count, magnitudes.tabulate, norms.norms, products.products
    for loop in made:
        loop.cache_clear()
    for module in (drawing, formats, fused, magnitudes, norms, products):
        monkeypatch.setattr(module, "lanes", lambda: 8)
    yield
    for loop in made:
        loop.cache_clear()


@pytest.mark.usefixtures("narrow")
def test_the_width_of_vectors_does_not_matter() -> None:
    for seed in range(40):
        test_random_programs_give_the_bits_of_torch(seed)
    base, first, second = (values(random.Random(i), torch.bfloat16, 40_001) for i in range(3))
    facts = Facts(base, (first, second))
    stacked = torch.stack([first, second]).float()
    wanted = totals(lambda: iter([Block(None, stacked, 0)]), lambda block: gram(block.sources))
    assert facts.gram(from_base=False) == wanted
    stored = Facts(base, (first, second), Memory(), "b", ("f", "s"))
    assert facts.cut(0, Quota(9000)) == stored.cut(0, Quota(9000))
    drop = Drop(key=5, density=0.4, factor=1.0)
    tau = first.float() - base.float()
    kept = torch.stack([tau, drop.thinned(tau, 0)])
    wanted = totals(
        lambda: iter([Block(None, kept, 0)]), lambda block: block.sources.double().abs()
    )
    assert drop.draw is not None
    assert list(facts.norms(0, drop.draw)) == wanted


def test_threads_may_compile_at_once() -> None:
    fused.compiled.cache_clear()
    sources = [values(random.Random(i), torch.bfloat16, 500) for i in range(3)]
    wanted = sources[0].float() * 0.5 + sources[1].float() * 0.25

    def merged(_: int) -> torch.Tensor:
        out = torch.empty(500)
        assert cpu.run(Program((Row(0, 0.5), Row(1, 0.25)), "zero"), None, sources, out)
        return out

    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(merged, range(8)):
            assert_same_bits(out, wanted)
