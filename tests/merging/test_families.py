"""Encoders, vision models, encoder-decoders and raw state dicts, merged on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from evomerge.checkpoints import Checkpoint
from evomerge.errors import SpecError
from evomerge.merging.export import export
from evomerge.merging.recipe import ModelRef, Recipe, Source

State = dict[str, Tensor]
WEIGHTS = {"one": 0.75, "two": 0.25}
_LAYERS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
_TEXT = {**_LAYERS, "vocab_size": 48, "max_position_embeddings": 16}
_IMAGE = {**_LAYERS, "image_size": 8, "patch_size": 4}


def _clip() -> Any:
    config = transformers.CLIPConfig(text_config=_TEXT, vision_config=_IMAGE, projection_dim=8)
    return transformers.CLIPModel(config)


def _t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=48, **sizes))


def _bart() -> Any:
    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
    }
    config = transformers.BartConfig(vocab_size=48, d_model=16, max_position_embeddings=16, **sides)
    return transformers.BartForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**_TEXT)),
    "bert-classifier": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**_TEXT, num_labels=3)
    ),
    "roberta": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**_TEXT)),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(**_TEXT, pad_token_id=0)
    ),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**_IMAGE)),
    "clip": _clip,
    "t5": _t5,
    "bart": _bart,
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_merge_on_disk_is_the_merge_of_the_loaded_models(tmp_path: Path, name: str) -> None:
    models = [tiny_models.randomised(MODELS[name](), seed) for seed in range(3)]
    folders = [tmp_path / f"m{seed}" for seed in range(3)]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder, max_shard_size="20KB")
    export(_recipe(folders), tmp_path / "out")
    merged, report = type(models[0]).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    _assert_merged(merged.state_dict(), *(model.state_dict() for model in models))


def _recipe(paths: list[Path]) -> Recipe:
    base, *sources = paths
    named = [
        Source(name, ModelRef(str(path)), {"weight": weight})
        for (name, weight), path in zip(WEIGHTS.items(), sources, strict=True)
    ]
    return Recipe("task_arithmetic", ModelRef(str(base)), tuple(named))


def _assert_merged(merged: State, base: State, *sources: State) -> None:
    """The merge in float64, but for what roundings of float32 may add."""
    for key, tensor in merged.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, base[key]), key
            continue
        origin, *others = (state[key].double() for state in (base, *sources))
        weighted = zip(WEIGHTS.values(), others, strict=True)
        expected = origin + sum(weight * (other - origin) for weight, other in weighted)
        size = sum(map(torch.abs, [origin, *others]))
        assert ((tensor.double() - expected).abs() <= 2**-22 * size).all(), key


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_raw_state_dicts_are_merged(tmp_path: Path, kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    states, paths = [], []
    for index in range(3):
        state = {"a.weight": torch.randn(5, 3, generator=generator), "n": torch.tensor([index])}
        path = tmp_path / f"s{index}" / "weights.safetensors"
        path.parent.mkdir()
        save_file(state, path)
        states.append(state)
        paths.append(path if kind == "file" else path.parent)
    export(_recipe(paths), tmp_path / "out")
    _assert_merged(load_file(tmp_path / "out" / "model.safetensors"), *states)
    again = Checkpoint.open(str(tmp_path / "out" / "model.safetensors"))
    assert again.names == ("a.weight", "n")


def test_raw_state_dicts_that_differ_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "one", "two")]
    for path, shape in zip(paths, ((2, 3), (2, 3), (3, 2)), strict=True):
        save_file({"a": torch.ones(shape)}, path)
    with pytest.raises(SpecError, match=r"a: base is \[2, 3\], source 'two' is \[3, 2\]"):
        export(_recipe(paths), tmp_path / "out")
