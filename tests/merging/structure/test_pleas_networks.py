"""PLeaS of networks of torch modules: its limits, its costs, heads of their own, what is saved."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evomerge.errors import CheckpointError, ExportError, MergeError, UserError
from evomerge.merging.structure.networks.merge import Refitting, merged_network
from evomerge.merging.structure.networks.pair import matched
from evomerge.merging.structure.networks.pleas_networks import (
    Amount,
    Worth,
    allocated,
    measured_worth,
    pleas,
)
from evomerge.merging.structure.networks.resizing import resized
from evomerge.merging.structure.networks.saves import load_network, save_network
from evomerge.merging.structure.partial.multiply_adds import counted
from evomerge.merging.structure.permutations.matching import mean
from evomerge.merging.structure.permutations.permutation import apply, random_permutations
from evomerge.merging.structure.refit.activation_moments import run
from evomerge.merging.structure.refit.least_squares import Data, LeastSquaresSettings
from evomerge.merging.structure.tracing.tracer import traced_spec

PLAIN = Refitting(least_squares=None, normalization="kept")
KEPT = Refitting(normalization="kept")
SEQUENTIAL = Refitting(least_squares=LeastSquaresSettings(form="sequential"))
EXAMPLE = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double(),)


class Block(nn.Module):
    def __init__(self, reads, writes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(reads, writes, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(writes)
        self.conv2 = nn.Conv2d(writes, writes, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(writes)
        self.past = nn.Conv2d(reads, writes, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + (x if self.past is None else self.past(x)))


class ResNet(nn.Module):
    """Two residual blocks, and batch norms with statistics of their own."""

    def __init__(self, seed, labels=4):
        torch.manual_seed(seed)
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(Block(4, 4, 1), Block(4, 6, 2))
        self.head = nn.Linear(6, labels)
        self.double()
        for _ in range(20):
            self(images(seed))
        self.eval()

    def features(self, x):
        return self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


class Attention(nn.Module):
    """A block of a ViT; with `flexible` it takes any number of heads."""

    def __init__(self, seed=0, *, flexible=True):
        torch.manual_seed(seed)
        super().__init__()
        self.flexible, self.patch = flexible, nn.Conv2d(1, 12, 4, 4)
        self.ln1, self.ln2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))
        self.fc1, self.fc2, self.head = nn.Linear(12, 7), nn.Linear(7, 12), nn.Linear(12, 4)
        self.double().eval()

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        heads = (-1, 4) if self.flexible else (3, 4)
        split = [f(self.ln1(x)).unflatten(-1, heads).transpose(1, 2)
                 for f in (self.q, self.k, self.v)]  # fmt: skip
        x = x + self.out(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))
        return self.head((x + self.fc2(F.gelu(self.fc1(self.ln2(x))))).mean(1))


def images(seed, count=24):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).double()


DATA = Data([images(8), images(9)])


@pytest.fixture(scope="module")
def spec():
    return traced_spec(ResNet(1), *EXAMPLE)


@pytest.fixture(scope="module")
def pair(spec):
    return matched(ResNet(1), ResNet(2), DATA, example=EXAMPLE, spec=spec)


@pytest.fixture(scope="module")
def labelled(spec):
    a, b = ResNet(1, labels=4), ResNet(2, labels=3)
    return a, b, matched(a, b, DATA, example=EXAMPLE, spec=spec, heads=["head"])


def merged(pair, amount, refitting=PLAIN):
    return merged_network(pair, allocated(pair, amount), DATA, refitting)


def close(one: Tensor, other: Tensor, tolerance=1e-9):
    assert (one - other).abs().max() <= tolerance * other.abs().max()


@torch.no_grad()
def outputs(model, seed=5):
    return model(images(seed))


class TestLimits:
    def test_nothing_apart_is_the_permuted_average(self, pair, spec):
        a, b = ResNet(1), ResNet(2)
        moved = apply(spec, b.state_dict(), pair.matching.permutations)
        wanted = mean([a.state_dict(), moved], [0.5, 0.5])
        found = merged(pair, Amount(ratio=0.0)).network.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())

    @pytest.mark.parametrize("refitting", [PLAIN, KEPT, Refitting(
        least_squares=SEQUENTIAL.least_squares, normalization="kept")],
        ids=["filled", "parallel", "sequential"])  # fmt: skip
    def test_everything_apart_is_the_mean_of_the_logits(self, pair, refitting):
        """Also after least squares, for which nothing is left to do."""
        found = merged(pair, Amount(ratio=1.0), refitting)
        wanted = (outputs(ResNet(1)) + outputs(ResNet(2))) / 2
        close(outputs(found.network), wanted, 1e-6)
        assert (wanted - outputs(ResNet(1))).abs().max() > 0.01
        assert found.report.cost == pytest.approx(2.0)

    @pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
    @pytest.mark.parametrize("refitting", [PLAIN, KEPT, SEQUENTIAL])
    def test_a_network_merged_with_itself_keeps_its_function(self, spec, ratio, refitting):
        a = ResNet(1)
        pair = matched(a, a, DATA, example=EXAMPLE, spec=spec, similarity="weights")
        data = Data([images(8, 40)])
        if refitting.normalization == "reset":  # its statistics become those of the data
            refitting = refitting.model_copy(update={"normalization": "kept"})
        found = merged_network(pair, allocated(pair, Amount(ratio=ratio)), data, refitting)
        close(outputs(found.network), outputs(a), 1e-8)

    @pytest.mark.parametrize("refitting", [PLAIN, Refitting(), SEQUENTIAL])
    def test_neither_network_comes_first(self, pair, spec, refitting):
        other = matched(ResNet(2), ResNet(1), DATA, example=EXAMPLE, spec=spec)
        apart = {name: 2 for name in pair.costs.groups}
        one, two = (merged_network(p, apart, DATA, refitting) for p in (pair, other))
        close(outputs(one.network), outputs(two.network), 1e-6)

    @pytest.mark.parametrize("similarity", ["weights", "correlation", "inner", "distance"])
    def test_a_rearranged_copy_is_merged_without_loss(self, spec, similarity):
        a, b = ResNet(1), ResNet(3)
        order = random_permutations(spec, torch.Generator().manual_seed(4))
        b.load_state_dict(apply(spec, a.state_dict(), order))
        pair = matched(a, b, DATA, example=EXAMPLE, spec=spec, similarity=similarity)
        close(outputs(merged(pair, Amount(ratio=0.0)).network), outputs(a), 1e-9)
        still = matched(a, b, DATA, example=EXAMPLE, spec=spec, similarity="identity")
        assert (outputs(merged(still, Amount(ratio=0.0)).network) - outputs(a)).abs().max() > 0.01

    @pytest.mark.parametrize("form", ["parallel", "separate", "sequential"])
    def test_what_is_zero_by_structure_stays_so(self, pair, form):
        squares = LeastSquaresSettings(form=form)
        found = merged(pair, Amount(ratio=0.5), Refitting(least_squares=squares))
        state, zeros = found.network.state_dict(), 0
        for name in pair.layers:
            allowed = found.merge.allowed(name)
            if allowed is not None:
                masked = state[name].masked_select(~allowed.expand_as(state[name]))
                assert not masked.any(), name
                zeros += masked.numel()
        assert zeros > 100
        assert all(fit.after <= fit.before for fit in found.report.layers.values()) or (
            form == "sequential"
        )

    def test_unequal_weights_are_those_of_merged_units(self, pair):
        refitting = PLAIN.model_copy(update={"weights": (1.0, 0.0)})
        close(outputs(merged(pair, Amount(ratio=0.5), refitting).network), outputs(ResNet(1)))


class TestCosts:
    @pytest.mark.parametrize("apart", [{}, {"stem": 3}, {"stem": 4, "blocks.1.conv1": 2}])
    def test_the_cost_is_that_of_the_network_that_was_built(self, pair, apart):
        found = merged_network(pair, apart, DATA, PLAIN)
        one, two = (counted(lambda m=m: run(m, [EXAMPLE])) for m in (pair.a, found.network))
        assert found.report.dense == two / one
        assert pair.costs.dense(apart) == pytest.approx(two / one, rel=1e-12)
        nonzero = sum(_nonzero(found, name) for name in pair.layers)
        assert found.report.cost == pytest.approx(nonzero / one, rel=1e-12)

    @pytest.mark.parametrize("allocation", ["programme", "uniform", "prefix"])
    @pytest.mark.parametrize("budget", [1.0, 1.15, 1.5, 2.0])
    def test_a_budget_is_kept(self, pair, allocation, budget):
        groups = pair.costs.groups
        ones, worths = dict.fromkeys(groups, 0.5), dict.fromkeys(groups, 0.7)
        amount = Amount(budget=budget, allocation=allocation)
        apart = allocated(pair, amount, Worth(0.3, 0.9, ones, worths))
        report = merged_network(pair, apart, DATA, PLAIN).report
        assert report.cost <= budget + 1e-9
        assert report.cost > 1 + 0.6 * (budget - 1) - 1e-9
        assert report.widths == {g: pair.spec[g].size + apart[g] for g in groups}

    def test_a_prefix_is_merged_from_the_input_on(self, pair):
        apart = allocated(pair, Amount(budget=1.6, allocation="prefix"))
        assert list(pair.costs.groups) == ["stem", "blocks.0.conv1", "blocks.1.conv1",
                                           "blocks.1.conv2"]  # fmt: skip
        counts = list(apart.values())
        assert counts[-1] == pair.spec["blocks.1.conv2"].size
        assert counts[0] == 0

    def test_shares_are_given_out_in_proportion(self, pair):
        shares = dict.fromkeys(pair.costs.groups, 0.0) | {"stem": 1.0}
        apart = allocated(pair, Amount(budget=1.3, allocation="shares", shares=shares))
        assert {name for name, m in apart.items() if m} == {"stem"}

    def test_the_programme_asks_a_score(self, pair):
        asked = []

        def score(model):
            asked.append(model.stem.out_channels)
            return -float((outputs(model) - outputs(ResNet(1))).square().mean())

        found = pleas(pair, Amount(budget=1.5), DATA, score=score)
        assert len(asked) == 2 * len(pair.costs.groups) + 2
        assert asked[:2] == [4, 8]
        assert 1.3 < found.report.cost <= 1.5
        worth = measured_worth(pair, DATA, score)
        assert allocated(pair, Amount(budget=1.5), worth) == found.report.apart


def _nonzero(found, name):
    """Multiply-adds of a layer without those of its structural zeros."""
    allowed = found.merge.allowed(name)
    return _cost(found, name) * (1.0 if allowed is None else float(allowed.double().mean()))


def _cost(found, name):
    """Of one layer: positions times the numbers of its weight, by a hook."""
    module = found.network.get_submodule(name.removesuffix(".weight"))
    sizes = []
    with torch.no_grad():
        handle = module.register_forward_hook(lambda m, i, out: sizes.append(out.numel()))
        run(found.network, [EXAMPLE])
        handle.remove()
    return sizes[0] * module.weight[0].numel()


class TestAttention:
    def test_heads_and_neurons_are_widened_and_the_stream_is_not(self):
        a, b = Attention(1), Attention(2)
        pair = matched(a, b, DATA, example=EXAMPLE)
        assert set(pair.costs.groups) == {"q", "fc1"}
        assert "LayerNorm" in pair.left["patch"]
        found = merged(pair, Amount(ratio=1.0))
        assert found.report.widths["q"] == 6
        one, two = (counted(lambda m=m: run(m, [EXAMPLE])) for m in (pair.a, found.network))
        assert pair.costs.dense(found.report.apart) == pytest.approx(two / one, rel=1e-12)
        same = matched(a, a, DATA, example=EXAMPLE)
        close(outputs(merged(same, Amount(ratio=0.5)).network), outputs(a))

    def test_a_reshape_to_so_many_heads_cannot_be_widened(self):
        a, b = Attention(1, flexible=False), Attention(2, flexible=False)
        pair = matched(a, b, DATA, example=EXAMPLE)
        assert pair.costs.groups == ("fc1",)
        assert "does not run with more of its units" in pair.left["q"]
        with pytest.raises(MergeError, match="group q cannot be widened: the network does not run"):
            merged(pair, Amount(apart={"q": 1}))


def test_what_is_no_plain_layer_is_widened_where_it_can_be_and_counted():
    """Channels that a depthwise convolution filters, and those that a transposed one writes."""

    def net(seed):
        torch.manual_seed(seed)
        depthwise = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 12, 3, groups=6), nn.ReLU()
        up = nn.Conv2d(12, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 5, 2, stride=2), nn.ReLU()
        return nn.Sequential(*depthwise, *up, nn.Conv2d(5, 3, 1), nn.Flatten()).double().eval()

    a, b = net(1), net(2)
    pair = matched(a, b, DATA, example=EXAMPLE)
    assert pair.costs.groups == ("0", "6")
    assert "are read by a layer that is not split" in pair.left["4"]
    found = merged(pair, Amount(apart={"0": 4, "6": 5}))
    assert found.report.dense == pytest.approx(pair.costs.dense(found.report.apart), rel=1e-12)
    weights = Refitting(least_squares=None, weights=(1.0, 0.0))
    close(outputs(merged(pair, Amount(apart={"0": 4, "6": 5}), weights).network), outputs(a))


class TestHeads:
    def test_each_head_reads_what_is_merged_and_its_own(self, labelled):
        a, b, pair = labelled
        found = merged(pair, Amount(ratio=0.5))
        weight = found.network.head.weight
        wide = found.merge.layout("head.weight", 1)
        assert weight.shape == (4 + 3, len(wide.origin))
        assert not weight[:4, wide.side == 2].any()
        assert not weight[4:, wide.side == 1].any()
        assert torch.equal(
            weight[:4, wide.side != 2], a.head.weight[:, wide.origin[wide.side != 2]]
        )
        own = torch.empty_like(b.head.weight)
        own[:] = weight[4:, found.features("head", "b")]
        assert torch.equal(own, b.head.weight)
        assert torch.equal(weight[:4, found.features("head", "a")], a.head.weight)
        assert torch.equal(found.network.head.bias, torch.cat([a.head.bias, b.head.bias]))
        assert found.report.labels == {"head": (4, 3)}

    @pytest.mark.parametrize("refitting", [PLAIN, KEPT])
    def test_everything_apart_gives_each_networks_logits(self, labelled, refitting):
        a, b, pair = labelled
        found = merged(pair, Amount(ratio=1.0), refitting)
        close(outputs(found.network), torch.cat([outputs(a), outputs(b)], 1), 1e-6)

    def test_least_squares_bring_the_heads_nearer_to_both(self, labelled):
        a, b, pair = labelled
        wanted = torch.cat([outputs(a, 8), outputs(b, 8)], 1)
        error = {
            name: (outputs(merged(pair, Amount(ratio=0.3), how).network, 8) - wanted).square().sum()
            for name, how in (("plain", Refitting(least_squares=None)), ("ours", SEQUENTIAL))
        }
        assert error["ours"] < error["plain"] / 2

    def test_the_features_of_each_in_its_own_order(self, labelled):
        a, b, pair = labelled
        found = merged(pair, Amount(ratio=1.0))
        features = found.network.features(images(5))
        close(features[:, found.features("head", "a")], a.features(images(5)))
        close(features[:, found.features("head", "b")], b.features(images(5)))


class TestSaved:
    @pytest.mark.parametrize("ratio", [0.0, 0.5])
    def test_what_is_loaded_computes_the_same_bit_for_bit(self, pair, tmp_path, ratio):
        found = merged(pair, Amount(ratio=ratio), Refitting())
        save_network(found, tmp_path / "out", a="first", b="second")
        again = load_network(tmp_path / "out", ResNet(7))
        assert torch.equal(outputs(again), outputs(found.network))
        text = (tmp_path / "out" / "pleas.json").read_text()
        assert '"a": "first"' in text
        assert '"widths"' in text
        with pytest.raises(ExportError, match=r"model\.safetensors exists; name another folder"):
            save_network(found, tmp_path / "out")

    def test_heads_and_biases_that_the_skeleton_has_not(self, labelled, tmp_path):
        found = merged(labelled[2], Amount(ratio=0.5))
        save_network(found, tmp_path / "heads")
        assert torch.equal(
            outputs(load_network(tmp_path / "heads", ResNet(7))), outputs(found.network)
        )

    def test_another_architecture_is_refused(self, pair, tmp_path):
        save_network(merged(pair, Amount(ratio=0.5)), tmp_path)
        with pytest.raises(CheckpointError, match=r"has no fc1\.bias; .* another architecture"):
            load_network(tmp_path, Attention())
        with pytest.raises(CheckpointError, match="no network saved by PLeaS"):
            load_network(tmp_path / "nothing", ResNet(7))


class TestResized:
    def test_tied_weights_stay_tied(self):
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        made = resized(
            net, {"0.weight": (5, 5), "1.weight": (5, 5), "0.bias": (5,), "1.bias": (5,)}
        )
        assert made[0].weight is made[1].weight
        assert made[0].in_features == 5
        assert net[0].in_features == 3

    def test_channels_of_a_depthwise_convolution(self):
        made = resized(nn.Conv2d(4, 8, 3, groups=4), {"weight": (12, 1, 3, 3), "bias": (12,)})
        assert (made.in_channels, made.out_channels, made.groups) == (6, 12, 6)
        assert made(torch.zeros(1, 6, 5, 5)).shape == (1, 12, 3, 3)

    @pytest.mark.parametrize(
        ("model", "shapes", "said"),
        [
            (nn.MultiheadAttention(4, 2), {"in_proj_weight": (15, 5)}, "MultiheadAttention cannot"),
            (nn.Conv2d(4, 4, 3, groups=2), {"weight": (6, 2, 3, 3)}, "2 groups of channels cannot"),
            (nn.Linear(2, 2), {"other": (3,)}, "other: this network has no such tensor"),
        ],
    )
    def test_what_cannot_be_resized_is_said(self, model, shapes, said):
        with pytest.raises(MergeError, match=said):
            resized(model, shapes)


class TestRepair:
    def test_a_network_without_batch_norms(self):
        def net(seed):
            torch.manual_seed(seed)
            layers = nn.Conv2d(1, 5, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(180, 3)
            return nn.Sequential(*layers).double().eval()

        pair = matched(net(1), net(2), DATA, example=EXAMPLE)
        how = Refitting(least_squares=None, normalization="repair")
        found = merged(pair, Amount(ratio=0.0), how).network
        spread = {
            m: m[0](images(8)).movedim(1, 0).flatten(1).std(1) for m in (found, pair.a, pair.b)
        }
        close(spread[found], (spread[pair.a] + spread[pair.b]) / 2, 0.05)
        with pytest.raises(MergeError, match="repair needs networks of the same layers"):
            merged(pair, Amount(ratio=0.5), how)


class TestRefusals:
    @pytest.mark.parametrize("budget", [0.9, 2.5])
    def test_a_budget_out_of_range(self, pair, budget):
        with pytest.raises(MergeError, match=r"it must lie between 1 and 2, where"):
            pleas(pair, Amount(budget=budget), DATA, score=lambda _: pytest.fail("asked"))

    def test_a_programme_without_a_score(self, pair):
        with pytest.raises(UserError, match="hand in a `score`, or take `uniform`"):
            pleas(pair, Amount(budget=1.5), DATA)

    def test_a_score_that_is_no_number(self, pair):
        with pytest.raises(UserError, match="is nan; it must be a number"):
            pleas(pair, Amount(budget=1.5), DATA, score=lambda _: float("nan"))

    @pytest.mark.parametrize("refitting", [Refitting(), Refitting(least_squares=None), SEQUENTIAL])
    def test_no_data(self, pair, refitting):
        with pytest.raises(UserError, match=r"no batch to .*; name more data"):
            merged_network(pair, {}, Data(), refitting)
        with pytest.raises(UserError, match="no batch to match activations on"):
            matched(ResNet(1), ResNet(2), Data(), example=EXAMPLE, spec=pair.spec)

    def test_too_little_data(self, pair):
        squares = LeastSquaresSettings(ridge=0.0)
        with pytest.raises(UserError, match=r"conv2\.weight: 48 rows .* too few for 54 columns"):
            merged_network(pair, {}, Data([images(1, 3)]), Refitting(least_squares=squares))
        one = Data([images(1, 1)[:, :, :1, :1]])
        with pytest.raises(UserError, match="has one value of each channel"):
            merged_network(pair, {}, one, Refitting(least_squares=None))

    def test_networks_of_other_shapes(self, spec):
        with pytest.raises(
            MergeError, match=r"head\.weight: is \[4, 6\] in one .* \[3, 6\] in the"
        ):
            matched(ResNet(1), ResNet(2, labels=3), DATA, example=EXAMPLE, spec=spec)
        with pytest.raises(MergeError, match=r"stem\.weight: is \[4, 1, 3, 3\] .* not there"):
            matched(ResNet(1), nn.Linear(2, 2), DATA, example=EXAMPLE, spec=spec)

    def test_a_head_that_is_none(self, spec):
        with pytest.raises(MergeError, match=r"'fc' is no linear layer of both networks; .* head"):
            matched(ResNet(1), ResNet(2), DATA, example=EXAMPLE, spec=spec, heads=["fc"])

    @pytest.mark.parametrize(
        ("apart", "said"),
        [({"no": 1}, "group no is none"), ({"stem": 5}, "5 of its 4 units cannot stay apart")],
    )
    def test_units_that_there_are_not(self, pair, apart, said):
        with pytest.raises(MergeError, match=said):
            pleas(pair, Amount(apart=apart), DATA)

    @pytest.mark.parametrize(
        ("amount", "said"),
        [
            ({}, "either a budget, a ratio"),
            ({"budget": 1.2, "ratio": 0.5}, "either a budget, a ratio"),
            ({"budget": 1.2, "shares": {}}, "shares go with"),
            ({"ratio": 0.5, "allocation": "uniform"}, "that of a budget"),
            ({"ratio": 1.5}, "less than or equal to 1"),
        ],
    )
    def test_an_amount_that_says_two_things(self, amount, said):
        with pytest.raises(ValueError, match=said):
            Amount.model_validate(amount)

    def test_weights_that_are_no_shares(self):
        with pytest.raises(ValueError, match=re.escape("weights of (1.0, 1.0)")):
            Refitting(weights=(1.0, 1.0))
