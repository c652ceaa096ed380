"""The permutation specification of a network, from its config and the shapes of its tensors.

One entry for each family: a new architecture is a new function here, which yields its groups.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.errors import MergeError
from evomerge.merging.structure.architectures import (
    clip,
    convnets,
    decoders,
    encoder_decoders,
    encoders,
    gpt,
)
from evomerge.merging.structure.permutations.permutation import Group, Spec
from evomerge.merging.structure.permutations.units import Shapes

Groups = Callable[[Mapping[str, Any], Shapes], Iterator[Group]]

# What no group moves: outputs, norms of a head's channels under rotary positions, old buffers.
_UNMOVED = re.compile(
    r"self_attn\.[qk]_norm\.weight$|num_batches_tracked$|position_ids$|inv_freq$|logit_scale$"
    r"|\.(attn|attention)\.(masked_)?bias$"
    r"|^(classifier|classifier\.1|fc|lm_head|cls\.predictions(\.decoder)?|cls\.seq_relationship"
    r"|score|.*pooler\.dense)\.bias$"
)

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
_MIXTURE = _LLAMA | {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "shared_expert_intermediate_size": 10,
}
_LATENT = {
    "hidden_size": 32,
    "intermediate_size": 12,
    "moe_intermediate_size": 6,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 5,
    "n_routed_experts": 16,  # enough for eight clusters
    "num_experts_per_tok": 4,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
_NEOX = {
    "hidden_size": 32,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
_ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_IMAGES = {"image_size": 8, "patch_size": 4}
_WORDS = {"vocab_size": 40, "max_position_embeddings": 64}
_CAPTIONS = _ENCODER | _WORDS | {"eos_token_id": 2, "projection_dim": 10}  # 2: the largest id ends
_T5 = {
    "d_model": 32,
    "d_kv": 2,
    "d_ff": 12,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": 40,
}
_SWITCH = _T5 | {
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_experts": 3,
    "expert_capacity": 64,  # which tokens are dropped is no matter of units
}


@dataclass(frozen=True)
class Family:
    """How the groups of a family are found. `tiny` are settings that make a config of it small
    enough to try every bind in a second, and leave all that changes its structure."""

    groups: Groups
    tiny: Mapping[str, Any]


FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2"),
        Family(decoders.decoder, _LLAMA),
    ),
    "phi3": Family(decoders.decoder, _LLAMA | {"rope_scaling": None, "rope_parameters": None}),
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"), Family(decoders.decoder, _MIXTURE)
    ),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), Family(decoders.decoder, _LATENT)),
    "gpt2": Family(
        gpt.gpt2,
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 64,
         "n_inner": 12},
    ),
    "gpt_neox": Family(gpt.gpt_neox, _NEOX),
    **dict.fromkeys(("t5", "mt5", "umt5"), Family(encoder_decoders.t5, _T5)),
    "switch_transformers": Family(encoder_decoders.t5, _SWITCH),
    "bert": Family(encoders.bert, _ENCODER | _WORDS),
    "vit": Family(encoders.vit, _ENCODER | _IMAGES),
    "clip": Family(
        clip.clip,
        {"text_config": _CAPTIONS, "vision_config": _ENCODER | _IMAGES, "projection_dim": 10},
    ),
    "clip_text_model": Family(clip.clip, _CAPTIONS),
    "clip_vision_model": Family(clip.clip, _ENCODER | _IMAGES | {"projection_dim": 10}),
    "resnet": Family(
        convnets.resnet, {"embedding_size": 6, "hidden_sizes": [32, 48], "depths": [2, 2]}
    ),
}  # fmt: skip


def family(config: Mapping[str, Any]) -> Family:
    """The family of a config by its `model_type`. Raises MergeError, with those that are known."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise MergeError(
            f"there is no permutation specification for model_type {kind!r}; known are"
            f" {', '.join(sorted(FAMILIES))}. To add one, write a function that yields its groups"
            " and enter it in evomerge.merging.structure.architectures.families.FAMILIES"
            " (docs/guides/permutations.md shows one); of plain torch modules traced_spec in"
            " evomerge.merging.structure.tracing.tracer finds one"
        )
    return FAMILIES[kind]


def spec_of(config: Mapping[str, Any], shapes: Shapes) -> Spec:
    """The permutation groups of a network, by the stored names of its tensors.

    Raises MergeError for an architecture without a specification, where the config or a tensor
    that it is made from is missing, and for a tensor that the family's specification does not
    account for: moving the units around it would break the network.
    """
    try:
        groups = list(family(config).groups(config, shapes))
    except KeyError as error:
        raise MergeError(
            f"{error.args[0]}: neither the config nor the checkpoint has it, and the permutation"
            f" specification of {config['model_type']!r} is made from it; complete config.json"
        ) from error
    parents = {group.parent for group in groups}  # one key-value head still has query heads inside
    spec = Spec(tuple(g for g in groups if g.size > 1 or g.name in parents))
    spec.check_shapes(shapes)
    known = {param for group in groups for bind in group.binds for param in bind.params}
    left = [n for n in shapes if n not in known and not _UNMOVED.search(n)]
    if left:
        raise MergeError(
            f"{left[0]}: the permutation specification of {config['model_type']!r} does not say how"
            f" its units move{f' (nor those of {len(left) - 1} more)' if left[1:] else ''}"
        )
    return spec
