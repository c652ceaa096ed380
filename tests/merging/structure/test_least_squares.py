"""Layers refit by least squares: against explicit matrices, RegMean, and in their limits."""

from __future__ import annotations

import pytest
import torch
from small_refits import (
    PLAIN,
    SEQUENTIAL,
    deep,
    hidden,
    layers_of,
    live,
    merge_of,
    refitted,
    rows_of,
    two_layers,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from evomerge.errors import MergeError, UserError
from evomerge.merging.methods.gram import System
from evomerge.merging.methods.regmean import regmean
from evomerge.merging.structure.permutations.activations import Live
from evomerge.merging.structure.permutations.linear_layers import plain_modules
from evomerge.merging.structure.refit.least_squares import (
    Data,
    LeastSquaresSettings,
    refit,
)
from evomerge.merging.structure.refit.normal_equations import Gram


class TestAgainstExplicitMatrices:
    """What torch solves from the stacked rows themselves."""

    def test_a_linear_layer_behind_split_units(self):
        """Outputs: 3 merged. Inputs: units 0, 2, 3, 5 merged, 1 and 4 apart."""
        a, b, x = two_layers(1), two_layers(2), rows_of()
        found = refitted(a, b, merge_of(a, [hidden([1, 4])]), Data([x[:20], x[20:]]))
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
        a, b, x = deep(1), deep(2), rows_of()
        merge = merge_of(a, [hidden([1, 4]), _second([0])])
        found = refitted(a, b, merge, Data([x]))
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
        a, b, x = deep(1), deep(2), rows_of(200)
        merge = merge_of(a, [hidden([1, 4]), _second([0])])
        found = refitted(a, b, merge, Data([x]))
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
        found = refitted(a, b, merge_of(a), Data([x[:3], x[3:]]))
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
        merge = merge_of(a, [(4, places, [2])])
        x = torch.randn(30, 2, *[7] * kind, dtype=torch.float64)
        found = refitted(a, b, merge, Data([x]), LeastSquaresSettings(ridge=0.1))
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
        a = two_layers(1)
        merge = merge_of(a, [hidden(apart)])
        found = refitted(a, a, merge, Data([rows_of()]), LeastSquaresSettings(ridge=ridge))
        start = merge.state(a.state_dict(), a.state_dict())
        for name, tensor in found.tensors.items():
            assert torch.allclose(tensor, start[name], rtol=0, atol=1e-12), name

    def test_two_networks_all_apart_keep_their_weights(self):
        a, b = deep(1), deep(2)
        merge = merge_of(a, [hidden(list(range(6))), _second(list(range(4)))])
        found = refitted(a, b, merge, Data([rows_of(100)]))
        start = merge.state(a.state_dict(), b.state_dict())
        for name, tensor in found.tensors.items():
            assert torch.allclose(tensor, start[name], rtol=0, atol=1e-10), name
        assert max(fit.after for fit in found.layers.values()) < 1e-14

    def test_a_strong_ridge_keeps_the_partial_merge(self):
        a, b = two_layers(1), two_layers(2)
        merge = merge_of(a, [hidden([1])])
        found = refitted(a, b, merge, Data([rows_of()]), LeastSquaresSettings(ridge=1e9))
        start = merge.state(a.state_dict(), b.state_dict())
        assert torch.allclose(found.tensors["2.weight"], start["2.weight"], atol=1e-7)

    def test_separate_rows_are_regmean(self):
        """With no units apart, and each network on its own data."""
        a, b = (nn.Sequential(nn.Linear(5, 3, bias=False)).double() for _ in range(2))
        one, two = rows_of(30, 1), rows_of(50, 2) * 2
        settings = LeastSquaresSettings(form="separate", targets="own", ridge=0.0)
        found = refitted(a, b, merge_of(a), Data(a=[one], b=[two]), settings).tensors["0.weight"]
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
        merge = merge_of(a, [hidden, second])
        settings = LeastSquaresSettings(form="separate", ridge=0.0)
        found = refitted(a, b, merge, Data([rows_of(100)]), settings)
        start = merge.state(a.state_dict(), b.state_dict())
        assert torch.allclose(found.tensors["2.weight"], start["2.weight"], rtol=0, atol=1e-9)


class TestSums:
    def test_neither_order_nor_batches_matter(self):
        a, b, x = _convolutions(1, 2), _convolutions(2, 2), torch.randn(40, 2, 7, 7).double()
        merge = merge_of(a, [(4, [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)], [2])])
        order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
        once = refitted(a, b, merge, Data([x]))
        parts = refitted(a, b, merge, Data(both=x[order].split(7)))
        for name, tensor in once.tensors.items():
            assert torch.allclose(tensor, parts.tensors[name], rtol=1e-10, atol=1e-10), name
        assert [fit.rows for fit in once.layers.values()] == [1960, 640]
        assert [fit.rows for fit in parts.layers.values()] == [1960, 640]

    def test_little_memory_costs_passes_and_no_result(self):
        a, b, x = deep(1), deep(2), rows_of()
        merge = merge_of(a, [hidden([1]), _second([0])])
        data = _Counted([x])
        once = refitted(a, b, merge, Data(data))
        assert data.passes == 2  # one to see which layers there are
        data = _Counted([x])
        little = refitted(a, b, merge, Data(data), LeastSquaresSettings(ridge=0.0, memory_bytes=1))
        assert data.passes == 4
        assert all(torch.equal(t, little.tensors[name]) for name, t in once.tensors.items())

    def test_layers_of_one_input_share_a_gram_matrix(self, monkeypatch):
        added: list[int] = []
        add = Gram.add
        monkeypatch.setattr(Gram, "add", lambda s, x: (added.append(x.shape[1]), add(s, x)))
        a, b, x = _branches(1), _branches(2), rows_of()
        found = refitted(a, b, merge_of(a), Data([x]))
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

        wanted = refitted(net(1, False), net(2, False), merge_of(net(1, False)), Data([rows_of()]))
        found = refitted(net(1, True), net(2, True), merge_of(net(1, True)), Data([rows_of()]))
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


