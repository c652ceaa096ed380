"""The Triton kernels against the methods' own torch functions, bit for bit.

Without a GPU they run in Triton's interpreter, which must be chosen before Triton is imported: one
test runs this file again in a process where it is.
"""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from evomerge.merging.kernels import cuda, streaming
from evomerge.merging.kernels.program import Draw, Election, Program, Row
from evomerge.merging.methods import election
from evomerge.merging.methods.combination import moved, weighted_sum
from evomerge.merging.methods.dare_ties import dare_ties
from evomerge.merging.methods.dropping import Drop
from evomerge.merging.methods.linear import linear
from evomerge.merging.methods.masks import draws, mask_key
from evomerge.merging.methods.selection import KEEP_ALL, KEEP_NONE, Cut
from evomerge.merging.methods.slerp import slerp
from evomerge.merging.methods.task_arithmetic import task_arithmetic
from evomerge.merging.methods.ties import ties

TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

pytestmark = [
    pytest.mark.skipif(not TRITON, reason="Triton is not installed"),
    # the interpreter computes with numpy, which warns of infinity and NaN
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="no CUDA device; test_in_the_interpreter runs it",
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZE = 2 * cuda.BLOCK + 37
INF, NAN = float("inf"), float("nan")


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


# --- programs -------------------------------------------------------------------------------------


def values(chance: random.Random, dtype: torch.dtype, size: int = SIZE) -> Tensor:
    """Multiples of 1/8 near 0 among others, so that magnitudes are equal and votes cancel; zeros of
    both signs; subnormals."""
    generator = torch.Generator().manual_seed(chance.getrandbits(32))
    found = torch.randn(size, generator=generator) * 0.3
    grid = torch.randint(-4, 5, (size,), generator=generator) / 8
    kind = torch.randint(0, 10, (size,), generator=generator)
    found = torch.where(kind < 5, grid, found)
    found[kind == 9] *= 1e-39 if dtype != torch.float16 else 1e-6
    found[::97] = -0.0
    return found.to(dtype)


def random_cut(chance: random.Random, start: int) -> Cut:
    pattern = int(torch.tensor(chance.choice([0.0, 0.125, 0.25, 0.31])).view(torch.int32))
    last = start + chance.choice([-3, 0, 5, cuda.BLOCK - 1, cuda.BLOCK, SIZE - 2, SIZE, 2**61])
    return chance.choice([Cut(pattern, last), Cut(pattern, last), KEEP_ALL, KEEP_NONE])


def random_row(chance: random.Random, source: int, start: int, kinds: Sequence[str]) -> Row:
    key = chance.getrandbits(64) - 2**63
    threshold = chance.choice([0, 2**32, 2**31, chance.getrandbits(32)])
    return Row(
        source=source,
        factor=chance.choice([1.0, -1.0, 0.5, chance.gauss(0, 1), 1e-42]),
        weight=chance.choice([1.0, -1.0, 0.7, chance.gauss(0, 1), 1e-9]),
        cut=random_cut(chance, start) if "cut" in kinds and chance.random() < 0.8 else None,
        top=random_cut(chance, start) if "top" in kinds and chance.random() < 0.8 else None,
        draw=Draw(key, threshold) if "draw" in kinds and chance.random() < 0.8 else None,
    )


def random_program(chance: random.Random, sources: int, start: int) -> Program:
    kinds = chance.choice([(), ("cut",), ("draw",), ("cut", "top"), ("cut", "top", "draw")])
    chosen = chance.sample(range(sources), chance.randint(1, sources))
    vote = Election(
        tie=chance.choice([-1, 0, 1]),
        aggregate=chance.choice(["mean", "mean", "sum", "max"]),
        normalize=chance.random() < 0.8,
        scale=chance.choice([1.0, 0.3, -2.0]),
    )
    return Program(
        rows=tuple(random_row(chance, source, start, kinds) for source in chosen),
        origin=chance.choice(["base", "base", "zero"]),
        election=chance.choice([vote, vote, None]),
    )


def parts_of(
    program: Program, base: Tensor | None, sources: list[Tensor], start: int
) -> list[Tensor]:
    """x of every row, but for its factor if there is no election."""
    parts = []
    for row in program.rows:
        x = sources[row.source].float()
        if program.origin == "base":
            assert base is not None
            x = x - base.float()
        kept = torch.ones_like(x, dtype=torch.bool)
        if row.cut is not None:
            kept &= row.cut.mask(x, start)
        if row.top is not None:
            kept &= ~row.top.mask(x, start)
        if row.draw is not None:
            drawn = draws(row.draw.key, start, x.numel(), device=x.device)
            kept &= drawn >= row.draw.threshold
        parts.append(x * kept)
    return parts


def expected(
    program: Program, base: Tensor | None, sources: list[Tensor], dtype: torch.dtype, start: int
) -> Tensor:
    """A program carried out by the torch functions that the methods are made of."""
    parts = parts_of(program, base, sources, start)
    factors = [row.factor for row in program.rows]
    vote = program.election
    if vote is None:
        merged = weighted_sum(parts, factors)
        assert merged is not None
    else:
        votes = [part * factor for part, factor in zip(parts, factors, strict=True)]
        weights = [row.weight for row in program.rows]
        merged = election.consensus(
            votes, weights, tie=vote.tie, aggregate=vote.aggregate, normalize=vote.normalize
        ).mul_(vote.scale)
    if program.origin == "base":
        assert base is not None
        merged = moved(base.float(), merged)
    return merged.to(dtype)


def carried_out(
    program: Program,
    base: Tensor | None,
    sources: Sequence[Tensor],
    dtype: torch.dtype,
    start: int = 0,
) -> tuple[bool, Tensor]:
    """What `run` says and what it wrote, on the device that is tested."""
    there = [source.to(DEVICE) for source in sources]
    out = torch.full_like(there[0], 7, dtype=dtype)
    finite = cuda.run(program, None if base is None else base.to(DEVICE), there, out, start)
    return finite, out.cpu()


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def assert_same_bits(got: Tensor, wanted: Tensor) -> None:
    differs = (bits(got) != bits(wanted)).nonzero().flatten().tolist()
    shown = [(i, float(got[i]), float(wanted[i])) for i in differs[:5]]
    assert not differs, f"{len(differs)} of {len(got)} differ: {shown}"


COPY = Program((Row(0, 1.0),), "zero")


# --- against torch --------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("seed", range(60))
def test_random_programs_give_the_bits_of_torch(seed: int) -> None:
    chance = random.Random(seed)
    start = chance.choice([0, 1, 5 * cuda.BLOCK, 2**31 - 5, 2**40 + 3])
    base = values(chance, chance.choice(DTYPES))
    sources = [values(chance, chance.choice(DTYPES)) for _ in range(chance.randint(1, 5))]
    program = random_program(chance, len(sources), start)
    dtype = chance.choice(DTYPES)
    wanted = expected(program, base, sources, dtype, start)
    finite, out = carried_out(program, base, sources, dtype, start)
    assert finite == bool(wanted.isfinite().all())
    assert_same_bits(out, wanted)


@runs
@pytest.mark.parametrize("seed", range(12))
def test_the_balance_is_that_of_the_votes(seed: int) -> None:
    chance = random.Random(seed)
    start = chance.choice([0, 2**33])
    base, sources = values(chance, DTYPES[seed % 3]), [values(chance, d) for d in DTYPES]
    program = random_program(chance, 3, start)
    votes = [
        part * row.factor
        for part, row in zip(parts_of(program, base, sources, start), program.rows, strict=True)
    ]
    there = [source.to(DEVICE) for source in sources]
    counted = cuda.balance(program, base.to(DEVICE), there, start)
    assert counted == election.balance([votes])


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_give_what_the_methods_give(dtype: torch.dtype) -> None:
    chance = random.Random(7)
    base, sources = values(chance, dtype), [values(chance, dtype) for _ in range(3)]
    wide, stacked = base.float(), torch.stack([source.float() for source in sources])
    weights, cut = [0.5, -0.25, 1.5], Cut(int(torch.tensor(0.25).view(torch.int32)), 1000)
    keys = [mask_key(3, name, "layer.weight") for name in "abc"]
    drops = [Drop(key, 0.25, 4.0) for key in keys]
    trimmed = tuple(Row(i, w, w, cut=cut) for i, w in enumerate(weights))
    thinned = tuple(
        Row(i, w * 4.0, w, draw=Draw(key, 3 << 30))
        for i, (w, key) in enumerate(zip(weights, keys, strict=True))
    )
    scaled = tuple(Row(i, 0.5 * w) for i, w in enumerate(weights))
    arc = slerp(stacked[0], stacked[1], t=0.25, cosine=1.0)
    cases = [
        (Program(scaled, "base"), task_arithmetic(wide, stacked, weights=weights, scale=0.5)),
        (
            Program(tuple(Row(i, w) for i, w in enumerate(weights)), "zero"),
            linear(stacked, weights, normalize=False),
        ),
        (Program((Row(0, 0.75), Row(1, 0.25)), "zero"), arc),
        (
            Program(trimmed, "base", Election(1, "mean", True, 0.7)),
            ties(wide, stacked, [cut] * 3, weights=weights, scale=0.7, tie=1),
        ),
        (
            Program(thinned, "base", Election(-1, "mean", False, 1.0)),
            dare_ties(wide, stacked, drops, weights=weights, tie=-1),
        ),
    ]
    for program, merged in cases:
        finite, out = carried_out(program, base, sources, dtype)
        assert finite
        assert_same_bits(out, merged.to(dtype))


@runs
@pytest.mark.parametrize("start", [0, 1, 2**32 - 100, 2**45 + 1])
def test_a_draw_decides_as_masks_do(start: int) -> None:
    """Every threshold that lies between two draws tells them apart."""
    key = mask_key(1, "math", "lm_head.weight")
    drawn = draws(key, start, SIZE)
    ones = torch.ones(SIZE)
    for threshold in sorted(drawn.tolist())[:: SIZE // 12]:
        for limit in (threshold, threshold + 1):
            program = Program((Row(0, 1.0, draw=Draw(key, limit)),), "zero")
            finite, out = carried_out(program, None, [ones], torch.float32, start)
            assert finite
            assert torch.equal(out.bool(), drawn >= limit)


# --- rounding and what is not finite --------------------------------------------------------------


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_exponent_is_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    upper = torch.arange(0, 1 << 16, 7, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x3000], dtype=torch.int32)
    patterns = (upper[:, None] | lower).flatten()
    source = patterns.view(torch.float32)
    source = source[source.abs() < 65000.0 if dtype == torch.float16 else source.abs() < 3e38]
    finite, out = carried_out(COPY, None, [source], dtype)
    assert finite
    assert_same_bits(out, source.to(dtype))


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_of_a_dtype_is_read_exactly(dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        stored = torch.arange(-(2**31), 2**31, 65521, dtype=torch.int64).to(torch.int32)
    else:
        stored = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    source = stored.view(dtype)
    source = source[source.isfinite()].clone()
    finite, out = carried_out(COPY, None, [source], torch.float32)
    assert finite
    assert_same_bits(out, source.float())


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_flag_tells_what_rounds_to_infinity(dtype: torch.dtype) -> None:
    limit = {torch.bfloat16: 0x7F7F8000, torch.float16: 0x477FF000, torch.float32: 0x7F800000}[
        dtype
    ]
    edge = torch.tensor([limit - 1, limit], dtype=torch.int32).view(torch.float32).tolist()
    for value, finite in [(edge[0], True), (-edge[0], True), (edge[1], False), (-edge[1], False)]:
        source = torch.tensor([0.0] * 40 + [value])
        assert bool(source.to(dtype).isfinite().all()) == finite
        assert carried_out(COPY, None, [source], dtype)[0] == finite


@runs
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("aggregate", [None, "mean", "sum", "max"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_source_that_is_not_finite_is_told_of(
    bad: float, aggregate: str | None, masked: bool
) -> None:
    """Also where the entry is dropped and where another source outvotes it, as torch does."""
    draw = Draw(5, 2**32) if masked else None
    for tie in (-1, 0, 1):
        vote = Election(tie, aggregate, True, 1.0) if aggregate else None
        for place in (0, 1):
            rows = tuple(Row(i, 1.0, draw=draw if i == place else None) for i in range(2))
            program = Program(rows, "base", vote)
            base, sources = torch.zeros(1), [torch.tensor([3.0]), torch.tensor([3.0])]
            sources[place] = torch.tensor([bad])
            wanted = expected(program, base, sources, torch.float32, 0)
            assert not wanted.isfinite().all()
            assert not carried_out(program, base, sources, torch.float32)[0]


@runs
def test_a_tie_elects_the_sign_it_is_given() -> None:
    base, sources = torch.tensor([10.0]), [torch.tensor([12.0]), torch.tensor([8.0])]
    for tie, merged in [(1, 12.0), (-1, 8.0), (0, 10.0)]:
        program = Program((Row(0, 1.0), Row(1, 1.0)), "base", Election(tie, "mean", True, 1.0))
        finite, out = carried_out(program, base, sources, torch.float32)
        assert finite
        assert out.item() == merged


# --- programs without arithmetic ------------------------------------------------------------------


@runs
def test_copies_and_bases_keep_their_bits() -> None:
    chance = random.Random(1)
    base, source = values(chance, torch.bfloat16), values(chance, torch.float32)
    wanted = source.to(torch.bfloat16)
    cases = [
        (Program((), "base", copies=0), wanted),
        (Program((), "base"), base),
        (Program((), "zero"), torch.zeros_like(base)),
        (COPY, wanted),
    ]
    for program, merged in cases:
        finite, out = carried_out(program, base, [source], torch.bfloat16)
        assert finite
        assert_same_bits(out, merged)


@runs
def test_an_empty_tensor_is_merged() -> None:
    empty = torch.empty(0, device=DEVICE)
    assert cuda.run(COPY, None, [empty], empty)
    assert cuda.balance(COPY, None, [empty]) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="8 GiB of a device's memory")
def test_indices_beyond_32_bits() -> None:
    size = 2**31 + 5000
    source = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    source[-3000:] = 2.0
    out = torch.empty_like(source)
    draw = Draw(4, 1 << 31)
    assert cuda.run(Program((Row(0, 0.5, draw=draw),), "zero"), None, [source], out)
    kept = draws(draw.key, size - 3000, 3000) >= draw.threshold
    assert torch.equal(out[-3000:].cpu(), kept.to(torch.bfloat16))
    assert not out[:-3000].any()


@runs
def test_what_a_program_leaves_open_is_found_in_the_tensor() -> None:
    """A rule for ties asks for the balance; a cut may say how many equal elements it keeps."""
    chance = random.Random(11)
    base, sources = values(chance, torch.bfloat16), [values(chance, d) for d in DTYPES]
    pattern = int(torch.tensor(0.25).view(torch.int32))
    x = sources[1].float() - base.float()
    last = int((x.abs() == 0.25).nonzero()[6])
    known = Row(1, -1.0, cut=Cut(pattern, last))
    unknown = replace(known, cut=Cut(pattern, -1, equal=7))
    votes = parts_of(Program((Row(0, 1.0), known), "base"), base, sources, 0)
    total = election.balance([[votes[0], -votes[1]]])
    assert (total, election.tie_sign("majority", total)) != (0, 0)
    for rule in ("majority", "authors"):
        tie = election.tie_sign(rule, total)
        vote = Election(tie, "mean", True, 1.0)
        wanted = expected(Program((Row(0, 1.0), known), "base", vote), base, sources, DTYPES[0], 0)
        vote = replace(vote, tie=-tie, rule=rule)
        program = Program((Row(0, 1.0), unknown), "base", vote)
        finite, out = carried_out(program, base, sources, DTYPES[0])
        assert finite
        assert_same_bits(out, wanted)
        streamed = torch.empty(SIZE, device=DEVICE)
        assert streaming.stream(program, base, sources, streamed, chunk=1000)
        assert_same_bits(streamed.cpu(), wanted)


# --- streaming ------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("chunk", [cuda.BLOCK, 1000, SIZE, 10 * SIZE])
def test_a_stream_gives_what_one_pass_gives(chunk: int) -> None:
    chance = random.Random(chunk)
    base, sources = (
        values(chance, torch.bfloat16),
        [values(chance, torch.float16) for _ in range(4)],
    )
    cut = Cut(int(torch.tensor(0.25).view(torch.int32)), 2**33 + 1500)
    rows = (Row(3, 0.5, cut=cut), Row(1, 2.0, draw=Draw(9, 1 << 31)))
    program = Program(rows, "base", Election(0, "mean", True, 1.0))
    _, there = carried_out(program, base, sources, base.dtype, 2**33)
    out = torch.empty_like(base, device=DEVICE)
    assert streaming.stream(program, base, sources, out, start=2**33, chunk=chunk)
    assert_same_bits(out.cpu(), there)
    copied = Program((), "base", copies=2)
    assert streaming.stream(copied, base, sources, out, chunk=chunk)
    assert_same_bits(out.cpu(), sources[2].to(out.dtype))
    sources[2][-1] = NAN
    assert not streaming.stream(copied, base, sources, out, chunk=chunk)


# --- as it is compiled ----------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("aggregate", ["none", "mean"])
def test_compiled_code_fuses_nothing_and_loads_whole_words(aggregate: str) -> None:
    """What only the compiler could get wrong, read from its PTX; needs no device."""
    ptx = compiled(aggregate)
    assert "fma" not in ptx
    assert ".ftz" not in ptx
    assert ("div.rn.f32" in ptx) == (aggregate == "mean")
    assert "div.full" not in ptx
    assert "div.approx" not in ptx
    assert "bar.sync" not in ptx  # no warp waits for another
    assert ptx.count("ld.global.v4.b32") == 4  # the base and three sources, 16 bytes a thread


def compiled(aggregate: str) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from evomerge.merging.kernels.triton_program import merge

    chosen = {"BASE": True, "CUTS": True, "TOPS": False, "DRAWS": True, "AGGREGATE": aggregate}
    chosen |= {"LIMIT": 3e38, "BLOCK": cuda.BLOCK, "PAIRED": True}
    types = {"out": "*bf16", "flag": "*i32", "base": "*bf16", "table": "*i64", "size": "i64"}
    types["sources"] = ("*bf16",) * 3
    signature = {name: types.get(name, "constexpr") for name in merge.arg_names}
    places: list[tuple[int, ...]] = []
    for place, name in enumerate(merge.arg_names):
        if name == "sources":
            places += [(place, row) for row in range(3)]
        elif name in types:
            places.append((place,))
    aligned = {place: [["tt.divisibility", 16]] for place in places}
    kernel = triton.compile(
        ASTSource(merge, signature, constexprs=chosen, attrs=aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "enable_fp_fusion": False},
    )
    return str(kernel.asm["ptx"])
