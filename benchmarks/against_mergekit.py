"""The same mergekit files through mergekit and through evomerge: how far do the numbers differ?

Merges small random Llamas in float32 with both and prints, for each file, the share of entries that
lie more than one unit in the last place apart: of the float32 results, and of the same rounded to
bfloat16 (`out_dtype: bfloat16`) with the largest distance there. The target: at most 0.1%.
Where two terms cancel, an entry's unit is far smaller than the rounding errors of its terms.

    python benchmarks/against_mergekit.py /path/to/mergekit-yaml [--keep DIR]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from evomerge.merging.export import export
from evomerge.merging.methods.registry import METHODS
from evomerge.merging.recipe_file import load_recipe

SHARE_BEYOND = 1e-3
LAYERS = 5
STACK = """
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [0, 2], parameters: {weight: [0.1, 0.3]}}
      - {model: b, layer_range: [0, 2], parameters: {weight: 0.4}}
  - sources:
      - {model: base, layer_range: [2, 3]}
      - {model: a, layer_range: [2, 3], parameters: {weight: [0.5, 0.9]}}
      - {model: b, layer_range: [2, 3]}
    parameters: {weight: [{filter: mlp, value: 0.2}, {value: 0.7}]}
  - sources:
      - {model: base, layer_range: [3, 5]}
      - {model: a, layer_range: [3, 5], parameters: {weight: 0.6}}
      - {model: b, layer_range: [3, 5], parameters: {weight: [0.8, 0.4]}}
"""
WEIGHTED = "models: [{model: a, parameters: {weight: 0.6}}, {model: b, parameters: {weight: 0.3}}]"
VARIED = """
models:
  - model: base
  - model: a
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: c
    parameters:
      density: 0.33
      weight: [{filter: mlp, value: 0.5}, {filter: self_attn, value: [0.2, 0.4]}, {value: 0}]
