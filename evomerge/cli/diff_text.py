"""What `evomerge diff` prints for people: the tables, and a verdict as the last line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from evomerge.checkpoints.distance import Distance, Interference
from evomerge.cli.options import print_table
from evomerge.merging.difference import ABSENT, Difference, Group, Statements
from evomerge.merging.recipe_difference import ParameterDifference, RecipeDifference

_NAMED = 5  # of one kind of difference, name so many and count the rest
_MOST_DIFFERENT = 10


def print_models(found: Difference) -> None:
    """What the files say that differs, the figures, and last the verdict."""
    _print_statements(found.statements)
    for tensor in found.non_finite():
        d = tensor.distance
        typer.echo(
            f"{tensor.place.name}: NaN or infinity in {d.non_finite_a} entries of A and"
            f" {d.non_finite_b} of B, left out of the figures"
        )
    if found.changed or found.total().interference is not None:
        _print_figures(found)
    typer.echo(_verdict(found))


def _print_figures(found: Difference) -> None:
    total = found.total()
    columns = ["|B-A|/|A|", "cosine", "max |B-A|", "changed"]
    if total.interference is not None:
        columns += ["|a|/|base|", "|b|/|base|", "cos(a, b)", "both moved", "same sign"]
        typer.echo("a = A - base, b = B - base")
    rows = [[_layer(g.layer), g.type or "", *_row(g)] for g in found.by_type_and_layer()]
    rows += [["all", group.type or "", *_row(group)] for group in found.by_type()]
    print_table(("layer", "type", "tensors", *columns), [*rows, ["all", "all", *_row(total)]])
    typer.echo("")
    if most := found.most_different(_MOST_DIFFERENT):
        figures = [[t.place.name, *_figures(t.distance, t.interference)] for t in most]
        print_table(("most different", *columns), figures)
        typer.echo("")


def _print_statements(said: Statements) -> None:
    if said.config:
        print_table(("config", "A", "B"), [
            [key, *map(_value, pair)] for key, pair in said.config.items()
        ])  # fmt: skip
        typer.echo("")
    for side, names in (("A", said.only_a), ("B", said.only_b)):
        if names:
            typer.echo(f"{_tensors(len(names))} only in {side}: {_some(names)}")
    for kind, pairs in (("shape", said.shapes), ("dtype", said.dtypes)):
        _print_counted(kind, pairs)
    for name, what in said.files.items():
        typer.echo(f"{name}: {what}")
    for side, tokens in (("A", said.tokens_only_a), ("B", said.tokens_only_b)):
        if tokens:
            typer.echo(f"{len(tokens)} tokens only in {side}: {_some(list(map(repr, tokens)))}")
    if said.token_ids:
        moved = [f"{token!r} {old} -> {new}" for token, (old, new) in said.token_ids.items()]
        typer.echo(f"{len(moved)} tokens with another id: {_some(moved)}")


def _print_counted(kind: str, pairs: Mapping[str, tuple[Any, Any]]) -> None:
    """One line for each pair of shapes or dtypes, however many tensors have it."""
    for (old, new), count in Counter(pairs.values()).items():
        names = [name for name, pair in pairs.items() if pair == (old, new)]
        typer.echo(f"{kind} {_value(old)} in A, {_value(new)} in B: {_tensors(count)}, {names[0]}")


def _verdict(found: Difference) -> str:
    if not found.tensors:
        return "no tensor has the same name and shape in both: these are different architectures"
    compared = _tensors(len(found.tensors))
    if found.changed:
        return f"{len(found.changed)} of {compared} differ"
    if found.statements:
        return f"{compared}: identical bit for bit; what differs is listed above"
    return f"identical: {compared} bit for bit, and nothing else differs"


def _row(group: Group) -> list[str]:
    return [str(group.tensors), *_figures(group.distance, group.interference)]


def _figures(distance: Distance, interference: Interference | None) -> list[str]:
    figures = [
        _number(distance.relative_norm),
        _cosine(distance.cosine),
        _number(distance.largest),
        _share(distance.changed_share),
    ]
    if interference is not None:
        figures += [
            *map(_number, interference.relative_norms),
            _cosine(interference.cosine),
            _share(interference.both_share),
            _share(interference.sign_agreement),
        ]
    return figures


def print_recipes(found: RecipeDifference, *, resolved: bool) -> None:
    """Settings, sources and parameters that differ; `resolved` if the model's tensors are known."""
    if found.settings:
        settings = [[key, *map(_value, pair)] for key, pair in found.settings.items()]
        print_table(("setting", "A", "B"), settings)
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        if names:
            typer.echo(f"sources only in {side}: {', '.join(names)}")
    if found.parameters:
        columns = ("source", "parameter", "A", "B")
        print_table(columns, [[*_of(p), _value(p.a), _value(p.b)] for p in found.parameters])
    varying = [p for p in found.parameters if _varies(p)]
    if any(p.cells for p in varying):
        typer.echo("")
        print_table(("source", "parameter", "layer", "type", "A", "B"), [
            [*_of(p), _layer(cell.layer), cell.type, _values(cell.a), _values(cell.b)]
            for p in varying for cell in p.cells
        ])  # fmt: skip
    elif varying and not resolved:
        typer.echo("the models are not on this machine: values are not resolved by layer and type")
    if found.identical:
        typer.echo("the same merge")


def _of(parameter: ParameterDifference) -> tuple[str, str]:
    return parameter.source or "-", parameter.parameter


def _layer(layer: int | None) -> str:
    return "-" if layer is None else str(layer)


def _varies(parameter: ParameterDifference) -> bool:
    return isinstance(parameter.a, list | dict) or isinstance(parameter.b, list | dict)


def _values(values: Sequence[Any]) -> str:
    """The distinct values of a cell; numbers as a range if there are more than two."""
    if len(values) > 2 and all(isinstance(value, float) for value in values):
        return f"{min(values):g} to {max(values):g}"
    return ", ".join(_value(value) for value in values)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or value is ABSENT:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def _share(value: float | None) -> str:
    if value is not None and 0.0 < value < 0.00005:
        return "<0.01%"
    return "-" if value is None else f"{value:.2%}"


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' * (count != 1)}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
