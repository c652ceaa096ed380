"""The resident scorer against lm-eval itself, item by item."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_exam import BATCH_SIZE, ITEMS, Exam, random_llama

from evomerge.errors import NonFiniteModel, OutOfMemory, TaskError
from evomerge.scoring.resident import ResidentScorer, auto_batch_size
from evomerge.scoring.tasks import LoadedTasks, load_tasks, silence
from evomerge.spec import PARTS, Evaluation, Objective
from evomerge.trial import Score

OBJECTIVE = [
    {"task": "choice", "metric": "acc_norm"},
    {"task": "choice_shots"},
    {"task": "continue", "metric": "acc"},
    {"task": "generate", "metric": "exact_match,tidy"},
]
OTHERS = [{"task": "continue", "metric": "perplexity"}, {"task": "rolling"}, {"task": "beams"}]
Samples = dict[str, list[dict[str, Any]]]


def objective(exam: Exam, tasks: list[Any]) -> Objective:
    return Objective(tasks=tasks, include_path=str(exam.tasks))


@pytest.fixture(scope="module")
def tasks(exam: Exam) -> LoadedTasks:
    return load_tasks(objective(exam, OBJECTIVE))


def scorer(exam: Exam, tasks: LoadedTasks | None = None, **options: Any) -> ResidentScorer:
    wanted = options.pop("objective", None) or objective(exam, OBJECTIVE)
    model, tokenizer = exam.load(options.pop("dtype", torch.float32))
    evaluation = Evaluation(batch_size=BATCH_SIZE, **options)
    return ResidentScorer(model, tokenizer, wanted, evaluation, tasks=tasks)


def cold_run(exam: Exam, names: list[str], output: Path, dtype: str = "float32") -> Samples:
    """The `lm_eval` command in a fresh process; its samples in the order of the items."""
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={exam.checkpoint},dtype={dtype}"]
    command += ["--tasks", ",".join(names), "--include_path", str(exam.tasks)]
    command += ["--batch_size", str(BATCH_SIZE), "--log_samples", "--output_path", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    samples = {}
    for name in names:
        (path,) = output.glob(f"**/samples_{name}_[0-9]*.jsonl")
        samples[name] = [json.loads(line) for line in path.read_text().splitlines()]
    return in_order(samples)


def warm_run(model: Any, tokenizer: Any, exam: Exam, names: list[str]) -> Samples:
    """`lm_eval.simple_evaluate` on a live model, with tasks loaded afresh."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with silence():
        results = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE),
            tasks=names,
            task_manager=TaskManager(include_path=str(exam.tasks), include_defaults=False),
            bootstrap_iters=0,
        )
    return in_order(results["samples"])


def in_order(samples: Samples) -> Samples:
    return {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in samples.items()}


def outcomes_of(samples: Samples, task: str, metric: str, filter_: str = "none") -> list[float]:
    return [row[metric] for row in samples[task] if row["filter"] == filter_]


def assert_equal(score: Score, samples: Samples) -> None:
    expected = {
        "choice": outcomes_of(samples, "choice", "acc_norm"),
        "choice_shots": outcomes_of(samples, "choice_shots", "acc"),
        "continue": outcomes_of(samples, "continue", "acc"),
        "generate": outcomes_of(samples, "generate", "exact_match", "tidy"),
    }
    assert {name: list(task.outcomes) for name, task in score.tasks.items()} == expected


def assert_margins(score: Score, samples: Samples) -> None:
    """Margins worked out by hand from the log-likelihoods that lm-eval logged."""
    expected = {
        "choice": mean(choice_margins(samples["choice"], len)),
        "choice_shots": mean(choice_margins(samples["choice_shots"], lambda _: 1)),
        "continue": mean([likelihoods(row)[0] for row in samples["continue"]]),
    }
    assert score.tasks["generate"].margin is None
    for name, margin in expected.items():
        assert score.tasks[name].margin == pytest.approx(margin, rel=1e-6, abs=1e-5)


