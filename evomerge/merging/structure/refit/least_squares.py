"""Layers of a merged network refit, so that each gives again what the two networks gave.

Layer by layer, in closed form, from sums of products that are streamed over calibration data. Reads
live networks and a partial merge; decides neither which units are merged nor what becomes of
embeddings, layer norms and whatever else is no layer of weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from evomerge.errors import MergeError, UserError
from evomerge.merging.structure.partial.partial import BOTH, A, B, PartialMerge
from evomerge.merging.structure.permutations.activations import Live
from evomerge.merging.structure.permutations.linear_layers import Layer
from evomerge.merging.structure.permutations.permutation import State
from evomerge.merging.structure.refit.activation_moments import Moments
from evomerge.merging.structure.refit.followed_norms import (
    Followed,
    batch_norms,
    followers,
    norm_names,
)
from evomerge.merging.structure.refit.layer_rows import (
    Calls,
    Run,
    as_matrix,
    captured,
    from_matrix,
    survey,
    unfolding,
    units_axis,
)
from evomerge.merging.structure.refit.layer_sums import Site, View, mixed
from evomerge.merging.structure.refit.normal_equations import Equations, Gram, Products

Ran = Mapping[str, Calls]


class LeastSquaresSettings(BaseModel):
    """How layers are refit.

    `form` says what a layer is given: `parallel` (as published) the mean of what it is given in the
    two networks; `separate` the one's and then the other's, as rows of their own, with 0 for units
    of the other alone (RegMean among merged units); `sequential` (Ours) what it is given in the
    merged network, in which all layers before it are refit already.

    `targets` says whose outputs the units of merged pairs are to give: of `both` (as published), by
    the weights of the merge, or its `own`, on data that is one network's (Ours). `ridge` pulls to
    the partial merge, as a share of the mean square of the inputs; with 0, fewer rows than columns
    are refused. `memory_bytes` bounds the sums that are kept at a time; one layer's always are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    form: Literal["parallel", "separate", "sequential"] = "parallel"
    targets: Literal["both", "own"] = "both"
    ridge: float = Field(default=0.01, ge=0.0)
    memory_bytes: int = Field(default=4 << 30, ge=1)


@dataclass(frozen=True)
class Data:
    """Batches of what `Live.run` takes, without padding: of the task of network a, of b's, and of
    no one's or both's. They are gone through more than once, each time alike."""

    both: Iterable[Any] = ()
    a: Iterable[Any] = ()
    b: Iterable[Any] = ()

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        parts = ((self.both, BOTH), (self.a, A), (self.b, B))
        return chain.from_iterable(((batch, side) for batch in part) for part, side in parts)


@dataclass(frozen=True)
class Merged:
    """The merged network in memory, of the partial merge's tensors: `write` sets one of them, by
    its stored name. Its layers may be wider: what lies behind the merge's units is left out."""

    live: Live
    write: Callable[[str, Tensor], object]


@dataclass(frozen=True)
class LayerFit:
    """How a layer came out: rows and columns of X, and the mean of (X Wᵀ − Y)² over all numbers of
    Y, for the weight it had and the one it got."""

    rows: int
    columns: int
    before: float
    after: float


@dataclass(frozen=True, eq=False)
class Refit:
    """The tensors that were refit by stored name, in the dtypes of the partial merge; how each
    layer came out; and the layers that are as they were, for they did not run on the data or share
    their weight with another."""

    tensors: dict[str, Tensor]
    layers: dict[str, LayerFit]
    kept: tuple[str, ...]


@torch.no_grad()
def refit(
    a: Live,
    b: Live,
    merge: PartialMerge,
    layers: Mapping[str, Layer],
    start: State,
    data: Data,
    settings: LeastSquaresSettings,
    *,
    merged: Merged | None = None,
) -> Refit:
    """Refit every layer of a merged network by least squares on what the two networks compute.

        W = argmin ‖X Wᵀ − Y‖² + λ‖W − W₀‖²,   λ = ridge·mean(diag XᵀX)
        X = (w·Z_a + v·Z_b | Z_a | Z_b),  Y likewise from the layer's outputs
            at units that are (merged | a's alone | b's alone)

    over the rows of all batches and places, convolutions unfolded. W₀ is the partial merge,
    `start`, and (w, v) its weights; entries of W that it does not allow stay 0. A bias is a further
    column of ones, that λ does not count. Units of b must lie in a's order. Of several solutions it
    takes the nearest to W₀: a network merged with itself keeps its weights, and so, in the parallel
    form, do two networks of which no units are merged. The separate form asks units of one network
    for 0 on rows of the other, a bias notwithstanding.

    Form `sequential` writes to `merged` layer by layer, and takes X from there. There, a batch norm
    right behind a layer is refit together with it, as one affine layer whose Y is what the norm
    gives; any other gets the statistics of its inputs in its turn.

    Layers that are given the same share one XᵀX. Memory, in float64: (d + 1)² + (d + 1)·o numbers
    for d columns (inputs times the kernel's area) and o outputs of each of the layers that are
    summed for at a time, beside their activations on one batch. The data are run through once for
    each such set of layers, `sequential` once for every layer, from the network's beginning to it.

    Raises UserError without data, and where a layer has fewer rows than columns and there is no
    ridge; MergeError for activations that are NaN, or of different shapes in the two networks.

    Source: PLeaS, Nasery et al. 2024, arXiv:2407.02447, sec. 3; the authors' code reaches the same
    minimum by 400 steps of Adam, without a ridge, and with structural zeros that do not stay 0.
    """
    if settings.form == "sequential" and merged is None:
        raise MergeError("sequential least squares need the merged network in memory")
    own = merged if settings.form == "sequential" else None
    return _Fit(a, b, merge, layers, start, data, settings, own).refit()


