"""Layers refit by least squares: against explicit stacked matrices, RegMean, and by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from evomerge.errors import MergeError, UserError
from evomerge.merging.methods.gram import System
from evomerge.merging.methods.regmean import regmean
from evomerge.merging.structure.activations import Live
from evomerge.merging.structure.least_squares import (
    Data,
    LeastSquaresSettings,
    Merged,
    Refit,
    refit,
)
from evomerge.merging.structure.linear_layers import linear_layers, modules_of, plain_modules
from evomerge.merging.structure.normal_equations import Gram
from evomerge.merging.structure.partial import PartialMerge, Split
from evomerge.merging.structure.permutation import Group, Spec
from evomerge.merging.structure.units import Shapes, blocks, bound

PLAIN = LeastSquaresSettings(ridge=0.0)


def _shapes(net: nn.Module) -> Shapes:
    return {name: tuple(t.shape) for name, t in net.state_dict().items()}


def _live(net: nn.Module) -> Live:
    return Live(plain_modules(net), net)


def _merge(net: nn.Module, groups: Sequence[tuple[int, list[tuple[str, int]], list[int]]] = ()):
    """A merge in which of each group (size, places, apart) some units stay apart."""
    shapes, found, splits = _shapes(net), [], {}
    for number, (size, places, apart) in enumerate(groups):
        index = [(name, axis, shapes[name][axis] // size) for name, axis in places]
        binds = [b for n, x, m in index for b in bound(shapes, blocks(size, m), (n, x))]
        found.append(Group(str(number), "inner", size, tuple(binds)))
        rest = [u for u in range(size) if u not in apart]
        splits[str(number)] = Split(_integers(rest), _integers(apart))
    return PartialMerge(Spec(tuple(found)), _layers(net), shapes, splits)


def _integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def _layers(net: nn.Module):
    return linear_layers(plain_modules(net), _shapes(net))


def _refit(
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
        into = Merged(_live(merged), _writer(merged))
    return refit(_live(a), _live(b), merge, _layers(a), start, data, settings, merged=into)


def _two_layers(seed: int, hidden: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()


def _hidden(apart: list[int]) -> tuple[int, list[tuple[str, int]], list[int]]:
    return 6, [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)], apart


def _rows(count: int = 60, seed: int = 9, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


class TestAgainstExplicitMatrices:
    """What torch solves from the stacked rows themselves."""

    def test_a_linear_layer_behind_split_units(self):
        """Outputs: 3 merged. Inputs: units 0, 2, 3, 5 merged, 1 and 4 apart."""
        a, b, x = _two_layers(1), _two_layers(2), _rows()
        found = _refit(a, b, _merge(a, [_hidden([1, 4])]), Data([x[:20], x[20:]]))
        za, zb = (torch.tanh(net[0](x)) for net in (a, b))
        both, alone = [0, 2, 3, 5], [1, 4]
        rows = torch.cat([(za + zb)[:, both] / 2, za[:, alone], zb[:, alone], x[:, :1] ** 0], 1)
        best = torch.linalg.lstsq(rows, (a(x) + b(x)) / 2).solution.T
        assert torch.allclose(found.tensors["2.weight"], best[:, :-1], rtol=1e-9, atol=1e-9)
        assert torch.allclose(found.tensors["2.bias"], best[:, -1], rtol=1e-9, atol=1e-9)
        error = (rows @ best.T - (a(x) + b(x)) / 2).square().mean()
        fit = found.layers["2.weight"]
        assert fit.after == pytest.approx(error.item(), rel=1e-9)
        assert fit.after < fit.before
        assert (fit.rows, fit.columns) == (60, 8)

    def test_rows_of_one_network_use_only_what_they_may(self):
        """Three layers: the middle one has split units on both sides, and blocks that stay 0."""
        a, b, x = _deep(1), _deep(2), _rows()
        merge = _merge(a, [_hidden([1, 4]), _second([0])])
        found = _refit(a, b, merge, Data([x]))
        za, zb = (torch.tanh(net[0](x)) for net in (a, b))
        ya, yb = (net[2](torch.tanh(net[0](x))) for net in (a, b))
        ones = x[:, :1] ** 0
        shared = (za + zb)[:, [0, 2, 3, 5]] / 2
        weight = found.tensors["2.weight"]
        of_a = torch.linalg.lstsq(torch.cat([shared, za[:, [1, 4]], ones], 1), ya[:, :1]).solution
        of_b = torch.linalg.lstsq(torch.cat([shared, zb[:, [1, 4]], ones], 1), yb[:, :1]).solution
        assert torch.allclose(weight[3, :6], of_a[:6, 0], rtol=1e-8, atol=1e-8)
        assert torch.allclose(weight[4, [0, 1, 2, 3, 6, 7]], of_b[:6, 0], rtol=1e-8, atol=1e-8)
        allowed = merge.allowed("2.weight")
        assert allowed is not None
        assert not weight[~allowed].any()
        assert int((~allowed).sum()) == 4

    def test_masked_gradient_descent_ends_in_the_same_place(self):
        a, b, x = _deep(1), _deep(2), _rows(200)
        merge = _merge(a, [_hidden([1, 4]), _second([0])])
        found = _refit(a, b, merge, Data([x]))
        za, zb = (torch.tanh(net[0](x)).detach() for net in (a, b))
        ya, yb = (net[2](torch.tanh(net[0](x))).detach() for net in (a, b))
        both, of = [0, 2, 3, 5], [1, 4]
        rows = torch.cat([(za + zb)[:, both] / 2, za[:, of], zb[:, of], x[:, :1] ** 0], 1)
        wanted = torch.cat([(ya + yb)[:, 1:] / 2, ya[:, :1], yb[:, :1]], 1)
        allowed = merge.allowed("2.weight")
        assert allowed is not None
        mask = torch.cat([allowed, allowed[:, :1] | True], 1).double()
        start = merge.state(a.state_dict(), b.state_dict())
        weight = torch.cat([start["2.weight"], start["2.bias"][:, None]], 1)
        step = 1 / torch.linalg.eigvalsh(rows.T @ rows)[-1]
        before = weight
        for _ in range(20000):  # Nesterov's
            ahead = weight + 0.97 * (weight - before)
            before, weight = weight, ahead - step * mask * ((ahead @ rows.T - wanted.T) @ rows)
        assert torch.allclose(found.tensors["2.weight"], weight[:, :-1], rtol=1e-6, atol=1e-6)
        assert torch.allclose(found.tensors["2.bias"], weight[:, -1], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        "options",
        [
            {"stride": 2, "padding": 1},
            {"dilation": 2, "padding": (2, 1)},
            {"padding": "same", "dilation": (1, 2)},
            {"padding": "valid", "bias": False},
            {"padding": 1, "padding_mode": "circular"},
            {"padding": 1, "padding_mode": "reflect", "stride": (1, 2)},
        ],
    )
    def test_a_convolution_is_solved_by_its_own_gradient(self, options):
        """At the best weight the gradient of autograd through the convolution itself is 0."""
        torch.manual_seed(0)
        a, b = (nn.Sequential(nn.Conv2d(2, 3, (3, 2), **options)).double() for _ in range(2))
        x = torch.randn(8, 2, 7, 6, dtype=torch.float64)
        found = _refit(a, b, _merge(a), Data([x[:3], x[3:]]))
        net = nn.Sequential(nn.Conv2d(2, 3, (3, 2), **options)).double()
        net.load_state_dict(found.tensors)
        wanted = (a(x) + b(x)).detach() / 2
        loss = functional.mse_loss(net(x), wanted)
        loss.backward()
        assert loss < 1e-20  # one layer of the same inputs: the mean is exact
        assert all(parameter.grad.abs().max() < 1e-12 for parameter in net.parameters())

    @pytest.mark.parametrize("kind", [1, 2])
    def test_a_convolution_behind_split_channels(self, kind):
        a, b = _convolutions(1, kind), _convolutions(2, kind)
        places = [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]
        merge = _merge(a, [(4, places, [2])])
        x = torch.randn(30, 2, *[7] * kind, dtype=torch.float64)
        found = _refit(a, b, merge, Data([x]), LeastSquaresSettings(ridge=0.1))
        za, zb = (net[1](net[0](x)).detach() for net in (a, b))
        z = torch.cat([(za + zb)[:, [0, 1, 3]] / 2, za[:, 2:3], zb[:, 2:3]], 1)
        layer = type(a[2])(5, 3, 3, stride=2, padding=1).double()
        layer.load_state_dict({k: found.tensors[f"2.{k}"] for k in ("weight", "bias")})
        started = merge.state(a.state_dict(), b.state_dict())["2.weight"]
        loss = (layer(z) - (a(x) + b(x)).detach() / 2).square().sum()
        loss.backward()
        kernel = torch.ones_like(layer.weight[:1])
        squares = type(layer)._conv_forward(layer, z**2, kernel, None).sum() / kernel.numel()
        pull = 2 * 0.1 * squares * (found.tensors["2.weight"] - started)
        assert (layer.weight.grad + pull).abs().max() < 1e-9
        assert layer.bias.grad.abs().max() < 1e-9
        assert (found.tensors["2.weight"] - started).abs().max() > 1e-3


def _deep(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)
    return nn.Sequential(*layers).double()


def _second(apart: list[int]) -> tuple[int, list[tuple[str, int]], list[int]]:
    return 4, [("2.weight", 0), ("2.bias", 0), ("4.weight", 1)], apart


def _convolutions(seed: int, kind: int) -> nn.Sequential:
    torch.manual_seed(seed)
    conv = {1: nn.Conv1d, 2: nn.Conv2d}[kind]
    return nn.Sequential(
        conv(2, 4, 3, padding=1), nn.ReLU(), conv(4, 3, 3, stride=2, padding=1)
    ).double()


class TestLimits:
    @pytest.mark.parametrize("ridge", [0.0, 0.01])
    @pytest.mark.parametrize("apart", [[], [1, 4], list(range(6))])
    def test_a_network_merged_with_itself_keeps_its_weights(self, ridge, apart):
        a = _two_layers(1)
        merge = _merge(a, [_hidden(apart)])
        found = _refit(a, a, merge, Data([_rows()]), LeastSquaresSettings(ridge=ridge))
        start = merge.state(a.state_dict(), a.state_dict())
        for name, tensor in found.tensors.items():
            assert torch.allclose(tensor, start[name], rtol=0, atol=1e-12), name

    def test_two_networks_all_apart_keep_their_weights(self):
        a, b = _deep(1), _deep(2)
        merge = _merge(a, [_hidden(list(range(6))), _second(list(range(4)))])
        found = _refit(a, b, merge, Data([_rows(100)]))
        start = merge.state(a.state_dict(), b.state_dict())
        for name, tensor in found.tensors.items():
            assert torch.allclose(tensor, start[name], rtol=0, atol=1e-10), name
        assert max(fit.after for fit in found.layers.values()) < 1e-14

    def test_a_strong_ridge_keeps_the_partial_merge(self):
        a, b = _two_layers(1), _two_layers(2)
        merge = _merge(a, [_hidden([1])])
        found = _refit(a, b, merge, Data([_rows()]), LeastSquaresSettings(ridge=1e9))
        start = merge.state(a.state_dict(), b.state_dict())
        assert torch.allclose(found.tensors["2.weight"], start["2.weight"], atol=1e-7)

    def test_separate_rows_are_regmean(self):
        """With no units apart, and each network on its own data."""
        a, b = (nn.Sequential(nn.Linear(5, 3, bias=False)).double() for _ in range(2))
        one, two = _rows(30, 1), _rows(50, 2) * 2
        settings = LeastSquaresSettings(form="separate", targets="own", ridge=0.0)
        found = _refit(a, b, _merge(a), Data(a=[one], b=[two]), settings).tensors["0.weight"]
        grams = [x.T @ x for x in (one, two)]
        weights = [net[0].weight.detach().T for net in (a, b)]
        mean = (weights[0] + weights[1]) / 2
        right = sum(g @ (w - mean) for g, w in zip(grams, weights, strict=True))
        assert torch.allclose(found.T, regmean(System(mean, sum(grams), right)), atol=1e-12)

    def test_separate_rows_leave_networks_apart_as_they_are(self):
        def net(seed: int) -> nn.Sequential:
            torch.manual_seed(seed)
            first, second = nn.Linear(5, 6, bias=False), nn.Linear(6, 4, bias=False)
            return nn.Sequential(first, nn.Tanh(), second, nn.Linear(4, 3, bias=False)).double()

        a, b = net(1), net(2)
        hidden = 6, [("0.weight", 0), ("2.weight", 1)], list(range(6))
        second = 4, [("2.weight", 0), ("3.weight", 1)], list(range(4))
        merge = _merge(a, [hidden, second])
        settings = LeastSquaresSettings(form="separate", ridge=0.0)
        found = _refit(a, b, merge, Data([_rows(100)]), settings)
        start = merge.state(a.state_dict(), b.state_dict())
        assert torch.allclose(found.tensors["2.weight"], start["2.weight"], rtol=0, atol=1e-9)


class TestSums:
    def test_neither_order_nor_batches_matter(self):
        a, b, x = _convolutions(1, 2), _convolutions(2, 2), torch.randn(40, 2, 7, 7).double()
        merge = _merge(a, [(4, [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)], [2])])
        order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
        once = _refit(a, b, merge, Data([x]))
        parts = _refit(a, b, merge, Data(both=x[order].split(7)))
        for name, tensor in once.tensors.items():
            assert torch.allclose(tensor, parts.tensors[name], rtol=1e-10, atol=1e-10), name
        assert [fit.rows for fit in once.layers.values()] == [1960, 640]
        assert [fit.rows for fit in parts.layers.values()] == [1960, 640]

    def test_little_memory_costs_passes_and_no_result(self):
        a, b, x = _deep(1), _deep(2), _rows()
        merge = _merge(a, [_hidden([1]), _second([0])])
        data = _Counted([x])
        once = _refit(a, b, merge, Data(data))
        assert data.passes == 2  # one to see which layers there are
        data = _Counted([x])
        little = _refit(a, b, merge, Data(data), LeastSquaresSettings(ridge=0.0, memory_bytes=1))
        assert data.passes == 4
        assert all(torch.equal(t, little.tensors[name]) for name, t in once.tensors.items())

    def test_layers_of_one_input_share_a_gram_matrix(self, monkeypatch):
        added: list[int] = []
        add = Gram.add
        monkeypatch.setattr(Gram, "add", lambda s, x: (added.append(x.shape[1]), add(s, x)))
        a, b, x = _branches(1), _branches(2), _rows()
        found = _refit(a, b, _merge(a), Data([x]))
        assert added == [6, 5]  # q, k and v once, and o
        for name in ("q", "k", "v"):  # the same input in both: the best is the mean
            mean = (a.state_dict()[f"{name}.weight"] + b.state_dict()[f"{name}.weight"]) / 2
            assert torch.allclose(found.tensors[f"{name}.weight"], mean, atol=1e-12), name
        wanted = torch.linalg.lstsq(
            torch.cat([(_before_o(a, x) + _before_o(b, x)) / 2, x[:, :1] ** 0], 1),
            (a(x) + b(x)) / 2,
        ).solution.T
        assert torch.allclose(found.tensors["o.weight"], wanted[:, :-1], atol=1e-9)

    def test_inputs_written_over_are_what_the_layer_saw(self):
        def net(seed: int, inplace: bool) -> nn.Sequential:
            torch.manual_seed(seed)
            layers = nn.Linear(5, 6), nn.ReLU(inplace=inplace), nn.Linear(6, 3)
            return nn.Sequential(*layers).double()

        wanted = _refit(net(1, False), net(2, False), _merge(net(1, False)), Data([_rows()]))
        found = _refit(net(1, True), net(2, True), _merge(net(1, True)), Data([_rows()]))
        assert all(torch.equal(t, found.tensors[name]) for name, t in wanted.tensors.items())


class _Counted:
    """Batches, and how often they were asked for."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.passes = 0
        self._batches = batches

    def __iter__(self):
        self.passes += 1
        return iter(self._batches)


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(5, 4), nn.Linear(5, 4, bias=False)
        self.v, self.o = Conv1D(4, 5), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) * self.k(x) + self.v(x))


