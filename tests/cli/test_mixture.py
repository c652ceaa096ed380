"""`evomerge merge` of a recipe, ours or mergekit-moe's, that makes dense models experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_llama
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def call(call: Any) -> Any:
    """Exit code and standard error."""
    return lambda *arguments: call(*arguments)[::2]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "math", "code")):
        small_llama.save(tmp_path / name, seed=seed)
    return tmp_path


RECIPE = """
base_model: base
gate_mode: hidden
experts:
  - {source_model: math, positive_prompts: ["w1 w2", "w3"], negative_prompts: ["w9"]}
  - {source_model: code, positive_prompts: ["w9 w8"]}
"""


def test_a_file_becomes_a_mixture(call: Any, models: Path) -> None:
    recipe = models / "moe.yml"
    recipe.write_text(RECIPE)
    code, said = call("merge", recipe, models / "out")
    assert code == 0, said
    assert "mixtral, 2 experts" in said
    made = AutoModelForCausalLM.from_pretrained(models / "out")
    assert (made.config.num_local_experts, made.config.num_experts_per_tok) == (2, 2)
    assert made.dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(models / "out")("w1 w2", return_tensors="pt").input_ids
    assert made.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, ids.shape[1] + 2)


def test_what_is_wrong_is_said_of_the_file(call: Any, models: Path) -> None:
    recipe = models / "moe.yml"
    recipe.write_text(RECIPE.replace("positive", "postive") + "gate: hidden\n")
    code, said = call("merge", recipe, models / "out")
    assert code == 2
    assert "moe.yml: " in said
    assert "did you mean 'positive_prompts'" in said
    small_llama.save(models / "wide", intermediate_size=80)
    recipe.write_text(RECIPE.replace("code", "wide"))
    code, said = call("merge", recipe, models / "out")
    assert code == 2
    assert "moe.yml: " in said
    assert "'experts.1' is [80, 32]" in said
    code, said = call("merge", recipe, models / "out", "--plan")
    assert code == 2
    assert "without --plan" in said
