"""Mixtures against mergekit-moe itself, run as a program where it is installed.

MERGEKIT_MOE names the program of another environment. It runs the base in bfloat16 for gates from
hidden states; embeddings are summed in float32.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import small_llama
import tiny_models
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from evomerge.calibration.mixture import open_mixture_problem
from evomerge.merging.structure.mixture.export import make_mixture

PROGRAM = os.environ.get("MERGEKIT_MOE") or shutil.which("mergekit-moe")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="mergekit-moe is not installed"),
]
NAMES = ("base", "math", "code")
SHARED = {"source_model": "base", "positive_prompts": ["w8 w9"], "residual_scale": 0.1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in ("llama", "mistral", "qwen3"):
        for seed, name in enumerate(NAMES):
            model = tiny_models.causal(family, seed=seed, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.3)
            model.save_pretrained(root / family / name)
            small_llama.tokenizer(small_llama.TOKENS[:48]).save_pretrained(root / family / name)
    return root


def _state(folder: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[str, Tensor] = model.state_dict()
    return found


@pytest.mark.parametrize(("gate", "apart"), [("hidden", 2e-2), ("cheap_embed", 1e-6)])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("qwen3", {}),
        ("llama", {"architecture": "qwen", "shared_experts": [SHARED]}),
    ],
)
def test_every_tensor_is_mergekits(
    models: Path, tmp_path: Path, family: str, more: dict[str, Any], gate: str, apart: float
) -> None:
    document: dict[str, Any] = {
        "base_model": "base",
        "gate_mode": gate,
        "dtype": "float32",
        "experts": [
            {
                "source_model": "math",
                "positive_prompts": ["w1 w2 w3", "w4 w5 w6 w7"],
                "negative_prompts": ["w9 w10"],
                "residual_scale": 0.5,
            },
            {"source_model": "code", "positive_prompts": ["w11 w12"]},
        ],
        **more,
    }
    recipe = models / family / "moe.yml"
    recipe.write_text(json.dumps(document))  # JSON is YAML
    done = subprocess.run(
        [str(PROGRAM), "moe.yml", str(tmp_path / "theirs"), "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
        cwd=models / family,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    make_mixture(open_mixture_problem(recipe, device="cpu"), tmp_path / "ours")
    theirs, ours = _state(tmp_path / "theirs"), _state(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        if "mlp.gate." in name or "shared_expert_gate" in name:
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=apart)
        else:
            assert torch.equal(ours[name], tensor), name
