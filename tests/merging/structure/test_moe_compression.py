"""Merged experts as U V + S: the parts, which rows stay, files, and the model that loads them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_experts
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from evomerge.calibration.experts import open_expert_problem
from evomerge.checkpoints import Checkpoint
from evomerge.errors import CheckpointError, MergeError
from evomerge.merging.fitted.calibration import Example, batches
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.experts import compress as moe_compress
from evomerge.merging.structure.experts.compressed_model import COMPRESSED_FILE, COMPRESSION_FILE
from evomerge.merging.structure.experts.compression import Compressed, decomposed
from evomerge.merging.structure.experts.export import ExpertProblem, merge_experts
from evomerge.merging.structure.experts.layers import ExpertLayer, expert_layers
from evomerge.merging.structure.experts.pruning import remaining
from evomerge.merging.structure.experts.remapped import load_remapped
from evomerge.merging.structure.experts.settings import CompressSettings, ExpertSettings
from evomerge.merging.structure.experts.size import compressed_parameters, moe_parameters

_ZERO_SHOT = {"rank": 2, "density": 0.25}
_TRAINED = {
    **_ZERO_SHOT,
    "steps": 23,  # saved after 20
    "learning_rate": 0.02,
    "warmup": 2,
    "dense_steps": 19,  # so that what is kept of the first 20 decides which rows go
    "settled_steps": 1,
}
_SHARD_BYTES = 5000


@dataclass
class _Training:
    """A training in the remapped form: its folder, the student, and what was seen after each step:
    which rows of all matrices are not 0, before and after the mask."""

    out: Path
    student: Any
    moved: list[Tensor]
    kept: list[Tensor]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_experts.folder("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def training(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> _Training:
    out = tmp_path_factory.mktemp("trained") / "out"
    seen = _Training(out, None, [], [])
    stepped = moe_compress._Student._stepped

    def watched(student: Any, taken: int) -> None:
        seen.student = student
        seen.moved.append(_rows_in_use(student))
        stepped(student, taken)
        seen.kept.append(_rows_in_use(student))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_compress._Student, "_stepped", watched)
        problem = _problem(mixtral, _TRAINED, form="remapped")
        merge_experts(problem, out, shard_bytes=_SHARD_BYTES)
    return seen


def _rows_in_use(student: Any) -> Tensor:
    return torch.cat([s.ne(0).any(1) for s in student._s.values()])


def _weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _problem(folder: Path, compress: dict[str, Any], **settings: Any) -> ExpertProblem:
    chosen = ExpertSettings.model_validate({"keep": 2, "compress": compress, **settings})
    return ExpertProblem(Checkpoint.open(str(folder)), small_experts.examples(), chosen)


def _merge(folder: Path, out: Path, compress: dict[str, Any], **settings: Any) -> Path:
    merge_experts(_problem(folder, compress, **settings), out)
    return out


def _logits(folder: Path) -> list[Tensor]:
    return small_experts.logits(small_experts.loaded(folder), small_experts.examples())


def _remapped(folder: Path, **options: Any) -> list[Tensor]:
    return small_experts.logits(load_remapped(folder, **options), small_experts.examples())


def _guide() -> dict[str, Any]:
    """The recipe in the guide's section on compression."""
    page = (Path(__file__).parents[3] / "docs/guides/experts.md").read_text(encoding="utf-8")
    section = page.split("## Compressing what was merged")[1]
    recipe: dict[str, Any] = yaml.safe_load(section.split("```yaml")[1].split("```")[0])
    return recipe


def _close(one: list[Tensor], two: list[Tensor]) -> None:
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def _matrices(folder: Path) -> dict[str, Compressed]:
    tensors = load_file(folder / COMPRESSED_FILE)
    names = {name.rpartition(".")[0] for name in tensors}
    return {name: Compressed.read(name, tensors) for name in sorted(names)}


# ---- one matrix ------------------------------------------------------------------------------


def test_the_parts_are_those_of_numpys_svd_and_add_up_to_the_matrix() -> None:
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, v, s = decomposed(weight, 3)
    q, sigma, r = np.linalg.svd(weight.numpy(), full_matrices=False)
    np.testing.assert_allclose((u @ v).numpy(), (q[:, :3] * sigma[:3]) @ r[:3], atol=1e-13)
    np.testing.assert_allclose((u.T @ u).diagonal().numpy(), sigma[:3], atol=1e-13)  # √σ each side
    np.testing.assert_allclose((v @ v.T).diagonal().numpy(), sigma[:3], atol=1e-13)
    assert float((u @ v + s - weight).abs().max()) < 1e-15
    single = weight.float()
    u, v, s = decomposed(single, 3)
    torch.testing.assert_close(u @ v + s, single, rtol=1e-6, atol=1e-6)


