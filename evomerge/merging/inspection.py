"""What an export learns of its inputs as they stream by: their digests, and where NaN hides.

Every stored byte is read once for both, and for the merge. Computes no merge and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from evomerge.checkpoints.adapted import Adapted
from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.weights import Weights
from evomerge.errors import CheckpointError, NonFiniteTensor
from evomerge.merging.merge import Merge
from evomerge.merging.recipe import Recipe


class Inspection:
    """The stored tensors behind a merge, looked at one merged tensor at a time."""

    def __init__(self, merge: Merge) -> None:
        self._merge = merge
        self._checkpoints = {stored.path: stored for stored in map(_stored, merge.models.values())}

    def nbytes(self, name: str) -> int:
        """The stored bytes that one merged tensor is computed from."""
        return sum(checkpoint.tensor(own).nbytes for checkpoint, own in self._inputs(name))

    def stored_bytes(self) -> dict[str, int]:
        """The size of all tensors of each checkpoint: all of it is read, for the digest."""
        return {
            path: sum(stored.tensor(name).nbytes for name in stored.names)
            for path, stored in self._checkpoints.items()
        }

    def fetch(self, name: str) -> None:
        """Have what one merged tensor is computed from read from the disk."""
        for checkpoint, own in self._inputs(name):
            checkpoint.fetch(own)

    def look(self, name: str) -> None:
        """Look at what one merged tensor is computed from. Raises NonFiniteTensor."""
        for checkpoint, own in self._inputs(name):
            if not checkpoint.inspect(own).finite:
                raise _non_finite(checkpoint.path, [own])

    def release(self, name: str) -> None:
        """Take what was read for one merged tensor out of memory."""
        for checkpoint, own in self._inputs(name):
            checkpoint.release(own)

    def notes(self, names: Sequence[str]) -> dict[str, dict[str, str]]:
        """The digests learned with these merged tensors, by checkpoint and tensor."""
        found: dict[str, dict[str, str]] = {}
        for name in names:
            for checkpoint, own in self._inputs(name):
                found.setdefault(checkpoint.path, {})[own] = checkpoint.inspect(own).digest
        return found

    def remember(self, notes: Mapping[str, Mapping[str, str]]) -> None:
        """Take over what an earlier export of the same files noted."""
        for path, digests in notes.items():
            self._checkpoints[path].remember(digests)

    def known(self) -> Recipe:
        """The recipe with its models' digests, once what is left of them was looked at.

        Raises NonFiniteTensor, and CheckpointError for a model that is not the recipe's.
        """
        digests = {}
        for path, model in self._merge.models.items():
            scan = model.scan()
            if scan.non_finite:
                raise _non_finite(path, scan.non_finite)
            digests[path] = scan.digest
        for reference in self._merge.recipe.models:
            if reference.digest not in (None, digests[reference.path]):
                raise CheckpointError(
                    f"{reference.path}: not the checkpoint that the recipe was made for: the digest"
                    f" of its contents is {digests[reference.path][:12]}, the recipe has"
                    f" {str(reference.digest)[:12]}; put that checkpoint back"
                )
        return self._merge.recipe.with_digests(digests)

    def _inputs(self, name: str) -> Iterator[tuple[Checkpoint, str]]:
        for model, own in self._merge.inputs(name):
            stored = _stored(model)
            if own in stored:  # an adapter may bring a whole tensor of its own
                yield stored, own


def _stored(model: Weights) -> Checkpoint:
    """The checkpoint on disk that a model's stored tensors lie in."""
    if isinstance(model, Adapted):
        return model.base
    assert isinstance(model, Checkpoint)
    return model


def _non_finite(path: str, tensors: Sequence[str]) -> NonFiniteTensor:
    more = f" ({len(tensors)} such tensors)" if len(tensors) > 1 else ""
    return NonFiniteTensor(
        f"{tensors[0]}: checkpoint {path} holds NaN or infinity there{more}; leave this model out"
    )
