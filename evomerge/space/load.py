"""Where a space comes from: a shipped name, a file, or a mapping written into a study's spec.

Knows the grammar's faults only; whether the merge method has these parameters is `check_space`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evomerge.documents import read_yaml
from evomerge.errors import SpecError
from evomerge.resources import search_spaces_directory
from evomerge.space.space import Space
from evomerge.spec import nearest, problems


def load_space(reference: str | Mapping[str, Any]) -> Space:
    """The space that a study's `space` key means. Raises SpecError with every problem found."""
    if isinstance(reference, str):
        path = _find(reference)
        return _parse(read_yaml(path), subject=str(path))
    return _parse(dict(reference), subject="space")


def shipped_spaces() -> list[str]:
    """The names of the spaces that evomerge ships, sorted."""
    return sorted(path.stem for path in search_spaces_directory().glob("*.yaml"))


def _find(reference: str) -> Path:
    if reference in shipped_spaces():
        return search_spaces_directory() / f"{reference}.yaml"
    path = Path(reference).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    known = shipped_spaces()
    hint = nearest(reference, known)
    listed = "" if "known: " in hint else f" (known: {', '.join(known)})"
    raise SpecError("space", [f"no shipped space is named {reference!r}{hint}{listed}"])


def _parse(document: object, *, subject: str) -> Space:
    if not isinstance(document, dict):
        raise SpecError(subject, ["a search space is a mapping with `method`, `source`, `recipe`"])
    try:
        space = Space.model_validate(document)
    except ValidationError as error:
        raise SpecError(subject, problems(error, Space)) from None
    if not space.genes(["source"]):
        raise SpecError(subject, ["nothing is searched: give a parameter a list of factors"])
    return space
