"""BatchNorm reset and REPAIR against torch's own statistics and the targets of the paper."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from evomerge.errors import MergeError, NonFiniteModel, UserError
from evomerge.merging.structure.refit.normalization import repair, reset_batch_norm


def images(n=24, seed=0):
    draw = torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (2 * draw + torch.arange(3).view(1, 3, 1, 1)).double()


def with_norms(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5, momentum=0.3), nn.Flatten(), nn.Linear(20, 6), nn.BatchNorm1d(6),
    )  # fmt: skip
    return model.double()


def statistics(model):
    return {n: t.clone() for n, t in model.state_dict().items() if "running" in n}


def close(first, second, **bounds):
    for name, tensor in second.items():
        torch.testing.assert_close(first[name], tensor, **bounds)


def test_all_data_in_one_batch_gives_the_statistics_of_torch():
    model = with_norms().eval()
    torchs = copy.deepcopy(model)
    for module in torchs.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    torchs(images())
    reset_batch_norm(model, [images()])
    close(model.state_dict(), torchs.state_dict(), rtol=1e-12, atol=1e-12)


def test_the_first_norm_has_the_statistics_of_all_data_however_it_is_cut():
    model = with_norms()
    wanted = model[0](images()).movedim(1, -1).flatten(0, -2)
    for cut in (1, 5, 7, 24):
        reset_batch_norm(model[:2], images().split(cut))
        torch.testing.assert_close(model[1].running_mean, wanted.mean(0))
        torch.testing.assert_close(model[1].running_var, wanted.var(0))


def test_one_value_far_from_zero_keeps_its_variance():
    model = nn.Sequential(nn.BatchNorm1d(1)).double()
    data = 1e8 + torch.arange(12.0, dtype=torch.float64)[:, None]
    reset_batch_norm(model, data.split(5))
    assert float(model[0].running_var) == pytest.approx(13.0)


def test_twice_is_once_and_nothing_else_changes():
    model = with_norms()
    model[4].eval()
    before = copy.deepcopy(model)
    reset_batch_norm(model, images().split(8))
    once = statistics(model)
    reset_batch_norm(model, images().split(8))
    close(statistics(model), once, rtol=0, atol=0)
    others = {n: t for n, t in before.state_dict().items() if "running" not in n and "num" not in n}
    close(model.state_dict(), others, rtol=0, atol=0)
    modes = [(m.training, getattr(m, "track_running_stats", None)) for m in before.modules()]
    found = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    assert found == modes
    assert model[5].momentum == 0.3
    assert int(model[1].num_batches_tracked) == 3


def test_the_statistics_of_a_merge_are_no_longer_those_of_its_parents():
    model, other = with_norms(0), with_norms(1)
    for parent in (model, other):
        reset_batch_norm(parent, [images()])
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.lerp_(theirs, 0.5)
    model.eval()
    assert model(images()).std(0).max() < 0.6
    reset_batch_norm(model, [images()])
    torch.testing.assert_close(model(images()).std(0), model[8].weight.detach(), rtol=0.05, atol=0)


def test_no_data_is_refused_and_the_statistics_stay():
    model = with_norms()
    before = statistics(model)
    with pytest.raises(UserError, match="no batch to measure"):
        reset_batch_norm(model, [])
    close(statistics(model), before, rtol=0, atol=0)


def test_batches_of_one_value_and_nan_are_refused_and_the_statistics_stay():
    model = with_norms()
    before = statistics(model)
    with pytest.raises(UserError, match="give larger batches"):
        reset_batch_norm(model, images().split(1))
    with pytest.raises(NonFiniteModel, match="1: its activations"):
        reset_batch_norm(model, [images(), images() * torch.nan])
    close(statistics(model), before, rtol=0, atol=0)
    assert model.training


class Plain(nn.Module):
    """Every kind of layer that is repaired."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.one = nn.Conv1d(4, 5, 3)
        self.drop, self.hidden, self.out = nn.Dropout(), nn.Linear(5, 7), nn.Linear(7, 2)
        self.double()

    def forward(self, x):
        x = self.up(self.conv(x).relu())
        x = self.one(x.flatten(2)).relu().mean(-1)
        return self.out(F.gelu(self.hidden(self.drop(x))))


REPAIRED = ("conv", "up", "one", "hidden")


def merged(parents, weights):
    model = copy.deepcopy(parents[0])
    state = {
        name: sum(w * p.state_dict()[name] for w, p in zip(weights, parents, strict=True))
        for name in model.state_dict()
    }
    model.load_state_dict(state)
    return model


