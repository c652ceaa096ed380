"""A merged network on disk: a state dict in safetensors, and what it takes to make room for it.

Any network of torch modules: whoever loads it brings the architecture, as it was before the merge.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from evomerge.errors import CheckpointError, ExportError, MergeError
from evomerge.merging.structure.networks.merge import MergedNetwork
from evomerge.merging.structure.networks.resizing import resized

WEIGHTS, CONFIG = "model.safetensors", "pleas.json"
_FORMAT = 1


def save_network(merged: MergedNetwork, folder: Path | str, **made_of: Any) -> None:
    """Write the weights, and as JSON the shape of every tensor, the report, and `made_of`, whatever
    is to be known of where it came from. Raises ExportError where there is one already."""
    folder = Path(folder)
    for name in (WEIGHTS, CONFIG):
        if (folder / name).exists():
            raise ExportError(f"{folder / name} exists; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state = merged.network.state_dict()
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}
        save_file(tensors, folder / WEIGHTS)
        document = {
            "format": _FORMAT,
            "made_of": made_of,
            "report": asdict(merged.report),
            "shapes": {name: list(tensor.shape) for name, tensor in state.items()},
        }
        (folder / CONFIG).write_text(json.dumps(document, indent=1), encoding="utf-8")
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written: {error}") from error


def load_network(folder: Path | str, skeleton: nn.Module) -> nn.Module:
    """The merged network, in eval mode: a copy of `skeleton`, a network of the architecture that
    was merged, whatever its weights, with its modules widened.

    Raises CheckpointError for a folder without a saved network, or one of another architecture.
    """
    folder = Path(folder)
    try:
        document = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if document["format"] != _FORMAT:
            raise CheckpointError(f"{folder / CONFIG}: format {document['format']} is that of a"
                                  " newer evomerge")  # fmt: skip
        shapes = {name: tuple(shape) for name, shape in document["shapes"].items()}
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: no network saved by PLeaS: {error}") from error
    if odd := next(iter(sorted({*skeleton.state_dict()} - {*shapes})), None):
        raise CheckpointError(f"{folder}: has no {odd}; it was saved of another architecture")
    try:
        made = resized(skeleton, shapes)
    except MergeError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    made.load_state_dict(tensors)
    return made.eval()
