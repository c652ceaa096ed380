"""The same search through mergekit-evolve and through evomerge: candidates per CPU second.

    python benchmarks/against_mergekit_evolve.py PEER_PYTHON [--zoo DIR] [--items 100]

Both search merge weights of the zoo's four experts on the same items of the same tasks, with one
worker and one thread, as many candidates as mergekit-evolve made of --candidates. mergekit-evolve
is 0.1.4 with --in-memory, the one combination that still runs, untouched; PEER_PYTHON is the python
of an environment of its own:

    python3 -m venv ENV
    ENV/bin/pip install torch==2.13.0
    ENV/bin/pip install torch==2.13.0 'mergekit[evolve]==0.1.4' 'transformers<5' lm_eval==0.4.9.1

Ray is told of a GPU, since mergekit-evolve asks for one, and given one CPU, no dashboard and the
loopback address. A search's CPU time is that of its whole process tree: Ray's daemons and idle
workers belong to what a search costs, and so do our controller, database and mirror, and the
baselines, selection and report that mergekit-evolve does not have. `net` leaves out start-up and
end: it is the CPU time of the tree from the end of the first generation to the end of the last,
over the candidates in between. mergekit-evolve scores one item at a time, whatever --batch-size
says, when it merges in memory; --batch-size 1 makes us do the same.

The scores are compared too, on mergekit-evolve's best candidate: its weights in float32 through
its lm-eval and our scorer must give the same outcomes, item by item. What it printed differs from
what its saved model scores: in memory it rounds the model's rotary frequencies to bfloat16 with the
weights; rounded so, one item at a time, we should get its score. Also printed: the score of its
weights as transformers loads them, and of its genome merged by us, in float32 and rounded once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from process_tree import Usage, measure

TARGET = 5.0
TASKS = {
    "compare": "acc",
    "reverse": "exact_match",
    "lexicon": "exact_match",
    "sort": "exact_match",
}
LAUNCH = """
import sys, ray
ray.init(num_cpus=1, num_gpus=1, include_dashboard=False, object_store_memory=200_000_000,
         _node_ip_address="127.0.0.1", _temp_dir=sys.argv[1])