@dataclass(eq=False)
class _Fit:
    """A run of least squares; `merged` is None unless layers are taken one after another."""

    a: Live
    b: Live
    merge: PartialMerge
    layers: Mapping[str, Layer]
    start: State
    data: Data
    settings: LeastSquaresSettings
    merged: Merged | None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    fits: dict[str, LayerFit] = field(default_factory=dict)
    runs: dict[str, list[Run]] = field(default_factory=dict)
    norm_of: dict[str, str] = field(default_factory=dict)

    def refit(self) -> Refit:
        """All layers, set by set."""
        batch = next(iter(self.data), None)
        if batch is None:
            raise UserError("no batch to refit layers on; name more data")
        norms = batch_norms(self.a.modules) if self.merged is not None else []
        self.runs = survey(self.a, batch[0], [*self._untied(), *norms])
        self.norm_of = followers(self.runs, norms)
        for sites in self._sets():
            if (norm := sites[0].names[0]) in norms:
                self._set_statistics(norm)
            else:
                self._sum(sites)
                for site in sites:
                    for name in site.names:
                        self._solve(name, site)
        kept = tuple(name for name in self.layers if name not in self.fits)
        return Refit(self.tensors, self.fits, kept)

    def _untied(self) -> list[str]:
        """Layers that share their weight with no other."""
        users = Counter(id(module.weight) for module in self.a.modules.values())
        return [name for name in self.layers if users[id(self.a.modules[name].weight)] == 1]

    def _sets(self) -> Iterator[list[Site]]:
        """Sites that are summed for at a time, or one norm, in the order in which they run."""
        sites: dict[Any, list[str]] = {}
        for name in self.runs:
            if name not in self.norm_of.values():
                sites.setdefault(self._key(name), []).append(name)
        waiting: list[Site] = []
        taken = 0
        for names in sites.values():
            size = self._bytes(names)
            if waiting and (self.merged or taken + size > self.settings.memory_bytes):
                yield waiting
                waiting, taken = [], 0
            waiting.append(Site(names))
            taken += size
        if waiting:
            yield waiting

    def _key(self, name: str) -> Any:
        """What layers have in common that share their rows."""
        if name not in self.layers:
            return name
        wide = self.merge.layout(name, self.layers[name].in_axis)
        places = () if wide is None else (*wide.origin.tolist(), *wide.side.tolist())
        given = tuple(run.given for run in self.runs[name])
        return given, unfolding(self.a.modules[name]), places

    def _bytes(self, names: list[str]) -> int:
        layers = [n for n in names if n in self.layers]
        shapes = [as_matrix(self.layers[n], self.start[n]).shape for n in layers]
        return sum(8 * (d + 1) * o for o, d in shapes) + sum(
            8 * (d + 1) ** 2 for _, d in shapes[:1]
        )

    def _sum(self, sites: list[Site]) -> None:
        """Run the data through, and sum for these layers."""
        times = {name: len(self.runs[name]) for site in sites for name in site.names}
        every = times | {self.norm_of[name]: 1 for name in times if name in self.norm_of}
        for batch, whose in self.data:
            a, b = (captured(live, batch, every) for live in (self.a, self.b))
            merged = captured(self.merged.live, batch, times) if self.merged else None
            for site in sites:
                for name in site.names:
                    for x, y in self._rows(name, a, b, merged, whose):
                        site.add(name, self.a.modules[name], x, y)

    def _rows(
        self, name: str, a: Ran, b: Ran, merged: Ran | None, whose: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What a layer is given and is to give in the merged network, float64, run by run."""
        layer, target = self.layers[name], self.norm_of.get(name, name)
        axis = units_axis(self.a.modules[name])
        into, to = (self.merge.layout(name, at) for at in (layer.in_axis, layer.out_axis))
        wide_in = self.start[name].shape[layer.in_axis]
        shapes = [[x.shape for x, _ in ran[name]] for ran in (a, b)]
        if shapes[0] != shapes[1]:
            raise MergeError(f"{name}: is given {_said(shapes[0])} in one network and"
                             f" {_said(shapes[1])} in the other; it must be the same")  # fmt: skip
        for run, ((of_a, _), (of_b, _)) in enumerate(zip(a[name], b[name], strict=True)):
            outputs = a[target][run][1], b[target][run][1]
            for view in self._views(whose):
                if merged is not None:
                    x = merged[name][run][0].narrow(axis, 0, wide_in).double()
                else:
                    x = mixed(into, of_a, of_b, view.inputs, view.alone, axis)
                yield x, mixed(to, *outputs, view.outputs, view.alone, axis)

    def _views(self, whose: int) -> list[View]:
        share = {BOTH: self.merge.weights, A: (1.0, 0.0), B: (0.0, 1.0)}
        side = whose if self.settings.targets == "own" else BOTH
        if self.settings.form != "separate":
            return [View(share[BOTH], share[side], (1.0, 1.0))]
        return [View(share[s], share[s], share[s]) for s in ((A, B) if side == BOTH else (side,))]

    def _solve(self, name: str, site: Site) -> None:
        """Give a layer its weight, and its bias or the norm behind it what goes with it."""
        layer, gram, products = self.layers[name], site.gram, site.products.get(name)
        if gram is None or products is None:
            return  # it did not run after all
        if not bool(gram.total.isfinite().all() & products.cross.isfinite().all()):
            raise MergeError(f"{name}: what it is given or gives on the calibration data is NaN"
                             " or infinite")  # fmt: skip
        device = gram.total.device
        state = {key: tensor.to(device) for key, tensor in self._of(name).items()}
        weight = as_matrix(layer, state[name]).double()
        bias = state[layer.bias].double() if layer.bias is not None else None
        norm = self._norm(name, state)
        begin = norm.joined(weight, bias) if norm is not None else _joined(weight, bias)
        found = self._solved(name, gram, products, begin)
        held: dict[str, Tensor] = {}
        if norm is not None:
            weight, held = norm.parted(found, gram.total, bias)
        else:
            weight = found[:, : weight.shape[1]]
            if layer.bias is not None:
                held = {layer.bias: found[:, -1]}
        self._put({name: from_matrix(layer, weight, self.start[name].shape), **held})

    def _solved(self, name: str, gram: Gram, products: Products, start: Tensor) -> Tensor:
        """[W | b] of a layer, [outputs, columns]."""
        width, columns = start.shape[1], gram.total.shape[1] - 1
        if self.settings.ridge == 0 and gram.rows < width:
            raise UserError(f"{name}: {gram.rows} rows of calibration data are too few for"
                            f" {width} columns; name more data, or set a ridge")  # fmt: skip
        allowed = self.merge.allowed(name)
        if allowed is not None:
            allowed = self._entries(name, allowed).to(start.device)
        equations = Equations(
            gram.total[:width, :width],
            products.cross[:width],
            products.square,
            self.settings.ridge,
            allowed,
            width > columns,
        )
        found = equations.solved(start)
        before, after = (equations.error(w) / (gram.rows * len(start)) for w in (start, found))
        self.fits[name] = LayerFit(gram.rows, columns, before, after)
        return found

    def _entries(self, name: str, allowed: Tensor) -> Tensor:
        """Which entries of a layer's matrix are allowed [outputs, columns]."""
        return as_matrix(self.layers[name], allowed.expand(self.start[name].shape))

    def _of(self, name: str) -> dict[str, Tensor]:
        """The tensors of a layer and of the norm behind it."""
        names = [name, self.layers[name].bias]
        if (norm := self.norm_of.get(name)) is not None:
            names += norm_names(norm)
        return {key: self.start[key] for key in names if key is not None}

    def _norm(self, name: str, state: State) -> Followed | None:
        if (norm := self.norm_of.get(name)) is None:
            return None
        return Followed.of(norm, self.a.modules[norm], state)

    def _set_statistics(self, norm: str) -> None:
        """Give a batch norm of the merged network the statistics of what it is given there."""
        assert self.merged is not None
        moments = Moments()
        times = {norm: len(self.runs[norm])}
        for batch, _ in self.data:
            for x, _ in captured(self.merged.live, batch, times)[norm]:
                moments.add(x.movedim(1, -1).flatten(0, -2))
        if not bool(moments.squares.isfinite().all()):
            raise MergeError(f"{norm}: what it is given on the calibration data is NaN or infinite")
        _, _, mean, variance = norm_names(norm)
        self._put({mean: moments.mean, variance: moments.squares / max(1, moments.n - 1)})

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.tensors[name] = tensor.to(self.start[name])
            if self.merged is not None:
                self.merged.write(name, self.tensors[name])


def _joined(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight if bias is None else torch.cat([weight, bias[:, None]], 1)


def _said(shapes: list[torch.Size]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)
