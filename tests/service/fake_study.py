"""Studies made of numbers drawn on the spot, shaped like real ones, for tests of what users see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.service.baselines import baselines
from evomerge.service.verdict import to_score
from evomerge.store.base import StudyRecord
from evomerge.trial import Attempt, Failure, Part, Score, State, TaskScore, Trial

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
BASE_DIGEST = "ab" * 32
ITEMS: Mapping[Part, int] = {"search": 80, "selection": 40, "report": 80}


def record(
    tasks: Sequence[str] = ("add", "reverse", "sort"),
    sources: Sequence[str] = ("add", "reverse", "sort"),
    *,
    name: str = "zoo-ties",
    trials: int = 60,
    layers: int = 4,
    aggregate: str = "mean",
) -> StudyRecord:
    spec = {
        "name": name,
        "base": "zoo/base",
        "sources": {source: f"zoo/{source}" for source in sources},
        "space": {"method": "task_arithmetic"},
        "objective": {
            "tasks": [{"task": task, "metric": "acc", "weight": 1.0} for task in tasks],
            "split": {"search": 0.4, "selection": 0.2, "report": 0.4},
            "aggregate": aggregate,
        },
        "sampler": {"name": "cmaes", "population": "auto", "sigma0": 0.1667, "seed": 7},
        "budget": {"trials": trials, "finalists": 8},
        "evaluation": {"dtype": "bfloat16", "batch_size": "auto", "device": "auto"},
    }
    inspection: dict[str, Any] = {
        "layers": layers,
        "tensors": tensors(layers),
        "dtype": "bfloat16",
        "digests": {"zoo/base": BASE_DIGEST},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "lm_eval": "0.4.13"},
    }
    return StudyRecord(name, spec, inspection, "cd" * 32, START)


def tensors(layers: int) -> list[str]:
    inner = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "input_layernorm")
    names = [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in inner]
    return ["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"]


def task_score(right: float, n: int, rng: np.random.Generator) -> TaskScore:
    outcomes = tuple(float(x) for x in rng.random(n) < right)
    return outcomes_score(outcomes)


def outcomes_score(outcomes: tuple[float, ...], *, higher_is_better: bool = True) -> TaskScore:
    n, value = len(outcomes), float(np.mean(outcomes))
    stderr = float(np.std(outcomes, ddof=1) / np.sqrt(n))
    return TaskScore("acc", value, stderr, n, higher_is_better, outcomes)


def scored(
    trial: Trial, part: Part, skills: Mapping[str, float], rng: np.random.Generator, start_s: float
) -> Trial:
    """The trial with a score and an attempt on the part, each task right with its probability."""
    score = Score({task: task_score(p, ITEMS[part], rng) for task, p in skills.items()})
    started = START + timedelta(seconds=start_s)
    attempt = Attempt(
        trial.number,
        part,
        1,
        f"{trial.number}-{part}",
        State.COMPLETE,
        f"worker-{trial.number % 2}",
        started,
        started + timedelta(seconds=900),
        started + timedelta(seconds=1.9),
        {"materialise": 0.2, "score": 1.5},
    )
    changes: dict[str, Any] = {
        "scores": {**trial.scores, part: score},
        "attempts": (*trial.attempts, attempt),
    }
    if part == "search":
        values = score.values(dict.fromkeys(skills, 1.0), pareto=False)
        changes |= {"state": State.COMPLETE, "values": values}
    return replace(trial, **changes)


def waiting(study: StudyRecord) -> list[Trial]:
    """The study's baselines, not yet scored."""
    sources = {name: ModelRef(path) for name, path in study.spec["sources"].items()}
    return [
        Trial(n.number, n.kind, n.label, None, n.recipe, n.recipe_digest, State.WAITING)
        for n in baselines(ModelRef(study.spec["base"]), sources, "bfloat16")
    ]


