"""The zoo's vocabulary: one token per character, and the tokenizer that says so to transformers.

Knows nothing of skills. `encode` is the training loop's short cut; a test holds it to the
tokenizer that is shipped.
"""

from __future__ import annotations

import string
from typing import Any

PAD = "<pad>"
EOS = "<eos>"
_UNKNOWN = "<unk>"
_CHARACTERS = " \n" + string.ascii_lowercase + string.digits + "=?<>()[],.:;+-*/!_|&"
TOKENS: tuple[str, ...] = (PAD, EOS, _UNKNOWN, *_CHARACTERS)
TOKEN_IDS: dict[str, int] = {token: number for number, token in enumerate(TOKENS)}
PAD_ID = TOKEN_IDS[PAD]
EOS_ID = TOKEN_IDS[EOS]


def encode(text: str) -> list[int]:
    """Return the token ids of `text`, one per character; a KeyError for a foreign one."""
    return [TOKEN_IDS[character] for character in text]


def build_tokenizer(context_tokens: int) -> Any:
    """Return a `PreTrainedTokenizerFast` that adds no special token and decodes without blanks."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocab=TOKEN_IDS, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=_UNKNOWN,
        padding_side="left",
        model_max_length=context_tokens,
        clean_up_tokenization_spaces=False,
    )
