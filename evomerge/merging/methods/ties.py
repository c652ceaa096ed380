"""TIES merging: trim each task vector, elect a sign per weight, average what agrees.

Knows nothing of checkpoints, devices or studies. The trim is found in `trimming`, the vote counted
in `election`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from evomerge.merging.kernels.program import Program, Row
from evomerge.merging.methods.base import (
    Block,
    Blocks,
    Coefficients,
    MergeMethod,
    Parameter,
    facts_of,
)
from evomerge.merging.methods.combination import moved
from evomerge.merging.methods.election import (
    balance,
    consensus,
    election_parameters,
    election_program,
    needs_balance,
    sole_voter,
    tie_sign,
)
from evomerge.merging.methods.selection import Cut
from evomerge.merging.methods.trimming import trims_of, trims_within
from evomerge.merging.values import Scalar

PRESETS: Mapping[str, Mapping[str, Scalar]] = MappingProxyType(
    {
        "ties-ref": {
            "scope": "global",
            "ties_at_threshold": "keep_all",
            "sign_tie": "authors",
            "aggregate": "mean",
            "normalize": True,
        },
        "mergelm": {
            "scope": "global",
            "ties_at_threshold": "keep_all",
            "sign_tie": "majority",
            "aggregate": "mean",
            "normalize": True,
        },
        "mergekit": {
            "scope": "tensor",
            "ties_at_threshold": "exact",
            "sign_tie": "positive",
            "aggregate": "mean",
            "normalize": True,
        },
    }
)
"""The parameters under which we do what another implementation does; see docs/methods/ties.md."""

TRIM_PARAMETERS = (
    Parameter(
        "scope",
        "recipe",
        "choice",
        "tensor",
        "what a trim and a majority run over: one tensor, or the model (slower: it is read "
        "several times before the first tensor is merged)",
        choices=("tensor", "global"),
    ),
    Parameter(
        "ties_at_threshold",
        "recipe",
        "choice",
        "exact",
        "exact keeps ⌊d·n⌋ entries, equal ones by lowest index; keep_all is the authors' rule: "
        "one more, and all that are equal to it",
        choices=("exact", "keep_all"),
    ),
)
"""What a trim runs over, and what it does with equal magnitudes."""


def ties(
    base: Tensor,
    sources: Tensor,
    trims: Sequence[Cut],
    *,
    weights: Sequence[float],
    scale: float = 1.0,
    tie: int = 0,
    aggregate: str = "mean",
    normalize: bool = True,
    start: int = 0,
) -> Tensor:
    """Merge task vectors, keeping only large entries that agree in sign.

        τ̂ᵢ = τᵢ where |τᵢ| is among the ⌊dᵢ·P⌋ largest, else 0          τᵢ = θᵢ − θ₀   (trim)
        γ  = sign(Σᵢ wᵢ·τ̂ᵢ), `tie` where the sum is 0                                 (elect)
        θ  = θ₀ + λ·Σ_A wᵢ·τ̂ᵢ / Σ_A wᵢ          A = {i : sign(wᵢ·τ̂ᵢ) = γ ≠ 0}          (merge)

    Shapes: base [n], sources [s, n] float32 from flat index `start`; trims and weights [s]; returns
    [n] float32. All arithmetic is float32. `aggregate` and `normalize` as in `consensus`.
    With λ = 0 or without a weight the result is the base bit for bit; a weight of the model that
    nobody votes on equals the base's.

    Source: Yadav et al. 2023, arXiv:2306.01708, sec. 3. The authors' sources are unweighted, they
    keep one entry more than ⌊d·P⌋ and all that are equal to the last; `PRESETS` reproduces them.
    """
    voters = [index for index, weight in enumerate(weights) if weight != 0]
    if scale == 0 or not voters:
        return base.clone()
    chosen = [weights[index] for index in voters]
    votes = trimmed_votes(Block(base, sources, start), trims, weights)
    tau = consensus(votes, chosen, tie=tie, aggregate=aggregate, normalize=normalize)
    return moved(base, tau.mul_(scale))


def trimmed_votes(block: Block, trims: Sequence[Cut], weights: Sequence[float]) -> list[Tensor]:
    """vᵢ = wᵢ·τ̂ᵢ for the sources that have a weight. Shapes: s' times [n]."""
    votes = []
    for source, trim, weight in zip(block.sources, trims, weights, strict=True):
        if weight != 0:
            tau = source - block.base
            if not trim.keeps_all:
                tau *= trim.mask(tau, block.start)
            votes.append(tau.mul_(weight))
    return votes


