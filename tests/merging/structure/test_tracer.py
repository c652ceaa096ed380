"""The tracer: against specifications written by hand, and on what it must not link."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from structure_configs import CONFIGS
from torch import nn
from torch.nn import functional as F

from evomerge.errors import MergeError
from evomerge.merging.structure.architectures.families import spec_of
from evomerge.merging.structure.architectures.trial_network import TrialNetwork, random_tensor
from evomerge.merging.structure.permutations.check import check
from evomerge.merging.structure.permutations.matching import weight_matching
from evomerge.merging.structure.permutations.permutation import (
    Spec,
    apply,
    inverse,
    random_permutations,
)
from evomerge.merging.structure.tracing.tracer import traced_spec


def pixels(channels=3, size=8):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def conv(reads, writes, kernel=3, **settings):
    return nn.Conv2d(reads, writes, kernel, padding=kernel // 2, **settings)


def layout(spec):
    """What the groups bind, whatever they are called."""
    return {
        frozenset(
            (b.param, b.axis, tuple(map(tuple, b.index.tolist())), b.compared) for b in group.binds
        )
        for group in spec.groups
    }


def places(spec):
    """Group -> tensor and axis -> positions of each unit."""
    return {
        group.name: {(b.param, b.axis): b.index.tolist() for b in group.binds}
        for group in spec.groups
    }


def of(*layers):
    return nn.Sequential(*layers)


class Block(nn.Module):
    """A block of a ResNet, by torchvision's names."""

    def __init__(self, reads, inner, writes, kernels, stride=1):
        super().__init__()
        widths = [reads, *[inner] * (len(kernels) - 1), writes]
        self.count = len(kernels)
        for n, kernel in enumerate(kernels, 1):
            steps = stride if n == self.count - 1 else 1
            layer = conv(widths[n - 1], widths[n], kernel, stride=steps, bias=False)
            self.add_module(f"conv{n}", layer)
            self.add_module(f"bn{n}", nn.BatchNorm2d(widths[n]))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or reads != writes:
            shortcut = nn.Conv2d(reads, writes, 1, stride, bias=False)
            self.downsample = of(shortcut, nn.BatchNorm2d(writes))

    def forward(self, x):
        y = x
        for n in range(1, self.count + 1):
            y = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(y))
            y = self.relu(y) if n < self.count else y
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self, kernels):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 6, bias=False), nn.BatchNorm2d(6)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = of(Block(6, 5, 6, kernels), Block(6, 4, 6, kernels))
        self.layer2 = of(Block(6, 5, 8, kernels, 2), Block(8, 5, 8, kernels))
        self.layer3 = of(Block(8, 7, 9, kernels, 2))
        self.layer4 = of(Block(9, 7, 9, kernels))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(9, 4)

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


@pytest.mark.parametrize("kernels", [(3, 3), (1, 3, 1)], ids=["basic", "bottleneck"])
def test_the_groups_of_torchvisions_resnet_are_those_written_by_hand(kernels):
    model = ResNet(kernels)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    by_hand = spec_of({"model_type": "resnet"}, shapes)
    spec = traced_spec(model, pixels())
    assert layout(spec) == layout(by_hand)
    roles = {layout(Spec((g,))).pop(): g.role for g in by_hand.groups}
    assert {layout(Spec((g,))).pop(): g.role for g in spec.groups} == roles
    assert {"conv1", "layer1.0.conv1"} <= {group.name for group in spec.groups}


@pytest.mark.parametrize("name", ["resnet", "resnet, bottleneck"])
def test_the_groups_of_transformers_resnet_are_those_written_by_hand(name):
    network = TrialNetwork(CONFIGS[name])
    assert layout(traced_spec(network.model, pixels(size=16))) == layout(network.spec)


def test_a_flattened_channel_owns_its_places_in_the_linear_layer():
    head = of(nn.Flatten(), nn.Linear(20, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3))
    pool = nn.MaxPool2d(2)
    model = of(conv(3, 4), nn.ReLU(), pool, conv(4, 5), nn.ReLU(), pool, *head)
    found = places(traced_spec(model, pixels()))
    assert set(found) == {"0", "3", "7"}
    assert found["3"]["7.weight", 1] == torch.arange(20).view(5, 4).tolist()


def test_depthwise_filters_move_with_the_channels_they_see():
    model = of(conv(3, 4), conv(4, 4, groups=4), nn.BatchNorm2d(4), nn.ReLU6(),
               conv(4, 8, groups=4), conv(8, 3, 1))  # fmt: skip
    found = places(traced_spec(model, pixels()))
    assert list(found) == ["0"]
    assert found["0"]["1.weight", 0] == [[0], [1], [2], [3]]
    assert (
        found["0"]["4.weight", 0] == found["0"]["5.weight", 1] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    )


