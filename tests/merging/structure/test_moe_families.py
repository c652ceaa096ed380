"""Every family of mixtures that transformers has per-expert files for, from data to all forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_experts
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evomerge.checkpoints import Checkpoint
from evomerge.errors import MergeError
from evomerge.merging.fitted.calibration import Example, batch
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.experts.alignment import permuted
from evomerge.merging.structure.experts.export import ExpertProblem, merge_experts
from evomerge.merging.structure.experts.layers import expert_layers, top_k
from evomerge.merging.structure.experts.plan import LayerPlan
from evomerge.merging.structure.experts.remapped import load_remapped
from evomerge.merging.structure.experts.settings import ExpertSettings
from evomerge.merging.structure.experts.statistics import LayerStatistics, routing_statistics


@pytest.fixture(scope="module", params=small_experts.EVERY)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_experts.folder(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_experts.folder(small_experts.SWITCH, tmp_path_factory.mktemp("switch"))


def _merge(folder: Path, out: Path, **settings: Any) -> list[LayerPlan]:
    chosen = ExpertSettings(**settings)
    problem = ExpertProblem(Checkpoint.open(str(folder)), small_experts.examples(), chosen)
    return merge_experts(problem, out)


def _weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return found


def _logits(folder: Path, **options: Any) -> list[Tensor]:
    model = small_experts.loaded(folder, **options)
    return small_experts.logits(model, small_experts.examples())


def _check_close(one: list[Tensor], two: list[Tensor], tolerance: float) -> None:
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def _seen(folder: Path, **options: Any) -> list[LayerStatistics]:
    model = Checkpoint.open(str(folder))
    data = small_experts.examples()
    return routing_statistics(
        Network(model), model, expert_layers(model), data, batch_size=4, **options
    )


def test_usage_sums_to_one_and_loses_no_token(folder: Path) -> None:
    tokens = sum(len(example.tokens) for example in small_experts.examples())
    chosen = top_k(Checkpoint.open(str(folder)).config)
    for seen in _seen(folder):
        assert float(seen.usage().sum()) == pytest.approx(1)
        assert float(seen.usage("gate_mass").sum()) == pytest.approx(1)
        if "Switch" not in str(Checkpoint.open(str(folder)).config["architectures"]):
            assert seen.tokens == tokens
            assert float(seen.counts.sum()) == chosen * tokens


def test_what_neurons_do_is_what_the_live_experts_make(folder: Path) -> None:
    """`inputs` is refused where an expert's formula does not give the live module's outputs."""
    for layer, seen in zip(expert_layers(Checkpoint.open(str(folder))), _seen(folder, inputs=True),
                           strict=True):  # fmt: skip
        assert seen.inputs is not None
        assert len(seen.inputs.rows) == seen.tokens
        assert [len(seen.inputs.of(e)) for e in range(layer.experts)] == seen.counts.tolist()


def test_keeping_all_experts_changes_no_byte(folder: Path, tmp_path: Path) -> None:
    _merge(folder, tmp_path / "out", keep=4)
    before, after = _weights(folder), _weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_remapped_computes_what_replicated_does(folder: Path, tmp_path: Path) -> None:
    plans = _merge(folder, tmp_path / "big", keep=2)
    _merge(folder, tmp_path / "small", keep=2, form="remapped")
    kept = sum(len(plan.groups.members) for plan in plans)
    stored = {n.rsplit(".", 2)[0] for n in _weights(tmp_path / "small") if ".experts." in n}
    assert len(stored) == kept < 4 * len(plans)
    small = small_experts.logits(load_remapped(tmp_path / "small"), small_experts.examples())
    _check_close(_logits(tmp_path / "big"), small, 1e-5)
    assert max(float((a - b).abs().max())
               for a, b in zip(_logits(folder), small, strict=True)) > 1e-3  # fmt: skip


@pytest.mark.parametrize("alignment_by", ["weights", "activations"])
def test_permuted_copies_merge_without_loss(
    folder: Path, tmp_path: Path, alignment_by: str
) -> None:
    """Experts 2 and 3 are copies of 0 and 1, and routed alike: two of four say it all."""
    weights = {name: tensor.clone() for name, tensor in _weights(folder).items()}
    for layer in expert_layers(Checkpoint.open(str(folder))):
        for name in layer.router:
            weights[name][2:] = weights[name][:2]
        for expert, role in ((e, r) for e in (0, 1) for r in layer.roles):
            tensor, axis = weights[layer.name(expert, role)], layer.neuron_axes[role]
            size = 0 if axis is None else tensor.shape[axis]
            order = torch.randperm(size, generator=torch.Generator().manual_seed(3))
            weights[layer.name(expert + 2, role)] = permuted(tensor, order, axis).clone()
    planted = tmp_path / "planted"
    planted.mkdir()
    for path in folder.iterdir():
        (planted / path.name).write_bytes(path.read_bytes())
    save_file(weights, planted / "model.safetensors", metadata={"format": "pt"})
    plans = _merge(
        planted, tmp_path / "out", keep=2, method="hc_smoe", similarity="router_weights",
        alignment="first", alignment_by=alignment_by,
    )  # fmt: skip
    assert [plan.groups.members for plan in plans] == [((0, 2), (1, 3))] * len(plans)
    _check_close(_logits(planted), _logits(tmp_path / "out"), 1e-4)


def test_collapsed_is_small_and_loads_by_transformers(folder: Path, tmp_path: Path) -> None:
    if folder.name.rstrip("0") in small_experts.GROUPED:
        with pytest.raises(MergeError, match="groups of experts"):
            _merge(folder, tmp_path / "out", keep=2, form="collapsed")
        return
    _merge(folder, tmp_path / "out", keep=2, form="collapsed", router="logsumexp")
    weights = _weights(tmp_path / "out")
    for layer in expert_layers(Checkpoint.open(str(tmp_path / "out"))):
        assert layer.experts == 2
        assert all(len(weights[name]) == 2 for name in layer.router)
    assert all(bool(x.isfinite().all()) for x in _logits(tmp_path / "out"))


def test_a_switch_is_watched_encoder_first_and_to_its_capacity(switch: Path) -> None:
    """Against transformers' own routers, every sequence alone: a token that finds its expert full
    is sent nowhere."""
    layers = expert_layers(Checkpoint.open(str(switch)))
    assert [layer.prefix.split(".")[0] for layer in layers] == ["encoder", "decoder"]
    model = small_experts.loaded(switch)
    counts, tokens = torch.zeros(2, 4), [0, 0]
    for at, name in enumerate(layer.prefix for layer in layers):

        def look(module: object, inputs: object, output: Any, at: int = at) -> None:
            counts[at] += output[0].sum((0, 1))
            tokens[at] += output[0].shape[1]

        model.get_submodule(f"{name}.router").register_forward_hook(look)
    small_experts.logits(model, small_experts.examples())
    for at, seen in enumerate(_seen(switch)):
        assert seen.counts.tolist() == counts[at].tolist()
        assert seen.tokens == tokens[at]
    assert counts.sum() < sum(tokens)  # some were beyond the capacity


def test_a_collapsed_switch_has_room_for_as_many_tokens(switch: Path, tmp_path: Path) -> None:
    _merge(switch, tmp_path / "out", keep=3, form="collapsed")
    config = Checkpoint.open(str(tmp_path / "out")).config
    assert (config["num_experts"], config["expert_capacity"]) == (3, 6)  # of 4 with room for 4


def test_an_encoder_decoder_is_given_prompt_and_answer(switch: Path) -> None:
    """Logits stand where a causal model's would that predict the answer's tokens."""
    examples = [Example((5, 6, 7, 8, 9), 3), Example((11, 12, 13, 14), 2)]
    found = Network(Checkpoint.open(str(switch))).logits(batch(examples))
    model = small_experts.loaded(switch)
    for row, example in enumerate(examples):
        prompt = torch.tensor([[*example.tokens[: example.answer], 2]])
        answer = example.tokens[example.answer :]
        labels = torch.tensor([answer])
        with torch.no_grad():
            logits = model(input_ids=prompt, labels=labels, use_cache=False).logits[0]
        places = range(example.answer - 1, len(example.tokens) - 1)
        torch.testing.assert_close(found[row, list(places)], logits, rtol=1e-4, atol=1e-5)
        assert not found[row, : example.answer - 1].any()
