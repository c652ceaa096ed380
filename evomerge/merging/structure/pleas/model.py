"""Two models of one architecture, partially merged and refit, seen as one model.

Which units stay apart is handed in. Runs no model and reads no data: what is known of those comes
from a fit.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from evomerge.checkpoints.seen import Seen
from evomerge.checkpoints.weights import Model
from evomerge.errors import MissingTensor
from evomerge.merging.methods.base import Fitted
from evomerge.merging.methods.gram import unpacked
from evomerge.merging.structure.architectures.families import spec_of
from evomerge.merging.structure.partial.partial import PartialMerge, split
from evomerge.merging.structure.partial.widening import Widening
from evomerge.merging.structure.permutations.linear_layers import Layer
from evomerge.merging.structure.permutations.permutation import Spec, axis_orders, in_place
from evomerge.merging.structure.refit.joint_gram import JointLeastSquares
from evomerge.merging.structure.refit.normal_equations import Equations

_ROLES = {"mlp": "neurons", "kv": "key-value heads"}


def order_key(group: str) -> str:
    """Where an artifact holds the order [n] that brings b's units of a group beside a's."""
    return f"order/{group}"


def similarity_key(group: str) -> str:
    """Where it holds how alike the pairs [n] of a group are."""
    return f"similarity/{group}"


def gram_key(layer: str) -> str:
    """Where it holds the packed ZᵀZ of what a layer is given."""
    return f"gram/{layer}"


def sequential_key(name: str) -> str:
    """Where it holds a tensor as the sequential least squares have left it."""
    return f"sequential/{name}"


class Pair:
    """Two models, a fit of theirs, and what follows from both whatever is merged."""

    def __init__(self, a: Model, b: Model, fitted: Fitted) -> None:
        self.a, self.b, self.fitted = a, b, fitted
        self.shapes = {name: a.shape(name) for name in a.names}
        self.spec: Spec = in_place(spec_of(a.config, self.shapes))
        self.widening = Widening.of(a.config, self.spec)
        self.costs = self.widening.costs(self.spec, self.shapes, float(fitted.facts["length"]))
        orders = {g.name: fitted.tensor(order_key(g.name)).long() for g in self.spec.groups}
        self._orders = axis_orders(self.spec, self.shapes, orders)
        self.layers = {name: Layer(**entry) for name, entry in fitted.facts["layers"].items()}
        self.inputs: Mapping[str, str] = fitted.facts["inputs"]

    def similarity(self, group: str, size: int) -> Tensor:
        """How alike the pairs [n] of a group are; alike where nothing was compared."""
        key = similarity_key(group)
        return self.fitted.tensor(key) if key in self.fitted else torch.zeros(size)

    def gram(self, layer: Layer) -> Tensor:
        """ZᵀZ / n [2d + 1, 2d + 1] float64 of what a layer is given."""
        size = 2 * self.shapes[layer.weight][layer.in_axis] + 1
        return unpacked(self.fitted.tensor(gram_key(self.inputs[layer.weight])), size)

    def of_a(self, name: str) -> Tensor:
        """A stored tensor of a."""
        return self.a.tensor(name)

    def of_b(self, name: str) -> Tensor:
        """A stored tensor of b, its units in a's order."""
        tensor = self.b.tensor(name)
        for axis in range(tensor.ndim):
            if (order := self._orders.get((name, axis))) is not None:
                tensor = tensor.index_select(axis, order)
        return tensor


def pair_of(a: Model, b: Model, fitted: Fitted) -> Pair:
    """One for all recipes of a search."""
    return _pair_of(a, b, fitted)  # type: ignore[arg-type]  # by their identity


@lru_cache(maxsize=2)
def _pair_of(a: Model, b: Model, fitted: Fitted) -> Pair:
    return Pair(a, b, fitted)


@dataclass(frozen=True)
class Refitting:
    """How layers are refit: not at all, as the fit has refit them one after another, or each on its
    own with this `ridge`; and so much of the way there (`blend`, 0 to 1). `weights` (w, v) of a and
    b sum to 1."""

    form: Literal["parallel", "sequential", "none"] = "parallel"
    ridge: float = 1e-2
    blend: float = 1.0
    weights: tuple[float, float] = (0.5, 0.5)


