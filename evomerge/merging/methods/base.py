"""The contract of a merge method: what it is told of a tensor and what it must return.

A method sees float32 blocks of one tensor at a time, so that memory is bounded whatever the size of
the tensor; what it needs to know of the whole tensor (a threshold, a dot product) it works out in
`prepare`, and of the whole model in `survey`. Knows nothing of checkpoints, devices or studies.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from evomerge.merging.kernels.program import Draw, Program
from evomerge.merging.methods.selection import Cut, Quota
from evomerge.merging.values import Scalar


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, as data: menus, validation and search spaces are derived from it.

    `base_choices` are the choices for which the recipe must have a base, though the method as
    such can do without.
    `scope` says whether every source has its own (`source`) or the recipe has one (`recipe`).
    `low` and `high` bound what is valid (inclusive, None is unbounded), not what is worth a search.
    """

    name: str
    scope: Literal["source", "recipe"]
    kind: Literal["float", "bool", "choice"]
    default: Scalar
    doc: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    base_choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """A contiguous run of n elements of one tensor, in flat (row-major) order, as float32.

    base [n] (None for a method without base), sources [s, n] (the models, not task vectors);
    `start` is the flat index of the first element.
    """

    base: Tensor | None
    sources: Tensor
    start: int


class Fitted(Protocol):
    """What a fit learned of the recipe's models: an opened artifact."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What it found out that is no tensor."""

    def __contains__(self, name: object) -> bool: ...

    def tensor(self, name: str) -> Tensor:
        """One of its tensors. Raises CheckpointError if it has none of that name."""


@dataclass(frozen=True)
class Coefficients:
    """Every parameter of a recipe, resolved for one tensor.

    `names` [s] are the sources' names, always in sorted order, so that the order of a recipe's
    sources cannot change a bit of a sum; `order` [s] are their positions in the recipe.
    `source[p]` [s] holds parameter p for each source, `recipe[p]` holds it for the recipe.
    `fitted` is the recipe's artifact, for a method that applies one.
    """

    tensor: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    order: tuple[int, ...]
    source: Mapping[str, tuple[Scalar, ...]]
    recipe: Mapping[str, Scalar]
    seed: int
    fitted: Fitted | None = None

    @property
    def size(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)

    def floats(self, name: str) -> tuple[float, ...]:
        """A float parameter of source scope, for every source [s]."""
        return tuple(float(value) for value in self.source[name])

    def number(self, name: str) -> float:
        """A float parameter of recipe scope."""
        return float(self.recipe[name])

    def flag(self, name: str) -> bool:
        """A bool parameter of recipe scope."""
        return bool(self.recipe[name])

    def choice(self, name: str) -> str:
        """A choice parameter of recipe scope."""
        return str(self.recipe[name])


Blocks = Callable[[], Iterator[Block]]
"""Streams a tensor's blocks from the start; may be called more than once."""


class TensorFacts(Protocol):
    """What is known of a whole tensor's operands, whatever the recipe makes of them."""

    def cut(self, source: int, quota: Quota, *, located: bool = False) -> Cut:
        """The cut that fills a quota of |θᵢ − θ₀|. Unless `located`, it may say how many of those
        equal to the threshold are kept (`Cut.equal`) in place of up to where."""

    def norms(self, source: int, draw: Draw) -> tuple[float, float]:
        """Σ|τᵢ|, and Σ|τᵢ| over the elements that a draw keeps, as `totals` adds them up."""

    def gram(self, *, from_base: bool) -> list[float]:
        """⟨vᵢ, vⱼ⟩ (i ≤ j, by rows), as `reductions.totals` adds them up; v is θ, or τ with
        `from_base`."""


@dataclass(frozen=True)
class Inputs:
    """A tensor's `Blocks`, and its facts.

    Who is handed these has a program carried out: cuts need no location, ties no balance.
    """

    blocks: Blocks
    facts: TensorFacts

    def __call__(self) -> Iterator[Block]:
        return self.blocks()


def facts_of(blocks: Blocks) -> TensorFacts | None:
    """The facts that come with a tensor's blocks, if any do."""
    return blocks.facts if isinstance(blocks, Inputs) else None


def streamed(blocks: Blocks) -> Blocks:
    """The blocks without facts: what a merge that is no program is prepared from by the functions
    of one that is, so that no cut and no tie is left open."""
    return blocks.blocks if isinstance(blocks, Inputs) else blocks


class MethodFacts(ABC):
    """What is known of every merge method, as data.

    `needs_base`: a recipe without a base is refused. `takes_base`: the base is handed over if the
    recipe has one. `artifact`: the kind of artifact that it applies, None for a method that looks
    at no data.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    formula: ClassVar[str]
    parameters: ClassVar[tuple[Parameter, ...]]
    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = False
    min_sources: ClassVar[int] = 1
    max_sources: ClassVar[int | None] = None
    artifact: ClassVar[str | None] = None


class MergeMethod(MethodFacts):
    """One merge method. Instances hold no state: everything is in the arguments.

    Of a method that neither needs nor takes a base, blocks have none.
    """

    def stands_for(self, tensor: str, source: str, fitted: Fitted | None) -> str:
        """The source's tensor that is merged as `tensor`: another one of the same shape where the
        method gives whole tensors other places."""
        return tensor

    def survey(self, model: Callable[[], Iterable[tuple[Coefficients, Blocks]]]) -> Any:
        """What must be known of the whole model before any tensor is merged (None: nothing).

        `model` streams every float tensor in sorted name order and may be called more than once.
        """
        return None

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> Any:
        """What must be known of the whole tensor before its first block is merged (None: nothing).

        Must not depend on how the tensor is cut into blocks.
        """
        return None

    def program(self, coefficients: Coefficients, prepared: Any) -> Program | None:
        """The merge as data, for kernels that give the bits of `merge`; None: there is only that.

        Must be a program whenever `prepare` was given facts and asked for a cut or a tie.
        """
        return None

    @abstractmethod
    def merge(self, block: Block, coefficients: Coefficients, prepared: Any) -> Tensor:
        """The merged elements [n], float32. Must not write into the block."""
