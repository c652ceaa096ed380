"""Merged experts on disk: identity, lossless merges, three forms, interrupted and resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import small_experts
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.adapted import open_models
from evomerge.errors import CheckpointError, ExportError, MergeError, NonFiniteTensor
from evomerge.merging.structure.experts import export as moe_export
from evomerge.merging.structure.experts.alignment import permuted
from evomerge.merging.structure.experts.export import EXPERTS_FILE, ExpertProblem, merge_experts
from evomerge.merging.structure.experts.grouping import Groups
from evomerge.merging.structure.experts.layers import ExpertLayer, expert_layers
from evomerge.merging.structure.experts.merge import MergedExperts
from evomerge.merging.structure.experts.plan import LayerPlan
from evomerge.merging.structure.experts.remapped import load_remapped
from evomerge.merging.structure.experts.router import LogSumExpFit, collapsed
from evomerge.merging.structure.experts.settings import ExpertSettings, Similarity

Change = Callable[[dict[str, Tensor], tuple[ExpertLayer, ...]], None]


@pytest.fixture(scope="module", params=small_experts.FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_experts.folder(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_experts.folder("mixtral", tmp_path_factory.mktemp("mixtral"))


def _merge(folder: Path, out: Path, **settings: Any) -> list[LayerPlan]:
    chosen = ExpertSettings(**settings)
    problem = ExpertProblem(Checkpoint.open(str(folder)), small_experts.examples(), chosen)
    return merge_experts(problem, out)


def _weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return found


def _changed(folder: Path, place: Path, change: Change) -> Path:
    """A copy of a model, its weights changed."""
    shutil.copytree(folder, place)
    weights = {name: tensor.clone() for name, tensor in _weights(folder).items()}
    change(weights, expert_layers(Checkpoint.open(str(folder))))
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    return place


def _in_bfloat16(weights: dict[str, Tensor], layers: tuple[ExpertLayer, ...]) -> None:
    for name, tensor in weights.items():
        weights[name] = tensor.bfloat16()


def _logits(folder: Path) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return small_experts.logits(model, small_experts.examples())


def _shuffled(weights: dict[str, Tensor], layer: ExpertLayer, expert: int, into: int) -> None:
    """Make one expert a copy of another with its neurons in another order."""
    for role, axis in layer.neuron_axes.items():
        tensor = weights[layer.name(expert, role)]
        size = tensor.shape[axis] if axis is not None else 0
        order = torch.randperm(size, generator=torch.Generator().manual_seed(3))
        weights[layer.name(into, role)] = permuted(tensor, order, axis).clone()


@pytest.mark.parametrize("form", ["remapped", "collapsed"])
@pytest.mark.parametrize("method", ["m_smoe", "hc_smoe", "prune"])
def test_keeping_all_experts_changes_no_byte_by_any_method(
    mixtral: Path, tmp_path: Path, form: str, method: str
) -> None:
    _merge(mixtral, tmp_path / "out", keep=4, form=form, method=method)
    _check_same(_weights(mixtral), _weights(tmp_path / "out"))


def _check_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name


def test_a_group_is_the_weighted_mean_of_its_members(mixtral: Path, tmp_path: Path) -> None:
    """In bfloat16, against float64 rounded once; groups of one keep their bytes."""

    place = _changed(mixtral, tmp_path / "half", _in_bfloat16)
    plans = _merge(place, tmp_path / "out", keep=[3, 3], alignment="none")
    before, after = _weights(place), _weights(tmp_path / "out")
    layers = expert_layers(Checkpoint.open(str(place)))
    for layer, plan in zip(layers, plans, strict=True):
        for members in plan.groups.members:
            for role in layer.roles:
                parts = [before[layer.name(e, role)].double() * plan.weights[e] for e in members]
                wanted = torch.stack(parts).sum(0).float().bfloat16()
                for expert in members:
                    found = after[layer.name(expert, role)]
                    assert (found != wanted).float().mean() < 0.01  # ties of the rounding
                    torch.testing.assert_close(found, wanted, rtol=0.01, atol=0)
                if len(members) == 1:
                    assert torch.equal(found, before[layer.name(members[0], role)])


def test_names_of_experts_and_order_of_data_do_not_matter(mixtral: Path, tmp_path: Path) -> None:
    """Experts renamed with their rows of the router: the merged model computes the same."""
    order = [2, 0, 3, 1]

    def change(weights: dict[str, Tensor], layers: tuple[ExpertLayer, ...]) -> None:
        for layer in layers:
            weights[layer.router[0]] = weights[layer.router[0]][order].clone()
            for role in layer.roles:
                old = [weights[layer.name(expert, role)] for expert in range(4)]
                for new, expert in enumerate(order):
                    weights[layer.name(new, role)] = old[expert]

    renamed = _changed(mixtral, tmp_path / "renamed", change)
    settings = {"keep": 2, "alignment": "dominant"}
    one = _merge(mixtral, tmp_path / "one", **settings)
    problem = ExpertProblem(
        Checkpoint.open(str(renamed)), small_experts.examples()[::-1], ExpertSettings(**settings)
    )
    two = merge_experts(problem, tmp_path / "two")
    for before, after in zip(one, two, strict=True):
        assert {frozenset(m) for m in before.groups.members} == {
            frozenset(order[e] for e in m) for m in after.groups.members
        }
    for a, b in zip(_logits(tmp_path / "one"), _logits(tmp_path / "two"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_model_behind_an_adapter_is_the_one_that_is_run_and_merged(tmp_path: Path) -> None:
    """Against the same model with the adapter merged into it by peft."""
    small_adapters = pytest.importorskip("small_adapters")
    base = small_experts.folder("mixtral", tmp_path / "base")
    adapter = small_adapters.train(base, tmp_path / "adapter", target_modules=["q_proj"], r=4)
    whole = small_adapters.peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    ).merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    small_experts.small_llama.tokenizer().save_pretrained(tmp_path / "whole")
    path = f"{base}+{adapter}"
    chosen = ExpertSettings(keep=4, usage="gate_mass")
    problem = ExpertProblem(open_models([path])[path], small_experts.examples(), chosen)
    merge_experts(problem, tmp_path / "one")
    _merge(tmp_path / "whole", tmp_path / "two", keep=4, usage="gate_mass")
    for name, tensor in _weights(tmp_path / "two").items():
        torch.testing.assert_close(_weights(tmp_path / "one")[name], tensor, rtol=1e-5, atol=1e-6)
    one, two = (json.loads((tmp_path / n / EXPERTS_FILE).read_text()) for n in ("one", "two"))
    for a, b in zip(one["layers"], two["layers"], strict=True):
        assert a["usage"] == pytest.approx(b["usage"], rel=1e-5)


def test_an_adapted_tensor_is_written_in_the_models_dtype(mixtral: Path, tmp_path: Path) -> None:
    small_adapters = pytest.importorskip("small_adapters")
    adapter = small_adapters.train(mixtral, tmp_path / "adapter", target_modules=["q_proj"], r=4)
    half = _changed(mixtral, tmp_path / "half", _in_bfloat16)
    path = f"{half}+{adapter}"
    problem = ExpertProblem(
        open_models([path])[path], small_experts.examples(), ExpertSettings(keep=4)
    )
    merge_experts(problem, tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    written = _weights(tmp_path / "out")[name]
    assert torch.equal(written, problem.model.tensor(name).bfloat16())


def test_the_order_of_an_experts_neurons_is_no_matter(folder: Path, tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor], layers: tuple[ExpertLayer, ...]) -> None:
        for layer in layers:
            for expert in range(layer.experts):
                _shuffled(weights, layer, expert, expert)

    other = _changed(folder, tmp_path / "other", change)
    assert any(not torch.equal(t, _weights(other)[n]) for n, t in _weights(folder).items())
    for one, two in zip(_logits(folder), _logits(other), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alignment", ["first", "dominant"])
def test_permuted_copies_merge_without_loss(mixtral: Path, tmp_path: Path, alignment: str) -> None:
    """Experts 2 and 3 are copies of 0 and 1, and routed alike: two of four say it all."""

    def change(weights: dict[str, Tensor], layers: tuple[ExpertLayer, ...]) -> None:
        for layer in layers:
            weights[layer.router[0]][2:] = weights[layer.router[0]][:2]
            for expert in (0, 1):
                _shuffled(weights, layer, expert, expert + 2)

    planted = _changed(mixtral, tmp_path / "planted", change)
    plans = _merge(
        planted, tmp_path / "out", keep=2, method="hc_smoe", alignment=alignment,
        similarity="router_logits",
    )  # fmt: skip
    assert [plan.groups.members for plan in plans] == [((0, 2), (1, 3))] * len(plans)
    for one, two in zip(_logits(planted), _logits(tmp_path / "out"), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    unaligned = tmp_path / "unaligned"
    _merge(planted, unaligned, keep=2, method="hc_smoe", alignment="none",
           similarity="router_logits")  # fmt: skip
    worst = max(float((a - b).abs().max())
                for a, b in zip(_logits(planted), _logits(unaligned), strict=True))  # fmt: skip
    assert worst > 0.01


def test_remapped_is_replicated_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    plans = _merge(folder, tmp_path / "big", keep=2)
    _merge(folder, tmp_path / "small", keep=2, form="remapped")
    count = sum(len(plan.groups.members) for plan in plans)
    names = list(_weights(tmp_path / "small"))
    assert len({n.rsplit(".", 2)[0] for n in names if ".experts." in n}) == count
    alone = {"experts_implementation": "batched_mm"}  # one product for each token and expert
    pair = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "big", **alone).eval(),
        load_remapped(tmp_path / "small", **alone),
    ]
    for model in pair:  # products also differ with where in a mapped file a weight lies
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    one, two = (small_experts.logits(model, small_experts.examples()) for model in pair)
    assert all(map(torch.equal, one, two))
    logits = small_experts.logits(load_remapped(tmp_path / "small"), small_experts.examples())
    for big, small in zip(_logits(tmp_path / "big"), logits, strict=True):
        torch.testing.assert_close(big, small, rtol=1e-5, atol=1e-6)


def test_a_remapped_model_is_refused_by_what_would_misread_it(
    mixtral: Path, tmp_path: Path
) -> None:
    _merge(mixtral, tmp_path / "small", keep=2, form="remapped")
    with pytest.raises(ValueError, match="evomerge_remapped"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointError, match="not remapped"):
        load_remapped(mixtral)
    config = json.loads((tmp_path / "small/config.json").read_text())
    config["expert_map"] = config["expert_map"][:1]
    (tmp_path / "small/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expert_map: tables of"):
        load_remapped(tmp_path / "small")


def test_contributions_of_merged_experts_add(mixtral: Path) -> None:
    """A layer's experts in one group: whatever the router says, the gates of its top k sum to 1,
    so that the layer is that one expert, computed here by its formula."""
    model = Checkpoint.open(str(mixtral))
    layers = expert_layers(model)
    plan = LayerPlan(Groups((1, 1, 1, 1)), (0.0, 1.0, 0.0, 0.0))
    settings = ExpertSettings(keep=1, method="prune")
    merged = MergedExperts(model, layers, [plan] * len(layers), settings)
    live: Any = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    block = live.model.layers[0].mlp
    with torch.no_grad():
        for expert in range(4):
            w1, w3 = (merged.tensor(layers[0].name(expert, f"{r}.weight")) for r in ("w1", "w3"))
            block.experts.gate_up_proj[expert] = torch.cat([w1, w3])
            block.experts.down_proj[expert] = merged.tensor(layers[0].name(expert, "w2.weight"))
        x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
        w1, w3, w2 = (model.tensor(layers[0].name(1, f"{r}.weight")) for r in ("w1", "w3", "w2"))
        expected = (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_collapsed_rows() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    groups = Groups((0, 3, 0, 3))
    assert torch.equal(collapsed(weight, groups, "dominant"), weight[[0, 3]])
    assert torch.allclose(collapsed(weight, groups, "mean")[1], (weight[1] + weight[3]) / 2)


def test_least_squares_of_groups_of_one_and_of_copies() -> None:
    """log(exp z) = z: groups of one get their own rows back, copies the row again, but for the
    constant log 2 that no row can give and inputs of mean 0 do not ask for."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 6, generator=generator), torch.randn(4000, 6, generator=generator)
    fit = LogSumExpFit(weight, Groups((0, 1, 2, 3)))
    fit.add(torch.cat([x, -x]))
    torch.testing.assert_close(fit.solve(), weight, rtol=1e-4, atol=1e-4)
    twice = torch.cat([weight, weight])
    copies = LogSumExpFit(twice, Groups((0, 1, 2, 3, 0, 1, 2, 3)))
    copies.add(torch.cat([x, -x]))
    torch.testing.assert_close(copies.solve(), weight, rtol=1e-4, atol=1e-4)


