"""Loading tasks: what is found where, and every way in which a task can be unusable."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_exam import ITEMS, Exam, task_configs

from evomerge.errors import TaskError
from evomerge.scoring.tasks import LoadedTasks, load_tasks
from evomerge.spec import PARTS, Objective, Split


def load(include_path: Path | None, *tasks: Any, **options: Any) -> LoadedTasks:
    folder = None if include_path is None else str(include_path)
    return load_tasks(Objective(tasks=tasks, include_path=folder, **options))


def problem(include_path: Path | None, *tasks: Any, **options: Any) -> str:
    with pytest.raises(TaskError) as caught:
        load(include_path, *tasks, **options)
    return str(caught.value)


@pytest.fixture
def folder(exam: Exam, tmp_path: Path) -> Path:
    """A folder of tasks of its own, on the exam's data."""
    return tmp_path


def write(folder: Path, exam: Exam, name: str = "mine", **changed: Any) -> Path:
    files = {part: str(exam.tasks / f"{part}.jsonl") for part in ("test", "train")}
    config = {"task": name, **task_configs(files)["choice"], **changed}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_items_come_in_order_with_their_metric(exam: Exam) -> None:
    loaded = load(exam.tasks, {"task": "choice", "metric": "acc_norm"}, "continue")
    assert [(t.name, t.metric, t.filter) for t in loaded.tasks] == [
        ("choice", "acc_norm", "none"),
        ("continue", "acc", "none"),
    ]
    prompts = [json.loads(line)["prompt"] for line in (exam.tasks / "test.jsonl").open()]
    assert [item[0].doc["prompt"] for item in loaded.tasks[0].requests] == prompts
    assert loaded.items()["choice"] == loaded.items()["continue"]


def test_parts_are_disjoint_and_complete(exam: Exam) -> None:
    loaded = load(exam.tasks, "choice")
    places = [i for part in PARTS for i in loaded.positions(part)["choice"]]
    assert sorted(places) == list(range(ITEMS))


def test_few_shot_prompts_are_those_of_a_fresh_run(exam: Exam) -> None:
    """Loading twice draws the same examples; lm-eval's own sampler would move on."""
    one, two = (load(exam.tasks, "choice_shots").tasks[0].requests for _ in range(2))
    assert [r.args for item in one for r in item] == [r.args for item in two for r in item]
    assert len(one[0][0].args[0]) > len(load(exam.tasks, "choice").tasks[0].requests[0][0].args[0])


def test_num_fewshot_does_not_override_a_tasks_own_zero(exam: Exam, folder: Path) -> None:
    write(folder, exam, "open", num_fewshot=None, fewshot_split="train")
    shots = {
        t.name: t.task.config.num_fewshot
        for t in load(folder, "open", str(exam.tasks / "choice.yaml"), num_fewshot=3).tasks
    }
    assert shots == {"open": 3, str(exam.tasks / "choice.yaml"): 0}


def test_a_task_may_be_a_path(exam: Exam) -> None:
    path = str(exam.tasks / "choice.yaml")
    assert load(None, path).tasks[0].hashes == load(exam.tasks, "choice").tasks[0].hashes
    assert "no such task file: /nowhere/x.yaml" in problem(None, "/nowhere/x.yaml")


@pytest.mark.slow
def test_an_unknown_task_names_the_nearest_and_broken_files(exam: Exam, folder: Path) -> None:
    write(folder, exam, "spelling")
    (folder / "broken.yaml").write_text("task: [unclosed")
    told = problem(folder, "speling", "broken")
    assert "unknown task 'speling'; did you mean 'spelling'?" in told
    assert "unknown task 'broken'" in told
    assert "broken.yaml, line 1: not YAML" in told
    assert told.startswith("3 problems")


def test_a_path_that_does_not_parse(folder: Path) -> None:
    path = folder / "broken.yaml"
    path.write_text("task: [unclosed")
    assert "is not a task file" in problem(None, str(path))


def test_every_problem_is_reported_at_once(exam: Exam, folder: Path) -> None:
    write(folder, exam, "a", dataset_kwargs={"data_files": {"test": "/nowhere/a.jsonl"}})
    write(folder, exam, "b")
    told = problem(folder, "a", {"task": "b", "metric": "acuracy"}, "b2.yaml")
    assert "task 'a': data file missing" in told
    assert "/nowhere/a.jsonl" in told
    assert "task 'b': unknown metric 'acuracy'; did you mean 'acc'?" in told
    assert "no such task file: b2.yaml" in told


def test_unknown_metrics_and_filters(exam: Exam) -> None:
    assert "did you mean 'acc_norm'" in problem(exam.tasks, {"task": "choice", "metric": "acc_nrm"})
    told = problem(exam.tasks, {"task": "generate", "metric": "exact_match,tidi"})
    assert "unknown filter 'tidi'; did you mean 'tidy'?" in told


def test_a_metric_that_only_a_script_could_give_is_refused(exam: Exam, folder: Path) -> None:
    """lm-eval would hand the name to `evaluate.load`, which runs a script of that name."""
    marker = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    write(folder, exam, metric_list=[{"metric": str(folder / "evil.py")}])
    assert "unknown metric" in problem(folder, "mine")
    assert not marker.exists()


