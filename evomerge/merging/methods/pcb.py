"""PCB merging: entries compete by size within a task vector and by agreement between them.

Knows nothing of checkpoints, devices or studies; how an exact order statistic is found in a stream
is `selection`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evomerge.merging.methods.base import Block, Blocks, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.combination import moved
from evomerge.merging.methods.matrices import active
from evomerge.merging.methods.selection import Key, Quota, Rows, cuts


@dataclass(frozen=True)
class Bounds:
    """Of one task vector: the magnitudes to clip to, and the β that scores 0 and that scores 1."""

    low: float
    high: float
    floor: float = 0.0
    top: float = 0.0


def pcb(
    base: Tensor, sources: Tensor, bounds: Sequence[Bounds], *, weights: Sequence[float]
) -> Tensor:
    """Average task vectors, each entry by how well it competes.

        τ̂ᵢ = sign(τᵢ)·|τᵢ| clipped to [lᵢ, hᵢ]        lᵢ, hᵢ: |τᵢ| of rank ⌊q·P⌋ from each end
        βᵢ = exp(N·((|τ̂ᵢ| − lᵢ)/(hᵢ − lᵢ))²)·tanh(τᵢ·Σⱼ τⱼ)
        sᵢ = max(βᵢ − fᵢ, 0) / (max βᵢ − fᵢ)           fᵢ: the ⌈ratio·P⌉-th largest βᵢ
        θ  = θ₀ + Σᵢ λ·wᵢ·τ̂ᵢ·sᵢ / Σᵢ sᵢ                (a sum of s below 1e-12 divides by that)

    Shapes: base [n], sources [s, n] float32, bounds and weights λ·w [s], P elements in the tensor
    or in the model, N = s; returns [n] float32. τ and β are rounded to float32, all else is float64
    and rounded once before it is added to the base. β is divided by exp(N), which could overflow.
    With λ = 0, ratio 0 or without a weight the result is the base bit for bit. Where hᵢ = lᵢ the
    quotient is 0; where the best ⌈ratio·P⌉ are equal, s is 1 for those of them that moved. A source
    of weight 0 takes no part and N does not count it.

    Source: Du et al. 2024, arXiv:2410.02396, as in the authors' pcb-merging.py (its formula for β
    is not the paper's). Its upper clip is one rank lower than its lower one; degenerate quotients
    are NaN there.
    """
    taus = [source - base for source in sources]
    scores = [
        _score(beta, tau, bound)
        for beta, tau, bound in zip(competition(taus, bounds), taus, bounds, strict=True)
    ]
    total, divisor = torch.zeros((2, len(base)), dtype=torch.float64, device=base.device)
    for tau, score, bound, weight in zip(taus, scores, bounds, weights, strict=True):
        total += _clipped(tau, bound).mul_(tau.sign()).mul_(score).mul_(weight)
        divisor += score
    return moved(base, total.div_(divisor.clamp_(min=1e-12)).float())


def competition(taus: Sequence[Tensor], bounds: Sequence[Bounds]) -> Iterator[Tensor]:
    """βᵢ·exp(−N) of each task vector. Shapes: taus s times [n] float32; yields [n] float32."""
    total = torch.zeros_like(taus[0], dtype=torch.float64)
    for tau in taus:
        total += tau
    for tau, bound in zip(taus, bounds, strict=True):
        inner = _clipped(tau, bound).sub_(bound.low).div_((bound.high - bound.low) or 1.0)
        intra = inner.square_().sub_(1).mul_(len(taus)).exp_()
        yield intra.mul_((total * tau).tanh_()).float()


class _Group(NamedTuple):
    """What competes as one vector: tensors of one ratio and clip, merged from the same sources."""

    ratio: float
    clip: float
    chosen: tuple[int, ...]


Stream = Callable[[], Iterable[tuple[Coefficients, Blocks]]]


def bounds_of(stream: Stream) -> dict[_Group, tuple[Bounds, ...]]:
    """The bounds of each group's chosen sources, over all the tensors of the stream."""
    sizes: dict[_Group, int] = {}
    for coefficients, _ in stream():
        group = _group(coefficients)
        sizes[group] = sizes.get(group, 0) + coefficients.size
    clips = _clips(stream, sizes)
    ranked = _ranked(stream, sizes, clips)
    return {
        group: tuple(
            Bounds(clip.low, clip.high, ranked[group, i, "floor"], ranked[group, i, "top"])
            for i, clip in enumerate(clips[group])
        )
        for group in sizes
    }


