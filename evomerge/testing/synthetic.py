"""A study without models: an executor whose scores are a pure function of the recipe.

For tests and benchmarks of the loop around it. Jobs finish in a shuffled order that depends on the
seed and the number of workers, as real ones do. Knows nothing of processes and torch.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.merging.recipe import Recipe
from evomerge.merging.values import leaves
from evomerge.service.executor import Event, Job, Pool, Setup
from evomerge.space import load_space
from evomerge.spec import StudySpec
from evomerge.trial import Failure, Part, Score, TaskScore

ITEMS: Mapping[Part, int] = {"search": 40, "selection": 20, "report": 40}
Fault = Callable[[Job, int], Failure | None]
"""(job, how many jobs ran before it) -> what goes wrong with it, if anything."""
Scoring = Callable[[Recipe, Part, Sequence[str]], Score]
"""(recipe, part, names of the tasks) -> its score."""


def synthetic_spec(**changes: Any) -> StudySpec:
    """A small study of two sources and two tasks, for SyntheticExecutor."""
    document: dict[str, Any] = {
        "name": "synthetic",
        "base": "/models/base",
        "sources": {"add": "/models/add", "sort": "/models/sort"},
        "space": "source_depth",
        "objective": {"tasks": ["add", "sort"]},
        "sampler": {"name": "cmaes", "population": 4, "seed": 7},
        "budget": {"trials": 10, "finalists": 2},
    }
    return StudySpec.model_validate({**document, **changes})


def synthetic_inspection(spec: StudySpec) -> dict[str, Any]:
    """What a worker would have found."""
    paths = [spec.base, *spec.sources.values()]
    return {
        "digests": {path: hashlib.sha256(path.encode()).hexdigest() for path in paths},
        "dtype": "float32",
        "layers": 2,
        "space": load_space(spec.space).to_json(),
        "items": {task.task: [] for task in spec.objective.tasks},
        "metrics": {task.task: "acc,none" for task in spec.objective.tasks},
        "fingerprint": {"scorer": "synthetic"},
        "scorer_digest": "synthetic",
    }


def synthetic_score(recipe: Recipe, part: Part, tasks: Sequence[str]) -> Score:
    """Scores that are best where every source's mean weight is 0.5; items are 0 or 1.

    An item is right when the recipe's quality passes a level of its own, so that parts disagree
    a little, as real ones do.
    """
    quality = math.exp(-sum((_mean_weight(s.parameters) - 0.5) ** 2 for s in recipe.sources))
    quality -= abs(float(recipe.parameters.get("lambda", 1.0)) - 1) / 4
    return Score({task: _task_score(task, part, quality) for task in tasks})


class SyntheticExecutor:
    """Runs jobs in this process; `count` of them are under way at once."""

    def __init__(
        self,
        count: int = 1,
        *,
        seed: int = 0,
        fault: Fault = lambda job, before: None,
        score: Scoring = synthetic_score,
    ) -> None:
        self._count = count
        self._random = random.Random(seed)
        self._fault = fault
        self._score = score
        self._jobs: list[Job] = []
        self._tasks: list[str] = []
        self.ran = 0
        self.cancelled: list[str] = []

    def inspect(self, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        """See Executor.inspect."""
        return synthetic_inspection(StudySpec.model_validate(spec))

    def prepare(self, setup: Setup) -> None:
        """See Executor.prepare."""
        self._tasks = [task["task"] for task in setup.spec["objective"]["tasks"]]

    def free(self) -> int:
        """See Executor.free."""
        return self._count - len(self._jobs)

    def pool(self) -> Pool | None:
        """See Executor.pool."""
        return None

    def limit(self, count: int | None) -> None:
        """See Executor.limit. Nobody shares with it."""

    def submit(self, job: Job) -> None:
        """See Executor.submit."""
        self._jobs.append(job)

    def cancel(self, token: str) -> None:
        """See Executor.cancel."""
        self.cancelled.append(token)
        self._jobs = [job for job in self._jobs if job.token != token]

    def poll(self, timeout_s: float) -> Sequence[Event]:
        """See Executor.poll. Any one of the jobs under way is done, or none."""
        if not self._jobs:
            return []
        job = self._jobs.pop(self._random.randrange(len(self._jobs)))
        failure = self._fault(job, self.ran)
        self.ran += 1
        if failure is not None and failure.error == "Hangs":
            self._jobs.append(job)
            return []
        return [self._event(job, failure)]

    def alive(self) -> Collection[str]:
        """See Executor.alive."""
        return ()

    def close(self, *, now: bool) -> None:
        """See Executor.close."""
        self._jobs.clear()

    def _event(self, job: Job, failure: Failure | None) -> Event:
        worker = f"synthetic-{self.ran % self._count}"
        if failure is not None:
            bad = failure.error == "NonFiniteModel"
            return Event(job.token, worker, failure=failure, candidate=bad)
        score = self._score(Recipe.from_json(job.recipe), job.part, self._tasks)
        return Event(job.token, worker, score=score.to_json(), seconds={"score": 0.0})


@dataclass(frozen=True)
class Row:
    """What two runs of one study must agree on, bit for bit."""

    number: int
    state: str
    genome: tuple[float, ...] | None
    recipe_digest: str
    values: tuple[float, ...] | None
    outcomes: Mapping[str, Any]
    tell_order: int | None


def table(trials: Sequence[Any]) -> list[Row]:
    """The final trial table of a study, without what may differ: attempts, workers, times."""
    return [
        Row(
            trial.number,
            trial.state.value,
            trial.genome,
            trial.recipe_digest,
            trial.values,
            {part: score.to_json() for part, score in sorted(trial.scores.items())},
            trial.tell_order,
        )
        for trial in trials
    ]


def _mean_weight(parameters: Mapping[str, Any]) -> float:
    numbers = [float(leaf) for leaf in leaves(parameters.get("weight", 1.0))]
    return math.fsum(numbers) / len(numbers)


def _task_score(task: str, part: Part, quality: float) -> TaskScore:
    outcomes = tuple(float(quality > _level(task, part, i)) for i in range(ITEMS[part]))
    mean = math.fsum(outcomes) / len(outcomes)
    return TaskScore("acc", mean, None, len(outcomes), True, outcomes)


def _level(task: str, part: Part, index: int) -> float:
    digest = hashlib.sha256(f"{task}/{part}/{index}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
