"""Every merge method at its best small grid on the zoo, written into docs/results.md.

    python benchmarks/methods_table.py FOLDER [--zoo ZOO_DIR]... [--output docs/results.md]

FOLDER keeps zoos, scores and artifacts, so that an interrupted run goes on where it was; take a new
one after a change of a method. Without --zoo the zoos of seeds 0, 1 and 2 are built there. If it is
where `evomerge demo --dir FOLDER --seed N` ran for each of them, the demos' zoos are taken, and the
winners of their searches get a row. Settings are chosen on search and selection items that no fit
has seen, reported on report items. About half an hour on a core; times are CPU seconds.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from method_grids import GRIDS, Grid, Settings
from results_page import Chosen, page
from zoo_scores import TASKS, WEIGHTS, ZooScores

from evomerge.merging.methods.registry import METHODS
from evomerge.merging.recipe import Recipe
from evomerge.service.verdict import winner
from evomerge.store import open_store

SEEDS = (0, 1, 2)
FINALISTS = 3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where everything is kept")
    parser.add_argument("--zoo", type=Path, action="append", help="by `evomerge zoo build`")
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    zoos = arguments.zoo or [build(arguments.folder, seed) for seed in SEEDS]
    all_scores = [ZooScores(zoo, arguments.folder / f"scores-{zoo.name}") for zoo in zoos]
    columns = [
        {**fixed(scores), **methods(scores), **searched(scores, arguments.folder)}
        for scores in all_scores
    ]
    rows = {name: [column[name] for column in columns] for name in columns[0]}
    arguments.output.write_text(page(rows, all_scores), encoding="utf-8")
    print(f"wrote {arguments.output}")
    return 0


def build(folder: Path, seed: int) -> Path:
    from evomerge.zoo.build import build_zoo

    print(f"building the zoo of seed {seed} ...", file=sys.stderr)
    return build_zoo(folder / f"zoo-{seed}", seed=seed).directory


def fixed(scores: ZooScores) -> dict[str, Chosen]:
    """The base and every source, where there is nothing to choose."""
    base = scores.recipe("task_arithmetic", {"lambda": 0.0})
    sources = {f"source {task}": scores.recipe("linear", {}, [task]) for task in TASKS}
    return {name: reported(scores, recipe) for name, recipe in {"base": base, **sources}.items()}


def reported(scores: ZooScores, recipe: Recipe, **known: Any) -> Chosen:
    score = scores.score(recipe, "report")
    assert score is not None, recipe
    return Chosen(score, **known)


def methods(scores: ZooScores) -> dict[str, Chosen]:
    """Every method's grids, each at its best."""
    found = {}
    for method, grids in GRIDS.items():
        for grid in grids:
            row = f"{method} ({grid.label})" if grid.label else method
            found[row] = best(scores, method, grid)
            print(f"seed {scores.seed}: {row}: {found[row].mean:.3f}", flush=True)
    return found


def best(scores: ZooScores, method: str, grid: Grid) -> Chosen:
    """The best settings, the first of equals, on the report items.

    All are scored on selection items, the finalists on search items too, as in a study.
    """
    tried = list(grid.settings())
    fitted = METHODS[method].artifact is not None

    def recipe(fit: Settings, parameters: Settings) -> Recipe:
        artifact = scores.fitted(method, fit) if fitted else None
        return scores.recipe(method, parameters, artifact=artifact)

    ranked = sorted(tried, key=lambda one: -scores.merit(recipe(*one), ["selection"]))
    finalists = ranked[:FINALISTS]
    if len(finalists) > 1:
        finalists.sort(key=lambda one: -scores.merit(recipe(*one), ["selection", "search"]))
    fit, parameters = finalists[0]
    chosen = recipe(fit, parameters)
    artifact = scores.fitted(method, fit) if fitted else None
    return reported(
        scores,
        chosen,
        settings=shown({**fit, **parameters}),
        tried=len(tried),
        fits=len(grid.fits) if fitted else 0,
        fit_s=scores.fit_seconds(artifact) if artifact else None,
        merge_s=scores.merge_seconds(chosen),
        flops=artifact.cost["flops"] if artifact else None,
    )


def shown(settings: Settings) -> str:
    def text(value: Any) -> str:
        if isinstance(value, list):
            return "+".join(map(str, value))
        return f"{value:g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {text(value)}" for name, value in settings.items())


def searched(scores: ZooScores, folder: Path) -> dict[str, Chosen]:
    """The winner of the demo's search on this zoo, if FOLDER is where a demo ran."""
    store = folder / "evomerge.db"
    if not store.exists():
        return {}
    study = open_store(f"sqlite:///{store}").trials(f"demo-{scores.seed}")
    champion = winner(study, WEIGHTS)
    theirs, ours = study[0].scores["report"], fixed(scores)["base"].report
    if champion is None or any(ours.tasks[t].outcomes != theirs.tasks[t].outcomes for t in TASKS):
        sys.exit(f"{store}: its demo-{scores.seed} is unfinished, or of another zoo")
    trials = [trial for trial in study if trial.kind == "search"]
    return {
        "search (the demo's)": Chosen(
            champion.scores["report"],
            f"trial {champion.number}",
            tried=len(trials),
            fit_s=math.fsum(trial.seconds for trial in trials),
        )
    }


if __name__ == "__main__":
    sys.exit(main())