class PleasModel(Seen):
    """The merged model; config, names and shapes are what transformers loads.

    `apart` says how many units of each group stay apart, of each model.
    """

    def __init__(self, pair: Pair, apart: Mapping[str, int], refitting: Refitting) -> None:
        super().__init__(pair.a)
        self.apart = dict(apart)
        self._pair, self._refitting = pair, refitting
        splits = {
            group.name: split(pair.similarity(group.name, group.size), apart.get(group.name, 0))
            for group in pair.widening.groups
        }
        weights = refitting.weights
        self.merge = PartialMerge(pair.spec, pair.layers, pair.shapes, splits, weights=weights)
        self._squares = JointLeastSquares(self.merge, refitting.ridge)
        self._filled = pair.widening.filled(apart)
        self._of_bias = {
            layer.bias: layer for layer in pair.layers.values() if layer.bias is not None
        }
        self._groups: dict[str, tuple[str, ...]] = {}
        for group in pair.widening.groups:
            for bind in group.binds:
                for name in bind.params:
                    self._groups[name] = (*self._groups.get(name, ()), group.name)
        self._last: tuple[str, Tensor, Tensor | None] | None = None
        self._config = pair.widening.widened(apart)

    @property
    def path(self) -> str:
        return f"{self._pair.a.path} with {self._pair.b.path}"

    @property
    def config(self) -> dict[str, Any]:
        """That of the result."""
        return self._config

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, filled up. Raises MissingTensor."""
        if name not in self:
            raise MissingTensor(f"{name}: not a tensor of {self.path}")
        shape = self.merge.shape(name)
        return tuple(self._filled.get((name, axis), size) for axis, size in enumerate(shape))

    def equations(self, layer: Layer) -> tuple[Equations, Tensor]:
        """What a layer must solve, and where it starts."""
        return self._squares.equations(
            layer, self._pair.gram(layer), self._pair.of_a, self._pair.of_b
        )

    def tensor(self, name: str) -> Tensor:
        """A tensor of the merged model; read only. Raises MissingTensor."""
        return filled(self.unfilled(name), self.shape(name))

    @property
    def structure(self) -> str:
        """The units that stay apart, of each model, by layer; the cost as published, and with the
        zeros that transformers multiplies as well."""
        groups, costs = self._pair.widening.groups, self._pair.costs
        said = []
        for role in dict.fromkeys(group.role for group in groups):
            of = [group for group in groups if group.role == role]
            counts = ", ".join(str(self.apart.get(group.name, 0)) for group in of)
            said.append(f"{counts} of {of[0].size} {_ROLES[role]}")
        widths = self._pair.widening.units(self.apart)
        filled_up = {group.name: widths[group.role] - group.size for group in groups}
        return (
            f"apart in each layer: {'; '.join(said)}. Cost of {costs.relative(self.apart):.3g}"
            f" models, {costs.dense(filled_up):.3g} as transformers multiplies it"
        )

    def fingerprint(self, name: str) -> Hashable:
        """The models, what stays apart of the groups that a tensor has, or the layer that it is
        refit with, and how it is refit."""
        groups = self._groups.get(name, ())
        if (layer := self._of_bias.get(name)) is not None:
            groups += self._groups.get(layer.weight, ())
        if self._refitting.form == "sequential":  # a layer depends on all before it
            groups = tuple(self.apart)
        apart = tuple(self.apart.get(group, 0) for group in groups)
        models = self._pair.a.path, self._pair.b.path
        return models, apart, self.shape(name), self._refitting

    def unfilled(self, name: str) -> Tensor:
        """A tensor without the zeros that fill it up. Raises MissingTensor."""
        pair, form = self._pair, self._refitting.form
        layer = pair.layers.get(name) or self._of_bias.get(name)
        if form == "sequential" and sequential_key(name) in pair.fitted:
            return self._blended(name, pair.fitted.tensor(sequential_key(name)))
        if form != "parallel" or layer is None or layer.weight not in pair.inputs:
            return self._averaged(name)
        if self._last is None or self._last[0] != layer.weight:
            solved = self._squares.solved(layer, pair.gram(layer), pair.of_a, pair.of_b)
            self._last = (layer.weight, *solved)
        _, weight, bias = self._last
        values = weight if name == layer.weight else bias
        assert values is not None
        return self._blended(name, values)

    def _averaged(self, name: str) -> Tensor:
        return self.merge.tensor(name, self._pair.of_a(name), self._pair.of_b(name))

    def _blended(self, name: str, refit: Tensor) -> Tensor:
        blend = self._refitting.blend
        return refit if blend == 1 else self._averaged(name).lerp(refit, blend)


def filled(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor with zeros behind it on every axis, up to a shape."""
    missing = [after - now for after, now in zip(shape, values.shape, strict=True)]
    if not any(missing):
        return values
    return pad(values, [each for room in reversed(missing) for each in (0, room)])
