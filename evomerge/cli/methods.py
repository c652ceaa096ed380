"""The command that lists the merge methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomerge.cli.options import AsJson, print_json

if TYPE_CHECKING:
    from evomerge.merging.fitted.base import Fitter
    from evomerge.merging.methods.base import MethodFacts, Parameter


def register(app: typer.Typer) -> None:
    """Add this group's command."""
    app.command()(methods)


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One method's name; all of them without.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Every merge method, or one: formula, parameters, what it needs."""
    from evomerge.merging.methods.registry import ALL, facts

    chosen = [facts(name)] if name else list(ALL.values())
    if json:
        documents = [_document(method) for method in chosen]
        print_json(documents[0] if name else documents)
        return
    for method in chosen:
        _describe(method, whole=name is not None)


def _describe(method: MethodFacts, *, whole: bool) -> None:
    needs = "needs a base" if method.needs_base else "needs no base"
    typer.echo(f"{method.name}: {method.summary}")
    typer.echo(f"    {method.formula}")
    typer.echo(f"    {needs}; {_sources(method)}")
    for parameter in method.parameters:
        words = f" {parameter.doc}" if whole else ""
        each = "for each source" if parameter.scope == "source" else "for the merge"
        typer.echo(
            f"    {parameter.name} = {parameter.default} {_range(parameter)}, {each}.{words}"
        )
    if method.artifact is not None:
        _describe_fit(method.artifact, whole=whole)
    typer.echo("")


def _describe_fit(kind: str, *, whole: bool) -> None:
    fitter = _fitter(kind)
    typer.echo(f"    applies what a fit learned: {fitter.summary}")
    typer.echo(f"    the fit needs {', '.join(_needs(fitter))}")
    if whole:
        for name, field in fitter.settings.model_fields.items():
            typer.echo(f"    fit.{name} = {field.default}")


def _needs(fitter: Fitter) -> list[str]:
    base = ["a base"] if fitter.needs_base else []
    data = "data with answers" if fitter.needs_labels else "data, labels or not"
    return [*base, data, *(["backward passes"] if fitter.needs_gradients else [])]


def _sources(method: MethodFacts) -> str:
    if method.max_sources == method.min_sources:
        return f"exactly {method.min_sources} source{'s'[: method.min_sources > 1]}"
    most = "" if method.max_sources is None else f", at most {method.max_sources}"
    return f"at least {method.min_sources} source{'s'[: method.min_sources > 1]}{most}"


def _range(parameter: Parameter) -> str:
    if parameter.kind == "choice":
        return f"({' | '.join(parameter.choices)})"
    if parameter.kind == "bool":
        return "(true | false)"
    low = "-inf" if parameter.low is None else f"{parameter.low:g}"
    high = "inf" if parameter.high is None else f"{parameter.high:g}"
    return f"[{low}, {high}]"


def _document(method: MethodFacts) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "formula": method.formula,
        "needs_base": method.needs_base,
        "min_sources": method.min_sources,
        "max_sources": method.max_sources,
        "fit": None if method.artifact is None else _fit_document(_fitter(method.artifact)),
        "parameters": [
            {
                "name": parameter.name,
                "scope": parameter.scope,
                "kind": parameter.kind,
                "default": parameter.default,
                "low": parameter.low,
                "high": parameter.high,
                "choices": list(parameter.choices),
                "doc": parameter.doc,
            }
            for parameter in method.parameters
        ],
    }


def _fitter(kind: str) -> Fitter:
    from evomerge.merging.fitted.registry import get

    return get(kind)


def _fit_document(fitter: Fitter) -> dict[str, Any]:
    return {
        "kind": fitter.name,
        "summary": fitter.summary,
        "needs_base": fitter.needs_base,
        "needs_labels": fitter.needs_labels,
        "needs_gradients": fitter.needs_gradients,
        "settings": fitter.settings.model_json_schema()["properties"],
    }
