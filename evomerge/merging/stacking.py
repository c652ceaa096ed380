"""A model of another depth, made of runs of layers: how slices see the models of a recipe.

A layer is the first number in a tensor's name. Knows no merge method and computes nothing.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.weights import Weights
from evomerge.errors import MergeError, MissingTensor
from evomerge.merging.layout import layer_of, tensor_type
from evomerge.merging.parts import slice_length

_LAYER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")

Slices = Sequence[Mapping[str, tuple[int, int]]]


class Restacked:
    """A model's share of a stack: the tensors that it has a part in, by their names in the stack.

    `layers` maps layers of the stack to its own. It has the tensors below the layers (embeddings)
    if it is part of the first slice, those above them if it is part of the last.
    """

    def __init__(self, model: Weights, name: str, slices: Slices) -> None:
        self.path = model.path
        self.folder = model.folder
        self.config = model.config
        self._model = model
        self._layers = dict(_layers(name, slices))
        self.companion = model.companion
        self._below, self._above = name in slices[0], name in slices[-1]
        depth = _depth(model)
        beyond = [layer for layer in self._layers.values() if layer >= depth]
        if beyond:
            raise MergeError(
                f"{model.path}: has {depth} layers, the recipe's slices ask for layer {beyond[0]}"
            )

    def origin(self, name: str) -> tuple[Weights, str]:
        """The model, and its own name of a tensor of the stack. Raises MissingTensor."""
        layer = layer_of(name)
        if layer is None:
            below = tensor_type(name) == "embedding"
            if name in self._model and (self._below if below else self._above):
                return self._model, name
        elif layer in self._layers:
            own = _LAYER.sub(str(self._layers[layer]), name, count=1)
            if own in self._model:
                return self._model, own
        raise MissingTensor(f"{name}: {self.path} has no part in it")

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._names()))

    @cached_property
    def tied_names(self) -> Mapping[str, str]:
        return self._model.tied_names if self._below and self._above else {}

    @property
    def non_float_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if not self.dtype(name).is_floating_point)

    def __contains__(self, name: object) -> bool:
        return name in self.names or name in self.tied_names

    def tensor(self, name: str) -> Tensor:
        """Read only. Raises MissingTensor."""
        model, own = self.origin(name)
        return model.tensor(own)

    def shape(self, name: str) -> tuple[int, ...]:
        model, own = self.origin(name)
        return model.shape(own)

    def dtype(self, name: str) -> torch.dtype:
        model, own = self.origin(name)
        return model.dtype(own)

    def _names(self) -> Iterator[str]:
        spots: dict[int, list[int]] = {}
        for spot, own in self._layers.items():
            spots.setdefault(own, []).append(spot)
        for name in self._model.names:
            layer = layer_of(name)
            if layer is not None:
                for spot in spots.get(layer, ()):
                    yield _LAYER.sub(str(spot), name, count=1)
            elif self._below if tensor_type(name) == "embedding" else self._above:
                yield name


class Stack:
    """The model that slices make: every tensor as the first model that has a part in it holds it.

    `members` are the models by name, in the order of precedence; `donor` lends its config and
    folder. Raises MergeError where the config does not say its number of layers.
    """

    def __init__(self, donor: Weights, members: Mapping[str, Restacked], slices: Slices) -> None:
        self.path = donor.path
        self.folder = donor.folder
        self.companion = donor.companion
        self._members = members
        self.config = _config(donor, members, slices)
        self.names = tuple(sorted({name for member in members.values() for name in member.names}))
        self.tied_names: Mapping[str, str] = {
            alias: name
            for member in members.values()
            for alias, name in member.tied_names.items()
            if alias not in self.names
        }

    @property
    def non_float_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if not self.dtype(name).is_floating_point)

    def __contains__(self, name: object) -> bool:
        return name in self.names or name in self.tied_names

    def tensor(self, name: str) -> Tensor:
        """Read only. Raises MissingTensor."""
        return self._holder(name).tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._holder(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._holder(name).dtype(name)

    def origin(self, name: str) -> tuple[Weights, str]:
        """The model that a tensor is of, and the model's own name of it. Raises MissingTensor."""
        return self._holder(name).origin(name)

    def _holder(self, name: str) -> Restacked:
        for member in self._members.values():
            if name in member:
                return member
        raise MissingTensor(f"{name}: no slice of the recipe has it")


def _layers(name: str, slices: Slices) -> Iterator[tuple[int, int]]:
    start = 0
    for ranges in slices:
        if name in ranges:
            first, end = ranges[name]
            yield from ((start + offset, first + offset) for offset in range(end - first))
        start += slice_length(ranges)


def _depth(model: Weights) -> int:
    """The number of a model's layers. Raises MergeError unless it is one stack of them."""
    stacks = {
        _LAYER.split(name, maxsplit=1)[0] for name in model.names if layer_of(name) is not None
    }
    if len(stacks) != 1:
        raise MergeError(
            f"{model.path}: slices need a model that is one stack of layers, it has"
            f" {', '.join(sorted(stacks)) or 'none'}"
        )
    return 1 + max(layer for name in model.names if (layer := layer_of(name)) is not None)


def _config(donor: Weights, members: Mapping[str, Restacked], slices: Slices) -> dict[str, Any]:
    """The donor's config for the new number of layers, its lists of one entry a layer included."""
    config = copy.deepcopy(donor.config)
    if not config:
        return config
    section = _section(config)
    key = _depth_key(section)
    if key not in section:
        raise MergeError(f"{donor.path}: config.json does not say its number of layers ({key})")
    for entry, value in section.items():
        if isinstance(value, list) and len(value) == section[key] and "layer" in entry:
            section[entry] = list(_by_layer(entry, members, slices))
    section[key] = sum(map(slice_length, slices))
    return config


def _section(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that is about the language model."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _depth_key(section: Mapping[str, Any]) -> str:
    """What the architecture calls its number of layers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = "num_hidden_layers"
    if section.get("model_type") not in CONFIG_MAPPING:
        return known
    return str(CONFIG_MAPPING[section["model_type"]].attribute_map.get(known, known))


def _by_layer(entry: str, members: Mapping[str, Restacked], slices: Slices) -> Iterator[Any]:
    """The entries of a per-layer list of the config, each from the first model of its slice."""
    for ranges in slices:
        name = next(member for member in members if member in ranges)
        first, end = ranges[name]
        yield from _section(members[name].config)[entry][first:end]
