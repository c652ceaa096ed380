"""Scores of recipes and artifacts of fits on one zoo, each made once and kept in a folder.

One process holds one live model, which every recipe is written into. Knows nothing of which recipes
are tried and what is shown of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from kept import Kept
from method_grids import Settings

from evomerge.calibration import CalibrationSpec, load_calibration
from evomerge.checkpoints.adapted import open_models
from evomerge.errors import CandidateError
from evomerge.merging.fitted import registry
from evomerge.merging.fitted.artifact import Artifact, open_artifact
from evomerge.merging.fitted.base import Problem, fit, provenance
from evomerge.merging.materialise import Materialiser, load_model
from evomerge.merging.methods.registry import METHODS
from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.scoring.resident import ResidentScorer
from evomerge.spec import Evaluation, Objective
from evomerge.trial import Part, Score
from evomerge.zoo.recipe import ZooRecipe

TASKS = tuple(ZooRecipe().experts)
WEIGHTS = dict.fromkeys(TASKS, 1.0)
EXAMPLES = 150
"""Of each task's search items, for every fit: some fifty of the smallest task are left to choose
settings on."""
CHOSEN_ON: tuple[Part, ...] = ("selection", "search")


class ZooScores:
    """Everything that is measured on one zoo.

    `chosen_on` counts the items that settings are chosen on: search and selection items that no fit
    has seen. Times are CPU seconds of one thread.
    """

    def __init__(self, zoo: Path, folder: Path) -> None:
        self.zoo = zoo.resolve()
        self.seed = int(json.loads((zoo / "zoo.json").read_text())["seed"])
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._kept = Kept(folder / "results.jsonl")
        self._paths = {name: str(self.zoo / name) for name in ("base", *TASKS)}
        self._models = open_models(self._paths.values())
        self._digests = {path: model.scan().digest for path, model in self._models.items()}
        self._model, self._tokenizer = load_model(self._models[self._paths["base"]])
        self._materialiser = Materialiser(self._model, self._models)
        self.objective = Objective.model_validate(
            {"tasks": list(TASKS), "include_path": str(self.zoo / "tasks")}
        )
        self._scorer = ResidentScorer(self._model, self._tokenizer, self.objective, Evaluation())
        items = json.dumps(self._scorer.items(), sort_keys=True).encode()
        self._items = hashlib.sha256(items).hexdigest()

    def recipe(
        self,
        method: str,
        parameters: Settings,
        sources: Sequence[str] = TASKS,
        artifact: Artifact | None = None,
    ) -> Recipe:
        """A recipe of the zoo's models, all by their contents' digests."""
        paths = self._paths
        base = ModelRef(paths["base"])
        named = tuple(Source(name, ModelRef(paths[name])) for name in sources)
        fitted = ModelRef(str(artifact.folder), artifact.digest) if artifact else None
        recipe = Recipe(method, base, named, parameters, artifact=fitted)
        return recipe.with_digests(self._digests)

    def items(self) -> Mapping[str, Sequence[str]]:
        """For each task the content hashes of its items."""
        return self._scorer.items()

    def merit(self, recipe: Recipe, parts: Sequence[Part] = CHOSEN_ON) -> float:
        """Mean over the tasks of the accuracy on items of these parts that no fit has seen; -inf
        where the recipe makes no model."""
        outcomes: dict[str, list[float]] = {task: [] for task in TASKS}
        for part in parts:
            score = self.score(recipe, part)
            if score is None:
                return -math.inf
            for task, places in self._free[part].items():
                outcomes[task] += [score.tasks[task].outcomes[place] for place in places]
        return math.fsum(sum(found) / len(found) for found in outcomes.values()) / len(TASKS)

    @property
    def chosen_on(self) -> int:
        return sum(len(places) for part in self._free.values() for places in part.values())

    def score(self, recipe: Recipe, part: Part) -> Score | None:
        """The score on one part of the items; None where the recipe makes no model."""

        def make() -> Any:
            try:
                self._materialiser.write(recipe)
                return self._scorer.score(part).to_json()
            except CandidateError as error:
                print(f"seed {self.seed}: {recipe.method}: {error}", flush=True)
                return None

        found = self._kept.get(f"{recipe.digest} {self._items} {part}", make)
        return found and Score.from_json(found)

    def merge_seconds(self, recipe: Recipe) -> float:
        """What it takes to write the recipe into the model, nothing being known beforehand."""

        def make() -> float:
            self._materialiser = Materialiser(self._model, self._models)
            started = time.process_time()
            self._materialiser.write(recipe)
            return time.process_time() - started

        return float(self._kept.get(f"{recipe.digest} merge", make))

    def evaluation_seconds(self) -> float:
        """What it takes to score the live model on search and selection items."""

        def make() -> float:
            for part in CHOSEN_ON:
                self._scorer.score(part)  # laid out in batches, once for all
            started = time.process_time()
            for part in CHOSEN_ON:
                self._scorer.score(part)
            return time.process_time() - started

        return float(self._kept.get("evaluation", make))

    def fitted(self, method: str, settings: Settings) -> Artifact:
        """The artifact of a method's fit with these settings."""
        kind = METHODS[method].artifact
        assert kind is not None
        fitter = registry.get(kind)
        checked = fitter.settings.model_validate(settings)
        purpose = provenance(fitter, self._problem, checked).purpose
        folder = self._folder / f"{kind}-{hashlib.sha256(purpose.encode()).hexdigest()[:16]}"

        def make() -> float:
            started = time.process_time()
            if not folder.exists():
                fit(fitter, self._problem, checked, folder)
            return time.process_time() - started

        self._kept.get(f"{folder.name} fit", make)
        return open_artifact(folder)

    def fit_seconds(self, artifact: Artifact) -> float:
        """What the fit took."""
        return float(self._kept.get(f"{artifact.folder.name} fit", lambda: math.nan))

    @cached_property
    def _problem(self) -> Problem:
        faults: list[str] = []
        tasks = str(self.zoo / "tasks")
        entries = {
            task: {"task": task, "part": "search", "include_path": tasks, "count": EXAMPLES}
            for task in TASKS
        }
        spec = CalibrationSpec.read(entries, TASKS, self.zoo, faults)
        assert spec is not None, faults
        names = sorted(TASKS)
        return Problem(
            self._models[self._paths["base"]],
            {name: self._models[self._paths[name]] for name in names},
            self._digests,
            load_calibration(spec, names, self._tokenizer),
        )

    @cached_property
    def _free(self) -> Mapping[Part, Mapping[str, list[int]]]:
        """For each part and task the places, among its outcomes, of items that no fit has seen."""
        from evomerge.scoring.splits import part_of

        seen = set(self._problem.calibration.items)
        found: dict[Part, dict[str, list[int]]] = {}
        for part in CHOSEN_ON:
            found[part] = {}
            for task, hashes in self._scorer.items().items():
                own = [h for h in hashes if part_of(h, self.objective.split) == part]
                found[part][task] = [place for place, h in enumerate(own) if h not in seen]
        return found
