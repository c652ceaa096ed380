"""How two models differ: what their files say, then their tensors by type and layer.

A model is a checkpoint, or a recipe bound to its checkpoints: then every tensor is merged when its
turn comes and nothing is written. Knows nothing of how a difference is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from evomerge.checkpoints.checkpoint import Progress, companions, settled
from evomerge.checkpoints.compare import token_ids
from evomerge.checkpoints.distance import Distance, Interference, distance, interference
from evomerge.checkpoints.weights import Weights
from evomerge.errors import CandidateError, CheckpointError, MergeError
from evomerge.merging.layout import TENSOR_TYPES, Place, TensorType, layout
from evomerge.merging.merge import Merge
from evomerge.threads import one_thread

Model: TypeAlias = Weights | Merge
_T = TypeVar("_T")
Pairs: TypeAlias = Mapping[str, tuple[_T, _T]]
"""What differs, by name: A's and B's."""


class Absent:
    """What a config has at a key that it lacks: None is a value."""


ABSENT = Absent()


@dataclass(frozen=True)
class Statements:
    """What the files of two models say that differs; no tensor was read for it.

    `config` has dotted keys. `files` are companions (tokenizer, chat template, generation config):
    only in A, only in B, or different. Tokens are compared where both models have a tokenizer. Of a
    raw state dict only the tensors are compared.
    """

    config: Pairs[Any]
    files: Mapping[str, str]
    tokens_only_a: tuple[str, ...]
    tokens_only_b: tuple[str, ...]
    token_ids: Pairs[int]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: Pairs[tuple[int, ...]]
    dtypes: Pairs[str]

    def __bool__(self) -> bool:
        return any(vars(self).values())


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that both models have in one shape; `interference` is None without a base."""

    place: Place
    distance: Distance
    interference: Interference | None


@dataclass(frozen=True)
class Group:
    """Tensors taken together: of one type (None: all) and one layer (None: outside, or all)."""

    type: TensorType | None
    layer: int | None
    tensors: int
    distance: Distance
    interference: Interference | None


@dataclass(frozen=True)
class Difference:
    """How B differs from A. `tensors` are in the order of their names."""

    statements: Statements
    tensors: tuple[TensorDifference, ...]

    @property
    def changed(self) -> tuple[TensorDifference, ...]:
        """The tensors of which some bit differs."""
        return tuple(tensor for tensor in self.tensors if tensor.distance.changed)

    @property
    def identical(self) -> bool:
        """Whether nothing differs: the same model, however its files are cut."""
        return not self.statements and not self.changed

    def by_type_and_layer(self) -> list[Group]:
        """Groups of tensors, those outside the layers first, then layer by layer."""
        cells: dict[tuple[int, TensorType], list[TensorDifference]] = {}
        for tensor in self.tensors:
            layer = -1 if tensor.place.layer is None else tensor.place.layer
            cells.setdefault((layer, tensor.place.type), []).append(tensor)
        order = sorted(cells, key=lambda cell: (cell[0], TENSOR_TYPES.index(cell[1])))
        return [
            _group(kind, None if layer < 0 else layer, cells[layer, kind]) for layer, kind in order
        ]

    def by_type(self) -> list[Group]:
        """A group for each tensor type."""
        members = {k: [t for t in self.tensors if t.place.type == k] for k in TENSOR_TYPES}
        return [_group(kind, None, found) for kind, found in members.items() if found]

    def total(self) -> Group:
        """All tensors in one group."""
        return _group(None, None, self.tensors)

    def most_different(self, count: int) -> list[TensorDifference]:
        """The changed tensors of largest |B - A| / |A|; those where A is zero first."""

        def size(tensor: TensorDifference) -> float:
            norm = tensor.distance.relative_norm
            return float("inf") if norm is None else norm

        return sorted(self.changed, key=size, reverse=True)[:count]

    def non_finite(self) -> list[TensorDifference]:
        """The tensors that hold NaN or infinity in A or B."""
        return [t for t in self.tensors if t.distance.non_finite_a or t.distance.non_finite_b]


