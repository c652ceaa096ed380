"""The space: a merge method, its fixed parameters and the factors of its searched ones.

Turns a genome of the unit cube into a recipe and back; pure. Whether the method exists and has
these parameters is the business of `check_space`, which needs torch; this does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    Strict,
    TypeAdapter,
)

from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.merging.values import Value
from evomerge.space.choice import Choice
from evomerge.space.factor import REST, Factor, Gene
from evomerge.trial import Genome

_FACTORS = TypeAdapter(tuple[Factor, ...])


Entry = bool | float | str | tuple[Factor, ...] | Choice


def _read_parameter(entry: object) -> Entry:
    """A fixed scalar, a choice, or a list of factors (their faults keep their place in the
    document)."""
    if isinstance(entry, Choice | Mapping):
        return Choice.model_validate(entry)
    if isinstance(entry, bool | str):
        return entry
    if isinstance(entry, int | float):
        if not math.isfinite(entry):
            raise ValueError("expected a finite number")
        return float(entry)
    if not isinstance(entry, list | tuple):
        raise ValueError(
            "expected a fixed value, a choice {choices, init}, or a list of factors"
            " {low, high, init, ...}"
        )
    factors = _FACTORS.validate_python(entry)
    faults = list(_factor_faults(factors))
    if faults:
        raise ValueError("; ".join(faults))
    return factors


def _factor_faults(factors: Sequence[Factor]) -> Iterator[str]:
    names = [factor.name for factor in factors]
    if not factors:
        yield "expected at least one factor"
    if len(factors) > 1 and None in names:
        yield "each of several factors needs a name"
    elif len(set(names)) < len(names):
        yield f"several factors are named {max(names, key=names.count)!r}"
    if sum(bool(factor.knots or factor.blocks) for factor in factors) > 1:
        yield "only one factor of a parameter may vary over depth: a product of curves is no curve"


def _write_parameter(entry: Entry) -> Any:
    if isinstance(entry, Choice):
        return entry.model_dump(mode="json")
    if not isinstance(entry, tuple):
        return entry
    return [factor.model_dump(mode="json", exclude_defaults=True) for factor in entry]


Parameter = Annotated[
    Entry,
    PlainValidator(_read_parameter),
    PlainSerializer(_write_parameter),
]
Parameters = dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], Parameter]


class Space(BaseModel):
    """A search space.

    `source` holds the parameters that every source has, `recipe` those that the merge has once.
    Each is a fixed value, a choice, or a list of factors; its value for a source and a tensor is
    then the product of the factors' values there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Annotated[str, Strict(), Field(min_length=1)]
    about: Annotated[str, Strict()] = ""
    source: Parameters = {}
    recipe: Parameters = {}

    def genes(self, sources: Sequence[str]) -> tuple[Gene, ...]:
        """Every gene for these sources, in the order of the genome.

        Parameters come in alphabetical order, so that a space read back from JSON with sorted keys
        has the same genome; sources come in the order given.
        """
        return tuple(
            gene
            for section in (self.source, self.recipe)
            for parameter, entry in sorted(section.items())
            for gene in _genes(parameter, entry, sources)
        )

    def encode(self, values: Mapping[str, float], sources: Sequence[str]) -> Genome:
        """The genome [genes] at which each gene named in `values` has that value, the rest `init`.

        Raises ValueError for an unknown gene or a value that it cannot take.
        """
        genes = self.genes(sources)
        unknown = sorted(set(values) - {gene.name for gene in genes})
        if unknown:
            raise ValueError(f"no gene is named {unknown[0]!r}")
        return tuple(gene.unit(values.get(gene.name, gene.init)) for gene in genes)

    def start(self, sources: Sequence[str]) -> Genome:
        """The start point [genes]: every gene at its `init`."""
        return self.encode({}, sources)

    def decode(
        self,
        genome: Sequence[float],
        *,
        base: ModelRef,
        sources: Mapping[str, ModelRef],
        dtype: str | None,
        seed: int,
        artifact: ModelRef | None = None,
    ) -> Recipe:
        """The recipe that a genome [genes] of the unit cube stands for.

        Raises ValueError for a genome of another length or with a gene outside [0, 1].
        """
        genes = self.genes(list(sources))
        if len(genome) != len(genes):
            raise ValueError(f"the space has {len(genes)} genes, the genome {len(genome)}")
        values: dict[str, float] = {}
        for gene, u in zip(genes, genome, strict=True):
            if not 0 <= u <= 1:
                raise ValueError(f"gene {gene.name} is {u}, not in [0, 1]")
            values[gene.name] = gene.value(u)
        return Recipe(
            method=self.method,
            base=base,
            sources=tuple(
                Source(name, model, _resolve(self.source, name, values))
                for name, model in sources.items()
            ),
            parameters=_resolve(self.recipe, None, values),
            dtype=dtype,
            seed=seed,
            artifact=artifact,
        )

    def to_json(self) -> dict[str, Any]:
        """The space written out as plain JSON; `load_space` of it gives an equal space."""
        return self.model_dump(mode="json", exclude_defaults=True)


def _genes(parameter: str, entry: Entry, sources: Sequence[str]) -> Iterator[Gene]:
    if isinstance(entry, Choice):
        yield entry.gene(parameter)
    elif isinstance(entry, tuple):
        for factor in entry:
            yield from factor.genes(_label(parameter, factor), _words(parameter, entry), sources)


def _label(parameter: str, factor: Factor) -> str:
    return f"{parameter}.{factor.name}" if factor.name else parameter


def _words(parameter: str, factors: Sequence[Factor]) -> str:
    return parameter if len(factors) == 1 else f"factor on {parameter}"


def _resolve(
    section: Mapping[str, Any], source: str | None, values: Mapping[str, float]
) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for parameter, entry in section.items():
        if isinstance(entry, Choice):
            found[parameter] = entry.chosen(parameter, values)
        elif isinstance(entry, tuple):
            found[parameter] = _value(parameter, entry, source, values)
        else:
            found[parameter] = entry
    return found


def _value(
    parameter: str, factors: Sequence[Factor], source: str | None, values: Mapping[str, float]
) -> Value:
    """A searched parameter as the recipe writes it: rules by tensor type where they differ."""
    kinds = [kind for factor in factors for kind in factor.types if kind != REST]
    rest = _product(parameter, factors, source, None, values)
    if not kinds:
        return rest
    rules = [
        {"type": kind, "value": _product(parameter, factors, source, kind, values)}
        for kind in dict.fromkeys(kinds)
    ]
    return [*rules, {"value": rest}]


def _product(
    parameter: str,
    factors: Sequence[Factor],
    source: str | None,
    kind: str | None,
    values: Mapping[str, float],
) -> Value:
    scalar, course, steps = 1.0, [1.0], False
    for factor in factors:
        over_depth = factor.course(_label(parameter, factor), source, kind, values)
        if len(over_depth) == 1:
            scalar *= over_depth[0]
        else:
            course, steps = over_depth, factor.blocks is not None
    scaled = [scalar * value for value in course]
    if len(scaled) == 1:
        return scaled[0]
    return {"blocks": scaled} if steps else scaled
