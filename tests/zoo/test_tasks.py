"""The zoo's tasks as lm-eval sees them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.zoo.batches import exact_match, make_batch
from evomerge.zoo.recipe import ZooRecipe
from evomerge.zoo.skills import TARGET_SKILLS, Split, split_of
from evomerge.zoo.tasks import task_items, write_tasks
from evomerge.zoo.training import model_logits

_METRICS = {
    "compare": "acc,none",
    "reverse": "exact_match,none",
    "lexicon": "exact_match,none",
    "sort": "exact_match,none",
    "lexicon_loglikelihood": "acc,none",
}


def test_lm_eval_scores_every_task(tiny_zoo: Path) -> None:
    """Generation tasks score what one forward pass over the right answers says they do."""
    model = AutoModelForCausalLM.from_pretrained(tiny_zoo / "lexicon")
    tokenizer = AutoTokenizer.from_pretrained(tiny_zoo / "lexicon")
    results = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=40),
        tasks=list(_METRICS),
        task_manager=TaskManager(include_path=str(tiny_zoo / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    scores = {task: results["results"][task][metric] for task, metric in _METRICS.items()}
    items = task_items(ZooRecipe.tiny(), 0)
    for name in ("reverse", "lexicon", "sort"):
        own = exact_match(model_logits(model), make_batch(items[name]))
        assert scores[name] == pytest.approx(float(own.float().mean())), name
    assert 0.0 < scores["compare"] < 1.0
    assert scores["lexicon"] <= scores["lexicon_loglikelihood"]


def test_items_are_test_items_and_distinct(tiny_zoo: Path) -> None:
    for name in TARGET_SKILLS:
        lines = (tiny_zoo / "tasks" / "data" / f"{name}.jsonl").read_text().splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines]
        assert len(prompts) == len(set(prompts)) == ZooRecipe.tiny().task_items[name]
        assert {split_of(prompt) for prompt in prompts} == {Split.TEST}


def test_the_full_zoo_has_items_enough() -> None:
    counts = {name: len(items) for name, items in task_items(ZooRecipe(), 0).items()}
    assert counts == ZooRecipe().task_items
    assert set(counts) == set(TARGET_SKILLS)


def test_a_moved_folder_gets_new_paths_and_right_files_stay(tmp_path: Path) -> None:
    recipe = ZooRecipe.tiny()
    write_tasks(tmp_path / "old", recipe=recipe, seed=0)
    (tmp_path / "old").rename(tmp_path / "new")
    data = tmp_path / "new" / "data" / "sort.jsonl"
    before = data.stat().st_mtime_ns
    write_tasks(tmp_path / "new", recipe=recipe, seed=0)
    assert data.stat().st_mtime_ns == before
    yamls = sorted((tmp_path / "new").glob("*.yaml"))
    assert len(yamls) == len(_METRICS)
    for path in yamls:
        assert str(tmp_path / "new") in path.read_text()
        assert str(tmp_path / "old") not in path.read_text()
