"""What is counted of the routing, against transformers' own router outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_experts
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from evomerge.checkpoints import Checkpoint
from evomerge.errors import MergeError
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.experts.layers import expert_count_keys, expert_layers, top_k
from evomerge.merging.structure.experts.plan import Aligner
from evomerge.merging.structure.experts.statistics import LayerStatistics, routing_statistics


@pytest.fixture(scope="module", params=[*small_experts.FAMILIES, "deepseek_v2", "deepseek_v3"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    place = tmp_path_factory.mktemp(request.param)
    return Checkpoint.open(str(small_experts.folder(request.param, place)))


def _seen(model: Checkpoint, count: int = 10, batch_size: int = 4) -> list[LayerStatistics]:
    found = small_experts.examples(count)
    layers = expert_layers(model)
    return routing_statistics(
        Network(model), model, layers, found, batch_size=batch_size, outputs=True
    )


def test_layers_are_found_by_name_and_shape(opened: Checkpoint) -> None:
    layers = expert_layers(opened)
    assert [layer.experts for layer in layers] == [4] * len(layers)
    assert all(opened.shape(layer.router[0]) == (4, 16) for layer in layers)
    assert top_k(opened.config) == 2
    assert expert_count_keys(opened.config, 4)
    for layer in layers:
        outward = [role for role, axis in layer.neuron_axes.items() if axis == 1]
        assert outward in (["w2.weight"], ["down_proj.weight"])
        assert len(layer.roles) == 3
        assert not any("shared" in role for role in layer.roles)


def test_counts_and_logits_are_the_routers_own(opened: Checkpoint) -> None:
    """Every sequence alone, so without padding, by hooks on transformers' own routers."""
    layers = expert_layers(opened)
    seen = _seen(opened)
    model = AutoModelForCausalLM.from_pretrained(opened.folder, dtype=torch.float32).eval()
    routers = [m for n, m in model.named_modules() if n.endswith(".gate") and hasattr(m, "top_k")]
    logits: list[list[torch.Tensor]] = [[] for _ in layers]
    counts = torch.zeros(len(layers), 4)
    for at, router in enumerate(routers):

        def look(module: object, inputs: object, output: tuple[torch.Tensor, ...], at: int = at):  # type: ignore[no-untyped-def]
            logits[at].append(output[0].double().reshape(-1, 4))
            counts[at] += torch.bincount(output[2].reshape(-1), minlength=4)

        router.register_forward_hook(look)
    small_experts.logits(model, small_experts.examples())
    tokens = sum(len(e.tokens) for e in small_experts.examples())
    for at, statistics in enumerate(seen):
        assert statistics.tokens == tokens
        assert statistics.counts.tolist() == counts[at].tolist()
        assert float(statistics.counts.sum()) == 2 * tokens
        assert float(statistics.usage().sum()) == pytest.approx(1)
        assert float(statistics.usage("gate_mass").sum()) == pytest.approx(1)
        h = torch.cat(logits[at])
        torch.testing.assert_close(statistics.logits, h.T @ h, rtol=1e-4, atol=1e-4)


def test_outputs_are_every_experts_for_every_token(opened: Checkpoint) -> None:
    """The layer's inputs, summed over experts, are top-k copies of all inputs; and outputs add up
    as the experts' own formula says."""
    layer, statistics = expert_layers(opened)[0], _seen(opened)[0]
    assert statistics.outputs is not None
    assert statistics.outputs.shape == (4, 16)
    model = Network(opened).model
    rows: list[torch.Tensor] = []
    at = layer.prefix.replace("block_sparse_moe", "mlp")
    model.get_submodule(f"{at}.experts").register_forward_pre_hook(lambda m, a: rows.append(a[0]))
    small_experts.logits(model, small_experts.examples())
    x = torch.cat([r.reshape(-1, 16) for r in rows])
    torch.testing.assert_close(
        statistics.features.sum(0), 2 * x.double().sum(0), rtol=1e-4, atol=1e-3
    )
    names = (
        ("w1", "w3", "w2") if "w1.weight" in layer.roles else ("gate_proj", "up_proj", "down_proj")
    )
    for expert in range(4):
        gate, up, down = (opened.tensor(layer.name(expert, f"{n}.weight")) for n in names)
        made = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        torch.testing.assert_close(
            statistics.outputs[expert], made.double().sum(0), rtol=1e-3, atol=1e-3
        )


def test_batches_and_their_order_do_not_matter(tmp_path: Path) -> None:
    model = Checkpoint.open(str(small_experts.folder("mixtral", tmp_path)))
    one, other = _seen(model, batch_size=1), _seen(model, batch_size=10)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.counts, b.counts)
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-4)


def test_neurons_are_matched_to_themselves(opened: Checkpoint) -> None:
    layers = expert_layers(opened)
    order = Aligner(opened, layers).order(0, 2, 2).tolist()
    assert order == list(range(len(order)))


def test_models_that_cannot_be_merged_say_why(tmp_path: Path) -> None:
    for family, words in {
        "llama": "is a dense model",
        "granitemoe": "stored as one tensor",
        "gpt_oss": "stored as one tensor",
    }.items():
        tiny_models.causal(family).save_pretrained(tmp_path / family)
        with pytest.raises(MergeError, match=words):
            expert_layers(Checkpoint.open(str(tmp_path / family)))
