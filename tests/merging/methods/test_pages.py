"""Every method has a page that lists its parameters as they are declared."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.merging.methods.registry import ALL

PAGES = Path(__file__).parents[3] / "docs" / "methods"


@pytest.mark.parametrize("name", ALL)
def test_a_page_lists_the_parameters_with_scope_and_default(name: str) -> None:
    lines = (PAGES / f"{name}.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"# {name}"
    rows = [
        tuple(cell.strip(" `") for cell in line.split("|")[1:4])
        for line in lines
        if line.startswith("| `") and line.count("|") >= 5
    ]
    declared = [
        (p.name, p.scope, str(p.default).lower() if p.kind == "bool" else str(p.default))
        for p in ALL[name].parameters
    ]
    assert rows[: len(declared)] == declared


def test_no_page_without_a_method() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_the_page_names_every_choice(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    for parameter in ALL[name].parameters:
        for choice in parameter.choices:
            assert f"`{choice}`" in text
