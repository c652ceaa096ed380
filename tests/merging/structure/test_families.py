"""Every family's permutation specification, on a tiny network: none missing, none idle."""

from __future__ import annotations

import pytest
import torch
from structure_configs import CONFIGS, FULL_SIZE
from torch import nn

from evomerge.merging.structure.architectures.families import FAMILIES, spec_of
from evomerge.merging.structure.architectures.trial_network import prove
from evomerge.merging.structure.permutations.check import check


def test_every_family_is_tried():
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_permuting_preserves_the_function_and_every_bind_is_needed(name):
    report = prove(CONFIGS[name])
    assert report.preserved <= 1e-6
    assert len(report.dropped) > 10


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_config_of_full_size_is_cut_to_be_tried(name):
    assert prove(FULL_SIZE[name]).preserved <= 1e-6


class Bottleneck(nn.Module):
    """A block of torchvision's ResNet, by its names."""

    def __init__(self, reads, inner, writes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(reads, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, writes, 1, bias=False), nn.BatchNorm2d(writes)
        shortcut = (nn.Conv2d(reads, writes, 1, bias=False), nn.BatchNorm2d(writes))
        self.downsample = nn.Sequential(*shortcut) if reads != writes else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return (self.bn3(self.conv3(y)) + self.downsample(x)).relu()


class TorchvisionResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.layer1 = nn.Sequential(Bottleneck(6, 4, 8), Bottleneck(8, 4, 8))
        self.layer2 = nn.Sequential(Bottleneck(8, 5, 12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        y = self.layer2(self.layer1(self.bn1(self.conv1(x)).relu()))
        return self.fc(y.mean((2, 3)))


def test_resnet_by_torchvisions_names():
    torch.manual_seed(0)
    model = TorchvisionResNet().double().eval()
    state = {
        name: torch.rand_like(t) + 0.5 if t.dim() == 1 else t.clone()
        for name, t in model.state_dict().items()
    }
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    pixels = torch.randn(2, 3, 6, 6, dtype=torch.float64)

    def compute(state):
        model.load_state_dict(state)
        return model(pixels)

    report = check(spec_of({"model_type": "resnet"}, shapes), state, compute)
    assert report.preserved <= 1e-14
    assert min(report.dropped.values()) > 1e-4
