"""Two models compared: by numpy on small checkpoints, and a recipe with what it exports."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_llama
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import Checkpoint
from evomerge.errors import CheckpointError, MergeError, SpecError
from evomerge.merging.difference import ABSENT, Difference, Group, difference
from evomerge.merging.export import export
from evomerge.merging.layout import layer_of, tensor_type
from evomerge.merging.merge import open_merge
from evomerge.merging.recipe import ModelRef, Recipe, Source

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: small_llama.save(root / name, seed=seed, shard="30KB")
        for seed, name in enumerate(("base", "a", "b"))
    }


def compared(a: Path, b: Path, base: Path | None = None) -> Difference:
    origin = Checkpoint.open(str(base)) if base else None
    return difference(Checkpoint.open(str(a)), Checkpoint.open(str(b)), base=origin)


def copied(folder: Path, target: Path, **changed: torch.Tensor) -> Path:
    """A checkpoint in one file, with some of its tensors replaced."""
    tensors = load(folder) | {name.replace("/", "."): value for name, value in changed.items()}
    target.mkdir()
    for file in folder.glob("*.json"):
        if not file.name.startswith("model."):
            (target / file.name).write_bytes(file.read_bytes())
    save_file(tensors, target / "model.safetensors")
    return target


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def flat(tensors: list[torch.Tensor]) -> np.ndarray:
    return np.concatenate([tensor.double().numpy().ravel() for tensor in tensors])


def test_every_group_is_numpys(folders: dict[str, Path]) -> None:
    found = compared(folders["a"], folders["b"], folders["base"])
    base, a, b = (load(folders[name]) for name in ("base", "a", "b"))
    groups = [*found.by_type_and_layer(), *found.by_type(), found.total()]
    everything = {(None, None), *((tensor_type(n), None) for n in a)}
    assert {(g.type, g.layer) for g in groups} == everything | {
        (tensor_type(n), layer_of(n)) for n in a
    }
    for index, group in enumerate(groups):
        by_layer = index < len(found.by_type_and_layer())
        names = [
            name
            for name in a
            if group.type in (None, tensor_type(name))
            and (not by_layer or group.layer == layer_of(name))
        ]
        assert group.tensors == len(names)
        check(group, *(flat([model[name] for name in names]) for model in (base, a, b)))


def check(group: Group, base: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    assert group.distance.relative_norm == pytest.approx(
        np.linalg.norm(b - a) / np.linalg.norm(a), 1e-12
    )
    assert group.distance.cosine == pytest.approx(
        a @ b / np.linalg.norm(a) / np.linalg.norm(b), 1e-12
    )
    assert group.distance.largest == np.abs(b - a).max()
    assert group.distance.changed_share == (a != b).mean()
    u, v = a - base, b - base
    assert group.interference is not None
    assert group.interference.cosine == pytest.approx(
        u @ v / np.linalg.norm(u) / np.linalg.norm(v), 1e-12
    )
    both = (u != 0) & (v != 0)
    assert group.interference.sign_agreement == (np.sign(u) == np.sign(v))[both].mean()


def test_shards_and_a_second_save_are_no_difference(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    found = compared(folders["a"], copied(folders["a"], tmp_path / "again"))
    assert found.identical
    assert found.total().distance.cosine == 1.0
    assert found.most_different(3) == []


def test_the_changed_tensor_is_found(folders: dict[str, Path], tmp_path: Path) -> None:
    changed = load(folders["a"])[UP].clone()
    changed[5, 7] += 1
    found = compared(folders["a"], copied(folders["a"], tmp_path / "b", **{UP: changed}))
    assert not found.identical
    (only,) = found.most_different(10)
    assert only.place.name == UP
    assert only.distance.changed == 1
    moved = [g for g in found.by_type_and_layer() if g.distance.changed]
    assert [(g.type, g.layer) for g in moved] == [("mlp", 1)]


def test_most_different_come_first_and_zero_tensors_before_them(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    norm = "model.layers.0.input_layernorm.weight"
    zero = copied(folders["a"], tmp_path / "zero", **{norm: torch.zeros(32, dtype=torch.bfloat16)})
    most = compared(zero, folders["b"]).most_different(4)
    assert most[0].place.name == norm
    norms = [tensor.distance.relative_norm for tensor in most[1:]]
    assert norms == sorted(norms, reverse=True)


def test_config_tokens_shapes_and_dtypes(folders: dict[str, Path], tmp_path: Path) -> None:
    tokens = (*small_llama.TOKENS[:-2], "w60", "w59", "new")
    other = small_llama.save(
        tmp_path / "other", vocab_size=65, rms_norm_eps=0.5, tokens=tokens, dtype=torch.float16
    )
    said = compared(folders["a"], other).statements
    assert said.config["vocab_size"] == (64, 65)
    assert said.config["rms_norm_eps"] == (1e-6, 0.5)
    assert said.shapes == {
        name: ((64, 32), (65, 32)) for name in ("lm_head.weight", "model.embed_tokens.weight")
    }
    assert said.dtypes[UP] == ("bfloat16", "float16")
    assert said.tokens_only_b == ("new",)
    assert said.token_ids == {"w59": (62, 63), "w60": (63, 62)}
    assert said.files == {"tokenizer.json": "differs"}


def test_a_config_key_of_one_side(folders: dict[str, Path], tmp_path: Path) -> None:
    other = copied(folders["a"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    del config["rms_norm_eps"]
    config["transformers_version"] = "1.0"  # what a re-save changes is no difference
    (other / "config.json").write_text(json.dumps(config))
    said = compared(folders["a"], other).statements
    assert said.config == {"rms_norm_eps": (1e-6, ABSENT)}


def test_tensors_of_one_side(folders: dict[str, Path], tmp_path: Path) -> None:
    extra = copied(folders["a"], tmp_path / "extra", extra=torch.ones(3))
    assert compared(folders["a"], extra).statements.only_b == ("extra",)
    assert compared(extra, folders["a"]).statements.only_a == ("extra",)
    assert not compared(extra, folders["a"]).identical


def test_a_tied_head_is_compared_with_an_untied_one(tmp_path: Path) -> None:
    tied = small_llama.save(tmp_path / "tied", tie=True)
    model = small_llama.build(tie=True)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.save_pretrained(tmp_path / "untied")
    found = compared(tied, tmp_path / "untied")
    assert "lm_head.weight" in [tensor.place.name for tensor in found.tensors]
    assert not found.changed
    assert found.statements.config == {"tie_word_embeddings": (True, False)}
    assert not found.statements.only_a
    assert not found.statements.only_b


def test_nan_is_reported_not_raised(folders: dict[str, Path], tmp_path: Path) -> None:
    bad = load(folders["a"])[UP].clone()
    bad[0, :2] = math.nan
    found = compared(folders["a"], copied(folders["a"], tmp_path / "nan", **{UP: bad}))
    (tensor,) = found.non_finite()
    assert (tensor.place.name, tensor.distance.non_finite_a, tensor.distance.non_finite_b) == (
        UP,
        0,
        2,
    )
    assert found.total().distance.relative_norm == 0.0
    assert [t.place.name for t in found.changed] == [UP]


def test_other_architectures_share_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    wide = small_llama.save(tmp_path / "wide", hidden_size=48, intermediate_size=80)
    found = compared(folders["a"], wide)
    assert found.tensors == ()
    assert not found.identical
    assert found.total().distance.entries == 0


def test_a_base_of_another_architecture_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    wide = small_llama.save(tmp_path / "wide", hidden_size=48, intermediate_size=80)
    with pytest.raises(CheckpointError, match="the model that they were fine-tuned from"):
        compared(folders["a"], folders["b"], wide)


def recipe(
    folders: dict[str, Path], weight: float = 0.5, method: str = "task_arithmetic"
) -> Recipe:
    sources = (
        Source("a", ModelRef(str(folders["a"])), {"weight": [0.2, weight]}),
        Source("b", ModelRef(str(folders["b"])), {"weight": 0.3}),
    )
    return Recipe(method, ModelRef(str(folders["base"])), sources)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties"])
def test_an_export_is_its_recipe_bit_for_bit(
    folders: dict[str, Path], tmp_path: Path, method: str
) -> None:
    export(recipe(folders, method=method), tmp_path / "out", shard_bytes=20_000)
    exported = Checkpoint.open(str(tmp_path / "out"))
    assert difference(open_merge(recipe(folders, method=method)), exported).identical
    other = difference(open_merge(recipe(folders, 0.51, method)), exported)
    assert {tensor.place.layer for tensor in other.changed} > {1}
    assert all(t.place.layer != 0 for t in other.changed)  # layer 0 has weight 0.2 in both


def test_two_merges(folders: dict[str, Path]) -> None:
    found = difference(open_merge(recipe(folders)), open_merge(recipe(folders)))
    assert found.identical
    assert len(found.tensors) == len(load(folders["base"]))


def test_a_merge_that_overflows_names_the_tensor(folders: dict[str, Path]) -> None:
    huge = replace(recipe(folders, 1e7), dtype="float16")
    with pytest.raises(MergeError, match=r"lm_head\.weight: .* is beyond"):
        difference(open_merge(huge), Checkpoint.open(str(folders["a"])))


def test_a_recipe_whose_models_do_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    wide = small_llama.save(tmp_path / "wide", hidden_size=48, intermediate_size=80)
    with pytest.raises(SpecError, match="all sources must share the base's architecture"):
        open_merge(recipe({**folders, "b": wide}))


def test_progress_ends_at_one(folders: dict[str, Path]) -> None:
    told: list[float] = []
    one, other = (Checkpoint.open(str(folders[name])) for name in ("a", "b"))
    difference(one, other, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0
