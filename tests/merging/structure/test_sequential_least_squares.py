"""Layers refit one after another: each on what the refit ones before it give."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from small_refits import SEQUENTIAL, deep, layers_of, live, merge_of, refitted, rows_of, writer
from torch import Tensor, nn
from torch.nn import functional

from evomerge.merging.structure.partial.partial import PartialMerge
from evomerge.merging.structure.permutations.activations import Live
from evomerge.merging.structure.permutations.linear_layers import linear_layers, modules_of
from evomerge.merging.structure.permutations.permutation import Spec
from evomerge.merging.structure.refit.least_squares import (
    Data,
    LeastSquaresSettings,
    Merged,
    refit,
)


class TestSequential:
    def test_a_layer_makes_up_for_the_one_before_it(self):
        """The first layer, which is not refit, gives twice what it should: the second halves it."""
        a = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
        a.load_state_dict({"0.weight": torch.ones(1, 1), "1.weight": torch.full((1, 1), 3.0)})
        network, merge, x = live(a), merge_of(a), rows_of(width=1)
        layers = {"1.weight": layers_of(a)["1.weight"]}
        start = {**a.state_dict(), "0.weight": torch.full((1, 1), 2.0).double()}
        for form, wanted in (("parallel", 3.0), ("sequential", 1.5)):
            merged = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
            merged.double().load_state_dict(start)
            settings = LeastSquaresSettings(form=form, ridge=0.0)
            into = Merged(live(merged), writer(merged))
            found = refit(network, network, merge, layers, start, Data([x]), settings, merged=into)
            assert found.tensors["1.weight"].item() == pytest.approx(wanted, rel=1e-12)
            assert found.layers["1.weight"].after == pytest.approx(0, abs=1e-12)

    def test_every_layer_is_given_what_the_refit_ones_before_it_give(self):
        a, b, x, merged = deep(1), deep(2), rows_of(), deep(3)
        found = refitted(a, b, merge_of(a), Data(both=[x[:25], x[25:]]), SEQUENTIAL, merged=merged)
        assert all(torch.equal(t, merged.state_dict()[n]) for n, t in found.tensors.items())
        for at in (0, 2, 4):
            rows = torch.cat([merged[:at](x), x[:, :1] ** 0], 1)
            best = torch.linalg.lstsq(rows, (a[: at + 1](x) + b[: at + 1](x)) / 2).solution.T
            assert torch.allclose(merged[at].weight, best[:, :-1], rtol=1e-8, atol=1e-8), at
        parallel = refitted(a, b, merge_of(a), Data([x]))
        assert not torch.allclose(parallel.tensors["4.weight"], found.tensors["4.weight"])

    def test_targets_are_those_of_the_network_whose_data_it_is(self):
        a, b, merged = (deep(seed) for seed in (1, 2, 3))
        one, two, none = rows_of(30, 1), rows_of(40, 2), rows_of(20, 3)
        settings = LeastSquaresSettings(form="sequential", targets="own", ridge=0.0)
        data = Data(both=[none], a=[one], b=[two])
        refitted(a, b, merge_of(a), data, settings, merged=merged)
        x = torch.cat([none, one, two])
        rows = torch.cat([merged[:4](x), x[:, :1] ** 0], 1)
        wanted = torch.cat([(a(none) + b(none)) / 2, a(one), b(two)])
        best = torch.linalg.lstsq(rows, wanted).solution.T
        assert torch.allclose(merged[4].weight, best[:, :-1], rtol=1e-8, atol=1e-8)

    def test_a_convolution_and_its_norm_are_refit_as_one(self):
        """The gradient of their joint error is 0, and its statistics are those of its inputs."""
        a, b, merged = (_normed(seed) for seed in (1, 2, 3))
        x = _images()
        refitted(a, b, merge_of(a), Data([x[:15], x[15:]]), SEQUENTIAL, merged=merged)
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
        found = refitted(a, a, merge_of(a), Data([x]), SEQUENTIAL, merged=merged)
        assert torch.allclose(found.tensors["0.weight"], a[0].weight, atol=1e-10)
        assert torch.allclose(merged(x), a(x), rtol=1e-9, atol=1e-9)

    def test_a_norm_behind_no_layer_gets_the_statistics_of_its_inputs(self):
        def net(seed: int) -> nn.Sequential:
            torch.manual_seed(seed)
            layers = nn.Conv2d(2, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)
            return nn.Sequential(*layers).double().eval()

        a, b, merged, x = net(1), net(2), net(3), _images()
        refitted(a, b, merge_of(a), Data([x[:10], x[10:]]), SEQUENTIAL, merged=merged)
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
        into = Merged(lives[2], writer(merged))
        data = Data([tokens[:8], tokens[8:]])
        found = refit(*lives[:2], merge, layers, start, data, settings, merged=into)
        assert found.tensors.keys() == layers.keys()
        assert all(fit.after < fit.before for fit in list(found.layers.values())[3:])
        assert {fit.rows for fit in found.layers.values()} == {192}


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
