"""Sens-Merging: how much each source counts in each layer, from sensitivities and logits.

What was measured is `evomerge.merging.fitted.sensitivity`; this turns it into weights, and leaves
the merge to another method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from evomerge.merging.kernels.program import Program
from evomerge.merging.layout import layer_of, tensor_type
from evomerge.merging.methods.base import Block, Blocks, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.dare_linear import DareLinear
from evomerge.merging.methods.dare_ties import DareTies
from evomerge.merging.methods.task_arithmetic import TaskArithmetic
from evomerge.merging.methods.ties import Ties

BASE_METHODS: Mapping[str, MergeMethod] = MappingProxyType(
    {method.name: method for method in (TaskArithmetic(), Ties(), DareLinear(), DareTies())}
)
"""What the weights can be handed to."""


def layer_name(tensor: str) -> str:
    """The layer that a tensor is counted to: its block, or outside the blocks its type."""
    layer = layer_of(tensor)
    return tensor_type(tensor) if layer is None else f"layer {layer}"


def layer_shares(sensitivities: Tensor) -> Tensor:
    """αᵢˡ = Sᵢˡ / ‖Sᵢ‖₂ over the layers; 1/L where a source has no sensitivity at all.

    Shapes: sensitivities [s, l] float64; returns [s, l].
    """
    norms = sensitivities.norm(dim=1, keepdim=True)
    alpha = sensitivities / torch.where(norms > 0, norms, 1.0)
    return torch.where(norms > 0, alpha, 1 / sensitivities.shape[1])


def alignments(distances: Tensor, rule: str) -> Tensor:
    """τᵢ = dᵢ / Σd with dᵢ = Σⱼ gᵢⱼ (distance), or 1/dᵢ in place of dᵢ (similarity).

    Where no source differs from another, 1/s. A source that differs from none while others do has
    all of the similarity. Shapes: distances [s, s] float64; returns [s], of sum 1.
    """
    merit = distances.sum(1)
    if rule == "similarity":
        merit = (merit == 0).double() if bool((merit == 0).any()) else 1 / merit
    total = merit.sum()
    return merit / total if total > 0 else torch.full_like(merit, 1 / len(merit))


def balanced_softmax(arguments: Sequence[float], temperature: float) -> list[float]:
    """K·softmax(x/T): exactly 1 each where all x/T are equal, as they are for T → ∞."""
    highest = max(arguments)
    powers = [math.exp((x - highest) / temperature) for x in arguments]
    mean = sum(powers) / len(powers)
    return [power / mean for power in powers]


@dataclass(frozen=True)
class _Prepared:
    """The method that merges, what it is told, and what it has found out."""

    method: MergeMethod
    coefficients: Coefficients
    inner: Any


class SensMerging(MergeMethod):
    """A task-vector method, the weights of its sources set layer by layer.

        αᵢˡ = Sᵢˡ/‖Sᵢ‖₂      τᵢ = Σⱼgᵢⱼ / Σᵢⱼgᵢⱼ      σᵢˡ = softmaxᵢ(αᵢˡ·τᵢ/T)
        weight of source i in layer l = K·σᵢˡ

    S: sensitivities, g: distances of logits, K: number of sources. `lambda` and `density` are the
    base method's own; its other parameters have their defaults. For T → ∞ every weight is 1, bit
    for bit. A tensor of a layer that was not measured has weights of 1.

    Source: Liu et al. 2025, arXiv:2502.12420, as far as it is known from a review and a third
    party's code; docs/methods/sens_merging.md says what is reconstructed.
    """

    name = "sens_merging"
    summary = "weights sources by layer, by sensitivity and by how far their logits lie apart"
    formula = "θˡ = θ₀ˡ + λ·Σᵢ K·σᵢˡ·τᵢˡ,  σᵢˡ = softmaxᵢ(αᵢˡ·τᵢ/T)"
    parameters = (
        Parameter("density", "source", "float", 1.0, "that of the base method", low=0.0, high=1.0),
        Parameter("temperature", "recipe", "float", 1.0, "T of the softmax", low=1e-6),
        Parameter("lambda", "recipe", "float", 1.0, "that of the base method"),
        Parameter(
            "base_method",
            "recipe",
            "choice",
            "task_arithmetic",
            "what merges with these weights; density is for all but task_arithmetic",
            choices=tuple(BASE_METHODS),
        ),
        Parameter(
            "sensitivity",
            "recipe",
            "choice",
            "elementwise",
            "S of a layer: the sum of |θ·g| over elements, or of |Σ θ·g| over tensors (inner)",
            choices=("elementwise", "inner"),
        ),
        Parameter(
            "alignment",
            "recipe",
            "choice",
            "distance",
            "whether a source counts more the farther its logits lie from the others' on their "
            "data (distance), or the nearer (similarity)",
            choices=("distance", "similarity"),
        ),
    )
    artifact = "sensitivity"

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> _Prepared:
        method = BASE_METHODS[coefficients.choice("base_method")]
        told = _delegated(method, coefficients)
        return _Prepared(method, told, method.prepare(blocks, told, None))

    def program(self, coefficients: Coefficients, prepared: _Prepared) -> Program | None:
        return prepared.method.program(prepared.coefficients, prepared.inner)

    def merge(self, block: Block, coefficients: Coefficients, prepared: _Prepared) -> Tensor:
        return prepared.method.merge(block, prepared.coefficients, prepared.inner)


def layer_weights(coefficients: Coefficients) -> list[float]:
    """K·σᵢˡ of every source [s] for one tensor."""
    fitted = coefficients.fitted
    assert fitted is not None
    layers, layer = fitted.facts["layers"], layer_name(coefficients.tensor)
    if layer not in layers:
        return [1.0] * len(coefficients.names)
    alpha = layer_shares(fitted.tensor(coefficients.choice("sensitivity")))
    tau = alignments(fitted.tensor("distances"), coefficients.choice("alignment"))
    arguments: list[float] = (alpha[:, layers.index(layer)] * tau).tolist()
    by_name = dict(zip(fitted.facts["sources"], arguments, strict=True))
    return balanced_softmax(
        [by_name[name] for name in coefficients.names], coefficients.number("temperature")
    )


def _delegated(method: MergeMethod, coefficients: Coefficients) -> Coefficients:
    defaults = {p.name: p.default for p in method.parameters if p.scope == "recipe"}
    source = {"weight": tuple(layer_weights(coefficients))}
    if any(parameter.name == "density" for parameter in method.parameters):
        source["density"] = coefficients.floats("density")
    recipe = {**defaults, "lambda": coefficients.number("lambda")}
    return replace(coefficients, source=source, recipe=recipe)
