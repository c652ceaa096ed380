"""A config of every kind of network that has a permutation specification."""

from __future__ import annotations

CONFIGS = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama, tied, biases": {
        "model_type": "llama", "tie_word_embeddings": True, "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "gemma": {"model_type": "gemma"},
    "gemma2": {"model_type": "gemma2"},
    "olmo2": {"model_type": "olmo2"},
    "phi3": {"model_type": "phi3"},
    "mixtral": {"model_type": "mixtral"},
    "qwen2_moe": {"model_type": "qwen2_moe"},
    "qwen3_moe": {"model_type": "qwen3_moe"},
    "olmoe": {"model_type": "olmoe"},
    "deepseek_v2, whole queries": {
        "model_type": "deepseek_v2", "q_lora_rank": None, "topk_method": "greedy",
        "attention_bias": True,
    },
    "deepseek_v2, clusters": {
        "model_type": "deepseek_v2", "q_lora_rank": 10, "topk_method": "group_limited_greedy",
        "n_group": 4, "topk_group": 2,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3", "q_lora_rank": 10, "n_group": 1, "topk_group": 1,
    },
    "deepseek_v3, clusters": {"model_type": "deepseek_v3", "q_lora_rank": 10},
    "gpt2": {"model_type": "gpt2"},
    "gpt_neox": {"model_type": "gpt_neox"},
    "gpt_neox, tied, all turning": {
        "model_type": "gpt_neox", "tie_word_embeddings": True, "rotary_pct": 1.0,
        "use_parallel_residual": False,
    },
    "t5": {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
    "t5, encoder": {"model_type": "t5", "architectures": ["T5EncoderModel"]},
    "mt5": {"model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"]},
    "umt5": {"model_type": "umt5", "architectures": ["UMT5ForConditionalGeneration"]},
    "switch": {
        "model_type": "switch_transformers",
        "architectures": ["SwitchTransformersForConditionalGeneration"],
    },
    "clip": {"model_type": "clip", "architectures": ["CLIPModel"]},
    "clip, images": {"model_type": "clip", "architectures": ["CLIPForImageClassification"]},
    "clip, vision": {
        "model_type": "clip_vision_model", "architectures": ["CLIPVisionModelWithProjection"],
    },
    "clip, vision alone": {
        "model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"],
    },
    "clip, text": {
        "model_type": "clip_text_model", "architectures": ["CLIPTextModelWithProjection"],
    },
    "clip, text alone": {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]},
    "bert": {"model_type": "bert", "architectures": ["BertForSequenceClassification"]},
    "bert, tokens": {"model_type": "bert", "architectures": ["BertForTokenClassification"]},
    "bert, words": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    "bert, words apart": {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "tie_word_embeddings": False,
    },
    "bert alone": {"model_type": "bert", "architectures": ["BertModel"]},
    "vit alone": {"model_type": "vit", "architectures": ["ViTModel"]},
    "vit": {"model_type": "vit", "architectures": ["ViTForImageClassification"]},
    "vit, no biases": {
        "model_type": "vit", "architectures": ["ViTForImageClassification"], "qkv_bias": False,
    },
    "resnet": {
        "model_type": "resnet", "architectures": ["ResNetForImageClassification"],
        "layer_type": "basic",
    },
    "resnet, bottleneck": {
        "model_type": "resnet", "architectures": ["ResNetForImageClassification"],
        "layer_type": "bottleneck",
    },
}  # fmt: skip

FULL_SIZE = {
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584,
        "num_hidden_layers": 28, "layer_types": ["full_attention"] * 28, "vocab_size": 152064,
        "bos_token_id": 151643, "pad_token_id": 151643, "tie_word_embeddings": False,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 3072,
        "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
        "vocab_size": 200064, "pad_token_id": 199999, "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope", "long_factor": [1.0] * 48, "short_factor": [1.0] * 48,
        },
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
        "n_routed_experts": 256, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
        "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 128,
        "topk_method": "noaux_tc", "num_nextn_predict_layers": 1, "vocab_size": 129280,
        "quantization_config": {"quant_method": "fp8"},
    },
    "clip": {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 512,
        "text_config": {
            "model_type": "clip_text_model", "hidden_size": 512, "num_attention_heads": 8,
            "eos_token_id": 49407, "hidden_act": "quick_gelu",
        },
        "text_config_dict": {"hidden_size": 512, "num_attention_heads": 8},
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 768, "num_attention_heads": 12,
            "patch_size": 32, "image_size": 224, "hidden_act": "quick_gelu",
        },
        "vision_config_dict": None,
    },
}  # fmt: skip
"""Settings as published models have them, which must be cut to be tried."""
