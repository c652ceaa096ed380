"""What each operation of a traced network does to the axes of its tensors.

One function for each operation of Core ATen, the small set that all others of PyTorch decompose
into. An operation that has none fixes the axes that it touches: nothing is linked on a guess. Knows
no network; what axes are is in `traced_axes`, reshapes are in `traced_reshapes`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from evomerge.merging.structure.tracing.traced_axes import Axes, Axis, Places
from evomerge.merging.structure.tracing.traced_reshapes import Reshapes, Shape

Dims = tuple[Axis | None, ...]
"""The axis of each dimension of a tensor."""


@dataclass(frozen=True)
class Value:
    """A tensor in passing."""

    shape: Shape
    dims: Dims


Arguments = Mapping[str, Any]
Rule = Callable[["Operations", Arguments, Shape], list[Dims]]
"""The dimensions of an operation's results, of which the first has this shape; what is left out at
the end is fixed."""


class Operations:
    """Walks over the operations of one graph.

    `live` are the nodes that depend on the network's inputs; `choices` are those of `Reshapes`.
    Found on the way: `writers`, the axes that layers of weights give to their outputs, in order;
    `sums`, those along which activations are added to each other; `statistics`, what batch norms
    keep of the data.
    """

    def __init__(self, live: set[Node], choices: Mapping[str, int]) -> None:
        self.axes = Axes()
        self.reshapes = Reshapes(self.axes, choices)
        self.values: dict[Node, Any] = {}
        self.writers: list[Axis] = []
        self.sums: list[Axis] = []
        self.statistics: set[Axis] = set()
        self.node, self.operation = "", ""  # at hand
        self._live = live

    def add(self, node: Node) -> None:
        """Take the next operation."""
        target, made = node.target, node.meta.get("val")
        if made is None:
            return  # an assertion
        if target is operator.getitem:
            source, number = node.args[:2]
            self.values[node] = self.values[source][number]  # type: ignore[index]
            return
        found: list[Dims] | None = None
        if isinstance(target, torch._ops.OpOverload):
            self.node, self.operation = node.name, target._schema.name.removeprefix("aten::")
            if self.operation in _RULES:
                use = _RULES[self.operation]
                found = use(self, self._arguments(node, target), _shape(made))
            elif torch.Tag.pointwise in target.tags:
                found = [self._pointwise(node, _shape(made))]
        if found is None:
            self.fix(node.all_input_nodes)
        self.values[node] = _results(made, found or [])

    def give(self, node: Node, dims: Dims | None) -> None:
        """What the graph is handed: a tensor with these axes, or one that is fixed."""
        self.values[node] = _results(node.meta.get("val"), [dims] if dims is not None else [])

    def fix(self, nodes: list[Node]) -> None:
        """Nothing that these made may be rearranged."""
        for value in _values([self.values.get(node) for node in nodes]):
            self.axes.fix(*value.dims)

    def written(self, axis: Axis | None) -> Axis | None:
        """The axis of a layer's outputs."""
        if axis is not None:
            self.writers.append(axis)
        return axis

    def _arguments(self, node: Node, target: torch._ops.OpOverload) -> Arguments:
        """By name, defaults among them, values in the stead of nodes."""
        expected = target._schema.arguments
        named = {a.name: a.default_value for a in expected if a.has_default_value()}
        named |= dict(zip((a.name for a in expected), node.args, strict=False))
        named |= node.kwargs
        return {name: map_arg(given, self.values.get) for name, given in named.items()}

    def _pointwise(self, node: Node, shape: Shape) -> Dims:
        sources = node.all_input_nodes
        dims = broadcast(self, list(_values([self.values[n] for n in sources])), shape)
        if self.operation in ("add", "sub") and len(self._live.intersection(sources)) > 1:
            self.sums += [axis for axis in dims if axis is not None]
        return dims


def broadcast(walk: Operations, values: list[Value], shape: Shape) -> Dims:
    """Of an elementwise operation."""
    dims: list[Axis | None] = []
    for back, size in enumerate(reversed(shape), 1):
        aligned = [v for v in values if len(v.shape) >= back and v.shape[-back] == size != 1]
        dims.insert(0, walk.axes.same(*(v.dims[-back] for v in aligned)) if aligned else None)
    return tuple(dims)


def _shape(made: Any) -> Shape:
    first = made if isinstance(made, Tensor) else next(iter(made), None)
    return tuple(first.shape) if isinstance(first, Tensor) else ()


def _results(made: Any, found: list[Dims]) -> Any:
    if not isinstance(made, tuple | list):
        return _result(made, found[0] if found else None)
    rest: list[Dims | None] = [None] * (len(made) - len(found))
    return [_result(each, dims) for each, dims in zip(made, [*found, *rest], strict=True)]


