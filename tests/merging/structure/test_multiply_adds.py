"""Costs worked out from a specification against real networks, built as wide and counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from evomerge.merging.structure.architectures.families import spec_of
from evomerge.merging.structure.partial.budget import Costs, Term
from evomerge.merging.structure.partial.multiply_adds import counted, layer_terms, positions
from evomerge.merging.structure.partial.partial import PartialMerge, split
from evomerge.merging.structure.permutations.linear_layers import (
    linear_layers,
    modules_of,
    plain_modules,
)
from evomerge.merging.structure.permutations.permutation import Bind, Group, Spec
from evomerge.merging.structure.permutations.units import blocks

IMAGES = torch.zeros(2, 3, 8, 8)


class ConvNet(nn.Module):
    """A residual block with BatchNorm, half the size within, and a head."""

    def __init__(self, stream, inner):
        super().__init__()
        self.stem = nn.Conv2d(3, stream, 3, padding=1)
        self.norm = nn.BatchNorm2d(stream)
        self.down = nn.Conv2d(stream, inner, 3, stride=2, padding=1)
        self.up = nn.Conv2d(inner, stream, 1)
        self.head = nn.Linear(stream, 10)

    def forward(self, x):
        x = self.norm(self.stem(x))
        x = x + F.interpolate(self.up(self.down(x).relu()), scale_factor=2)
        return self.head(x.mean((2, 3)))


def conv_spec(stream, inner):
    places = {
        "stream": [("stem", 0), ("norm", 0), ("down", 1), ("up", 0), ("head", 1)],
        "inner": [("down", 0), ("up", 1)],
    }
    sizes = {"stream": stream, "inner": inner}
    groups = []
    for name, at in places.items():
        index = blocks(sizes[name])
        binds = tuple(Bind(f"{layer}.weight", axis, index) for layer, axis in at)
        groups.append(Group(name, name, sizes[name], binds))
    return Spec(tuple(groups))


def conv_costs(widening):
    model, spec = ConvNet(6, 5), conv_spec(6, 5)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    modules = plain_modules(model)
    layers = linear_layers(modules, shapes)
    uses = positions(modules, lambda: model(IMAGES))
    terms = list(layer_terms(spec, layers, shapes, uses, widening))
    costs = Costs(terms, {name: spec[name].size for name in widening})
    return model, spec, shapes, layers, uses, terms, costs


def test_positions_by_hand():
    uses = conv_costs(["stream"])[4]
    assert uses == {
        "stem.weight": 2 * 64 * 9,
        "down.weight": 2 * 16 * 9,
        "up.weight": 2 * 16,
        "head.weight": 2,
    }


def test_positions_of_other_layers_and_of_those_that_do_not_run():
    model = nn.ModuleDict({"a": Conv1D(4, 3), "b": nn.Conv1d(4, 5, 3), "c": nn.Linear(2, 2)})
    modules = plain_modules(model)
    uses = positions(modules, lambda: model["b"](model["a"](torch.zeros(2, 7, 3)).mT))
    assert uses == {"a.weight": 14, "b.weight": 2 * 5 * 3, "c.weight": 0}
    assert not any(module._forward_hooks for module in modules.values())


@pytest.mark.parametrize("apart", [{}, {"stream": 2}, {"inner": 3}, {"stream": 4, "inner": 5}])
def test_a_widened_network_costs_what_was_worked_out(apart):
    model, spec, shapes, layers, uses, terms, costs = conv_costs(["stream", "inner"])
    one = counted(lambda: model(IMAGES))
    assert one == sum(term.cost for term in terms)
    wide = ConvNet(6 + apart.get("stream", 0), 5 + apart.get("inner", 0))
    both = counted(lambda: wide(IMAGES))
    assert costs.dense(apart) == pytest.approx(both / one, rel=1e-12)

    splits = {g: split(torch.arange(spec[g].size).double(), m) for g, m in apart.items()}
    merged = PartialMerge(spec, layers, shapes, splits)
    nonzero = 0
    for name in layers:
        allowed, shape = merged.allowed(name), merged.shape(name)
        ones = torch.ones(shape[:2]) if allowed is None else allowed.flatten(1).expand(shape[:2])
        nonzero += uses[name] * int(ones.sum())
    assert costs.relative(apart) == pytest.approx(nonzero / one, rel=1e-12)


def test_what_is_not_to_be_widened_has_no_terms():
    *_, terms, costs = conv_costs(["inner"])
    assert {term.out_group for term in terms} | {term.in_group for term in terms} == {"inner", None}
    assert costs.groups == ("inner",)


TOKENS = torch.zeros(2, 9, dtype=torch.long)


def llama(neurons, kv, attention="eager"):
    config = LlamaConfig(
        hidden_size=24, intermediate_size=neurons, num_hidden_layers=2, num_key_value_heads=kv,
        num_attention_heads=2 * kv, head_dim=4, vocab_size=30, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_decoder_with_more_neurons_and_more_heads(attention):
    model = llama(12, 2, attention)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    spec, modules = spec_of(model.config.to_dict(), shapes), modules_of(model, shapes)
    wide = [group.name for group in spec.groups if group.role in ("mlp", "kv")]
    uses = positions(modules, lambda: model(TOKENS))
    terms = list(layer_terms(spec, linear_layers(modules, shapes), shapes, uses, wide))
    products = 2 * (2 * 9 * 9) * (4 * 4)  # scores and values: batch, positions twice, heads
    terms += [Term(products, name) for name in wide if spec[name].role == "kv"]
    one = counted(lambda: model(TOKENS))
    assert one == sum(term.cost for term in terms)
    costs = Costs(terms, {name: spec[name].size for name in wide})
    apart = {name: 5 if spec[name].role == "mlp" else 1 for name in wide}
    larger = llama(12 + 5, 2 + 1, attention)
    both = counted(lambda: larger(TOKENS))
    assert costs.dense(apart) == costs.relative(apart) == pytest.approx(both / one, rel=1e-12)
