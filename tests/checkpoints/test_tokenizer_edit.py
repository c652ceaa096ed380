"""Edited tokenizers, loaded by transformers: what they encode, and the configs beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small_tokenizers
import transformers
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.tokenizer_writer import (
    output_config,
    output_generation_config,
    write_tokenizer,
)
from evomerge.checkpoints.vocabulary import Vocabulary, plan_vocabulary
from evomerge.errors import CheckpointError
from evomerge.tokenizer_choice import TokenizerChoice

LINES = [line for lines in small_tokenizers.TEXTS.values() for line in lines]
Models = dict[str, Checkpoint]


@pytest.fixture(scope="module", params=small_tokenizers.KINDS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp(request.param)
    special = ("<pad>", *small_tokenizers.SPECIAL)
    sea = small_tokenizers.train(request.param, "sea")
    code = small_tokenizers.train(request.param, "code", special=special)
    small_tokenizers.save(root / "sea", sea, added=["<|sea|>"])
    small_tokenizers.save(root / "code", code, added=["<|code|>"], rows=400)
    return {"base": Checkpoint.open(str(root / "sea")), "code": Checkpoint.open(str(root / "code"))}


def _written(source: str, models: Models, folder: Path) -> tuple[Vocabulary, Tokenizer]:
    vocabulary = plan_vocabulary(TokenizerChoice(source), models)
    paths = write_tokenizer(folder, vocabulary, models)
    assert {*folder.iterdir()} == {*paths}
    return vocabulary, Tokenizer.from_file(str(folder / "tokenizer.json"))


def _of(checkpoint: Checkpoint) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))


@pytest.mark.parametrize("source", ["union", "intersection", "base", "code"])
def test_transformers_gives_every_token_its_row(
    models: Models, tmp_path: Path, source: str
) -> None:
    vocabulary, raw = _written(source, models, tmp_path)
    assert raw.get_vocab() == vocabulary.ids
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == vocabulary.ids
    assert loaded.convert_tokens_to_ids("<s>") == vocabulary.ids["<s>"]
    assert loaded.bos_token == "<s>"
    text = f"{LINES[0]} <|sea|><|code|> {LINES[3]}"
    assert loaded(text).input_ids == raw.encode(text).ids


@pytest.mark.parametrize("source", ["base", "code"])
def test_a_models_own_files_are_copied(models: Models, tmp_path: Path, source: str) -> None:
    _written(source, models, tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (models[source].folder / path.name).read_bytes()


def test_a_union_with_nothing_new_is_the_bases_files(models: Models, tmp_path: Path) -> None:
    same = {"base": models["base"], "other": models["base"]}
    _written("union", same, tmp_path)
    ours, theirs = tmp_path / "tokenizer.json", models["base"].folder / "tokenizer.json"
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_union_finds_the_added_tokens_of_all(models: Models, tmp_path: Path) -> None:
    vocabulary, raw = _written("union", models, tmp_path)
    tokens = raw.encode("<s>fox<|sea|>fox<|code|><pad>").tokens
    assert [t for t in tokens if t in ("<s>", "<|sea|>", "<|code|>", "<pad>")] == [
        "<s>", "<|sea|>", "<|code|>", "<pad>"
    ]  # fmt: skip
    assert vocabulary.ids["<pad>"] >= len(_of(models["base"]).get_vocab())


def test_a_union_makes_tokens_of_every_model_from_their_text(
    models: Models, tmp_path: Path
) -> None:
    _, raw = _written("union", models, tmp_path)
    made = {token for line in LINES for token in raw.encode(line).tokens}
    ours, theirs = (_of(model).get_vocab().keys() for model in models.values())
    assert made & (ours - theirs)
    assert made & (theirs - ours)


def test_a_bpe_union_only_joins_the_bases_tokens(
    tmp_path: Path,
) -> None:
    """Cut back into the base's tokens, the union's are the base's, of any text."""
    models = {}
    for name, text in (("base", "sea"), ("code", "code")):
        folder = small_tokenizers.save(tmp_path / name, small_tokenizers.train("bpe", text))
        models[name] = Checkpoint.open(str(folder))
    (tmp_path / "out").mkdir()
    vocabulary, raw = _written("union", models, tmp_path / "out")
    base = _of(models["base"])
    new = vocabulary.ids.keys() - base.get_vocab().keys()
    joined = 0
    for line in [*LINES, *(a + b for a in LINES for b in LINES), "Zürich 東京\n\tx"]:
        tokens = raw.encode(line).tokens
        cut = [p for t in tokens for p in ([t] if t not in new else _parts(base, t))]
        assert cut == base.encode(line).tokens
        assert raw.decode(raw.encode(line).ids) == line == base.decode(base.encode(line).ids)
        joined += len(cut) - len(tokens)
    assert joined > 100