@dataclass(frozen=True)
class Prepared:
    """What `merge` must know of a whole tensor: each source's trim [s], and the sign at a tie.

    The sign is None where it is left to the kernel.
    """

    trims: tuple[Cut, ...]
    tie: int | None


@dataclass(frozen=True)
class Survey:
    """The tensors of global scope, seen as one vector in name order.

    A source's trim runs over all tensors that share a density (all of them, if it does not vary):
    `trims` [s] by tensor name. `balance` is Σⱼ of the elected signs over all of them.
    """

    trims: Mapping[str, tuple[Cut, ...]]
    balance: int


class Ties(MergeMethod):
    """`ties` as a plug-in."""

    name = "ties"
    summary = "trims task vectors, elects a sign per weight and averages what agrees"
    formula = "θ = θ₀ + λ·Σ_A wᵢ·τ̂ᵢ / Σ_A wᵢ,  A = {i : sign(wᵢ·τ̂ᵢ) = sign(Σᵢ wᵢ·τ̂ᵢ) ≠ 0}"
    parameters = (
        Parameter("weight", "source", "float", 1.0, "weight in the vote and in the mean"),
        Parameter(
            "density", "source", "float", 1.0, "share of the task vector kept", low=0.0, high=1.0
        ),
        Parameter("lambda", "recipe", "float", 1.0, "factor of the merged task vector"),
        *TRIM_PARAMETERS,
        *election_parameters(normalize=True),
    )

    def survey(self, model: Callable[[], Iterable[tuple[Coefficients, Blocks]]]) -> Survey | None:
        def stream() -> Iterator[tuple[Coefficients, Blocks]]:
            return ((c, blocks) for c, blocks in model() if c.choice("scope") == "global")

        trims = trims_of(stream, across=True)
        if not trims:
            return None
        ballots = (
            votes
            for coefficients, blocks in stream()
            if needs_balance(coefficients)
            for votes in _ballots(blocks, coefficients, trims[coefficients.tensor])
        )
        return Survey(trims, balance(ballots))

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> Prepared:
        rule = coefficients.choice("sign_tie")
        if coefficients.choice("scope") == "global":
            return Prepared(survey.trims[coefficients.tensor], tie_sign(rule, survey.balance))
        if coefficients.number("lambda") == 0:
            return Prepared((), 0)
        trims = trims_within(blocks, coefficients)
        counted = needs_balance(coefficients)
        if counted and facts_of(blocks):
            return Prepared(trims, None)
        total = balance(_ballots(blocks, coefficients, trims)) if counted else 0
        return Prepared(trims, tie_sign(rule, total))

    def program(self, coefficients: Coefficients, prepared: Prepared) -> Program:
        whole = [trim.keeps_all for trim in prepared.trims]
        weights = coefficients.floats("weight")
        rows = [
            Row(index, weights[index], weights[index], cut=None if trim.keeps_all else trim)
            for index, trim in enumerate(prepared.trims)
        ]
        return election_program(coefficients, rows, tie=prepared.tie, whole=whole)

    def merge(self, block: Block, coefficients: Coefficients, prepared: Prepared) -> Tensor:
        assert block.base is not None
        assert prepared.tie is not None
        whole = sole_voter(coefficients)
        if whole is not None and prepared.trims[whole].keeps_all:
            return block.sources[whole].clone()
        return ties(
            block.base,
            block.sources,
            prepared.trims,
            weights=coefficients.floats("weight"),
            scale=coefficients.number("lambda"),
            tie=prepared.tie,
            aggregate=coefficients.choice("aggregate"),
            normalize=coefficients.flag("normalize"),
            start=block.start,
        )


def _ballots(
    blocks: Blocks, coefficients: Coefficients, trims: Sequence[Cut]
) -> Iterator[list[Tensor]]:
    weights = coefficients.floats("weight")
    return (trimmed_votes(block, trims, weights) for block in blocks())
