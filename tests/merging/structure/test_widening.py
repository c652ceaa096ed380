"""What a checkpoint may hold wider: transformers loads it, and added units change nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pytest
import small_llama
import tiny_models
import torch
from torch import Tensor, nn

from evomerge.checkpoints.adapted import open_model
from evomerge.errors import MergeError
from evomerge.merging.fitted.calibration import Example, batch
from evomerge.merging.fitted.gram import linear_layers as own_layers
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.architectures.families import FAMILIES, spec_of
from evomerge.merging.structure.permutations.linear_layers import linear_layers
from evomerge.merging.structure.permutations.permutation import in_place
from evomerge.merging.structure.pleas.fit import one_module
from evomerge.merging.structure.pleas.live import shapes_of, widened_network
from evomerge.merging.structure.pleas.model import Pair, PleasModel, Refitting, order_key

TOKENS = batch([Example(tuple(range(3, 15)))])
LENGTH = 12.0
KNOWN = [f for f in tiny_models.CAUSAL if f.split("-")[0] in FAMILIES]
REFUSED = {"phi3", "olmoe"}


@dataclass(frozen=True)
class _Known:
    facts: Any
    tensors: dict[str, Tensor]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]


def _pair(family: str, folder: Any) -> tuple[Pair, Network]:
    """A model and itself, its units where they are."""
    words = {"vocab_size": len(small_llama.TOKENS)}
    tiny_models.causal(family, dtype=torch.float32, **words).save_pretrained(folder)
    small_llama.tokenizer().save_pretrained(folder)
    model = open_model(str(folder))
    network, shapes = Network(model), shapes_of(model)
    layers = linear_layers({n: one_module(network, n) for n in own_layers(network)}, shapes)
    groups = in_place(spec_of(model.config, shapes)).groups
    facts = {
        "length": LENGTH,
        "inputs": {},
        "layers": {name: asdict(layer) for name, layer in layers.items()},
    }
    orders = {order_key(g.name): torch.arange(g.size) for g in groups}
    return Pair(model, model, _Known(facts, orders)), network


@pytest.mark.parametrize("family", [f for f in KNOWN if f not in REFUSED])
def test_a_wider_model_computes_the_same(family, tmp_path):
    """One group of one layer is widened, so that all other layers are filled up."""
    pair, network = _pair(family, tmp_path)
    wanted = network.logits(TOKENS)
    groups = {group.role: group for group in pair.widening.groups}
    for group in groups.values():
        for count in {1, group.size}:
            model = PleasModel(pair, {group.name: count}, Refitting(form="none"))
            found = widened_network(model, device="cpu").logits(TOKENS)
            assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max())), group.name


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_where_units_cannot_be_added_behind_it_is_said(family, tmp_path):
    """Halves of one tensor one after another; a norm over all heads."""
    with pytest.raises(MergeError, match=r"no group of its units can be widened .*`git_rebasin`"):
        _pair(family, tmp_path)


def test_the_line_says_what_the_built_model_multiplies(tmp_path):
    """Linear layers by their live weights, and scores and values of every head."""
    pair, network = _pair("llama", tmp_path)
    apart = {g.name: n for g, n in zip(pair.widening.groups, (1, 5, 0, 0), strict=True)}
    model = PleasModel(pair, apart, Refitting(form="none"))
    wide = widened_network(model, device="cpu")
    ratio = _multiplied(wide) / _multiplied(network)
    assert model.structure == (
        "apart in each layer: 1, 0 of 2 key-value heads; 5, 0 of 24 neurons. Cost of"
        f" {pair.costs.relative(apart):.3g} models, {ratio:.3g} as transformers multiplies it"
    )
    assert ratio > pair.costs.relative(apart)


def _multiplied(network: Network) -> float:
    """For each token of a sequence of LENGTH, half of which is behind it on average."""
    config, modules = network.model.config, network.model.modules()
    weights = sum(m.weight.numel() for m in modules if isinstance(m, nn.Linear))
    return float(
        weights + LENGTH * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    )
