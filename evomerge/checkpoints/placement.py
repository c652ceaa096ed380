"""Which tensors of a base an adapter changes, and how: modules by name to low-rank updates.

Works from names and shapes alone; reads no tensor's values. A base is anything with `path`,
`names`, `shape` and `in`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evomerge.checkpoints.adapter import Adapter, Factors
from evomerge.checkpoints.checkpoint import Checkpoint, is_finite
from evomerge.errors import CheckpointError, ShapeMismatch

# Projections that models in memory hold as one parameter and checkpoints may hold apart, in order.
_FUSED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


@dataclass(frozen=True)
class LowRank:
    """The update of one tensor: W + scale · B A, its rows then scaled to `magnitude` (DoRA).

    Shapes: a [r, in], b [out, r], magnitude [out]; W is [out, in], or [in, out] if `transposed`
    (embeddings, GPT-2's Conv1D). Fused experts have a leading [e] on W, a and b.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights that it fits."""
        out, into = self.b.shape[-2], self.a.shape[-1]
        return (*self.a.shape[:-2], *((into, out) if self.transposed else (out, into)))

    def onto(self, weight: Tensor) -> Tensor:
        """The updated weight, in float32.

            V = W + s·B A,   DoRA: Vᵢ · mᵢ / ‖Vᵢ‖ for every row i

        Source: Hu et al. 2021, arXiv:2106.09685; Liu et al. 2024, arXiv:2402.09353, eq. 5.
        """
        delta = (self.b.float() @ self.a.float()).mul_(self.scale)
        total = (delta.mT if self.transposed else delta).add(weight.float())
        if self.magnitude is None:
            return total.contiguous()
        rows = total.mT if self.transposed else total
        factor = self.magnitude.float() / torch.linalg.vector_norm(rows, dim=-1)
        scaled = rows * factor.unsqueeze(-1)
        result: Tensor = scaled.mT if self.transposed else scaled
        return result.contiguous()

    def is_finite(self) -> bool:
        """Whether its factors are free of NaN and infinity."""
        parts = (self.a, self.b, self.magnitude)
        return all(is_finite(part) for part in parts if part is not None)


def place(adapter: Adapter, base: Checkpoint) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """The base's tensors that an adapter updates, and those it replaces, by the base's names.

    Raises CheckpointError if the base lacks one, ShapeMismatch if it has another shape.
    """
    names = _Names(base)
    whole = dict(_replacements(adapter, base, names))
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    updates: dict[str, LowRank] = {}
    linear: list[tuple[str, Factors]] = []
    for module, factors in adapter.factors.items():
        name = names.find(f"{module}.weight")
        if name is not None:
            linear.append((name, factors))
        elif adapter.settings.target_parameters:
            updates |= _experts(adapter, factors, base, names)
        else:
            raise _missing(adapter, base, module)
    shapes = {name: base.shape(name) for name, _ in linear} | shapes
    conv1d = _conv1d(adapter, [(shapes[name], factors) for name, factors in linear])
    for name, factors in linear:
        updates[name] = _fitted(adapter, base, factors, name, shapes[name], conv1d)
    return updates, whole


class _Names:
    """Finds a model's tensor in its checkpoint, which may leave out the inner model's prefix, or
    hold that model alone."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base

    def find(self, name: str) -> str | None:
        inner = name.partition(".")[2]
        for candidate in (name, inner):
            if candidate in self._base:
                return candidate
        found = [known for known in self._base.names if known.endswith(f".{name}")]
        return found[0] if len(found) == 1 else None

    def experts(self, module: str) -> dict[str, list[str]]:
        """Tensors of single experts in the layer of `module`, in order, by projection."""
        layer = re.match(r"(.*?\.\d+)\.", module)
        prefix = re.escape(layer[1] if layer else module)
        pattern = re.compile(rf"(?:.+\.)?{prefix}\..*experts\.(\d+)\.(\w+)\.weight")
        found: dict[str, dict[int, str]] = {}
        for name in self._base.names:
            if match := pattern.fullmatch(name):
                found.setdefault(match[2], {})[int(match[1])] = name
        return {projection: [by[i] for i in sorted(by)] for projection, by in found.items()}


def _replacements(
    adapter: Adapter, base: Checkpoint, names: _Names
) -> Iterator[tuple[str, Tensor]]:
    vocabulary = base.config.get("vocab_size")
    for key, tensor in adapter.whole.items():
        name = names.find(key)
        if name is None:
            raise _missing(adapter, base, key)
        shape, theirs = base.shape(name), tuple(tensor.shape)
        resized = len(shape) == 2 and shape[0] == vocabulary and shape[1:] == theirs[1:]
        if shape != theirs and not resized:
            raise ShapeMismatch(
                f"{name}: adapter {adapter.path} replaces it by {list(theirs)}, base {base.path}"
                f" has {list(shape)}; give the base that the adapter was trained on"
            )
        yield name, tensor


def _fitted(
    adapter: Adapter,
    base: Checkpoint,
    factors: Factors,
    name: str,
    shape: tuple[int, ...],
    conv1d: bool,
) -> LowRank:
    update = LowRank(factors.a, factors.b, factors.scale, factors.magnitude, factors.is_embedding)
    turned = replace(update, transposed=True)
    if update.shape == turned.shape == shape and conv1d and not name.endswith("lm_head.weight"):
        return turned
    for candidate in (update, turned):
        if candidate.shape == shape:
            return candidate
    raise ShapeMismatch(
        f"{factors.module}: adapter {adapter.path} fits a weight of {list(update.shape)}, base"
        f" {base.path} has {list(shape)}; give the base that the adapter was trained on"
    )


def _conv1d(adapter: Adapter, linear: list[tuple[tuple[int, ...], Factors]]) -> bool:
    """Whether square weights are stored as [in, out].

    The other weights tell: PEFT writes `fan_in_fan_out` as the last module of a mixed model needed
    it, so the setting counts only where every weight is square.
    """
    fits = {
        shape == (f.b.shape[0], f.a.shape[1])
        for shape, f in linear
        if not f.is_embedding
        and len(shape) == 2
        and shape[0] != shape[1]
        and not f.module.endswith("lm_head")
    }
    return False in fits if fits else adapter.settings.fan_in_fan_out


def _experts(
    adapter: Adapter, factors: Factors, base: Checkpoint, names: _Names
) -> dict[str, LowRank]:
    """Updates of experts' weights, fused in the base's checkpoint or one by one."""
    module = factors.module
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    single = names.experts(module)
    fused = {p: names.find(f"{module}.{p}") for p in _FUSED}
    shapes = {p: base.shape(name) for p, name in fused.items() if name is not None}
    for parameter in dict.fromkeys(
        p.rpartition(".")[2] for p in adapter.settings.target_parameters
    ):
        full = f"{module}.{parameter}"
        rank, scaled = (
            adapter.settings.rank(full),
            replace(factors, scale=adapter.settings.scale(full)),
        )
        name = names.find(full)
        if name is not None and (update := _fused(scaled, rank, base.shape(name), shapes)):
            return {name: update}
        for projections in _FUSED.get(parameter, ()):
            tensors = [single.get(projection, []) for projection in projections]
            if all(tensors) and (found := _apart(scaled, rank, tensors, base)):
                return found
    raise _missing(adapter, base, module)


def _by_expert(factors: Factors, count: int) -> tuple[Tensor, Tensor]:
    """Factors as a [e, r, in] and b [e, out, r]. PEFT keeps A expert by expert, B rank by rank."""
    a, b = factors.a, factors.b
    return a.reshape(count, -1, a.shape[1]), b.reshape(b.shape[0], -1, count).permute(2, 0, 1)


def _fused(
    factors: Factors, rank: int, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> LowRank | None:
    """The update of a tensor that holds all experts; None if the factors do not fit it.

    `shapes` are those of all fused tensors of the module: where the weight itself is square, gate
    and up together are twice as wide as high, or twice as high as wide, and tell which way it lies.
    """
    if len(shape) != 3 or factors.rank != rank * shape[0]:
        return None
    a, b = _by_expert(factors, shape[0])
    straight = LowRank(a, b, factors.scale)
    turned = replace(straight, transposed=True)
    if straight.shape == turned.shape == shape:
        lies = {other[2] > other[1] for other in shapes.values() if other[1] != other[2]}
        return None if len(lies) != 1 else turned if lies.pop() else straight
    return next((update for update in (straight, turned) if update.shape == shape), None)


def _apart(
    factors: Factors, rank: int, tensors: list[list[str]], base: Checkpoint
) -> dict[str, LowRank] | None:
    """The updates of single experts' tensors, those of one expert being stacked in the factors."""
    heights = [base.shape(names[0])[0] for names in tensors]
    count = len(tensors[0])
    if factors.rank != rank * count or sum(heights) != factors.b.shape[0]:
        return None
    a, b = _by_expert(factors, count)
    found = {}
    for expert in range(count):
        for names, rows in zip(tensors, torch.split(b[expert], heights), strict=True):
            update = LowRank(a[expert], rows, factors.scale)
            if base.shape(names[expert]) != update.shape:
                return None
            found[names[expert]] = update
    return found


def _missing(adapter: Adapter, base: Checkpoint, module: str) -> CheckpointError:
    return CheckpointError(
        f"{module}: adapter {adapter.path} changes it, base {base.path} has no such module; give"
        " the base that the adapter was trained on"
    )
