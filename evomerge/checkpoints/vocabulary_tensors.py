"""Which tensors of a checkpoint have a row for every token, as transformers' own model says.

The model is built without memory; no table of names. Reads headers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from evomerge.checkpoints.skeleton import skeleton
from evomerge.checkpoints.weights import Model
from evomerge.errors import CheckpointError


def vocabulary_tensors(checkpoint: Model) -> tuple[str, ...]:
    """Names of the input embedding, the output head and its bias, each tied weight once.

    In all of them the first axis is the token. Raises CheckpointError where transformers does not
    know the architecture, or the checkpoint lacks its input embedding.
    """
    model = skeleton(checkpoint, otherwise="its embedding cannot be found")
    names: list[str] = []
    for position, wanted in enumerate(_rows_of(model)):
        found = {_stored(checkpoint, name, model) for name in _names_of(model, wanted)} - {None}
        stored = {checkpoint.tied_names.get(str(name), str(name)) for name in found}
        if not stored and position == 0:
            raise CheckpointError(
                f"{checkpoint.path}: has no tensor {next(_names_of(model, wanted))}, the input"
                " embedding of its architecture, so its vocabulary cannot be aligned"
            )
        names += sorted(stored)
    return tuple(dict.fromkeys(names))


def embedding_rows(checkpoint: Model) -> int:
    """Rows of the input embedding, rows of padding included."""
    return checkpoint.shape(vocabulary_tensors(checkpoint)[0])[0]


def _rows_of(model: Any) -> Iterator[Tensor]:
    yield model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    if isinstance(head, nn.Module):
        yield from head.parameters(recurse=False)


def _names_of(model: nn.Module, wanted: Tensor) -> Iterator[str]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is wanted:
            yield name


def _stored(checkpoint: Model, name: str, model: Any) -> str | None:
    """A checkpoint of the bare model, without its head's class, lacks that class's prefix."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in checkpoint:
            return candidate
    ending = "." + ".".join(name.split(".")[-2:])
    alike = [stored for stored in checkpoint.names if f".{stored}".endswith(ending)]
    return alike[0] if len(alike) == 1 else None
