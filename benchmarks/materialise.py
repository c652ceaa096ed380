"""What a candidate costs in memory, beside the time to read its inputs and write it once.

    python benchmarks/materialise.py [--parameters 134] [--rounds 5]

Llama shapes in bfloat16, a base and four sources, every coefficient new in every round. The bound
streams the inputs of the same merge once and writes the output once in the best loop we know. Bound
and candidates alternate; CPU time of one thread, the least over the rounds (a shared machine only
adds), in ns per parameter and as a multiple of the bound. Prints the targets beside them.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from functools import cache, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.merging.compute import Operands, merge_tensor
from evomerge.merging.kernels.facts import Memory
from evomerge.merging.kernels.formats import integers, width
from evomerge.merging.kernels.machine import Kernel, Value
from evomerge.merging.kernels.walking import AHEAD
from evomerge.merging.methods.base import Coefficients
from evomerge.merging.methods.registry import METHODS

TARGETS = {
    "linear": 1.4,
    "task_arithmetic": 1.4,
    "ties": 1.6,
    "dare_ties": 2.4,
    "slerp": 1.5,
    "dare_linear": None,
}
SOURCES = 4
Shapes = dict[str, tuple[int, ...]]


def shapes(millions: int) -> tuple[int, Shapes]:
    """Tensors of a Llama of about so many million parameters, and its number of layers."""
    layers, hidden, inner, words = 12, 768, 2048, 32000
    found: Shapes = {
        "model.embed_tokens.weight": (words, hidden),
        "lm_head.weight": (words, hidden),
    }
    per_layer = 4 * hidden * hidden + 3 * hidden * inner
    layers = max(1, round((millions * 1e6 - 2 * words * hidden) / per_layer))
    for layer in range(layers):
        name = f"model.layers.{layer}."
        for part in ("q", "k", "v", "o"):
            found[f"{name}self_attn.{part}_proj.weight"] = (hidden, hidden)
        for part in ("gate", "up", "down"):
            found[f"{name}mlp.{part}_proj.weight"] = (inner, hidden)
        for part in ("input", "post_attention"):
            found[f"{name}{part}_layernorm.weight"] = (hidden,)
    return layers, found


class Models:
    """A base and its fine-tunes in memory, and a place for the candidate."""

    def __init__(self, found: Shapes) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shapes = found
        self.base: dict[str, Tensor] = {}
        self.sources: list[dict[str, Tensor]] = [{} for _ in range(SOURCES)]
        self.out: dict[str, Tensor] = {}
        for name, shape in found.items():
            base = torch.randn(int(np.prod(shape)), generator=generator) * 0.02
            self.base[name] = base.bfloat16()
            for source in self.sources:
                tau = torch.randn(len(base), generator=generator) * 1e-3
                source[name] = (base + tau).bfloat16()
            self.out[name] = torch.zeros(len(base), dtype=torch.bfloat16)
        self.size = sum(len(out) for out in self.out.values())
        self.store: Memory | None = Memory()

    def write(self, method: str, chance: random.Random, names: list[str] | None = None) -> None:
        """One candidate, its coefficients new."""
        used = METHODS[method]
        count = used.max_sources or SOURCES
        known = _genome(method, count, chance)
        for name in names or self.shapes:
            coefficients = Coefficients(name, self.shapes[name], *known)
            wanted = used.needs_base or used.takes_base
            operands = Operands(
                self.base[name] if wanted else None,
                tuple(source[name] for source in self.sources[:count]),
                self.store,
                f"base {name}",
                tuple(f"{source} {name}" for source in coefficients.names),
            )
            merge_tensor(used, coefficients, operands, None, self.out[name])

    def stream(self, method: str) -> None:
        """What the bound does: the inputs of the method once, the output once."""
        used = METHODS[method]
        for name, out in self.out.items():
            read = [source[name] for source in self.sources[: used.max_sources or SOURCES]]
            if used.needs_base:
                read.append(self.base[name])
            addresses = np.array([tensor.data_ptr() for tensor in (*read, out)])
            whole = len(out) // width() * width()
            _stream(len(read))(addresses.ctypes.data, 0, whole)


def _genome(method: str, count: int, chance: random.Random) -> tuple[Any, ...]:
    names = tuple("abcd"[:count])
    source: dict[str, tuple[Any, ...]] = {}
    recipe: dict[str, Any] = {}
    for parameter in METHODS[method].parameters:
        if parameter.scope == "recipe":
            recipe[parameter.name] = parameter.default
        else:
            source[parameter.name] = tuple(chance.uniform(0.1, 0.9) for _ in names)
    if "t" in recipe:
        recipe["t"] = chance.uniform(0.1, 0.9)
    return names, tuple(range(count)), source, recipe, chance.getrandbits(30)


class _Stream(Kernel):
    """out = x₁ ^ x₂ ^ ..., a line of the cache at a time, fetched as far ahead as kernels do."""

    def __init__(self, count: int) -> None:
        super().__init__()
        sources, out = [self.address(i) for i in range(count)], self.address(count)
        with self.loop(self.begin, self.end, width()) as index:
            for source in sources:
                self.prefetch(source, index + AHEAD, 2)
            words = [self.load(integers(), source, index << 1) for source in sources]
            self.store(reduce(Value.__xor__, words), out, index << 1)
        self.give(self.end)


@cache
def _stream(count: int) -> Callable[[int, int, int], int]:
    return _Stream(count).compiled()


def timed(work: Callable[[], object]) -> float:
    """CPU seconds."""
    began = time.process_time()
    work()
    return time.process_time() - began


def compared(models: Models, rounds: int) -> Iterator[str]:
    chance = random.Random(0)
    for method, target in TARGETS.items():
        bounds, costs = [], []
        first = timed(lambda: models.write(method, chance))  # noqa: B023
        models.stream(method)
        for _ in range(rounds):
            bounds.append(timed(lambda: models.stream(method)))  # noqa: B023
            costs.append(timed(lambda: models.write(method, chance)))  # noqa: B023
        bound, cost = min(bounds), min(costs)
        yield (
            f"{method:16} {bound / models.size * 1e9:8.3f} {cost / models.size * 1e9:9.3f}"
            f" {cost / bound:7.2f}  {target or '-':>6}  {(first - cost) / cost:9.1f}"
        )


def partial(models: Models, layers: int) -> Iterator[str]:
    chance = random.Random(1)
    whole = min(timed(lambda: models.write("ties", chance)) for _ in range(3))
    for share in (0.25, 0.5):
        changed = [f"model.layers.{layer}." for layer in range(round(layers * share))]
        names = [name for name in models.shapes if name.startswith(tuple(changed))]
        cost = min(timed(lambda: models.write("ties", chance, names)) for _ in range(3))  # noqa: B023
        yield f"{share:.0%} of the layers changed: {cost / whole:.0%} of a full write"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=int, default=134, help="in millions")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    layers, found = shapes(chosen.parameters)
    models = Models(found)
    warm = Models({"w": (1024,)})
    for method in TARGETS:
        warm.stream(method)
        warm.write(method, random.Random(0))
    print(f"{models.size / 1e6:.0f}M parameters, base + {SOURCES} sources, bfloat16")
    print(
        f"{'method':16} {'bound':>8} {'candidate':>9} {'ratio':>7}  {'target':>6}  {'first: +':>9}"
    )
    print(f"{'':16} {'ns/param':>8} {'ns/param':>9}")
    for line in compared(models, chosen.rounds):
        print(line, flush=True)
    print("first: +   what tables add to the first candidate, in candidates")
    for line in partial(models, layers):
        print(line, flush=True)


if __name__ == "__main__":
    main()