def test_rows_are_kept_by_any_entry_and_not_by_their_sum() -> None:
    s = torch.tensor([[1.0, -1.0], [0.0, 0.0], [0.0, 2.0]])
    u, v = torch.ones(3, 1), torch.ones(1, 2)
    found = Compressed.of(u, v, s)
    assert found.rows.tolist() == [0, 2]
    assert torch.equal(found.dense(), s + 1)
    x = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.times(x), x @ (s + 1).T)
    assert found.parameters == 3 + 2 + 4
    assert Compressed.of(u, v, torch.zeros(3, 2)).parameters == 5


# ---- the merged model ------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*small_experts.FAMILIES, "deepseek_v3", "switch"])
def test_all_rows_or_full_rank_change_nothing(family: str, tmp_path: Path) -> None:
    """Against the merge without a compression, as transformers loads it."""
    folder = small_experts.folder(family, tmp_path / "model")
    plain = ExpertProblem(
        Checkpoint.open(str(folder)), small_experts.examples(), ExpertSettings(keep=2)
    )
    merge_experts(plain, tmp_path / "plain")
    wanted = _logits(tmp_path / "plain")
    _close(_logits(_merge(folder, tmp_path / "dense", {"rank": 2, "density": 1})), wanted)
    small = _merge(folder, tmp_path / "small", {"rank": 3, "density": 1}, form="remapped")
    _close(_remapped(small), wanted)
    _close(_remapped(small, dense=True), wanted)
    if family == "mixtral":
        _close(_remapped(small, dense=True, experts_implementation="grouped_mm"), wanted)
        full = _merge(folder, tmp_path / "full", {"rank": 16, "density": 0}, form="remapped")
        _close(_remapped(full), wanted)


def test_forms_agree_and_the_collapsed_one_is_plain(
    mixtral: Path, training: _Training, tmp_path: Path
) -> None:
    big = _merge(mixtral, tmp_path / "big", _TRAINED)
    _close(_remapped(training.out), _logits(big))
    matrices = _matrices(training.out)
    for layer in expert_layers(Checkpoint.open(str(mixtral))):
        for role in layer.roles:
            written = _weights(big)[layer.name(0, role)]
            assert torch.equal(matrices[layer.name(0, role)].dense(), written)
    settings = {"form": "collapsed", "allocation": "uniform"}
    collapsed = _merge(mixtral, tmp_path / "collapsed", _ZERO_SHOT, **settings)
    assert all(bool(logits.isfinite().all()) for logits in _logits(collapsed))


def test_the_file_holds_what_the_size_model_says(mixtral: Path, tmp_path: Path) -> None:
    """Every number on the disk that is no place of a row, against the formula: S is a row short at
    the most, since rows are whole."""
    out = _merge(mixtral, tmp_path / "out", {"rank": 2, "density": 0.25}, form="remapped",
                 allocation="uniform", skip=[0])  # fmt: skip
    model = Checkpoint.open(str(mixtral))
    first, second = expert_layers(model)
    shapes = [model.shape(second.name(0, role)) for role in second.roles]
    pairs = [(shape[0], shape[1]) for shape in shapes]
    expert = sum(m * n for m, n in pairs)
    every = sum(model.tensor(name).numel() for name in model.names)
    shared = every - 2 * 4 * expert
    said = moe_parameters(
        shared, expert, [4, 2], [expert, compressed_parameters(pairs, rank=2, density=0.25)]
    )
    files = [load_file(out / name) for name in ("model.safetensors", COMPRESSED_FILE)]
    found = sum(
        t.numel() for file in files for name, t in file.items() if not name.endswith(".rows")
    )
    assert 0 <= said - found < max(max(pair) for pair in pairs)
    document = json.loads((out / COMPRESSION_FILE).read_text())
    assert document["parameters"] == found - shared - 4 * expert
    rows = sum(t.nbytes for name, t in files[1].items() if name.endswith(".rows"))
    kept = sum(kept for kept, _ in document["rows"].values())
    assert rows == 4 * kept
    size = (out / COMPRESSED_FILE).stat().st_size
    assert size - 4 * document["parameters"] - rows < 120 * len(files[1]) + 100  # names
    assert first.prefix not in " ".join(files[1])