def choice_margins(rows: list[dict[str, Any]], length: Callable[[str], int]) -> list[float]:
    margins = []
    for row in rows:
        choices = row["doc"]["choices"]
        values = [v / length(c) for v, c in zip(likelihoods(row), choices, strict=True)]
        right = values.pop(row["doc"]["label"])
        margins.append(right - max(values))
    return margins


def likelihoods(row: dict[str, Any]) -> list[float]:
    return [float(reply[0]) for reply in row["filtered_resps"]]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outcomes_equal_a_cold_run_item_by_item(exam: Exam, tmp_path: Path, dtype: str) -> None:
    samples = cold_run(exam, [entry["task"] for entry in OBJECTIVE], tmp_path, dtype)
    score = scorer(exam, dtype=getattr(torch, dtype)).score_all()
    assert_equal(score, samples)
    assert_margins(score, samples)
    for task in score.tasks.values():
        assert 0 < sum(task.outcomes) < ITEMS  # outcomes that differ, or nothing was compared


@pytest.mark.parametrize("share_context", [True, False])
def test_replies_equal_those_of_lm_eval(
    exam: Exam, tasks: LoadedTasks, share_context: bool
) -> None:
    """Not only the outcomes: the texts, and the log-likelihoods to 1e-5.

    With shared contexts to one in 10^6: on these weights that is what lm-eval's own differ by
    between one batch size and another.
    """
    resident = scorer(exam, tasks, share_context=share_context)
    samples = warm_run(*exam.load(), exam, [task.name for task in tasks.tasks])
    resident.score_all()
    for task in tasks.tasks:
        rows = [row for row in samples[task.name] if row["filter"] == task.filter]
        for row, requests in zip(rows, task.requests, strict=True):
            for theirs, request in zip(row["resps"], requests, strict=True):
                rel = 1e-6 if share_context and not isinstance(theirs[0], str) else None
                assert request.resps[0] == pytest.approx(theirs[0], abs=1e-5, rel=rel)


def test_one_scorer_serves_many_weight_vectors(exam: Exam, tasks: LoadedTasks) -> None:
    resident = scorer(exam, tasks)
    model = resident._engine.model
    first = resident.score_all()
    for seed in (2, 3):
        model.load_state_dict(random_llama(seed).state_dict())
        fresh, tokenizer = exam.load()
        fresh.load_state_dict(model.state_dict())
        names = [task.name for task in tasks.tasks]
        samples = warm_run(fresh, tokenizer, exam, names)
        assert_equal(resident.score_all(), samples)
        assert_margins(resident.score_all(), samples)
    model.load_state_dict(exam.load()[0].state_dict())
    assert resident.score_all() == first


def test_a_part_gives_the_outcomes_of_the_whole_for_its_items(
    exam: Exam, tasks: LoadedTasks
) -> None:
    resident = scorer(exam, tasks)
    whole = resident.score_all()
    for part in PARTS:
        score = resident.score(part)
        for name, places in tasks.positions(part).items():
            outcomes = whole.tasks[name].outcomes
            assert score.tasks[name].outcomes == tuple(outcomes[i] for i in places)
            assert score.tasks[name].value == pytest.approx(
                sum(score.tasks[name].outcomes) / len(places)
            )
    counts = [sum(len(tasks.positions(part)["choice"]) for part in PARTS)]
    assert counts == [ITEMS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_again_gives_the_same_score(exam: Exam, dtype: torch.dtype) -> None:
    wanted = objective(exam, [*OBJECTIVE, {"task": "sampled"}])
    resident = scorer(exam, objective=wanted, dtype=dtype)
    first = [resident.score(part) for part in PARTS]
    torch.rand(7)  # other people's random numbers must not matter
    assert [resident.score(part) for part in PARTS] == first
    assert [scorer(exam, objective=wanted, dtype=dtype).score(part) for part in PARTS] == first


def test_tasks_beyond_the_prepared_batches_go_through_lm_eval(exam: Exam) -> None:
    resident = scorer(exam, objective=objective(exam, OTHERS))
    score = resident.score_all()
    samples = warm_run(*exam.load(), exam, ["continue", "rolling", "beams"])
    assert list(score.tasks["beams"].outcomes) == outcomes_of(samples, "beams", "exact_match")
    theirs = [
        -row["bits_per_byte"][0] / row["bits_per_byte"][1] / 0.6931471805599453
        for row in samples["rolling"]
    ]
    assert list(score.tasks["rolling"].outcomes) == pytest.approx(theirs, rel=1e-6)
    assert not score.tasks["rolling"].higher_is_better
    assert score.tasks["continue"].stderr is None  # lm-eval has only its bootstrap for perplexity


def test_values_and_standard_errors_are_lm_evals(exam: Exam, tasks: LoadedTasks) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = exam.load()
    with silence():
        results = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE),
            tasks=["choice", "generate"],
            task_manager=TaskManager(include_path=str(exam.tasks), include_defaults=False),
        )["results"]
    score = scorer(exam, tasks).score_all()
    for name, key in (("choice", "acc_norm{},none"), ("generate", "exact_match{},tidy")):
        assert score.tasks[name].value == results[name][key.format("")]
        assert score.tasks[name].stderr == results[name][key.format("_stderr")]