from mergekit.scripts.evolve import main
main(sys.argv[2:])
"""


@dataclass(frozen=True)
class Search:
    """A search that was made: CPU and wall seconds in all, and CPU seconds for each candidate
    after the first generation."""

    candidates: int
    usage: Usage
    net_s: float
    net_candidates: int

    @property
    def net_each_s(self) -> float:
        return self.net_s / self.net_candidates


def main() -> int:
    arguments = parse()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch)
        os.environ.update(surroundings(folder))
        zoo = arguments.zoo or build_zoo(folder)
        copy_models(zoo, folder / "zoo")
        write_tasks(zoo, folder, arguments.items)
        document = evolve_file(folder, arguments.method)
        theirs = search_theirs(arguments, folder)
        ours, evaluations = search_ours(arguments, folder, document, theirs)
        met = report(arguments, theirs, ours, evaluations)
        same = compare_scores(arguments, folder, theirs)
    return 0 if met and same else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer_python", type=Path, help="the python of mergekit's environment")
    parser.add_argument("--zoo", type=Path, help="made by `evomerge zoo build`; built if not given")
    parser.add_argument("--items", type=int, default=100, help="of each of the four tasks")
    parser.add_argument("--candidates", type=int, default=40, help="its --max-fevals")
    parser.add_argument(
        "--method", default="task_arithmetic", choices=["linear", "task_arithmetic", "ties"]
    )
    parser.add_argument("--batch-size", default="auto", help="ours")
    parser.add_argument("--dtype", default="bfloat16", help="ours; bfloat16 is all it has")
    parser.add_argument("--scratch", type=Path, help="where to work; the system's by default")
    return parser.parse_args()


def build_zoo(folder: Path) -> Path:
    from evomerge.zoo.build import build_zoo as build

    print("building the zoo ...", file=sys.stderr)
    return build(folder / "built").directory


def copy_models(zoo: Path, target: Path) -> None:
    """Copies whose tokenizers both transformers 4 and 5 can load."""
    for name in ("base", *TASKS):
        shutil.copytree(zoo / name, target / name)
        path = target / name / "tokenizer_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))


def write_tasks(zoo: Path, folder: Path, items: int) -> None:
    """Task folders `theirs`, with `items` items of each task, and `ours`, with as many more as it
    takes for these to be the search part."""
    from evomerge.scoring.splits import item_hash, part_of
    from evomerge.spec import Split

    for task in TASKS:
        ours: list[str] = []
        theirs: list[str] = []
        for line in (zoo / "tasks" / "data" / f"{task}.jsonl").read_text().splitlines():
            searched = part_of(item_hash(json.loads(line)), Split()) == "search"
            if not searched or len(theirs) < items:
                ours.append(line)
            if searched and len(theirs) < items:
                theirs.append(line)
        if len(theirs) < items:
            sys.exit(f"{task}: the zoo has {len(theirs)} search items only; give fewer --items")
        config = yaml.safe_load((zoo / "tasks" / f"{task}.yaml").read_text())
        for name, lines in (("ours", ours), ("theirs", theirs)):
            write_task(folder / name, task, config, lines)


def write_task(folder: Path, task: str, config: Mapping[str, Any], lines: Sequence[str]) -> None:
    folder.mkdir(exist_ok=True)
    data = folder / f"{task}.jsonl"
    data.write_text("".join(f"{line}\n" for line in lines))
    files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / f"{task}.yaml").write_text(yaml.safe_dump({**config, **files}))


def evolve_file(folder: Path, method: str) -> dict[str, Any]:
    base = {} if method == "linear" else {"base_model": str(folder / "zoo" / "base")}
    document = {
        "genome": {
            "models": [str(folder / "zoo" / task) for task in TASKS],
            "merge_method": method,
            **base,
        },
        "tasks": [{"name": task, "metric": f"{metric},none"} for task, metric in TASKS.items()],
        "apply_chat_template": False,
        "fewshot_as_multiturn": False,
    }
    (folder / "evolve.yml").write_text(yaml.safe_dump(document))
    return document


def surroundings(folder: Path) -> dict[str, str]:
    """What every process runs under: one thread, no network, no cache but our own."""
    return {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "huggingface"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
    }


def run(command: Sequence[str | Path], folder: Path) -> Usage:
    usage = measure([str(p) for p in command], folder, os.environ, interval_s=0.25)
    if usage.returncode:
        sys.exit(f"{command[0]} failed:\n{usage.errors[-3000:]}")
    return usage


def search_theirs(arguments: argparse.Namespace, folder: Path) -> Search:
    options = ["--in-memory", "--no-merge-cuda", "--strategy", "pool", "--num-gpus", "1"]
    usage = run(
        [
            arguments.peer_python.absolute(), "-c", LAUNCH, folder / "ray", folder / "evolve.yml",
            "--storage-path", folder / "storage", "--task-search-path", folder / "theirs",
            "--max-fevals", str(arguments.candidates), *options,
        ],
        folder,
    )  # fmt: skip
    generations = list(re.finditer(rb"Received (\d+) genotypes", usage.output))
    sizes = [int(found[1]) for found in generations]
    if len(sizes) < 3:
        sys.exit(f"mergekit-evolve stopped after {sum(sizes)} candidates; give more --items")
    first_told = usage.cpu_when_printed(generations[1].start())
    all_told = usage.cpu_when_printed(usage.output.index(b"!!! OPTIMIZATION COMPLETE !!!"))
    return Search(sum(sizes), usage, all_told - first_told, sum(sizes[1:]))


def search_ours(
    arguments: argparse.Namespace, folder: Path, document: Mapping[str, Any], theirs: Search
) -> tuple[Search, int]:
    """As many candidates as theirs, one generation of theirs left out of the net figure; and how
    many evaluations there were in all."""
    from evomerge.space.mergekit_evolve import read_mergekit_evolve
    from evomerge.store import open_store

    located = {**document, "include_path": str(folder / "ours")}
    spec, _ = read_mergekit_evolve(located, folder / "evolve.yml")
    size = arguments.batch_size
    spec["budget"] = {"trials": theirs.candidates}
    spec["evaluation"] = {
        "dtype": arguments.dtype,
        "batch_size": size if size == "auto" else int(size),
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(spec))
    store = f"sqlite:///{folder / 'study.db'}"
    evomerge = Path(sys.executable).with_name("evomerge")
    usage = run([evomerge, "run", "study.yaml", "--workers", "1", "--store", store], folder)
    trials = open_store(store).trials(spec["name"], outcomes=False)
    ended = sorted(
        attempt.finished_at.timestamp()
        for trial in trials
        if trial.kind == "search"
        for attempt in trial.attempts
        if attempt.part == "search" and attempt.finished_at
    )
    skipped = len(ended) - theirs.net_candidates
    net_s = usage.cpu_at(ended[-1]) - usage.cpu_at(ended[skipped - 1])
    evaluations = sum(len(trial.attempts) for trial in trials)
    return Search(len(ended), usage, net_s, theirs.net_candidates), evaluations


def report(arguments: argparse.Namespace, theirs: Search, ours: Search, evaluations: int) -> bool:
    print(
        f"{arguments.method}, {len(TASKS)} tasks of {arguments.items} items, one worker, one "
        f"thread; ours: {arguments.dtype}, batch size {arguments.batch_size}"
    )
    print(f"{'':40} {'mergekit-evolve':>16} {'evomerge':>9} {'ratio':>6}")
    line("candidates", theirs.candidates, ours.candidates)
    line("CPU s, whole process tree", theirs.usage.cpu_s, ours.usage.cpu_s)
    line("wall s", theirs.usage.wall_s, ours.usage.wall_s)
    line("CPU s for a candidate, net", theirs.net_each_s, ours.net_each_s)
    whole = line(
        "candidates per CPU second, in all",
        theirs.candidates / theirs.usage.cpu_s,
        ours.candidates / ours.usage.cpu_s,
    )
    net = line("candidates per CPU second, net", 1 / theirs.net_each_s, 1 / ours.net_each_s)
    verdicts = ["met" if 1 / ratio >= TARGET else "MISSED" for ratio in (whole, net)]
    print(f"target {TARGET:g}x more: in all {verdicts[0]}, net {verdicts[1]}")
    print(
        f"net is over the {theirs.net_candidates} candidates after the first generation; in all, we"
        f" made {evaluations - ours.candidates} evaluations more (baselines, selection, report)",
        flush=True,
    )
    return "MISSED" not in verdicts


def line(what: str, theirs: float, ours: float) -> float:
    print(f"{what:40} {theirs:16.3f} {ours:9.3f} {max(theirs / ours, ours / theirs):6.1f}")
    return theirs / ours


def compare_scores(arguments: argparse.Namespace, folder: Path, theirs: Search) -> bool:
    """Score mergekit-evolve's best candidate with both; whether float32 outcomes are equal."""
    output = theirs.usage.output
    told = -float(re.findall(rb"Best cost: (\S+)", output)[-1])
    final = folder / "storage" / "final_model"
    genome = re.search(rb"Best merge configuration:\n(.*)Saving final", output, re.DOTALL)
    assert genome is not None
    (folder / "best.yml").write_bytes(genome[1])
    evomerge = Path(sys.executable).with_name("evomerge")
    run([evomerge, "merge", folder / "best.yml", folder / "merged"], folder)
    expected = their_outcomes(arguments, folder, final)
    found = our_outcomes(folder, final, "float32")
    differing = sum(
        a != b for task in TASKS for a, b in zip(expected[task], found[task], strict=True)
    )
    print("mergekit-evolve's best candidate, the sum of the four tasks' scores:")
    print(f"  its weights in float32, its lm-eval      {total(expected):8.4f}")
    print(f"  its weights in float32, ours             {total(found):8.4f}", end="")
    print(f"  {differing} of {len(TASKS) * arguments.items} items differ")
    same = total(our_outcomes(folder, final, "bfloat16", as_theirs=True))
    loaded, merged = (
        total(our_outcomes(folder, path, "bfloat16")) for path in (final, folder / "merged")
    )
    print(f"  in bfloat16 in its memory, as it printed {told:8.4f}")
    print(f"  in bfloat16 in its memory, ours          {same:8.4f}")
    print(f"  in bfloat16 as loaded, ours              {loaded:8.4f}")
    print(f"  its genome, merged by us, ours           {merged:8.4f}")
    return not differing


