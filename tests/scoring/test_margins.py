"""Margins of items whose log-likelihoods are made up, by hand and by what lm-eval makes of them."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from small_exam import Exam, task_configs

from evomerge.scoring.margins import Margins
from evomerge.scoring.tasks import LoadedTask, load_tasks
from evomerge.spec import Objective

METRICS = ["acc", "acc_norm", "acc_bytes", "acc_mutual_info"]
WORDS = ["a", "ää", "three", "vier Wörter"]


def task(exam: Exam, folder: Path, metrics: list[str], **changed: Any) -> Any:
    """A multiple choice task of lm-eval's, as it is loaded for a study."""
    files = {part: str(exam.tasks / f"{part}.jsonl") for part in ("test", "train")}
    listed = [{"metric": metric, "aggregation": "mean"} for metric in metrics]
    config = task_configs(files)["choice"] | {"doc_to_choice": WORDS, "metric_list": listed}
    (folder / "mine.yaml").write_text(yaml.safe_dump({"task": "mine", **config, **changed}))
    return load(folder, "mine").task


def load(folder: Path, name: str) -> LoadedTask:
    return load_tasks(Objective(tasks=[name], include_path=str(folder))).tasks[0]


def replies(*values: float) -> list[tuple[float, bool]]:
    return [(value, False) for value in values]


@pytest.mark.parametrize(
    ("metric", "margin"),
    [
        ("acc", -2.0 - -1.0),
        ("acc_norm", -2.0 / 2 - -1.0 / 1),
        ("acc_bytes", -2.0 / 4 - -12.0 / 12),
        ("acc_mutual_info", (-2.0 - -3.0) - (-5.0 - -5.5)),
    ],
)
def test_margins_by_hand(exam: Exam, tmp_path: Path, metric: str, margin: float) -> None:
    mine = task(exam, tmp_path, [metric])
    conditional = {"acc_bytes": replies(-9, -2, -5, -12)}.get(metric, replies(-1, -2, -5, -23))
    without = replies(-1, -3, -5.5, -23) if metric == "acc_mutual_info" else []
    found = Margins(mine, metric, [{"label": 1}]).mean([conditional + without])
    assert found == pytest.approx(margin, rel=1e-15)


@pytest.mark.parametrize("metric", METRICS)
def test_the_sign_of_a_margin_is_the_outcome(exam: Exam, tmp_path: Path, metric: str) -> None:
    """For each metric its own: normalised as for another, some signs would be wrong."""
    mine = task(exam, tmp_path, METRICS)
    random = Random(3)
    outcomes: dict[str, list[float]] = {m: [] for m in METRICS}
    for _ in range(300):
        doc = {"label": random.randrange(4)}
        said = replies(*(random.uniform(-3, 0) * len(w) ** 0.7 for w in WORDS * 2))
        results = mine.process_results(doc, said)
        margin = Margins(mine, metric, [doc]).mean([said])
        assert margin is not None
        assert (margin > 0) == (results[metric] == 1.0)
        for m in METRICS:
            outcomes[m].append(results[m])
    assert all(outcomes[m] != outcomes[metric] for m in METRICS if m != metric)


def test_several_right_choices_count_by_the_best(exam: Exam, tmp_path: Path) -> None:
    mine = task(exam, tmp_path, ["acc"])
    margins = Margins(mine, "acc", [{"label": [0, 3]}, {"label": 2}])
    assert margins.mean([replies(-4, -2, -3, -1), replies(-4, -2, -3, -1)]) == (1 - 2) / 2


def test_an_item_without_a_right_or_a_wrong_choice_is_left_out(exam: Exam, tmp_path: Path) -> None:
    mine = task(exam, tmp_path, ["acc"])
    docs = [{"label": -1}, {"label": [0, 1, 2, 3]}, {"label": 9}, {"label": 0}]
    assert Margins(mine, "acc", docs).mean([replies(-1, -2, -3, -4)] * 4) == 1.0
    assert Margins(mine, "acc", docs[:3]).mean([replies(-1, -2, -3, -4)] * 3) is None


def test_a_choice_without_length_leaves_nothing_to_divide_by(exam: Exam, tmp_path: Path) -> None:
    mine = task(exam, tmp_path, ["acc_norm"], doc_to_choice="choices")
    docs = [{"label": 0, "choices": ["", "b"]}, {"label": 0, "choices": ["a", "bc"]}]
    assert Margins(mine, "acc_norm", docs).mean([replies(-1, -2)] * 2) == -1 - -2 / 2
    assert Margins(mine, "acc", docs[:1]).mean([replies(-1, -2)]) == 1.0


def test_a_given_answers_margin_is_its_log_likelihood(exam: Exam) -> None:
    loaded = load(exam.tasks, "continue")
    for metric in ("acc", "perplexity"):
        margins = Margins(loaded.task, metric, [{}, {}])
        assert margins.mean([replies(-1.5), replies(-2.0)]) == -1.75


@pytest.mark.parametrize("name", ["generate", "rolling", "sampled"])
def test_other_answers_have_none(exam: Exam, name: str) -> None:
    loaded = load(exam.tasks, name)
    assert Margins(loaded.task, loaded.metric, [{}]).mean([["text"]]) is None


def test_where_a_tasks_own_code_scores_there_is_none(
    exam: Exam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_TRUSTED_TASKS", str(tmp_path))
    (tmp_path / "own.py").write_text("def results(doc, results):\n    return {'acc': 1.0}\n")
    own = task(exam, tmp_path, ["acc"])
    assert Margins(own, "acc", [{"label": 0}]).mean([replies(-1, -2, -3, -4)]) == 1.0
    text = (tmp_path / "mine.yaml").read_text() + "process_results: !function own.results\n"
    (tmp_path / "mine.yaml").write_text(text)
    own = load(tmp_path, "mine").task
    assert Margins(own, "acc", [{"label": 0}]).mean([replies(-1, -2, -3, -4)]) is None
