"""A recipe into a live model: held to a naive float64 merge and to the exported checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_llama
import torch
from torch import Tensor

from evomerge.checkpoints import Checkpoint
from evomerge.errors import (
    CheckpointError,
    MergeError,
    MissingTensor,
    NonFiniteModel,
    ShapeMismatch,
    SpecError,
)
from evomerge.merging.materialise import Materialiser, bind, load_model
from evomerge.merging.merge import Merge
from evomerge.merging.methods import registry
from evomerge.merging.methods.base import Block, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.registry import METHODS
from evomerge.merging.prepared import Prepared
from evomerge.merging.recipe import ModelRef, Recipe, Source

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MANTISSA_BITS = {BF16: 7, FP16: 10, FP32: 23}
LEAST_EXPONENT = {BF16: -126, FP16: -14, FP32: -126}


def _models(folder: Path, count: int = 4, **options: object) -> dict[str, Checkpoint]:
    """A base and sources `s1`, `s2`, ... by path."""
    names = ["base", *(f"s{index}" for index in range(1, count))]
    for seed, name in enumerate(names):
        small_llama.save(folder / name, seed=seed, shard="20KB", **options)
    return {str(folder / name): Checkpoint.open(str(folder / name)) for name in names}


def _recipe(
    checkpoints: dict[str, Checkpoint], method: str, weights: list[float], **options: object
) -> Recipe:
    base, *sources = checkpoints
    weighted = "weight" in {parameter.name for parameter in registry.get(method).parameters}
    return Recipe(
        method,
        ModelRef(base),
        tuple(
            Source(Path(path).name, ModelRef(path), {"weight": weight} if weighted else {})
            for path, weight in zip(sources, weights, strict=False)
        ),
        **options,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return _models(tmp_path_factory.mktemp("models"))


def _live(**options: object) -> torch.nn.Module:
    return small_llama.build(seed=99, **options)


def _half_ulp(reference: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the gap between neighbours of `dtype` around float64 values."""
    exponent = torch.frexp(reference).exponent - 1
    least = exponent.clamp(min=LEAST_EXPONENT[dtype])
    return torch.ldexp(torch.ones_like(reference), least - MANTISSA_BITS[dtype] - 1)


def _linear(base: Tensor, sources: list[Tensor], weights: list[float]) -> Tensor:
    return sum(w * s for w, s in zip(weights, sources, strict=True)) / sum(weights)


def _task_arithmetic(base: Tensor, sources: list[Tensor], weights: list[float]) -> Tensor:
    return base + sum(w * (s - base) for w, s in zip(weights, sources, strict=True))


NAIVE = {"linear": _linear, "task_arithmetic": _task_arithmetic}
WEIGHTS = [0.7, 0.25, -0.3]


@pytest.mark.parametrize("method", sorted(NAIVE))
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_every_weight_is_the_float64_merge_rounded_once(
    tmp_path: Path, method: str, tie: bool, dtype: torch.dtype
) -> None:
    models = _models(tmp_path, dtype=dtype, tie=tie, extra={"steps": torch.tensor([3, 5])})
    live = _live(dtype=dtype, tie=tie, extra={"steps": torch.tensor([0, 0])})
    Materialiser(live, models).write(_recipe(models, method, WEIGHTS))
    base, *sources = models.values()
    state = live.state_dict()
    assert torch.equal(state.pop("model.steps"), torch.tensor([3, 5]))
    for name, tensor in state.items():
        inputs = [source.tensor(name).double() for source in sources]
        reference = NAIVE[method](base.tensor(name).double(), inputs, WEIGHTS)
        # What float32 arithmetic may add: a few roundings of terms no larger than these.
        arithmetic = 2**-22 * sum(map(torch.abs, [base.tensor(name).double(), *inputs]))
        error = (tensor.double() - reference).abs()
        assert (error <= _half_ulp(reference, dtype) + arithmetic).all(), name


def test_rounding_is_to_nearest_even(tmp_path: Path) -> None:
    models = _models(tmp_path, 2, dtype=FP32)
    live = _live()
    Materialiser(live, models).write(_recipe(models, "linear", [1.0], dtype="bfloat16"))
    source = list(models.values())[1]
    for name, tensor in live.state_dict().items():
        bits = source.tensor(name).view(torch.int32).long() & 0xFFFFFFFF
        nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        assert torch.equal(tensor.view(torch.int16).long() & 0xFFFF, nearest_even & 0xFFFF), name