def total(outcomes: Mapping[str, Sequence[float]]) -> float:
    return sum(sum(values) / len(values) for values in outcomes.values())


def their_outcomes(
    arguments: argparse.Namespace, folder: Path, checkpoint: Path
) -> dict[str, list[float]]:
    """Item by item, by the lm-eval of mergekit's environment, in float32."""
    run(
        [
            arguments.peer_python.absolute(), "-m", "lm_eval", "--model", "hf", "--device", "cpu",
            "--model_args", f"pretrained={checkpoint},dtype=float32", "--tasks", ",".join(TASKS),
            "--include_path", folder / "theirs", "--batch_size", "32", "--log_samples",
            "--output_path", folder / "samples",
        ],
        folder,
    )  # fmt: skip
    outcomes = {}
    for task, metric in TASKS.items():
        (path,) = (folder / "samples").glob(f"**/samples_{task}_*.jsonl")
        rows = [json.loads(text) for text in path.read_text().splitlines()]
        outcomes[task] = [row[metric] for row in sorted(rows, key=lambda row: row["doc_id"])]
    return outcomes


def our_outcomes(
    folder: Path, checkpoint: Path, dtype: str, *, as_theirs: bool = False
) -> dict[str, tuple[float, ...]]:
    """Item by item, by the resident scorer, on the search part of the items."""
    from evomerge.checkpoints import Checkpoint
    from evomerge.merging.materialise import load_model
    from evomerge.scoring.resident import ResidentScorer
    from evomerge.spec import Evaluation, Objective

    model, _ = load_model(Checkpoint.open(str(checkpoint)), dtype)
    _, tokenizer = load_model(Checkpoint.open(str(folder / "zoo" / "base")))
    tasks = [{"task": task, "metric": metric} for task, metric in TASKS.items()]
    wanted = Objective.model_validate({"tasks": tasks, "include_path": str(folder / "ours")})
    if as_theirs:
        model.bfloat16()  # casts the rotary frequencies too, which loading in bfloat16 does not
    evaluation = Evaluation(batch_size=1 if as_theirs else "auto")
    score = ResidentScorer(model, tokenizer, wanted, evaluation).score("search")
    return {task: score.tasks[task].outcomes for task in TASKS}


if __name__ == "__main__":
    sys.exit(main())