def _result(made: Any, dims: Dims | None) -> Value | None:
    if not isinstance(made, Tensor):
        return None
    dims = dims if dims is not None else (None,) * made.dim()
    for size, axis in zip(made.shape, dims, strict=True):
        assert axis is None or len(axis.places) == size
    return Value(tuple(made.shape), dims)


def _values(made: Any) -> Iterator[Value]:
    if isinstance(made, Value):
        yield made
    elif isinstance(made, list | tuple):
        for each in made:
            yield from _values(each)


def _taken(walk: Operations, axis: Axis | None, places: Places) -> Axis | None:
    """A new axis of these places of another, as often as they are named; −1 is a new place, that
    stays."""
    if axis is None or np.array_equal(places, np.arange(len(axis.places))):
        return axis
    held = places >= 0
    if (new := walk.axes.new(len(places))) is None:
        walk.axes.fix_places(axis.places[places[held]])
        return None
    walk.axes.fix_places(new.places[~held])
    walk.axes.link(axis.places[places[held]], new.places[held])
    return new


def _with(dims: Dims, dim: int, *axes: Axis | None) -> Dims:
    """With other axes in the stead of one; none to leave it out."""
    dim %= len(dims)
    return (*dims[:dim], *axes, *dims[dim + 1 :])


def _as_it_is(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    return [next(_values(list(given.values()))).dims]


def _convolution(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    """Channels that grouped filters see keep their order, but for depthwise filters."""
    x, weight, bias = given["input"], given["weight"], given["bias"]
    walk.axes.fix(*x.dims[2:], *weight.dims[2:])
    writes, reads = weight.dims[:2][::-1] if given["transposed"] else weight.dims[:2]
    if given["groups"] == 1:
        walk.axes.same(x.dims[1], reads)
    elif given["groups"] == x.shape[1]:
        writes = _depthwise(walk, x.dims[1], weight, shape[1], transposed=given["transposed"])
    else:
        walk.axes.fix(x.dims[1], *weight.dims)
        writes = None
    if bias is not None:
        writes = walk.axes.same(writes, bias.dims[0]) if shape[1] > 1 else None
    return [(x.dims[0], walk.written(writes), *(None for _ in shape[2:]))]


def _depthwise(
    walk: Operations, read: Axis | None, weight: Value, outputs: int, *, transposed: bool
) -> Axis | None:
    """For each channel of the inputs as many of the outputs, one after another."""
    if read is None:
        walk.axes.fix(*weight.dims)
        return None
    channels = np.arange(len(read.places))
    spread = _taken(walk, read, np.repeat(channels, outputs // len(channels)))
    if transposed:  # [inputs, outputs for each, ...]
        walk.axes.fix(weight.dims[1])
        walk.axes.same(read, weight.dims[0])
        return spread
    return walk.axes.same(weight.dims[0], spread)


def _product(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    return [_matmul(walk, given["self"], given["mat2"])]


def _added_product(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    added, x, y = _values(list(given.values()))
    return [broadcast(walk, [Value(shape, _matmul(walk, x, y)), added], shape)]


def _matmul(walk: Operations, x: Value, y: Value) -> Dims:
    walk.axes.same(x.dims[-1], y.dims[-2])
    batch = (walk.axes.same(a, b) for a, b in zip(x.dims[:-2], y.dims[:-2], strict=True))
    return (*batch, x.dims[-2], walk.written(y.dims[-1]))


def _channel_norm(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    x = given["input"]
    names = ("weight", "bias", "running_mean", "running_var")
    there = {name: given[name].dims[0] for name in names if given.get(name) is not None}
    walk.statistics |= {axis for name, axis in there.items() if axis and "running" in name}
    return [_with(x.dims, 1, walk.axes.same(x.dims[1], *there.values()))]


def _group_norm(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    """Channels keep their order, unless they are all one group, or each is one."""
    if given["group"] not in (1, shape[1]):
        walk.axes.fix(given["input"].dims[1])
    return _channel_norm(walk, given, shape)


def _layer_norm(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    x = given["input"]
    there = [given[name] for name in ("weight", "bias") if given[name] is not None]
    return [broadcast(walk, [x, *there], shape)]


def _reduction(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    """What has no order to begin with may be rearranged."""
    x, dim = next(_values(list(given.values()))), given.get("dim")
    gone = {d % len(x.shape) for d in ([dim] if isinstance(dim, int) else dim or ())}
    gone = gone or set(range(len(x.shape)))
    if len(shape) == len(x.shape):  # kept, with size 1
        return [tuple(None if i in gone else axis for i, axis in enumerate(x.dims))]
    return [tuple(axis for i, axis in enumerate(x.dims) if i not in gone)]


def _pooling(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    x = next(_values(list(given.values())))
    spatial = int(_DIMENSIONS.findall(walk.operation)[0])
    walk.axes.fix(*x.dims[-spatial:])
    return [(*x.dims[:-spatial], *(None for _ in range(spatial)))]


def _reshape(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    x = given["self"]
    return [walk.reshapes.apply(x.shape, x.dims, shape, walk.node)]


def _permute(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    return [tuple(given["self"].dims[dim] for dim in given["dims"])]


def _expand(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    """Repetitions of one place may be exchanged."""
    x = given["self"]
    new = len(shape) - len(x.shape)
    sizes, dims = (1,) * new + x.shape, (None,) * new + x.dims
    pairs = zip(sizes, shape, dims, strict=True)
    return [tuple(a if old == size else walk.axes.new(size) for old, size, a in pairs)]


def _repeat(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    x = given["self"]
    new = len(shape) - len(x.shape)
    sizes, dims = (1,) * new + x.shape, (None,) * new + x.dims
    pairs = zip(sizes, shape, dims, strict=True)
    return [tuple(_taken(walk, a, np.arange(size) % old) for old, size, a in pairs)]


def _slice(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    x, dim = given["self"], given["dim"]
    places = np.arange(x.shape[dim])[given["start"] : given["end"] : given["step"]]
    return [_with(x.dims, dim, _taken(walk, x.dims[dim], places))]


def _select(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    x, dim = given["self"], given["dim"]
    if (axis := x.dims[dim]) is not None:
        walk.axes.fix_places(axis.places[[given["index"]]])
    return [_with(x.dims, dim)]


def _split(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    x, dim, sizes = given["self"], given["dim"], given["split_sizes"]
    parts = np.split(np.arange(x.shape[dim]), np.cumsum(sizes)[:-1])
    return [_with(x.dims, dim, _taken(walk, x.dims[dim], part)) for part in parts]


def _concatenation(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    """Each part's units have their own places on the whole axis."""
    parts = [value for value in given["tensors"] if len(value.shape) == len(shape)]
    along = given["dim"] % len(shape)
    columns = enumerate(zip(*(part.dims for part in parts), strict=True))
    dims = [None if i == along else walk.axes.same(*axes) for i, axes in columns]
    if any(part.dims[along] is not None for part in parts):
        dims[along] = whole = walk.axes.new(shape[along])
        assert whole is not None
        ends = np.cumsum([part.shape[along] for part in parts])
        for part, places in zip(parts, np.split(whole.places, ends[:-1]), strict=True):
            if (axis := part.dims[along]) is None:
                walk.axes.fix_places(places)
            else:
                walk.axes.link(axis.places, places)
    return [tuple(dims)]


def _padding(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    x, pads = given["self"], given["pad"]
    dims = list(x.dims)
    for back in range(1, len(pads) // 2 + 1):
        before, after = pads[2 * back - 2 : 2 * back]
        kept = np.arange(x.shape[-back])[max(-before, 0) : x.shape[-back] - max(-after, 0)]
        new = np.full(max(before, 0), -1), kept, np.full(max(after, 0), -1)
        dims[-back] = _taken(walk, dims[-back], np.concatenate(new))
    return [tuple(dims)]


def _embedding(walk: Operations, given: Arguments, shape: Shape) -> list[Dims]:
    weight, indices = given["weight"], given["indices"]
    walk.axes.fix(weight.dims[0])
    return [(*indices.dims, walk.written(weight.dims[1]))]


_DIMENSIONS = re.compile(r"([123])d")

_BY_RULE: dict[Rule, str] = {
    _as_it_is: "alias clone detach lift_fresh_copy _to_copy full_like zeros_like ones_like _softmax"
    " _log_softmax",
    _convolution: "convolution",
    _product: "mm bmm",
    _added_product: "addmm baddbmm",
    _channel_norm: "_native_batch_norm_legit_no_training _native_batch_norm_legit",
    _group_norm: "native_group_norm",
    _layer_norm: "native_layer_norm",
    _reduction: "mean sum amax amin prod var std any all logsumexp linalg_vector_norm",
    _pooling: "max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d"
    " _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d"
    " upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d"
    " upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d reflection_pad1d"
    " reflection_pad2d reflection_pad3d replication_pad2d replication_pad3d",
    _reshape: "view _unsafe_view reshape squeeze unsqueeze",
    _permute: "permute",
    _expand: "expand",
    _repeat: "repeat",
    _slice: "slice",
    _select: "select",
    _split: "split_with_sizes",
    _concatenation: "cat",
    _padding: "constant_pad_nd",
    _embedding: "embedding",
}
_RULES = {name: function for function, names in _BY_RULE.items() for name in names.split()}
