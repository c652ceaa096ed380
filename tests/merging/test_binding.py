"""Where a checkpoint's tensors lie in a live model, whatever its architecture does to them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import small_llama
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    ConversionOps,
    Interleave,
    PermuteForRope,
    Transpose,
    WeightConverter,
)

from evomerge.checkpoints import Checkpoint
from evomerge.errors import MergeError, ShapeMismatch
from evomerge.merging.binding import Scattered, bind
from evomerge.merging.export import export
from evomerge.merging.materialise import Materialiser
from evomerge.merging.recipe import ModelRef, Recipe, Source

SHARDED = ("llama-tied", "mixtral", "deepseek_v3", "jamba", "hrm_text")


@pytest.mark.parametrize("name", sorted(tiny_models.CAUSAL))
def test_every_architecture_is_written_in_place(tmp_path: Path, name: str) -> None:
    """Half of one, half of the other: as transformers loads the export, and as it averages."""
    for seed, folder in enumerate(("one", "other")):
        tiny_models.causal(name, seed=seed).save_pretrained(tmp_path / "new")
        # As published files are: what transformers keeps in float32 is stored in float32.
        shard = "6KB" if name in SHARDED else "5GB"
        _load(tmp_path / "new").save_pretrained(tmp_path / folder, max_shard_size=shard)
    one, other = (_load(tmp_path / folder) for folder in ("one", "other"))
    expected = _average(one.state_dict(), other.state_dict())
    recipe = _halves(tmp_path / "one", tmp_path / "other")
    live = _load(tmp_path / "one")
    before = {key: tensor.data_ptr() for key, tensor in live.state_dict().items()}
    Materialiser(live, _open(recipe)).write(recipe)
    _assert_same(live.state_dict(), expected)
    assert {key: tensor.data_ptr() for key, tensor in live.state_dict().items()} == before
    export(recipe, tmp_path / "out")
    _assert_same(live.state_dict(), _load(tmp_path / "out").state_dict())


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def _halves(one: Path, other: Path) -> Recipe:
    sources = [Source(path.name, ModelRef(str(path)), {"weight": 0.5}) for path in (one, other)]
    return Recipe("linear", None, tuple(sources))


def _open(recipe: Recipe) -> dict[str, Checkpoint]:
    paths = [source.model.path for source in recipe.sources]
    return {path: Checkpoint.open(path) for path in paths}


def _average(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float32, rounded once to the dtype; integers are the first one's."""
    return {
        key: ((tensor.float() + other[key].float()) / 2).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for key, tensor in one.items()
    }


def _assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        assert torch.equal(tensor, other[key]), key


@pytest.mark.parametrize("name", sorted(tiny_models.VISION))
def test_models_of_images_and_text_are_bound(tmp_path: Path, name: str) -> None:
    saved, live = (tiny_models.vision(name, seed=seed) for seed in (1, 2))
    saved.save_pretrained(tmp_path / "new")
    loaded = type(saved).from_pretrained(tmp_path / "new", dtype="auto")
    loaded.save_pretrained(tmp_path / "again")
    for folder in ("new", "again"):
        _fill(live, Checkpoint.open(str(tmp_path / folder)))
        _assert_same(live.state_dict(), saved.state_dict())


def test_the_prefixes_of_older_files_of_images_and_text(tmp_path: Path) -> None:
    saved, live = (tiny_models.vision("llava", seed=seed) for seed in (1, 2))
    saved.save_pretrained(tmp_path)
    words = {
        "model.language_model.": "language_model.model.",
        "lm_head": "language_model.lm_head",
        "model.vision": "vision",
        "model.multi": "multi",
    }
    old = {_replaced(key, words): tensor for key, tensor in saved.state_dict().items()}
    assert not old.keys() & saved.state_dict().keys()
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _fill(live, Checkpoint.open(str(tmp_path)))
    _assert_same(live.state_dict(), saved.state_dict())


def _fill(live: Any, checkpoint: Checkpoint) -> None:
    for name, target in bind(live, checkpoint).items():
        target.copy_(checkpoint.tensor(name).view(-1))


