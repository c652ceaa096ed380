"""The tensors of a mixture of dense models, each computed when it is asked for.

Says which tensors there are and what each is made of; decides no router row, runs no model and
writes no file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.checkpoint import is_finite
from evomerge.checkpoints.weights import Weights
from evomerge.errors import MergeError
from evomerge.merging.merge import DTYPES
from evomerge.merging.structure.mixture.architectures import (
    INERT_WIDTH,
    Architecture,
    dense_roles,
    outside,
)
from evomerge.merging.structure.mixture.recipe import MixtureExpert, MixtureRecipe

_OUTWARD = "down_proj.weight"
_ALWAYS = 2.0  # a gate whose row is zero lets half of a shared expert through


class Mixture:
    """The mixture's tensors, under the names it is stored by.

        y = Σ over the top k of pₑ·MLPₑ(x) + σ(g·x)·MLP_shared(x),   p = softmax(R x) over the top k

    R [E, d] are `routers` [l, E, d] by layer, g [1, d] is `shared_gates` [l, 1, d] or, where that
    is None, zero with twice the shared down projection: a shared expert that is always on. Where
    the architecture has a shared expert and the recipe none, it is zero. Attention, norms,
    embeddings and head are the base's, or the experts' mean, summed in float32.

    An expert's matrix is (W + noise_scale·N(0, 1))·residual_scale, the factor on the down
    projection only; noise is keyed by seed, place in the recipe and name. All are rounded once, to
    the recipe's dtype or the base's.
    """

    def __init__(
        self,
        recipe: MixtureRecipe,
        architecture: Architecture,
        config: Mapping[str, Any],
        base: Weights,
        experts: Sequence[Weights],
        shared: Weights | None,
        *,
        routers: Tensor,
        shared_gates: Tensor | None = None,
        zero: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.config = dict(config)
        self._recipe, self._architecture, self._base = recipe, architecture, base
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._make: dict[str, Callable[[], Tensor]] = {}
        donors = [base] if recipe.attention == "base" else experts
        for name in outside(base):
            self._add(name, name, base.shape(name), partial(_mean, name, donors))
        for name, shape in zero.items():
            self._add(name, name.replace(".bias", ".weight"), shape, partial(torch.zeros, shape))
        for layer, roles in dense_roles(base).items():
            self._add_layer(layer, roles, experts, routers[layer])
            if architecture.has_shared:
                gate = None if shared_gates is None else shared_gates[layer]
                self._add_shared(layer, roles, shared, gate)
        self.names = tuple(sorted(self._make))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._dtypes[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor of the mixture; read only. Raises MissingTensor, and MergeError for a value that
        its dtype cannot hold."""
        made = self._make[name]()
        tensor = made.to(self._dtypes[name])
        if made.dtype != tensor.dtype and not is_finite(tensor):
            raise MergeError(f"{name}: is too large for {tensor.dtype}; take dtype: bfloat16")
        return tensor

    def _add(
        self, name: str, like: str, shape: tuple[int, ...], make: Callable[[], Tensor]
    ) -> None:
        """Note a tensor whose dtype is that of the base's tensor `like`."""
        dtype = self._recipe.dtype
        self._dtypes[name] = DTYPES[dtype] if dtype else self._base.dtype(like)
        self._shapes[name], self._make[name] = shape, make

    def _add_layer(
        self, layer: int, roles: Mapping[str, str], experts: Sequence[Weights], router: Tensor
    ) -> None:
        block = f"model.layers.{layer}.{self._architecture.block}"
        for number, (model, expert) in enumerate(zip(experts, self._recipe.experts, strict=True)):
            for role, name in roles.items():
                stored = f"{block}.experts.{number}.{self._architecture.role(role)}"
                make = partial(self._changed, model, name, expert, f"experts.{number}")
                self._add(stored, name, self._base.shape(name), make)
        rows = tuple(router.shape)
        self._add(f"{block}.gate.weight", roles[_OUTWARD], rows, partial(_itself, router))

    def _add_shared(
        self, layer: int, roles: Mapping[str, str], shared: Weights | None, gate: Tensor | None
    ) -> None:
        block = f"model.layers.{layer}.{self._architecture.block}"
        width = self._base.shape(roles[_OUTWARD])[0]
        for role, name in roles.items():
            shape = self._base.shape(name)
            if shared is None:
                shape = (width, INERT_WIDTH) if role == _OUTWARD else (INERT_WIDTH, width)
                make: Callable[[], Tensor] = partial(torch.zeros, shape)
            else:
                factor = _ALWAYS if gate is None else 1.0
                make = partial(self._shared, shared, name, factor)
            self._add(f"{block}.shared_expert.{role}", name, shape, make)
        row = torch.zeros(1, width) if gate is None else gate
        name = f"{block}.shared_expert_gate.weight"
        self._add(name, roles[_OUTWARD], (1, width), partial(_itself, row))

    def _shared(self, model: Weights, name: str, factor: float) -> Tensor:
        expert = self._recipe.shared
        assert expert is not None
        tensor = self._changed(model, name, expert, "shared_experts.0")
        return tensor * factor if name.endswith(_OUTWARD) else tensor

    def _changed(self, model: Weights, name: str, expert: MixtureExpert, key: str) -> Tensor:
        tensor = model.tensor(name)
        scale = expert.residual_scale if name.endswith(_OUTWARD) else 1.0
        if expert.noise_scale:
            tensor = tensor.float() + expert.noise_scale * self._noise(tensor.shape, key, name)
        return tensor if scale == 1.0 else tensor.float() * scale

    def _noise(self, shape: Sequence[int], key: str, name: str) -> Tensor:
        text = f"{self._recipe.seed}\0{key}\0{name}".encode()
        number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
        generator = torch.Generator().manual_seed(number)
        return torch.randn(tuple(shape), generator=generator)


def _mean(name: str, models: Sequence[Weights]) -> Tensor:
    """The mean in float32; of one model, its tensor."""
    if len(models) == 1:
        return models[0].tensor(name)
    total = torch.zeros(models[0].shape(name), dtype=torch.float32)
    for model in models:
        total += model.tensor(name)
    return total / len(models)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
