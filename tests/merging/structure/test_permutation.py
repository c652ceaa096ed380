"""Permutations as data: their algebra, on a nested specification and against plain indexing."""

from __future__ import annotations

import pytest
import torch

from evomerge.errors import MergeError
from evomerge.merging.structure.architectures.trial_network import TrialNetwork
from evomerge.merging.structure.permutations.permutation import (
    Bind,
    Group,
    Spec,
    Stacked,
    apply,
    axis_orders,
    compose,
    identity,
    in_place,
    inverse,
    random_permutations,
    whole_tensors,
)
from evomerge.merging.structure.permutations.units import blocks

NESTED = {"model_type": "mixtral"}  # query heads, value channels and neurons lie inside others


@pytest.fixture(scope="module")
def nested():
    network = TrialNetwork(NESTED)
    return network.spec, network.random_state()


def drawn(spec, seed):
    return random_permutations(spec, torch.Generator().manual_seed(seed))


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_unit_takes_all_its_positions_along():
    heads = Group("heads", "heads", 3, (Bind("w", 1, blocks(3, 2)), Bind("b", 0, blocks(3, 2, 1))))
    w, b = torch.arange(12.0).view(2, 6), torch.arange(7.0)
    out = apply(Spec((heads,)), {"w": w, "b": b}, {"heads": torch.tensor([2, 0, 1])})
    assert out["w"].tolist() == [[4, 5, 0, 1, 2, 3], [10, 11, 6, 7, 8, 9]]
    assert out["b"].tolist() == [0, 5, 6, 1, 2, 3, 4]
    assert w.tolist() == torch.arange(12.0).view(2, 6).tolist()


def test_a_slice_of_fused_experts_moves_alone():
    neurons = Bind("fused", 1, torch.tensor([[0, 3], [1, 4], [2, 5]]), select=(0, 1))
    fused = torch.arange(24.0).view(2, 6, 2)
    group = Group("neurons", "neurons", 3, (neurons,))
    out = apply(Spec((group,)), {"fused": fused}, {"neurons": torch.tensor([1, 2, 0])})["fused"]
    assert torch.equal(out[0], fused[0])
    assert torch.equal(out[1], fused[1][[1, 2, 0, 4, 5, 3]])


def test_stacked_tensors_change_names():
    spec = Spec((Group("experts", "experts", 3, (Stacked(("a", "b", "c")),)),))
    state = {name: torch.full((2,), float(at)) for at, name in enumerate("abc")}
    out = apply(spec, state, {"experts": torch.tensor([1, 2, 0])})
    assert [float(out[name][0]) for name in "abc"] == [1, 2, 0]


def test_the_identity_changes_nothing(nested):
    spec, state = nested
    assert same(apply(spec, state, identity(spec)), state)


def test_an_inverse_restores_every_byte(nested):
    spec, state = nested
    p = drawn(spec, 1)
    there = apply(spec, state, p)
    assert not same(there, state)
    assert same(apply(spec, there, inverse(spec, p)), state)
    assert same(compose(spec, p, inverse(spec, p)), identity(spec))
    assert same(compose(spec, inverse(spec, p), p), identity(spec))


def test_composition_is_one_application_after_the_other(nested):
    spec, state = nested
    first, then = drawn(spec, 2), drawn(spec, 3)
    assert same(
        apply(spec, apply(spec, state, first), then),
        apply(spec, state, compose(spec, first, then)),
    )


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ({"nobody": torch.tensor([0])}, "no permutation group 'nobody'"),
        ({"heads": torch.tensor([0, 0, 1])}, "not a permutation of its 3 units"),
    ],
)
def test_what_is_not_a_permutation_is_refused(order, message):
    spec = Spec((Group("heads", "heads", 3, (Bind("w", 0, blocks(3)),)),))
    with pytest.raises(MergeError, match=message):
        apply(spec, {"w": torch.zeros(3)}, order)


@pytest.mark.parametrize(
    ("bind", "message"),
    [
        (Bind("gone", 0, blocks(3)), "gone is not there"),
        (Bind("w", 2, blocks(3)), r"w \[3, 4\] has no axis 2"),
        (Bind("w", 0, blocks(3, 1, 1)), r"axis 0 has no place 3"),
        (Bind("w", 0, blocks(2)), "not one place for each of 3 units"),
        (Stacked(("w", "v", "b")), "not 3 tensors of one shape"),
    ],
)
def test_a_bind_that_does_not_fit_is_named(bind, message):
    spec = Spec((Group("heads", "heads", 3, (bind,)),))
    with pytest.raises(MergeError, match=f"group heads: .*{message}"):
        spec.check_shapes({"w": (3, 4), "v": (3, 4), "b": (3,)})


def test_groups_inside_only_one_unit_are_refused():
    outer = Group("kv", "kv", 2, (Bind("w", 0, blocks(2, 3)),))
    inner = Group("kv.0", "value", 3, (Bind("w", 0, blocks(3)),), "kv", 0)
    with pytest.raises(MergeError, match="other units of kv have no like"):
        Spec((outer, inner))
    with pytest.raises(MergeError, match="before its parent"):
        Spec((inner, outer))


@pytest.mark.parametrize("kept", [in_place, lambda spec: spec])
def test_whole_tensors_and_orders_of_axes_do_what_the_permutations_do(nested, kept):
    spec, state = nested
    spec = kept(spec)
    p = drawn(spec, 4)
    wanted = apply(spec, state, p)
    moved = whole_tensors(spec, p)
    found = {name: state[moved.get(name, name)] for name in state}
    for (name, axis), order in axis_orders(spec, {n: t.shape for n, t in state.items()}, p).items():
        found[name] = found[name].index_select(axis, order)
    assert same(found, wanted)


def test_without_groups_of_whole_tensors_no_tensor_leaves_its_place(nested):
    spec = nested[0]
    assert whole_tensors(spec, drawn(spec, 4))
    assert not whole_tensors(in_place(spec), drawn(in_place(spec), 4))


def test_a_slice_is_no_order_of_an_axis():
    group = Group("neurons", "neurons", 3, (Bind("fused", 1, blocks(3), select=(0, 1)),))
    with pytest.raises(MergeError, match="does not move whole axes of one tensor"):
        axis_orders(Spec((group,)), {"fused": (2, 3)}, {})
