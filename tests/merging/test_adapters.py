"""Adapters merged as adapters and extracted from models, against peft and dense float64 algebra."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_adapters
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evomerge.checkpoints.adapted import open_model, open_models
from evomerge.checkpoints.adapter import Adapter, Factors
from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.errors import (
    CheckpointError,
    ExportError,
    MergeError,
    NonFiniteTensor,
    ShapeMismatch,
    SpecError,
)
from evomerge.merging.adapters import Kept, concatenate, merge_adapters, truncate, write_adapter
from evomerge.merging.extraction import extract, low_rank
from evomerge.merging.merge import Merge
from evomerge.merging.methods.registry import METHODS
from evomerge.merging.recipe import ModelRef, Recipe, Source

WEIGHTS = [0.7, -0.4]
NAMES = ("one", "two")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_adapters.llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def trained(base: Path) -> list[Path]:
    """Of different ranks, scales and modules, with an embedding."""
    modules = (["q_proj", "v_proj", "embed_tokens"], ["q_proj", "up_proj", "embed_tokens"])
    return [
        small_adapters.train(
            base, base.parent / "one", target_modules=modules[0], r=4, lora_alpha=6, seed=1
        ),
        small_adapters.train(
            base,
            base.parent / "two",
            target_modules=modules[1],
            r=3,
            rank_pattern={"up_proj": 5},
            use_rslora=True,
            seed=2,
        ),
    ]


def _merge(paths: list[Path], folder: Path, **options: Any) -> list[Kept]:
    weights = options.pop("weights", WEIGHTS)
    config, tensors, kept = merge_adapters(
        [Adapter.open(str(p)) for p in paths], weights, **options
    )
    write_adapter(folder, config, tensors)
    return kept


def _dense(path: Path) -> dict[str, Tensor]:
    """Updates in float64, [out, in], by module."""
    factors = Adapter.open(str(path)).factors
    return {m: f.scale * (f.b.double() @ f.a.double()) for m, f in factors.items()}


def _sum(paths: list[Path], weights: list[float] = WEIGHTS) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for path, weight in zip(paths, weights, strict=True):
        for module, update in _dense(path).items():
            total[module] = total.get(module, 0) + weight * update
    return total


def test_concatenated_factors_are_the_exact_sum(trained: list[Path], tmp_path: Path) -> None:
    assert _merge(trained, tmp_path / "out") == []
    expected, merged = _sum(trained), _dense(tmp_path / "out")
    assert merged.keys() == expected.keys()
    for module, update in expected.items():
        torch.testing.assert_close(merged[module], update, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_peft_merges_to_the_same_weights(
    kind: str, base: Path, trained: list[Path], tmp_path: Path
) -> None:
    model = small_adapters.adapted(base, *trained)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["0", "1"], WEIGHTS, "merged", combination_type=kind, svd_rank=3)
        model.set_adapter("merged")
    expected = small_adapters.logits(model)
    _merge(trained, tmp_path / "out", rank=None if kind == "cat" else 3)
    ours = small_adapters.adapted(base, tmp_path / "out")
    torch.testing.assert_close(small_adapters.logits(ours), expected, rtol=1e-4, atol=1e-5)
    deltas = [
        {n: m.get_delta_weight(name) for n, m in x.named_modules() if hasattr(m, "lora_A")}
        for x, name in ((model, "merged"), (ours, "0"))
    ]
    assert deltas[0].keys() == deltas[1].keys()
    for name, theirs in deltas[0].items():
        torch.testing.assert_close(deltas[1][name], theirs, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("rank", [1, 3, 7, 99])
def test_truncation_is_the_best_of_its_rank(rank: int, trained: list[Path], tmp_path: Path) -> None:
    kept = {k.name: k for k in _merge(trained, tmp_path / "out", rank=rank)}
    merged = _dense(tmp_path / "out")
    for module, exact in _sum(trained).items():
        sigma = torch.linalg.svdvals(exact)
        best = sigma[rank:].norm()
        assert torch.dist(merged[module], exact) <= best + 1e-5 * exact.norm()
        assert kept[module].share == pytest.approx(float(1 - best**2 / exact.norm() ** 2), abs=1e-6)
        assert kept[module].norm == pytest.approx(float(exact.norm()), rel=1e-6)
        assert kept[module].rank <= rank


def test_truncation_by_hand() -> None:
    """B A = diag(3, 2, 0): rank 1 keeps 9 of 13."""
    factors = Factors("m", torch.tensor([[3.0, 0, 0], [0, 1, 0]]), torch.eye(3)[:, :2], 1.0)
    factors = replace(factors, b=factors.b * torch.tensor([1.0, 2.0]))
    kept, share, norm = truncate(factors, 1)
    torch.testing.assert_close(kept.b @ kept.a, torch.diag(torch.tensor([3.0, 0, 0])))
    assert share == pytest.approx(9 / 13)
    assert norm == pytest.approx(13**0.5)


def test_an_update_of_zero_stays_zero(trained: list[Path], tmp_path: Path) -> None:
    kept = _merge(trained, tmp_path / "out", weights=[0.0, 0.0], rank=2)
    assert {k.share for k in kept} == {1.0}
    assert all(not update.any() for update in _dense(tmp_path / "out").values())


def test_opposite_adapters_cancel(trained: list[Path], tmp_path: Path) -> None:
    _merge([trained[0], trained[0]], tmp_path / "out", weights=[1.0, -1.0])
    for update in _dense(tmp_path / "out").values():
        torch.testing.assert_close(update, torch.zeros_like(update), rtol=0, atol=1e-7)


def test_adapters_of_other_shapes_are_refused() -> None:
    one = Factors("m", torch.ones(2, 3), torch.ones(4, 2), 1.0)
    other = replace(one, a=torch.ones(2, 5))
    with pytest.raises(ShapeMismatch, match=r"m: .*\[4, 3\].*\[4, 5\]"):
        concatenate("m", [(1.0, one), (1.0, other)])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"target_modules": ["q_proj"], "use_dora": True}, "DoRA"),
    "saved": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head.weight"),
    "bias": ({"target_modules": ["q_proj"], "bias": "lora_only"}, "q_proj.bias"),
}


@pytest.mark.parametrize(("lora", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_more_than_a_sum_of_products_is_refused(
    lora: dict[str, Any], reason: str, base: Path, tmp_path: Path
) -> None:
    path = small_adapters.train(base, tmp_path / "lora", **lora)
    with pytest.raises(MergeError, match=reason):
        _merge([path, path], tmp_path / "out")


def test_a_weight_for_each_adapter(trained: list[Path]) -> None:
    with pytest.raises(MergeError, match="2 adapters, but 1 weights"):
        merge_adapters([Adapter.open(str(p)) for p in trained], [1.0])


def test_nan_in_an_adapter_is_named(trained: list[Path], tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for path in trained[0].iterdir():
        (tmp_path / "bad" / path.name).write_bytes(path.read_bytes())
    tensors = load_file(trained[0] / "adapter_model.safetensors")
    next(t for k, t in tensors.items() if "layers.1.self_attn.v_proj.lora_B" in k)[0] = torch.nan
    save_file(tensors, tmp_path / "bad" / "adapter_model.safetensors")
    with pytest.raises(NonFiniteTensor, match=r"layers\.1\.self_attn\.v_proj"):
        _merge([tmp_path / "bad", trained[1]], tmp_path / "out", rank=2)


def test_a_folder_that_exists_is_left_alone(trained: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(ExportError, match="exists already"):
        _merge(trained, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evomerge.merging.adapters.save_file", full)
    with pytest.raises(ExportError, match="does not fit on the disk"):
        write_adapter(tmp_path / "out", {}, {"a": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear", "slerp", "dare_ties"])
def test_a_merge_through_adapters_is_the_merge_of_the_merged(
    method: str, base: Path, tmp_path: Path
) -> None:
    """Sources seen through adapters, or merged into checkpoints by peft in float32 before."""
    lora = {"target_modules": "all-linear", "r": 2}
    adapters = [
        small_adapters.train(base, tmp_path / n, seed=i, **lora) for i, n in enumerate(NAMES)
    ]
    ours = [f"{base}+{adapter}" for adapter in adapters]
    theirs = [str(small_adapters.merged(base, a, a.parent / f"{a.name}-merged")) for a in adapters]
    merges = []
    for paths in (ours, theirs):
        weighted = "weight" in {parameter.name for parameter in METHODS[method].parameters}
        sources = tuple(
            Source(name, ModelRef(path), {"weight": 0.6} if weighted else {})
            for name, path in zip(NAMES, paths, strict=True)
        )
        recipe = Recipe(method, ModelRef(str(base)), sources)
        merges.append(Merge(recipe, open_models([str(base), *paths])))
    for name in merges[0].names:
        one, other = (merge.tensor(name) for merge in merges)
        assert one.dtype == torch.float32
        close = torch.isclose(one, other, rtol=1e-5, atol=1e-6)
        # An entry at a threshold of TIES may fall on either side of it.
        assert close.float().mean() >= (0.995 if "ties" in method else 1.0)


ROUND_TRIPS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "llama": (small_adapters.llama, {"target_modules": "all-linear", "r": 3}, 3),
    "ranks": (
        small_adapters.llama,
        {"target_modules": ["q_proj", "up_proj"], "r": 2, "rank_pattern": {"up_proj": 4}},
        4,
    ),
    "head": (small_adapters.llama, {"target_modules": ["lm_head", "v_proj"], "r": 2}, 2),
    "saved": (
        small_adapters.llama,
        {
            "target_modules": ["q_proj"],
            "r": 2,
            "bias": "all",
            "modules_to_save": ["embed_tokens", "norm"],
        },
        2,
    ),
    "gpt2": (small_adapters.gpt2, {"target_modules": ["c_attn", "c_proj"], "bias": "all"}, 8),
    "mixtral": (small_adapters.mixtral, {"target_modules": ["q_proj"], "r": 2}, 2),
}


@pytest.mark.parametrize(("build", "lora", "rank"), ROUND_TRIPS.values(), ids=list(ROUND_TRIPS))
def test_an_adapter_comes_back_from_the_model_it_made(
    build: Any, lora: dict[str, Any], rank: int, tmp_path: Path
) -> None:
    base = build(tmp_path / "base")
    adapter = small_adapters.train(base, tmp_path / "lora", **lora)
    merged = small_adapters.merged(base, adapter, tmp_path / "merged")
    found = extract(Checkpoint.open(str(base)), Checkpoint.open(str(merged)), rank=rank)
    write_adapter(tmp_path / "out", found.config, found.tensors)
    assert found.lost == []
    assert found.share == pytest.approx(1, abs=1e-6)
    ours, theirs = _dense(tmp_path / "out"), _dense(adapter)
    assert ours.keys() == theirs.keys()
    for module, update in theirs.items():
        torch.testing.assert_close(ours[module], update, rtol=1e-3, atol=1e-5)
    loaded = small_adapters.adapted(base, tmp_path / "out")
    expected = small_adapters.logits(small_adapters.load(merged))
    torch.testing.assert_close(small_adapters.logits(loaded), expected, rtol=1e-3, atol=1e-4)
    seen = open_model(str(tmp_path / "out"))  # its config names the base
    for name in Checkpoint.open(str(merged)).names:
        torch.testing.assert_close(
            seen.tensor(name), Checkpoint.open(str(merged)).tensor(name), rtol=1e-3, atol=1e-5
        )


def test_a_tied_embedding_is_saved_for_both_of_its_names(tmp_path: Path) -> None:
    base = small_adapters.llama(tmp_path / "base", tie=True)
    model = small_adapters.llama(tmp_path / "model", tie=True, seed=1)
    found = extract(Checkpoint.open(str(base)), Checkpoint.open(str(model)), rank=99)
    write_adapter(tmp_path / "out", found.config, found.tensors)
    loaded = small_adapters.adapted(base, tmp_path / "out")
    expected = small_adapters.logits(small_adapters.load(model))
    torch.testing.assert_close(small_adapters.logits(loaded), expected, rtol=1e-3, atol=1e-3)
    seen = open_model(str(tmp_path / "out"))
    assert "lm_head.weight" in seen.tied_names


@pytest.fixture(scope="module")
def pair(base: Path) -> tuple[Checkpoint, Checkpoint]:
    """Two unrelated models: their difference is of full rank everywhere."""
    other = small_adapters.llama(base.parent / "other", seed=5)
    return Checkpoint.open(str(base)), Checkpoint.open(str(other))


def test_what_is_kept_is_the_best_of_its_rank(pair: tuple[Checkpoint, Checkpoint]) -> None:
    found = extract(*pair, rank=5)
    base, model = pair
    for change in found.kept:
        difference = model.tensor(change.name).double() - base.tensor(change.name).double()
        energy = torch.linalg.svdvals(difference).square()
        assert change.rank == 5
        assert change.share == pytest.approx(float(energy[:5].sum() / energy.sum()), abs=1e-5)
        assert change.norm == pytest.approx(float(energy.sum().sqrt()), rel=1e-6)
    total = sum(change.norm**2 for change in found.kept)
    assert found.share == pytest.approx(sum(c.share * c.norm**2 for c in found.kept) / total)


def test_no_more_rank_than_the_energy_asks_for(pair: tuple[Checkpoint, Checkpoint]) -> None:
    found = extract(*pair, rank=30, energy=0.6)
    every = {c.name: c for c in extract(*pair, rank=30).kept}
    assert len({change.rank for change in found.kept}) > 1  # so the config needs patterns
    for change in found.kept:
        assert 0.6 <= change.share < every[change.name].share
        one_less = extract(*pair, rank=change.rank - 1, only=f"^{change.name}$")
        assert one_less.kept[0].share < 0.6


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"only": r"layers\.1\..*(q|k)_proj\.weight"}, {"q_proj", "k_proj"}),
        ({"exclude": "mlp|embed|norm|lm_head|[vo]_proj|bias"}, {"q_proj", "k_proj"}),
    ],
)
def test_what_is_left_out_is_told(
    options: dict[str, str], kept: set[str], pair: tuple[Checkpoint, Checkpoint]
) -> None:
    found = extract(*pair, rank=2, **options)
    assert {change.name.split(".")[-2] for change in found.kept} == kept
    assert found.whole == []
    assert {c.name for c in found.kept + found.lost} == {
        name for name in pair[0].names if not torch.equal(*(model.tensor(name) for model in pair))
    }
    embedding = next(c for c in found.lost if c.name == "model.embed_tokens.weight")
    exact = torch.dist(*(m.tensor(embedding.name).double() for m in pair))
    assert embedding.norm == pytest.approx(float(exact), rel=1e-6)
    assert found.share < 0.5


def test_experts_are_told_as_lost(tmp_path: Path) -> None:
    base = small_adapters.mixtral(tmp_path / "base")
    adapter = small_adapters.train(
        base, tmp_path / "lora", target_modules=["q_proj"], target_parameters=["experts.down_proj"]
    )
    merged = small_adapters.merged(base, adapter, tmp_path / "merged")
    found = extract(Checkpoint.open(str(base)), Checkpoint.open(str(merged)), rank=8)
    assert len(found.kept) == 2
    assert {c.name.split(".")[-2] for c in found.lost} == {"w2"}
    assert len(found.lost) == 8


def test_any_merge_of_adapters_can_be_extracted(base: Path, tmp_path: Path) -> None:
    """Through models that are never on disk: what the guide tells for TIES of adapters."""
    adapter = small_adapters.train(base, tmp_path / "lora", target_modules=["q_proj"], r=2)
    found = extract(Checkpoint.open(str(base)), open_model(f"{base}+{adapter}"), rank=2)
    write_adapter(tmp_path / "out", found.config, found.tensors)
    for module, update in _dense(adapter).items():
        torch.testing.assert_close(_dense(tmp_path / "out")[module], update, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(600, 500), (500, 600)])
def test_a_large_weight_is_decomposed_at_random_as_well_as_in_full(
    shape: tuple[int, int],
) -> None:
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(n, 500, generator=generator)).Q for n in shape)
    difference = u * torch.arange(1, 501).pow(-0.5) @ v.mT
    b, a, share, norm = low_rank(difference, 8)
    energy = torch.linalg.svdvals(difference.double()).square()
    best = float(energy[:8].sum() / energy.sum())
    assert best - 1e-3 < share < best + 1e-6
    missed = torch.dist(difference.double(), b.double() @ a.double()).square()
    assert share == pytest.approx(float(1 - missed / norm**2), abs=1e-5)
    again = low_rank(difference, 8)
    assert torch.equal(again[0], b)


def test_models_that_are_equal(pair: tuple[Checkpoint, Checkpoint]) -> None:
    with pytest.raises(CheckpointError, match="no linear weight differs"):
        extract(pair[0], pair[0], rank=2)


def test_models_of_other_shapes(pair: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    other = small_adapters.llama(tmp_path / "wide", intermediate_size=80)
    with pytest.raises(SpecError, match=r"\[64, 32\].*\[80, 32\]"):
        extract(pair[0], Checkpoint.open(str(other)), rank=2)


def test_nan_in_a_model_is_named(base: Path, tmp_path: Path) -> None:
    bad = small_adapters.llama(tmp_path / "bad", seed=5)
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteTensor, match=r"layers\.1\.mlp\.up_proj\.weight"):
        extract(Checkpoint.open(str(base)), Checkpoint.open(str(bad)), rank=2)


def test_an_architecture_that_transformers_does_not_know(base: Path, tmp_path: Path) -> None:
    strange = small_adapters.llama(tmp_path / "strange", seed=5)
    config = json.loads((strange / "config.json").read_text())
    config |= {"model_type": "strange", "architectures": ["StrangeForCausalLM"]}
    (strange / "config.json").write_text(json.dumps(config))
    model = Checkpoint.open(str(strange))
    with pytest.raises(CheckpointError, match="does not know this architecture"):
        extract(model, model, rank=2)


def test_progress_rises_to_one(pair: tuple[Checkpoint, Checkpoint]) -> None:
    told: list[float] = []
    extract(*pair, rank=2, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1
