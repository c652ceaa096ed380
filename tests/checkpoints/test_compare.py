"""Whether checkpoints can be merged: every reason why not, in one go, each naming the thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small_llama
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.compare import compare, token_ids
from evomerge.errors import CheckpointError

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(str(small_llama.save(tmp_path_factory.mktemp("base") / "m")))


def _source(folder: Path, **options: object) -> Checkpoint:
    return Checkpoint.open(str(small_llama.save(folder, seed=3, **options)))


def _without(folder: Path, name: str) -> Checkpoint:
    path = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items() if k != name}
    save_file(tensors, path, metadata={"format": "pt"})
    return Checkpoint.open(str(folder))


def test_a_fine_tune_fits(base: Checkpoint, tmp_path: Path) -> None:
    assert compare(base, {"s": _source(tmp_path / "s", dtype=torch.float32)}) == []


def test_another_shape(base: Checkpoint, tmp_path: Path) -> None:
    (problem, *rest) = compare(base, {"s": _source(tmp_path / "s", intermediate_size=96)})
    assert problem.startswith(
        "model.layers.0.mlp.down_proj.weight: base is [32, 64], source 's' is [32, 96]"
    )
    assert rest[-1] == "source 's': 3 more tensors have another shape"


def test_a_missing_tensor(base: Checkpoint, tmp_path: Path) -> None:
    _source(tmp_path / "s")
    (problem,) = compare(base, {"s": _without(tmp_path / "s", NORM)})
    assert problem.startswith(f"source 's': lacks {NORM}, which base")


def test_an_extra_tensor_is_ignored_with_a_warning(
    base: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {"spare": torch.ones(3)}
    assert compare(base, {"s": _source(tmp_path / "s", extra=extra)}) == []
    assert "model.spare not in base" in caplog.text


def test_an_integer_tensor_need_not_be_in_a_source(tmp_path: Path) -> None:
    base = _source(tmp_path / "b", extra={"steps": torch.tensor(7)})
    assert compare(base, {"s": _source(tmp_path / "s")}) == []


def test_a_float_tensor_that_is_an_integer_elsewhere(tmp_path: Path) -> None:
    base = _source(tmp_path / "b", extra={"steps": torch.tensor(7.0)})
    (problem,) = compare(base, {"s": _source(tmp_path / "s", extra={"steps": torch.tensor(7)})})
    assert "model.steps: base is torch.float32, source 's' is torch.int64" in problem


def test_another_architecture_is_one_problem(base: Checkpoint, tmp_path: Path) -> None:
    source = _source(tmp_path / "s", intermediate_size=96)
    source.config["model_type"] = "mistral"
    (problem,) = compare(base, {"s": source})
    assert problem.startswith("source 's': model_type is 'mistral', base ")
    assert problem.endswith("has 'llama'; all sources must share the base's architecture")


def test_heads_cut_otherwise_have_the_same_shapes_and_do_not_fit(
    base: Checkpoint, tmp_path: Path
) -> None:
    source = _source(tmp_path / "s", num_attention_heads=8, num_key_value_heads=4)
    assert source.shape(NORM) == base.shape(NORM)
    problems = compare(base, {"s": source})
    assert any("num_attention_heads is 8" in problem for problem in problems)


def test_another_token_order(base: Checkpoint, tmp_path: Path) -> None:
    tokens = list(small_llama.TOKENS)
    tokens[10], tokens[20] = tokens[20], tokens[10]
    (problem,) = compare(base, {"s": _source(tmp_path / "s", tokens=tuple(tokens))})
    assert "token 'w7' has id 20" in problem
    assert "it is 10 (2 tokens differ)" in problem


def test_another_token_at_the_same_id(base: Checkpoint, tmp_path: Path) -> None:
    tokens = (*small_llama.TOKENS[:-1], "other")
    (problem,) = compare(base, {"s": _source(tmp_path / "s", tokens=tokens)})
    assert "id 63 is token 'other'" in problem
    assert "it is 'w60' (1 ids differ)" in problem


def test_a_token_at_a_free_id_is_no_conflict(base: Checkpoint, tmp_path: Path) -> None:
    assert compare(base, {"s": _source(tmp_path / "s", tokens=small_llama.TOKENS[:-2])}) == []
    fewer = _source(tmp_path / "f", tokens=small_llama.TOKENS[:-2])
    assert compare(fewer, {"s": _source(tmp_path / "t")}) == []


def test_a_unigram_vocabulary_is_read_by_place(base: Checkpoint, tmp_path: Path) -> None:
    source = _source(tmp_path / "s")
    document = {"model": {"vocab": [["<pad>", 0.0], ["a", -1.0]]}, "added_tokens": []}
    (tmp_path / "s" / "tokenizer.json").write_text(json.dumps(document))
    assert token_ids(source) == {"<pad>": 0, "a": 1}
    (tmp_path / "s" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer file"):
        token_ids(source)


def test_a_source_that_unties_what_the_base_ties(tmp_path: Path) -> None:
    base = _source(tmp_path / "b", tie=True)
    (problem,) = compare(base, {"s": _source(tmp_path / "s", tie=False)})
    assert problem.startswith("source 's': stores lm_head.weight apart from")
    assert compare(_source(tmp_path / "u"), {"s": _source(tmp_path / "t", tie=True)}) == []


def test_every_problem_of_every_source_at_once(base: Checkpoint, tmp_path: Path) -> None:
    _source(tmp_path / "a")
    sources = {
        "a": _without(tmp_path / "a", NORM),
        "b": _source(tmp_path / "b", tokens=(*small_llama.TOKENS[:-1], "other")),
    }
    problems = compare(base, sources)
    assert len(problems) == 2
    assert "'a'" in problems[0]
    assert "'b'" in problems[1]
