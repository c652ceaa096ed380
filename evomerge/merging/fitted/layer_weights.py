"""Weights by source and tensor that an artifact holds, or averages to.

What a search of such weights may start from. Knows no search space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from evomerge.errors import MergeError
from evomerge.merging.fitted.artifact import Artifact
from evomerge.merging.methods.mergers import collapse

Weights = dict[str, dict[str, float]]
"""By source and tensor."""


def layer_weights(artifact: Artifact) -> Weights:
    """The weight of every source in every tensor: of its task vector, or of the model as a whole,
    which is the same where they sum to 1.

    Raises MergeError for a kind of artifact that holds no such weights.
    """
    kind = artifact.provenance.kind
    if kind not in _READ:
        raise MergeError(
            f"{artifact.folder}: {kind!r} holds no weights by source and tensor; these do:"
            f" {', '.join(_READ)}"
        )
    return _READ[kind](artifact)


def _of_dam(artifact: Artifact) -> Weights:
    return collapse(artifact, list(artifact.provenance.sources))


def _of_rows(artifact: Artifact) -> Weights:
    """Of an artifact with a tensor [s] for each tensor of the merge, sources as its facts say."""
    rows = {name: artifact.tensor(name).double().tolist() for name in sorted(artifact.names)}
    sources = artifact.facts["sources"]
    return {s: {name: row[place] for name, row in rows.items()} for place, s in enumerate(sources)}


_READ: Mapping[str, Callable[[Artifact], Weights]] = MappingProxyType(
    {"dam": _of_dam, "adamerging": _of_rows, "learned_soup": _of_rows}
)
