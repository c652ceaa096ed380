"""Splits by content: stable, disjoint, and the same on every machine."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import TaskError
from evomerge.scoring.splits import item_hash, part_of
from evomerge.spec import PARTS, Split

DOCS = st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.booleans()), max_size=4)


def test_a_hash_is_the_same_on_every_machine() -> None:
    # printf '{"answer":3,"prompt":"\\u00e9"}' | sha256sum
    expected = "f98904712f57e4974850d8f3f2d3ccb14af1ab6b2de08f518c94d49128199f3c"
    assert item_hash({"prompt": "é", "answer": 3}) == expected


@given(DOCS)
def test_the_order_of_keys_is_irrelevant(doc: dict[str, object]) -> None:
    assert item_hash(dict(reversed(doc.items()))) == item_hash(doc)


@given(DOCS, DOCS)
def test_unequal_items_have_unequal_hashes(
    one: dict[str, object], other: dict[str, object]
) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (item_hash(one) == item_hash(other)) == same


def test_dates_bytes_and_arrays_are_hashed_by_content() -> None:
    import numpy as np

    assert item_hash(datetime.date(2020, 1, 2)) != item_hash(datetime.date(2020, 1, 3))
    assert item_hash(b"a") != item_hash(b"b")
    assert item_hash(np.array([1, 2])) == item_hash([1, 2])
    with pytest.raises(TaskError, match="object"):
        item_hash({"x": object()})


def test_parts_follow_the_fractions() -> None:
    split = Split(search=0.5, selection=0.2, report=0.3)
    counts = Counter(part_of(item_hash(i), split) for i in range(20_000))
    for part in PARTS:
        assert counts[part] / 20_000 == pytest.approx(getattr(split, part), abs=0.015)


def test_the_ends_of_the_range_have_a_part() -> None:
    split = Split(search=0.4, selection=0.2, report=0.4)
    assert part_of("0" * 64, split) == "search"
    assert part_of("f" * 64, split) == "report"


def test_a_larger_search_part_only_adds_items_to_it() -> None:
    small, large = (
        {i for i in range(500) if part_of(item_hash(i), split) == "search"}
        for split in (Split(), Split(search=0.6, selection=0.2, report=0.2))
    )
    assert small < large


def test_splits_need_neither_torch_nor_lm_eval() -> None:
    code = (
        "import sys, evomerge.scoring.splits, evomerge.scoring.statistics;"
        "assert not {'torch', 'lm_eval', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