def _branches(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return _Branches().double()


def _before_o(net: nn.Module, x: Tensor) -> Tensor:
    return (net.q(x) * net.k(x) + net.v(x)).detach()


SEQUENTIAL = LeastSquaresSettings(form="sequential", ridge=0.0)


class TestSequential:
    def test_a_layer_makes_up_for_the_one_before_it(self):
        """The first layer, which is not refit, gives twice what it should: the second halves it."""
        a = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
        a.load_state_dict({"0.weight": torch.ones(1, 1), "1.weight": torch.full((1, 1), 3.0)})
        live, merge, x = _live(a), _merge(a), _rows(width=1)
        layers = {"1.weight": _layers(a)["1.weight"]}
        start = {**a.state_dict(), "0.weight": torch.full((1, 1), 2.0).double()}
        for form, wanted in (("parallel", 3.0), ("sequential", 1.5)):
            merged = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
            merged.double().load_state_dict(start)
            settings = LeastSquaresSettings(form=form, ridge=0.0)
            into = Merged(_live(merged), _writer(merged))
            found = refit(live, live, merge, layers, start, Data([x]), settings, merged=into)
            assert found.tensors["1.weight"].item() == pytest.approx(wanted, rel=1e-12)
            assert found.layers["1.weight"].after == pytest.approx(0, abs=1e-12)

    def test_every_layer_is_given_what_the_refit_ones_before_it_give(self):
        a, b, x, merged = _deep(1), _deep(2), _rows(), _deep(3)
        found = _refit(a, b, _merge(a), Data(both=[x[:25], x[25:]]), SEQUENTIAL, merged=merged)
        assert all(torch.equal(t, merged.state_dict()[n]) for n, t in found.tensors.items())
        for at in (0, 2, 4):
            rows = torch.cat([merged[:at](x), x[:, :1] ** 0], 1)
            best = torch.linalg.lstsq(rows, (a[: at + 1](x) + b[: at + 1](x)) / 2).solution.T
            assert torch.allclose(merged[at].weight, best[:, :-1], rtol=1e-8, atol=1e-8), at
        parallel = _refit(a, b, _merge(a), Data([x]))
        assert not torch.allclose(parallel.tensors["4.weight"], found.tensors["4.weight"])

    def test_targets_are_those_of_the_network_whose_data_it_is(self):
        a, b, merged = (_deep(seed) for seed in (1, 2, 3))
        one, two, none = _rows(30, 1), _rows(40, 2), _rows(20, 3)
        settings = LeastSquaresSettings(form="sequential", targets="own", ridge=0.0)
        data = Data(both=[none], a=[one], b=[two])
        _refit(a, b, _merge(a), data, settings, merged=merged)
        x = torch.cat([none, one, two])
        rows = torch.cat([merged[:4](x), x[:, :1] ** 0], 1)
        wanted = torch.cat([(a(none) + b(none)) / 2, a(one), b(two)])
        best = torch.linalg.lstsq(rows, wanted).solution.T
        assert torch.allclose(merged[4].weight, best[:, :-1], rtol=1e-8, atol=1e-8)

    def test_a_convolution_and_its_norm_are_refit_as_one(self):
        """The gradient of their joint error is 0, and its statistics are those of its inputs."""
        a, b, merged = (_normed(seed) for seed in (1, 2, 3))
        x = _images()
        _refit(a, b, _merge(a), Data([x[:15], x[15:]]), SEQUENTIAL, merged=merged)
        for at in (1, 4):
            wanted = ((a[: at + 1](x) + b[: at + 1](x)) / 2).detach()
            merged.zero_grad()
            functional.mse_loss(merged[: at + 1](x), wanted).backward()
            assert merged[at - 1].weight.grad.abs().max() < 1e-10
            assert merged[at].bias.grad.abs().max() < 1e-10
            given = merged[:at](x).detach().movedim(1, -1).flatten(0, -2)
            assert torch.allclose(merged[at].running_mean, given.mean(0), rtol=1e-9)
            assert torch.allclose(merged[at].running_var, given.var(0), rtol=1e-9)

    def test_a_network_with_norms_merged_with_itself_keeps_its_function(self):
        a, merged, x = _normed(1), _normed(3), _images()
        found = _refit(a, a, _merge(a), Data([x]), SEQUENTIAL, merged=merged)
        assert torch.allclose(found.tensors["0.weight"], a[0].weight, atol=1e-10)
        assert torch.allclose(merged(x), a(x), rtol=1e-9, atol=1e-9)

    def test_a_norm_behind_no_layer_gets_the_statistics_of_its_inputs(self):
        def net(seed: int) -> nn.Sequential:
            torch.manual_seed(seed)
            layers = nn.Conv2d(2, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)
            return nn.Sequential(*layers).double().eval()

        a, b, merged, x = net(1), net(2), net(3), _images()
        _refit(a, b, _merge(a), Data([x[:10], x[10:]]), SEQUENTIAL, merged=merged)
        given = merged[:2](x).movedim(1, -1).flatten(0, -2)
        assert torch.allclose(merged[2].running_mean, given.mean(0), rtol=1e-10)
        assert torch.allclose(merged[2].running_var, given.var(0), rtol=1e-10)

    def test_a_language_model(self):
        """Layers of transformers by their stored names; a tied head is left alone."""
        a, b, merged = (_llama(seed) for seed in (1, 2, 3))
        shapes = {name: tuple(t.shape) for name, t in a.named_parameters()}
        lives = [Live(modules_of(net, shapes), net) for net in (a, b, merged)]
        layers = linear_layers(lives[0].modules, shapes)
        assert len(layers) == 14
        merge = PartialMerge(Spec(()), layers, shapes, {})
        start = merge.state(*(dict(net.named_parameters()) for net in (a, b)))
        merged.load_state_dict(start, strict=False)
        tokens = torch.randint(48, (16, 12), generator=torch.Generator().manual_seed(1))
        settings = LeastSquaresSettings(form="sequential")
        into = Merged(lives[2], _writer(merged))
        data = Data([tokens[:8], tokens[8:]])
        found = refit(*lives[:2], merge, layers, start, data, settings, merged=into)
        assert found.tensors.keys() == layers.keys()
        assert all(fit.after < fit.before for fit in list(found.layers.values())[3:])
        assert {fit.rows for fit in found.layers.values()} == {192}


def _writer(net: nn.Module):
    return lambda name, tensor: net.state_dict()[name].copy_(tensor)


def _images() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(25, 2, 6, 6, generator=generator, dtype=torch.float64)


def _normed(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    first = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()
    second = nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
    net = nn.Sequential(*first, *second, nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    net(2 * _images())  # statistics of its own
    return net.eval()


def _llama(seed: int):
    return tiny_models.causal("llama", seed=seed, dtype=torch.float32, tie_word_embeddings=True)


class TestRefusals:
    def test_no_data(self):
        a = _two_layers(1)
        with pytest.raises(UserError, match="no batch to refit layers on"):
            _refit(a, a, _merge(a), Data())

    def test_fewer_rows_than_columns_without_a_ridge(self):
        a, b = _two_layers(1), _two_layers(2)
        with pytest.raises(UserError, match=r"0\.weight: 4 rows .* too few for 6 columns"):
            _refit(a, b, _merge(a), Data([_rows(4)]))
        found = _refit(a, b, _merge(a), Data([_rows(4)]), LeastSquaresSettings(ridge=1e-3))
        assert (found.layers["0.weight"].rows, found.layers["0.weight"].columns) == (4, 5)
        assert all(bool(t.isfinite().all()) for t in found.tensors.values())

    @pytest.mark.parametrize("ridge", [0.0, 0.01])
    def test_inputs_that_say_nothing_keep_the_partial_merge(self, ridge):
        a, b, x = _two_layers(1), _two_layers(2), _rows()
        x[:, 2] = 0
        x[:, 4] = x[:, 3]
        merge = _merge(a)
        found = _refit(a, b, merge, Data([x]), LeastSquaresSettings(ridge=ridge))
        start = merge.state(a.state_dict(), b.state_dict())["0.weight"]
        assert torch.allclose(found.tensors["0.weight"], start, rtol=0, atol=1e-10)

    def test_nan_names_the_layer(self):
        a, b, x = _two_layers(1), _two_layers(2), _rows()
        b[2].bias.data[0] = torch.nan
        with pytest.raises(MergeError, match=r"^2\.weight: .* NaN"):
            _refit(a, b, _merge(a), Data([x]))

    def test_sequential_without_the_merged_network(self):
        a = _two_layers(1)
        with pytest.raises(MergeError, match="need the merged network"):
            _refit(a, a, _merge(a), Data([_rows()]), SEQUENTIAL)

    def test_networks_that_are_given_different_shapes(self):
        a = _two_layers(1)
        other = Live(plain_modules(a), lambda x: a(x[1:]))
        with pytest.raises(MergeError, match=r"0\.weight: is given \[60, 5\] .* \[59, 5\]"):
            refit(_live(a), other, _merge(a), _layers(a), a.state_dict(), Data([_rows()]), PLAIN)

    def test_layers_that_do_not_run_or_share_a_weight_are_left(self):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.idle = nn.Linear(5, 5), nn.Linear(5, 5)
                self.one, self.same = nn.Linear(5, 5), nn.Linear(5, 5)
                self.same.weight = self.one.weight

            def forward(self, x: Tensor) -> Tensor:
                return self.used(self.one(torch.tanh(self.same(x))))

        a, b = Net().double(), Net().double()
        found = _refit(a, b, _merge(a), Data([_rows()]))
        assert found.kept == ("idle.weight", "one.weight", "same.weight")
        assert found.tensors.keys() == {"used.weight", "used.bias"}
