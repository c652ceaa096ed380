"""Building a zoo: the same bits again, reuse, resumption, and folders that are something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from evomerge.errors import CheckpointError, UserError
from evomerge.zoo import train_model as train_model_module
from evomerge.zoo.build import ZooPaths, ZooProgress, build_zoo
from evomerge.zoo.recipe import ZooRecipe

_TINY = ZooRecipe.tiny()
_MODELS = ("base", "compare", "lexicon", "reverse", "sort")


def _build(directory: Path, **changes: object) -> ZooPaths:
    options = {"recipe": _TINY, "processes": 1} | changes
    return build_zoo(directory, **options)  # type: ignore[arg-type]


def _weights(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name / "model.safetensors").read_bytes() for name in _MODELS}


@pytest.fixture
def zoo(tiny_zoo: Path, tmp_path: Path) -> Path:
    """A copy of the tiny zoo that a test may change."""
    return Path(shutil.copytree(tiny_zoo, tmp_path / "zoo"))


def test_models_are_ordinary_checkpoints(tiny_zoo: Path) -> None:
    for name in _MODELS:
        model = AutoModelForCausalLM.from_pretrained(tiny_zoo / name)
        assert model.config.model_type == "llama"
        assert model.config.use_cache
        assert model.config.tie_word_embeddings
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not list(tiny_zoo.glob(".*"))


def test_experts_differ_from_the_base_and_each_other(tiny_zoo: Path) -> None:
    assert len(set(_weights(tiny_zoo).values())) == len(_MODELS)


def test_two_processes_build_the_same_bits(tiny_zoo: Path, tmp_path: Path) -> None:
    _build(tmp_path / "zoo", processes=2)
    assert _weights(tmp_path / "zoo") == _weights(tiny_zoo)
    assert (tmp_path / "zoo" / "zoo.json").read_text() == (tiny_zoo / "zoo.json").read_text()


def test_training_leaves_torch_as_it_was(tmp_path: Path, zoo: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    shutil.rmtree(zoo / "reverse")
    _build(zoo)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_a_second_call_trains_nothing(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_model_module, "train_model", _no_training)
    seen: list[ZooProgress] = []
    paths = _build(zoo, progress=seen.append)
    assert seen == [ZooProgress("done", 1.0, 0.0)]
    assert paths == ZooPaths(
        zoo, zoo / "base", {name: zoo / name for name in _TINY.experts}, zoo / "tasks"
    )


def test_a_moved_zoo_is_reused_and_its_tasks_renewed(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = zoo.rename(zoo.with_name("moved"))
    monkeypatch.setattr(train_model_module, "train_model", _no_training)
    _build(moved)
    assert str(moved / "tasks" / "data" / "sort.jsonl") in (moved / "tasks/sort.yaml").read_text()


def _no_training(*_: object, **__: object) -> None:
    raise AssertionError("trained a model that was there")


class _CutOff(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("at", [0.2, 0.5, 0.8])
def test_an_interrupted_build_goes_on_where_it_was(
    tiny_zoo: Path, tmp_path: Path, at: float
) -> None:
    def cut_off(progress: ZooProgress) -> None:
        if progress.fraction > at:
            raise _CutOff

    directory = tmp_path / "zoo"
    with pytest.raises(_CutOff):
        _build(directory, progress=cut_off)
    finished = set(json.loads((directory / "zoo.json").read_text())["models"])
    trained: list[str] = []
    _build(directory, progress=lambda progress: trained.append(progress.stage))
    assert {f"training {name}" for name in _MODELS if name not in finished} | {"done"} == {*trained}
    assert _weights(directory) == _weights(tiny_zoo)
    assert not list(directory.glob(".*"))


def test_a_model_renamed_but_not_recorded_is_trained_again(zoo: Path, tiny_zoo: Path) -> None:
    manifest = json.loads((zoo / "zoo.json").read_text())
    del manifest["models"]["sort"]
    (zoo / "zoo.json").write_text(json.dumps(manifest))
    (zoo / "sort" / "model.safetensors").write_bytes(b"half")
    (zoo / ".sort.abc.partial").mkdir()
    _build(zoo)
    assert _weights(zoo) == _weights(tiny_zoo)
    assert not list(zoo.glob(".*"))


def test_progress_only_rises_and_guesses_the_time_left(zoo: Path) -> None:
    shutil.rmtree(zoo / "sort")
    seen: list[ZooProgress] = []
    _build(zoo, progress=seen.append)
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] > 0.5  # what is reused counts as done
    assert fractions[-1] == 1.0
    assert all(progress.seconds_left is not None for progress in seen)
    assert seen[-1].seconds_left == 0.0


def test_another_seed_is_refused(zoo: Path) -> None:
    with pytest.raises(UserError, match="seed 0, not of seed 1; build in another folder"):
        _build(zoo, seed=1)


def test_another_recipe_is_refused(zoo: Path) -> None:
    with pytest.raises(UserError, match="another training recipe"):
        _build(zoo, recipe=ZooRecipe())


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"'thesis\.tex' but no zoo\.json"):
        _build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "zoo").write_text("")
    with pytest.raises(UserError, match="is a file"):
        _build(tmp_path / "zoo")


def test_a_changed_model_is_refused(zoo: Path) -> None:
    (zoo / "sort" / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(CheckpointError, match=r"sort.* is not the file .* delete .* build again"):
        _build(zoo)


def test_a_broken_manifest_is_refused(zoo: Path) -> None:
    (zoo / "zoo.json").write_text("{")
    with pytest.raises(UserError, match=r"zoo\.json: not a manifest"):
        _build(zoo)


def test_a_recipe_survives_json() -> None:
    for recipe in (ZooRecipe(), _TINY):
        assert ZooRecipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