class TestRefusals:
    def test_no_data(self):
        a = two_layers(1)
        with pytest.raises(UserError, match="no batch to refit layers on"):
            refitted(a, a, merge_of(a), Data())

    def test_fewer_rows_than_columns_without_a_ridge(self):
        a, b = two_layers(1), two_layers(2)
        with pytest.raises(UserError, match=r"0\.weight: 4 rows .* too few for 6 columns"):
            refitted(a, b, merge_of(a), Data([rows_of(4)]))
        found = refitted(a, b, merge_of(a), Data([rows_of(4)]), LeastSquaresSettings(ridge=1e-3))
        assert (found.layers["0.weight"].rows, found.layers["0.weight"].columns) == (4, 5)
        assert all(bool(t.isfinite().all()) for t in found.tensors.values())

    @pytest.mark.parametrize("ridge", [0.0, 0.01])
    def test_inputs_that_say_nothing_keep_the_partial_merge(self, ridge):
        a, b, x = two_layers(1), two_layers(2), rows_of()
        x[:, 2] = 0
        x[:, 4] = x[:, 3]
        merge = merge_of(a)
        found = refitted(a, b, merge, Data([x]), LeastSquaresSettings(ridge=ridge))
        start = merge.state(a.state_dict(), b.state_dict())["0.weight"]
        assert torch.allclose(found.tensors["0.weight"], start, rtol=0, atol=1e-10)

    def test_nan_names_the_layer(self):
        a, b, x = two_layers(1), two_layers(2), rows_of()
        b[2].bias.data[0] = torch.nan
        with pytest.raises(MergeError, match=r"^2\.weight: .* NaN"):
            refitted(a, b, merge_of(a), Data([x]))

    def test_sequential_without_the_merged_network(self):
        a = two_layers(1)
        with pytest.raises(MergeError, match="need the merged network"):
            refitted(a, a, merge_of(a), Data([rows_of()]), SEQUENTIAL)

    def test_networks_that_are_given_different_shapes(self):
        a = two_layers(1)
        other = Live(plain_modules(a), lambda x: a(x[1:]))
        with pytest.raises(MergeError, match=r"0\.weight: is given \[60, 5\] .* \[59, 5\]"):
            refit(
                live(a), other, merge_of(a), layers_of(a), a.state_dict(), Data([rows_of()]), PLAIN
            )

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
        found = refitted(a, b, merge_of(a), Data([rows_of()]))
        assert found.kept == ("idle.weight", "one.weight", "same.weight")
        assert found.tensors.keys() == {"used.weight", "used.bias"}