def test_zero_shot_keeps_the_rows_whose_gradients_done_by_hand_are_largest(
    mixtral: Path, tmp_path: Path
) -> None:
    """∂CE/∂S by autograd through W = U V + S in transformers' own model, batch by batch."""
    problem = _problem(mixtral, _ZERO_SHOT, form="remapped", batch_size=4)
    merge_experts(problem, tmp_path / "small")
    merge_experts(_problem(mixtral, {"rank": 2, "density": 1}, form="remapped"), tmp_path / "whole")
    model: Any = load_remapped(tmp_path / "whole")
    found = _matrices(tmp_path / "small")
    whole = _matrices(tmp_path / "whole")
    scores = {name: torch.zeros(len(matrix.values)) for name, matrix in whole.items()}
    live = _live_values(model, expert_layers(problem.model), whole)
    for rows in batches(problem.examples, 4):
        logits = model(input_ids=rows.tokens, attention_mask=rows.attention).logits
        loss = torch.nn.functional.cross_entropy(logits[rows.counted], rows.targets[rows.counted])
        gradients = torch.autograd.grad(loss, list(live.values()))
        for (name, values), gradient in zip(live.items(), gradients, strict=True):
            scores[name] += (values * gradient).abs().mean(1).detach()
    every = sorted(
        ((float(x), name, row) for name, score in scores.items() for row, x in enumerate(score)),
        reverse=True,
    )
    widths = {name: matrix.shape[1] for name, matrix in whole.items()}
    room = round(0.25 * sum(m * n for m, n in (matrix.shape for matrix in whole.values())))
    wanted = set()
    for _, name, row in every:
        room -= widths[name]
        if room < 0:
            break
        wanted.add((name, row))
    assert {(n, r) for n, m in found.items() for r in m.rows.tolist()} == wanted


def _live_values(
    model: Any, layers: tuple[ExpertLayer, ...], matrices: dict[str, Compressed]
) -> dict[str, Tensor]:
    """The live parameter that holds the rows of S of each stored matrix of a Mixtral."""
    places = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}
    found = {}
    for name in matrices:
        at = next(at for at, layer in enumerate(layers) if name.startswith(f"{layer.prefix}."))
        expert, role = name.removeprefix(f"{layers[at].prefix}.experts.").split(".")[:2]
        tensor, number = places[role]
        stack = getattr(model.model.layers[at].mlp.experts, tensor)
        found[name] = getattr(stack[int(expert)], f"values{number}")
    return found


def test_training_lowers_the_loss_and_leaves_routers_alone(
    mixtral: Path, training: _Training, tmp_path: Path
) -> None:
    losses = json.loads((training.out / COMPRESSION_FILE).read_text())["losses"]
    assert len(losses) == 23
    assert sum(losses[-5:]) < sum(losses[:5])
    before, after = _weights(mixtral), _weights(training.out)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    layers = expert_layers(Checkpoint.open(str(mixtral)))
    routers = {name for layer in layers for name in layer.router}
    assert routers
    assert changed == after.keys() - routers
    compress = {**_ZERO_SHOT, "steps": 3, "train": "experts"}
    alone = _merge(mixtral, tmp_path / "alone", compress, form="remapped")
    for name, tensor in _weights(alone).items():
        assert torch.equal(tensor, before[name])


def test_rows_that_went_are_zero_after_every_step_and_may_come_back(training: _Training) -> None:
    """Whatever the optimiser did, the schedule's share of entries is not 0, to a row."""
    parts = list(training.student._s.values())
    widths = torch.cat([torch.full((len(s),), s.shape[1]) for s in parts])
    total = sum(s.numel() for s in parts)
    for taken, kept in enumerate(training.kept, 1):
        want = total * remaining(taken, steps=23, dense=19, settled=1, density=0.25)
        assert want - int(widths.max()) - 1 < int(widths[kept].sum()) < want + 1
    document = json.loads((training.out / COMPRESSION_FILE).read_text())
    assert document["density"] == pytest.approx(int(widths[training.kept[-1]].sum()) / total)
    for before, moved in zip(training.kept[19:-1], training.moved[20:], strict=True):
        assert bool((moved & ~before).any())  # the optimiser moves rows that went


