"""Two networks in one: the table of blocks entry by entry, both limits, equal networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from evomerge.errors import MergeError
from evomerge.merging.structure.partial.partial import PartialMerge, Split, split
from evomerge.merging.structure.permutations.linear_layers import linear_layers, plain_modules
from evomerge.merging.structure.permutations.permutation import Bind, Group, Spec
from evomerge.merging.structure.permutations.units import blocks, bound

HIDDEN = (6, 4)


def _network(seed: int, hidden: tuple[int, int] = HIDDEN) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, hidden[0], 3),
        nn.BatchNorm2d(hidden[0]),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(hidden[0] * 4, hidden[1]),
        nn.ReLU(),
        nn.Linear(hidden[1], 3),
    ).double()
    for tensor in net.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return net.eval()


def _shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in net.state_dict().items()}


def _spec(net: nn.Module) -> Spec:
    shapes = _shapes(net)
    vectors = [(f"1.{x}", 0) for x in ("weight", "bias", "running_mean", "running_var")]
    conv = bound(shapes, blocks(6), ("0.weight", 0), ("0.bias", 0), *vectors)
    conv += bound(shapes, blocks(6, 4), ("4.weight", 1))
    places = ("4.weight", 0), ("4.bias", 0), ("6.weight", 1)
    hidden = bound(shapes, blocks(4), *places)
    return Spec((Group("conv", "inner", 6, conv), Group("hidden", "inner", 4, hidden)))


def _merge(net: nn.Module, conv: Tensor, hidden: Tensor) -> PartialMerge:
    def parts(size: int, apart: Tensor) -> Split:
        rest = torch.tensor([u for u in range(size) if u not in apart.tolist()], dtype=torch.long)
        return Split(rest, apart)

    splits = {"conv": parts(6, conv), "hidden": parts(4, hidden)}
    return PartialMerge(
        _spec(net), linear_layers(plain_modules(net), _shapes(net)), _shapes(net), splits
    )


def _built(state: dict[str, Tensor]) -> nn.Sequential:
    net = _network(0, (len(state["0.bias"]), len(state["4.bias"])))
    net.load_state_dict(state)
    return net


def _inputs() -> Tensor:
    return torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_every_block_is_that_of_the_table():
    a, b = _network(1), _network(2)
    merge = _merge(a, torch.tensor([1, 4]), torch.tensor([2]))
    state = merge.state(a.state_dict(), b.state_dict())
    wa, wb = a.state_dict()["4.weight"].view(4, 6, 4), b.state_dict()["4.weight"].view(4, 6, 4)
    found = state["4.weight"].view(
        5, 8, 4
    )  # outputs 0, 1, 3 | 2 | 2; inputs 0, 2, 3, 5 | 1, 4 | 1, 4
    to, into = [0, 1, 3], [0, 2, 3, 5]
    assert torch.equal(found[:3, :4], ((wa + wb) / 2)[to][:, into])
    assert torch.equal(found[:3, 4:6], (wa / 2)[to][:, [1, 4]])
    assert torch.equal(found[:3, 6:], (wb / 2)[to][:, [1, 4]])
    assert torch.equal(found[3, :4], wa[2][into])
    assert torch.equal(found[3, 4:6], wa[2][[1, 4]])
    assert torch.equal(found[4, :4], wb[2][into])
    assert torch.equal(found[4, 6:], wb[2][[1, 4]])
    assert not found[3, 6:].any()
    assert not found[4, 4:6].any()
    allowed = merge.allowed("4.weight")
    assert allowed is not None
    allowed = allowed.view(5, 8, 4)
    assert (~allowed).sum() == 16
    assert not allowed[3, 6:].any()
    assert not allowed[4, 4:6].any()
    bias = torch.cat([(a[4].bias + b[4].bias)[to] / 2, a[4].bias[2:3], b[4].bias[2:3]])
    assert torch.equal(state["4.bias"], bias)
    assert torch.equal(state["6.bias"], (a[6].bias + b[6].bias) / 2)
    assert torch.equal(
        state["6.weight"][:, 3:], torch.stack([a[6].weight[:, 2], b[6].weight[:, 2]], 1) / 2
    )
    for name, tensor in state.items():
        assert tuple(tensor.shape) == merge.shape(name), name


def test_nothing_apart_is_the_mean_and_everything_apart_the_mean_of_the_outputs():
    a, b = _network(1), _network(2)
    x = _inputs()
    none = torch.tensor([], dtype=torch.long)
    merged = _merge(a, none, none).state(a.state_dict(), b.state_dict())
    for name, tensor in merged.items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, (a.state_dict()[name] + b.state_dict()[name]) / 2), name
    both = _merge(a, torch.arange(6), torch.arange(4)).state(a.state_dict(), b.state_dict())
    assert torch.allclose(_built(both)(x), (a(x) + b(x)) / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("conv", [[], [0], [1, 4], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("hidden", [[], [3], [0, 1, 2, 3]])
def test_a_network_merged_with_itself_keeps_its_function(conv, hidden):
    a = _network(1)
    merge = _merge(a, torch.tensor(conv, dtype=torch.long), torch.tensor(hidden, dtype=torch.long))
    wide = _built(merge.state(a.state_dict(), a.state_dict()))
    assert torch.allclose(wide(_inputs()), a(_inputs()), rtol=1e-12, atol=1e-12)


def test_swapping_the_networks_gives_the_same_function():
    a, b = _network(1), _network(2)
    merge = _merge(a, torch.tensor([1, 4]), torch.tensor([2]))
    one = _built(merge.state(a.state_dict(), b.state_dict()))(_inputs())
    other = _built(merge.state(b.state_dict(), a.state_dict()))(_inputs())
    assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(one, a(_inputs()))


def test_the_least_similar_are_kept_apart():
    parts = split(torch.tensor([0.3, 0.9, 0.1, 0.5, 0.1]), 2)
    assert parts.merged.tolist() == [0, 1, 3]
    assert parts.apart.tolist() == [2, 4]
    assert split(torch.tensor([0.1, 0.1, 0.1]), 1).apart.tolist() == [2]
    assert split(torch.ones(3), 3).merged.tolist() == []


def test_segments_of_one_axis_are_widened_each_in_its_place():
    """As GPT-2 keeps queries, keys and values of a head in one tensor."""
    index = torch.cat([blocks(3, 2, 0), blocks(3, 2, 6), blocks(3, 2, 12)], 1)
    spec = Spec((Group("heads", "heads", 3, (Bind("joint", 0, index),)),))
    parts = Split(torch.tensor([0, 2]), torch.tensor([1]))
    merge = PartialMerge(spec, {}, {"joint": (18,)}, {"heads": parts})
    layout = merge.layout("joint", 0)
    assert layout is not None
    part = torch.tensor([0, 1, 4, 5, 2, 3, 2, 3])
    assert torch.equal(layout.origin, torch.cat([part, part + 6, part + 12]))
    assert layout.side.tolist() == [0, 0, 0, 0, 1, 1, 2, 2] * 3


def test_units_that_do_not_lie_one_after_another_cannot_be_widened():
    spec = Spec((Group("odd", "inner", 2, (Bind("w", 0, torch.tensor([[0, 2], [1, 3]])),)),))
    merge = PartialMerge(spec, {}, {"w": (4,)}, {"odd": split(torch.ones(2), 1)})
    assert merge.shape("w") == (6,)  # two segments
    spec = Spec((Group("odd", "inner", 2, (Bind("w", 0, torch.tensor([[0], [2]])),)),))
    with pytest.raises(MergeError, match="do not lie one after another in w"):
        PartialMerge(spec, {}, {"w": (4,)}, {"odd": split(torch.ones(2), 1)})