def test_grouped_convolutions_keep_the_order_of_their_channels():
    model = of(conv(3, 4, 1), conv(4, 6, 1), conv(6, 6, groups=2), conv(6, 4, 1), conv(4, 3, 1))
    assert set(places(traced_spec(model, pixels()))) == {"0", "3"}


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = conv(3, 4), conv(4, 3), conv(7, 2)
        self.norm, self.head = nn.BatchNorm2d(9), nn.Linear(9, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x = torch.cat([x, self.first(x).relu()], 1)
        x = torch.cat([x, self.second(x)], 1)
        return self.head(self.norm(x).mean((2, 3)))


def test_concatenated_channels_have_places_on_the_whole_axis():
    found = places(traced_spec(Dense(), pixels()))
    assert set(found) == {"stem", "first", "second"}
    assert found["first"]["second.weight", 1] == [[4], [5], [6]]
    assert found["second"]["head.weight", 1] == found["second"]["norm.bias", 0] == [[7], [8]]


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.deep = conv(3, 4), conv(4, 6)
        self.up, self.head = nn.ConvTranspose2d(6, 5, 2, stride=2), conv(9, 2)

    def forward(self, x):
        skip = F.leaky_relu(self.down(x))
        deep = F.silu(self.deep(F.avg_pool2d(skip, 2)))
        same = F.interpolate(F.interpolate(self.up(deep), scale_factor=0.5), scale_factor=2)
        return self.head(torch.cat([same, skip], dim=-3))


def test_a_skip_that_is_concatenated():
    found = places(traced_spec(UNet(), pixels()))
    assert set(found) == {"down", "deep", "up"}
    assert found["down"]["head.weight", 1] == [[5], [6], [7], [8]]
    assert found["deep"].keys() == {("deep.weight", 0), ("deep.bias", 0), ("up.weight", 0)}
    assert found["up"].keys() == {("up.weight", 1), ("up.bias", 0), ("head.weight", 1)}


def test_a_multilayer_perceptron():
    model = of(nn.Linear(5, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 7), nn.PReLU(7),
               nn.Linear(7, 2))  # fmt: skip
    found = places(traced_spec(model, torch.randn(3, 5)))
    assert {name: list(binds) for name, binds in found.items()} == {
        "0": [("0.weight", 0), ("0.bias", 0), ("2.weight", 0), ("2.bias", 0), ("3.weight", 1)],
        "3": [("3.weight", 0), ("3.bias", 0), ("4.weight", 0), ("5.weight", 1)],
    }


def test_channels_keep_their_order_under_a_norm_of_several_groups():
    def net(norm):
        return of(conv(3, 4), norm, nn.ReLU(), conv(4, 6), nn.ReLU(), conv(6, 2))

    assert set(places(traced_spec(net(nn.GroupNorm(2, 4)), pixels()))) == {"3"}
    assert set(places(traced_spec(net(nn.GroupNorm(1, 4)), pixels()))) == {"0", "3"}


def test_a_bias_that_a_norm_takes_off_moves_along_and_is_inert():
    model = of(conv(3, 4), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), conv(4, 2))
    (group,) = traced_spec(model, pixels()).groups
    assert [bind.params[0] for bind in group.binds if bind.inert] == ["0.bias"]
    assert ("1.weight", 0) in places(Spec((group,)))["0"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.a, self.b, self.out = (
            nn.Linear(*s) for s in ((5, 6), (6, 6), (6, 6), (6, 2))
        )
        self.b.weight = self.a.weight
        self.again = self.a

    def forward(self, x):
        x = self.b(self.a(self.read(x).relu()).relu())
        return self.out(self.again(x.tanh()))


def test_tied_weights_move_under_all_their_names():
    model = Tied()
    spec = traced_spec(model, torch.randn(3, 5))
    (group,) = spec.groups  # a reads what it writes
    bound = places(spec)["read"]
    names = ("a.weight", "b.weight", "again.weight")
    assert {(name, axis) for name in names for axis in (0, 1)} <= bound.keys()
    assert {b.param for b in group.binds if not b.compared} >= {"b.weight", "again.weight"}
    x, state = torch.randn(3, 5), {n: t.clone() for n, t in model.state_dict().items()}
    wanted = model(x)
    model.load_state_dict(apply(spec, state, {"read": torch.randperm(6)}))
    torch.testing.assert_close(model(x), wanted)


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.fc1, self.fc2 = conv(3, 6), conv(6, 2, 1), conv(2, 6, 1)
        self.spatial, self.head = conv(6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        scale = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1))))
        x = x * torch.sigmoid(scale).expand_as(x) * self.spatial(x).sigmoid()
        return self.head(x.flatten(2).mean(-1))


