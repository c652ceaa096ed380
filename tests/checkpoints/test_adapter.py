"""A model seen through an adapter: the weights that peft merges, and every way it can be wrong."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_adapters
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints.adapted import Adapted, open_model, open_models, split_adapter
from evomerge.checkpoints.adapter import Adapter
from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.compare import compare
from evomerge.errors import CheckpointError, MissingTensor, PickleRefused, ShapeMismatch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUERY = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

LLAMA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 12},
    "all-linear": {"target_modules": "all-linear", "r": 2},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "r": 4, "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "up_proj"], "r": 4, "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"k_proj": 2, "layers.1.self_attn.q_proj": 6},
        "alpha_pattern": {"^model.layers.0.mlp.up_proj": 3, "k_proj": 5},
    },
    "rslora-patterns": {
        "target_modules": ["q_proj", "k_proj"],
        "use_rslora": True,
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"q_proj": 5},
    },
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 4},
    "embedding-dora": {"target_modules": ["embed_tokens", "q_proj"], "r": 4, "use_dora": True},
    "modules-to-save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "bias-all": {"target_modules": ["q_proj"], "bias": "all"},
    "bias-lora": {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only", "use_dora": True},
}
GPT2: dict[str, dict[str, Any]] = {
    "conv1d": {"target_modules": ["c_attn", "c_proj"], "r": 4, "fan_in_fan_out": True},
    "conv1d-square": {"target_modules": [r"attn.c_proj"], "fan_in_fan_out": True},
    "conv1d-dora": {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "bias": "lora_only"},
    "conv1d-and-head": {"target_modules": ["c_attn", "c_proj", "wpe"], "r": 4},
}
MIXTRAL: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "o_proj"]},
    "experts": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "r": 2,
        "alpha_pattern": {"experts.down_proj": 3},
    },
    "one-parameter": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "r": 3},
    "experts-by-name": {"target_modules": ["w1", "w2", "w3"], "r": 2},
}
CASES = [
    pytest.param(build, lora, id=f"{build.__name__}-{name}")
    for build, group in (
        (small_adapters.llama, LLAMA),
        (small_adapters.gpt2, GPT2),
        (small_adapters.mixtral, MIXTRAL),
    )
    for name, lora in group.items()
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_adapters.llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def lora(base: Path) -> Path:
    return small_adapters.train(base, base.parent / "lora", target_modules=["q_proj", "v_proj"])


@pytest.fixture
def broken(lora: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(lora, tmp_path / "broken"))


def _set(folder: Path, **settings: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(("build", "lora"), CASES)
def test_the_weights_are_those_that_peft_merges(
    build: Callable[[Path], Path], lora: dict[str, Any], tmp_path: Path
) -> None:
    base = build(tmp_path / "base")
    adapter = small_adapters.train(base, tmp_path / "lora", **lora)
    expected = Checkpoint.open(str(small_adapters.merged(base, adapter, tmp_path / "merged")))
    model = Adapted(Checkpoint.open(str(base)), Adapter.open(str(adapter)))
    assert model.names == expected.names
    changed = [n for n in model.names if not torch.equal(model.tensor(n), model.base.tensor(n))]
    assert changed
    for name in model.names:
        ours, theirs = model.tensor(name), expected.tensor(name)
        assert model.shape(name) == tuple(theirs.shape)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=1e-8, msg=name)


def test_a_bfloat16_base_loses_nothing_of_the_update(tmp_path: Path) -> None:
    base = small_adapters.llama(tmp_path / "base", dtype=torch.bfloat16)
    adapter = small_adapters.train(base, tmp_path / "lora", target_modules=["q_proj"], lora_alpha=1)
    expected = Checkpoint.open(str(small_adapters.merged(base, adapter, tmp_path / "merged")))
    model = open_model(f"{base}+{adapter}")
    assert model.dtype(QUERY) == torch.bfloat16  # what a checkpoint of it would hold
    torch.testing.assert_close(model.tensor(QUERY), expected.tensor(QUERY), rtol=2e-7, atol=1e-8)
    factors = Adapter.open(str(adapter)).factors[QUERY.removesuffix(".weight")]
    exact = factors.b.double() @ factors.a.double() / 8
    update = model.tensor(QUERY).double() - Checkpoint.open(str(base)).tensor(QUERY).double()
    assert torch.dist(update, exact) < 1e-5 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_half_precision_are_multiplied_in_float32(
    base: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    adapter = small_adapters.train(base, tmp_path / "lora", dtype=dtype, target_modules=["q_proj"])
    factors = Adapter.open(str(adapter)).factors[QUERY.removesuffix(".weight")]
    assert factors.a.dtype == dtype
    exact = Checkpoint.open(str(base)).tensor(QUERY) + factors.b.double() @ factors.a.double()
    model = open_model(f"{base}+{adapter}")
    torch.testing.assert_close(model.tensor(QUERY).double(), exact, rtol=1e-6, atol=1e-7)


TIED: dict[str, tuple[dict[str, Any], bool]] = {
    "elsewhere": ({"target_modules": ["q_proj"]}, True),
    "saved": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "saved-both": ({"target_modules": [], "modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "saved-tied": (
        {"target_modules": [], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "lora": ({"target_modules": ["embed_tokens"]}, False),
    "lora-tied": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
}


@pytest.mark.parametrize(("lora", "stays_tied"), TIED.values(), ids=list(TIED))
def test_tied_weights_are_those_that_peft_runs(
    lora: dict[str, Any], stays_tied: bool, tmp_path: Path
) -> None:
    """Against the adapter as it runs: peft's merge of LoRA on tied embeddings is another model."""
    base = small_adapters.llama(tmp_path / "base", tie=True)
    lora = {**lora, "target_modules": [*lora["target_modules"], "v_proj"]}
    adapter = small_adapters.train(base, tmp_path / "lora", **lora)
    expected = small_adapters.logits(small_adapters.adapted(base, adapter))
    model = open_model(f"{base}+{adapter}")
    assert (HEAD in model.tied_names) == stays_tied
    assert (HEAD in model.names) == (not stays_tied)
    assert HEAD in model
    ours = small_adapters.load(base)
    ours.lm_head.weight = torch.nn.Parameter(ours.lm_head.weight.clone())
    ours.load_state_dict({n: model.tensor(n) for n in {*model.names, HEAD}}, strict=True)
    torch.testing.assert_close(small_adapters.logits(ours), expected, rtol=1e-4, atol=1e-4)


