"""Permutation groups of decoders: Llama and its like, dense or with mixtures of experts.

By the names that checkpoints have on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from evomerge.merging.structure.architectures.decoder_attention import grouped_query, latent
from evomerge.merging.structure.architectures.expert_units import experts
from evomerge.merging.structure.permutations.permutation import Group
from evomerge.merging.structure.permutations.units import Shapes, blocks, bound, layers, prefix_of

_NORMS = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "pre_feedforward_layernorm.weight",
    "post_feedforward_layernorm.weight",
)
_READ = ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa")
_MLPS = ("mlp.", "mlp.shared_expert.", "mlp.shared_experts.")
_EXPERT = {  # gate, up and down of one expert, by the mixture's name on disk
    "block_sparse_moe.": ("w1.weight", "w3.weight", "w2.weight"),
    "mlp.": ("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
}


def decoder(config: Mapping[str, Any], shapes: Shapes) -> Iterator[Group]:
    """Llama, Mistral, Qwen2, Qwen3, Gemma, OLMo, Phi-3, DeepSeek and their mixtures, tied
    embeddings or not.

    Residual stream, and in each layer MLP neurons, key-value heads with their query heads and value
    channels (or the ranks, heads and channels of latent attention), experts with their neurons.
    """
    prefix = prefix_of(shapes, "embed_tokens.weight")
    every = layers(shapes, f"{prefix}layers.")
    stream = blocks(shapes[f"{prefix}embed_tokens.weight"][1])
    ends = [(f"{prefix}embed_tokens.weight", 1), ("lm_head.weight", 1), ("score.weight", 1)]
    places = [*ends, (f"{prefix}norm.weight", 0)]
    for layer in every:
        places += _stream_places(layer, shapes)
    yield Group("residual", "residual", len(stream), bound(shapes, stream, *places))
    for layer in every:
        yield from _attention(f"{layer}self_attn.", config, shapes)
        for part in _MLPS:
            yield from _mlp(layer + part, shapes)
        for mixture, (gate, up, down) in _EXPERT.items():
            routers = (
                f"{layer}{mixture}gate.weight",
                f"{layer}{mixture}gate.e_score_correction_bias",
            )
            where = f"{layer}{mixture}experts."
            yield from experts(where, (gate, up), down, routers, shapes, clusters=_clusters(config))


def _stream_places(layer: str, shapes: Shapes) -> Iterator[tuple[str, int]]:
    """Where a layer reads the residual stream, and where it writes to it."""
    yield from ((f"{layer}{norm}", 0) for norm in _NORMS)
    yield from ((f"{layer}self_attn.{x}.weight", 1) for x in _READ)
    yield from ((f"{layer}self_attn.o_proj.{x}", 0) for x in ("weight", "bias"))
    for part in _MLPS:
        yield from ((f"{layer}{part}{x}_proj.weight", 1) for x in ("gate", "up", "gate_up"))
        yield from ((f"{layer}{part}down_proj.{x}", 0) for x in ("weight", "bias"))
    yield f"{layer}mlp.shared_expert_gate.weight", 1
    for mixture, (gate, up, down) in _EXPERT.items():
        yield f"{layer}{mixture}gate.weight", 1
        for expert in layers(shapes, f"{layer}{mixture}experts."):
            yield from ((expert + gate, 1), (expert + up, 1), (expert + down, 0))


def _attention(attention: str, config: Mapping[str, Any], shapes: Shapes) -> Iterator[Group]:
    if f"{attention}kv_b_proj.weight" in shapes:
        return latent(attention, config, shapes)
    return grouped_query(attention, int(config["num_attention_heads"]), shapes)


def _mlp(mlp: str, shapes: Shapes) -> Iterator[Group]:
    if (down := f"{mlp}down_proj.weight") not in shapes:
        return
    neurons = blocks(shapes[down][1])
    places = [(f"{mlp}{x}_proj.{y}", 0) for x in ("gate", "up") for y in ("weight", "bias")]
    pairs = torch.cat([neurons, neurons + len(neurons)], 1)
    fused = bound(shapes, pairs, *((f"{mlp}gate_up_proj.{y}", 0) for y in ("weight", "bias")))
    binds = bound(shapes, neurons, *places) + fused + bound(shapes, neurons, (down, 1))
    yield Group(mlp[:-1], "mlp", len(neurons), binds)


def _clusters(config: Mapping[str, Any]) -> int:
    """Between how many clusters of experts DeepSeek's router chooses first."""
    return 1 if config.get("topk_method") == "greedy" else int(config.get("n_group") or 1)
