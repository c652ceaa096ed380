"""Neurons matched by what they do: planted orders, where weights mislead, and merges on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import small_experts
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from evomerge.checkpoints import Checkpoint
from evomerge.errors import MergeError
from evomerge.merging.structure.experts import export as moe_export
from evomerge.merging.structure.experts.alignment import (
    correlation,
    hidden,
    matched,
    matched_by_activations,
    outputs_of,
    permuted,
)
from evomerge.merging.structure.experts.export import EXPERTS_FILE, ExpertProblem, merge_experts
from evomerge.merging.structure.experts.grouping import Groups
from evomerge.merging.structure.experts.layers import expert_layers
from evomerge.merging.structure.experts.merge import MergedExperts
from evomerge.merging.structure.experts.plan import Aligner, LayerPlan
from evomerge.merging.structure.experts.settings import ExpertSettings

AXES = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}
PLAIN = {"wi.weight": 0, "wi.bias": 0, "wo.weight": 1, "wo.bias": None}


def _expert(seed: int, neurons: int = 9, width: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {role: (width, neurons) if axis else (neurons, width) for role, axis in AXES.items()}
    return {role: torch.randn(shape, generator=generator) for role, shape in shapes.items()}


def _rows(count: int = 200, width: int = 6) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(7))


def test_a_planted_order_is_found_where_weights_mislead() -> None:
    """Neurons in another order whose `up` is larger by what `down` is smaller: the same expert,
    and rows that no product of weights can tell."""
    expert, rows = _expert(0), _rows()
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(9, generator=generator)
    scale = torch.exp(4 * torch.randn(9, generator=generator))
    copy = {role: permuted(tensor, order, AXES[role]) for role, tensor in expert.items()}
    copy["up_proj.weight"] = copy["up_proj.weight"] * scale[:, None]
    copy["down_proj.weight"] = copy["down_proj.weight"] / scale
    torch.testing.assert_close(
        outputs_of(copy, AXES, rows, "silu"), outputs_of(expert, AXES, rows, "silu"),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    found = matched_by_activations(expert, copy, AXES, rows, "silu")
    assert torch.equal(order[found], torch.arange(9))
    assert not torch.equal(order[matched(expert, copy, AXES)], torch.arange(9))


def test_the_order_is_the_best_assignment_of_numpys_correlations() -> None:
    one, other, rows = _expert(0), _expert(1), _rows()
    a, b = (hidden(e, AXES, rows, "gelu").double().numpy() for e in (one, other))
    table = np.corrcoef(a.T, b.T)[:9, 9:]
    wanted = linear_sum_assignment(-table)[1].tolist()
    assert matched_by_activations(one, other, AXES, rows, "gelu").tolist() == wanted
    found = correlation(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    assert found == pytest.approx(table, abs=1e-9)


def test_an_expert_is_its_own_match_and_dead_neurons_are_no_matter() -> None:
    expert, rows = _expert(2), _rows()
    assert matched_by_activations(expert, expert, AXES, rows, "silu").tolist() == list(range(9))
    expert["up_proj.weight"][4] = 0
    table = correlation(*[hidden(expert, AXES, rows, "silu")] * 2)
    assert bool(table.isfinite().all())
    assert float(table[4].abs().max()) == 0
    assert matched_by_activations(expert, expert, AXES, rows, "silu").tolist() == list(range(9))


def test_without_data_neurons_are_matched_by_weights() -> None:
    one, other = _expert(0), _expert(1)
    found = matched_by_activations(one, other, AXES, _rows(1), "silu")
    assert torch.equal(found, matched(one, other, AXES))


def test_experts_without_a_gate_and_with_biases() -> None:
    generator = torch.Generator().manual_seed(0)
    expert = {
        "wi.weight": torch.randn(9, 6, generator=generator),
        "wi.bias": torch.randn(9, generator=generator),
        "wo.weight": torch.randn(6, 9, generator=generator),
        "wo.bias": torch.randn(6, generator=generator),
    }
    rows = _rows()
    made = torch.relu(rows @ expert["wi.weight"].T + expert["wi.bias"])
    torch.testing.assert_close(hidden(expert, PLAIN, rows, "relu"), made)
    whole = made @ expert["wo.weight"].T + expert["wo.bias"]
    torch.testing.assert_close(outputs_of(expert, PLAIN, rows, "relu"), whole)


def test_experts_of_an_unknown_kind_are_refused() -> None:
    axes = {"alpha.weight": 0, "beta.weight": 0, "w2.weight": 1}
    expert = dict(zip(axes, _expert(0).values(), strict=True))
    with pytest.raises(MergeError, match="which of them is the experts' gate"):
        hidden(expert, axes, _rows(), "silu")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_experts.folder("mixtral", tmp_path_factory.mktemp("mixtral"))


def _problem(folder: Path, alignment: str = "dominant") -> ExpertProblem:
    settings = ExpertSettings(keep=2, alignment=alignment, alignment_by="activations")
    return ExpertProblem(Checkpoint.open(str(folder)), small_experts.examples(), settings)


def test_another_formula_than_the_live_experts_is_refused(mixtral: Path, tmp_path: Path) -> None:
    """A config whose activation function is not what its experts use."""
    problem = _problem(mixtral)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evomerge.merging.structure.experts.statistics.activation_name",
                      lambda config: "relu")  # fmt: skip
        with pytest.raises(MergeError, match="take `alignment_by: weights`"):
            merge_experts(problem, tmp_path / "out")


def test_a_merge_by_activations_goes_on_without_running_the_model(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = _problem(mixtral)
    merge_experts(problem, tmp_path / "whole", shard_bytes=20_000)

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "merging experts" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_experts(problem, tmp_path / "out", shard_bytes=20_000, progress=interrupt)
    monkeypatch.setattr(moe_export, "Network", None)
    merge_experts(problem, tmp_path / "out", shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((tmp_path / "out" / EXPERTS_FILE).read_text())["settings"]["alignment_by"]


def test_all_orders_that_a_merge_asks_for_are_known_beforehand(mixtral: Path) -> None:
    """Also where one expert's share is so large that it is rounded to 1."""
    model = Checkpoint.open(str(mixtral))
    layers, settings = expert_layers(model), ExpertSettings(keep=1)
    plans = [LayerPlan(Groups((1, 1, 1, 1)), (1e-30, 1.0, 0.0, 0.0))] * len(layers)
    aligner = Aligner(model, layers)
    aligner.of_plans(plans, settings)
    known = set(aligner.orders)
    merged = MergedExperts(model, layers, plans, settings, aligner=aligner)
    for name in merged.names:
        merged.tensor(name)
    assert set(aligner.orders) == known == {(at, 1, 0) for at in range(len(layers))}


def test_by_activations_is_another_merge_than_by_weights(mixtral: Path, tmp_path: Path) -> None:
    """Of the same groups, so that only the order of neurons tells them apart."""
    settings = {"keep": 2, "alignment": "dominant"}
    for by in ("weights", "activations"):
        chosen = ExpertSettings.model_validate({**settings, "alignment_by": by})
        problem = ExpertProblem(Checkpoint.open(str(mixtral)), small_experts.examples(), chosen)
        merge_experts(problem, tmp_path / by)
    one, two = (json.loads((tmp_path / by / EXPERTS_FILE).read_text())["layers"]
                for by in ("weights", "activations"))  # fmt: skip
    assert one == two
    files = [tmp_path / by / "model.safetensors" for by in ("weights", "activations")]
    assert files[0].read_bytes() != files[1].read_bytes()