@pytest.mark.parametrize("recipe_dtype", ["bfloat16", "float16", "float32", None])
def test_a_model_of_another_dtype_holds_the_recipes_values(
    models: dict[str, Checkpoint], recipe_dtype: str | None
) -> None:
    """bfloat16 checkpoints, a float32 model: what it computes with is what an export would hold."""
    recipe = _recipe(models, "task_arithmetic", WEIGHTS, dtype=recipe_dtype)
    live = _live(dtype=FP32)
    Materialiser(live, models).write(recipe)
    merge = Merge(recipe, models)
    wanted = getattr(torch, recipe_dtype or "bfloat16")
    for name, tensor in live.state_dict().items():
        rounded = merge.tensor(name).view(-1)
        assert rounded.dtype == wanted
        assert torch.equal(tensor.flatten(), rounded.float())


@pytest.mark.parametrize("method", sorted(m for m in METHODS if not METHODS[m].artifact))
def test_block_size_changes_no_bit(models: dict[str, Checkpoint], method: str) -> None:
    weights = WEIGHTS[: METHODS[method].max_sources]
    bounds = {parameter.name: parameter.low for parameter in METHODS[method].parameters}
    if bounds.get("weight") == 0:
        weights = [abs(weight) for weight in weights]
    recipe = _recipe(models, method, weights)
    whole = Merge(recipe, models)
    for size in (13, 1000, 2048):
        cut = Merge(recipe, models, block_size=size)
        for name in whole.names:
            one, many = (m.tensor(name) for m in (whole, cut))
            assert torch.equal(one.view(torch.int16), many.view(torch.int16)), (name, size)


def test_the_order_of_sources_changes_no_bit(models: dict[str, Checkpoint]) -> None:
    recipe = _recipe(models, "task_arithmetic", WEIGHTS)
    one, other = _live(), _live()
    Materialiser(one, models).write(recipe)
    Materialiser(other, models).write(replace(recipe, sources=recipe.sources[::-1]))
    _assert_same(one, other)


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    extra = {"logit_scale": torch.tensor(2.5), "nothing": torch.empty(0, 4)}
    models = _models(tmp_path, 3, extra=extra)
    live = _live(extra={"logit_scale": torch.tensor(0.0), "nothing": torch.empty(0, 4)})
    Materialiser(live, models).write(_recipe(models, "linear", [1.0, 1.0]))
    assert live.state_dict()["model.logit_scale"].item() == 2.5


def test_rotary_frequencies_are_copied_not_scaled(tmp_path: Path) -> None:
    frequencies = torch.tensor([1.0, 0.1])
    models = _models(tmp_path, 3, extra={"inv_freq": frequencies})
    live = _live(extra={"inv_freq": torch.zeros(2)})
    recipe = _recipe(models, "linear", [0.5, 0.2])
    Materialiser(live, models).write(replace(recipe, parameters={"normalize": False}))
    assert torch.equal(live.state_dict()["model.inv_freq"], frequencies)


def test_a_recipe_without_base(models: dict[str, Checkpoint]) -> None:
    recipe = _recipe(models, "linear", WEIGHTS)
    with_base, without = _live(), _live()
    Materialiser(with_base, models).write(recipe)
    Materialiser(without, models).write(replace(recipe, base=None))
    _assert_same(with_base, without)


def test_weights_are_written_in_place(models: dict[str, Checkpoint]) -> None:
    live = _live()
    before = {name: tensor.data_ptr() for name, tensor in live.state_dict().items()}
    Materialiser(live, models).write(_recipe(models, "linear", WEIGHTS))
    assert {name: tensor.data_ptr() for name, tensor in live.state_dict().items()} == before


def test_a_sequence_of_recipes_leaves_nothing_behind(models: dict[str, Checkpoint]) -> None:
    """Writing A, B, A gives what writing A to a fresh model gives, whatever was skipped."""
    by_type = [{"type": "mlp", "value": 0.9}, {"value": 0.2}]
    scalar = _recipe(models, "task_arithmetic", WEIGHTS)
    others = [
        replace(scalar, parameters={"lambda": by_type}),
        replace(scalar, method="linear"),
        replace(scalar, dtype="float16"),
        replace(scalar, sources=scalar.sources[:2]),
        replace(scalar, sources=tuple(replace(s, parameters={}) for s in scalar.sources)),
    ]
    live = _live()
    materialiser = Materialiser(live, models)
    for other in others:
        for recipe in (scalar, other, scalar, other):
            materialiser.write(recipe)
            fresh = _live()
            Materialiser(fresh, models).write(recipe)
            _assert_same(live, fresh)


