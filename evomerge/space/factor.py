"""A factor: one searched number, or one for each source, tensor type or place in depth.

Reads its YAML form, lists its genes and says which genes make its value for one source and one
tensor type. Knows nothing of recipes or of the merge method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

from evomerge.merging.layout import TENSOR_TYPES, TensorType
from evomerge.space.scales import Scale, bounds_fault, from_unit, level_of, middle_of, to_unit
from evomerge.spec import nearest

Number = Annotated[float, Strict()]
REST = "rest"
"""In a factor's `types`: every tensor type that is not listed."""

# all their tensors lie at one depth, so that a curve over depth would have genes without effect
_AT_ONE_DEPTH: tuple[TensorType, ...] = ("embedding", "head")


@dataclass(frozen=True)
class Gene:
    """One coordinate of the genome: its name, bounds, start value and what it does, in words.

    A discrete gene has `values`, ascending, one for each of as many equal cells of [0, 1]; where
    they stand for words, `words` are these.
    """

    name: str
    low: float
    high: float
    init: float
    scale: Scale
    does: str
    values: tuple[float, ...] = ()
    words: tuple[bool | str, ...] = ()

    @property
    def shown(self) -> tuple[bool | float | str, ...]:
        """What its levels are, to a reader."""
        return self.words or self.values

    @property
    def levels(self) -> int:
        """How many values a discrete gene has; 0 for a continuous one."""
        return len(self.values)

    def value(self, u: float) -> float:
        """The parameter's value at `u` in [0, 1]: of a discrete gene one of `values`, exactly."""
        if self.values:
            return self.values[level_of(u, self.levels)]
        return from_unit(u, low=self.low, high=self.high, scale=self.scale)

    def unit(self, value: float) -> float:
        """Where in [0, 1] a value of [low, high] lies; of a discrete gene its cell's middle.

        Raises ValueError for a value that the gene cannot take.
        """
        if not (value in self.values if self.values else self.low <= value <= self.high):
            raise ValueError(f"{self.name}: {value} is not {self._range()}")
        if self.values:
            return middle_of(self.values.index(value), self.levels)
        return to_unit(value, low=self.low, high=self.high, scale=self.scale)

    def _range(self) -> str:
        if self.values:
            return f"one of {_listed(self.values)}"
        return f"in its bounds, {self.low:g} to {self.high:g}"


