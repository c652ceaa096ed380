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
    "mixtral": {"model_type": "mixtral"},
    "qwen2_moe": {"model_type": "qwen2_moe"},
    "qwen3_moe": {"model_type": "qwen3_moe"},
    "gpt2": {"model_type": "gpt2"},
    "bert": {"model_type": "bert", "architectures": ["BertForSequenceClassification"]},
    "bert, tokens": {"model_type": "bert", "architectures": ["BertForTokenClassification"]},
    "bert, words": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    "bert, words apart": {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "tie_word_embeddings": False,
    },
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
