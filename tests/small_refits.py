"""Small networks and their merges, for the tests of least squares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evomerge.merging.structure.partial.partial import PartialMerge, Split
from evomerge.merging.structure.permutations.activations import Live
from evomerge.merging.structure.permutations.linear_layers import linear_layers, plain_modules
from evomerge.merging.structure.permutations.permutation import Group, Spec
from evomerge.merging.structure.permutations.units import Shapes, blocks, bound
from evomerge.merging.structure.refit.least_squares import (
    Data,
    LeastSquaresSettings,
    Merged,
    Refit,
    refit,
)

PLAIN = LeastSquaresSettings(ridge=0.0)
SEQUENTIAL = LeastSquaresSettings(form="sequential", ridge=0.0)


def shapes_of(net: nn.Module) -> Shapes:
    return {name: tuple(t.shape) for name, t in net.state_dict().items()}


def live(net: nn.Module) -> Live:
    return Live(plain_modules(net), net)


def merge_of(net: nn.Module, groups: Sequence[tuple[int, list[tuple[str, int]], list[int]]] = ()):
    """A merge in which of each group (size, places, apart) some units stay apart."""
    shapes, found, splits = shapes_of(net), [], {}
    for number, (size, places, apart) in enumerate(groups):
        index = [(name, axis, shapes[name][axis] // size) for name, axis in places]
        binds = [b for n, x, m in index for b in bound(shapes, blocks(size, m), (n, x))]
        found.append(Group(str(number), "inner", size, tuple(binds)))
        rest = [u for u in range(size) if u not in apart]
        splits[str(number)] = Split(_integers(rest), _integers(apart))
    return PartialMerge(Spec(tuple(found)), layers_of(net), shapes, splits)


def _integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def layers_of(net: nn.Module):
    return linear_layers(plain_modules(net), shapes_of(net))


def refitted(
    a: nn.Module,
    b: nn.Module,
    merge: PartialMerge,
    data: Data,
    settings: LeastSquaresSettings = PLAIN,
    *,
    merged: nn.Module | None = None,
) -> Refit:
    start = merge.state(a.state_dict(), b.state_dict())
    into = None
    if merged is not None:
        merged.load_state_dict(start)
        into = Merged(live(merged), writer(merged))
    return refit(live(a), live(b), merge, layers_of(a), start, data, settings, merged=into)


def two_layers(seed: int, hidden: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()


def hidden(apart: list[int]) -> tuple[int, list[tuple[str, int]], list[int]]:
    return 6, [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)], apart


def rows_of(count: int = 60, seed: int = 9, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


def deep(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)
    return nn.Sequential(*layers).double()


def writer(net: nn.Module):
    return lambda name, tensor: net.state_dict()[name].copy_(tensor)
