"""Where each tensor of a checkpoint lands in a live model, as transformers itself would load it.

transformers renames, stacks, joins, splits and transposes tensors while it loads them. Its own
rules are run here, on indices instead of weights, so no architecture is named in this package.
Reads no weight and writes none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import MergeError, ShapeMismatch

Shapes = Mapping[str, tuple[int, ...]]
_INT32_MAX = torch.iinfo(torch.int32).max
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Part:
    """Elements of one stored tensor that fill elements of the live tensor `key`.

    Both are walked in the same order: `sizes` with `stored_strides` from `stored_start`, and with
    `live_strides` from `live_start`, in elements of the flat tensors.
    """

    key: str
    sizes: tuple[int, ...]
    stored_start: int
    stored_strides: tuple[int, ...]
    live_start: int
    live_strides: tuple[int, ...]

    @property
    def is_run(self) -> bool:
        """Whether both sides are walked without gaps."""
        return self.stored_strides == self.live_strides == (1,)


@dataclass
class _Group:
    """The stored tensors that are converted together; `collected` holds their names by pattern."""

    first_key: str
    converter: Any = None
    collected: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [name for names in self.collected.values() for name in names]


def places(
    model: torch.nn.Module, stored: Shapes, live: dict[str, Tensor]
) -> dict[str, tuple[Part, ...]]:
    """The parts of `live`, the model's state dict, that each stored tensor fills, by stored name.

    A stored tensor that the model has no place for is left out. Every live tensor that is filled
    at all is filled whole, each element once.

    Raises ShapeMismatch; MergeError where loading would compute with weights or shuffle them,
    instead of moving them in blocks, or fills one live tensor twice.
    """
    found: dict[str, tuple[Part, ...]] = {}
    known: dict[Any, list[list[Part]]] = {}
    shapes = {key: tuple(tensor.shape) for key, tensor in live.items()}
    for group in _groups(model, stored, live):
        if group.converter is None:
            found |= _renamed(group, stored, shapes)
        else:
            found |= _converted(group, model, stored, shapes, known)
    return found


def _groups(model: torch.nn.Module, stored: Shapes, live: dict[str, Tensor]) -> list[_Group]:
    """What transformers' loader collects, in its order (`convert_and_load_state_dict_in_model`)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = getattr(model, "base_model_prefix", "")
    groups: dict[str, _Group] = {}
    for name in sorted(stored, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, live)
        if key not in live and name in live:
            key, pattern = rename_source_key(name, [], [], prefix, live)
        if key not in live:
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        group = groups.setdefault(key, _Group(key, converter))
        group.collected.setdefault(pattern or name, []).append(name)
    return list(groups.values())


def _renamed(group: _Group, stored: Shapes, live: Shapes) -> dict[str, tuple[Part, ...]]:
    key, names = group.first_key, group.names
    if len(names) > 1:
        raise MergeError(f"{names[0]} and {names[1]} both fill {key} of the live model")
    _check_shape(names[0], key, stored[names[0]], live[key])
    size = math.prod(live[key])
    return {names[0]: (Part(key, (size,), 0, (1,), 0, (1,)),)}


def _converted(
    group: _Group, model: torch.nn.Module, stored: Shapes, live: Shapes, known: dict[Any, Any]
) -> dict[str, tuple[Part, ...]]:
    """As `_renamed`. What holds for one layer holds for all of its shapes: `known` keeps it."""
    names = group.names
    meta = {n: torch.empty(stored[n], dtype=torch.int64, device="meta") for n in names}
    outputs = {key: tuple(tensor.shape) for key, tensor in _convert(group, model, meta).items()}
    for key, shape in outputs.items():
        _check_shape(names[0], key, shape, live.get(key, ()))
    patterns = tuple((p, tuple(stored[n] for n in ns)) for p, ns in group.collected.items())
    kind = (id(group.converter), patterns, tuple(outputs.values()))
    keys = list(outputs)
    if kind not in known:
        known[kind] = _traced(group, model, stored, keys)
    return {
        name: tuple(Part(keys[at], *rest) for at, *rest in parts)
        for name, parts in zip(names, known[kind], strict=True)
    }


def _check_shape(name: str, key: str, stored: tuple[int, ...], live: tuple[int, ...]) -> None:
    if stored != live:
        raise ShapeMismatch(
            f"{name}: the checkpoint makes {key} {list(stored)}, the live model is {list(live)}"
        )