def test_a_routers_bias_weighs_its_rows() -> None:
    """A row that its bias keeps from ever being chosen has no part in its group's."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 6, generator=generator), torch.randn(4000, 6, generator=generator)
    bias = torch.tensor([1.5, -80.0, -0.5, -80.0])
    fit = LogSumExpFit(weight, Groups((0, 0, 2, 2)), bias)
    fit.add(x)
    torch.testing.assert_close(fit.solve(1e-9), weight[[0, 2]], rtol=1e-4, atol=1e-4)
    assert collapsed(bias, Groups((0, 0, 2, 2)), "mean").tolist() == [-39.25, -40.25]


@pytest.mark.parametrize("similarity", get_args(Similarity))
def test_every_base_of_similarity_groups(mixtral: Path, tmp_path: Path, similarity: str) -> None:
    plans = _merge(mixtral, tmp_path / "out", keep=2, similarity=similarity, allocation="uniform")
    assert all(len(plan.groups.members) == 2 for plan in plans)
    document = json.loads((tmp_path / "out" / EXPERTS_FILE).read_text())
    assert document["settings"]["similarity"] == similarity
    assert sum(document["layers"][0]["usage"]) == pytest.approx(1)


def test_a_skipped_layer_is_left_alone(mixtral: Path, tmp_path: Path) -> None:
    plans = _merge(mixtral, tmp_path / "out", keep=1, skip=[0])
    assert [len(plan.groups.members) for plan in plans] == [4, 1]
    after = _weights(tmp_path / "out")
    for name, tensor in _weights(mixtral).items():
        assert torch.equal(after[name], tensor) == (
            ".layers.1.block_sparse_moe.experts" not in name
        )


def test_a_merge_that_was_cut_off_goes_on_without_running_the_model(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ExpertSettings(keep=2)
    problem = ExpertProblem(Checkpoint.open(str(mixtral)), small_experts.examples(), settings)
    merge_experts(problem, tmp_path / "whole", shard_bytes=20_000)
    seen = 0

    def interrupt(what: str, done: int, total: int) -> None:
        nonlocal seen
        seen += what == "merging experts"
        if what == "merging experts" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_experts(problem, tmp_path / "out", shard_bytes=20_000, progress=interrupt)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(moe_export, "Network", None)
    merge_experts(problem, tmp_path / "out", shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_does_not_fit_is_refused_in_one_line(mixtral: Path, tmp_path: Path) -> None:
    for settings, words in [
        ({"keep": 5}, "5 in expert layer 0, expected 1 to 4"),
        ({"keep": [2, 3, 2]}, "3 counts for 2 layers"),
        ({"keep": 1, "form": "collapsed"}, "each token is sent to that many"),
        ({"keep": 2, "skip": [7]}, "no layer 7"),
    ]:
        with pytest.raises(MergeError, match=words):
            _merge(mixtral, tmp_path / "out", **settings)
    hungry = _changed(mixtral, tmp_path / "hungry", lambda weights, layers: None)
    config = json.loads((hungry / "config.json").read_text()) | {"num_experts_per_tok": 6}
    (hungry / "config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match="sends each token to 6 experts, its layers have 4"):
        _merge(hungry, tmp_path / "out", keep=2)
    broken = _changed(
        mixtral, tmp_path / "broken", lambda w, layers: w[layers[0].router[0]].fill_(torch.nan)
    )
    with pytest.raises(NonFiniteTensor, match=r"gate\.weight"):
        _merge(broken, tmp_path / "out", keep=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ExportError, match="exists already"):
        _merge(mixtral, tmp_path / "full", keep=2)
    assert not (tmp_path / "out").exists()