class Factor(BaseModel):
    """One factor of a parameter, as a space's YAML writes it.

    Its numbers lie between `low` and `high`, spread by `scale`, or each is one of `values`. `per`
    names what it differs by. `knots` makes it a gradient over depth, linear between equally spaced
    knots; `blocks` makes it constant on equal runs of depth. With `per: [type]` it has genes for
    `types` only, and tensors of other types take `init`, or the genes of `rest` if `types` ends
    with it. Types that lie at one depth (embedding, head) get one gene in place of a curve.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")] | None = None
    per: tuple[Literal["source", "type"], ...] = ()
    types: tuple[str, ...] = ()
    knots: Annotated[int, Strict(), Field(ge=2, le=64)] | None = None
    blocks: Annotated[int, Strict(), Field(ge=2, le=64)] | None = None
    values: tuple[Number, ...] = ()
    low: Number | None = None
    high: Number | None = None
    init: Number
    scale: Scale = "linear"

    @field_validator("per", mode="before")
    @classmethod
    def _bare_word(cls, per: object) -> object:
        return (per,) if isinstance(per, str) else per

    @field_validator("types")
    @classmethod
    def _known_types(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        faults = [f"unknown type {t!r}{nearest(t, TENSOR_TYPES)}" for t in types if t not in _TYPES]
        faults += [f"type {t!r} is listed twice" for t in sorted(set(types)) if types.count(t) > 1]
        if faults:
            raise ValueError("; ".join(faults))
        return types

    @model_validator(mode="after")
    def _consistent(self) -> Factor:
        faults = list(self._faults())
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest of its numbers."""
        if self.values:
            return self.values[0], self.values[-1]
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high

    def _faults(self) -> Iterator[str]:
        yield from self._value_faults() if self.values else self._bound_faults()
        if len(set(self.per)) < len(self.per):
            yield f"per lists {self.per[0]!r} twice"
        if "type" in self.per and not self.types:
            yield f"per type needs types: a list of {', '.join(TENSOR_TYPES)}"
        if self.types == (REST,):
            yield "types is rest alone, which is every tensor; leave out per type"
        if "type" not in self.per and self.types:
            yield "types is given, but per does not hold type"
        if self.knots and self.blocks:
            yield "knots and blocks are two ways to vary over depth; give one of them"

    def _bound_faults(self) -> Iterator[str]:
        low, high = self.low, self.high
        if low is None or high is None:
            missing = " and ".join(key for key in ("low", "high") if getattr(self, key) is None)
            yield f"missing {missing}; a factor has low and high, or values"
        elif low >= high:
            yield f"low must be below high, got low {low:g} and high {high:g}"
        elif not low <= self.init <= high:
            yield f"init {self.init:g} lies outside [{low:g}, {high:g}]"
        elif fault := bounds_fault(low, high, self.scale):
            yield fault

    def _value_faults(self) -> Iterator[str]:
        given = [key for key in ("low", "high") if getattr(self, key) is not None]
        given += ["scale"] if self.scale != "linear" else []
        if given:
            yield f"values stand in place of {' and '.join(given)}; give one or the other"
        if self.knots:
            yield "values with knots: between two knots lies what is no value; use blocks"
        if len(self.values) == 1:
            yield "values holds one number; write it as the parameter's fixed value"
        falls = [(a, b) for a, b in pairwise(self.values) if a >= b]
        if falls:
            yield "values must ascend, each once; got {:g} before {:g}".format(*falls[0])
        elif self.init not in self.values:
            close = min(self.values, key=lambda value: abs(value - self.init))
            yield f"init {self.init:g} is none of the values; the nearest is {close:g}"

    def genes(self, label: str, parameter: str, sources: Sequence[str]) -> list[Gene]:
        """The factor's genes; `label` starts their names, `parameter` is what they act on."""
        return [
            self._gene(label, parameter, source, kind, place)
            for source in (sources if "source" in self.per else [None])
            for kind in (self.types if "type" in self.per else [None])
            for place in self._places(kind)
        ]

    def course(
        self, label: str, source: str | None, kind: str | None, values: Mapping[str, float]
    ) -> list[float]:
        """The factor's value over depth for one source and one type: one number if constant.

        `values` maps the genes' names to their values; `kind` None stands for all other types.
        """
        if "type" in self.per and kind not in self.types:
            if REST not in self.types:
                return [self.init]
            kind = REST
        own_source = source if "source" in self.per else None
        own_kind = kind if "type" in self.per else None
        places = self._places(own_kind)
        return [values[_gene_name(label, own_source, own_kind, place)] for place in places]

    def _places(self, kind: str | None) -> list[int | None]:
        count = self.knots or self.blocks
        return [None] if count is None or kind in _AT_ONE_DEPTH else list(range(count))

    def _gene(
        self, label: str, parameter: str, source: str | None, kind: str | None, place: int | None
    ) -> Gene:
        words = [
            parameter,
            f"of source {source}" if source else "",
            f"in {'all other' if kind == REST else kind} tensors" if kind else "",
            self._depth_words(place),
        ]
        name = _gene_name(label, source, kind, place)
        does = " ".join(word for word in words if word)
        low, high = self.bounds
        return Gene(name, low, high, self.init, self.scale, does, self.values)

    def _depth_words(self, place: int | None) -> str:
        if place is None:
            return ""
        if self.knots:
            depth = place / (self.knots - 1)
            return {0.0: "at the first layer", 1.0: "at the last layer"}.get(
                depth, f"at depth {depth:.2g}"
            )
        assert self.blocks is not None
        return f"from depth {place / self.blocks:.2g} to {(place + 1) / self.blocks:.2g}"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


_TYPES = frozenset((*TENSOR_TYPES, REST))


def _gene_name(label: str, source: str | None, kind: str | None, place: int | None) -> str:
    return label + "".join(f"[{key}]" for key in (source, kind, place) if key is not None)