def measured(model, names=REPAIRED):
    """Mean and standard deviation of each layer's outputs on all data at once."""
    found = {}

    def keep(name):
        def hook(module, _, made):
            rows = made if isinstance(module, nn.Linear) else made.movedim(1, -1).flatten(0, -2)
            found[name] = rows.mean(0), rows.std(0, correction=0)

        return hook

    handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in names]
    with torch.no_grad():
        model.eval()(images())
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("cut", [24, 7])
def test_every_layer_has_the_statistics_between_those_of_its_parents(cut):
    parents, weights = [Plain(0), Plain(1)], [0.3, 0.7]
    model = merged(parents, weights)
    before = measured(model)
    repair(model, parents, images().split(cut), weights)
    mine, a, b = measured(model), *map(measured, parents)
    for name in REPAIRED:
        for part in (0, 1):
            wanted = 0.3 * a[name][part] + 0.7 * b[name][part]
            torch.testing.assert_close(mine[name][part], wanted, rtol=1e-9, atol=1e-12)
        assert before[name][1].mean() < 0.9 * mine[name][1].mean()  # variance had collapsed


def test_the_repair_is_in_the_weights_and_leaves_the_last_layer():
    parents, weights = [Plain(0), Plain(1)], [0.5, 0.5]
    model = merged(parents, weights)
    last = model.out.weight.clone()
    fresh = copy.deepcopy(model)
    repair(model, parents, images().split(8), weights)
    assert torch.equal(model.out.weight, last)
    fresh.conv.bias = nn.Parameter(torch.zeros(6).double())
    fresh.load_state_dict(model.state_dict())  # a plain network of the same layers
    torch.testing.assert_close(fresh.eval()(images()), model.eval()(images()), rtol=0, atol=0)


def test_a_repaired_layer_is_the_layer_followed_by_the_paper_s_affine_map():
    """Against BatchNorm in the stead of our formula: its output, rescaled, is the target's."""
    parents, weights = [Plain(0), Plain(1)], [0.5, 0.5]
    model = merged(parents, weights)
    layer = copy.deepcopy(model.conv)
    repair(model, parents, [images()], weights, layers=["conv"])
    goals = [measured(parent, ["conv"])["conv"] for parent in parents]
    mean, spread = ((x + y) / 2 for x, y in zip(*goals, strict=True))
    wanted = F.batch_norm(layer(images()), None, None, spread, mean, training=True, eps=1e-30)
    torch.testing.assert_close(model.conv(images()), wanted)
    assert torch.equal(model.hidden.weight, merged(parents, weights).hidden.weight)


def test_a_model_repaired_to_itself_is_itself():
    parent = Plain(0)
    model = copy.deepcopy(parent)
    repair(model, [parent], images().split(8), [1.0])
    torch.testing.assert_close(model.eval()(images()), parent.eval()(images()))
    repair(model, [parent], images().split(8), [1.0])
    torch.testing.assert_close(model.eval()(images()), parent.eval()(images()))


def test_a_channel_that_never_changes_gets_the_mean_and_keeps_its_weights():
    parents, weights = [Plain(0), Plain(1)], [0.5, 0.5]
    model = merged(parents, weights)
    with torch.no_grad():
        model.conv.weight[2] = 0.0
    repair(model, parents, [images()], weights)
    mean, spread = measured(model)["conv"]
    goals = [measured(parent)["conv"][0] for parent in parents]
    assert float(spread[2]) == 0
    torch.testing.assert_close(mean, (goals[0] + goals[1]) / 2)
    assert bool(model(images()).isfinite().all())


def test_modes_are_restored():
    parents = [Plain(0), Plain(1).eval()]
    model = merged(parents, [0.5, 0.5])
    model.drop.eval()
    repair(model, parents, [images()], [0.5, 0.5])
    assert (model.training, model.drop.training) == (True, False)
    assert (parents[0].training, parents[1].training) == (True, False)


def test_what_cannot_be_repaired_is_refused():
    parents, half = [Plain(0), Plain(1)], [0.5, 0.5]
    with pytest.raises(MergeError, match="1: a network with batch norms is set right by reset_"):
        repair(with_norms(), [with_norms(), with_norms(1)], [images()], half)
    with pytest.raises(UserError, match="no batch to measure"):
        repair(Plain(2), parents, [], half)
    with pytest.raises(MergeError, match="2 parents with 1 weights"):
        repair(Plain(2), parents, [images()], [1.0])
    with pytest.raises(MergeError, match="nosuch: runs 0 times"):
        repair(Plain(2), parents, [images()], half, layers=["nosuch"])
    other = Plain(1)
    other.hidden = nn.Linear(5, 8).double()
    with pytest.raises(MergeError, match=r"hidden.weight: is \[7, 5\] .* \[8, 5\] in parent 1"):
        repair(Plain(2), [parents[0], other], [images()], half)
    with pytest.raises(NonFiniteModel, match="conv: its activations"):
        repair(Plain(2), parents, [images() * torch.nan], half)


def test_layers_that_run_twice_or_share_weights_are_refused():
    def net():
        layer = nn.Linear(3, 3)
        return nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(3, 2))

    def tied():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
        model[1].weight = model[0].weight
        return model

    data = torch.randn(4, 3)
    with pytest.raises(MergeError, match="0: runs 2 times in a forward pass"):
        repair(net(), [net()], [data], [1.0])
    with pytest.raises(MergeError, match=r"0\.weight: is shared with another layer"):
        repair(tied(), [tied()], [data], [1.0])
