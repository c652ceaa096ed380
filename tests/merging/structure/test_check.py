"""What the check of a specification finds: binds left out, idle ones, freedoms that are none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from evomerge.errors import MergeError
from evomerge.merging.structure.check import check
from evomerge.merging.structure.families import spec_of
from evomerge.merging.structure.permutation import Bind, Group, Spec
from evomerge.merging.structure.trial_network import TrialNetwork, prove
from evomerge.merging.structure.units import blocks

ATTENTION = "model.layers.0.self_attn."


@pytest.fixture(scope="module")
def llama():
    network = TrialNetwork({"model_type": "llama"})
    return network, network.spec, network.random_state()


def checked(llama, *groups):
    network, _, state = llama
    return check(Spec(groups), state, network.compute)


@pytest.mark.parametrize("role", ["residual", "mlp", "kv", "query", "value"])
def test_a_group_without_one_of_its_binds_is_refused(llama, role):
    group = next(group for group in llama[1].groups if group.role == role)
    alone = replace(group, parent=None, binds=group.binds[1:])
    with pytest.raises(MergeError, match=f"permutation group {group.name}: permuting its"):
        checked(llama, alone)


def test_channels_of_queries_and_keys_turn_with_their_position(llama):
    """Not a freedom under rotary positions."""
    pairs = Bind(f"{ATTENTION}k_proj.weight", 0, blocks(4))
    queries = torch.stack([blocks(4, 1, 4 * head)[:, 0] for head in range(4)], 1)
    group = Group("qk", "qk", 4, (pairs, Bind(f"{ATTENTION}q_proj.weight", 0, queries)))
    with pytest.raises(MergeError, match="group qk: permuting its 4 units changes the function"):
        checked(llama, group)


def test_query_heads_cannot_leave_their_key_value_head(llama):
    q, o = (f"{ATTENTION}{x}_proj.weight" for x in "qo")
    group = Group("heads", "heads", 8, (Bind(q, 0, blocks(8, 4)), Bind(o, 1, blocks(8, 4))))
    with pytest.raises(MergeError, match="group heads: permuting its 8 units changes the function"):
        checked(llama, group)


def test_a_bind_to_what_does_nothing_is_refused(llama):
    network, spec, state = llama
    mlp = next(group for group in spec.groups if group.role == "mlp")
    idle = replace(mlp, binds=(*mlp.binds, Bind("unused", 0, blocks(12))))
    with pytest.raises(MergeError, match="unused axis 0: without this bind"):
        check(Spec((idle,)), state | {"unused": torch.rand(12)}, network.compute)


def test_a_bind_that_matters_is_not_inert(llama):
    network, spec, state = llama
    mlp = next(group for group in spec.groups if group.role == "mlp")
    binds = (replace(mlp.binds[0], inert=True), *mlp.binds[1:])
    with pytest.raises(MergeError, match="is called inert, but the function depends on it"):
        check(Spec((replace(mlp, binds=binds),)), state, network.compute)


def test_an_architecture_without_a_specification_is_refused_with_those_known():
    with pytest.raises(MergeError, match=r"model_type 'mamba'; known are bert, .*To add one"):
        spec_of({"model_type": "mamba"}, {})


def test_a_tensor_nobody_accounts_for_is_refused(llama):
    network = llama[0]
    shapes = network.shapes | {"model.layers.0.mlp.surprise.weight": (12, 32)}
    with pytest.raises(MergeError, match=r"surprise.weight: the permutation specification of"):
        spec_of(network.config, shapes)


def test_a_config_that_makes_no_network_is_refused():
    with pytest.raises(MergeError, match="no tiny network of this config of 'llama' can be built"):
        prove({"model_type": "llama", "hidden_act": "sigmoidal"})
