"""Artifacts: whole or not at all, gone on with after a crash, refused for other models."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from evomerge.errors import CheckpointError, ExportError, MergeError
from evomerge.merging.fitted.artifact import Provenance, draft, open_artifact
from evomerge.merging.recipe import ModelRef, Recipe, Source

_KNOWN = Provenance(
    kind="gram",
    base="b0",
    sources={"a": "a0"},
    calibration="c0",
    counts={"a": 3},
    described={"a": "three lines"},
    settings={"size": 2},
    seed=0,
)
_RECIPE = Recipe("linear", ModelRef("b", "b0"), (Source("a", ModelRef("a", "a0")),))


def _make(folder, tensors=None, facts=None):
    with draft(folder, _KNOWN) as work:
        work.finish(tensors or {"x": torch.arange(3.0)}, facts or {"curve": [2.0]}, flops=5.0)
    return open_artifact(folder)


def test_what_was_written_is_read(tmp_path):
    artifact = _make(tmp_path / "out")
    assert torch.equal(artifact.tensor("x"), torch.arange(3.0))
    assert artifact.provenance == _KNOWN
    assert artifact.facts["curve"] == [2.0]
    assert artifact.cost["flops"] == 5.0
    artifact.check_contents()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_the_digest_is_of_contents_and_provenance(tmp_path):
    one = _make(tmp_path / "1").digest
    assert one == _make(tmp_path / "2").digest
    assert one != _make(tmp_path / "3", tensors={"x": torch.arange(3.0) + 1}).digest
    with draft(tmp_path / "4", replace(_KNOWN, seed=1)) as work:
        work.finish({"x": torch.arange(3.0)}, {"curve": [2.0]}, flops=5.0)
    assert one != open_artifact(tmp_path / "4").digest


def _attempt(folder, known, *saves, error):
    with draft(folder, known) as work:
        assert work.state is None
        for number, tensor in enumerate(saves, 1):
            work.save({"sum": tensor}, {"step": number}, flops=float(number))
        raise error


def test_an_interrupted_fit_goes_on_where_it_was(tmp_path):
    sums = torch.ones(2), torch.ones(2) * 2
    with pytest.raises(KeyboardInterrupt):
        _attempt(tmp_path / "out", _KNOWN, *sums, error=KeyboardInterrupt())
    assert not (tmp_path / "out").exists()
    with draft(tmp_path / "out", _KNOWN) as work:
        assert work.state is not None
        tensors, notes = work.state
        assert torch.equal(tensors["sum"], torch.ones(2) * 2)
        assert notes == {"step": 2}
        work.finish(tensors, {}, flops=1.0)
    assert open_artifact(tmp_path / "out").cost["flops"] == 3.0  # of two attempts
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "artifact.json",
        "artifact.safetensors",
    ]


def test_another_fit_does_not_go_on_with_it(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _attempt(tmp_path / "out", _KNOWN, torch.ones(2), error=KeyboardInterrupt())
    with draft(tmp_path / "out", replace(_KNOWN, calibration="c1")) as work:
        assert work.state is None
        work.finish({"x": torch.ones(1)}, {}, flops=1.0)


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(MergeError):
        _attempt(tmp_path / "out", _KNOWN, torch.ones(2), error=MergeError("the loss is nan"))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_taken_is_not_touched(tmp_path):
    _make(tmp_path / "out")
    with pytest.raises(ExportError, match="exists already"):
        _make(tmp_path / "out")


def test_damage_is_found(tmp_path):
    _make(tmp_path / "out")
    path = tmp_path / "out" / "artifact.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="damaged"):
        open_artifact(tmp_path / "out").check_contents()


def test_a_file_that_is_cut_off_is_one_line(tmp_path):
    _make(tmp_path / "out")
    (tmp_path / "out" / "artifact.json").write_text('{"version": 1')
    with pytest.raises(CheckpointError, match="damaged"):
        open_artifact(tmp_path / "out")


def test_a_newer_version_is_refused(tmp_path):
    _make(tmp_path / "out")
    path = tmp_path / "out" / "artifact.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(CheckpointError, match="version 99"):
        open_artifact(tmp_path / "out")


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no artifact of a fit"):
        open_artifact(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (replace(_RECIPE, base=ModelRef("b", "b1")), "another base"),
        (replace(_RECIPE, sources=(Source("a", ModelRef("a", "a1")),)), "source 'a' was another"),
        (replace(_RECIPE, sources=(Source("z", ModelRef("a", "a0")),)), "the sources a; .* has z"),
    ],
)
def test_other_models_are_refused(tmp_path, recipe, message):
    artifact = _make(tmp_path / "out")
    artifact.check_models(_RECIPE)
    with pytest.raises(MergeError, match=message):
        artifact.check_models(recipe)


def _part(number):
    return {f"p{number}": torch.full((2,), float(number))}


def _cut_off(folder, *acts):
    with draft(folder, _KNOWN) as work:
        for flops, act in enumerate(acts, 1):
            if act == "keep":
                work.keep("a", _part(1), {"norm": 1.0}, flops=float(flops))
            else:
                work.save({"sum": torch.ones(2)}, {"step": 7}, flops=float(flops))
        raise KeyboardInterrupt


def test_parts_that_are_kept_are_written_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _cut_off(tmp_path / "out", "keep", "save")
    written = tmp_path / ".out.partial" / "artifact-1.safetensors"
    stamp = written.stat().st_mtime_ns, written.stat().st_ino
    with draft(tmp_path / "out", _KNOWN) as work:
        assert work.kept == {"a": {"norm": 1.0}}
        assert work.state is not None
        assert work.state[1] == {"step": 7}
        work.keep("b", _part(2), {"norm": 2.0}, flops=1.0)
        work.finish({}, {"f": 1}, flops=1.0)
    artifact = open_artifact(tmp_path / "out")
    assert {name: float(artifact.tensor(name)[0]) for name in artifact.names} == {"p1": 1, "p2": 2}
    assert artifact.cost["flops"] == 3.0
    artifact.check_contents()
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == [
        "artifact-1.safetensors",
        "artifact-2.safetensors",
        "artifact.json",
        "artifact.safetensors",
    ]
    kept = tmp_path / "out" / "artifact-1.safetensors"
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == stamp


def test_what_was_saved_is_of_no_use_once_the_part_is_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _cut_off(tmp_path / "out", "save", "keep")
    with draft(tmp_path / "out", _KNOWN) as work:
        assert work.state is None
        assert list(work.kept) == ["a"]
        work.finish({}, {}, flops=1.0)
    assert open_artifact(tmp_path / "out").cost["flops"] == 3.0
