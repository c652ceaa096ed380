"""Tokenizers trained on the spot on a few sentences, and tiny models that have them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import small_llama
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEXTS = {
    "sea": [
        "the quick brown fox jumps over the lazy dog",
        "she sells sea shells on the sea shore",
        "shells and shores, jumping foxes",
    ],
    "code": [
        "the quick brown fox likes numbers like 123 and 456",
        "merging models of language, merging vocabularies of language models",
        "def merge(models): return numbers",
    ],
}
KINDS = ("bpe", "metaspace-bpe", "wordpiece", "wordlevel", "unigram")
SPECIAL = ("<unk>", "<s>", "</s>")


def train(kind: str, text: str, *, size: int = 330, special: Sequence[str] = SPECIAL) -> Tokenizer:
    """A tokenizer trained on TEXTS[text]."""
    options = {"special_tokens": list(special), "show_progress": False}
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=size, **options)
    elif kind == "metaspace-bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
        trainer = trainers.BpeTrainer(vocab_size=120, **options)
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=100, **options)
    elif kind == "wordlevel":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=100, **options)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=80, unk_token="<unk>", **options)
    tokenizer.train_from_iterator(TEXTS[text] * 4, trainer)
    return tokenizer


def save(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    added: Sequence[str] = (),
    rows: int | None = None,
    **options: Any,
) -> Path:
    """A random Llama with this tokenizer and plain added tokens; returns its folder."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_tokens(list(added))
    return save_with(folder, fast, rows or len(fast), **options)


def save_with(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int, **options: Any) -> Path:
    """A random Llama of `rows` rows with this tokenizer of transformers; returns its folder."""
    shape = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
    }
    small_llama.build(vocab_size=rows, **{**shape, **options}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def permute(source: Path, folder: Path, *, seed: int = 0) -> Path:
    """The same model with its tokens numbered otherwise: ids and rows shuffled alike.

    Only for tokenizers whose ids are free: not Unigram.
    """
    folder.mkdir()
    document = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    ids = sorted(
        {*document["model"]["vocab"].values(), *(t["id"] for t in document["added_tokens"])}
    )
    shuffled = ids[:]
    random.Random(seed).shuffle(shuffled)
    new = dict(zip(ids, shuffled, strict=True))
    document["model"]["vocab"] = {t: new[i] for t, i in document["model"]["vocab"].items()}
    for token in document["added_tokens"]:
        token["id"] = new[token["id"]]
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = tensors[name].clone()
        moved[torch.tensor(shuffled)] = tensors[name][torch.tensor(ids)]
        tensors[name] = moved
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder
