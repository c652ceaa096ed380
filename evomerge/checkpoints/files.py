"""Find a checkpoint's files: a local folder or a model on the hub, one weight file or shards.

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

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
# No pattern fits a pickle or Python code, so neither is ever downloaded.
_WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


def find_folder(path: str) -> Path:
    """The folder of a checkpoint, downloaded first if `path` names a model on the hub.

    Raises CheckpointError if there is no such folder and no such model.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise CheckpointError(f"{path}: is a file; give the folder that holds config.json")
    if not _HUB_ID.fullmatch(path):
        raise CheckpointError(f"{path}: no such folder, and not the name of a model on the hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(_WANTED))).resolve()
    except Exception as error:  # the hub's client raises many unrelated classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: no such folder, and the hub's copy cannot be had: {reason}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of `config.json`. Raises CheckpointError for a config that cannot be used."""
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder}: is an adapter, not a model; merge it into its base first"
            " (peft: merge_and_unload)"
        )
    config = _read_json(folder / "config.json")
    if "quantization_config" in config:
        raise CheckpointError(
            f"{folder / 'config.json'}: the weights are quantised and cannot be merged;"
            " take the bfloat16 or float32 checkpoint"
        )
    return config


def open_weights(folder: Path) -> dict[str, Any]:
    """The open safetensors file that holds each tensor, by tensor name.

    Files are memory-mapped: the pages are shared with every process that maps them.
    Raises PickleRefused for a pickle checkpoint, CheckpointError for a broken one.
    """
    if (folder / WEIGHTS).exists():
        return _keys(folder / WEIGHTS)
    if not (folder / INDEX).exists():
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


def _keys(path: Path) -> dict[str, Any]:
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); download or save it again"
        ) from error
    return dict.fromkeys(file.keys(), file)  # type: ignore[no-untyped-call]


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return PickleRefused(
            f"{folder / pickles[0]}: a pickle can run code when it is loaded and is refused. On a"
            " machine where you trust it, convert it: AutoModelForCausalLM.from_pretrained(OLD)"
            ".save_pretrained(NEW)"
        )
    return CheckpointError(f"{folder}: has neither {WEIGHTS} nor {INDEX}")


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
