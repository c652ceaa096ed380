"""Find a checkpoint's files: a folder, a lone weight file or a model on the hub; shards or not.

Says what is wrong with a folder that cannot be used. Never unpickles anything; reads no tensor.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from evomerge.errors import CheckpointError, PickleRefused

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_SAFETENSORS = ".safetensors"
# No pattern fits a pickle or Python code, so neither is ever downloaded.
_WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


def find_folder(path: str) -> Path:
    """The folder of a checkpoint, downloaded first if `path` names a model on the hub.

    A model on the hub may be followed by @ and a revision. A safetensors file is its own folder.
    Raises CheckpointError if there is no such folder and no such model; PickleRefused.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.suffix == _SAFETENSORS and folder.exists():
        return folder.absolute()  # the hub's cache links to files with no suffix
    if folder.exists():
        raise _pickle(folder) if any(map(folder.match, _PICKLES)) else _not_weights(folder)
    if not (named := _HUB_ID.fullmatch(path)):
        raise CheckpointError(f"{path}: no such folder, and not the name of a model on the hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(named["id"], revision=named["revision"], allow_patterns=list(_WANTED))
        ).resolve()
    except Exception as error:  # the hub's client raises many unrelated classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: no such folder, and the hub's copy cannot be had: {reason}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of `config.json`; empty for a raw state dict.

    Raises CheckpointError for a config that cannot be used, or that is missing without weights.
    """
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder}: is an adapter, not a model; merge it into its base first"
            " (peft: merge_and_unload)"
        )
    if is_raw(folder):
        return {}
    config = _read_json(folder / "config.json")
    if "quantization_config" in config:
        raise CheckpointError(
            f"{folder / 'config.json'}: the weights are quantised and cannot be merged;"
            " take the bfloat16 or float32 checkpoint"
        )
    return config


def is_raw(folder: Path) -> bool:
    """Whether it is a state dict only: weight files, and nothing that says what model they are.

    A folder with a tokenizer or a generation config is a checkpoint that has lost its config.
    """
    if folder.is_file():
        return True
    described = any(not path.name.endswith(".index.json") for path in folder.glob("*.json"))
    return not described and bool(weight_files(folder))


def open_weights(folder: Path) -> dict[str, Any]:
    """The open safetensors file that holds each tensor, by tensor name.

    Files are memory-mapped: the pages are shared with every process that maps them.
    Raises PickleRefused for a pickle checkpoint, CheckpointError for a broken one.
    """
    if folder.is_file():
        return _keys(folder)
    if (folder / WEIGHTS).exists():
        return _keys(folder / WEIGHTS)
    if not (folder / INDEX).exists():
        if is_raw(folder):
            return _loose(weight_files(folder))
        raise _no_weights(folder)
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: has no weight_map of tensors to shards")
    shards = sorted(set(map(str, weight_map.values())))
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise CheckpointError(f"{folder / INDEX}: shard {outside[0]!r} lies outside the folder")
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing:"
            f" {', '.join(missing)}; download the checkpoint again"
        )
    opened = {name: file for shard in shards for name, file in _keys(folder / shard).items()}
    if lost := sorted(set(weight_map) - set(opened)):
        raise CheckpointError(
            f"{folder / INDEX}: {lost[0]} is not in {weight_map[lost[0]]}, where the index puts it"
        )
    return opened


def _loose(files: list[Path]) -> dict[str, Any]:
    """The tensors of all files of a folder that has no index."""
    opened: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    for path in files:
        tensors = _keys(path)
        if twice := sorted(set(tensors) & set(opened)):
            raise CheckpointError(
                f"{path}: {twice[0]} is also in {origin[twice[0]].name}; give one of the files"
            )
        opened |= tensors
        origin |= dict.fromkeys(tensors, path)
    return opened


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint, by name."""
    if folder.is_file():
        return [folder]
    return sorted(folder.glob(f"*{_SAFETENSORS}"))


def _keys(path: Path) -> dict[str, Any]:
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); download or save it again"
        ) from error
    return dict.fromkeys(file.keys(), file)  # type: ignore[no-untyped-call]


def _no_weights(folder: Path) -> CheckpointError:
    if pickles := _pickles(folder):
        return _pickle(pickles[0])
    return CheckpointError(f"{folder}: has neither {WEIGHTS} nor {INDEX}")


def _pickles(folder: Path) -> list[Path]:
    return sorted(path for pattern in _PICKLES for path in folder.glob(pattern))


def _pickle(path: Path) -> PickleRefused:
    return PickleRefused(
        f"{path}: a pickle can run code when it is loaded and is refused. On a machine where you"
        " trust it, convert it: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
    )


def _not_weights(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: is a file; give the folder that holds config.json, or a safetensors file"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a checkpoint needs it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, not {type(document).__name__}")
    return document
