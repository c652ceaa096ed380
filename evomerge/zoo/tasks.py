"""The zoo's exams: test items as JSON lines and the lm-eval tasks that read them.

Knows nothing of models. lm-eval resolves a relative data path against the working directory and
not against the YAML, so the tasks hold absolute paths, and `write_tasks` renews them when the
zoo was moved.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

from evomerge.zoo.recipe import ZooRecipe
from evomerge.zoo.skills import (
    COMPARE_ANSWERS,
    TARGET_SKILLS,
    Item,
    Split,
    distinct_items,
    make_skills,
)
from evomerge.zoo.vocabulary import EOS

_LONGEST_ANSWER_TOKENS = 8


def write_tasks(directory: Path, *, recipe: ZooRecipe, seed: int) -> None:
    """Write the task YAMLs and their data into `directory`, touching no file that is right."""
    data = directory.resolve() / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, items in task_items(recipe, seed).items():
        rows = [_row(item) for item in items]
        _write_if_changed(data / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for task, skill, make in _TASKS:
        config = _common(task, data / f"{skill}.jsonl") | make()
        _write_if_changed(directory / f"{task}.yaml", yaml.safe_dump(config, sort_keys=False))


def task_items(recipe: ZooRecipe, seed: int) -> dict[str, list[Item]]:
    """Return the test items of each target skill, as many as `recipe.task_items` says."""
    skills = make_skills(seed)
    return {
        name: distinct_items(
            skills[name], Split.TEST, recipe.task_items[name], Random(f"{seed} {name} test")
        )
        for name in TARGET_SKILLS
    }


def _row(item: Item) -> dict[str, str | int]:
    row: dict[str, str | int] = {"prompt": item.prompt, "answer": item.answer}
    if item.answer in COMPARE_ANSWERS:
        row["label"] = COMPARE_ANSWERS.index(item.answer)
    return row


def _common(task: str, data: Path) -> dict[str, Any]:
    return {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
        "metadata": {"version": 1.0},
    }


def _multiple_choice() -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_target": "label",
        "doc_to_choice": list(COMPARE_ANSWERS),
        "metric_list": [_mean_of("acc")],
    }


def _generation() -> dict[str, Any]:
    # One token more than the longest answer: an answer that does not end is wrong.
    return {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": [EOS],
            "do_sample": False,
            "max_gen_toks": _LONGEST_ANSWER_TOKENS + 1,
        },
        "metric_list": [_mean_of("exact_match")],
    }


def _loglikelihood() -> dict[str, Any]:
    return {
        "output_type": "loglikelihood",
        "doc_to_target": "{{answer}}",
        "metric_list": [_mean_of("acc")],
    }


def _mean_of(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


_TASKS: tuple[tuple[str, str, Callable[[], dict[str, Any]]], ...] = (
    ("compare", "compare", _multiple_choice),
    ("reverse", "reverse", _generation),
    ("lexicon", "lexicon", _generation),
    ("sort", "sort", _generation),
    ("lexicon_loglikelihood", "lexicon", _loglikelihood),
)


def _write_if_changed(path: Path, text: str) -> None:
    if path.exists() and path.read_text() == text:
        return
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text)
    aside.replace(path)
