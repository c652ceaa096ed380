"""The same mergekit files through mergekit and through evomerge: numbers, time and memory.

    python benchmarks/against_mergekit.py MERGEKIT_YAML                          # numbers
    python benchmarks/against_mergekit.py MERGEKIT_YAML --cost 1.1B [--method ties]

MERGEKIT_YAML is the command of mergekit 0.1.5 in an environment of its own:

    python3 -m venv ENV
    ENV/bin/pip install torch==2.13.0
    ENV/bin/pip install torch==2.13.0 mergekit==0.1.5

Numbers: merges small random Llamas in float32 with both and prints, for each file, the share of
entries that lie more than one unit in the last place apart: of the float32 results, and of the same
rounded to bfloat16 (`out_dtype: bfloat16`) with the largest distance there. The target: at most
0.1%. Where two terms cancel, an entry's unit is far smaller than the rounding errors of its terms.

Cost: CPU and wall seconds and peak memory of `mergekit-yaml` and `evomerge merge`, one thread each,
on a base and three sources (slerp: one) in bfloat16, made on the spot: a Llama of the size asked
for, weights of deviation 0.02 and noise of 0.002 on them. `net` leaves out the CPU time of a merge
of tiny models. Anonymous memory leaves out pages of files, which the kernel takes back when it
needs them; both are looked at every 50 ms. With `--dtype float32` mergekit computes in float32, as
we always do, and the share of entries of the bfloat16 results beyond one unit in the last place is
printed; dare_ties draws other masks. The 1.1B models take 13 GB of disk, mergekit up to 12 GB of
memory.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from process_tree import measure
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from evomerge.merging.export import export
from evomerge.merging.methods.registry import METHODS
from evomerge.merging.recipe_file import load_recipe

SHARE_BEYOND = 1e-3
LAYERS = 5
STACK = """
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [0, 2], parameters: {weight: [0.1, 0.3]}}
      - {model: b, layer_range: [0, 2], parameters: {weight: 0.4}}
  - sources:
      - {model: base, layer_range: [2, 3]}
      - {model: a, layer_range: [2, 3], parameters: {weight: [0.5, 0.9]}}
      - {model: b, layer_range: [2, 3]}
    parameters: {weight: [{filter: mlp, value: 0.2}, {value: 0.7}]}
  - sources:
      - {model: base, layer_range: [3, 5]}
      - {model: a, layer_range: [3, 5], parameters: {weight: 0.6}}
      - {model: b, layer_range: [3, 5], parameters: {weight: [0.8, 0.4]}}
"""
WEIGHTED = "models: [{model: a, parameters: {weight: 0.6}}, {model: b, parameters: {weight: 0.3}}]"
VARIED = """
models:
  - model: base
  - model: a
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: c
    parameters:
      density: 0.33
      weight: [{filter: mlp, value: 0.5}, {filter: self_attn, value: [0.2, 0.4]}, {value: 0}]
