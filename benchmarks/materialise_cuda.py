"""The CUDA kernels against a device copy that moves the same bytes: the target is within 1.3.

One bfloat16 tensor, base and four sources in the device's memory, every number of the program new.
`bytes` is what the merge reads and writes; the copy reads half of that and writes half. Kernel and
copy take turns and are timed by the device's own events; the figure is the ratio of the medians.
The last line merges from pinned host memory, against a copy of those bytes over the bus.

    python benchmarks/materialise_cuda.py [--elements 67108864] [--repeats 30]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from evomerge.merging.kernels import cuda
from evomerge.merging.kernels.program import Draw, Election, Program, Row
from evomerge.merging.kernels.streaming import stream
from evomerge.merging.methods.masks import mask_key
from evomerge.merging.methods.selection import Cut

TARGET = 1.3
WEIGHTS = (0.4, 0.3, 0.2, 0.35)
SPREAD = 0.01
"""Of the task vectors, whose entries are normal."""


def programs(size: int) -> dict[str, Program]:
    """One program per method, as a candidate with new weights, densities and masks has."""
    vote = Election(tie=1, aggregate="mean", normalize=True, scale=0.9)
    # about the share 0.3 of normal entries lies above
    threshold = int(torch.tensor(1.04 * SPREAD).view(torch.int32))
    cut = Cut(threshold, size // 2)
    keys = [mask_key(0, str(source), "weight") for source in range(len(WEIGHTS))]
    plain = tuple(Row(source, weight) for source, weight in enumerate(WEIGHTS))
    trimmed = tuple(Row(source, weight, weight, cut=cut) for source, weight in enumerate(WEIGHTS))
    drawn = tuple(
        Row(source, weight / 0.3, weight, draw=Draw(keys[source], round(0.7 * 2**32)))
        for source, weight in enumerate(WEIGHTS)
    )
    return {
        "linear": Program(plain, "zero"),
        "task_arithmetic": Program(plain, "base"),
        "slerp": Program((Row(0, 0.6), Row(1, 0.4)), "zero"),
        "ties": Program(trimmed, "base", vote),
        "dare_ties": Program(drawn, "base", vote),
    }


def operands(size: int) -> tuple[Tensor, list[Tensor]]:
    """A base and the sources, on the device."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(size, generator=generator, device="cuda")

    base = normal().mul_(0.05)
    sources = [(base + SPREAD * normal()).bfloat16() for _ in WEIGHTS]
    return base.bfloat16(), sources


def medians(first: Callable[[], object], second: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of either on the device, taking turns."""
    times: list[list[float]] = [[], []]
    for turn in range(repeats + 3):
        for work, found in zip((first, second), times, strict=True):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            work()
            after.record()
            after.synchronize()
            if turn >= 3:
                found.append(before.elapsed_time(after))
    return [statistics.median(found) for found in times]


def copying(moved: int, source_device: str) -> Callable[[], object]:
    """A copy to the device that moves so many bytes, counting both sides within the device."""
    size = moved // 2 if source_device == "cuda" else moved
    pinned = source_device == "cpu"
    source = torch.empty(size, dtype=torch.uint8, device=source_device, pin_memory=pinned)
    there = torch.empty(size, dtype=torch.uint8, device="cuda")
    return lambda: there.copy_(source, non_blocking=True)


def line(name: str, moved: int, merge: float, copy: float) -> None:
    rate = moved / merge / 1e9
    verdict = "met" if merge <= TARGET * copy else "MISSED"
    print(
        f"{name:26}{moved / 1e9:6.2f} GB {merge:8.3f} ms {rate:6.2f} TB/s   copy {copy:8.3f} ms"
        f"   ratio {merge / copy:.2f}  {verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="CUDA kernels against a device copy")
    parser.add_argument("--elements", type=int, default=1 << 26)
    parser.add_argument("--repeats", type=int, default=30)
    chosen = parser.parse_args()
    if not cuda.available():
        print("materialise_cuda: needs a CUDA device and Triton; there is none here")
        return
    base, sources = operands(chosen.elements)
    out, flag = torch.empty_like(base), cuda.new_flag(base)
    print(f"{torch.cuda.get_device_name()}, {chosen.elements} elements, bfloat16, target {TARGET}")
    for name, program in programs(chosen.elements).items():
        moved = base.nbytes * (len(program.rows) + (program.origin == "base") + 1)

        def merge(program: Program = program) -> None:
            cuda.enqueue(program, base, sources, out, flag)

        line(name, moved, *medians(merge, copying(moved, "cuda"), chosen.repeats))
    hosts = [source.cpu().pin_memory() for source in sources]
    program = programs(chosen.elements)["task_arithmetic"]
    moved = sum(host.nbytes for host in hosts)

    def streamed() -> None:
        stream(program, base, hosts, out)

    line("task_arithmetic, streamed", moved, *medians(streamed, copying(moved, "cpu"), 5))
    assert not flag.any()


if __name__ == "__main__":
    main()
