"""Write the tokenizer of a merged model, and the configs that name its ids.

Works out no vocabulary; weights are written elsewhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evomerge.checkpoints.tokenizer_edit import edited_tokenizer
from evomerge.checkpoints.tokenizer_files import (
    GENERATION,
    TOKENIZER,
    is_id_key,
    read_json,
    write_json,
)
from evomerge.checkpoints.vocabulary import Vocabulary
from evomerge.checkpoints.weights import Model

_CONFIG = "tokenizer_config.json"
# Say nothing of ids, so they fit an edited vocabulary too.
_STRINGS_ONLY = ("special_tokens_map.json", "chat_template.jinja", "chat_template.json")
# Describe the same vocabulary in other formats.
_FORMATS = (
    "tokenizer.model",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def write_tokenizer(
    folder: Path, vocabulary: Vocabulary, models: Mapping[str, Model]
) -> list[Path]:
    """Write the files of the output's tokenizer into `folder`; returns their paths.

    The donor's own files, byte for byte, where its vocabulary is kept; else `tokenizer.json` edited
    and only the files beside it that fit. Raises OSError.
    """
    donor = models[vocabulary.donor]
    if not vocabulary.is_edited:
        return _copies(donor, (TOKENIZER, _CONFIG, *_STRINGS_ONLY, *_FORMATS), folder)
    document = edited_tokenizer(vocabulary)
    written = [write_json(folder / TOKENIZER, document)]
    if donor.companion(_CONFIG).is_file():
        config = _edited_config(read_json(donor.companion(_CONFIG)), document["added_tokens"])
        written.append(write_json(folder / _CONFIG, config))
    return written + _copies(donor, _STRINGS_ONLY, folder)


def output_config(vocabulary: Vocabulary, models: Mapping[str, Model]) -> dict[str, Any]:
    """The first model's config with the output's vocabulary size and token ids."""
    config = _with_ids(vocabulary, models, {n: m.config for n, m in models.items()})
    inner = config.get("text_config")  # of a model that also sees or hears
    if isinstance(inner, Mapping):
        config["text_config"] = {**inner, "vocab_size": vocabulary.rows}
    if "vocab_size" in config or inner is None:
        config["vocab_size"] = vocabulary.rows
    return config


def output_generation_config(
    vocabulary: Vocabulary, models: Mapping[str, Model]
) -> dict[str, Any] | None:
    """The first model's generation config with the output's token ids; None if it has none.

    Raises CheckpointError for one that is not JSON.
    """
    first = next(iter(models))
    found = {name: read_json(model.companion(GENERATION)) for name, model in models.items()}
    return _with_ids(vocabulary, models, found) if found[first] else None


def _with_ids(
    vocabulary: Vocabulary, models: Mapping[str, Model], configs: Mapping[str, Any]
) -> dict[str, Any]:
    """A chosen model's tokenizer comes with the ids that its own config names."""
    first = next(iter(models))
    if vocabulary.donor == first:
        before = vocabulary.models[first].file.ids
        return _renumbered(configs[first], {i: t for t, i in before.items()}, vocabulary)
    kept = {key: value for key, value in configs[first].items() if not is_id_key(key)}
    return kept | {key: value for key, value in configs[vocabulary.donor].items() if is_id_key(key)}


def _renumbered(
    config: Mapping[str, Any], tokens: Mapping[int, str], vocabulary: Vocabulary
) -> dict[str, Any]:
    """The config with every token id as the output has it; one that names no token stays."""

    def new(index: Any) -> Any:
        return vocabulary.ids.get(tokens.get(index, ""), index)

    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            value = _renumbered(value, tokens, vocabulary)
        elif is_id_key(key):
            value = [new(index) for index in value] if isinstance(value, list) else new(value)
        result[key] = value
    return result


def _edited_config(config: dict[str, Any], added: list[dict[str, Any]]) -> dict[str, Any]:
    """`tokenizer_config.json`: older ones list the added tokens a second time, by id."""
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {
            str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in added
        }
    return config


def _copies(model: Model, names: Iterable[str], folder: Path) -> list[Path]:
    found = [path for name in names if (path := model.companion(name)).is_file()]
    return [Path(shutil.copyfile(path, folder / path.name)) for path in found]