def test_only_tensors_whose_parameters_changed_are_written(models: dict[str, Checkpoint]) -> None:
    recipe = _recipe(models, "task_arithmetic", WEIGHTS)
    live = _live()
    materialiser = Materialiser(live, models)
    materialiser.write(recipe)
    norm, up = live.model.norm.weight, live.model.layers[0].mlp.up_proj.weight
    norm.data.fill_(7)
    up.data.fill_(7)
    rules = [{"type": "mlp", "value": 0.5}, {"value": 1.0}]
    materialiser.write(replace(recipe, parameters={"lambda": rules}))
    assert (norm == 7).all()
    assert not (up == 7).any()


class _Surveying(MergeMethod):
    """Adds to the first source the sum of all weights of the model: every tensor needs them all."""

    name = "surveying"
    summary = formula = ""
    parameters = (Parameter("weight", "source", "float", 1.0, ""),)
    needs_base = False

    def survey(self, model: Any) -> float:
        self.seen = [known.tensor for known, _ in model()]
        return sum(known.source["weight"][0] for known, _ in model())

    def prepare(self, blocks: Any, coefficients: Coefficients, survey: Any) -> Any:
        return survey

    def merge(self, block: Block, coefficients: Coefficients, prepared: Any) -> Tensor:
        assert block.base is None
        return block.sources[0] + prepared


def test_a_method_that_surveys_the_model_writes_every_tensor_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = _Surveying()
    for known in ("METHODS", "ALL"):
        monkeypatch.setattr(registry, known, {**getattr(registry, known), method.name: method})
    models = _models(tmp_path, 2, dtype=FP32, extra={"steps": torch.tensor(3)})
    live = _live(dtype=FP32, extra={"steps": torch.tensor(0)})
    materialiser = Materialiser(live, models)
    _, source = models.values()
    for mlp in (1.0, 2.0):
        rules = [{"type": "mlp", "value": mlp}, {"value": 0.0}]
        recipe = _recipe(models, method.name, [0.0])
        own = replace(recipe.sources[0], parameters={"weight": rules})
        materialiser.write(replace(recipe, sources=(own,)))
        assert method.seen == [name for name in source.names if name != "model.steps"]
        expected = source.tensor("model.norm.weight") + 6 * mlp  # three mlp tensors in two layers
        assert torch.equal(live.model.norm.weight, expected)


def test_an_overflow_names_the_tensor_and_the_next_write_makes_the_model_whole(
    models: dict[str, Checkpoint],
) -> None:
    live, fresh = _live(), _live()
    materialiser = Materialiser(live, models, block_size=1)
    good = _recipe(models, "task_arithmetic", WEIGHTS, dtype="float16")
    materialiser.write(good)
    name = "model.layers.1.mlp.down_proj.weight"
    rules = [{"filter": name, "value": 1e6}, {"value": 1.0}]  # few of its weights overflow
    with pytest.raises(NonFiniteModel, match=rf"^{name}: .* is beyond torch.float16's largest"):
        materialiser.write(replace(good, parameters={"lambda": rules}))
    materialiser.write(good)
    Materialiser(fresh, models).write(good)
    _assert_same(live, fresh)


def test_nan_names_the_tensor(models: dict[str, Checkpoint]) -> None:
    recipe = _recipe(models, "task_arithmetic", [1e38, -1e38, 0.0], dtype="float32")
    recipe = replace(recipe, parameters={"lambda": 1e6})
    with pytest.raises(NonFiniteModel, match=r"^\S+weight: task_arithmetic computed NaN"):
        Materialiser(_live(), models).write(recipe)


def test_a_recipe_that_its_method_refuses(models: dict[str, Checkpoint]) -> None:
    recipe = replace(_recipe(models, "linear", WEIGHTS), dtype="float17")
    recipe = replace(recipe, parameters={"densty": 1.0})
    with pytest.raises(SpecError) as caught:
        Materialiser(_live(), models).write(recipe)
    assert len(caught.value.problems) == 2
    assert "did you mean 'float16'" in caught.value.problems[1]


def test_a_model_of_the_recipe_that_is_not_open(models: dict[str, Checkpoint]) -> None:
    base, *_ = models
    with pytest.raises(MergeError, match="s1: the recipe needs it"):
        Materialiser(_live(), {base: models[base]}).write(_recipe(models, "linear", [1.0]))