def test_a_base_without_the_prefix_of_its_inner_model_is_found(tmp_path: Path) -> None:
    """As gpt2 lies on the hub."""
    base = small_adapters.gpt2(tmp_path / "base")
    adapter = small_adapters.train(base, tmp_path / "lora", target_modules=["c_attn"])
    whole = open_model(f"{base}+{adapter}")
    tensors = load_file(base / "model.safetensors")
    bare = {n.removeprefix("transformer."): t for n, t in tensors.items()}
    shutil.copytree(base, tmp_path / "bare")
    save_file(bare, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    model = open_model(f"{tmp_path / 'bare'}+{adapter}")
    for name in bare:
        assert torch.equal(model.tensor(name), whole.tensor(f"transformer.{name}"))


@pytest.mark.parametrize("square", [False, True])
def test_experts_that_the_checkpoint_holds_fused(tmp_path: Path, square: bool) -> None:
    """[experts, in, out], as GPT-OSS stores them; square ones lie as their neighbours do."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32 if square else 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    layers = {"num_hidden_layers": 1, "num_local_experts": 4, "pad_token_id": 0}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    model = GptOssForCausalLM(GptOssConfig(**size, **heads, **layers, **tokens))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path / "base")
    parameters = ["experts.down_proj"] if square else ["experts.gate_up_proj", "experts.down_proj"]
    adapter = small_adapters.train(
        tmp_path / "base", tmp_path / "lora", target_modules=[], target_parameters=parameters, r=2
    )
    merged = small_adapters.merged(tmp_path / "base", adapter, tmp_path / "merged")
    expected, ours = Checkpoint.open(str(merged)), open_model(f"{tmp_path / 'base'}+{adapter}")
    assert ours.tensor("model.layers.0.mlp.experts.down_proj").shape[0] == 4
    for name in expected.names:
        torch.testing.assert_close(
            ours.tensor(name), expected.tensor(name), rtol=2e-7, atol=1e-8, msg=name
        )


def test_resized_embeddings_are_told_by_the_config(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = small_adapters.load(base)
    model.resize_token_embeddings(70)
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    peft_model.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    ours = open_model(f"{base}+{tmp_path / 'lora'}")
    assert ours.config["vocab_size"] == 70
    assert ours.shape(EMBEDDING) == ours.shape(HEAD) == (70, 32)
    assert torch.equal(ours.tensor(EMBEDDING), model.get_input_embeddings().weight)
    problems = compare(Checkpoint.open(str(base)), {"resized": ours})
    assert any("[70, 32]" in problem for problem in problems)


def test_only_the_last_tensor_is_kept(base: Path, lora: Path) -> None:
    model = open_model(f"{base}+{lora}")
    value = QUERY.replace("q_proj", "v_proj")
    first = model.tensor(QUERY)
    assert model.tensor(QUERY) is first
    model.tensor(value)
    assert model.tensor(QUERY) is not first
    assert torch.equal(model.tensor(QUERY), first)


def test_blocks_are_the_flat_tensor(base: Path, lora: Path) -> None:
    model = open_model(f"{base}+{lora}")
    blocks = list(model.blocks(QUERY, 100))
    assert torch.equal(torch.cat(blocks), model.tensor(QUERY).flatten())
    blocks[0].zero_()
    assert not torch.equal(model.tensor(QUERY).flatten()[:100], blocks[0])


def test_a_tensor_that_is_not_there(base: Path, lora: Path) -> None:
    with pytest.raises(MissingTensor, match="nowhere"):
        open_model(f"{base}+{lora}").tensor("nowhere")


def test_the_digest_is_of_what_changes_values(base: Path, lora: Path, broken: Path) -> None:
    digest = open_model(f"{base}+{lora}").digest()
    assert digest != Checkpoint.open(str(base)).digest()
    _set(broken, lora_dropout=0.5, base_model_name_or_path="elsewhere", peft_version="0")
    assert open_model(f"{base}+{broken}").digest() == digest
    (broken / "tokenizer_config.json").write_text("{}")
    own = open_model(f"{base}+{broken}").digest()
    assert own != digest
    _set(broken, lora_alpha=9)
    assert open_model(f"{base}+{broken}").digest() not in (digest, own)


def test_the_digest_depends_on_every_factor(base: Path, lora: Path, broken: Path) -> None:
    digest = open_model(f"{base}+{lora}").digest()
    for key, tensor in load_file(lora / WEIGHTS).items():
        tensors = load_file(lora / WEIGHTS)
        tensors[key] = tensor.nextafter(torch.tensor(torch.inf))
        save_file(tensors, broken / WEIGHTS)
        assert open_model(f"{base}+{broken}").digest() != digest


def test_a_factor_with_nan_is_named(base: Path, broken: Path) -> None:
    tensors = load_file(broken / WEIGHTS)
    next(t for k, t in tensors.items() if "layers.0.self_attn.q_proj.lora_A" in k)[0, 0] = torch.nan
    save_file(tensors, broken / WEIGHTS)
    assert open_model(f"{base}+{broken}").scan().non_finite == (QUERY,)


def test_a_tokenizer_of_the_adapter_counts(base: Path, broken: Path) -> None:
    (broken / "tokenizer.json").write_text("{}")
    model = open_model(f"{base}+{broken}")
    assert isinstance(model, Adapted)
    assert model.companion("tokenizer.json") == broken.resolve() / "tokenizer.json"
    assert model.companion("tokenizer_config.json") == base.resolve() / "tokenizer_config.json"
    assert model.companion("config.json") == base.resolve() / "config.json"


def test_it_compares_as_a_checkpoint(base: Path, lora: Path) -> None:
    model = open_model(f"{base}+{lora}")
    assert compare(Checkpoint.open(str(base)), {"lora": model}) == []


def test_a_plus_means_an_adapter_unless_such_a_folder_exists(
    base: Path, lora: Path, tmp_path: Path
) -> None:
    plus = Path(shutil.copytree(base, tmp_path / "a+b"))
    assert isinstance(open_model(str(plus)), Checkpoint)
    assert isinstance(open_model(f"{plus}+{lora}"), Adapted)
    assert split_adapter(f"{plus}+{lora}") == (str(plus), str(lora))
    assert split_adapter("org/base+org/lora") == ("org/base", "org/lora")
    assert split_adapter(str(base)) == (str(base), None)


def test_adapters_of_one_base_share_it(base: Path, lora: Path, broken: Path) -> None:
    models = open_models([str(base), f"{base}+{lora}", f"{base}+{broken}", str(lora)])
    bases = {id(m.base if isinstance(m, Adapted) else m) for m in models.values()}
    assert len(models) == 4
    assert len(bases) == 1


def test_an_adapter_alone_brings_its_base(
    base: Path, lora: Path, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_model(str(lora)).names == Checkpoint.open(str(base)).names  # absolute, by peft
    _set(broken, base_model_name_or_path=os.path.relpath(base, broken))
    monkeypatch.chdir(base.parent.parent)  # where that path leads nowhere
    assert open_model(str(broken)).digest() == open_model(f"{base}+{broken}").digest()


@pytest.mark.parametrize("named", [None, "no/such/base"])
def test_an_adapter_whose_base_cannot_be_found(broken: Path, named: str | None) -> None:
    _set(broken, base_model_name_or_path=named)
    with pytest.raises(CheckpointError, match=rf"BASE\+{broken}"):
        open_model(str(broken))


def test_another_base_of_the_same_shape_is_a_warning(
    base: Path, lora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    with caplog.at_level(logging.WARNING):
        open_model(f"{base}+{lora}")
        assert not caplog.records
        open_model(f"{other}+{lora}")
    assert [record.message for record in caplog.records] == [
        f"adapter {lora} was trained on {base}, not on {other}"
    ]


def test_another_base_of_another_shape(lora: Path, tmp_path: Path) -> None:
    other = small_adapters.llama(tmp_path / "other", hidden_size=40, num_attention_heads=5)
    with pytest.raises(ShapeMismatch, match=r"q_proj: adapter .*\[32, 32\].*\[40, 40\]"):
        open_model(f"{other}+{lora}")


def test_another_base_without_the_module(lora: Path, tmp_path: Path) -> None:
    other = small_adapters.gpt2(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj: adapter .* has no"):
        open_model(f"{other}+{lora}")


def test_a_saved_module_of_another_shape(base: Path, broken: Path) -> None:
    tensors = load_file(broken / WEIGHTS) | {"base_model.model.model.norm.weight": torch.ones(7)}
    save_file(tensors, broken / WEIGHTS)
    with pytest.raises(ShapeMismatch, match=r"norm\.weight: adapter .*\[7\].*\[32\]"):
        open_model(f"{base}+{broken}")


@pytest.mark.parametrize("kind", ["IA3", "VERA", "LOHA", "LOKR", "ADALORA", "PROMPT_TUNING", None])
def test_other_kinds_of_adapters_are_refused_by_name(broken: Path, kind: str | None) -> None:
    _set(broken, peft_type=kind)
    with pytest.raises(CheckpointError, match=f"is a {kind} adapter; only LoRA"):
        Adapter.open(str(broken))


SETTINGS: dict[str, Any] = {
    "lora_bias": True,
    "trainable_token_indices": [3],
    "layer_replication": [[0, 2]],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "init_lora_weights": "pissa_niter_4",
}


@pytest.mark.parametrize(("name", "value"), SETTINGS.items(), ids=list(SETTINGS))
def test_settings_of_another_meaning_are_refused_by_name(
    broken: Path, name: str, value: Any
) -> None:
    _set(broken, **{name: value})
    with pytest.raises(CheckpointError, match=name if name != "init_lora_weights" else "pissa"):
        Adapter.open(str(broken))


def test_a_pickle_is_refused(broken: Path) -> None:
    (broken / WEIGHTS).rename(broken / "adapter_model.bin")
    with pytest.raises(PickleRefused, match="save_pretrained"):
        Adapter.open(str(broken))


def test_a_truncated_file_is_named(broken: Path) -> None:
    path = broken / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: not a whole safetensors file"):
        Adapter.open(str(broken))


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_a_config_that_cannot_be_read(broken: Path, content: str | None) -> None:
    (broken / CONFIG).unlink()
    if content is not None:
        (broken / CONFIG).write_text(content)
    with pytest.raises(CheckpointError, match=CONFIG):
        Adapter.open(str(broken))


def test_a_factor_that_is_missing(broken: Path) -> None:
    tensors = load_file(broken / WEIGHTS)
    lost = next(key for key in tensors if "lora_B" in key)
    del tensors[lost]
    save_file(tensors, broken / WEIGHTS)
    with pytest.raises(CheckpointError, match="has no lora_B"):
        _ = Adapter.open(str(broken)).factors


def test_a_rank_that_the_config_does_not_give(broken: Path) -> None:
    _set(broken, r=5)
    with pytest.raises(CheckpointError, match="rank 5"):
        _ = Adapter.open(str(broken)).factors


def test_a_tensor_of_unknown_meaning(base: Path, broken: Path) -> None:
    tensors = load_file(broken / WEIGHTS) | {"base_model.model.hada_w1_a": torch.ones(2, 2)}
    save_file(tensors, broken / WEIGHTS)
    with pytest.raises(CheckpointError, match="hada_w1_a is not a tensor of a LoRA adapter"):
        open_model(f"{base}+{broken}")


def test_factors_of_a_convolution(broken: Path) -> None:
    tensors = {k: t[..., None, None] for k, t in load_file(broken / WEIGHTS).items()}
    save_file(tensors, broken / WEIGHTS)
    with pytest.raises(CheckpointError, match="convolutions"):
        _ = Adapter.open(str(broken)).factors