def _parts(tokenizer: Tokenizer, token: str) -> list[str]:
    return [part.value for part in tokenizer.model.tokenize(token)]


def test_most_new_bpe_tokens_can_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = {}
    for name, text in (("base", "sea"), ("code", "code")):
        folder = small_tokenizers.save(tmp_path / name, small_tokenizers.train("bpe", text))
        models[name] = Checkpoint.open(str(folder))
    (tmp_path / "out").mkdir()
    vocabulary, raw = _written("union", models, tmp_path / "out")
    new = sorted(vocabulary.ids.keys() - _of(models["base"]).get_vocab().keys())
    made = [token for token in new if _parts(raw, token) == [token]]
    assert len(made) >= 0.8 * len(new)
    lost = len(new) - len(made)
    assert (f"union: {lost} of {len(new)} new tokens" in caplog.text) == bool(lost)


def test_an_intersection_builds_what_it_keeps_as_before(models: Models, tmp_path: Path) -> None:
    vocabulary, raw = _written("intersection", models, tmp_path)
    base = _of(models["base"])
    for token in vocabulary.ids:
        if token not in ("<unk>", "<s>", "</s>") and _parts(base, token) == [token]:
            assert _parts(raw, token) == [token]
    kept = sorted(vocabulary.ids, key=vocabulary.ids.__getitem__)
    assert kept == sorted(kept, key=base.get_vocab().__getitem__)


