"""A checkpoint on disk: what it tells, what it costs, and every way in which it can be broken."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path

import pytest
import small_llama
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.checkpoint import is_finite
from evomerge.checkpoints.digest import TensorHash, combine, tensor_digest
from evomerge.errors import CheckpointError, MissingTensor, PickleRefused

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama.save(tmp_path_factory.mktemp("whole") / "m", seed=1)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama.save(tmp_path_factory.mktemp("sharded") / "m", seed=1, shard="20KB")


@pytest.fixture
def broken(sharded: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(sharded, tmp_path / "broken"))


@pytest.fixture
def single(whole: Path, tmp_path: Path) -> Path:
    """A copy with one weight file, to break."""
    return Path(shutil.copytree(whole, tmp_path / "single"))


def test_names_shapes_and_values_are_those_of_the_file(whole: Path) -> None:
    stored = load_file(whole / "model.safetensors")
    checkpoint = Checkpoint.open(str(whole))
    assert list(checkpoint.names) == sorted(stored)
    for name, tensor in stored.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_shards_hold_the_same_model(whole: Path, sharded: Path) -> None:
    one, many = Checkpoint.open(str(whole)), Checkpoint.open(str(sharded))
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert one.names == many.names
    assert one.digest() == many.digest()


@pytest.mark.parametrize("size", [1, 7, 1000, 1 << 20])
def test_blocks_are_the_flat_tensor_in_float32(whole: Path, size: int) -> None:
    checkpoint = Checkpoint.open(str(whole))
    blocks = list(checkpoint.blocks("model.norm.weight", size))
    assert all(len(block) == size for block in blocks[:-1])
    expected = checkpoint.tensor("model.norm.weight").float().flatten()
    assert torch.equal(torch.cat(blocks), expected)


def test_blocks_can_be_written_without_touching_the_file(tmp_path: Path) -> None:
    folder = small_llama.save(tmp_path / "m", dtype=torch.float32)
    checkpoint = Checkpoint.open(str(folder))
    before = checkpoint.tensor(HEAD).clone()
    for block in checkpoint.blocks(HEAD, 100):
        block.zero_()
    assert torch.equal(checkpoint.tensor(HEAD), before)


def test_reading_everything_costs_no_private_memory(tmp_path: Path) -> None:
    folder = small_llama.save(tmp_path / "m", hidden_size=256, intermediate_size=512)
    checkpoint = Checkpoint.open(str(folder))
    checkpoint.scan()
    for name in checkpoint.names:
        for block in checkpoint.blocks(name, 1 << 16):
            block.sum()
    mapped = _smaps(folder / "model.safetensors")
    assert mapped["Rss"] > 1000
    assert mapped["Anonymous"] == 0


def _smaps(path: Path) -> dict[str, int]:
    """Kibibytes of one mapped file, by kind, as the kernel counts them."""
    totals: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, value = line.partition(":")
        if "-" in key.split()[0]:
            inside = line.endswith(str(path))
        elif inside and value.strip().endswith("kB"):
            totals[key] = totals.get(key, 0) + int(value.split()[0])
    return totals


def test_a_tied_head_is_known_under_one_name(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(small_llama.save(tmp_path / "m", tie=True)))
    assert checkpoint.tied_names == {HEAD: EMBEDDING}
    assert HEAD not in checkpoint.names
    assert HEAD in checkpoint
    assert torch.equal(checkpoint.tensor(HEAD), checkpoint.tensor(EMBEDDING))


def test_a_tied_head_stored_twice_is_processed_once(tmp_path: Path) -> None:
    folder = small_llama.save(tmp_path / "m", tie=True)
    once = Checkpoint.open(str(folder))
    twice = _rewrite(folder, {HEAD: once.tensor(EMBEDDING).clone()})
    assert twice.names == once.names
    assert twice.digest() == once.digest()


def test_a_tied_weight_stored_as_the_head_only(tmp_path: Path) -> None:
    folder = small_llama.save(tmp_path / "m", tie=True)
    head = Checkpoint.open(str(folder)).tensor(EMBEDDING).clone()
    checkpoint = _rewrite(folder, {HEAD: head}, drop=EMBEDDING)
    assert checkpoint.tied_names == {EMBEDDING: HEAD}
    assert torch.equal(checkpoint.tensor(EMBEDDING), head)


def test_a_head_that_differs_is_not_tied_whatever_the_config_says(tmp_path: Path) -> None:
    folder = small_llama.save(tmp_path / "m", tie=True)
    checkpoint = _rewrite(folder, {HEAD: torch.ones(64, 32, dtype=torch.bfloat16)})
    assert checkpoint.tied_names == {}
    assert {HEAD, EMBEDDING} <= set(checkpoint.names)


def test_tying_by_default_is_the_architectures(tmp_path: Path) -> None:
    folder = small_llama.save(tmp_path / "m", tie=True)
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]  # Llama's default is untied
    (folder / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(str(folder)).tied_names == {}
    config = {**config, "model_type": "gemma", "architectures": ["GemmaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))  # Gemma's default is tied
    assert Checkpoint.open(str(folder)).tied_names == {HEAD: EMBEDDING}


def test_integers_are_told_apart(tmp_path: Path) -> None:
    folder = small_llama.save(tmp_path / "m", extra={"steps": torch.tensor(7)})
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.non_float_names == ("model.steps",)
    assert checkpoint.shape("model.steps") == ()


def test_an_unknown_tensor(whole: Path) -> None:
    with pytest.raises(MissingTensor, match=r"model\.nothing"):
        Checkpoint.open(str(whole)).tensor("model.nothing")


def test_the_digest_is_a_blake3_tree_of_the_contents(whole: Path) -> None:
    def settled(name: str) -> bytes:
        document = json.loads((whole / name).read_text())
        for key in ("transformers_version", "dtype"):
            document.pop(key, None)
        return json.dumps(document, sort_keys=True).encode()

    checkpoint = Checkpoint.open(str(whole))
    parts = [settled("config.json")]
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        contents = settled(name) if "_config" in name else (whole / name).read_bytes()
        parts += [name.encode(), hashlib.sha256(contents).digest()]
    tree = blake3(b"\0".join(parts)).digest()
    for name, tensor in sorted(load_file(whole / "model.safetensors").items()):
        leaf = f"{name}\0torch.bfloat16\0{list(tensor.shape)}\0".encode()
        tree += blake3(leaf + tensor.view(torch.int16).numpy().tobytes()).digest()
    assert checkpoint.digest() == blake3(tree).hexdigest()


def test_a_digest_can_be_taken_tensor_by_tensor_in_any_order(whole: Path) -> None:
    checkpoint = Checkpoint.open(str(whole))
    digests = {n: tensor_digest(n, checkpoint.tensor(n)) for n in reversed(checkpoint.names)}
    assert combine(checkpoint.preamble(), digests) == checkpoint.digest()
    hashed = TensorHash(HEAD, checkpoint.dtype(HEAD), checkpoint.shape(HEAD))
    for piece in checkpoint.tensor(HEAD).reshape(-1).split(37):
        hashed.update(piece)
    assert hashed.hexdigest() == digests[HEAD]


def test_an_interrupted_scan_leaves_no_half_result(whole: Path) -> None:
    checkpoint = Checkpoint.open(str(whole))

    def interrupt(fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.scan(interrupt)
    assert checkpoint.digest() == Checkpoint.open(str(whole)).digest()


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_the_digest_changes_with_what_changes_answers(single: Path, name: str) -> None:
    before = Checkpoint.open(str(single)).digest()
    document = json.loads((single / name).read_text()) if (single / name).exists() else {}
    (single / name).write_text(json.dumps({**document, "transformers_version": "0"}))
    resaved = Checkpoint.open(str(single)).digest()
    (single / name).write_text(json.dumps({**document, "eos_token_id": 9, "eos_token": "z"}))
    assert resaved == before
    assert Checkpoint.open(str(single)).digest() != before


@pytest.mark.parametrize("change", ["bit", "config", "tokenizer", "dtype"])
def test_the_digest_changes_with_the_contents(single: Path, change: str) -> None:
    before = Checkpoint.open(str(single)).digest()
    if change == "bit":
        norm = Checkpoint.open(str(single)).tensor("model.norm.weight").clone()
        norm.view(torch.int16)[3] ^= 1
        after = _rewrite(single, {"model.norm.weight": norm})
    elif change == "dtype":
        norm = Checkpoint.open(str(single)).tensor("model.norm.weight").half()
        after = _rewrite(single, {"model.norm.weight": norm})
    else:
        path = single / f"{change}.json"
        path.write_text(path.read_text().replace("64", "65").replace("w60", "w99"))
        after = Checkpoint.open(str(single))
    assert after.digest() != before


def test_the_digest_does_not_change_with_the_version_that_saved_it(single: Path) -> None:
    before = Checkpoint.open(str(single)).digest()
    config = json.loads((single / "config.json").read_text())
    config.update(transformers_version="0", _name_or_path="/elsewhere")
    (single / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(str(single)).digest() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_scan_names_tensors_with_nan_or_infinity(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    folder = small_llama.save(tmp_path / "m", dtype=dtype, extra={"steps": torch.tensor(7)})
    norm = Checkpoint.open(str(folder)).tensor("model.norm.weight").clone()
    norm[-1] = value
    done: list[float] = []
    scan = _rewrite(folder, {"model.norm.weight": norm}).scan(done.append)
    assert scan.non_finite == ("model.norm.weight",)
    assert done == sorted(done)
    assert done[-1] == 1.0


@pytest.mark.parametrize("place", [0, 1, 63, 64, 999, 1000])
def test_is_finite_sees_every_element(place: int) -> None:
    float8 = torch.float8_e4m3fn
    for dtype in (float8, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        values = torch.zeros(1001).to(dtype)
        assert is_finite(values)
        values[place] = torch.nan
        assert not is_finite(values)
    assert is_finite(torch.empty(0))
    assert is_finite(torch.tensor([1, 2]))


def test_a_truncated_file(broken: Path) -> None:
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=shard.name):
        Checkpoint.open(str(broken))


def test_a_file_that_is_something_else(single: Path) -> None:
    (single / "model.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        Checkpoint.open(str(single))


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}}',
        b"[]",
    ],
)
def test_a_corrupt_header(single: Path, header: bytes) -> None:
    contents = struct.pack("<Q", len(header)) + header + bytes(16)
    (single / "model.safetensors").write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        Checkpoint.open(str(single))


@pytest.mark.parametrize("size", [0, 7, 8])
def test_a_file_without_a_header(single: Path, size: int) -> None:
    (single / "model.safetensors").write_bytes(b"\xff" * size)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        Checkpoint.open(str(single))


def test_a_missing_shard(broken: Path) -> None:
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"1 of .* shards are missing: {shard.name}"):
        Checkpoint.open(str(broken))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_bad_index(broken: Path, text: str) -> None:
    (broken / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: "):
        Checkpoint.open(str(broken))


def test_an_index_that_points_to_the_wrong_shard(broken: Path) -> None:
    path = broken / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.ghost is not in model-0000"):
        Checkpoint.open(str(broken))


def test_an_index_that_points_out_of_the_folder(broken: Path) -> None:
    path = broken / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        Checkpoint.open(str(broken))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt"])
def test_a_pickle_is_refused_and_never_loaded(single: Path, name: str) -> None:
    weights = single / "model.safetensors"
    torch.save(load_file(weights), single / name)
    weights.unlink()
    with pytest.raises(PickleRefused, match=rf"{name}: a pickle.*save_pretrained"):
        Checkpoint.open(str(single))


def test_no_weights_no_config_no_folder(single: Path, tmp_path: Path) -> None:
    (single / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has neither"):
        Checkpoint.open(str(single))
    (single / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        Checkpoint.open(str(single))
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        Checkpoint.open(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        Checkpoint.open(str(single / "tokenizer.json"))


def test_a_lone_weight_file_is_a_raw_state_dict(whole: Path, tmp_path: Path) -> None:
    """Nothing beside it counts, whatever lies there, and nothing is tied that no config ties."""
    stored = load_file(whole / "model.safetensors")
    raw = Checkpoint.open(str(whole / "model.safetensors"))
    assert (raw.config, raw.tied_names) == ({}, {})
    assert list(raw.names) == sorted(stored)
    assert all(torch.equal(raw.tensor(name), tensor) for name, tensor in stored.items())
    moved = Path(shutil.copy(whole / "model.safetensors", tmp_path / "weights.v2.safetensors"))
    assert Checkpoint.open(str(moved)).digest() == raw.digest()
    assert raw.digest() != Checkpoint.open(str(whole)).digest()


@pytest.mark.parametrize("index", [True, False])
def test_a_folder_of_weight_files_only_is_a_raw_state_dict(broken: Path, index: bool) -> None:
    for path in broken.glob("*.json"):
        if not path.name.endswith("index.json"):
            path.unlink()
    if not index:
        (broken / "model.safetensors.index.json").unlink()
    raw = Checkpoint.open(str(broken))
    assert raw.config == {}
    assert {HEAD, EMBEDDING} <= set(raw.names)


def test_a_checkpoint_that_lost_its_config_is_no_raw_state_dict(single: Path) -> None:
    (single / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        Checkpoint.open(str(single))


def test_loose_files_that_hold_one_tensor_twice(whole: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copy(whole / "model.safetensors", tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.safetensors: \S+ is also in a\.safetensors"):
        Checkpoint.open(str(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_file_is_refused(single: Path, name: str) -> None:
    torch.save({}, single / name)
    with pytest.raises(PickleRefused, match=rf"{name}: a pickle can run code"):
        Checkpoint.open(str(single / name))


def test_a_config_that_does_not_parse(single: Path) -> None:
    (single / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON"):
        Checkpoint.open(str(single))


def test_an_adapter_and_a_quantised_model_are_told_apart(single: Path) -> None:
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    with pytest.raises(CheckpointError, match="quantised"):
        Checkpoint.open(str(single))
    (single / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter"):
        Checkpoint.open(str(single))


@pytest.mark.parametrize("revision", [None, "main", "refs/pr/1", "v1.0"])
def test_a_hub_model_is_looked_up_without_pickles_or_code(
    whole: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    asked: dict[tuple[str, str | None], list[str]] = {}

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked[repo_id, revision] = allow_patterns
        return str(whole)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    path = f"someone/llama@{revision}" if revision else "someone/llama"
    checkpoint = Checkpoint.open(path)
    assert checkpoint.path == path
    assert checkpoint.folder == whole
    patterns = asked["someone/llama", revision]
    assert not [p for p in patterns if p.endswith((".bin", ".pt", ".py", "*"))]


def test_a_local_path_with_an_at_sign_is_a_path(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = single.rename(single.parent / "llama@v2")
    monkeypatch.chdir(folder.parent.parent)
    assert Checkpoint.open(f"{folder.parent.name}/llama@v2").folder == folder


def test_a_hub_model_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="evomerge-test/no-such-model: no such folder, and"):
        Checkpoint.open("evomerge-test/no-such-model")


def _rewrite(
    folder: Path, tensors: dict[str, torch.Tensor], *, drop: str | None = None
) -> Checkpoint:
    """Change a single-file checkpoint's tensors."""
    path = folder / "model.safetensors"
    stored = {**{k: v.clone() for k, v in load_file(path).items()}, **tensors}
    stored.pop(drop or "", None)
    save_file(stored, path, metadata={"format": "pt"})
    return Checkpoint.open(str(folder))