def test_groups_and_tags_name_their_members(exam: Exam, folder: Path) -> None:
    write(folder, exam, "one", tag="pair")
    write(folder, exam, "two", tag="pair")
    (folder / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["one", "two"]}))
    told = problem(folder, "both", "pair")
    assert (
        "task 'both': is a group of tasks; list its members, each with its weight: one, two" in told
    )
    assert "task 'pair': is a tag of tasks" in told


def test_too_few_items(exam: Exam, folder: Path) -> None:
    lines = (exam.tasks / "test.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(lines[:3]))
    write(folder, exam, dataset_kwargs={"data_files": {"test": str(folder / "few.jsonl")}})
    assert "too few items: 3 in all" in problem(folder, "mine")
    assert "in 'selection'" in problem(
        exam.tasks, "choice", split=Split(search=0.5, selection=0.0001, report=0.4999)
    )


def test_a_template_that_fails(exam: Exam, folder: Path) -> None:
    write(folder, exam, doc_to_text="{{nothing}}")
    assert "task 'mine': cannot be loaded: UndefinedError: 'nothing'" in problem(folder, "mine")


def test_a_template_cannot_reach_python(exam: Exam, folder: Path) -> None:
    marker = folder / "ran"
    attack = "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}"
    write(folder, exam, doc_to_text=attack.replace("MARKER", str(marker)))
    assert "SecurityError" in problem(folder, "mine")
    assert not marker.exists()


def test_a_missing_directory(exam: Exam, folder: Path) -> None:
    assert "no such directory" in problem(folder / "nothing", "choice")


def test_data_on_the_hub_says_what_to_do(exam: Exam, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write(folder, exam, dataset_path="nobody/nothing", dataset_kwargs=None)
    assert "not on this machine" in problem(folder, "mine")


class TestCode:
    """`!function` runs only from directories that the operator allowed."""

    @pytest.fixture
    def coded(self, exam: Exam, folder: Path) -> Path:
        write(folder, exam)
        (folder / "code.py").write_text(
            "import pathlib\n"
            "pathlib.Path(__file__).with_name('ran').touch()\n"
            "def shout(doc):\n    return doc['prompt'].upper()\n"
        )
        (folder / "base.yaml").write_text("doc_to_text: !function code.shout\n")
        (folder / "coded.yaml").write_text(
            (folder / "mine.yaml").read_text().replace("task: mine", "task: coded")
            + "include: base.yaml\n"
        )
        text = (folder / "coded.yaml").read_text()
        lines = [line for line in text.splitlines() if not line.startswith("doc_to_text")]
        (folder / "coded.yaml").write_text("\n".join(lines) + "\n")
        return folder

    def test_refused_without_running_it(self, coded: Path) -> None:
        told = problem(coded, "coded")
        assert "names Python code with `!function`" in told
        assert "EVOMERGE_TRUSTED_TASKS" in told
        assert str(coded / "base.yaml") in told
        assert not (coded / "ran").exists()
        assert "`!function`" in problem(None, str(coded / "coded.yaml"))

    def test_a_harmless_neighbour_is_not_refused(self, coded: Path) -> None:
        assert load(coded, "mine").tasks[0].name == "mine"

    def test_allowed(self, coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EVOMERGE_TRUSTED_TASKS", os.pathsep.join(["/elsewhere", str(coded)]))
        prompt = load(coded, "coded").tasks[0].requests[0][0].args[0]
        assert prompt == prompt.upper()

    def test_a_link_out_of_an_allowed_directory_is_followed(
        self, coded: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        allowed = tmp_path_factory.mktemp("allowed")
        (allowed / "link").symlink_to(coded)
        monkeypatch.setenv("EVOMERGE_TRUSTED_TASKS", str(allowed))
        assert "`!function`" in problem(None, str(allowed / "link" / "coded.yaml"))


def test_a_task_that_lm_eval_ships_is_found_and_trusted(exam: Exam, folder: Path) -> None:
    """Its prompts and Python come from lm-eval, its data from a local file."""
    import lm_eval.tasks

    shipped = Path(lm_eval.tasks.__file__).parent / "hellaswag" / "hellaswag.yaml"
    rows = [
        {
            "ind": i,
            "activity_label": "Walking",
            "ctx_a": f"A man {i} walks.",
            "ctx_b": "he",
            "endings": ["runs.", "sits.", "eats.", "flies."],
            "label": str(i % 4),
        }
        for i in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "local.yaml").write_text(
        yaml.safe_dump(
            {
                "include": str(shipped),
                "task": "hellaswag_local",
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {"validation": str(folder / "rows.jsonl")}},
                "training_split": None,
            }
        )
    )
    loaded = load(folder, {"task": "hellaswag_local", "metric": "acc_norm"})
    assert loaded.tasks[0].requests[0][0].args[0].startswith("Walking: A man 0 walks. He")
    assert len(loaded.tasks[0].requests[0]) == 4
