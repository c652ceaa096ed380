"""A model over several devices. There is no GPU here: torch's fake tensors have devices and no
values, and complain, as real ones do, where two devices meet in one operation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_llama
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig
from transformers.cache_utils import DynamicLayer

from evomerge.checkpoints import Checkpoint
from evomerge.merging.materialise import Materialiser, load_model
from evomerge.merging.placement import spread
from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.scoring.key_values import Segment, growing_cache, read_once, shared_cache

LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
LLAMA |= {"num_hidden_layers": 12, "max_position_embeddings": 64}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "tied": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(vocab_size=64, n_embd=32, n_layer=12, n_head=2),
    "mixtral": lambda: MixtralConfig(**LLAMA, num_key_value_heads=2, num_local_experts=2),
}


def _empty(name: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIGS[name]())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_layers_lie_in_order_about_as_many_bytes_on_each_device(name: str, count: int) -> None:
    model = _empty(name)
    placed = spread(model, [f"cuda:{number}" for number in range(count)], torch.bfloat16)
    held = dict.fromkeys(range(count), 0)
    layers = []
    for module, device in placed.items():
        held[device] += sum(p.numel() for p in model.get_submodule(module).parameters())
        if module.rpartition(".")[2].isdigit():
            layers.append(device)
    assert layers == sorted(layers)
    assert len(layers) == 12, "no layer is torn apart"
    total = sum(p.numel() for p in model.parameters())
    assert max(held.values()) <= 1.5 * total / count
    assert min(held.values()) >= 0.5 * total / count
    named = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert all(any(n == m or n.startswith(f"{m}.") for m in placed) for n in named)


def test_tied_weights_stay_together_and_inputs_go_to_the_first_device() -> None:
    placed = spread(_empty("tied"), ["cuda:0", "cuda:1"], torch.bfloat16)
    assert placed["model.embed_tokens"] == placed["lm_head"] == 0


def test_a_model_that_was_spread_is_merged_into_as_any_other(tmp_path: Path) -> None:
    """Both places are this machine's memory; the weights are the same, bit for bit."""
    paths = [str(small_llama.save(tmp_path / name, seed=n)) for n, name in enumerate("ab")]
    models = {path: Checkpoint.open(path) for path in paths}
    base, source = map(ModelRef, paths)
    recipe = Recipe("task_arithmetic", base, (Source("b", source, {"weight": 0.5}),))
    states = []
    for others in ((), ("cpu",)):
        model, _ = load_model(models[paths[0]], "float32", "cpu", *others)
        Materialiser(model, models).write(recipe)
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors without values. This build of torch has two kinds of device to tell apart: "cpu" and
    "meta"; a cache's empty start, a constant on "meta", is the one thing that cannot be faked."""

    def start(self: Any, keys: Any, values: Any) -> None:
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys.new_empty(0), values.new_empty(0)

    monkeypatch.setattr(DynamicLayer, "lazy_initialization", start)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        yield


def _spread_over_fakes() -> Any:
    from accelerate import dispatch_model

    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    placed = spread(_meta_copy(), ["cpu", "meta"], torch.float32)
    for name, device in placed.items():
        for module in model.get_submodule(name).modules():
            for key, weight in module.named_parameters(recurse=False):
                moved = torch.empty(weight.shape, device=device)
                module._parameters[key] = torch.nn.Parameter(moved, requires_grad=False)
            for key, buffer in module.named_buffers(recurse=False):
                module._buffers[key] = torch.empty(buffer.shape, device=device)
    skipped = model._skip_keys_device_placement
    return dispatch_model(model, placed, main_device="cpu", skip_keys=skipped)


def _meta_copy() -> Any:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return _empty("llama")


def _read(model: Any, rows: int, past: int, cache: Any) -> Any:
    positions = torch.arange(past, past + 5)[None].expand(rows, 5)
    mask = torch.ones(rows, past + 5, dtype=torch.long)
    tokens = torch.zeros(rows, 5, dtype=torch.long)
    return model(
        tokens, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
    )


@pytest.mark.usefixtures("fakes")
def test_shared_contexts_and_growing_caches_follow_their_layers() -> None:
    model = _spread_over_fakes()
    first = read_once(model, torch.zeros(1, 7, dtype=torch.long))
    assert {layer.keys.device.type for layer in first.cache.layers} == {"cpu", "meta"}
    rows = torch.zeros(3, dtype=torch.long)
    shared = shared_cache([Segment(first.cache, 7, rows)])
    assert _read(model, 3, 7, shared).logits.device.type == "cpu"
    growing = growing_cache(first, 3)
    assert _read(model, 3, 7, growing).logits.device.type == "cpu"
    growing.batch_select_indices(torch.tensor([0, 2]))
    assert {layer.keys.shape[0] for layer in growing.layers} == {2}
