"""The scorer's fingerprint: equal for what scores equally, different for what may not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml
from small_exam import Exam, task_configs

from evomerge.scoring.fingerprint import fingerprint_digest, scorer_fingerprint
from evomerge.scoring.tasks import LoadedTasks, load_tasks
from evomerge.spec import Objective


def digest(tasks: LoadedTasks, **changed: str | int) -> str:
    options = {"batch_size": 8, "dtype": "float32", "device": "cpu", "threads": 1} | changed
    return fingerprint_digest(scorer_fingerprint(tasks, **options))  # type: ignore[arg-type]


def load(exam: Exam, *tasks: object, **options: object) -> LoadedTasks:
    return load_tasks(
        Objective.model_validate({"tasks": tasks, "include_path": str(exam.tasks), **options})
    )


def test_what_may_change_scores_changes_the_digest(exam: Exam) -> None:
    tasks = load(exam, "choice_shots")
    digests = [
        digest(tasks),
        digest(tasks, batch_size=9),
        digest(tasks, dtype="bfloat16"),
        digest(tasks, device="cuda:1"),
        digest(tasks, threads=2),
        digest(tasks, share_context=False),
        digest(load(exam, "choice")),
        digest(load(exam, {"task": "choice", "metric": "acc_norm"})),
        digest(load(exam, "choice_shots", num_fewshot=1)),
        digest(load(exam, "generate")),
        digest(load(exam, {"task": "generate", "metric": "exact_match,tidy"})),
    ]
    assert len(set(digests)) == len(digests)


def test_devices_of_one_type_and_weights_of_tasks_do_not(exam: Exam) -> None:
    tasks = load(exam, "choice")
    assert digest(tasks, device="cuda:0") == digest(tasks, device="cuda:3")
    assert digest(load(exam, {"task": "choice", "weight": 3.0})) == digest(tasks)


def test_it_follows_the_data_and_not_where_it_lies(exam: Exam, tmp_path: Path) -> None:
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("test", "train")}
    for name, path in files.items():
        Path(path).write_bytes((exam.tasks / f"{name}.jsonl").read_bytes())
    config = {"task": "choice", **task_configs(files)["choice"]}
    (tmp_path / "choice.yaml").write_text(yaml.safe_dump(config))
    moved = dataclasses.replace(exam, tasks=tmp_path)
    assert digest(load(moved, "choice")) == digest(load(exam, "choice"))
    lines = Path(files["test"]).read_text().splitlines(keepends=True)
    Path(files["test"]).write_text("".join(lines[1:]))
    assert digest(load(moved, "choice")) != digest(load(exam, "choice"))
