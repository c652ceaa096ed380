"""YAML is read strictly."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.documents import read_yaml
from evomerge.errors import SpecError


def _write(folder: Path, text: str) -> Path:
    (folder / "a.yaml").write_text(text)
    return folder / "a.yaml"


@pytest.mark.parametrize(
    ("text", "number"), [("1e-3", 1e-3), ("-2E4", -2e4), ("1.5e+2", 150.0), (".5e1", 5.0)]
)
def test_a_number_in_scientific_notation_is_a_number(
    tmp_path: Path, text: str, number: float
) -> None:
    assert read_yaml(_write(tmp_path, f"x: {text}")) == {"x": number}


@pytest.mark.parametrize("text", ["e3", "1e", "12ab", "1e3x", "'1e-3'"])
def test_what_only_looks_like_one_stays_text(tmp_path: Path, text: str) -> None:
    assert read_yaml(_write(tmp_path, f"x: {text}")) == {"x": text.strip("'")}


def test_a_key_given_twice_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = _write(tmp_path, "sources:\n  sort: a\n  sort: b\n")
    with pytest.raises(SpecError, match=r"a.yaml, line 3: .*key 'sort' is given twice"):
        read_yaml(path)


def test_anchors_and_merge_keys_still_work(tmp_path: Path) -> None:
    text = "a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: {<<: *a, x: 3}\n"
    assert read_yaml(_write(tmp_path, text)) == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": {"x": 3},
    }


def test_no_object_is_made_of_a_tag(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="line 1: not YAML: could not determine a constructor"):
        read_yaml(_write(tmp_path, "!!python/object/apply:os.getcwd []"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb\nc: 2\n", "a.yaml, line 3: not YAML: could not find expected ':'"),
        ("a:\n  - [1,\n", "a.yaml, line 3: not YAML: expected the node content"),
        ("a: \x01", "a.yaml: not YAML: unacceptable character"),
    ],
)
def test_what_does_not_parse_is_told_in_one_line_with_its_place(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(SpecError) as refusal:
        read_yaml(_write(tmp_path, text))
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "while" not in str(refusal.value)
