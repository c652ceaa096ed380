"""The architectures of mixtures: what their configs say, and what an expert's tensors are called.

Which dense models can become one is not listed: the tensors that transformers builds from the
config decide. Reads no weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.checkpoints.skeleton import skeleton
from evomerge.checkpoints.weights import Weights
from evomerge.errors import MergeError
from evomerge.merging.structure.mixture.recipe import MixtureRecipe

INERT_WIDTH = 16
"""Neurons of a shared expert that is there because the architecture has one, and adds nothing."""

_CARRIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "attention_bias",
)
"""Settings of a dense model that its mixture has, under the same name."""


_MATRICES = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


@dataclass(frozen=True)
class Architecture:
    """One of transformers' mixtures. `block` is what the names of a layer's experts and router
    begin with; `gate`, `up` and `down` are what an expert's three matrices are called."""

    model_type: str
    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    has_shared: bool = False

    def role(self, dense: str) -> str:
        """What the `gate_proj.weight` of a dense model is called in an expert."""
        ours = {"gate_proj": self.gate, "up_proj": self.up, "down_proj": self.down}
        module, _, kind = dense.partition(".")
        return f"{ours.get(module, module)}.{kind}"


_MIXTRAL = Architecture("mixtral", "block_sparse_moe", "w1", "w3", "w2")
_QWEN2 = Architecture("qwen2_moe", has_shared=True)
_QWEN3 = Architecture("qwen3_moe")
_KNOWN = {each.model_type: each for each in (_MIXTRAL, _QWEN2, _QWEN3)}
_OF_FAMILY = {"llama": _MIXTRAL, "mistral": _MIXTRAL, "qwen2": _QWEN2, "qwen3": _QWEN3}
# mergekit's DeepSeek output runs code from the hub; ours computes the same
_MERGEKIT = {"qwen3": _QWEN3, "deepseek": _QWEN2}


def architecture_of(recipe: MixtureRecipe, base: Weights) -> Architecture:
    """What the mixture will be: what the recipe says, else what fits the base's family.

    Raises MergeError for a base that cannot become the mixture asked for.
    """
    family = str(base.config.get("model_type"))
    if family not in _OF_FAMILY:
        known = ", ".join(_OF_FAMILY)
        raise MergeError(f"{base.path}: is a {family}; a mixture can be made of {known}")
    chosen = _OF_FAMILY[family]
    if recipe.architecture in _KNOWN:
        chosen = _KNOWN[recipe.architecture]
    elif recipe.architecture is not None:
        chosen = _MERGEKIT.get(recipe.architecture, _QWEN3 if family == "qwen3" else _QWEN2)
    elif recipe.shared and chosen is _MIXTRAL:
        chosen = _QWEN2
    if recipe.shared and not chosen.has_shared:
        raise MergeError(
            f"shared_experts: {chosen.model_type} has none; leave them out or take qwen2_moe"
        )
    return chosen


def mixture_config(
    architecture: Architecture, base: Weights, recipe: MixtureRecipe
) -> dict[str, Any]:
    """The config of the mixture, with every value that the base's leaves to a default.

    Raises MergeError where the base looks back in a way that the mixture cannot.
    """
    import transformers

    settings = {key: value for key, value in base.config.items() if key != "model_type"}
    dense = transformers.AutoConfig.for_model(base.config["model_type"], **settings).to_dict()
    kept = {key: dense[key] for key in _CARRIED if key in dense}
    if kept.get("head_dim") is None:
        kept.pop("head_dim", None)
    if architecture is not _QWEN3:
        kept.pop("attention_bias", None)
    own = _windows(architecture, base, dense) | _experts(architecture, dense, recipe)
    config = transformers.AutoConfig.for_model(architecture.model_type, **kept, **own)
    document: dict[str, Any] = config.to_diff_dict()
    dtype = recipe.dtype or dense.get("dtype")
    document["architectures"] = [_class_name(architecture)]
    return document | ({"dtype": str(dtype).removeprefix("torch.")} if dtype else {})


def missing_biases(
    config: Mapping[str, Any], architecture: Architecture, base: Weights, recipe: MixtureRecipe
) -> dict[str, tuple[int, ...]]:
    """Shapes of the biases that the mixture has and the base lacks: they are to be zero.

    Raises MergeError for any other tensor outside the MLPs that only one of them has, or that has
    another shape, and for MLPs with biases.
    """
    faults, zero = _misfits(config, architecture, base)
    if faults:
        others = [each for each in _KNOWN.values() if _fits(each, base, recipe)]
        advice = " or ".join(f"architecture: {each.model_type}" for each in others)
        more = f" ({len(faults) - 1} more like it)" if len(faults) > 1 else ""
        advice = f"take {advice}" if advice else "no mixture that is known here fits"
        raise MergeError(f"{faults[0]}{more}; {advice}")
    return zero