def test_a_compression_that_was_cut_off_goes_on(
    mixtral: Path, training: _Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: while it trains, and while it writes what it has trained."""
    problem = _problem(mixtral, _TRAINED, form="remapped")
    steps = []

    def attempt(stop: str = "", after: float = 1.0) -> None:
        def told(what: str, done: int, total: int) -> None:
            steps.append((what, done))
            if what == stop and done > after * total:
                raise KeyboardInterrupt

        merge_experts(problem, tmp_path / "out", shard_bytes=_SHARD_BYTES, progress=told)

    with pytest.raises(KeyboardInterrupt):
        attempt("distilling", 0.94)
    with pytest.raises(KeyboardInterrupt):
        attempt("merging experts", 0.5)
    assert not (tmp_path / "out").exists()
    trained = [done for what, done in steps if what == "distilling"]
    assert trained == [*range(1, 23), 21, 22, 23]
    monkeypatch.setattr(moe_compress, "Network", None)  # what is trained is there
    attempt()
    files = sorted(path.name for path in training.out.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (training.out / name).read_bytes()


def test_the_loaded_model_is_the_trained_one(training: _Training) -> None:
    """Against the network it was trained in."""
    student = training.student
    student._write()
    network: Network = student._network
    wanted = small_experts.logits(network.model, small_experts.examples())
    _close(_remapped(training.out), wanted)
    stored = _matrices(training.out)
    for name, u in student._u.items():
        assert torch.equal(stored[name].u, u)
        assert torch.equal(stored[name].v, student._v[name])
        assert torch.equal(stored[name].dense(), u @ student._v[name] + student._s[name])


def test_a_model_in_half_precision_is_compressed_in_it(mixtral: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(mixtral, half)
    weights = load_file(half / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in weights.items()}, half / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    out = _merge(half, tmp_path / "out", {"rank": 4, "density": 1}, form="remapped")
    assert {m.u.dtype for m in _matrices(out).values()} == {torch.bfloat16}
    model = load_remapped(out, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    merge_experts(
        ExpertProblem(Checkpoint.open(str(half)), small_experts.examples(), ExpertSettings(keep=2)),
        tmp_path / "plain",
    )
    for a, b in zip(_remapped(out, dtype=torch.float32), _logits(tmp_path / "plain"), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


def test_a_compressed_model_can_be_trained_and_saved_as_a_state(
    mixtral: Path, tmp_path: Path
) -> None:
    model: Any = load_remapped(_merge(mixtral, tmp_path / "out", _ZERO_SHOT, form="remapped"))
    model(input_ids=torch.tensor([[3, 4, 5, 6]])).logits.sum().backward()
    names = [name for name, p in model.named_parameters() if ".experts." in name]
    grown = [n for n, p in model.named_parameters() if ".experts." in n and p.grad is not None]
    assert names
    assert grown
    again: Any = load_remapped(tmp_path / "out")
    again.load_state_dict(model.state_dict())


def test_the_guides_recipe_is_carried_out(mixtral: Path, tmp_path: Path) -> None:
    """But for its size: its settings are those of `evomerge merge`."""
    recipe = _guide()
    recipe["experts"] |= {"keep": 2}
    recipe["experts"]["compress"] |= {"rank": 2, "steps": 2}
    recipe |= {"model": str(mixtral), "calibration": {"text": "book.txt", "tokens": 8, "count": 6}}
    (tmp_path / "book.txt").write_text(" ".join(f"w{i * 7 % 45}" for i in range(200)))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merge_experts(open_expert_problem(tmp_path / "recipe.yaml", device="cpu"), tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / COMPRESSION_FILE).read_text())["losses"]) == 2
    assert (tmp_path / "out" / COMPRESSED_FILE).is_file()


def test_the_guide_names_every_setting() -> None:
    page = (Path(__file__).parents[3] / "docs/guides/experts.md").read_text(encoding="utf-8")
    section = page.split("## Compressing what was merged")[1].split("\n## ")[0]
    assert not [name for name in CompressSettings.model_fields if f"`{name}`" not in section]


# ---- bad input -------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_in_one_line(mixtral: Path, tmp_path: Path) -> None:
    for compress, words in [
        ({"rank": 17}, r"compress.rank: 17, expected 1 to 16: .* is \["),
        ({"rank": 2, "density": 1.5}, "less than or equal to 1"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"rank": 2, "steps": 5, "dense_steps": 4, "settled_steps": 2}, "4 and 2 are more than 5"),
    ]:
        with pytest.raises((MergeError, ValueError), match=words):
            _merge(mixtral, tmp_path / "out", compress)
    with pytest.raises(MergeError, match="all layers are skipped"):
        _merge(mixtral, tmp_path / "out", {"rank": 2}, skip=[0, 1])
    short = [Example((3,))] * 40
    problem = ExpertProblem(
        Checkpoint.open(str(mixtral)), short, ExpertSettings(keep=2, compress=_ZERO_SHOT)
    )
    with pytest.raises(MergeError, match="no example has a token to predict"):
        merge_experts(problem, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_damaged_is_refused(mixtral: Path, tmp_path: Path) -> None:
    out = _merge(mixtral, tmp_path / "out", _ZERO_SHOT, form="remapped")
    with pytest.raises(CheckpointError, match="needs whole matrices; load with `dense=True`"):
        load_remapped(out, experts_implementation="batched_mm")
    tensors = load_file(out / COMPRESSED_FILE)
    last = sorted(tensors)[-1]
    save_file({n: t for n, t in tensors.items() if n != last}, out / COMPRESSED_FILE)
    with pytest.raises(CheckpointError, match="has no tensor"):
        load_remapped(out)
    gone = last.rpartition(".")[0]
    save_file({n: t for n, t in tensors.items() if not n.startswith(gone)}, out / COMPRESSED_FILE)
    with pytest.raises(CheckpointError, match="export it again"):
        load_remapped(out)
    (out / COMPRESSED_FILE).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_remapped(out)