def searched(
    study: StudyRecord, *, strength: float = 0.85, seed: int = 0, fail_every: int = 0
) -> list[Trial]:
    """A study whose search is over and that is scored no further; the best reach `strength`."""
    rng = np.random.default_rng(seed)
    tasks = [task["task"] for task in study.spec["objective"]["tasks"]]
    trials = [
        scored(t, "search", _baseline_skills(t, tasks), rng, 2.0 * t.number) for t in waiting(study)
    ]
    first = len(trials)
    for i in range(study.spec["budget"]["trials"]):
        trial = search_trial(study, first + i, rng)
        if fail_every and i % fail_every == fail_every - 1:
            failure = Failure("NonFiniteModel", "layer 3 computes NaN")
            trials.append(replace(trial, state=State.FAIL, failure=failure))
            continue
        level = strength - 0.35 * np.exp(-3 * i / study.spec["budget"]["trials"])
        spread = rng.normal(0, 0.05, len(tasks))
        skills = {
            t: float(np.clip(level + s, 0.02, 0.98)) for t, s in zip(tasks, spread, strict=True)
        }
        trials.append(scored(trial, "search", skills, rng, 2.0 * trial.number))
    if study.spec["objective"]["aggregate"] == "pareto":
        weights = dict.fromkeys(tasks, 1.0)
        trials = [_with_all_values(t, weights) for t in trials]
    return trials


def finished(
    study: StudyRecord, *, strength: float = 0.85, seed: int = 0, fail_every: int = 0
) -> list[Trial]:
    """The same study with finalists and baselines scored on selection and report items."""
    trials = searched(study, strength=strength, seed=seed, fail_every=fail_every)
    rng = np.random.default_rng(seed + 1)
    tasks = [task["task"] for task in study.spec["objective"]["tasks"]]
    weights, clock_s = dict.fromkeys(tasks, 1.0), 2.0 * len(trials)
    while todo := to_score(trials, study.spec["budget"]["finalists"], weights):
        for trial, part in todo:
            skills = (
                dict.fromkeys(tasks, strength)
                if trial.kind == "search"
                else _baseline_skills(trial, tasks)
            )
            clock_s += 2.0
            trials[trial.number] = scored(trials[trial.number], part, skills, rng, clock_s)
    return trials


def search_trial(study: StudyRecord, number: int, rng: np.random.Generator) -> Trial:
    """A waiting trial of the default kind of space: curves over depth, by source and type."""
    genome = tuple(float(g) for g in rng.random(12))
    sources = tuple(
        Source(name, ModelRef(path), {"weight": _curves(rng)})
        for name, path in study.spec["sources"].items()
    )
    base = ModelRef("zoo/base", BASE_DIGEST)
    recipe = Recipe("task_arithmetic", base, sources, {"lambda": 1.0}, dtype="bfloat16")
    return Trial(number, "search", "", genome, recipe.to_json(), recipe.digest, State.WAITING)


def _curves(rng: np.random.Generator) -> list[dict[str, Any]]:
    knots = {kind: rng.uniform(-0.1, 1.0, 3).tolist() for kind in ("attention", "mlp", "norm")}
    rules: list[dict[str, Any]] = [{"type": kind, "value": value} for kind, value in knots.items()]
    return [*rules, {"value": float(rng.uniform(0, 1))}]


def _baseline_skills(trial: Trial, tasks: Sequence[str]) -> dict[str, float]:
    if trial.kind == "base":
        return dict.fromkeys(tasks, 0.2)
    if trial.kind == "source":
        return {task: 0.95 if task == trial.label else 0.25 for task in tasks}
    if trial.kind == "uniform":
        return dict.fromkeys(tasks, 0.5)
    scale = float(trial.label.split()[-1])
    return dict.fromkeys(tasks, 0.6 - (scale - 0.4) ** 2)


def _with_all_values(trial: Trial, weights: Mapping[str, float]) -> Trial:
    if "search" not in trial.scores:
        return trial
    return replace(trial, values=trial.scores["search"].values(weights, pareto=True))