def test_an_expert_of_the_checkpoint_is_a_region_of_the_fused_experts(tmp_path: Path) -> None:
    live = tiny_models.causal("mixtral")
    live.save_pretrained(tmp_path)
    targets = bind(live, Checkpoint.open(str(tmp_path)))
    experts = live.model.layers[1].mlp.experts
    up = targets["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    half = experts.gate_up_proj.shape[1] // 2
    assert up.data_ptr() == experts.gate_up_proj[2, half:].data_ptr()
    assert torch.equal(up.view(half, -1), experts.gate_up_proj[2, half:])


def test_a_stored_tensor_may_fill_several_live_ones(tmp_path: Path) -> None:
    live = tiny_models.causal("hrm_text")
    live.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    name = next(name for name in checkpoint.names if name.endswith("gqkv_proj.weight"))
    target = bind(live, checkpoint)[name]
    assert isinstance(target, Scattered)
    assert len(target.pieces) == 4
    with torch.no_grad():
        for piece, _, _ in target.pieces:
            piece.zero_()
    target.copy_(checkpoint.tensor(name).view(-1))
    _assert_same(live.state_dict(), _load(tmp_path).state_dict())


class _Permuted(ConversionOps):
    """Rows in another order, and transposed: a rearrangement that is no run of memory."""

    def convert(self, input_dict: Any, target_patterns: Any, **_: Any) -> Any:
        (tensor,) = next(iter(input_dict.values()))
        rows = tensor.reshape(2, -1, tensor.shape[1]).transpose(0, 1).reshape(tensor.shape)
        return {target_patterns[0]: rows.t().contiguous()}


class _Computed(ConversionOps):
    """Something else than moving weights."""

    def convert(self, input_dict: Any, target_patterns: Any, **_: Any) -> Any:
        (tensor,) = next(iter(input_dict.values()))
        return {target_patterns[0]: self.compute(tensor)}


class _Doubled(_Computed):
    def compute(self, tensor: Tensor) -> Tensor:
        return tensor * 2


class _Halved(_Computed):
    def compute(self, tensor: Tensor) -> Tensor:
        return tensor // 2


class _Float(_Computed):
    def compute(self, tensor: Tensor) -> Tensor:
        return tensor.float()


class _Repeated(_Computed):
    def compute(self, tensor: Tensor) -> Tensor:
        return tensor[:1].expand_as(tensor)


class _Shuffled(_Computed):
    def compute(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(1))
        return tensor.reshape(-1)[order].view(tensor.shape)


def _converted_llama(
    folder: Path, operations: list[ConversionOps], targets: tuple[str, ...] = ("o_proj",)
) -> tuple[Any, Checkpoint]:
    """A Llama whose files hold `weird`, which transformers is told to convert to `targets`."""
    small_llama.save(folder)
    patterns = [f"self_attn.{target}.weight" for target in targets]
    rule = WeightConverter("self_attn.weird", patterns, operations=operations)
    register_checkpoint_conversion_mapping("llama", [rule], overwrite=True)
    stored = load_file(folder / "model.safetensors")
    for layer in range(2):
        inputs = [stored.pop(f"model.layers.{layer}.{pattern}") for pattern in patterns]
        stored[f"model.layers.{layer}.self_attn.weird"] = torch.cat(inputs, dim=-1)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return small_llama.build(seed=99), Checkpoint.open(str(folder))


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    from transformers import conversion_mapping as mapping

    mapping.get_checkpoint_conversion_mapping("llama")  # builds the table
    name = "_checkpoint_conversion_mapping_cache"
    monkeypatch.setattr(mapping, name, copy.copy(getattr(mapping, name)))
    monkeypatch.setattr(mapping, "USER_REGISTERED_MAPPINGS", set())


ONE, TWO = ("o_proj",), ("k_proj", "v_proj")


@pytest.mark.usefixtures("conversions")
@pytest.mark.parametrize(
    ("operations", "targets"),
    [
        ([_Permuted()], ONE),
        ([Transpose(0, 1)], ONE),
        ([Interleave(0)], ONE),
        ([Interleave(1)], ONE),
        ([Interleave(0, inverse=True)], ONE),
        ([PermuteForRope()], ONE),
        ([Chunk(1)], TWO),
        ([Interleave(1), Chunk(1)], TWO),
        ([Chunk(1), PermuteForRope()], TWO),
    ],
)
def test_a_permuted_tensor_is_written_where_transformers_loads_it(
    tmp_path: Path, operations: list[ConversionOps], targets: tuple[str, ...]
) -> None:
    live, checkpoint = _converted_llama(tmp_path, operations, targets)
    for name, target in bind(live, checkpoint).items():
        assert isinstance(target, Scattered) == ("weird" in name)
        target.copy_(checkpoint.tensor(name).view(-1))
    _assert_same(live.state_dict(), _load(tmp_path).state_dict())


@pytest.mark.usefixtures("conversions")
@pytest.mark.parametrize("operation", [_Doubled(), _Shuffled(), _Halved(), _Repeated(), _Float()])
def test_a_conversion_that_is_no_rearrangement(tmp_path: Path, operation: ConversionOps) -> None:
    live, checkpoint = _converted_llama(tmp_path, [operation])
    with pytest.raises(MergeError, match=r"self_attn\.weird: loading does more than move"):
        bind(live, checkpoint)


def test_legacy_names(tmp_path: Path) -> None:
    """BERT's first checkpoints: `gamma` and `beta`, tensors of the pooler, no inner prefix."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16,
    )  # fmt: skip
    old = tiny_models.randomised(BertForMaskedLM(config), 1)
    old.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    words = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    legacy = {_replaced(key, words): tensor.clone() for key, tensor in stored.items()}
    save_file(legacy, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(str(tmp_path))
    assert any(name.endswith("gamma") for name in checkpoint.names)
    live = tiny_models.randomised(BertForMaskedLM(config), 2)
    _fill(live, checkpoint)
    _assert_same(live.state_dict(), old.state_dict())


def _replaced(key: str, words: dict[str, str]) -> str:
    for old, new in words.items():
        key = key.replace(old, new)
    return key


def test_a_missing_expert_and_an_expert_too_many(tmp_path: Path) -> None:
    live = tiny_models.causal("mixtral")
    live.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    one = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    save_file({k: v for k, v in stored.items() if k != one}, tmp_path / "model.safetensors")
    with pytest.raises(ShapeMismatch, match=r"experts\.0\.w2.* \[3, .* the live model is \[4, "):
        bind(live, Checkpoint.open(str(tmp_path)))
    more = {**stored, one.replace("experts.3", "experts.4"): stored[one].clone()}
    save_file(more, tmp_path / "model.safetensors")
    with pytest.raises(ShapeMismatch, match=r"experts\.0\.w2.* \[5, .* the live model is \[4, "):
        bind(live, Checkpoint.open(str(tmp_path)))


def test_two_names_for_one_live_tensor(tmp_path: Path) -> None:
    folder = small_llama.save(tmp_path / "m")
    stored = load_file(folder / "model.safetensors")
    both = {**stored, "norm.weight": stored["model.norm.weight"].clone()}
    save_file(both, folder / "model.safetensors")
    with pytest.raises(MergeError, match=r"norm\.weight both fill model\.norm\.weight"):
        bind(small_llama.build(), Checkpoint.open(str(folder)))