def test_a_source_that_lacks_a_tensor_or_has_another_shape(tmp_path: Path) -> None:
    models = _models(tmp_path, 2, extra={"scale": torch.ones(3)})
    recipe = _recipe(models, "linear", [1.0])
    path = recipe.sources[0].model.path
    lacking = Checkpoint.open(_fresh(tmp_path / "lacking"))
    wide = Checkpoint.open(_fresh(tmp_path / "wide", extra={"scale": torch.ones(4)}))
    live = _live(extra={"scale": torch.ones(3)})
    with pytest.raises(MissingTensor, match=r"model\.scale: not in checkpoint .*lacking"):
        Materialiser(live, {**models, path: lacking}).write(recipe)
    with pytest.raises(ShapeMismatch, match=r"model\.scale: .* \[3\], source 's1' is \[4\]"):
        Materialiser(live, {**models, path: wide}).write(recipe)


def _fresh(folder: Path, **options: object) -> str:
    return str(small_llama.save(folder, **options))


def test_a_live_model_with_other_tensors(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    base = next(iter(models.values()))
    with pytest.raises(MissingTensor, match=r"model\.scale: the live model has it"):
        bind(_live(extra={"scale": torch.ones(3)}), base)
    with pytest.raises(MissingTensor, match=r"model\.layers\.1\S*: .* has it, the live"):
        bind(_live(num_hidden_layers=1), base)
    with pytest.raises(ShapeMismatch, match=r"down_proj\S* .* the live model is \[32, 96\]"):
        bind(_live(intermediate_size=96), base)
    with pytest.raises(MergeError, match="the live model ties it to"):
        bind(_live(tie=True), base)
    tied = Checkpoint.open(_fresh(tmp_path / "tied", tie=True))
    with pytest.raises(MissingTensor, match=r"lm_head\.weight: the live model has it"):
        bind(_live(tie=False), tied)


def test_names_may_differ_by_the_inner_models_prefix(tmp_path: Path) -> None:
    """GPT-2's published checkpoint has `h.0...`, the live model `transformer.h.0...`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    live = GPT2LMHeadModel(config)
    live.transformer.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    targets = bind(live, checkpoint)
    assert "wte.weight" in checkpoint.names
    assert set(targets) == set(checkpoint.names)
    assert targets["wte.weight"].data_ptr() == live.lm_head.weight.data_ptr()


def test_stale_rotary_buffers_and_integer_buffers_in_a_checkpoint_are_ignored(
    tmp_path: Path,
) -> None:
    extra = {"steps": torch.tensor(7)}
    checkpoint = Checkpoint.open(_fresh(tmp_path / "m", extra=extra))
    assert "model.steps" not in bind(_live(), checkpoint)


def test_load_model_gives_the_checkpoints_model(models: dict[str, Checkpoint]) -> None:
    base = next(iter(models.values()))
    model, tokenizer = load_model(base)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(t, base.tensor(n)) for n, t in model.state_dict().items())
    assert tokenizer("w1 w2")["input_ids"] == [4, 5]
    assert load_model(base, "float32")[0].dtype == FP32


def test_load_model_never_writes_to_the_checkpoint(models: dict[str, Checkpoint]) -> None:
    base = next(iter(models.values()))
    digest = base.digest()
    model, _ = load_model(base)
    Materialiser(model, models).write(_recipe(models, "linear", WEIGHTS))
    assert Checkpoint.open(base.path).digest() == digest


def test_a_model_that_transformers_cannot_load(tmp_path: Path) -> None:
    folder = small_llama.save(tmp_path / "m")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "lama"'))
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        load_model(Checkpoint.open(str(folder)))


def _assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, left), right in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(left, right), name


def test_facts_that_outlive_the_process_are_of_models_known_by_their_contents(
    tmp_path: Path,
) -> None:
    """A checkpoint trained on under its old path, and a folder of facts from before."""
    found = []
    for seed in (1, 50):
        models = _models(tmp_path / "m", 2, dtype=BF16)
        trained = str(small_llama.save(tmp_path / "m" / "s1", seed=seed, dtype=BF16))
        models[trained] = Checkpoint.open(trained)
        recipe = _recipe(models, "ties", [1.0], parameters={"density": 0.3})
        known = replace(
            recipe,
            base=ModelRef(recipe.base.path, "base") if recipe.base else None,
            sources=tuple(
                replace(s, model=ModelRef(s.model.path, f"trained {seed}")) for s in recipe.sources
            ),
        )
        for written in (known, recipe):
            live, fresh = _live(dtype=BF16), _live(dtype=BF16)
            Materialiser(live, models, store=Prepared(tmp_path / "facts")).write(written)
            Materialiser(fresh, models).write(written)
            _assert_same(live, fresh)
        found.append(len(list((tmp_path / "facts").iterdir())))
    assert found[0] > 0, "facts of models known by their contents are kept"
    assert found[1] == 2 * found[0]
