"""`evomerge merge` on a recipe that merges the experts of one model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_experts
import small_llama
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from evomerge.merging.structure.experts.remapped import load_remapped


@pytest.fixture
def call(call: Any) -> Any:
    """Exit code and standard error."""
    return lambda *arguments: call(*arguments)[::2]


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    small_experts.folder("mixtral", tmp_path / "model")
    (tmp_path / "book.txt").write_text(" ".join(f"w{i * 7 % 45}" for i in range(200)))

    def write(experts: dict[str, Any], **more: Any) -> Path:
        document = {
            "model": "model",
            "experts": experts,
            "calibration": {"text": "book.txt", "tokens": 8, "count": 6},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(document | more))
        return path

    return write


def test_a_recipe_becomes_a_model(call: Any, recipe: Any, tmp_path: Path) -> None:
    path = recipe({"keep": 2, "allocation": "uniform", "alignment": "dominant"})
    code, said = call("merge", path, tmp_path / "out")
    assert code == 0, said
    assert "experts kept in each layer: 2, 2" in said
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_local_experts == 4
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_a_switch_goes_on_with_the_text(call: Any, recipe: Any, tmp_path: Path) -> None:
    """An encoder-decoder, with nothing but a text to watch it on."""
    shutil.rmtree(tmp_path / "model")
    small_experts.folder(small_experts.SWITCH, tmp_path / "model")
    path = recipe({"keep": 2, "alignment": "dominant", "similarity": "gradients"})
    code, said = call("merge", path, tmp_path / "out")
    assert code == 0, said
    assert "experts kept in each layer: 2, 2" in said
    merged = small_experts.loaded(tmp_path / "out")
    assert small_experts.logits(merged, small_experts.examples(1))[0].isfinite().all()


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ({"keep": 2, "skip": [2]}, "no layer 2 among 2 with experts"),
        ({"keep": 1, "form": "collapsed"}, "each token is sent to that many"),
        ({"keep": 2, "similarity": "logits"}, "experts.similarity"),
        ({"keep": 2, "router": "distilled", "router_steps": 0}, "experts.router_steps"),
        ({"keep": 2, "router": "distilled", "compress": {}}, "leave it out with compress"),
        ({}, "missing key 'experts.keep'"),
        ({"keep": 2, "kep": 3}, "unknown key 'experts.kep'; did you mean 'keep'?"),
        ({"keep": 2.5}, "experts.keep: expected a whole number or a list, got 2.5"),
        ({"keep": True}, "experts.keep: expected a whole number or a list, got True"),
    ],
)
def test_what_does_not_fit_is_one_line(
    call: Any, recipe: Any, tmp_path: Path, experts: dict[str, Any], words: str
) -> None:
    code, said = call("merge", recipe(experts), tmp_path / "out")
    assert code == 2
    assert words in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_too_few_tokens_are_refused(call: Any, recipe: Any, tmp_path: Path) -> None:
    data = {"text": "book.txt", "tokens": 3, "count": 1}
    code, said = call("merge", recipe({"keep": 2}, calibration=data), tmp_path / "out")
    assert code == 2
    assert "is given 3 tokens, too few to tell its 4 experts by" in said


def test_a_small_one_too(call: Any, recipe: Any, tmp_path: Path) -> None:
    code, said = call("merge", recipe({"keep": [1, 3], "form": "remapped"}), tmp_path / "out")
    assert code == 0, said
    sizes = {len(p) for p in load_remapped(tmp_path / "out").parameters() if p.ndim == 3}
    assert sizes == {1, 3}


def test_every_fault_is_told_at_once(call: Any, recipe: Any, tmp_path: Path) -> None:
    path = recipe({"keep": 2, "form": "smaller", "grouping": "none"}, seeds=1, calibration={})
    code, said = call("merge", path, tmp_path / "out")
    assert code == 2
    for words in ("experts.form", "grouping", "seeds: unknown", "calibration: give one"):
        assert words in said
    code, said = call("merge", recipe({"keep": 9}), tmp_path / "out")
    assert code == 2
    assert "9 in expert layer 0, expected 1 to 4" in said
    code, said = call("merge", recipe({"keep": 2}), tmp_path / "out", "--plan")
    assert code == 2
    assert "without --plan" in said


@pytest.mark.parametrize(("experts", "got"), [(None, "nothing"), (4, "4"), ("four", "'four'")])
def test_experts_without_settings(
    call: Any, recipe: Any, tmp_path: Path, experts: Any, got: str
) -> None:
    code, said = call("merge", recipe(experts), tmp_path / "out")
    assert code == 2
    assert f"experts: expected settings such as {{keep: 4}}, or a list of models, got {got}" in said


def test_data_is_missing(call: Any, recipe: Any, tmp_path: Path) -> None:
    for data in (None, "book.txt"):
        code, said = call("merge", recipe({"keep": 2}, calibration=data), tmp_path / "out")
        assert code == 2
        assert "calibration: expected {task: NAME} or {text: FILE}, got" in said
        assert "for each source" not in said


def test_a_fit_is_of_a_method(call: Any, recipe: Any, tmp_path: Path) -> None:
    code, said = call("fit", recipe({"keep": 2}), tmp_path / "out")
    assert code == 2
    assert "experts: are merged by `evomerge merge`, which fits nothing apart" in said
    assert "`method: m_smoe`" in said
    assert len(said.splitlines()) == 1


def test_models_that_do_not_fit_are_faults_of_the_file(
    call: Any, recipe: Any, tmp_path: Path
) -> None:
    """No `tokenizer: union` is advised: the methods that permute or widen refuse it."""
    path = recipe(None)
    for name, vocabulary in (("a", 48), ("b", 40)):
        model = tiny_models.causal("llama", dtype=torch.float32, vocab_size=vocabulary)
        model.save_pretrained(tmp_path / name)
        small_llama.tokenizer().save_pretrained(tmp_path / name)
    tokens = json.loads((tmp_path / "b/tokenizer.json").read_text())
    tokens["model"]["vocab"]["other"] = tokens["model"]["vocab"].pop("w1")
    (tmp_path / "b/tokenizer.json").write_text(json.dumps(tokens))
    document = {"method": "git_rebasin", "sources": {"a": "a", "b": "b"}}
    path.write_text(json.dumps(document | {"calibration": {"text": "book.txt", "tokens": 8}}))
    code, said = call("fit", path, tmp_path / "out")
    assert code == 2
    assert f"{path}: " in said
    assert "a fit takes models of one vocabulary" in said
    assert "tokenizer: union" not in said


@pytest.mark.parametrize("device", ["gpu", "cuda:x"])
def test_no_such_device(call: Any, recipe: Any, tmp_path: Path, device: str) -> None:
    code, said = call("merge", recipe({"keep": 2}), tmp_path / "out", "--device", device)
    assert code == 2
    assert f"--device: {device!r} is no device of torch" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_a_device_that_is_not_here(call: Any, recipe: Any, tmp_path: Path) -> None:
    code, said = call("merge", recipe({"keep": 2}), tmp_path / "out", "--device", "cuda")
    assert code == 2
    assert "--device: 'cuda': there is none here; take cpu or auto" in said
