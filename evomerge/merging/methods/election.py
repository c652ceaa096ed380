"""Electing one sign per weight among task vectors, and merging those that agree with it.

The second half of TIES and of DARE-TIES. Knows nothing of how the task vectors were thinned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from evomerge.merging.kernels.program import BASE, Election, Program, Row, copy_of
from evomerge.merging.methods.base import Coefficients, Parameter
from evomerge.merging.methods.combination import NO_WEIGHT, weighted_sum

SIGN_TIE = Parameter(
    "sign_tie",
    "recipe",
    "choice",
    "majority",
    "sign where the votes sum to 0: the sign that most weights of the scope elect (majority: none "
    "if that is even; authors: negative if that is even), positive, or none (zero)",
    choices=("majority", "positive", "zero", "authors"),
)
AGGREGATE = Parameter(
    "aggregate",
    "recipe",
    "choice",
    "mean",
    "how agreeing entries are merged; max takes the largest weighted magnitude",
    choices=("mean", "sum", "max"),
)


def election_parameters(*, normalize: bool) -> tuple[Parameter, ...]:
    """The parameters of an election; `normalize` is the default that the method gives it."""
    return (
        SIGN_TIE,
        AGGREGATE,
        Parameter(
            "normalize",
            "recipe",
            "bool",
            normalize,
            "divide a mean by the weights of the agreeing sources; false makes it a sum",
        ),
    )


def sole_voter(coefficients: Coefficients) -> int | None:
    """The source that the merge is when its task vector is whole: the only one with a weight, and
    a coefficient of exactly 1. None if there is no such source."""
    weights = coefficients.floats("weight")
    voters = [index for index, weight in enumerate(weights) if weight != 0]
    if len(voters) != 1:
        return None
    weight = weights[voters[0]]
    mean = coefficients.choice("aggregate") == "mean" and coefficients.flag("normalize")
    share = 1.0 if mean and abs(weight) >= NO_WEIGHT else weight
    return voters[0] if coefficients.number("lambda") * share == 1 else None


def needs_balance(coefficients: Coefficients) -> bool:
    """Whether a tie can occur and its rule asks for the balance of all elected signs."""
    voters = sum(weight != 0 for weight in coefficients.floats("weight"))
    return voters > 1 and coefficients.choice("sign_tie") in ("majority", "authors")


def election_program(
    coefficients: Coefficients, rows: Sequence[Row], *, tie: int | None, whole: Sequence[bool]
) -> Program:
    """A merge by election as data: `rows` of every source [s], of which those with a weight vote.

    `tie` is None where it was not counted; `whole` [s] says whose task vector is left as it is.
    """
    weights = coefficients.floats("weight")
    if coefficients.number("lambda") == 0 or not any(weights):
        return BASE
    only = sole_voter(coefficients)
    if only is not None and whole[only]:
        return copy_of(only)
    election = Election(
        tie=tie or 0,
        aggregate=coefficients.choice("aggregate"),  # type: ignore[arg-type]
        normalize=coefficients.flag("normalize"),
        scale=coefficients.number("lambda"),
        rule=coefficients.choice("sign_tie") if tie is None else None,
    )
    return Program(tuple(row for row in rows if weights[row.source] != 0), "base", election)


def signs(votes: Sequence[Tensor]) -> Tensor:
    """sign(Σᵢ vᵢ), 0 at a tie. Shapes: votes s times [n]; returns [n] float32."""
    return _total(votes).sign_()


def balance(ballots: Iterable[Sequence[Tensor]]) -> int:
    """Σⱼ sign(Σᵢ vᵢⱼ) over a stream of blocks' votes: exact, so the cutting does not matter."""
    return sum(int(signs(votes).sum(dtype=torch.int64)) for votes in ballots)


def tie_sign(rule: str, balance: int) -> int:
    """The sign elected where the votes sum to 0: 1, −1 or 0 (none)."""
    if rule == "positive":
        return 1
    if rule == "zero":
        return 0
    majority = (balance > 0) - (balance < 0)
    return -1 if rule == "authors" and majority == 0 else majority


def consensus(
    votes: Sequence[Tensor],
    weights: Sequence[float],
    *,
    tie: int,
    aggregate: str = "mean",
    normalize: bool = True,
) -> Tensor:
    """Merge weighted task vectors where they have the elected sign.

        γ = sign(Σᵢ vᵢ), `tie` where the sum is 0             vᵢ = wᵢ·τ̂ᵢ
        A = {i : sign(vᵢ) = γ ≠ 0}
        τ_m = Σ_A vᵢ / Σ_A wᵢ    (mean; without `normalize` the divisor is 1)
            | Σ_A vᵢ             (sum)
            | γ·max_A |vᵢ|       (max)

    Shapes: votes s times [n] float32, weights [s], none 0; returns [n]. Sums run in float32 in
    the order given. An exact zero neither votes nor counts in the divisor; a weight without an
    elected sign, or without a vote, gives 0. A divisor below 1e-8 is taken as 1.

    Source: Yadav et al. 2023, arXiv:2306.01708, sec. 3, who have no weights; weights enter the
    vote and the mean as in mergekit.
    """
    elected = elect(votes, tie)
    return agreement(votes, weights, elected, aggregate=aggregate, normalize=normalize)


def elect(votes: Sequence[Tensor], tie: int) -> Tensor:
    """γ = sign(Σᵢ vᵢ), `tie` where the sum is 0. Shapes: votes s times [n]; returns [n]."""
    elected = signs(votes)
    if tie:
        elected += (1 - elected.abs()) * tie
    return elected


def agreement(
    votes: Sequence[Tensor],
    weights: Sequence[float],
    elected: Tensor,
    *,
    aggregate: str = "mean",
    normalize: bool = True,
) -> Tensor:
    """What `consensus` does once the signs γ are elected. Shapes: elected [n]; returns [n]."""
    agreeing = [_agreeing(vote, elected) for vote in votes]
    if aggregate == "max":
        return _signed(_largest(agreeing), elected)
    total = _signed(_total(agreeing), elected)
    if aggregate == "sum" or not normalize:
        return total
    divisor = weighted_sum((magnitude.sign() for magnitude in agreeing), weights)
    assert divisor is not None
    return total.div_(torch.where(divisor.abs() < NO_WEIGHT, 1.0, divisor))


def _agreeing(vote: Tensor, elected: Tensor) -> Tensor:
    """|v| where v has the elected sign, else 0. Shapes: [n]."""
    # clamp keeps or drops the sign of zero by whether it runs vectorised; adding 0 settles it
    return (vote * elected).clamp_(min=0).add_(0.0)


def _signed(magnitude: Tensor, elected: Tensor) -> Tensor:
    # no −0: where nobody votes, the sign elected at a tie must not show
    return magnitude.mul_(elected).add_(0.0)


def _total(rows: Sequence[Tensor]) -> Tensor:
    total = rows[0].clone()
    for row in rows[1:]:
        total.add_(row)
    return total


def _largest(rows: Sequence[Tensor]) -> Tensor:
    largest = rows[0].clone()
    for row in rows[1:]:
        torch.maximum(largest, row, out=largest)
    return largest
