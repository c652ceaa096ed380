"""What scoring costs: a cold `lm_eval`, a warm `simple_evaluate`, the resident scorer.

Prints CPU seconds for each, on the zoo's four tasks with equal outcomes, and their ratios. The
targets: the resident scorer costs at most 1/10 of the cold command and 1/3 of the warm call.

    python benchmarks/scoring_cost.py [ZOO_DIR] [--batch-size N] [--dtype float32]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TASKS = {
    "compare": "acc",
    "reverse": "exact_match",
    "lexicon": "exact_match",
    "sort": "exact_match",
}
LIMITS = {"cold": 10.0, "warm": 3.0}
Outcomes = dict[str, list[float]]


def main() -> int:
    arguments = parse()
    if arguments.step:
        print(json.dumps(STEPS[arguments.step](arguments)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        arguments.zoo = arguments.zoo or build_zoo(Path(scratch))
        merged = str(Path(scratch) / "merged")
        step(arguments, "merge", merged)
        cold_seconds, cold = cold_run(arguments, merged, Path(scratch) / "out")
        warm = step(arguments, "warm", merged)
        resident = step(arguments, "resident", merged)
    if not resident["outcomes"] == cold == warm["outcomes"]:
        sys.exit("outcomes differ")
    return report(cold_seconds, warm["seconds"], resident)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("zoo", nargs="?", help="a zoo built by `evomerge zoo build`")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    return parser.parse_args()


def report(cold: float, warm: float, resident: dict[str, Any]) -> int:
    ours = resident["seconds"]
    items = sum(map(len, resident["outcomes"].values()))
    print(f"{items} items, outcomes equal item by item; CPU seconds per candidate:")
    print(f"  cold lm_eval command        {cold:8.2f}")
    print(f"  warm simple_evaluate        {warm:8.2f}")
    print(f"  resident scorer, all parts  {ours:8.2f}   (once: {resident['setup']:.2f})")
    ratios = {"cold": cold / ours, "warm": warm / ours}
    missed = [name for name, ratio in ratios.items() if ratio < LIMITS[name]]
    for name, ratio in ratios.items():
        verdict = "MISSED" if name in missed else "ok"
        print(f"  {name} / resident: {ratio:5.1f}   (target {LIMITS[name]:g}, {verdict})")
    return 1 if missed else 0


def build_zoo(folder: Path) -> str:
    from evomerge.zoo.build import build_zoo as build

    print("building the zoo ...", file=sys.stderr)
    return str(build(folder / "zoo").directory)


def step(arguments: argparse.Namespace, name: str, checkpoint: str) -> Any:
    """Run one step in a process of its own, so that none warms or patches another."""
    command = [sys.executable, __file__, arguments.zoo, "--step", name, "--checkpoint", checkpoint]
    command += ["--batch-size", str(arguments.batch_size), "--dtype", arguments.dtype]
    command += ["--repeats", str(arguments.repeats)]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"step {name!r} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def environment() -> dict[str, str]:
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    return {**os.environ, **quiet}


def merge(arguments: argparse.Namespace) -> None:
    """A task-arithmetic merge of all experts: what a search would score."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    zoo = Path(arguments.zoo)
    folders = [zoo / "base", *(zoo / name for name in TASKS)]
    base, *experts = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in folders)
    with torch.no_grad():
        for name, tensor in base.state_dict().items():
            vectors = [expert.state_dict()[name] - tensor for expert in experts]
            tensor += 0.3 * torch.stack(vectors).sum(dim=0)
    base.to(getattr(torch, arguments.dtype)).save_pretrained(arguments.checkpoint)
    AutoTokenizer.from_pretrained(folders[0]).save_pretrained(arguments.checkpoint)


def cold_run(arguments: argparse.Namespace, merged: str, output: Path) -> tuple[float, Outcomes]:
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={merged},dtype={arguments.dtype}"]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(Path(arguments.zoo) / "tasks")]
    command += ["--batch_size", str(arguments.batch_size)]
    command += ["--log_samples", "--output_path", str(output)]
    before = children_seconds()
    subprocess.run(command, check=True, env=environment(), capture_output=True)
    seconds = children_seconds() - before
    samples = {}
    for name in TASKS:
        (path,) = output.glob(f"**/samples_{name}_[0-9]*.jsonl")
        samples[name] = [json.loads(line) for line in path.read_text().splitlines()]
    return seconds, outcomes(samples)


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def outcomes(samples: dict[str, list[dict[str, Any]]]) -> Outcomes:
    return {
        name: [row[metric] for row in sorted(samples[name], key=lambda row: row["doc_id"])]
        for name, metric in TASKS.items()
    }


def warm(arguments: argparse.Namespace) -> dict[str, Any]:
    """`simple_evaluate` with its own defaults, on a loaded HFLM and an indexed TaskManager."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = load(arguments)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch_size)
    tasks = str(Path(arguments.zoo) / "tasks")
    manager = TaskManager(include_path=tasks, include_defaults=False)

    def evaluate() -> Outcomes:
        results = lm_eval.simple_evaluate(lm, tasks=list(TASKS), task_manager=manager)
        return outcomes(results["samples"])

    seconds, result = least(evaluate, arguments.repeats)
    return {"seconds": seconds, "outcomes": result}


def resident(arguments: argparse.Namespace) -> dict[str, Any]:
    from evomerge.scoring.resident import ResidentScorer
    from evomerge.scoring.tasks import load_tasks
    from evomerge.spec import PARTS, Evaluation, Objective

    model, tokenizer = load(arguments)
    tasks = [{"task": task, "metric": metric} for task, metric in TASKS.items()]
    wanted = Objective.model_validate(
        {"tasks": tasks, "include_path": str(Path(arguments.zoo) / "tasks")}
    )
    started = time.process_time()
    loaded = load_tasks(wanted)
    evaluation = Evaluation(batch_size=arguments.batch_size)
    scorer = ResidentScorer(model, tokenizer, wanted, evaluation, tasks=loaded)
    setup = time.process_time() - started

    def evaluate() -> Outcomes:
        result = {task: [0.0] * len(hashes) for task, hashes in scorer.items().items()}
        for part in PARTS:
            score = scorer.score(part)
            for task, places in loaded.positions(part).items():
                for place, outcome in zip(places, score.tasks[task].outcomes, strict=True):
                    result[task][place] = outcome
        return result

    evaluate()  # lays the batches out, once in a worker's life
    seconds, result = least(evaluate, arguments.repeats)
    return {"seconds": seconds, "setup": setup, "outcomes": result}


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(arguments.checkpoint)


def least(evaluate: Callable[[], Outcomes], repeats: int) -> tuple[float, Outcomes]:
    """The least CPU seconds of several calls, subprocesses included, and the last result."""
    seconds = []
    for _ in range(repeats):
        before = time.process_time() + children_seconds()
        result = evaluate()
        seconds.append(time.process_time() + children_seconds() - before)
    return min(seconds), result


STEPS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "merge": merge,
    "warm": warm,
    "resident": resident,
}

if __name__ == "__main__":
    sys.exit(main())
