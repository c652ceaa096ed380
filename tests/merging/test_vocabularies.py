"""Merges of models with different vocabularies, from recipe to what transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_tokenizers
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.checkpoints import Checkpoint
from evomerge.errors import EvomergeError, SpecError
from evomerge.merging.export import export
from evomerge.merging.merge import open_merge
from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.merging.recipe_file import load_recipe
from evomerge.tokenizer_choice import TokenizerChoice

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of other tokens, and `shuffled`: the second with its ids permuted."""
    root = tmp_path_factory.mktemp("models")
    sea = small_tokenizers.save(root / "sea", small_tokenizers.train("bpe", "sea"), seed=1)
    code = small_tokenizers.save(root / "code", small_tokenizers.train("bpe", "code"), seed=2)
    shuffled = small_tokenizers.permute(code, root / "shuffled")
    return {"sea": sea, "code": code, "shuffled": shuffled}


def _recipe(folders: dict[str, Path], source: str, **options: Any) -> Recipe:
    return Recipe(
        **{
            "method": "task_arithmetic",
            "base": ModelRef(str(folders["sea"])),
            "sources": (Source("tuned", ModelRef(str(folders[source])), {"weight": 0.5}),),
            "tokenizer": TokenizerChoice("union"),
            **options,
        }
    )


def _loaded(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_a_union_speaks_both_and_merges_row_by_token(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    export(_recipe(folders, "code"), tmp_path / "out")
    model, tokenizer = _loaded(tmp_path / "out")
    ids = tokenizer.get_vocab()
    merged = model.get_input_embeddings().weight
    assert len(merged) == model.config.vocab_size == len(ids)
    tables = {}
    for name in ("sea", "code"):
        own = AutoTokenizer.from_pretrained(folders[name]).get_vocab()
        rows = load_file(folders[name] / "model.safetensors")[EMBEDDING].float()
        tables[name] = {token: rows[index] for token, index in own.items()}
    assert set(ids) == set(tables["sea"]) | set(tables["code"])
    for token, index in ids.items():
        base = tables["sea"].get(token, tables["code"].get(token))
        tuned = tables["code"].get(token, base)
        expected = base + (tuned - base) * 0.5
        assert torch.equal(merged[index], expected.to(merged.dtype)), token
    batch = tokenizer("the quick brown fox merges numbers", return_tensors="pt")
    assert torch.isfinite(model(**batch).logits).all()


def test_how_a_source_numbers_its_tokens_changes_nothing(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for source in ("code", "shuffled"):
        export(_recipe(folders, source), tmp_path / source)
    one, other = (load_file(tmp_path / s / "model.safetensors") for s in ("code", "shuffled"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("source", ["base", "intersection", "tuned"])
def test_every_choice_makes_a_model_that_loads(
    folders: dict[str, Path], tmp_path: Path, source: str
) -> None:
    choice = TokenizerChoice(source, pad_to_multiple_of=64)
    export(_recipe(folders, "code", tokenizer=choice), tmp_path / "out")
    model, tokenizer = _loaded(tmp_path / "out")
    assert len(model.get_input_embeddings().weight) % 64 == 0
    text = "the quick brown fox"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_without_a_choice_other_vocabularies_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(SpecError) as caught:
        open_merge(_recipe(folders, "shuffled", tokenizer=None))
    assert any("`tokenizer: union`" in line for line in caught.value.problems)


def test_a_choice_survives_the_recipe_of_the_export(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    known = export(_recipe(folders, "code", chat_template="chatml"), tmp_path / "out")
    again = load_recipe(tmp_path / "out" / "evomerge_recipe.json")
    assert again.digest == known.digest
    export(again, tmp_path / "again")
    digests = {Checkpoint.open(str(tmp_path / name)).digest() for name in ("out", "again")}
    assert len(digests) == 1
    chat = [{"role": "user", "content": "hi"}]
    text = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(chat, tokenize=False)
    assert text.startswith("<|im_start|>user\nhi<|im_end|>")


def test_a_mergekit_file_chooses_by_path(folders: dict[str, Path], tmp_path: Path) -> None:
    document = {
        "models": [{"model": str(folders["code"]), "parameters": {"weight": 0.5}}],
        "merge_method": "task_arithmetic",
        "base_model": str(folders["sea"]),
        "dtype": "float32",
        "tokenizer": {
            "source": "union",
            "tokens": {"Ġmodels": {"source": str(folders["code"]), "force": True}},
        },
        "chat_template": "auto",
    }
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(document, allow_unicode=True))
    recipe = load_recipe(tmp_path / "merge.yml")
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.tokens["Ġmodels"].model == "code"
    export(recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == len(AutoTokenizer.from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize(
    ("tokenizer", "problem"),
    [
        ("tokenizer: unoin", "unknown source 'unoin'; did you mean 'union'?"),
        ("tokenizer: {source: union, pad: 3}", "tokenizer: unknown key 'pad'"),
        ("tokenizer: {tokens: {zzz: {source: tuned}}}", "the output vocabulary has no such token"),
        ("chat_template: chatlm", "chat_template: unknown 'chatlm'; did you mean 'chatml'?"),
    ],
)
def test_a_typo_is_one_clear_line(
    folders: dict[str, Path], tmp_path: Path, tokenizer: str, problem: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"method: linear\nbase: {folders['sea']}\nsources: {{tuned: {folders['code']}}}\n"
        f"{tokenizer}\n" + ("tokenizer: union" if "chat" in tokenizer else "")
    )
    with pytest.raises(EvomergeError) as caught:
        export(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "out")
    assert problem in str(caught.value)
    assert not (tmp_path / "out").exists()