class Pcb(MergeMethod):
    """`pcb` as a plug-in."""

    name = "pcb"
    summary = "averages task vectors by a competition of their entries, inside and between them"
    formula = (
        "θ = θ₀ + λ·Σᵢ wᵢ·τ̂ᵢ·sᵢ / Σᵢ sᵢ,  s: the best of exp(N·|τ̂ᵢ|²)·tanh(τᵢ·Σⱼ τⱼ) in [0, 1]"
    )
    parameters = (
        Parameter("weight", "source", "float", 1.0, "factor of the source's task vector"),
        Parameter(
            "ratio", "recipe", "float", 0.1, "share of the entries that score", low=0.0, high=1.0
        ),
        Parameter(
            "clip",
            "recipe",
            "float",
            1e-4,
            "share of the magnitudes clipped at either end",
            low=0.0,
            high=0.49,
        ),
        Parameter("lambda", "recipe", "float", 1.0, "factor of the merged task vector"),
        Parameter(
            "scope",
            "recipe",
            "choice",
            "tensor",
            "what the entries of a task vector compete in: one tensor, or the model (slower: it is "
            "read five times before the first tensor is merged)",
            choices=("tensor", "global"),
        ),
    )

    def survey(self, model: Stream) -> Mapping[_Group, tuple[Bounds, ...]] | None:
        def stream() -> Iterator[tuple[Coefficients, Blocks]]:
            return ((c, blocks) for c, blocks in model() if _competes(c, "global"))

        return bounds_of(stream) or None

    def prepare(
        self, blocks: Blocks, coefficients: Coefficients, survey: Any
    ) -> tuple[Bounds, ...] | None:
        if _competes(coefficients, "global"):
            found: tuple[Bounds, ...] = survey[_group(coefficients)]
            return found
        if _competes(coefficients, "tensor"):
            return bounds_of(lambda: [(coefficients, blocks)])[_group(coefficients)]
        return None

    def merge(
        self, block: Block, coefficients: Coefficients, prepared: tuple[Bounds, ...] | None
    ) -> Tensor:
        assert block.base is not None
        if prepared is None:
            return block.base.clone()
        scale, weights = coefficients.number("lambda"), coefficients.floats("weight")
        chosen = active(coefficients)
        return pcb(
            block.base,
            block.sources[chosen],
            prepared,
            weights=[scale * weights[index] for index in chosen],
        )


def _competes(coefficients: Coefficients, scope: str) -> bool:
    """Whether anything is merged into this tensor, and in a competition of that scope."""
    idle = coefficients.number("lambda") == 0 or coefficients.number("ratio") == 0
    return not idle and bool(active(coefficients)) and coefficients.choice("scope") == scope


def _group(coefficients: Coefficients) -> _Group:
    ratio, clip = coefficients.number("ratio"), coefficients.number("clip")
    return _Group(ratio, clip, tuple(active(coefficients)))


def _task_vectors(stream: Stream) -> Iterator[tuple[_Group, list[Tensor]]]:
    """The chosen sources' task vectors, a block at a time. Shapes: s' times [n]."""
    for coefficients, blocks in stream():
        group = _group(coefficients)
        for block in blocks():
            assert block.base is not None
            yield group, [block.sources[index] - block.base for index in group.chosen]


def _clips(stream: Stream, sizes: Mapping[_Group, int]) -> dict[_Group, tuple[Bounds, ...]]:
    """The magnitudes between which each task vector is clipped."""

    def rows() -> Iterator[tuple[Key, int, Tensor]]:
        for group, taus in _task_vectors(stream):
            for source, tau in enumerate(taus):
                for end in ("low", "high"):
                    yield (group, source, end), 0, tau

    quotas: dict[Key, Quota] = {}
    for group, size in sizes.items():
        cut = math.floor(group.clip * size)
        for source in range(len(group.chosen)):
            quotas[group, source, "low"] = Quota(size - cut, all_equal=True)
            quotas[group, source, "high"] = Quota(cut + 1, all_equal=True)
    found = _magnitudes(rows, quotas)
    return {
        group: tuple(
            Bounds(found[group, source, "low"], found[group, source, "high"])
            for source in range(len(group.chosen))
        )
        for group in sizes
    }


def _ranked(
    stream: Stream,
    sizes: Mapping[_Group, int],
    clips: Mapping[_Group, tuple[Bounds, ...]],
) -> dict[Key, float]:
    """The β of each task vector that score 0 and 1, under (group, source, "floor" or "top")."""

    def betas(sign: int) -> Iterator[tuple[Key, int, Tensor]]:
        for group, taus in _task_vectors(stream):
            for source, beta in enumerate(competition(taus, clips[group])):
                part = (beta * sign).clamp_(min=0)
                for end in ("floor", "top"):
                    yield (group, source, end), 0, part

    ranks: dict[Key, int] = {}
    lengths: dict[Key, int] = {}
    for group, size in sizes.items():
        kept = size - math.floor(size * (1 - group.ratio) + 1e-9)
        for source in range(len(group.chosen)):
            ranks |= {(group, source, "floor"): kept, (group, source, "top"): 1}
            lengths |= {(group, source, end): size for end in ("floor", "top")}
    quotas = {key: Quota(rank, all_equal=True) for key, rank in ranks.items()}
    found = _magnitudes(lambda: betas(1), quotas)
    # `cuts` ranks magnitudes: where too few β are positive, the others are ranked from below
    rest = {
        key: Quota(lengths[key] - rank + 1, all_equal=True)
        for key, rank in ranks.items()
        if found[key] == 0
    }
    return found | {key: -value for key, value in _magnitudes(lambda: betas(-1), rest).items()}


def _magnitudes(rows: Rows, quotas: Mapping[Key, Quota]) -> dict[Key, float]:
    """The quota-th largest magnitude under each key."""
    found = cuts(rows, quotas)
    return {key: _magnitude(cut.pattern) for key, cut in found.items()}


def _magnitude(pattern: int) -> float:
    value: float = struct.unpack("=f", struct.pack("=i", pattern))[0]
    return value


def _clipped(tau: Tensor, bound: Bounds) -> Tensor:
    """|τ| within the bounds. Shapes: [n] float32 -> [n] float64."""
    return tau.abs().double().clamp_(bound.low, bound.high)


def _score(beta: Tensor, tau: Tensor, bound: Bounds) -> Tensor:
    """s of one task vector. Shapes: beta and tau [n] float32; returns [n] float64."""
    if bound.top == bound.floor:
        return ((beta >= bound.top) & (tau != 0)).double()
    span = bound.top - bound.floor
    return beta.double().sub_(bound.floor).clamp_(min=0).div_(span)
