"""Output vocabularies and aligned rows: laws, rules, padding, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import small_llama
import small_tokenizers
import torch

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.aligned_rows import AlignedRows
from evomerge.checkpoints.vocabulary import Vocabulary, plan_vocabulary
from evomerge.errors import CheckpointError, MergeError, ShapeMismatch
from evomerge.tokenizer_choice import TokenizerChoice, TokenRule, read_tokenizer

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
UNION = TokenizerChoice("union")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models: shared, own and pairwise tokens, other ids, one padded to 400 rows."""
    root = tmp_path_factory.mktemp("models")
    small_tokenizers.save(
        root / "sea", small_tokenizers.train("bpe", "sea"), added=["<|sea|>", "<|pair|>"], seed=0
    )
    code = small_tokenizers.train("bpe", "code", special=("<pad>", *small_tokenizers.SPECIAL))
    small_tokenizers.save(root / "code", code, added=["<|code|>", "<|both|>"], rows=400, seed=1)
    third = small_tokenizers.train("bpe", "code", size=300)
    small_tokenizers.save(root / "third", third, added=["<|both|>", "<|pair|>"], seed=2)
    small_tokenizers.permute(root / "code", root / "permuted")
    return root


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Checkpoint]:
    return {
        name: Checkpoint.open(str(folder / path))
        for name, path in {"base": "sea", "code": "code", "third": "third"}.items()
    }


def _aligned(vocabulary: Vocabulary, models: dict[str, Checkpoint], name: str = EMBEDDING):
    return AlignedRows(vocabulary, {k: m.tensor(name) for k, m in models.items()}, name)


def _whole(vocabulary: Vocabulary, models: dict[str, Checkpoint], name: str = EMBEDDING):
    rows = _aligned(vocabulary, models, name)
    return {model: rows.rows(model, 0, vocabulary.rows) for model in models}


