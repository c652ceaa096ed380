"""Where tensors sit: names of several families, read without knowing any of them."""

from __future__ import annotations

import pytest
import small_llama

from evomerge.merging.layout import layer_of, layout, tensor_type


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.embed_tokens.weight", "embedding", None),
        ("model.layers.11.self_attn.q_proj.weight", "attention", 11),
        ("model.layers.3.self_attn.q_norm.weight", "norm", 3),
        ("model.layers.3.post_attention_layernorm.weight", "norm", 3),
        ("model.layers.3.mlp.gate_proj.weight", "mlp", 3),
        ("model.layers.3.block_sparse_moe.gate.weight", "mlp", 3),
        ("model.layers.3.mlp.experts.7.up_proj.weight", "mlp", 3),
        ("model.norm.weight", "norm", None),
        ("lm_head.weight", "head", None),
        ("transformer.wte.weight", "embedding", None),
        ("wpe.weight", "embedding", None),
        ("h.0.attn.c_attn.weight", "attention", 0),
        ("transformer.h.10.mlp.c_fc.bias", "mlp", 10),
        ("transformer.h.10.ln_1.weight", "norm", 10),
        ("transformer.ln_f.weight", "norm", None),
        ("gpt_neox.layers.5.attention.dense.weight", "attention", 5),
        ("gpt_neox.layers.5.mlp.dense_h_to_4h.weight", "mlp", 5),
        ("gpt_neox.final_layer_norm.bias", "norm", None),
        ("embed_out.weight", "head", None),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "attention", 0),
        ("logit_scale", "other", None),
    ],
)
def test_type_and_layer(name: str, kind: str, layer: int | None) -> None:
    assert tensor_type(name) == kind
    assert layer_of(name) == layer


def test_depth_runs_from_the_embedding_to_the_head() -> None:
    names = ["embed.weight", *(f"layers.{i}.mlp.w" for i in range(5)), "norm.weight", "lm_head.w"]
    places = layout(names)
    assert [places[name].depth for name in names] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_one_layer_lies_at_depth_zero() -> None:
    assert layout(["layers.0.mlp.w"])["layers.0.mlp.w"].depth == 0


def test_every_tensor_of_a_llama_has_a_type() -> None:
    places = layout(small_llama.build().state_dict())
    assert {place.type for place in places.values()} == {
        "attention",
        "embedding",
        "head",
        "mlp",
        "norm",
    }
    assert {place.layer for place in places.values()} == {None, 0, 1}
