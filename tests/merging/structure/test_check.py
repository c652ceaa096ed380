"""What the check of a specification finds: binds left out, idle ones, freedoms that are none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from structure_configs import CONFIGS

from evomerge.errors import MergeError
from evomerge.merging.structure.architectures.families import spec_of
from evomerge.merging.structure.architectures.trial_network import TrialNetwork, prove
from evomerge.merging.structure.permutations.check import FLOAT32, check
from evomerge.merging.structure.permutations.permutation import (
    Bind,
    Group,
    Spec,
    apply,
    random_permutations,
)
from evomerge.merging.structure.permutations.units import blocks

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


def test_a_config_without_what_the_groups_are_made_from_is_refused(llama):
    network = llama[0]
    config = {k: v for k, v in network.config.items() if k != "num_attention_heads"}
    with pytest.raises(MergeError, match="num_attention_heads: neither the config nor the check"):
        spec_of(config, network.shapes)


def test_experts_cannot_leave_the_cluster_that_the_router_chooses_first():
    network = TrialNetwork(CONFIGS["deepseek_v3, clusters"])
    spec = spec_of(network.config | {"n_group": 1}, network.shapes)
    experts = next(group for group in spec.groups if group.role == "experts")
    with pytest.raises(MergeError, match="experts: permuting its 16 units changes the function"):
        check(Spec((experts,)), network.random_state(), network.compute)


def test_the_rotary_key_of_latent_attention_keeps_its_order():
    network = TrialNetwork(CONFIGS["deepseek_v3"])
    rotary = Bind(f"{ATTENTION}kv_a_proj_with_mqa.weight", 0, blocks(2, 1, 6))
    heads = torch.stack([blocks(2, 1, 6 * head + 4)[:, 0] for head in range(4)], 1)
    group = Group("rotary", "rotary", 2, (rotary, Bind(f"{ATTENTION}q_b_proj.weight", 0, heads)))
    with pytest.raises(MergeError, match="group rotary: permuting its 2 units changes the funct"):
        check(Spec((group,)), network.random_state(), network.compute)


def test_heads_that_share_a_position_bias_cannot_part():
    network = TrialNetwork(CONFIGS["t5"])
    group = next(group for group in network.spec.groups if group.role == "heads")
    assert len(group.binds) == 9  # four of each of two layers, and the bias
    alone = replace(group, binds=tuple(b for b in group.binds if "block.1" not in b.param))
    with pytest.raises(MergeError, match="heads: permuting its 4 units changes the function"):
        check(Spec((alone,)), network.random_state(), network.compute)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "clip", "mixtral"])
def test_permuting_preserves_the_function_in_float32(name):
    network = TrialNetwork(CONFIGS[name], dtype=torch.float32)
    state = network.random_state()
    order = random_permutations(network.spec, torch.Generator().manual_seed(0))
    wanted = network.compute(state).detach().clone()
    found = network.compute(apply(network.spec, state, order))
    assert (found - wanted).abs().max() <= FLOAT32 * wanted.abs().max()


def test_a_tensor_nobody_accounts_for_is_refused(llama):
    network = llama[0]
    shapes = network.shapes | {"model.layers.0.mlp.surprise.weight": (12, 32)}
    with pytest.raises(MergeError, match=r"surprise.weight: the permutation specification of"):
        spec_of(network.config, shapes)


def test_a_config_that_makes_no_network_is_refused():
    with pytest.raises(MergeError, match="no tiny network of this config of 'llama' can be built"):
        prove({"model_type": "llama", "hidden_act": "sigmoidal"})