def difference(
    a: Model, b: Model, *, base: Weights | None = None, progress: Progress | None = None
) -> Difference:
    """Compare two models, tensor by tensor; with a base their task vectors, too.

    Memory holds one merged tensor of a recipe and no tensor of a checkpoint. Raises MergeError for
    NaN or an overflow in a merged tensor; CheckpointError for a base that shares no tensor.
    """
    shared = [n for n in _common(files_of(a), files_of(b)) if _shape(a, n) == _shape(b, n)]
    if base is not None and shared and not any(_fits(base, a, n) for n in shared):
        raise CheckpointError(
            f"{base.path}: no tensor of this base has the name and shape of one of the models;"
            " take the model that they were fine-tuned from"
        )
    places = layout(shared)
    total = sum(files_of(a).tensor(name).numel() for name in shared) or 1
    done, found = 0, []
    with one_thread():  # blocks are small: threads that wait for each other cost more
        for name in shared:
            origin = base.tensor(name) if base is not None and _fits(base, a, name) else None
            found.append(_compared(places[name], _tensor(a, name), _tensor(b, name), origin))
            done += found[-1].distance.entries
            if progress is not None:
                progress(done / total)
    return Difference(statements(a, b), tuple(found))


def statements(a: Model, b: Model) -> Statements:
    """What the files of two models say that differs."""
    first, second = files_of(a), files_of(b)
    common = _common(first, second)
    shapes = {name: (_shape(a, name), _shape(b, name)) for name in common}
    dtypes = {name: (_dtype(a, name), _dtype(b, name)) for name in common}
    raw = not a.config or not b.config
    ours, theirs = ({}, {}) if raw else (_token_ids(a), _token_ids(b))
    if not ours or not theirs:
        ours = theirs = {}
    return Statements(
        config={} if raw else _differing(a.config, b.config),
        files={} if raw else dict(_companions(first, second)),
        tokens_only_a=tuple(sorted(ours.keys() - theirs.keys(), key=ours.__getitem__)),
        tokens_only_b=tuple(sorted(theirs.keys() - ours.keys(), key=theirs.__getitem__)),
        token_ids={t: (at, theirs[t]) for t, at in ours.items() if theirs.get(t, at) != at},
        only_a=tuple(name for name in first.names if name not in second),
        only_b=tuple(name for name in second.names if name not in first),
        shapes={name: pair for name, pair in shapes.items() if pair[0] != pair[1]},
        dtypes={name: pair for name, pair in dtypes.items() if pair[0] != pair[1]},
    )


def _token_ids(model: Model) -> Mapping[str, int]:
    return model.token_ids if isinstance(model, Merge) else token_ids(model)


def files_of(model: Model) -> Weights:
    """The model whose names, shapes, config and tokenizer a model has."""
    return model.anchor if isinstance(model, Merge) else model


def _group(
    kind: TensorType | None, layer: int | None, members: Sequence[TensorDifference]
) -> Group:
    known = [t.interference for t in members if t.interference is not None]
    distances = sum((t.distance for t in members), Distance())
    shared = sum(known, Interference()) if known else None
    return Group(kind, layer, len(members), distances, shared)


def _compared(place: Place, a: Tensor, b: Tensor, base: Tensor | None) -> TensorDifference:
    shared = None if base is None else interference(base, a, b)
    return TensorDifference(place, distance(a, b), shared)


def _common(a: Weights, b: Weights) -> list[str]:
    """Names that both models have. A weight that only one of them ties is compared by both names;
    a pair that both tie, once, whichever of its two names each stores it under.
    """
    ours = [name for name in a.names if name in b]
    theirs = [
        name
        for name in b.names
        if name in a.tied_names and b.tied_names.get(a.tied_names[name]) != name
    ]
    return sorted(ours + theirs)


def _fits(base: Weights, model: Model, name: str) -> bool:
    return name in base and base.shape(name) == _shape(model, name)


def _shape(model: Model, name: str) -> tuple[int, ...]:
    return files_of(model).shape(name)


def _dtype(model: Model, name: str) -> str:
    return str(model.dtype(_canonical(model, name))).removeprefix("torch.")


def _tensor(model: Model, name: str) -> Tensor:
    try:
        return model.tensor(_canonical(model, name))
    except CandidateError as error:
        raise MergeError(str(error)) from error


def _canonical(model: Model, name: str) -> str:
    return files_of(model).tied_names.get(name, name)


def _companions(a: Weights, b: Weights) -> Iterator[tuple[str, str]]:
    ours, theirs = companions(a.folder), companions(b.folder)
    for name in sorted({*ours, *theirs}):
        if name not in theirs:
            yield name, "only in A"
        elif name not in ours:
            yield name, "only in B"
        elif ours[name] != theirs[name]:
            yield name, "differs"


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Pairs[Any]:
    ours, theirs = flat(settled(a)), flat(settled(b))
    pairs = {k: (ours.get(k, ABSENT), theirs.get(k, ABSENT)) for k in sorted({*ours, *theirs})}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
