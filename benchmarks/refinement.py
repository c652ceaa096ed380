"""Gradients beside evolution: the best so far against seconds, on zoos of several seeds.

    python benchmarks/refinement.py ZOO... [--trials N] [--out FILE.json]

Four ways to spend one machine, on the items that a search may see:

    evolution     CMA-ES from the space's start, with half as many trials again: as much time as
                  the others spend on candidates and gradients
    from DAM, from AdaMerging
                  the same from the genome nearest to what a fit has learned (`sampler.start`)
    refined       evolution for two thirds of the trials, then gradient steps from its best
                  (`evomerge refine`), then evolution again

Seconds are of CPU time, one thread: what the fit or the gradient steps took, and the mean over all
candidates for each that was scored. A table of the best value on the search items once a third, two
thirds and all of evolution's time is spent, and of the winner on the report items.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml

from evomerge.calibration.request import load_request, open_problem
from evomerge.merging.fitted.base import fit
from evomerge.merging.recipe import Recipe
from evomerge.service.refinement import elite, with_refinement
from evomerge.service.refining import read_calibration, refine
from evomerge.service.report import stored_report
from evomerge.service.study import build_controller, controlling, open_study
from evomerge.service.worker import Worker
from evomerge.spec import StudySpec
from evomerge.store.memory import MemoryStore
from evomerge.testing.synthetic import SyntheticExecutor
from evomerge.trial import Part, Score
from evomerge.zoo.recipe import ZooRecipe

TASKS = tuple(ZooRecipe().experts)
EXAMPLES = 60  # of each task
STEPS = 15
FITS: Mapping[str, Mapping[str, Any]] = {
    "dam": {"granularity": "tensor", "anchor": "base", "batch_size": 15, "epochs": 5},
    "adamerging": {"lr": 1e-2, "steps": 30},
}


class InThisProcess(SyntheticExecutor):
    """One worker, here; what scoring costs is added up."""

    def __init__(self) -> None:
        super().__init__(score=self._scored)
        self._worker = Worker()
        self.search_seconds: list[float] = []

    def inspect(self, spec: Any) -> Any:
        return self._worker.inspect(spec)

    def prepare(self, setup: Any) -> None:
        super().prepare(setup)
        self._worker.prepare(setup.spec, setup.digests, setup.dtype)

    def _scored(self, recipe: Recipe, part: Part, tasks: Sequence[str]) -> Score:
        started_s = time.process_time()
        answer = self._worker.run("here", recipe.to_json(), part)
        if part == "search":
            self.search_seconds.append(time.process_time() - started_s)
        return Score.from_json(answer["score"])


@dataclass
class Arm:
    """One study: values of its candidates in order, each behind so many seconds of gradients."""

    name: str
    values: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    report: float = 0.0
    notes: list[str] = field(default_factory=list)

    def best_at(self, seconds: float, candidate_s: float) -> float | None:
        """The best value that is known once so many seconds are spent."""
        spent = [g + (k + 1) * candidate_s for k, g in enumerate(self.gradients)]
        known = [v for v, s in zip(self.values, spent, strict=True) if s <= seconds * (1 + 1e-9)]
        return max(known, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("zoos", nargs="+", type=Path)
    parser.add_argument("--trials", type=int, default=33)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = [one_zoo(zoo.resolve(), arguments.trials) for zoo in arguments.zoos]
    print(table(found))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))


def one_zoo(zoo: Path, trials: int) -> dict[str, Any]:
    """Every arm on one zoo, in a store of their own: what one has scored no other scores again."""
    store, executor = MemoryStore(), InThisProcess()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        longer = 3 * trials // 2
        arms = [evolution(zoo, longer, store, executor)]
        for kind, settings in FITS.items():
            arms.append(started(zoo, trials, store, executor, kind, settings, folder))
        arms.append(refined(zoo, trials, store, executor, folder))
    candidate_s = fmean(executor.search_seconds)
    baselines = store.trials("evolution")
    whole_s = longer * candidate_s
    arithmetic = [t.values[0] for t in baselines if t.kind == "task_arithmetic" and t.values]
    return {
        "zoo": str(zoo),
        "candidate_s": candidate_s,
        "task_arithmetic": max(arithmetic),
        "arms": {
            arm.name: {
                "gradient_s": max(arm.gradients, default=0.0),
                "best_at": [arm.best_at(whole_s * k / 3, candidate_s) for k in (1, 2, 3)],
                "best": max(arm.values),
                "report": arm.report,
                "values": arm.values,
                "notes": arm.notes,
            }
            for arm in arms
        },
    }


def evolution(zoo: Path, trials: int, store: MemoryStore, executor: InThisProcess) -> Arm:
    """CMA-ES alone."""
    spec = study(zoo, "evolution", trials)
    run(spec, store, executor)
    return arm_of(spec, store, 0.0)


def started(
    zoo: Path,
    trials: int,
    store: MemoryStore,
    executor: InThisProcess,
    kind: str,
    settings: Mapping[str, Any],
    folder: Path,
) -> Arm:
    """A fit, and CMA-ES from its weights."""
    document = {**models(zoo), "method": kind, **calibration(zoo), "fit": dict(settings)}
    (folder / f"{kind}.yaml").write_text(yaml.safe_dump(document))
    started_s = time.process_time()
    request = load_request(folder / f"{kind}.yaml")
    fit(request.fitter, open_problem(request, device="cpu"), request.settings, folder / kind)
    seconds = time.process_time() - started_s
    spec = study(zoo, f"from-{kind}", trials, start=str(folder / kind))
    run(spec, store, executor)
    arm = arm_of(spec, store, seconds)
    start = store.study(spec.name).inspection["start"]
    arm.notes.append(f"distance of the start {start['distance']:.2f}")
    return arm


def refined(
    zoo: Path, trials: int, store: MemoryStore, executor: InThisProcess, folder: Path
) -> Arm:
    """CMA-ES, gradient steps from its best, and CMA-ES again."""
    spec, before = study(zoo, "refined", trials), 2 * trials // 3
    run(study(zoo, "refined", before), store, executor)
    (folder / "data.yaml").write_text(yaml.safe_dump(calibration(zoo)))
    known = store.trials("refined", outcomes=False)
    origin = elite(known, dict.fromkeys(TASKS, 1.0))
    started_s = time.process_time()
    data = read_calibration(folder / "data.yaml", spec)
    found = refine(
        store.study("refined"), origin, known, data, loss="answers", steps=STEPS, device="cpu"
    )
    seconds = time.process_time() - started_s
    run(spec, store, executor, found)
    arm = arm_of(spec, store, 0.0)
    arm.gradients = [seconds * (place >= before) for place in range(len(arm.values))]
    assert origin.values is not None
    if found is not None:
        gain = arm.values[before] - origin.values[0]
        arm.notes.append(
            f"{gain:+.4f} by {seconds:.0f} s, loss {found.before:.3f} to {found.after:.3f}"
        )
    return arm


def run(spec: StudySpec, store: MemoryStore, executor: InThisProcess, found: Any = None) -> None:
    """The study to its end, with a refinement if there is one."""
    record = open_study(spec, store, executor)
    if found is not None:
        record = with_refinement(record, found)
    with controlling(record, store) as token:
        build_controller(record, store, executor, token).run()


def arm_of(spec: StudySpec, store: MemoryStore, seconds: float) -> Arm:
    """What a study found."""
    trials = [t for t in store.trials(spec.name) if t.genome is not None and t.values]
    values = [t.values[0] for t in trials if t.values]
    report = stored_report(store.study(spec.name), store)
    assert report.winner is not None
    assert report.winner.report is not None
    return Arm(spec.name, values, [seconds] * len(values), report.winner.report.mean)


def study(zoo: Path, name: str, trials: int, **sampler: Any) -> StudySpec:
    """The zoo's study; trials of a refined one beside the search's are not counted."""
    return StudySpec.model_validate(
        {
            "name": name,
            **models(zoo),
            "objective": {"include_path": str(zoo / "tasks"), "tasks": list(TASKS)},
            "sampler": {"seed": 1, **sampler},
            "budget": {"trials": trials, "finalists": 3},
        }
    )


def models(zoo: Path) -> dict[str, Any]:
    """Base and sources of a zoo."""
    return {"base": str(zoo / "base"), "sources": {name: str(zoo / name) for name in TASKS}}


def calibration(zoo: Path) -> dict[str, Any]:
    """Items of each source's task that a search may see."""
    path = str(zoo / "tasks")
    entries = {n: {"task": n, "include_path": path, "count": EXAMPLES} for n in TASKS}
    return {"calibration": entries}


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Means over the zoos; a dash where an arm has scored nothing by then on one of them."""
    lines = [
        "| arm | gradient s | best after a third | two thirds | all of the time | best | report |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in found[0]["arms"]:
        arms = [zoo["arms"][name] for zoo in found]
        at = [[arm["best_at"][k] for arm in arms] for k in range(3)]
        cells = [_mean(column) for column in at]
        seconds = fmean(arm["gradient_s"] for arm in arms)
        best, report = (fmean(arm[key] for arm in arms) for key in ("best", "report"))
        each = ", ".join(f"{arm['report']:.3f}" for arm in arms)
        lines.append(
            f"| {name} | {seconds:.0f} | {' | '.join(cells)} | {best:.3f} | {report:.3f} ({each}) |"
        )
    candidate = fmean(zoo["candidate_s"] for zoo in found)
    notes = [
        f"{Path(zoo['zoo']).name}, {name}: {note}"
        for zoo in found
        for name, arm in zoo["arms"].items()
        for note in arm["notes"]
    ]
    return "\n".join([*lines, "", f"A candidate takes {candidate:.2f} s.", *notes])


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.3f}" if len(known) == len(values) else "-"


if __name__ == "__main__":
    main()