def test_squeeze_and_excite():
    found = places(traced_spec(SqueezeExcite(), pixels()))
    assert {name: {param for param, _ in binds} for name, binds in found.items()} == {
        "stem": {"stem.weight", "stem.bias", "fc1.weight", "fc2.weight", "fc2.bias",
                 "spatial.weight", "head.weight"},
        "fc1": {"fc1.weight", "fc1.bias", "fc2.weight"},
    }  # fmt: skip


class Gated(nn.Module):
    """Half of the units gate the other half, and a slice of them goes on."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.a, self.b = (
            nn.Linear(*s) for s in ((5, 8), (4, 6), (2, 3), (4, 3))
        )

    def forward(self, x):
        gate, value = self.up(x).chunk(2, -1)
        y = self.down(torch.sigmoid(gate) * value)
        return self.a(F.gelu(y[:, :2])) + self.b(F.relu(y[:, 2:]))


def test_units_in_two_halves_and_units_of_one_layer_with_two_readers():
    found = places(traced_spec(Gated(), torch.randn(3, 5)))
    assert found["up"]["up.weight", 0] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert found["down"]["down.weight", 0] == [[0], [1]]
    assert found["down.2"]["down.weight", 0] == [[2], [3], [4], [5]]
    assert found["down.2"]["b.weight", 1] == [[0], [1], [2], [3]]


def test_units_that_one_layer_reads_after_different_functions_are_not_exchanged():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.a(x)
            return self.b(torch.cat([x[:, :4].relu(), x[:, 4:].tanh()], 1))

    found = places(traced_spec(Net(), torch.randn(3, 5)))
    assert found["a"]["a.weight", 0] == [[0], [1], [2], [3]]
    assert found["a.2"]["b.weight", 1] == [[4], [5], [6], [7]]


class Attention(nn.Module):
    """A block of a ViT; `fused` makes queries, keys and values in one layer."""

    def __init__(self, kind):
        super().__init__()
        self.patch, self.kind = nn.Conv2d(3, 12, 4, 4), kind
        self.cls, self.place = (
            nn.Parameter(torch.randn(1, 1, 12)),
            nn.Parameter(torch.randn(1, 5, 12)),
        )
        self.ln1, self.ln2, self.ln3 = (nn.LayerNorm(12) for _ in range(3))
        self.q, self.k, self.v = (
            (nn.Linear(12, 12) for _ in range(3)) if kind == "apart" else 3 * [None]
        )
        self.qkv = nn.Linear(12, 36) if kind == "fused" else None
        self.mha = nn.MultiheadAttention(12, 3, batch_first=True) if kind == "module" else None
        self.out = nn.Linear(12, 12) if kind != "module" else None
        self.fc1, self.fc2, self.head = nn.Linear(12, 7), nn.Linear(7, 12), nn.Linear(12, 4)

    def attend(self, x):
        if self.kind == "module":
            return self.mha(x, x, x, need_weights=False)[0]
        size = *x.shape[:2], 3, 4
        if self.kind == "fused":
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            q, k, v = (f(x).view(size).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(x.shape))

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.place
        x = x + self.attend(self.ln1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.ln2(x))))
        return self.head(self.ln3(x)[:, 0])


@pytest.mark.parametrize("kind", ["apart", "fused", "module"])
def test_attention_heads_move_whole(kind):
    spec = traced_spec(Attention(kind), pixels())
    found = places(spec)
    assert set(found) == {"patch", "fc1", {"apart": "q", "fused": "qkv", "module": "mha"}[kind]}
    heads = next(g for g in spec.groups if g.name not in ("patch", "fc1"))
    out = "mha.out_proj.weight" if kind == "module" else "out.weight"
    assert found[heads.name][out, 1] == torch.arange(12).view(3, 4).tolist()
    assert spec["patch"].role == "residual"
    assert heads.role == "inner"
    inert = {bind.params[0] for bind in heads.binds if bind.inert}
    assert inert == ({"k.bias"} if kind == "apart" else set())


class Unknown(nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 2)
        self.operation = operation

    def forward(self, x):
        return self.c(self.b(self.operation(self.a(x))).relu())


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.cumsum(1),
        lambda x: x.flip(1),
        lambda x: x.sort(1).values,
        lambda x: x[:, [1, 0, 2, 5, 4, 3]],
        lambda x: x * torch.arange(6),
        lambda x: x.view(-1, 2, 3).transpose(1, 2).reshape(x.shape) + x,
        lambda x: torch.fft.rfft(torch.cat([x, x[:, :4]], 1)).abs(),
        lambda x: F.pad(x[:, None], (1, 0), mode="reflect")[:, 0, 1:],
    ],
    ids=["cumsum", "flip", "sort", "index", "positions", "shuffle", "fourier", "reflect"],
)
def test_what_is_not_known_to_treat_units_alike_fixes_them(operation):
    assert set(places(traced_spec(Unknown(operation), torch.randn(3, 5)))) == {"b"}


def test_groups_that_no_output_depends_on_are_left_out():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(5, 6), nn.Linear(4, 2), nn.Linear(6, 4)

        def forward(self, x):
            x = self.a(x).relu()
            self.unused(x)
            return self.b(x[:, :4])

    (group,) = traced_spec(Net(), torch.randn(3, 5)).groups
    assert places(Spec((group,)))["a"]["a.weight", 0] == [[0], [1], [2], [3]]


def test_what_reaches_an_output_is_fixed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 2)

        def forward(self, x):
            hidden = self.a(x)
            return {"hidden": hidden, "out": self.c(self.b(hidden).relu())}

    assert set(places(traced_spec(Net(), torch.randn(3, 5)))) == {"b"}


@pytest.mark.parametrize("make", [lambda: ResNet((3, 3)), Dense, UNet, lambda: Attention("fused")],
                         ids=["resnet", "dense", "unet", "vit"])  # fmt: skip
def test_planted_permutations_are_recovered_on_the_traced_groups(make):
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    spec = traced_spec(model, pixels())
    a = {name: t.clone() for name, t in model.state_dict().items()}
    wanted = model(pixels().double())
    p = random_permutations(spec, torch.Generator().manual_seed(1))
    b = apply(spec, a, p)
    model.load_state_dict(b)
    torch.testing.assert_close(model(pixels().double()), wanted)
    found = weight_matching(spec, a, b).permutations
    assert all(torch.equal(found[name], order) for name, order in inverse(spec, p).items())


def test_no_bind_can_be_left_out():
    torch.manual_seed(0)
    model = Dense().double().eval()
    spec = traced_spec(model, pixels())
    draw = torch.Generator().manual_seed(0)
    state = {
        n: random_tensor(n, tuple(t.shape), t.dtype, draw) for n, t in model.state_dict().items()
    }

    def compute(state):
        model.load_state_dict(state)
        return model(pixels().double())

    assert min(check(spec, state, compute).dropped.values()) > 1e-4
    for group in spec.groups:
        for left in group.binds:
            rest = tuple(bind for bind in group.binds if bind is not left)
            with pytest.raises(MergeError, match=f"permutation group {group.name}: permuting"):
                check(Spec((replace(group, binds=rest),)), state, compute)


def test_the_model_is_left_as_it_is():
    model = of(conv(3, 4), nn.BatchNorm2d(4), conv(4, 2)).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    traced_spec(model, pixels())
    after = model.state_dict()
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in before.items())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_control_flow_that_depends_on_data_is_refused_in_one_line():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(self.a(x)) if x.sum() > 0 else self.a(x)

    with pytest.raises(
        MergeError, match=r"Net cannot be traced on this example.*Spec by hand"
    ) as e:
        traced_spec(Net(), torch.randn(3, 5))
    assert "\n" not in str(e.value)


def test_an_example_that_does_not_fit_is_refused():
    with pytest.raises(MergeError, match=r"Linear cannot be traced on this example.*does not fit"):
        traced_spec(nn.Linear(3, 4), torch.randn(2, 5))


def test_a_network_that_computes_something_else_every_time_is_not_proved():
    model = Unknown(lambda x: x + torch.rand(6, dtype=x.dtype))
    with pytest.raises(
        MergeError, match="Unknown: the permutation groups found by tracing are not"
    ):
        traced_spec(model, torch.randn(3, 5))


def test_the_groups_of_transformers_bert_are_those_written_by_hand():
    """But for those inside a head, which the tracer does not look for."""
    network = TrialNetwork(CONFIGS["bert"])
    outer = Spec(tuple(group for group in network.spec.groups if group.parent is None))
    found = traced_spec(network.model, torch.randint(1, 40, (2, 6)))
    assert layout(found) == layout(outer)
