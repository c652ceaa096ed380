"""Aligned rows against mergekit itself, run as a program where it is installed.

MERGEKIT_YAML names the program of another environment. A linear merge with weight 1 for one model
and 0 for the others shows that model's rows in mergekit's output vocabulary.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import small_tokenizers
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.aligned_rows import AlignedRows
from evomerge.checkpoints.vocabulary import plan_vocabulary
from evomerge.tokenizer_choice import read_tokenizer

PROGRAM = os.environ.get("MERGEKIT_YAML") or shutil.which("mergekit-yaml")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="mergekit-yaml is not installed"),
]
NAMES = ("base", "code", "third")
TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
RULES = {
    "<|code|>": {"source": {"kind": "model_token", "model": "base", "token": "q"}},
    "<|both|>": {"source": {"kind": "zero"}},
    "<|base|>": {"source": {"kind": "model_token", "model": "code", "token_id": 5}, "force": True},
    "q": {"source": "third", "force": True},
    "z": {"source": "third"},
}
CHOICES: dict[str, dict[str, Any]] = {
    "base": {"source": "base"},
    "union": {"source": "union"},
    "named": {"source": "code"},
    "multiple": {"source": "union", "pad_to_multiple_of": 1000},
    "rules": {"source": "union", "tokens": RULES},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    special = ("<pad>", *small_tokenizers.SPECIAL)
    base = small_tokenizers.train("bpe", "sea")
    code = small_tokenizers.train("bpe", "code", special=special)
    third = small_tokenizers.train("bpe", "code", size=300)
    float32 = {"dtype": torch.float32}
    small_tokenizers.save(root / "base", base, added=["<|base|>"], seed=0, **float32)
    small_tokenizers.save(
        root / "code", code, added=["<|code|>", "<|both|>"], rows=400, seed=1, **float32
    )
    small_tokenizers.save(root / "third", third, added=["<|both|>"], seed=2, **float32)
    return root


def _located(value: Any, folder: Path) -> Any:
    """The same choice with paths in place of names."""
    if isinstance(value, Mapping):
        keys = ("source", "model", "tokens", "tokenizer")
        return {k: _located(v, folder) if k in keys or k in RULES else v for k, v in value.items()}
    return str(folder / value) if value in ("code", "third") or value == "base!" else value


def _merged(folder: Path, out: Path, choice: Mapping[str, Any], chosen: str) -> Path:
    text = json.dumps(choice).replace('"model": "base"', '"model": "base!"')
    document = {
        "merge_method": "linear",
        "base_model": str(folder / "base"),
        "dtype": "float32",
        "models": [
            {"model": str(folder / name), "parameters": {"weight": float(name == chosen)}}
            for name in NAMES
        ],
        "parameters": {"normalize": False},
        "tokenizer": json.loads(
            json.dumps(_located(json.loads(text), folder)).replace("base!", "base")
        ),
    }
    (out / "merge.yml").write_text(json.dumps(document))  # JSON is YAML
    arguments = [str(PROGRAM), str(out / "merge.yml"), str(out / "out"), "--no-write-model-card"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / "out"


@pytest.mark.parametrize("chosen", NAMES)
@pytest.mark.parametrize("name", CHOICES)
def test_rows_are_mergekits(folder: Path, tmp_path: Path, name: str, chosen: str) -> None:
    theirs = _merged(folder, tmp_path, CHOICES[name], chosen)
    models = {n: Checkpoint.open(str(folder / n)) for n in NAMES}
    faults: list[str] = []
    vocabulary = plan_vocabulary(read_tokenizer(CHOICES[name], faults), models)
    ids = Tokenizer.from_file(str(theirs / "tokenizer.json")).get_vocab()
    assert ids.keys() == vocabulary.ids.keys()
    for tensor in TENSORS:
        merged = load_file(theirs / "model.safetensors")[tensor]
        aligned = AlignedRows(vocabulary, {n: m.tensor(tensor) for n, m in models.items()}, tensor)
        ours = aligned.rows(chosen, 0, vocabulary.rows)
        tokens = sorted(ids)
        assert torch.equal(
            merged[[ids[t] for t in tokens]], ours[[vocabulary.ids[t] for t in tokens]]
        )
        if "pad_to_multiple_of" in CHOICES[name]:
            assert len(merged) == len(ours)
            torch.testing.assert_close(merged[len(ids) :], ours[len(ids) :], rtol=0, atol=1e-7)
