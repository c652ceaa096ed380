"""Does a space fit its merge method and these sources? Every fault in one go, as lines of text.

The only part of `space` that knows merge methods: it imports them, and so torch, when called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from evomerge.space.choice import Choice
from evomerge.space.factor import Factor
from evomerge.space.space import Space
from evomerge.spec import nearest

if TYPE_CHECKING:
    from evomerge.merging.methods.base import MethodFacts, Parameter


def check_space(space: Space, sources: Sequence[str]) -> list[str]:
    """What is wrong with searching `space` over `sources`; empty if nothing is."""
    from evomerge.merging.methods.registry import ALL

    method = ALL.get(space.method)
    if method is None:
        return [f"space: unknown merge method {space.method!r}{nearest(space.method, ALL)}"]
    return [f"space: {fault}" for fault in _faults(space, method, len(sources))]


def _faults(space: Space, method: MethodFacts, count: int) -> Iterator[str]:
    most = method.max_sources
    if count < method.min_sources or (most is not None and count > most):
        wanted = (
            f"{method.min_sources}"
            if most == method.min_sources
            else (
                f"at least {method.min_sources}"
                if most is None
                else f"{method.min_sources} to {most}"
            )
        )
        yield f"{method.name} merges {wanted} sources, the study has {count}"
    known = {parameter.name: parameter for parameter in method.parameters}
    for section, entries in (("source", space.source), ("recipe", space.recipe)):
        for name, entry in entries.items():
            where = f"{section}.{name}"
            if name not in known:
                yield f"{where}: {method.name} has no parameter {name!r}{nearest(name, known)}"
            elif known[name].scope != section:
                yield _wrong_section(where, known[name])
            else:
                yield from _value_faults(where, known[name], entry)


def _wrong_section(where: str, parameter: Parameter) -> str:
    owner = "each source" if parameter.scope == "source" else "the recipe"
    return f"{where}: {parameter.name} belongs to {owner}; move it to `{parameter.scope}`"


def _value_faults(where: str, parameter: Parameter, entry: Any) -> Iterator[str]:
    if isinstance(entry, Choice):
        for word in entry.choices:
            yield from _fixed_faults(where, parameter, word)
        return
    if not isinstance(entry, tuple):
        yield from _fixed_faults(where, parameter, entry)
        return
    if parameter.kind != "float":
        yield f"{where}: is no number; search it as {{choices: [...], init: ...}}, or fix it"
        return
    if parameter.scope == "recipe" and any("source" in factor.per for factor in entry):
        yield f"{where}: the recipe has one {parameter.name}, so no factor of it is per source"
    low, high = _product_range(entry)
    if parameter.low is not None and low < parameter.low:
        yield f"{where}: can fall to {low:g}, but must be at least {parameter.low:g}"
    if parameter.high is not None and high > parameter.high:
        yield f"{where}: can rise to {high:g}, but must be at most {parameter.high:g}"


def _fixed_faults(where: str, parameter: Parameter, value: object) -> Iterator[str]:
    kinds = {"float": float, "bool": bool, "choice": str}
    if not isinstance(value, kinds[parameter.kind]):
        yield f"{where}: expected a {parameter.kind}, got {value!r}"
    elif parameter.kind == "choice" and value not in parameter.choices:
        yield f"{where}: unknown choice {value!r}{nearest(str(value), parameter.choices)}"
    elif isinstance(value, float) and not (
        (parameter.low is None or value >= parameter.low)
        and (parameter.high is None or value <= parameter.high)
    ):
        yield f"{where}: {value:g} is not in [{parameter.low}, {parameter.high}]"


def _product_range(factors: Sequence[Factor]) -> tuple[float, float]:
    """The least and the greatest value that a product of factors can take."""
    low = high = 1.0
    for factor in factors:
        ends = [a * b for a in (low, high) for b in factor.bounds]
        low, high = min(ends), max(ends)
    return low, high