"""
CURVES = """
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
"""
TO_BASE = "base_model: base\nmerge_method: "
CASES = {
    "linear": f"{WEIGHTED}\nmerge_method: linear",
    "linear, not normalised": f"{WEIGHTED}\nmerge_method: linear\nparameters: {{normalize: false}}",
    "linear, gradients, base": (
        "models: [{model: base, parameters: {weight: [1, 0]}}, {model: c}]\n"
        f"{TO_BASE}linear\nparameters: {{weight: 0.5}}"
    ),
    "task_arithmetic": f"{WEIGHTED}\n{TO_BASE}task_arithmetic\nparameters: {{lambda: 0.7}}",
    "task_arithmetic, normalised": (
        f"{WEIGHTED}\n{TO_BASE}task_arithmetic\nparameters: {{normalize: true}}"
    ),
    "task_arithmetic, gradients and filters": f"{VARIED}\n{TO_BASE}task_arithmetic",
    "task_arithmetic, slices": f"{STACK}\n{TO_BASE}task_arithmetic",
    "ties": f"{WEIGHTED}\n{TO_BASE}ties\nparameters: {{density: 0.5}}",
    "ties, not normalised": (
        f"{WEIGHTED}\n{TO_BASE}ties\nparameters: {{density: 0.3, normalize: false, lambda: 0.8}}"
    ),
    "ties, gradients and filters": (
        f"{VARIED}\n{TO_BASE}ties\nparameters: {{normalize: true, int8_mask: true}}"
    ),
    "ties, slices": f"{STACK}\n{TO_BASE}ties\nparameters: {{density: [0.2, 0.8]}}",
    "slerp, near": f"models: [{{model: a}}]\n{TO_BASE}slerp\nparameters: {{t: 0.3}}",
    "slerp, far": f"models: [{{model: c}}]\n{TO_BASE}slerp\nparameters: {{t: 0.3}}",
    "slerp, gradients and filters": (
        f"models: [{{model: c}}, {{model: base}}]\n{TO_BASE}slerp{CURVES}"
    ),
    "nuslerp": f"{WEIGHTED}\n{TO_BASE}nuslerp",
    "nuslerp, whole models by rows": (
        f"{WEIGHTED}\nmerge_method: nuslerp\nparameters: {{nuslerp_flatten: false}}"
    ),
    "multislerp": f"{WEIGHTED}\n{TO_BASE}multislerp",
    "karcher": "models: [{model: a}, {model: c}]\nmerge_method: karcher",
    "model_stock": f"models: [{{model: a}}, {{model: b}}]\n{TO_BASE}model_stock",
    "nearswap": f"models: [{{model: a}}]\n{TO_BASE}nearswap\nparameters: {{t: 0.001}}",
    "sce": f"models: [{{model: a}}, {{model: b}}]\n{TO_BASE}sce\nparameters: {{select_topk: 0.6}}",
    "breadcrumbs": f"{WEIGHTED}\n{TO_BASE}breadcrumbs\nparameters: {{density: 0.7, gamma: 0.05}}",
    "breadcrumbs_ties": f"{WEIGHTED}\n{TO_BASE}breadcrumbs_ties\nparameters: {{density: 0.7}}",
    "arcee_fusion": f"models: [{{model: a}}]\n{TO_BASE}arcee_fusion",
    "ram": f"models: [{{model: a}}, {{model: b}}]\n{TO_BASE}ram\nparameters: {{epsilon: 0.0003}}",
    "dare_linear, density 1": f"{WEIGHTED}\n{TO_BASE}dare_linear\nparameters: {{density: 1}}",
    "dare_ties, density 1": f"{WEIGHTED}\n{TO_BASE}dare_ties\nparameters: {{lambda: 0.9}}",
}


THREE = """models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: 0.2}}"""
COSTS = {
    "linear": f"{THREE}\nmerge_method: linear",
    "task_arithmetic": f"{THREE}\n{TO_BASE}task_arithmetic",
    "slerp": f"models: [{{model: a}}]\n{TO_BASE}slerp\nparameters: {{t: 0.4}}",
    "ties": f"{THREE}\n{TO_BASE}ties\nparameters: {{density: 0.5}}",
    "dare_ties": f"{THREE}\n{TO_BASE}dare_ties\nparameters: {{density: 0.5}}",
}
# how many times less CPU time than mergekit, on the 1.1B models, and how many times less memory
CPU_TARGETS = {"linear": 2, "task_arithmetic": 2, "slerp": 4, "ties": 20, "dare_ties": 10}
MEMORY_TARGET = 10
PROGRAMS = ("mergekit", "evomerge")
SIZES = {
    "tiny": {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 160,
             "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1},
    "125M": {"vocab_size": 26_000, "hidden_size": 768, "intermediate_size": 2048,
             "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12},
    "1.1B": {"vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632,
             "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4},
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mergekit", type=Path, help="the mergekit-yaml command")
    parser.add_argument(
        "--cost", choices=["125M", "1.1B"], help="time and memory on models so large"
    )
    parser.add_argument("--method", action="append", help="only this one; may be repeated")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=1, help="of each merge; medians are shown")
    parser.add_argument("--keep", type=Path, help="where to leave models and results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        met = costs(arguments, folder) if arguments.cost else numbers(arguments, folder)
    return 0 if met else 1


def numbers(arguments: argparse.Namespace, folder: Path) -> bool:
    build_models(folder)
    print(f"{'beyond 1 ulp in':42} {'float32':>9} {'bfloat16':>9} {'largest':>8}")
    methods = set(arguments.method or METHODS) & METHODS.keys()
    chosen = [name for name in CASES if name.partition(",")[0] in methods]
    return all([compare(arguments.mergekit, folder, name) for name in chosen])


def build_models(folder: Path) -> None:
    """A base, two near sources (cosine 0.9998) and a far one, of another start."""
    base = random_llama(0)
    base.save_pretrained(folder / "base")
    for seed, name in enumerate("ab", start=1):
        near = random_llama(0)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in near.parameters():
                parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
        near.save_pretrained(folder / name)
    random_llama(9).save_pretrained(folder / "c")


def random_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def compare(mergekit: Path, folder: Path, name: str) -> bool:
    """Merge one file with both, print a line and say whether it meets the targets."""
    stem = name.replace(" ", "-").replace(",", "")
    file, theirs, ours = folder / f"{stem}.yml", folder / f"{stem}.theirs", folder / f"{stem}.ours"
    file.write_text(f"{located(CASES[name], folder)}\ndtype: float32\n")
    command = [str(mergekit.absolute()), file.name, theirs.name, "--quiet"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: mergekit failed:\n{done.stderr[-2000:]}")
    export(load_recipe(file), ours)
    expected, found = (load_file(path / "model.safetensors") for path in (theirs, ours))
    assert expected.keys() == found.keys()
    shares = []
    for dtype in (torch.float32, torch.bfloat16):
        pairs = [(found[key].to(dtype), expected[key].to(dtype)) for key in sorted(found)]
        steps = torch.cat([ulps(ours_, theirs_) for ours_, theirs_ in pairs])
        shares.append(float((steps > 1).double().mean()))
    print(f"{name:42} {shares[0]:9.4%} {shares[1]:9.4%} {int(steps.max()):8d}", flush=True)
    return max(shares) <= SHARE_BEYOND


def located(text: str, folder: Path) -> str:
    return re.sub(r"model: (base|a|b|c)\b", rf"model: {folder.resolve()}/\1", text)


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many numbers of their dtype lie between a and b, entry by entry."""
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    keys = []
    for tensor in (a, b):
        bits = tensor.flatten().view(integer).long()
        magnitude = bits & torch.iinfo(integer).max
        keys.append(torch.where(bits < 0, -magnitude, magnitude))
    return (keys[0] - keys[1]).abs()


