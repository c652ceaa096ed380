"""The mixture-of-experts layers of a checkpoint, as their tensors are stored: one set per expert.

Found from names, shapes and config, so that no architecture is named here. Reads no weight, and
knows nothing of how experts are compared or merged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.checkpoints.weights import Weights
from evomerge.errors import MergeError

_EXPERT = re.compile(
    r"(?P<layer>.+)\.experts\.(?P<label>(?:expert_)?)(?P<number>\d+)\.(?P<role>.+)"
)
_OUTWARD = re.compile(r"\b(?:down_proj|w2|wo|fc2|c_proj|dense_4h_to_h)\b")
_ROUTER = re.compile(r"\.(?:gate|router)\b")


@dataclass(frozen=True)
class ExpertLayer:
    """One layer of E experts.

    `prefix` is what its tensors' names begin with. `neuron_axes` holds, for each tensor that every
    expert has (`role`, such as `up_proj.weight`), the axis that runs over the expert's neurons;
    None for one that has none. `router` are the stored tensors with a row for each expert, the
    weight [E, d] first.
    """

    prefix: str
    experts: int
    neuron_axes: Mapping[str, int | None]
    router: tuple[str, ...]
    label: str = ""

    def name(self, expert: int, role: str) -> str:
        """Stored name of an expert's tensor."""
        return f"{self.prefix}.experts.{self.label}{expert}.{role}"

    @property
    def in_decoder(self) -> bool:
        """Whether its name says that it is a decoder's."""
        return f".{self.prefix}".startswith((".decoder.", ".model.decoder."))

    @property
    def router_bias(self) -> str | None:
        """Stored name of what the router adds to its logits [E]; None where it adds nothing."""
        name = self.router[0].removesuffix("weight") + "bias"
        return name if name in self.router else None

    @property
    def roles(self) -> tuple[str, ...]:
        """The tensors that every expert has."""
        return tuple(self.neuron_axes)


def expert_layers(model: Weights) -> tuple[ExpertLayer, ...]:
    """The layers of a model that have experts, in order of depth, an encoder's before a decoder's.

    Shared experts are none of them. Raises MergeError for a dense model, for experts that are
    stored as one tensor, and for a layer whose experts differ or whose router is not found.
    """
    found: dict[str, dict[int, dict[str, str]]] = {}
    labels: dict[str, str] = {}
    for name in model.names:
        if match := _EXPERT.fullmatch(name):
            layer = found.setdefault(match["layer"], {})
            layer.setdefault(int(match["number"]), {})[match["role"]] = name
            labels[match["layer"]] = match["label"]
    if not found:
        raise _none_found(model)
    layers = [
        _layer(model, prefix, found[prefix], labels[prefix])
        for prefix in sorted(found, key=_natural)
    ]
    return tuple(sorted(layers, key=lambda layer: layer.in_decoder))


def expert_count_keys(config: Mapping[str, Any], experts: int) -> tuple[str, ...]:
    """The settings of a config that say how many routed experts a layer has.

    Raises MergeError if there is none.
    """
    keys = tuple(
        key
        for key, value in config.items()
        if "expert" in key and type(value) is int and value == experts
        if not re.search(r"per_tok|shared|selected|capacity", key)
    )
    if not keys:
        raise MergeError(f"config.json: no setting says that a layer has {experts} experts")
    return keys


def top_k(config: Mapping[str, Any]) -> int:
    """Experts chosen for each token; 1 where the config says nothing, as of Switch."""
    for key, value in config.items():
        if type(value) is int and re.search(r"experts_per_tok|selected_experts", key):
            return value
    return 1


def _layer(
    model: Weights, prefix: str, experts: Mapping[int, Mapping[str, str]], label: str
) -> ExpertLayer:
    count = len(experts)
    if sorted(experts) != list(range(count)):
        raise MergeError(
            f"{prefix}: {model.path} holds experts {sorted(experts)}, expected 0 to {count - 1}"
        )
    shapes = {role: model.shape(name) for role, name in experts[0].items()}
    for number, names in experts.items():
        if {role: model.shape(name) for role, name in names.items()} != shapes:
            raise MergeError(
                f"{prefix}.experts.{label}{number}: has other tensors or shapes than expert 0;"
                " only experts of one shape can be merged"
            )
    router = _router(model, prefix, count)
    width = model.shape(router[0])[1]
    axes = {role: _neuron_axis(role, shape, width) for role, shape in sorted(shapes.items())}
    return ExpertLayer(prefix, count, axes, router, label)


def _router(model: Weights, prefix: str, experts: int) -> tuple[str, ...]:
    """The one [E, d] tensor of the layer beside its experts, and its module's other rows."""
    beside = [n for n in model.names if n.startswith(f"{prefix}.") and ".experts." not in n]
    beside = [n for n in beside if "shared" not in n and model.shape(n)[:1] == (experts,)]
    weights = [n for n in beside if len(model.shape(n)) == 2]
    if len(weights) > 1:
        weights = [n for n in weights if _ROUTER.search(n.removeprefix(prefix))]
    if len(weights) != 1:
        raise MergeError(
            f"{prefix}: no tensor of {model.path} can be told to be its router, one row for each"
            f" of {experts} experts"
        )
    module = weights[0].rpartition(".")[0]
    return weights[0], *(n for n in beside if n.startswith(f"{module}.") and n != weights[0])


def _neuron_axis(role: str, shape: tuple[int, ...], width: int) -> int | None:
    """The axis that is not the residual stream's; where both are as long, the name tells."""
    outward = _OUTWARD.search(role) is not None
    if len(shape) == 1:
        return None if outward else 0
    if shape[0] == shape[1]:
        return int(outward)
    return int(shape[0] == width)


def _none_found(model: Weights) -> MergeError:
    counts = [k for k in model.config if "expert" in k and not re.search("per_tok|shared", k)]
    stacked = [n for n in model.names if re.search(r"\.experts\.|block_sparse_moe\.", n)]
    if stacked and counts:
        return MergeError(
            f"{model.path}: its experts are stored as one tensor ({stacked[0]}); only checkpoints"
            " that name each expert (experts.0, experts.1, ...) can be merged"
        )
    return MergeError(f"{model.path}: is a dense model, it has no experts to merge")


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