def _ids(model: Checkpoint) -> dict[str, int]:
    """By the tokenizers library itself."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model.folder / "tokenizer.json")).get_vocab()


def _row(model: Checkpoint, token: str) -> torch.Tensor:
    return model.tensor(EMBEDDING)[_ids(model)[token]].float()


def test_a_choice_survives_json() -> None:
    rules = {"<a>": TokenRule("code", 5, True), "<b>": TokenRule(None)}
    choice = TokenizerChoice("union", rules, 64)
    assert TokenizerChoice.from_json(json.loads(json.dumps(choice.to_json()))) == choice


def test_a_choice_is_read_as_mergekit_writes_it() -> None:
    faults: list[str] = []
    document = {
        "source": "union",
        "pad_to_multiple_of": 8,
        "tokens": {
            "<a>": {"source": "path/a", "force": True},
            "<b>": {"source": {"kind": "zero"}},
            "<c>": {"source": {"kind": "model_token", "model": "path/b", "token": "x"}},
            "<d>": {"source": {"kind": "model_token", "model": "path/b", "token_id": 3}},
        },
    }
    choice = read_tokenizer(document, faults, model=lambda path: path.removeprefix("path/"))
    rules = {
        "<a>": TokenRule("a", None, True),
        "<b>": TokenRule(None),
        "<c>": TokenRule("b", "x"),
        "<d>": TokenRule("b", 3),
    }
    assert choice == TokenizerChoice("union", rules, 8)
    assert faults == []
    assert read_tokenizer("base", faults) == TokenizerChoice()


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        (3, "tokenizer: base, union, intersection, a model or a mapping, not 3"),
        ({"sourc": "base"}, "tokenizer: unknown key 'sourc'; did you mean 'source'?"),
        ({"source": 3}, "tokenizer.source: base, union, intersection or a model, not 3"),
        ({"pad_to_multiple_of": 0}, "tokenizer.pad_to_multiple_of: a whole number above 0, not 0"),
        ({"tokens": [1]}, "tokenizer.tokens: a mapping of tokens to rules, not [1]"),
        ({"tokens": {"x": {"force": True}}}, "tokenizer.tokens.x: {source: MODEL or"),
        ({"tokens": {"x": {"source": {"kind": "one"}}}}, "tokenizer.tokens.x.source: a model, or"),
        ({"tokens": {"x": {"source": "a", "force": 1}}}, "tokenizer.tokens.x.force: true or false"),
        (
            {"tokens": {"x": {"source": {"kind": "model_token", "model": "a"}}}},
            "tokenizer.tokens.x.source: {kind: model_token, model: MODEL, token: TOKEN}",
        ),
    ],
)
def test_a_malformed_choice_is_one_line(document: object, fault: str) -> None:
    faults: list[str] = []
    read_tokenizer(document, faults)
    assert len(faults) == 1
    assert faults[0].startswith(fault)


def test_union_keeps_the_bases_ids_and_adds_the_others_in_order(models) -> None:
    vocabulary = plan_vocabulary(UNION, models)
    base, code, third = (_ids(model) for model in models.values())
    assert {t: vocabulary.ids[t] for t in base} == base
    new = sorted(code.keys() - base.keys())
    newer = sorted(third.keys() - base.keys() - code.keys())
    assert [vocabulary.ids[t] for t in new + newer] == list(
        range(len(base), len(base) + len(new) + len(newer))
    )
    assert vocabulary.rows == len(vocabulary.ids)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_rows_of_a_model_are_copied_bit_for_bit(models, name: str) -> None:
    vocabulary = plan_vocabulary(UNION, models)
    aligned = _whole(vocabulary, models, name)
    for model, checkpoint in models.items():
        for token, index in _ids(checkpoint).items():
            expected = checkpoint.tensor(name)[index].float()
            assert torch.equal(aligned[model][vocabulary.ids[token]], expected)


def test_a_missing_token_has_the_bases_row_then_the_owners_then_their_mean(models) -> None:
    vocabulary = plan_vocabulary(UNION, models)
    aligned = _whole(vocabulary, models)
    at = vocabulary.ids
    assert torch.equal(aligned["code"][at["<|sea|>"]], _row(models["base"], "<|sea|>"))
    assert torch.equal(aligned["base"][at["<|code|>"]], _row(models["code"], "<|code|>"))
    assert torch.equal(aligned["code"][at["<|pair|>"]], _row(models["base"], "<|pair|>"))
    mean = (_row(models["code"], "<|both|>") + _row(models["third"], "<|both|>")) / 2
    assert torch.equal(aligned["base"][at["<|both|>"]], mean)
    assert torch.equal(aligned["third"][at["<|both|>"]], _row(models["third"], "<|both|>"))


def test_without_a_base_the_mean_of_the_owners_stands_in(folder: Path) -> None:
    models = {n: Checkpoint.open(str(folder / n)) for n in ("sea", "code", "third")}
    vocabulary = plan_vocabulary(UNION, models)
    assert vocabulary.donor == "sea"
    mean = (_row(models["sea"], "<|pair|>") + _row(models["third"], "<|pair|>")) / 2
    assert torch.equal(_whole(vocabulary, models)["code"][vocabulary.ids["<|pair|>"]], mean)


@pytest.mark.parametrize("source", ["base", "union", "intersection", "third"])
def test_how_a_source_numbers_its_tokens_changes_nothing(models, folder: Path, source: str) -> None:
    permuted = {**models, "code": Checkpoint.open(str(folder / "permuted"))}
    choice = TokenizerChoice(source)
    one, other = plan_vocabulary(choice, models), plan_vocabulary(choice, permuted)
    assert one.ids == other.ids
    assert one.rows == other.rows
    for model, rows in _whole(one, models).items():
        assert torch.equal(rows, _whole(other, permuted)[model])


@pytest.mark.parametrize("source", ["base", "union", "intersection", "code"])
def test_a_model_with_itself_is_itself(models, source: str) -> None:
    same = {"base": models["code"], "code": models["code"]}
    vocabulary = plan_vocabulary(TokenizerChoice(source), same)
    assert vocabulary.is_trivial == (source != "intersection")  # that drops the padding
    assert not vocabulary.is_edited
    rows = vocabulary.rows
    expected = models["code"].tensor(EMBEDDING)[:rows].float()
    assert rows == (len(_ids(models["code"])) if source == "intersection" else 400)
    assert all(torch.equal(m, expected) for m in _whole(vocabulary, same).values())


def test_a_named_source_keeps_its_ids_and_its_padding(models) -> None:
    vocabulary = plan_vocabulary(TokenizerChoice("code"), models)
    assert (vocabulary.ids, vocabulary.rows) == (_ids(models["code"]), 400)
    aligned = _whole(vocabulary, models)
    padding = models["code"].tensor(EMBEDDING)[len(vocabulary.ids) :].float()
    for rows in aligned.values():
        assert torch.equal(rows[len(vocabulary.ids) :], padding)


def test_new_padding_is_the_mean_of_a_models_own_rows(models) -> None:
    vocabulary = plan_vocabulary(TokenizerChoice("union", {}, 64), models)
    tokens = len(vocabulary.ids)
    assert vocabulary.rows == -(-tokens // 64) * 64 > tokens
    for rows in _whole(vocabulary, models).values():
        mean = rows[:tokens].double().mean(0).float()
        assert torch.equal(rows[tokens:], mean.expand(vocabulary.rows - tokens, -1))


def test_intersection_is_what_all_share_in_the_bases_order_and_what_text_needs(models) -> None:
    vocabulary = plan_vocabulary(TokenizerChoice("intersection"), models)
    base, code, third = (_ids(model) for model in models.values())
    shared = base.keys() & code.keys() & third.keys()
    assert shared <= vocabulary.ids.keys() <= base.keys()
    assert set(vocabulary.kept) == vocabulary.ids.keys() - shared
    assert list(vocabulary.ids) == sorted(vocabulary.ids, key=base.__getitem__)
    assert list(vocabulary.ids.values()) == list(range(len(vocabulary.ids)))


def test_intersection_never_loses_a_special_token(folder: Path, tmp_path: Path) -> None:
    """Also not one that only the config names."""
    tokenizer = small_tokenizers.train("bpe", "sea", special=(*small_tokenizers.SPECIAL, "<end>"))
    own = small_tokenizers.save(tmp_path / "m", tokenizer, added=["<|stop|>"])
    stop = _ids(Checkpoint.open(str(own)))["<|stop|>"]
    (own / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, stop]}))
    models = {"base": Checkpoint.open(str(own)), "code": Checkpoint.open(str(folder / "code"))}
    vocabulary = plan_vocabulary(TokenizerChoice("intersection"), models)
    assert {"<end>", "<|stop|>"} <= set(vocabulary.kept)


def test_rules_say_where_rows_come_from(models) -> None:
    rules = {
        "<|code|>": TokenRule("code", "h"),
        "<|both|>": TokenRule(None),
        "<|sea|>": TokenRule("third", 7, force=True),
        "q": TokenRule("code", force=True),
        "z": TokenRule("code"),
    }
    vocabulary = plan_vocabulary(TokenizerChoice("union", rules), models)
    aligned, at = _whole(vocabulary, models), vocabulary.ids
    plain = _whole(plan_vocabulary(UNION, models), models)
    h = _row(models["code"], "h")
    assert torch.equal(aligned["base"][at["<|code|>"]], h)
    assert torch.equal(aligned["third"][at["<|code|>"]], h)
    assert torch.equal(aligned["code"][at["<|code|>"]], _row(models["code"], "<|code|>"))
    assert not aligned["base"][at["<|both|>"]].any()
    assert torch.equal(aligned["third"][at["<|both|>"]], _row(models["third"], "<|both|>"))
    for rows in aligned.values():
        assert torch.equal(rows[at["<|sea|>"]], models["third"].tensor(EMBEDDING)[7].float())
        assert torch.equal(rows[at["q"]], _row(models["code"], "q"))
    for model in models:
        if "z" in _ids(models[model]):
            assert torch.equal(aligned[model][at["z"]], plain[model][at["z"]])


@pytest.mark.parametrize("block", [1, 7, 64, 10_000])
def test_blocks_of_any_size_are_the_whole(models, block: int) -> None:
    vocabulary = plan_vocabulary(TokenizerChoice("union", {}, 64), models)
    rows = _aligned(vocabulary, models)
    whole = _whole(vocabulary, models)
    for model in models:
        count = vocabulary.rows
        cut = [rows.rows(model, start, start + block) for start in range(0, count, block)]
        assert torch.equal(torch.cat(cut), whole[model])
        size = whole[model].numel()
        flat = [
            rows.elements(model, s, min(s + 13 * block, size)) for s in range(0, size, 13 * block)
        ]
        assert torch.equal(torch.cat(flat), whole[model].reshape(-1))


def test_a_bias_is_aligned_too(models) -> None:
    vocabulary = plan_vocabulary(UNION, models)
    biases = {name: torch.randn(m.shape(EMBEDDING)[0]) for name, m in models.items()}
    rows = AlignedRows(vocabulary, biases, "lm_head.bias")
    assert rows.shape == (vocabulary.rows,)
    code = _ids(models["code"])
    at = np.array([vocabulary.ids[token] for token in code])
    assert torch.equal(rows.rows("code", 0, vocabulary.rows)[at], biases["code"][[*code.values()]])


def test_a_token_beyond_the_rows_has_none(folder: Path, tmp_path: Path) -> None:
    """A tokenizer with more tokens than the embedding has rows."""
    tokenizer = small_tokenizers.train("bpe", "sea")
    rows = tokenizer.get_vocab_size()
    short = small_tokenizers.save(tmp_path / "m", tokenizer, added=["<|both|>", "<x>"], rows=rows)
    models = {"base": Checkpoint.open(str(short)), "code": Checkpoint.open(str(folder / "code"))}
    vocabulary = plan_vocabulary(TokenizerChoice(), models)
    assert "<x>" not in vocabulary.ids  # nobody has a row for it
    assert vocabulary.rows == rows + 1
    row = _whole(vocabulary, models)["base"][vocabulary.ids["<|both|>"]]
    assert torch.equal(row, _row(models["code"], "<|both|>"))


def test_another_width_is_refused(models, tmp_path: Path) -> None:
    wide = small_tokenizers.save(
        tmp_path / "wide", small_tokenizers.train("bpe", "code"), hidden_size=16
    )
    wider = {**models, "code": Checkpoint.open(str(wide))}
    with pytest.raises(ShapeMismatch, match=r"embed_tokens.weight: 'base' is \[\d+, 8\], 'code'"):
        _aligned(plan_vocabulary(UNION, wider), wider)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (TokenizerChoice("unoin"), "tokenizer: unknown source 'unoin'; did you mean 'union'?"),
        (
            TokenizerChoice("union", {"<|cod|>": TokenRule(None)}),
            r"tokenizer.tokens.<\|cod\|>: the output vocabulary has no such token; did you mean"
            r" '<\|code\|>'\?",
        ),
        (
            TokenizerChoice("union", {"<|sea|>": TokenRule("cod")}),
            r"tokenizer.tokens.<\|sea\|>: no model 'cod'; did you mean 'code'\?",
        ),
        (
            TokenizerChoice("union", {"<|sea|>": TokenRule("code")}),
            r"code has no row for token '<\|sea\|>'",
        ),
        (TokenizerChoice("union", {"<|sea|>": TokenRule("code", 400)}), "rows 0 to 399, not 400"),
    ],
)
def test_a_choice_that_does_not_fit_names_the_thing(models, choice, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        plan_vocabulary(choice, models)


def test_a_source_without_a_tokenizer(models, tmp_path: Path) -> None:
    small_llama.build().save_pretrained(tmp_path / "m")
    bare = Checkpoint.open(str(tmp_path / "m"))
    with pytest.raises(CheckpointError, match=r"tokenizer.json: no such file, and vocabularies"):
        plan_vocabulary(UNION, {**models, "bare": bare})


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"vocab": {"a": "b"}}}'])
def test_a_broken_tokenizer(models, tmp_path: Path, text: str) -> None:
    small_llama.save(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not a tokenizer file"):
        plan_vocabulary(UNION, {**models, "x": Checkpoint.open(str(tmp_path / "m"))})


def test_tokenizers_that_spell_otherwise_are_not_united(models, tmp_path: Path) -> None:
    other = small_tokenizers.save(tmp_path / "m", small_tokenizers.train("metaspace-bpe", "code"))
    mixed = {**models, "code": Checkpoint.open(str(other))}
    with pytest.raises(MergeError, match=r"spells text as BPE byte-level, .* as BPE metaspace"):
        plan_vocabulary(UNION, mixed)
    assert plan_vocabulary(TokenizerChoice(), mixed).ids == _ids(models["base"])


def test_a_tokenizer_that_cannot_be_edited(models, folder: Path) -> None:
    from evomerge.checkpoints.tokenizer_files import TokenizerFile
    from evomerge.checkpoints.vocabulary import ModelTokens, plan

    strange = TokenizerFile("x", {"model": {"type": "Morse", "vocab": {"a": 0}}})
    with pytest.raises(CheckpointError, match="x: no union or intersection can be made with"):
        plan(UNION, {"base": ModelTokens(strange, 1)})
    ending = {"type": "BPE", "vocab": {"a": 0}, "merges": [], "end_of_word_suffix": "</w>"}
    with pytest.raises(CheckpointError, match="its BPE marks the parts of words"):
        plan(UNION, {"base": ModelTokens(TokenizerFile("x", {"model": ending}), 1)})