@dataclass(frozen=True)
class Cost:
    """Of one command: CPU seconds, those beyond its start-up, wall seconds, peak memory in MB."""

    cpu_s: float
    net_s: float
    wall_s: float
    rss: float
    anonymous: float


def costs(arguments: argparse.Namespace, folder: Path) -> bool:
    """Merge with both and print the figures; whether all targets are met."""
    print("building the models ...", file=sys.stderr)
    count = build_large_models(folder, arguments.cost)
    build_large_models(folder / "tiny", "tiny")
    idle = {
        who: median([merge_cost(arguments, folder / "tiny", who, "linear") for _ in range(3)]).cpu_s
        for who in PROGRAMS
    }
    print(
        f"{count / 1e6:.0f}M parameters, dtype {arguments.dtype}, out_dtype bfloat16, one thread; "
        f"CPU s of start-up: mergekit {idle['mergekit']:.1f}, evomerge {idle['evomerge']:.1f}"
    )
    print(f"{'':25} {'CPU s':>8} {'net':>8} {'wall s':>8} {'peak MB':>8} {'anonymous':>9}")
    chosen = arguments.method or list(COSTS)
    return all([compare_costs(arguments, folder, name, idle) for name in chosen])


def compare_costs(
    arguments: argparse.Namespace, folder: Path, name: str, idle: dict[str, float]
) -> bool:
    """Merge one file with both, print their figures and say whether it meets its targets."""
    runs: dict[str, list[Cost]] = {who: [] for who in PROGRAMS}
    for _ in range(arguments.repeats):
        for who in PROGRAMS:
            runs[who].append(merge_cost(arguments, folder, who, name, idle[who]))
    theirs, ours = median(runs["mergekit"]), median(runs["evomerge"])
    ratios = [a / b for a, b in zip(astuple(theirs), astuple(ours), strict=True)]
    show(f"{name:15} mergekit", astuple(theirs), 1)
    show(f"{'':15} evomerge", astuple(ours), 1)
    show(f"{'':15} ratio", ratios, 2)
    met = verdict(name, ratios[0], ratios[4]) if arguments.cost == "1.1B" else True
    if arguments.dtype == "float32" and name != "dare_ties":
        share = share_beyond(folder / "mergekit", folder / "evomerge")
        print(f"{'':15} {share:.4%} of the entries beyond 1 ulp of bfloat16")
        met = met and share <= SHARE_BEYOND
    for who in PROGRAMS:
        shutil.rmtree(folder / who)
    return met