def test_a_byte_level_intersection_still_spells_any_text(tmp_path: Path) -> None:
    models = {}
    for name, text in (("base", "sea"), ("code", "code")):
        folder = small_tokenizers.save(tmp_path / name, small_tokenizers.train("bpe", text))
        models[name] = Checkpoint.open(str(folder))
    (tmp_path / "out").mkdir()
    _, raw = _written("intersection", models, tmp_path / "out")
    for line in [*LINES, "Zürich 東京\n\tx"]:
        assert raw.decode(raw.encode(line).ids) == line


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Qwen2Tokenizer", "bpe"),
        ("GPT2Tokenizer", "bpe"),
        ("LlamaTokenizer", "metaspace-bpe"),
        ("GemmaTokenizer", "metaspace-bpe"),
        ("BertTokenizer", "wordpiece"),
        ("T5Tokenizer", "unigram"),
    ],
)
@pytest.mark.parametrize("source", ["union", "intersection"])
def test_transformers_own_classes_keep_the_edit(
    name: str, kind: str, source: str, tmp_path: Path
) -> None:
    """They build a tokenizer of their own around the tokens and merges of the file."""
    models = {}
    for model, text in (("base", "sea"), ("code", "code")):
        trained = json.loads(small_tokenizers.train(kind, text).to_str())["model"]
        merges = {"merges": [tuple(m) for m in trained["merges"]]} if "merges" in trained else {}
        own = getattr(transformers, name)(vocab=_as_class_wants(trained["vocab"]), **merges)
        own.add_tokens([f"<|{text}|>"])
        rows = max(own.get_vocab().values()) + 1
        small_tokenizers.save_with(tmp_path / model, own, rows)
        models[model] = Checkpoint.open(str(tmp_path / model))
    (tmp_path / "out").mkdir()
    vocabulary, raw = _written(source, models, tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == name
    assert loaded.get_vocab() == vocabulary.ids
    for line in LINES:
        assert loaded(f"{line}<|sea|>").input_ids == raw.encode(f"{line}<|sea|>").ids


def _as_class_wants(vocabulary):
    if isinstance(vocabulary, list):
        return [(piece, score) for piece, score in vocabulary]
    return vocabulary


def test_the_post_processor_and_older_configs_follow_an_intersection(tmp_path: Path) -> None:
    from tokenizers import processors

    models = {}
    for name, text in (("base", "sea"), ("code", "code")):
        tokenizer = small_tokenizers.train("bpe", text, special=("<unk>", "<x>", "<s>", "</s>"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 2)]
        )
        folder = small_tokenizers.save(tmp_path / name, tokenizer, added=["<gone>", f"<{text}>"])
        models[name] = Checkpoint.open(str(folder))
    path = tmp_path / "base" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["added_tokens_decoder"] = {"2": {"content": "<s>", "special": True}}
    path.write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    vocabulary, raw = _written("intersection", models, tmp_path / "out")
    assert raw.encode("sea").ids[0] == vocabulary.ids["<s>"]
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    decoder = written["added_tokens_decoder"]
    assert decoder[str(vocabulary.ids["<s>"])]["content"] == "<s>"
    assert {entry["content"] for entry in decoder.values()} <= vocabulary.ids.keys()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == vocabulary.ids


@pytest.mark.parametrize("source", ["union", "intersection", "base", "code"])
def test_configs_name_the_outputs_ids(models: Models, source: str) -> None:
    vocabulary = plan_vocabulary(TokenizerChoice(source), models)
    config = AutoConfig.for_model(**output_config(vocabulary, models))
    assert config.vocab_size == vocabulary.rows
    assert config.bos_token_id == vocabulary.ids["<s>"]
    assert config.eos_token_id == vocabulary.ids["</s>"]
    generation = GenerationConfig(**(output_generation_config(vocabulary, models) or {}))
    assert generation.eos_token_id == vocabulary.ids["</s>"]


def test_lists_of_ids_and_inner_configs_are_renumbered(models: Models) -> None:
    vocabulary = plan_vocabulary(TokenizerChoice("intersection"), models)
    base = _of(models["base"]).get_vocab()
    ids = vocabulary.ids
    moved = next(token for token in ids if ids[token] != base[token])
    changed = Checkpoint(
        models["base"].path,
        models["base"].folder,
        {
            "eos_token_id": [base["</s>"], base[moved]],
            "pad_token_id": -1,
            "hidden_size": base[moved],
            "text_config": {"bos_token_id": base[moved], "vocab_size": 9},
        },
        {},
    )
    config = output_config(vocabulary, {**models, "base": changed})
    assert config == {
        "eos_token_id": [ids["</s>"], ids[moved]],
        "pad_token_id": -1,
        "hidden_size": base[moved],
        "text_config": {"bos_token_id": ids[moved], "vocab_size": vocabulary.rows},
    }


def test_unigram_ids_with_a_gap_are_refused(tmp_path: Path) -> None:
    models = {}
    for name, text in (("base", "sea"), ("code", "code")):
        folder = small_tokenizers.save(
            tmp_path / name, small_tokenizers.train("unigram", text), rows=400
        )
        models[name] = Checkpoint.open(str(folder))
    path = tmp_path / "base" / "tokenizer.json"
    document = json.loads(path.read_text())
    document["added_tokens"].append({"id": 300, "content": "<far>", "special": False})
    path.write_text(json.dumps(document))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="some ids below its largest have no token"):
        _written("union", models, tmp_path / "out")
