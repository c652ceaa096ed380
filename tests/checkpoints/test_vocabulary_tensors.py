"""Which tensors have a row for every token, against how shapes change with the vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_llama
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.vocabulary_tensors import embedding_rows, vocabulary_tensors
from evomerge.errors import CheckpointError

ROWS = 83
LLAMA = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
GPT = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 0}
ARCHITECTURES = {
    "llama": {**LLAMA, "tie_word_embeddings": False},
    "qwen2": {**LLAMA, "tie_word_embeddings": True},
    "phi": LLAMA,
    "mixtral": {**LLAMA, "num_local_experts": 2},
    "gemma2": {**LLAMA, "head_dim": 4},
    "gpt2": {**GPT, "eos_token_id": 0},
    "gptj": {**GPT, "rotary_dim": 4, "eos_token_id": 0},
    "opt": {
        "hidden_size": 8,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 8,
        "max_position_embeddings": 16,
    },
    "gpt_neox": {**LLAMA, "rotary_pct": 0.5},
    "bloom": {"hidden_size": 8, "n_layer": 1, "n_head": 2},
}


def _config(architecture: str, rows: int):
    return AutoConfig.for_model(architecture, vocab_size=rows, **ARCHITECTURES[architecture])


def _by_shape(architecture: str) -> set[str]:
    """Names of the parameters whose shape follows the vocabulary, tied ones under each name."""
    shapes = []
    for rows in (ROWS, ROWS + 1):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(_config(architecture, rows))
        shapes.append({n: p.shape for n, p in model.named_parameters(remove_duplicate=False)})
    return {name for name, shape in shapes[0].items() if shapes[1][name] != shape}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_they_are_those_whose_shape_follows_the_vocabulary(
    architecture: str, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_config(_config(architecture, ROWS)).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    found = vocabulary_tensors(checkpoint)
    expected = {checkpoint.tied_names.get(n, n) for n in _by_shape(architecture)}
    assert set(found) == expected & set(checkpoint.names)
    assert "embed" in found[0] or "wte" in found[0]
    assert {checkpoint.shape(name)[0] for name in found} == {ROWS}
    assert embedding_rows(checkpoint) == ROWS


def test_a_head_with_a_bias_is_three_tensors(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(_config("phi", ROWS)).save_pretrained(tmp_path)
    found = vocabulary_tensors(Checkpoint.open(str(tmp_path)))
    assert found == ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")


def test_a_tied_head_is_one_tensor(tmp_path: Path) -> None:
    small_llama.save(tmp_path / "m", tie=True)
    checkpoint = Checkpoint.open(str(tmp_path / "m"))
    assert vocabulary_tensors(checkpoint) == ("model.embed_tokens.weight",)


def test_a_checkpoint_without_the_heads_prefix(tmp_path: Path) -> None:
    """GPT-2's own files lack `transformer.`"""
    model = AutoModel.from_config(_config("gpt2", ROWS))
    model.save_pretrained(tmp_path)
    config = AutoModelForCausalLM.from_config(model.config).config
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    assert vocabulary_tensors(Checkpoint.open(str(tmp_path))) == ("wte.weight",)


def test_no_embedding(tmp_path: Path) -> None:
    folder = small_llama.save(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no tensor model.embed_tokens.weight"):
        vocabulary_tensors(Checkpoint.open(str(folder)))


def test_an_unknown_architecture(tmp_path: Path) -> None:
    folder = small_llama.save(tmp_path / "m")
    (folder / "config.json").write_text('{"model_type": "abacus", "architectures": ["Abacus"]}')
    with pytest.raises(CheckpointError, match="transformers does not know this architecture"):
        vocabulary_tensors(Checkpoint.open(str(folder)))
