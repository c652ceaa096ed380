"""The zoo's tokenizer: one token per character, and nothing lost or added."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from evomerge.zoo.skills import make_skills
from evomerge.zoo.vocabulary import EOS, EOS_ID, PAD_ID, TOKENS, build_tokenizer, encode


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """The tokenizer after a trip to disk and back."""
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(64).save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def test_every_character_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "".join(token for token in TOKENS if len(token) == 1)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) == len(TOKENS) - 3
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", list(make_skills(0)))
def test_encode_is_the_tokenizer(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    item = make_skills(0)[name](Random(0))
    text = item.prompt + item.answer
    assert tokenizer(text)["input_ids"] == encode(text)
    assert tokenizer.decode(encode(text)) == text


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.is_fast
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD_ID, EOS_ID)
    assert tokenizer(f"a{EOS}")["input_ids"] == [*encode("a"), EOS_ID]
    assert tokenizer.decode([*encode("a"), EOS_ID], skip_special_tokens=True) == "a"


def test_a_foreign_character_is_refused() -> None:
    with pytest.raises(KeyError):
        encode("é")