@pytest.mark.parametrize("task", ["choice", "generate", "beams", "rolling"])
def test_a_model_that_computes_nan_is_named(exam: Exam, task: str) -> None:
    resident = scorer(exam, objective=objective(exam, [task]))
    with torch.no_grad():
        resident._engine.model.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteModel, match="NaN or infinity"):
        resident.score("search")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_no_fault_of_the_candidate(
    exam: Exam, tasks: LoadedTasks, error: Exception
) -> None:
    resident = scorer(exam, tasks)

    def explode(*_: Any, **__: Any) -> None:
        raise error

    resident._engine.model.register_forward_pre_hook(explode)
    with pytest.raises(OutOfMemory, match="batch_size"):
        resident.score("search")


@pytest.mark.parametrize(
    ("task", "changed", "told"),
    [
        ("continue", {"doc_to_target": ""}, "an answer to score has 0 tokens"),
        ("continue", {"doc_to_target": "a" * 65}, "65 tokens, expected 1 to 64"),
        ("generate", {"doc_to_text": ""}, "no tokens"),
        ("generate", {"generation_kwargs": {"max_gen_toks": 64}}, "leaves no room for a prompt"),
    ],
)
def test_requests_that_no_model_could_answer_are_named(
    exam: Exam, tmp_path: Path, task: str, changed: dict[str, Any], told: str
) -> None:
    config = yaml.safe_load((exam.tasks / f"{task}.yaml").read_text()) | changed
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    mine = Objective(tasks=[task], include_path=str(tmp_path))
    with pytest.raises(TaskError, match=told):
        scorer(exam, objective=mine).score("search")


def test_long_prompts_are_cut_as_lm_eval_cuts_them(exam: Exam, tmp_path: Path) -> None:
    names = ["choice", "continue", "generate"]
    for name in names:
        config = yaml.safe_load((exam.tasks / f"{name}.yaml").read_text())
        config["doc_to_text"] = "{{prompt * 4}}"
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    long = Exam(exam.checkpoint, tmp_path)
    resident = scorer(long, objective=objective(long, names))
    score = resident.score_all()
    samples = warm_run(*exam.load(), long, names)
    assert list(score.tasks["choice"].outcomes) == outcomes_of(samples, "choice", "acc")
    assert list(score.tasks["continue"].outcomes) == outcomes_of(samples, "continue", "acc")
    texts = [row["resps"][0][0] for row in samples["generate"] if row["filter"] == "raw"]
    ours = [item[0].resps[0] for item in resident._tasks.tasks[2].requests]
    assert ours == texts


def test_automatic_batch_size_depends_on_the_items_only() -> None:
    assert auto_batch_size(20) == 128
    assert auto_batch_size(1000) == 8
    assert auto_batch_size(100_000) == 1


def test_nothing_reaches_standard_output(exam: Exam, capfd: pytest.CaptureFixture[str]) -> None:
    scorer(exam, objective=objective(exam, [*OBJECTIVE, "rolling", "sampled"])).score("search")
    assert capfd.readouterr().out == ""
