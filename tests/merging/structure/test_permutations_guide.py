"""The guide to permutations: its table is that of the code, its examples run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from evomerge.merging.structure.architectures import families

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "permutations.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_table_has_every_architecture():
    rows = [line.split("|")[1] for line in GUIDE.read_text(encoding="utf-8").splitlines()
            if line.startswith("| `")]  # fmt: skip
    named = [name for row in rows[1:] for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(families.FAMILIES)


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (EXAMPLES[0], r"preserved to \de-\d\d; \d{3} binds, each of them needed"),
        (EXAMPLES[1], "True"),
    ],
)
def test_the_examples_run(example, said, capsys):
    try:
        exec(compile(example, str(GUIDE), "exec"), {})
    finally:
        families.FAMILIES.pop("distilbert", None)
    assert re.fullmatch(said, capsys.readouterr().out.strip())
    assert len(EXAMPLES) == 2