def dense_roles(base: Weights) -> dict[int, dict[str, str]]:
    """By layer, the names of its MLP's tensors by role (`gate_proj.weight`)."""
    found: dict[int, dict[str, str]] = {}
    for name in base.names:
        before, mlp, role = name.partition(".mlp.")
        if mlp:
            found.setdefault(int(before.rpartition(".")[2]), {})[role] = name
    return found


@dataclass(frozen=True)
class _Described:
    """What `skeleton` asks of a model."""

    path: str
    config: dict[str, Any]


def _misfits(
    config: Mapping[str, Any], architecture: Architecture, base: Weights
) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """Why the base's tensors do not fit, a line each; and the biases that the base lacks."""
    live = skeleton(_Described(base.path, dict(config)), otherwise="it cannot be made").state_dict()
    there = {name: tuple(t.shape) for name, t in live.items() if ".mlp." not in name}
    faults = [*_without_place(base, there, architecture)]
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    missing = {name: shape for name, shape in there.items() if name not in base}
    zero = {name: shape for name, shape in missing.items() if name.endswith("_proj.bias")}
    faults += [
        f"{name}: {architecture.model_type} needs it, {base.path} has none"
        for name in missing.keys() - zero.keys() - tied
    ]
    return sorted(faults), zero


def _fits(architecture: Architecture, base: Weights, recipe: MixtureRecipe) -> bool:
    if recipe.shared and not architecture.has_shared:
        return False
    try:
        config = mixture_config(architecture, base, recipe)
    except MergeError:
        return False
    return not _misfits(config, architecture, base)[0]


def _without_place(
    base: Weights, there: Mapping[str, tuple[int, ...]], architecture: Architecture
) -> Iterator[str]:
    name = architecture.model_type
    for tensor in outside(base):
        if tensor not in there:
            yield f"{tensor}: has no place in {name}"
        elif base.shape(tensor) != there[tensor]:
            shapes = f"{list(base.shape(tensor))}, {name} would have {list(there[tensor])}"
            yield f"{tensor}: is {shapes}"
    found = dense_roles(base)
    for layer in range(base.config["num_hidden_layers"]):
        roles = found.get(layer, {})
        yield from (
            f"{tensor}: has no place in an expert of {name}"
            for role, tensor in roles.items()
            if role not in _MATRICES
        )
        yield from (
            f"model.layers.{layer}.mlp.{role}: {base.path} has none"
            for role in _MATRICES
            if role not in roles
        )


def outside(base: Weights) -> Iterator[str]:
    """The tensors that are no expert's; rotary frequencies, which older checkpoints hold and any
    model computes for itself, aside."""
    for name in base.names:
        if ".mlp." not in name and not name.endswith("rotary_emb.inv_freq"):
            yield name


def _class_name(architecture: Architecture) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture.model_type])


def _experts(
    architecture: Architecture, dense: Mapping[str, Any], recipe: MixtureRecipe
) -> dict[str, Any]:
    count, width = len(recipe.experts), dense["intermediate_size"]
    if architecture is _MIXTRAL:
        return {"num_local_experts": count, "num_experts_per_tok": recipe.experts_per_token}
    shared = {"shared_expert_intermediate_size": width if recipe.shared else INERT_WIDTH}
    return {
        "num_experts": count,
        "num_experts_per_tok": recipe.experts_per_token,
        "moe_intermediate_size": width,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        **(shared if architecture.has_shared else {}),
    }


def _windows(architecture: Architecture, base: Weights, dense: Mapping[str, Any]) -> dict[str, Any]:
    """How far layers look back: as the base's do, in the words of the mixture's config."""
    window, count = dense.get("sliding_window"), dense["num_hidden_layers"]
    if base.config["model_type"] == "mistral":
        narrow = [window is not None] * count
    else:
        narrow = [kind == "sliding_attention" for kind in dense.get("layer_types") or [""] * count]
    if architecture is _QWEN2:
        if not any(narrow):
            return {"use_sliding_window": False}
        types = ["sliding_attention" if each else "full_attention" for each in narrow]
        return {"use_sliding_window": True, "sliding_window": window, "layer_types": types}
    if any(narrow) and not all(narrow):
        raise MergeError(
            f"{base.path}: some of its layers look back {window} tokens only; in"
            f" {architecture.model_type} all do or none"
        )
    own = {"sliding_window": window if all(narrow) else None}
    return own | ({"use_sliding_window": all(narrow)} if architecture is _QWEN3 else {})
