"""Random models of many architectures, of a few thousand weights, built where a test needs them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
}

CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 4}),
    "gemma2": ("Gemma2", {"head_dim": 4}),
    "gemma3": ("Gemma3Text", {"head_dim": 4}),
    "phi3": ("Phi3", {}),
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "gpt_neox": ("GPTNeoX", {}),
    "opt": ("OPT", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 2}),
    "falcon": ("Falcon", {}),
    "stablelm": ("StableLm", {}),
    "nemotron": ("Nemotron", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 8}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "head_dim": 4}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("DeepseekV2", {**_LATENT, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3", _LATENT),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}),
    "llama4": (
        "Llama4Text",
        {"num_local_experts": 4, "head_dim": 4, "intermediate_size_mlp": 24},
    ),
    "mamba": ("Mamba", {"state_size": 4, "time_step_rank": 4}),
    "jamba": (
        "Jamba",
        {
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    # Its files hold query, gate, key and value as one tensor, and so the mlp's two halves.
    "hrm_text": ("HrmText", {"num_layers_per_stack": 1}),
}


_IMAGE = {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
_CLIP = {
    **_IMAGE,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
}
# Text and vision configs: the published files of these have other prefixes than the live models.
VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": (
        "Llava",
        {
            "text_config": {**_SMALL, "model_type": "llama"},
            "vision_config": {**_CLIP, "model_type": "clip_vision_model"},
            "image_token_index": 5,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "text_config": {**_SMALL, "head_dim": 4},
            "vision_config": _CLIP,
            "mm_tokens_per_image": 4,
        },
    ),
    "qwen2_vl": (
        "Qwen2VL",
        {
            "text_config": {
                **_SMALL,
                "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]},
            },
            "vision_config": {**_IMAGE, "depth": 2, "embed_dim": 16},
        },
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        {
            "text_config": {**_SMALL, **_EXPERTS, "head_dim": 4},
            "vision_config": {
                **_IMAGE,
                "depth": 2,
                "out_hidden_size": 16,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        },
    ),
}


def vision(name: str, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A random model of images and text of `VISION[name]`."""
    family, options = VISION[name]
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    return randomised(model, seed, dtype)


def causal(name: str, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changed: Any) -> Any:
    """A random causal language model of `CAUSAL[name]`, but for the settings that are `changed`."""
    family, options = CAUSAL[name]
    config = getattr(transformers, f"{family}Config")(**{**_SMALL, **options, **changed})
    return randomised(transformers.AutoModelForCausalLM.from_config(config), seed, dtype)


def randomised(model: Any, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """The model with every float weight drawn anew: what is 0 or 1 when new proves nothing."""
    model.to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *_float_buffers(model)]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def _float_buffers(model: Any) -> list[torch.Tensor]:
    saved = model.state_dict(keep_vars=True)
    buffers = (b for name, b in model.named_buffers() if name in saved)
    return [buffer for buffer in buffers if buffer.is_floating_point()]