def verdict(name: str, cpu: float, memory: float) -> bool:
    targets = {"CPU": (cpu, CPU_TARGETS[name]), "anonymous memory": (memory, MEMORY_TARGET)}
    words = [
        f"{what} {'met' if ratio >= target else 'MISSED'} ({target}x)"
        for what, (ratio, target) in targets.items()
    ]
    print(f"{'':15} targets: {', '.join(words)}", flush=True)
    return all(ratio >= target for ratio, target in targets.values())


def show(what: str, figures: Sequence[float], places: int) -> None:
    cells = [f"{figure:8.{places if figure < 1000 else 0}f}" for figure in figures]
    print(f"{what:25} {' '.join(cells[:4])} {cells[4]:>9}", flush=True)


def median(runs: Sequence[Cost]) -> Cost:
    return Cost(*map(statistics.median, zip(*map(astuple, runs), strict=True)))


def merge_cost(
    arguments: argparse.Namespace, folder: Path, who: str, name: str, idle_s: float = 0.0
) -> Cost:
    """Merge one file with one of the programs, into the folder of its name."""
    models = located(COSTS[name], folder)
    (folder / "merge.yml").write_text(f"{models}\ndtype: {arguments.dtype}\nout_dtype: bfloat16\n")
    shutil.rmtree(folder / who, ignore_errors=True)
    evomerge = Path(sys.executable).with_name("evomerge")
    program = (
        [str(arguments.mergekit.absolute())] if who == "mergekit" else [str(evomerge), "merge"]
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = measure([*program, "merge.yml", who], folder, environment, interval_s=0.05)
    if done.returncode:
        sys.exit(f"{who}, {name}: failed:\n{done.errors[-2000:]}")
    memory = done.peak_rss / 1e6, done.peak_anonymous / 1e6
    return Cost(done.cpu_s, done.cpu_s - idle_s, done.wall_s, *memory)


def build_large_models(folder: Path, size: str) -> int:
    """A base and the sources `a`, `b`, `c`, one shard each; how many parameters one has."""
    config = LlamaConfig(**SIZES[size], tie_word_embeddings=False, dtype=torch.bfloat16)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in LlamaForCausalLM(config).state_dict().items()}
    for number, name in enumerate(("base", "a", "b", "c")):
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder / name)
        weights = dict(random_weights(shapes, number))
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
    return sum(shape.numel() for shape in shapes.values())


def random_weights(
    shapes: dict[str, torch.Size], number: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """The base's weights (`number` 0) or a source's, which are the base's with noise on them."""
    for index, (name, shape) in enumerate(shapes.items()):
        weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(index))
        if "norm" in name:
            weight += 1
        if number:
            noise = torch.Generator().manual_seed(number * 10_000 + index)
            weight += 0.002 * torch.randn(shape, generator=noise)
        yield name, weight.bfloat16()


def share_beyond(theirs: Path, ours: Path) -> float:
    """The share of entries of two checkpoints that are more than one unit apart."""
    beyond = total = 0
    with opened(theirs) as expected, opened(ours) as found:
        assert set(expected.keys()) == set(found.keys())
        for name in expected.keys():  # noqa: SIM118 - no mapping
            steps = ulps(found.get_tensor(name), expected.get_tensor(name))
            beyond, total = beyond + int((steps > 1).sum()), total + steps.numel()
    return beyond / total


def opened(folder: Path) -> safe_open:
    (file,) = folder.glob("*.safetensors")
    return safe_open(file, "pt")


if __name__ == "__main__":
    sys.exit(main())