def _convert(
    group: _Group, model: torch.nn.Module, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    converter = deepcopy(group.converter)
    for pattern, names in group.collected.items():
        for name in names:
            converter.add_tensor(group.first_key, name, pattern, tensors[name])
    try:
        made = converter.convert(group.first_key, model=model, config=model.config)
    except Exception as error:  # whatever an operation of transformers may raise
        raise MergeError(
            f"{group.names[0]}: transformers cannot convert it to the live model's"
            f" {group.first_key}: {error}"
        ) from error
    return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def _traced(
    group: _Group, model: torch.nn.Module, stored: Shapes, keys: Sequence[str]
) -> list[list[tuple[Any, ...]]]:
    """For each stored tensor of a group, its parts, with the key's place in `keys` for the key.

    Every stored element carries a number through the conversion; where it comes out is its place.
    A number is left out between two tensors, so that no run of numbers crosses from one to the
    other. Memory: what the conversion itself needs, at four bytes per element of the group.
    """
    sizes = [math.prod(stored[name]) for name in group.names]
    starts = [0, *accumulate(size + 1 for size in sizes)]
    dtype = torch.int32 if starts[-1] <= _INT32_MAX else torch.int64
    numbers = {
        name: torch.arange(start, start + size, dtype=dtype).view(stored[name])
        for name, start, size in zip(group.names, starts, sizes, strict=False)
    }
    made = _convert(group, model, numbers)
    runs = torch.cat([_runs(made[key].reshape(-1), at, group) for at, key in enumerate(keys)], 1)
    runs = runs[:, runs[0].argsort()]
    bounds = torch.searchsorted(runs[0].contiguous(), torch.tensor(starts)).tolist()
    if (bounds[0], bounds[-1]) != (0, runs.shape[1]):  # numbers that were never given out
        raise _not_moved(group)
    return [
        list(_parts(runs[:, first:end], start, size, group))
        for (first, end), start, size in zip(pairwise(bounds), starts, sizes, strict=False)
    ]


def _runs(numbers: Tensor, at: int, group: _Group) -> Tensor:
    """Runs of consecutive numbers in a flat tensor: [4, r] of number, place, length and `at`."""
    if numbers.is_floating_point():
        raise _not_moved(group)
    breaks = [torch.zeros(1, dtype=torch.int64)]
    for start in range(0, len(numbers) - 1, _CHUNK):  # whole, the differences would double memory
        piece = numbers[start : start + _CHUNK + 1]
        breaks.append((piece[1:] - piece[:-1] != 1).nonzero().view(-1) + (start + 1))
    places = torch.cat(breaks)
    lengths = torch.diff(places, append=torch.tensor([len(numbers)]))
    return torch.stack([numbers[places].long(), places, lengths, torch.full_like(places, at)])


def _parts(runs: Tensor, start: int, size: int, group: _Group) -> Iterator[tuple[Any, ...]]:
    """The parts of the stored tensor whose elements are numbered from `start`."""
    ends = torch.cat([torch.tensor([start]), runs[0] + runs[2]])
    if not runs.numel() or not torch.equal(ends[:-1], runs[0]) or int(ends[-1]) != start + size:
        raise _not_moved(group)  # an element is lost, or there twice
    for at in torch.unique(runs[3]).tolist():
        number, place, lengths, _ = runs[:, runs[3] == at]
        step = math.gcd(*torch.unique(lengths).tolist())
        walk = torch.stack([_steps(number - start, lengths, step), _steps(place, lengths, step)])
        if (found := _strides(walk)) is None:
            raise _not_moved(group)
        sizes, (stored_strides, live_strides) = found
        first = walk[:, 0].tolist()
        one = (1,)
        yield at, (*sizes, step), first[0], stored_strides + one, first[1], live_strides + one


def _steps(starts: Tensor, lengths: Tensor, step: int) -> Tensor:
    """Where the pieces of `step` elements start, into which runs are cut."""
    counts = lengths // step
    before = counts.cumsum(0) - counts
    index = torch.arange(int(counts.sum())) - before.repeat_interleave(counts)
    return starts.repeat_interleave(counts) + index * step


def _strides(walk: Tensor) -> tuple[tuple[int, ...], list[tuple[int, ...]]] | None:
    """Sizes, and a row of strides for each row of `walk` [k, n]; None if it is not strided."""
    sizes: list[int] = []
    strides: list[list[int]] = []
    while walk.shape[1] > 1:
        step = walk[:, 1:2] - walk[:, :1]
        breaks = (walk[:, 1:] - walk[:, :-1] != step).any(0).nonzero()
        run = int(breaks[0]) + 1 if len(breaks) else walk.shape[1]
        if walk.shape[1] % run:
            return None
        rows = walk.view(len(walk), -1, run)
        if not torch.equal(rows, rows[:, :, :1] + step[:, None] * torch.arange(run)):
            return None
        sizes.insert(0, run)
        strides.insert(0, step.view(-1).tolist())
        walk = rows[:, :, 0]
    by_row = [tuple(column) for column in zip(*strides, strict=True)] or [(), ()]
    return tuple(sizes), by_row


def _not_moved(group: _Group) -> MergeError:
    return MergeError(
        f"{group.names[0]}: loading does more than move blocks of its values to {group.first_key}"
        " of the live model, so they cannot be written in place; export the merge and load that"
    )
