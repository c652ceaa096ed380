"""Permutation groups of residual networks of convolutions, named as transformers or torchvision do.

One group for each residual stream, which a shortcut with weights of its own begins anew, and one
between each two convolutions of a block. Grouped convolutions are not among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from evomerge.merging.structure.permutations.permutation import Bind, Group
from evomerge.merging.structure.permutations.units import Shapes, blocks, bound, layers, prefix_of

_STATISTICS = ("running_mean", "running_var")


class _Channels:
    """Collects what each group of channels is bound to."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.binds: dict[str, list[Bind]] = {}

    def add(self, group: str, places: list[tuple[str, int]], *, compared: bool = True) -> None:
        there = [place for place in places if place[0] in self.shapes]
        for name, axis in there:
            index = blocks(self.shapes[name][axis])
            binds = bound(self.shapes, index, (name, axis), compared=compared)
            self.binds.setdefault(group, []).extend(binds)

    def convolution(self, name: str, norm: str, into: str, *, reads: str | None) -> None:
        """A convolution, or another layer of weights, and the BatchNorm behind it."""
        if reads is not None:
            self.add(reads, [(f"{name}.weight", 1)])
        self.add(into, [(f"{name}.weight", 0), (f"{name}.bias", 0)])
        self.add(into, [(f"{norm}.weight", 0), (f"{norm}.bias", 0)])
        self.add(into, [(f"{norm}.{x}", 0) for x in _STATISTICS], compared=False)

    def block(self, steps: list[tuple[str, str]], shortcut: tuple[str, str], reads: str) -> str:
        """A residual block of convolutions with their norms; the stream that it writes to."""
        writes, before = reads, reads
        if f"{shortcut[0]}.weight" in self.shapes:
            writes = f"{shortcut[0]}.stream"
            self.convolution(*shortcut, writes, reads=reads)
        for name, norm in steps[:-1]:
            self.convolution(name, norm, name, reads=before)
            before = name
        self.convolution(*steps[-1], writes, reads=before)
        return writes

    def groups(self) -> Iterator[Group]:
        for name, binds in self.binds.items():
            role = "residual" if name.endswith("stream") else "inner"
            yield Group(name, role, len(binds[0].index), tuple(binds))


def resnet(config: Mapping[str, Any], shapes: Shapes) -> Iterator[Group]:
    """ResNet with basic or bottleneck blocks."""
    named = _torchvision if "layer1.0.conv1.weight" in shapes else _transformers
    return named(shapes).groups()


def _transformers(shapes: Shapes) -> _Channels:
    prefix = prefix_of(shapes, "embedder.embedder.convolution.weight")
    channels, stream = _Channels(shapes), "stream"
    channels.convolution(*_pair(f"{prefix}embedder.embedder"), stream, reads=None)
    for stage in layers(shapes, f"{prefix}encoder.stages."):
        for block in layers(shapes, f"{stage}layers."):
            steps = [_pair(step[:-1]) for step in layers(shapes, f"{block}layer.")]
            stream = channels.block(steps, _pair(f"{block}shortcut"), stream)
    channels.add(stream, [("classifier.1.weight", 1)])
    return channels


def _pair(layer: str) -> tuple[str, str]:
    return f"{layer}.convolution", f"{layer}.normalization"


def _torchvision(shapes: Shapes) -> _Channels:
    channels, stream = _Channels(shapes), "stream"
    channels.convolution("conv1", "bn1", stream, reads=None)
    for stage in range(1, 5):
        for block in layers(shapes, f"layer{stage}."):
            numbers = [n for n in (1, 2, 3) if f"{block}conv{n}.weight" in shapes]
            steps = [(f"{block}conv{n}", f"{block}bn{n}") for n in numbers]
            shortcut = f"{block}downsample.0", f"{block}downsample.1"
            stream = channels.block(steps, shortcut, stream)
    channels.add(stream, [("fc.weight", 1)])
    return channels
