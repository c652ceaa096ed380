"""The guide's spaces load and fit their methods, and its table counts genes as the spaces do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from evomerge.space import check_space, load_space, shipped_spaces

GUIDE = (Path(__file__).parents[2] / "docs/guides/search-spaces.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
ROWS = dict(re.findall(r"^\| `(\w+)`[^|]*\|[^|]*\| ([^|]*) \|", GUIDE, re.MULTILINE))


@pytest.mark.parametrize("block", BLOCKS)
def test_every_example_is_a_space(block):
    assert check_space(load_space(yaml.safe_load(block)), ["a", "b"]) == []


def test_the_table_counts_genes():
    for name in shipped_spaces():
        terms = re.fullmatch(r"(?:(\d*)(n))?(?: \+ )?(\d+)?", ROWS[name])
        assert terms, ROWS[name]
        each = int(terms[1] or 1) if terms[2] else 0
        for count in (2, 5):
            sources = [f"s{i}" for i in range(count)]
            expected = each * count + int(terms[3] or 0)
            assert len(load_space(name).genes(sources)) == expected, name
