"""A tokenizer as its `tokenizer.json` describes it: tokens, ids, and what it cannot do without.

Output vocabularies are worked out in `vocabulary`, edits in `tokenizer_edit`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evomerge.checkpoints.weights import Model
from evomerge.errors import CheckpointError

TOKENIZER = "tokenizer.json"
GENERATION = "generation_config.json"
_EDITABLE = ("BPE", "WordPiece", "WordLevel", "Unigram")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")


@dataclass(frozen=True)
class TokenizerFile:
    """The parsed `tokenizer.json` of the model that the user called `path`."""

    path: str
    document: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """BPE, WordPiece, WordLevel, Unigram, or what else the file says."""
        return str(self.document["model"].get("type"))

    @property
    def added(self) -> list[dict[str, Any]]:
        """Tokens that are looked for in the text before anything else, with their flags."""
        return list(self.document.get("added_tokens") or ())

    @cached_property
    def pieces(self) -> dict[str, int]:
        """Ids of the model's own tokens, added tokens apart."""
        vocabulary = self.document["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, log-probability], the id is the place
            return {entry[0]: index for index, entry in enumerate(vocabulary)}
        return dict(vocabulary)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Ids of all tokens."""
        return {**self.pieces, **{entry["content"]: entry["id"] for entry in self.added}}

    @property
    def alphabet(self) -> tuple[str, str, str]:
        """What decides how text is spelt in tokens: two that differ share no vocabulary."""
        model = self.document["model"]
        spelling = "plain"
        for step in self._steps():
            if step.get("type") == "ByteLevel":
                spelling = "byte-level"
            elif step.get("type") == "Metaspace" or step.get("content") == "▁":
                spelling = "metaspace"
        return self.kind, spelling, str(model.get("continuing_subword_prefix") or "")

    def required(self) -> set[str]:
        """Tokens without which some text could not be encoded, or the model not be driven.

        Special tokens, the unknown token, those the post-processor adds, and the bytes: a
        byte-level alphabet's 256 characters or the byte fallback's <0x00> to <0xFF>.
        """
        model = self.document["model"]
        names = {entry["content"] for entry in self.added if entry.get("special")}
        names.add(str(model.get("unk_token")))
        if self.kind == "Unigram" and model.get("unk_id") is not None:
            names.add(model["vocab"][model["unk_id"]][0])
        names.update(special_tokens(self.document.get("post_processor")))
        if model.get("byte_fallback"):
            names.update(f"<0x{byte:02X}>" for byte in range(256))
        if self.alphabet[1] == "byte-level":
            names.update(token for token in self.pieces if len(token) == 1)
        return names & self.ids.keys()

    def named(self, config: Mapping[str, Any]) -> set[str]:
        """Tokens that a config or generation config names by id."""
        by_id = {index: token for token, index in self.ids.items()}
        return {by_id[index] for index in ids_in(config) if index in by_id}

    def check_editable(self, what: str) -> None:
        """Raise CheckpointError for a tokenizer of which we cannot make a `what`."""
        model = self.document["model"]
        affixes = ("continuing_subword_prefix", "end_of_word_suffix")
        if self.kind not in _EDITABLE:
            reason = f"its model is {self.kind!r}, we can edit {', '.join(_EDITABLE)}"
        elif self.kind == "BPE" and any(model.get(affix) for affix in affixes):
            reason = "its BPE marks the parts of words, which we cannot edit"
        else:
            return
        raise CheckpointError(
            f"{self.path}: no {what} can be made with this tokenizer: {reason};"
            " choose `tokenizer: {source: base}` or one of the models"
        )

    def _steps(self) -> Iterator[Mapping[str, Any]]:
        stages = [self.document.get(k) for k in ("normalizer", "pre_tokenizer", "decoder")]
        while stages:
            step = stages.pop()
            if isinstance(step, Mapping):
                yield step
                for inner in ("normalizers", "pretokenizers", "decoders"):
                    stages += step.get(inner) or ()


def read_tokenizer_file(checkpoint: Model) -> TokenizerFile:
    """Read a checkpoint's `tokenizer.json`. Raises CheckpointError."""
    path = checkpoint.companion(TOKENIZER)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        read = TokenizerFile(checkpoint.path, document)
        if not all(isinstance(index, int) for index in read.ids.values()):
            raise TypeError("an id is not a whole number")
        return read
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file, and vocabularies are aligned by it; write it with"
            " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a tokenizer file ({error!r})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no file. Raises CheckpointError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, not {type(document).__name__}")
    return document


def write_json(path: Path, document: Mapping[str, Any]) -> Path:
    """Write a JSON file and return its path. Raises OSError."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def special_tokens(processor: object) -> Iterator[str]:
    """Tokens that a post-processor puts around the text."""
    if not isinstance(processor, Mapping):
        return
    for inner in processor.get("processors") or ():
        yield from special_tokens(inner)
    yield from (processor[key][0] for key in ("sep", "cls") if key in processor)
    for special in (processor.get("special_tokens") or {}).values():
        yield from special["tokens"]


def is_id_key(key: str) -> bool:
    """Whether a key of a config holds one or more token ids."""
    return key.endswith(("_token_id", "_token_ids")) or key in _ID_LISTS


def ids_in(config: Mapping[str, Any]) -> Iterable[int]:
    """Token ids that a config holds, nested configs included."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from ids_in(value)
        elif is_id_key(key):
            yield from (i for i in (value if isinstance(value, list) else [value]) if i is not None)
