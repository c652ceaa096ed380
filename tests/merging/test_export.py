"""A recipe to a checkpoint on disk: the same weights as the live model, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import small_llama
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.writer import Entry, in_order, write_file
from evomerge.errors import (
    CheckpointError,
    ExportError,
    MergeError,
    NonFiniteTensor,
    PickleRefused,
    SpecError,
)
from evomerge.merging.export import export
from evomerge.merging.materialise import Materialiser, load_model
from evomerge.merging.methods.registry import METHODS
from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.merging.recipe_file import load_recipe

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return _save(tmp_path_factory.mktemp("models"))


def _save(root: Path, **options: object) -> dict[str, Path]:
    return {
        name: small_llama.save(root / name, seed=seed, shard="20KB", **options)
        for seed, name in enumerate(("base", "math", "code"))
    }


def _recipe(folders: dict[str, Path], method: str = "task_arithmetic", **options: object) -> Recipe:
    weighted = "weight" in {parameter.name for parameter in METHODS[method].parameters}
    weights = {"weight": 0.4} if weighted else {}
    names = list(folders)[1:][: METHODS[method].max_sources]
    sources = tuple(Source(name, ModelRef(str(folders[name])), weights) for name in names)
    return Recipe(method, ModelRef(str(folders["base"])), sources, **options)


def _live(recipe: Recipe) -> torch.nn.Module:
    """The model that a worker would score."""
    paths = [recipe.base.path, *(source.model.path for source in recipe.sources)]
    checkpoints = {path: Checkpoint.open(path) for path in paths}
    model, _ = load_model(checkpoints[recipe.base.path], recipe.dtype)
    Materialiser(model, checkpoints).write(recipe)
    return model


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reloaded_model_is_the_live_one(tmp_path: Path, dtype: str, tie: bool) -> None:
    folders = _save(tmp_path, dtype=DTYPES[dtype], tie=tie)
    recipe = _recipe(folders)
    export(recipe, tmp_path / "out", shard_bytes=20_000)
    live, reloaded = _live(recipe), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert reloaded.dtype == DTYPES[dtype]
    _assert_same(live, reloaded)
    tokens = torch.arange(48).reshape(4, 12)
    with torch.no_grad():
        assert torch.equal(live(tokens).logits, reloaded(tokens).logits)
    shares = reloaded.lm_head.weight.data_ptr() == reloaded.model.embed_tokens.weight.data_ptr()
    assert shares == tie


@pytest.mark.parametrize("method", sorted(m for m in METHODS if not METHODS[m].artifact))
def test_every_method_exports_what_it_materialises(
    folders: dict[str, Path], tmp_path: Path, method: str
) -> None:
    recipe = _recipe(folders, method, seed=11)
    export(recipe, tmp_path / "out")
    _assert_same(_live(recipe), AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_dtype(folders: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    recipe = _recipe(folders, dtype=dtype)
    export(recipe, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert reloaded.dtype == DTYPES[dtype]
    _assert_same(_live(recipe), reloaded)


def test_shards_change_nothing_but_the_files(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = _recipe(folders)
    export(recipe, tmp_path / "one")
    export(recipe, tmp_path / "many", shard_bytes=1)
    one, many = Checkpoint.open(str(tmp_path / "one")), Checkpoint.open(str(tmp_path / "many"))
    assert one.digest() == many.digest()
    shards = list((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) == len(many.names)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(many.tensor(n).nbytes for n in many.names)


def test_integers_scalars_and_empty_tensors_are_kept(tmp_path: Path) -> None:
    extra = {
        "steps": torch.tensor([3, 5]),
        "flag": torch.tensor(True),
        "scale": torch.tensor(2.5),
        "nothing": torch.empty(0, 4),
    }
    folders = _save(tmp_path, extra=extra)
    export(_recipe(folders), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in extra.items():
        assert torch.equal(stored[f"model.{name}"], tensor)
        assert stored[f"model.{name}"].dtype == tensor.dtype


def test_the_folder_is_complete(folders: dict[str, Path], tmp_path: Path) -> None:
    (folders["base"] / "chat_template.jinja").write_text("{{ messages }}")
    out = tmp_path / "out"
    recipe = export(_recipe(folders), out)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "evomerge_recipe.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert AutoTokenizer.from_pretrained(out)("w1 w2")["input_ids"] == [4, 5]
    assert out.stat().st_mode & 0o777 == 0o755
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert recipe.base.digest == Checkpoint.open(recipe.base.path).digest()
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "tags": ["merge", "evomerge"]}
    assert recipe.digest in card
    assert all(source.model.digest in card for source in recipe.sources)
    assert str(tmp_path) not in card


def test_the_recipe_beside_the_weights_rebuilds_them(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    first = export(_recipe(folders, dtype="float16", seed=5), tmp_path / "first")
    again = load_recipe(tmp_path / "first" / "evomerge_recipe.json")
    document = json.loads((tmp_path / "first" / "evomerge_recipe.json").read_text())
    assert Recipe.from_json(document) == first
    assert again.digest == first.digest
    export(again, tmp_path / "second")
    digests = {Checkpoint.open(str(tmp_path / name)).digest() for name in ("first", "second")}
    assert len(digests) == 1


def test_progress_runs_from_start_to_end(folders: dict[str, Path], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    export(_recipe(folders), tmp_path / "out", progress=lambda *both: told.append(both))
    done, totals = zip(*told, strict=True)
    stored = sum(load_file(p)[n].nbytes for p in _weights(tmp_path / "out") for n in load_file(p))
    assert list(done) == sorted(done)
    assert 0 < done[0] < done[-1] / 2
    assert done[-1] == totals[0] == 4 * stored  # a base, two sources, and the result
    assert len(set(totals)) == 1


def test_an_existing_folder_is_left_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="out: exists already"):
        export(_recipe(folders), out)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]
    with pytest.raises(ExportError, match=r"mine\.txt: exists already"):
        export(_recipe(folders), out / "mine.txt")


def test_an_empty_folder_and_a_missing_parent_will_do(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    export(_recipe(folders), tmp_path / "empty")
    export(_recipe(folders), tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "config.json").exists()


def test_too_little_space_is_seen_before_anything_is_written(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(ExportError, match=r"out: .* MB are needed, 0\.0 MB are free"):
        export(_recipe(folders), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@contextmanager
def _files_end_at(size: int) -> Iterator[None]:
    """The kernel refuses to make a file larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_fills_up_meanwhile(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = _recipe(folders)
    with pytest.raises(ExportError, match="out: does not fit"), _files_end_at(30_000):
        export(recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_is_full_at_the_last_moment(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ExportError, match="out: does not fit"):
        export(_recipe(folders), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        export(_recipe(folders), tmp_path / "file" / "out")


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("at", [0.1, 0.6, 0.95])
def test_an_interrupted_export_leaves_nothing_half_written(
    folders: dict[str, Path], tmp_path: Path, at: float
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done >= at * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(_recipe(folders), tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


_KILLED = """
import json, os, signal, sys
from pathlib import Path
from evomerge.merging.export import export
from evomerge.merging.recipe import Recipe
die = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done > 0.7 * total else None
recipe = Recipe.from_json(json.loads(sys.argv[1]))
export(recipe, Path(sys.argv[2]), shard_bytes=20_000, progress=die)
"""


def _killed(recipe: Recipe, out: Path) -> dict[str, int]:
    """What an export that is killed in the middle of many files leaves: its files' inodes."""
    arguments = [sys.executable, "-c", _KILLED, json.dumps(recipe.to_json()), str(out)]
    assert subprocess.run(arguments).returncode == -signal.SIGKILL
    assert not out.exists()
    return {path.name: path.stat().st_ino for path in out.parent.glob(".out.partial/*")}


def test_a_killed_export_goes_on_with_the_file_it_was_at(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    recipe = _recipe(folders)
    left = _killed(recipe, tmp_path / "out")
    told: list[int] = []
    known = export(
        recipe, tmp_path / "out", shard_bytes=20_000, progress=lambda done, _: told.append(done)
    )
    straight = export(recipe, tmp_path / "straight", shard_bytes=20_000)
    assert known == straight  # the digests of inputs that were not read again included
    assert _contents(tmp_path / "out") == _contents(tmp_path / "straight")
    kept = [p for p in _weights(tmp_path / "out") if left.get(p.name) == p.stat().st_ino]
    assert 0 < len(kept) < len(_weights(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "straight"]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("change", ["recipe", "source", "shards"])
def test_another_export_does_not_go_on_with_it(
    folders: dict[str, Path], tmp_path: Path, change: str
) -> None:
    mine = {name: shutil.copytree(folder, tmp_path / name) for name, folder in folders.items()}
    recipe, size = _recipe(mine), 20_000
    assert _killed(recipe, tmp_path / "out")
    if change == "recipe":
        recipe = replace(recipe, parameters={"lambda": 0.5})
    elif change == "shards":
        size = 30_000
    else:
        small_llama.save(mine["code"], seed=9, shard="20KB")
    export(recipe, tmp_path / "out", shard_bytes=size)
    export(recipe, tmp_path / "straight", shard_bytes=size)
    assert _contents(tmp_path / "out") == _contents(tmp_path / "straight")


def test_two_exports_to_one_place_at_once(folders: dict[str, Path], tmp_path: Path) -> None:
    def second(done: int, total: int) -> None:
        with pytest.raises(ExportError, match="out: another process is writing it"):
            export(_recipe(folders), tmp_path / "out")

    export(_recipe(folders), tmp_path / "out", progress=second)
    assert (tmp_path / "out" / "config.json").exists()


def test_nan_in_a_source_names_the_tensor(tmp_path: Path) -> None:
    folders = _save(tmp_path / "in")
    norm = "model.layers.1.input_layernorm.weight"
    shard = next(p for p in folders["code"].glob("*.safetensors") if norm in load_file(p))
    tensors = {name: tensor.clone() for name, tensor in load_file(shard).items()}
    tensors[norm][5] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(NonFiniteTensor, match=rf"{norm}: checkpoint .*code holds NaN"):
        export(_recipe(folders), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_overflow_names_the_tensor(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = _recipe(folders, dtype="float16", parameters={"lambda": 1e9})
    with pytest.raises(MergeError, match=r"^\S+weight: .* is beyond torch\.float16's largest"):
        export(recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_do_not_fit_are_reported_all_at_once(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    tokens = (*small_llama.TOKENS[:-1], "other")
    small_llama.save(tmp_path / "code", intermediate_size=96, tokens=tokens)
    with pytest.raises(SpecError) as caught:
        export(_recipe({**folders, "code": tmp_path / "code"}), tmp_path / "out")
    problems = "\n".join(caught.value.problems)
    assert "base is [32, 64], source 'code' is [32, 96]" in problems
    assert "id 63 is token 'other'" in problems


def test_a_checkpoint_that_changed_since_the_recipe_was_made(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    recipe = _recipe(folders).with_digests({str(folders["math"]): "0" * 64})
    with pytest.raises(CheckpointError, match="math: not the checkpoint that the recipe was made"):
        export(recipe, tmp_path / "out")


def test_a_pickle_source_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "config.json").write_text((folders["code"] / "config.json").read_text())
    torch.save({}, tmp_path / "code" / "pytorch_model.bin")
    with pytest.raises(PickleRefused, match="pytorch_model"):
        export(_recipe({**folders, "code": tmp_path / "code"}), tmp_path / "out")


def test_a_recipe_without_base(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = _recipe(folders, "linear")
    export(recipe, tmp_path / "with")
    export(replace(recipe, base=None), tmp_path / "without")
    one, other = (Checkpoint.open(str(tmp_path / name)) for name in ("with", "without"))
    assert all(torch.equal(one.tensor(name), other.tensor(name)) for name in one.names)


def test_written_files_are_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "b.odd": torch.arange(3, dtype=torch.uint8),
        "a.é": torch.randn(2, 3, dtype=torch.float64),
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 7, dtype=torch.float16),
        "flags": torch.tensor([True, False]),
        "wide": torch.randn(1001),
    }
    entries = in_order(Entry(n, t.dtype, tuple(t.shape)) for n, t in tensors.items())
    blocks = (block for entry in entries for block in tensors[entry.name].reshape(-1).split(100))
    written = list(write_file(tmp_path / "x.safetensors", entries, blocks))
    assert sum(written) == sum(tensor.nbytes for tensor in tensors.values())
    stored = load_file(tmp_path / "x.safetensors")
    assert set(stored) == set(tensors)
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    assert all(stored[name].dtype == tensor.dtype for name, tensor in tensors.items())
    contents = (tmp_path / "x.safetensors").read_bytes()
    data = 8 + int.from_bytes(contents[:8], "little")
    for name, entry in json.loads(contents[8:data]).items():
        if name in tensors:  # aligned, so that a mapped tensor can be read where it lies
            assert (data + entry["data_offsets"][0]) % tensors[name].itemsize == 0


def _assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, left), right in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert left.dtype == right.dtype
        assert torch.equal(left, right), name
