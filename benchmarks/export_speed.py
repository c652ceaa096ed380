"""How close `evomerge merge` comes to the disk: at least 70% of the slower of its two limits.

Builds base and three sources of a Llama-shaped model (bfloat16, deterministic noise), then reads
all of them from the disk and writes as many bytes as a merge does, with nothing in between: the
limits. Then each merge, with a cold page cache before it. A merge's read rate is the bytes of its
inputs over its whole wall time, its write rate those of its output; the ratio is the larger of
(read rate / read limit) and (write rate / write limit): that of the disk's slower side. If both
sides share one device, the two also compete: `sum` is the time that reading and then writing at
the limits would take, over the merge's. Everything is removed afterwards.

    python benchmarks/export_speed.py [--parameters 1.1e9] [--directory DIR]
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evomerge.checkpoints.writer import Entry, header

TARGET = 0.70
CHUNK = 4 << 20
NAMES = ("base", "s1", "s2", "s3")
METHODS = {"linear": "", "ties": ", density: 0.5"}


@dataclass(frozen=True)
class Run:
    """One merge: wall and CPU seconds, peak resident and peak anonymous bytes."""

    wall_s: float
    cpu_s: float
    resident: int
    anonymous: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=1.1e9)
    parser.add_argument("--directory", type=Path, help="on the disk to measure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        folder = Path(scratch)
        model_bytes = build(folder, int(options.parameters))
        read, write = read_limit(folder), write_limit(folder, model_bytes)
        print(f"model {model_bytes / 1e9:.2f} GB, base + 3 sources, on {folder.parent}")
        print(f"disk alone: read {read / 1e9:.2f} GB/s, write {write / 1e9:.2f} GB/s")
        met = [report(folder, method, model_bytes, read, write) for method in METHODS]
    return 0 if all(met) else 1


def report(folder: Path, method: str, model_bytes: int, read: float, write: float) -> bool:
    """Merge once and print a line; whether the target is met."""
    run = merge(folder, method)
    inputs = len(NAMES) * model_bytes if method == "ties" else (len(NAMES) - 1) * model_bytes
    times = {"read": inputs / read, "write": model_bytes / write}
    slower = max(times, key=lambda side: times[side])
    ratio = times[slower] / run.wall_s
    print(
        f"{method:8} {run.wall_s:6.2f} s: read {inputs / run.wall_s / 1e9:.2f} GB/s, write"
        f" {model_bytes / run.wall_s / 1e9:.2f} GB/s; limit is {slower}, ratio {ratio:.2f},"
        f" sum {sum(times.values()) / run.wall_s:.2f}; CPU {run.cpu_s:.2f} s, peak"
        f" {run.resident / 1e6:.0f} MB, anonymous {run.anonymous / 1e6:.0f} MB:"
        f" {'met' if ratio >= TARGET else 'MISSED'}",
        flush=True,
    )
    return ratio >= TARGET


def build(folder: Path, parameters: int) -> int:
    """Four checkpoints of about that many parameters and their recipes; the bytes of one."""
    shapes = llama_shapes(parameters)
    for seed, name in enumerate(NAMES):
        write_checkpoint(folder / name, shapes, seed)
    for method, density in METHODS.items():
        sources = "".join(f"  {n}: {{path: {n}, weight: 0.4{density}}}\n" for n in NAMES[1:])
        base = "base: base\n" if method == "ties" else ""
        (folder / f"{method}.yaml").write_text(f"method: {method}\n{base}sources:\n{sources}")
    return (folder / "base" / "model.safetensors").stat().st_size


def llama_shapes(parameters: int) -> dict[str, tuple[int, ...]]:
    """Layers of width 2048 (1024 below half a billion parameters), as many as are wanted."""
    width = 2048 if parameters >= 5e8 else 1024
    inner, vocabulary, head = width * 11 // 4, 32_000, (width, width)
    layer = {
        **{f"self_attn.{name}_proj.weight": head for name in "qkvo"},
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    size = sum(int(np.prod(shape)) for shape in layer.values())
    layers = max(1, round((parameters - 2 * vocabulary * width) / size))
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()
    }
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, width))
    return {**shapes, "model.norm.weight": (width,)}


def write_checkpoint(folder: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """Noise of standard deviation about 0.02 in bfloat16; that of the sources is close to base."""
    import torch

    folder.mkdir()
    width, layers = (
        shapes["model.norm.weight"][0],
        1 + max(int(n.split(".")[2]) for n in shapes if ".layers." in n),
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": 32_000,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    entries = [Entry(name, torch.bfloat16, shape) for name, shape in sorted(shapes.items())]
    common, own = (torch.Generator().manual_seed(n) for n in (1000, seed))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header(entries))
        for entry in entries:
            for count in _pieces(entry.nbytes // 2, CHUNK // 2):
                noise = torch.randn(count, generator=common).mul_(0.02)
                if seed:
                    noise += torch.randn(count, generator=own).mul_(0.002)
                file.write(noise.bfloat16().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _pieces(total: int, most: int) -> Iterator[int]:
    for start in range(0, total, most):
        yield min(most, total - start)


def forget(folder: Path) -> None:
    """Drop the checkpoints from the page cache."""
    for name in NAMES:
        handle = os.open(folder / name / "model.safetensors", os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_limit(folder: Path) -> float:
    """Bytes per second of reading all checkpoints in sequence, cold; the better of two passes."""
    best = 0.0
    buffer = bytearray(CHUNK)
    for _ in range(2):
        forget(folder)
        start, total = time.perf_counter(), 0
        for name in NAMES:
            with (folder / name / "model.safetensors").open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                while count := file.readinto(buffer):
                    total += count
        best = max(best, total / (time.perf_counter() - start))
    return best


def write_limit(folder: Path, size: int) -> float:
    """Bytes per second of writing `size` bytes, until they are on the disk: the better of writing
    past the page cache and through it."""
    buffer = mmap.mmap(-1, CHUNK)  # aligned to a page, as direct writing needs it
    buffer.write(np.random.default_rng(0).bytes(CHUNK))
    rates = []
    for flag in (os.O_DIRECT, 0):
        path = folder / "limit.bin"
        start = time.perf_counter()
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flag)
            try:
                for _ in range(-(-size // CHUNK)):
                    os.write(handle, buffer)
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError:  # a file system without direct writing
            continue
        rates.append(-(-size // CHUNK) * CHUNK / (time.perf_counter() - start))
        path.unlink()
    return max(rates)


def merge(folder: Path, method: str) -> Run:
    """`evomerge merge` as a user runs it, from a cold page cache."""
    forget(folder)
    out = folder / f"out-{method}"
    command = [sys.executable, "-m", "evomerge.cli.main", "merge", f"{method}.yaml", out.name]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    peak, done = [0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, done))
    watcher.start()
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    done.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"{method}: {said.decode()[-2000:]}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, peak[0])


def _watch(pid: int, peak: list[int], done: threading.Event) -> None:
    """The most anonymous memory of a process, every 10 ms."""
    while not done.wait(0.01):
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        found = next((line.split()[1] for line in lines if line.startswith("RssAnon:")), "0")
        peak[0] = max(peak[0], int(found) * 1024)


if __name__ == "__main__":
    sys.exit(main())
