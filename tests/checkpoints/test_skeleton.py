"""A model made from a config alone computes, once its weights are set, what a loaded one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_llama
import tiny_models
import torch

from evomerge.checkpoints.adapted import open_model
from evomerge.checkpoints.skeleton import blank
from evomerge.merging.materialise import Materialiser, load_model
from evomerge.merging.recipe import ModelRef, Recipe, Source


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blank_model_becomes_any_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_models.causal(family, dtype=dtype).save_pretrained(tmp_path)
    small_llama.tokenizer().save_pretrained(tmp_path)
    model = open_model(str(tmp_path))
    loaded, _ = load_model(model)
    made = blank(model, otherwise="", dtype=dtype, device="cpu")
    assert not made.training
    recipe = Recipe("linear", None, (Source("a", ModelRef(str(tmp_path))),), {"weight": 1.0})
    Materialiser(made, {str(tmp_path): model}).write(recipe)
    tokens = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = (each(input_ids=tokens).logits for each in (loaded, made))
    assert wanted.dtype == dtype
    assert torch.equal(wanted, found)
