"""The peak memory of a DAM fit, in copies of the model: the bound is N + 2, and activations.

A float32 Llama and N = 3 fine-tunes of it (built on the spot), two steps, each fit in its own
process. Anonymous memory is what it alone has to hold: the network, a gradient, activations.
Mapped memory is pages of the sources' files, which the system takes back when it needs them. Both
are the most seen every 5 ms, less what interpreter and libraries held before, at the moment when
their sum is largest. Activations are the bytes that autograd saves in one forward pass beside the
weights, and four times the logits (their gradient, softmax and the loss's own).

Around a base its tensors are mapped beside the sources': N + 1 mapped copies and the network are
N + 2 already, so that fit is shown, and not held against the bound.

    python benchmarks/dam_memory.py [--hidden 768] [--layers 12] [--sources 3] [--tokens 48]
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

CASES: dict[str, dict[str, Any]] = {
    "live teacher": {},
    "cached teacher": {"teacher": "cached"},
    "checkpointing": {"checkpointing": True},
    "by tensor": {"granularity": "tensor"},
    "around a base": {"anchor": "base"},
}
HELD = tuple(name for name in CASES if name != "around a base")


def build(folder: Path, sources: int, hidden: int, layers: int) -> int:
    """Random checkpoints `base`, `s1`, ...; returns the bytes of one."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    model = LlamaForCausalLM(config)
    for number in range(sources + 1):
        model.save_pretrained(folder / _name(number))
        tokenizer.save_pretrained(folder / _name(number))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    return sum(parameter.nbytes for parameter in model.parameters())


def work(folder: Path, sources: int, tokens: int, settings: dict[str, Any], answers: Any) -> None:
    """One fit: its peak (anonymous, mapped), and the activations of a forward pass."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401 - libraries come first

    from evomerge.checkpoints.adapted import open_model
    from evomerge.merging.fitted.base import Problem, fit
    from evomerge.merging.fitted.calibration import Calibration, Example
    from evomerge.merging.fitted.dam import DamFit, DamSettings

    torch.set_num_threads(1)
    names = [_name(number) for number in range(1, sources + 1)]
    models = {name: open_model(str(folder / name)) for name in ("base", *names)}
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 32_000, (sources, 2, tokens), generator=generator).tolist()
    data = {n: tuple(Example(tuple(r)) for r in pair) for n, pair in zip(names, rows, strict=True)}
    problem = Problem(
        models["base"],
        {name: models[name] for name in names},
        {model.path: "" for model in models.values()},
        Calibration(data, {}),
    )
    given = DamSettings(
        steps=2, batch_size=1, train=("linears", "embeddings", "norms", "biases"), **settings
    )
    with tempfile.TemporaryDirectory() as out, _peak() as peak:
        fit(DamFit(), problem, given, Path(out) / "artifact")
    answers.put((*peak, _activations(problem, bool(given.checkpointing))))


def _activations(problem: Any, checkpointing: bool) -> int:
    """Bytes that autograd saves in a forward pass, each storage once, the weights left out."""
    import torch

    from evomerge.merging.fitted.calibration import batch
    from evomerge.merging.fitted.network import Network

    network = Network(problem.anchor, checkpointing=checkpointing)
    weights = {p.untyped_storage().data_ptr() for p in network.model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = batch(next(iter(problem.calibration.examples.values()))[:1])
    with (
        network.gradients(lambda name, gradient: None),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        logits = network.logits(rows)
    return sum(saved.values()) + 4 * logits.nbytes


@contextmanager
def _peak() -> Iterator[list[int]]:
    """The anonymous and the mapped bytes above those at the start, when their sum is largest."""
    before = _resident()
    found = [0, 0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            now = [a - b for a, b in zip(_resident(), before, strict=True)]
            if sum(now) > sum(found):
                found[:] = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def _resident() -> tuple[int, int]:
    """Anonymous and file-backed resident bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    known = {key: value for key, _, value in (line.partition(":") for line in lines)}
    kilobytes = (int(known[key].split()[0]) for key in ("RssAnon", "RssFile"))
    anonymous, mapped = (1024 * number for number in kilobytes)
    return anonymous, mapped


def _name(number: int) -> str:
    return f"s{number}" if number else "base"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--sources", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    bound, missed = arguments.sources + 2, []
    with tempfile.TemporaryDirectory() as root:
        size = build(Path(root), arguments.sources, arguments.hidden, arguments.layers)
        print(f"{size / 1e6:,.0f} MB a copy, N = {arguments.sources}; in copies of the model")
        print(f"{'':16} anonymous  mapped   peak  bound {bound} + activations")
        for case, settings in CASES.items():
            answers = spawn.SimpleQueue()
            given = (Path(root), arguments.sources, arguments.tokens, settings, answers)
            process = spawn.Process(target=work, args=given)
            process.start()
            process.join()
            if process.exitcode:
                return 1
            anonymous, mapped, activations = (n / size for n in answers.get())
            total, limit = anonymous + mapped, bound + activations
            missed += [case] if case in HELD and total > limit else []
            print(
                f"{case:16} {anonymous:9.2f} {mapped:7.2f} {total:6.2f}  {limit:.2f}"
                f" ({bound} + {activations:.2f})",
                flush=True,
            )
    if missed:
        print(f"above the bound: {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