"""
CURVES = """
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
"""
TO_BASE = "base_model: base\nmerge_method: "
CASES = {
    "linear": f"{WEIGHTED}\nmerge_method: linear",
    "linear, not normalised": f"{WEIGHTED}\nmerge_method: linear\nparameters: {{normalize: false}}",
    "linear, gradients, base": (
        "models: [{model: base, parameters: {weight: [1, 0]}}, {model: c}]\n"
        f"{TO_BASE}linear\nparameters: {{weight: 0.5}}"
    ),
    "task_arithmetic": f"{WEIGHTED}\n{TO_BASE}task_arithmetic\nparameters: {{lambda: 0.7}}",
    "task_arithmetic, normalised": (
        f"{WEIGHTED}\n{TO_BASE}task_arithmetic\nparameters: {{normalize: true}}"
    ),
    "task_arithmetic, gradients and filters": f"{VARIED}\n{TO_BASE}task_arithmetic",
    "task_arithmetic, slices": f"{STACK}\n{TO_BASE}task_arithmetic",
    "ties": f"{WEIGHTED}\n{TO_BASE}ties\nparameters: {{density: 0.5}}",
    "ties, not normalised": (
        f"{WEIGHTED}\n{TO_BASE}ties\nparameters: {{density: 0.3, normalize: false, lambda: 0.8}}"
    ),
    "ties, gradients and filters": (
        f"{VARIED}\n{TO_BASE}ties\nparameters: {{normalize: true, int8_mask: true}}"
    ),
    "ties, slices": f"{STACK}\n{TO_BASE}ties\nparameters: {{density: [0.2, 0.8]}}",
    "slerp, near": f"models: [{{model: a}}]\n{TO_BASE}slerp\nparameters: {{t: 0.3}}",
    "slerp, far": f"models: [{{model: c}}]\n{TO_BASE}slerp\nparameters: {{t: 0.3}}",
    "slerp, gradients and filters": (
        f"models: [{{model: c}}, {{model: base}}]\n{TO_BASE}slerp{CURVES}"
    ),
    "nuslerp": f"{WEIGHTED}\n{TO_BASE}nuslerp",
    "nuslerp, whole models by rows": (
        f"{WEIGHTED}\nmerge_method: nuslerp\nparameters: {{nuslerp_flatten: false}}"
    ),
    "multislerp": f"{WEIGHTED}\n{TO_BASE}multislerp",
    "karcher": "models: [{model: a}, {model: c}]\nmerge_method: karcher",
    "model_stock": f"models: [{{model: a}}, {{model: b}}]\n{TO_BASE}model_stock",
    "nearswap": f"models: [{{model: a}}]\n{TO_BASE}nearswap\nparameters: {{t: 0.001}}",
    "sce": f"models: [{{model: a}}, {{model: b}}]\n{TO_BASE}sce\nparameters: {{select_topk: 0.6}}",
    "breadcrumbs": f"{WEIGHTED}\n{TO_BASE}breadcrumbs\nparameters: {{density: 0.7, gamma: 0.05}}",
    "breadcrumbs_ties": f"{WEIGHTED}\n{TO_BASE}breadcrumbs_ties\nparameters: {{density: 0.7}}",
    "arcee_fusion": f"models: [{{model: a}}]\n{TO_BASE}arcee_fusion",
    "ram": f"models: [{{model: a}}, {{model: b}}]\n{TO_BASE}ram\nparameters: {{epsilon: 0.0003}}",
    "dare_linear, density 1": f"{WEIGHTED}\n{TO_BASE}dare_linear\nparameters: {{density: 1}}",
    "dare_ties, density 1": f"{WEIGHTED}\n{TO_BASE}dare_ties\nparameters: {{lambda: 0.9}}",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mergekit", type=Path, help="the mergekit-yaml command")
    parser.add_argument("--keep", type=Path, help="where to leave models and results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        build_models(folder)
        print(f"{'beyond 1 ulp in':42} {'float32':>9} {'bfloat16':>9} {'largest':>8}")
        results = [
            compare(arguments.mergekit, folder, name)
            for name in CASES
            if name.partition(",")[0] in METHODS
        ]
    return 0 if all(results) else 1


def build_models(folder: Path) -> None:
    """A base, two near sources (cosine 0.9998) and a far one, of another start."""
    base = random_llama(0)
    base.save_pretrained(folder / "base")
    for seed, name in enumerate("ab", start=1):
        near = random_llama(0)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in near.parameters():
                parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
        near.save_pretrained(folder / name)
    random_llama(9).save_pretrained(folder / "c")


def random_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def compare(mergekit: Path, folder: Path, name: str) -> bool:
    """Merge one file with both, print a line and say whether it meets the targets."""
    stem = name.replace(" ", "-").replace(",", "")
    file, theirs, ours = folder / f"{stem}.yml", folder / f"{stem}.theirs", folder / f"{stem}.ours"
    located = re.sub(r"model: (base|a|b|c)\b", rf"model: {folder.resolve()}/\1", CASES[name])
    file.write_text(f"{located}\ndtype: float32\n")
    command = [str(mergekit.absolute()), file.name, theirs.name, "--quiet"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: mergekit failed:\n{done.stderr[-2000:]}")
    export(load_recipe(file), ours)
    expected, found = (load_file(path / "model.safetensors") for path in (theirs, ours))
    assert expected.keys() == found.keys()
    shares = []
    for dtype in (torch.float32, torch.bfloat16):
        pairs = [(found[key].to(dtype), expected[key].to(dtype)) for key in sorted(found)]
        steps = torch.cat([ulps(ours_, theirs_) for ours_, theirs_ in pairs])
        shares.append(float((steps > 1).double().mean()))
    print(f"{name:42} {shares[0]:9.4%} {shares[1]:9.4%} {int(steps.max()):8d}", flush=True)
    return max(shares) <= SHARE_BEYOND


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many numbers of their dtype lie between a and b, entry by entry."""
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    keys = []
    for tensor in (a, b):
        bits = tensor.flatten().view(integer).long()
        magnitude = bits & torch.iinfo(integer).max
        keys.append(torch.where(bits < 0, -magnitude, magnitude))
    return (keys[0] - keys[1]).abs()


if __name__ == "__main__":
    sys.exit(main())
