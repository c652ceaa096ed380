"""Small networks for scikit-learn's digits in two domains: what `pleas.py` merges.

Domain A are the digits as they are, domain B inverted and turned by 90 degrees; labels are the
same. Every seed has a split of its own into disjoint parts: what the parents were trained on, of
which calibration data are taken, what a search chooses on, and what is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

TRAIN, SELECTION = 1000, 297  # the other 500 are reported on


@dataclass(frozen=True)
class Part:
    """Images [n, 1, 8, 8] in domain A and, the same ones, in domain B; labels [n]."""

    a: Tensor
    b: Tensor
    labels: Tensor

    def first(self, count: int) -> Part:
        return Part(self.a[:count], self.b[:count], self.labels[:count])

    @property
    def both(self) -> Tensor:
        """The images of both domains, by turns."""
        return torch.stack([self.a, self.b], 1).flatten(0, 1)


def parts(seed: int) -> dict[str, Part]:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    plain = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(digits.target)[order]
    other = torch.rot90(1 - plain, 1, (2, 3))
    cuts = {"train": (0, TRAIN), "selection": (TRAIN, TRAIN + SELECTION)}
    cuts["report"] = (TRAIN + SELECTION, len(order))
    return {
        name: Part(plain[i:j] - 0.5, other[i:j] - 0.5, labels[i:j]) for name, (i, j) in cuts.items()
    }


class Block(nn.Module):
    """Two convolutions with batch norms, and a way past them."""

    def __init__(self, reads: int, writes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(reads, writes, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(writes)
        self.conv2 = nn.Conv2d(writes, writes, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(writes)
        self.shortcut: nn.Module = nn.Identity()
        if reads != writes:
            past = nn.Conv2d(reads, writes, 1, stride, bias=False)
            self.shortcut = nn.Sequential(past, nn.BatchNorm2d(writes))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        found: Tensor = (y + self.shortcut(x)).relu()
        return found


class ResNet(nn.Module):
    """Four residual blocks, of 8 to 32 channels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        widths = [(width, width), (width, 2 * width), (2 * width, 2 * width)]
        widths.append((2 * width, 4 * width))
        self.blocks = nn.Sequential(*(Block(i, o, 1 + (i != o)) for i, o in widths))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.norm(self.stem(x)).relu())
        found: Tensor = self.head(x.mean((2, 3)))
        return found


class Layer(nn.Module):
    """Attention and an MLP, each behind a norm; takes any number of heads of its width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        found: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return found


class ViT(nn.Module):
    """Three layers of width 32 with 4 heads on 16 patches of 2 x 2 pixels."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        found: Tensor = self.head(self.norm(self.layers(x)).mean(1))
        return found


NETWORKS: Mapping[str, type[nn.Module]] = {"ResNet": ResNet, "ViT": ViT}
EPOCHS = {"ResNet": 25, "ViT": 40}


def parents(kind: str, seed: int, folder: Path, epochs: int | None = None) -> list[nn.Module]:
    """Networks a and b of a seed, each of a random start of its own; trained once."""
    found = []
    for number, domain in enumerate("ab"):
        torch.manual_seed(1000 * seed + number)
        model = NETWORKS[kind]()
        path = folder / f"{kind}-{seed}-{domain}.pt"
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        else:
            part = parts(seed)["train"]
            train(model, getattr(part, domain), part.labels, epochs or EPOCHS[kind])
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path)
        found.append(model.eval())
    return found


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """AdamW with a cosine schedule, batches of 50."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    steps = epochs * -(-len(images) // 50)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(50):
            loss = functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """In percent, the mean of both domains."""
    right = [(model(x).argmax(1) == part.labels).double().mean() for x in (part.a, part.b)]
    return 50 * float(right[0] + right[1])
