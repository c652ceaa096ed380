"""How much private memory a worker needs, in copies of the model: the target is under 1.3.

Two workers at once, each with a live bfloat16 Llama (built on the spot) and four mapped sources,
materialise several recipes; no forward pass, so no activations. What the interpreter and the
libraries hold before the model is loaded is shown apart. `peak` is the most anonymous memory seen
every 5 ms, temporary blocks included; `USS` is what the process would free by exiting, read while
both workers rest.

    python benchmarks/worker_memory.py [--hidden 768] [--layers 12] [--sources 4]
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TARGET = 1.3
METHODS = ("linear", "task_arithmetic", "ties", "dare_ties")


def build(folder: Path, sources: int, hidden: int, layers: int) -> int:
    """Random checkpoints `base`, `s1`, ...; returns the bytes of one."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    for seed, name in enumerate(_names(sources)):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).bfloat16()
        model.save_pretrained(folder / name, max_shard_size="100MB")
        tokenizer.save_pretrained(folder / name)
    return sum(parameter.nbytes for parameter in model.parameters())


def work(folder: Path, sources: int, barrier: Any, answers: Any) -> None:
    """One worker: its memory before the model is loaded, and after each step."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401 - libraries come first

    from evomerge.checkpoints import Checkpoint
    from evomerge.merging.materialise import Materialiser, load_model
    from evomerge.merging.methods import registry
    from evomerge.merging.recipe import ModelRef, Recipe, Source

    torch.set_num_threads(1)
    base, *paths = [str(folder / name) for name in _names(sources)]
    rows = [("libraries", anonymous(), *_at_rest(barrier))]

    with _peak() as peak:
        checkpoints = {path: Checkpoint.open(path) for path in (base, *paths)}
        model, _ = load_model(checkpoints[base])
        materialiser = Materialiser(model, checkpoints)
    rows.append(("loaded", peak[0], *_at_rest(barrier)))
    for method in filter(registry.METHODS.__contains__, METHODS):
        own = {} if method == "linear" else {"weight": 0.3}
        merged = tuple(Source(Path(path).name, ModelRef(path), own) for path in paths)
        with _peak() as peak:
            materialiser.write(Recipe(method, ModelRef(base), merged))
        rows.append((method, peak[0], *_at_rest(barrier)))
    answers.put(rows)


def anonymous() -> int:
    """Bytes of this process that no file backs: all that it cannot share."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return next(int(x.split()[1]) * 1024 for x in text.splitlines() if x.startswith("Anonymous:"))


def _names(sources: int) -> list[str]:
    return ["base", *(f"s{index}" for index in range(1, sources + 1))]


def _at_rest(barrier: Any) -> tuple[int, int]:
    """USS and PSS while the other worker maps the same pages and waits, too."""
    import psutil

    barrier.wait()
    info = psutil.Process().memory_full_info()
    barrier.wait()
    return info.uss, info.pss


@contextmanager
def _peak() -> Iterator[list[int]]:
    """The most anonymous memory while the block runs, in the list's one place."""
    highest, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            highest[0] = max(highest[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield highest
    finally:
        done.set()
        watcher.join()
        highest[0] = max(highest[0], anonymous())


def main() -> int:
    """Print the table; the exit status says whether the target was met."""
    parser = argparse.ArgumentParser(description="Private memory of a worker in model copies.")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--sources", type=int, default=4)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        shape = (Path(name), options.sources, options.hidden, options.layers)
        with context.Pool(1) as pool:
            model_bytes = pool.apply(build, shape)
        barrier, answers = context.Barrier(2, timeout=600), context.Queue()
        workers = [
            context.Process(target=work, args=(Path(name), options.sources, barrier, answers))
            for _ in range(2)
        ]
        for worker in workers:
            worker.start()
        tables = [answers.get(timeout=600) for _ in workers]
        for worker in workers:
            worker.join()
    return report(tables, model_bytes, options.sources)


def report(tables: list[list[tuple[str, int, int, int]]], model_bytes: int, sources: int) -> int:
    """Print each worker's memory above its libraries', in copies of the model."""
    print(f"model {model_bytes / 1e6:.0f} MB in bfloat16, base and {sources} sources, two workers")
    worst = 0.0
    for number, (start, *steps) in enumerate(tables, 1):
        megabytes = ", ".join(
            f"{kind} {size / 1e6:.0f} MB"
            for kind, size in zip(("anonymous", "USS", "PSS"), start[1:], strict=True)
        )
        print(f"worker {number}: libraries alone {megabytes}; above that, in model copies:")
        print(f"  {'step':<18}{'peak':>7}{'USS':>7}{'PSS':>7}")
        for name, *sizes in steps:
            copies = [(s - z) / model_bytes for s, z in zip(sizes, start[1:], strict=True)]
            print(f"  {name:<18}" + "".join(f"{value:7.2f}" for value in copies))
            worst = max(worst, *copies[:2])
    met = worst < TARGET
    print(
        f"most private memory {worst:.2f} copies, target < {TARGET}: {'met' if met else 'MISSED'}"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
