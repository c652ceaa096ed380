"""The merged and compressed model, tensor by tensor, and the file of its compressed matrices.

Replicated and collapsed hold each matrix whole, W = U V + S, so that transformers loads them. The
remapped form has U, V and the rows of S in a file of their own, which `remapped` reads. Trains
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from evomerge.checkpoints.seen import Seen
from evomerge.checkpoints.writer import Entry, in_order, write_file
from evomerge.merging.aside import Aside
from evomerge.merging.structure.experts.compress import CompressedExperts, matrix_names
from evomerge.merging.structure.experts.layers import ExpertLayer
from evomerge.merging.structure.experts.merge import MergedExperts
from evomerge.merging.structure.experts.plan import LayerPlan
from evomerge.merging.structure.experts.settings import ExpertSettings
from evomerge.merging.structure.weight_files import write_text

COMPRESSED_FILE = "compressed.safetensors"
"""U, V and rows of the compressed matrices, by the name of the whole matrix and a part's."""

COMPRESSION_FILE = "evomerge_compression.json"
"""How much of each matrix stayed, how many parameters there are, and the losses of training."""

COMPRESSED_LAYERS = "compressed_layers"
"""In a config: which layers of experts, counted among themselves, are in `COMPRESSED_FILE`."""


class CompressedModel(Seen):
    """What is written in the place of `merged`. Values are rounded once to the stored dtype."""

    def __init__(
        self,
        merged: MergedExperts,
        found: CompressedExperts,
        layers: Sequence[ExpertLayer],
        plans: Sequence[LayerPlan],
        settings: ExpertSettings,
    ) -> None:
        super().__init__(merged)
        self._found = found
        self._in_file = settings.form == "remapped"
        self._layers = [at for at in range(len(layers)) if at not in settings.skip]
        self._matrices = matrix_names(layers, plans, settings.skip)
        if settings.form != "replicated":
            self._matrices = {name: name for name in found.matrices}
        gone = self._matrices.keys() if self._in_file else set()
        self._names = tuple(name for name in merged.names if name not in gone)

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are not in the file of compressed matrices, sorted."""
        return self._names

    @property
    def config(self) -> dict[str, Any]:
        """The config of the model."""
        apart = {COMPRESSED_LAYERS: self._layers} if self._in_file else {}
        return {**self._model.config, **apart}

    def tensor(self, name: str) -> Tensor:
        """A tensor that is not in the file of compressed matrices; read only."""
        if (matrix := self._matrices.get(name)) is not None:
            return self._found.matrices[matrix].dense().to(self.dtype(name))
        if (trained := self._found.trained.get(name)) is not None:
            return trained.to(self.dtype(name))
        return self._model.tensor(name)

    def write_compressed(self, aside: Aside) -> None:
        """The file of compressed matrices, if this form has it, and the file about them."""
        if self._in_file and COMPRESSED_FILE not in aside.finished:
            tensors = self._stored()
            entries = in_order(
                Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
            )
            flat = (tensors[entry.name].reshape(-1) for entry in entries)
            for _ in write_file(aside.folder / COMPRESSED_FILE, entries, flat):
                pass
            aside.finish(COMPRESSED_FILE, None)
        write_text(aside.folder / COMPRESSION_FILE, json.dumps(self._document(), indent=1))

    def _document(self) -> dict[str, Any]:
        matrices = self._found.matrices.values()
        whole = sum(m * n for m, n in (matrix.shape for matrix in matrices))
        return {
            "parameters_before": whole,
            "parameters": sum(matrix.parameters for matrix in matrices),
            "density": sum(matrix.values.numel() for matrix in matrices) / whole,
            "rows": {
                name: [len(matrix.rows), matrix.shape[0]]
                for name, matrix in self._found.matrices.items()
            },
            "losses": list(self._found.curve),
        }

    def _stored(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, matrix in self._found.matrices.items():
            found |= matrix.to(self.dtype(name)).stored(name)
        return found
