"""What experts are compared by: every base against its formula, worked out from a plain model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import small_experts
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from evomerge.checkpoints import Checkpoint
from evomerge.errors import MergeError
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.experts import gradients as moe_gradients
from evomerge.merging.structure.experts.gradients import add_gradients
from evomerge.merging.structure.experts.layers import ExpertLayer, expert_layers
from evomerge.merging.structure.experts.settings import ExpertSettings, Similarity
from evomerge.merging.structure.experts.similarity import similarity_gram
from evomerge.merging.structure.experts.statistics import LayerStatistics, routing_statistics

BASES: tuple[Similarity, ...] = get_args(Similarity)
AT = 1  # the layer that is looked at


@dataclass(frozen=True)
class Plain:
    """What layer `AT` of transformers' own model was seen to do, one sequence at a time: inputs
    [n, d], experts chosen [n, 2], and the gradients of its experts; in float64."""

    x: Tensor
    chosen: Tensor
    gate_up: Tensor
    down: Tensor
    gradients: tuple[Tensor, Tensor]
    router: Tensor

    def sent(self, *experts: int) -> Tensor:
        return self.x[torch.isin(self.chosen, torch.tensor(experts)).any(1)]

    def hidden(self, expert: int, x: Tensor) -> Tensor:
        gate, up = (x @ self.gate_up[expert].T).chunk(2, 1)
        return functional.silu(gate) * up

    def output(self, expert: int) -> Tensor:
        return self.hidden(expert, self.x) @ self.down[expert].T


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_experts.folder("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def plain(mixtral: Path) -> Plain:
    model: Any = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float64).eval()
    model.set_experts_implementation("eager")
    seen: list[Any] = []
    experts, router = model.model.layers[AT].mlp.experts, model.model.layers[AT].mlp.gate.weight
    experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    total, count = torch.zeros((), dtype=torch.float64), 0
    for example in small_experts.examples():
        row = torch.tensor([example.tokens])
        logits = model(input_ids=row, use_cache=False).logits[0, :-1]
        total = total + functional.cross_entropy(logits, row[0, 1:], reduction="sum")
        count += len(logits)
    (total / count).backward()
    gate_up, down = experts.gate_up_proj, experts.down_proj
    x, chosen = (torch.cat([inputs[at].detach() for inputs in seen]) for at in (0, 1))
    gradients = gate_up.grad, down.grad
    return Plain(x, chosen, gate_up.detach(), down.detach(), gradients, router.detach())


def _measured(model: Checkpoint, batch_size: int = 4) -> list[LayerStatistics]:
    network, layers, data = Network(model), expert_layers(model), small_experts.examples()
    seen = routing_statistics(
        network, model, layers, data, batch_size=batch_size, outputs=True, inputs=True
    )
    add_gradients(
        network, model, layers, seen, data, order=lambda at, e: None, batch_size=batch_size
    )
    return seen


def _gram(base: Similarity, model: Checkpoint, seen: list[LayerStatistics]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return similarity_gram(
        base, model, expert_layers(model)[AT], seen[AT], order=lambda e: None, generator=generator
    )


@pytest.fixture(scope="module")
def measured(mixtral: Path) -> list[LayerStatistics]:
    return _measured(Checkpoint.open(str(mixtral)))


def _spread(plain: Plain, expert: int) -> Tensor:
    return plain.sent(expert).square().mean(0).sqrt()


def _flat(plain: Plain, expert: int) -> Tensor:
    return torch.cat([plain.gate_up[expert].flatten(), plain.down[expert].flatten()])


def _gradient(plain: Plain, expert: int) -> Tensor:
    return torch.cat([gradient[expert].flatten() for gradient in plain.gradients])


VECTORS: dict[Similarity, Callable[[Plain, int], Tensor]] = {
    "router_logits": lambda p, e: p.x @ p.router[e],
    "router_weights": lambda p, e: p.router[e],
    "router_weight_features": lambda p, e: p.router[e] * _spread(p, e),
    "features": lambda p, e: p.sent(e).mean(0),
    "absolute_features": lambda p, e: p.sent(e).abs().mean(0),
    "expert_weights": _flat,
    "expert_weight_features": lambda p, e: (p.gate_up[e] * _spread(p, e)).flatten(),
    "gradients": _gradient,
    "weight_gradients": lambda p, e: _flat(p, e) * _gradient(p, e),
    "outputs": lambda p, e: p.output(e).mean(0),
}


@pytest.mark.parametrize("base", VECTORS)
def test_inner_products_are_of_the_vectors_that_are_named(
    mixtral: Path, plain: Plain, measured: list[LayerStatistics], base: Similarity
) -> None:
    rows = torch.stack([VECTORS[base](plain, expert) for expert in range(4)])
    found = _gram(base, Checkpoint.open(str(mixtral)), measured)
    wanted = rows @ rows.T
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_mean_squared_error_of_outputs_orders_pairs(
    mixtral: Path, plain: Plain, measured: list[LayerStatistics]
) -> None:
    made = torch.stack([plain.output(expert) for expert in range(4)])
    apart = (made[:, None] - made).square().mean((2, 3))
    wanted = 1 - apart / (2 * made.square().mean())
    found = _gram("output_mse", Checkpoint.open(str(mixtral)), measured)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["neuron_correlation", "neuron_correlation_max"])
def test_correlations_of_neurons_are_numpys(
    mixtral: Path, plain: Plain, measured: list[LayerStatistics], base: Similarity
) -> None:
    wanted = np.eye(4)
    for i, j in ((i, j) for i in range(4) for j in range(4) if i != j):
        x = plain.sent(i, j)
        both = np.corrcoef(plain.hidden(i, x).numpy().T, plain.hidden(j, x).numpy().T)
        table = both[: len(both) // 2, len(both) // 2 :]
        if base == "neuron_correlation":
            wanted[i, j] = table[linear_sum_assignment(-table)].mean()
        else:
            wanted[i, j] = (table.max(0).mean() + table.max(1).mean()) / 2
    found = _gram(base, Checkpoint.open(str(mixtral)), measured)
    assert found.numpy() == pytest.approx(wanted, abs=1e-4)


def test_every_base_has_a_test() -> None:
    other = {"output_mse", "neuron_correlation", "neuron_correlation_max", "random"}
    assert set(BASES) == VECTORS.keys() | other


def test_renamed_experts_are_as_alike_as_before(
    mixtral: Path, measured: list[LayerStatistics], tmp_path: Path
) -> None:
    order = [2, 0, 3, 1]
    model = Checkpoint.open(str(mixtral))
    weights = {name: tensor.clone() for name, tensor in _weights(mixtral).items()}
    for layer in expert_layers(model):
        _rename(weights, layer, order)
    for path in mixtral.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    renamed = Checkpoint.open(str(tmp_path))
    again = _measured(renamed)
    for base in (base for base in BASES if base != "random"):
        before, after = _gram(base, model, measured), _gram(base, renamed, again)
        largest = float(before.abs().max())
        torch.testing.assert_close(
            after, before[order][:, order], rtol=1e-4, atol=1e-4 * largest, msg=base
        )


def _weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return found


def _rename(weights: dict[str, Tensor], layer: ExpertLayer, order: list[int]) -> None:
    weights[layer.router[0]] = weights[layer.router[0]][order].clone()
    for role in layer.roles:
        old = [weights[layer.name(expert, role)] for expert in range(4)]
        for new, expert in enumerate(order):
            weights[layer.name(new, role)] = old[expert]


def test_batches_and_passes_do_not_matter(
    mixtral: Path, measured: list[LayerStatistics], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer's gradients at a time, in other batches."""
    monkeypatch.setattr(moe_gradients, "GRADIENT_BYTES", 1)
    again = _measured(Checkpoint.open(str(mixtral)), batch_size=3)
    for one, two in zip(measured, again, strict=True):
        for name in ("gradients", "weight_gradients", "output_products", "squares", "magnitudes"):
            before, after = getattr(one, name), getattr(two, name)
            largest = float(before.abs().max())
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5 * largest)


def test_what_was_not_measured_is_refused_by_name(mixtral: Path) -> None:
    model = Checkpoint.open(str(mixtral))
    layers, data = expert_layers(model), small_experts.examples()
    bare = routing_statistics(Network(model), model, layers, data, batch_size=8)
    needs = {"outputs", "output_mse", "gradients", "weight_gradients"}
    for base in (*needs, "neuron_correlation", "neuron_correlation_max"):
        with pytest.raises(MergeError, match=f"similarity: {base}: was not measured") as caught:
            _gram(base, model, bare)  # type: ignore[arg-type]
        setting = {"o": "outputs", "g": "gradients", "w": "gradients"}.get(base[0])
        assert setting is None or f"`fit: {{{setting}: true}}`" in str(caught.value)
    for base in BASES:
        settings = ExpertSettings(keep=2, similarity=base)
        asks = settings.needs_outputs or settings.needs_inputs or settings.needs_gradients
        assert asks == (base in needs or base.startswith("neuron"))


def test_the_guide_has_every_base_and_every_setting() -> None:
    guide = (Path(__file__).parents[3] / "docs/guides/experts.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(\w+)` \|", guide, re.MULTILINE)
    assert {*BASES, *ExpertSettings.model_fields} <= set(told)
