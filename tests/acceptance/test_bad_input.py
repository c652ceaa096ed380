"""Every bad input: exit code 2, one clear message that names the thing and the way out, and nothing
half-written. The command line itself runs, in this process; what a worker process would inspect is
inspected by the same code without the pipe, but for the cases that start the real one.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from evomerge.cli import main as command_line
from evomerge.cli import read, running
from evomerge.service.wire import answer_inspection, read_inspection
from evomerge.service.worker import Worker
from evomerge.store.sql import SqlStore

GENE = {"low": 0, "high": 1, "init": 0.5}
TENSOR = "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """What was said on standard error, without progress."""
        lines = self.err.splitlines()
        return "\n".join(line for line in lines if not line.startswith(("study ", "merging ")))

    def refuses(self, *fragments: str) -> None:
        assert self.code == 2, self.err
        assert self.out == ""
        assert self.message.startswith("evomerge: ")
        assert "Traceback" not in self.err
        for fragment in fragments:
            assert fragment in self.message
        assert self.message.count("evomerge: ") == 1


class _InThisProcess:
    """An executor whose worker is this process; what it says goes through JSON as it would."""

    def __init__(self, workers: Any) -> None:
        self._worker = Worker()

    def inspect(self, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        sent = json.loads(json.dumps(spec))
        return read_inspection(
            json.loads(json.dumps(answer_inspection(self._worker.inspect, sent)))
        )

    def pool(self) -> None:
        return None

    def close(self, *, now: bool) -> None:
        pass


class _Point:
    name = "local"

    def load(self) -> type[_InThisProcess]:
        return _InThisProcess


@pytest.fixture
def evomerge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """The command line, run in this process."""
    monkeypatch.setattr(running, "entry_points", lambda group: [_Point()])

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["evomerge", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            command_line.main()
        captured = capsys.readouterr()
        return Answer(int(str(left.value.code)), captured.out, captured.err)

    return call


@pytest.fixture
def folder(tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a zoo in it whose files may be spoilt."""
    for name in ("base", "compare", "sort", "tasks"):
        shutil.copytree(tiny_zoo / name, tmp_path / "zoo" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EVOMERGE_STORE", raising=False)
    return tmp_path


def write_spec(path: Path, **changes: Any) -> Path:
    spec = {
        "name": "bad",
        "base": "zoo/base",
        "sources": {"compare": "zoo/compare", "sort": "zoo/sort"},
        "objective": {"include_path": "zoo/tasks", "tasks": ["compare"]},
        "budget": {"trials": 4},
    }
    path.write_text(yaml.safe_dump({**spec, **changes}))
    return path


def write_recipe(path: Path, **changes: Any) -> Path:
    recipe = {"method": "task_arithmetic", "base": "zoo/base", "sources": {"sort": "zoo/sort"}}
    path.write_text(yaml.safe_dump({**recipe, **changes}))
    return path


def contents(folder: Path) -> set[str]:
    """Every path below a folder but the store's."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if not path.name.startswith("evomerge.db")
    }


def studies(folder: Path) -> list[str]:
    if not (folder / "evomerge.db").exists():
        return []
    with SqlStoreOf(folder) as store:
        return [record.name for record in store.studies()]


@contextmanager
def SqlStoreOf(folder: Path) -> Iterator[SqlStore]:
    store = SqlStore(f"sqlite:///{folder / 'evomerge.db'}")
    try:
        yield store
    finally:
        store.close()


def refused(
    evomerge: Callable[..., Answer], folder: Path, arguments: list[object], *fragments: str
) -> None:
    before = contents(folder)
    evomerge(*arguments).refuses(*fragments)
    assert contents(folder) == before
    assert studies(folder) == []


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"bse": "x"}, ["unknown key 'bse'; did you mean 'base'?"]),
        (
            {"sampler": {"seeed": 1}},
            ["unknown key 'sampler.seeed'; did you mean 'seed'?"],
        ),
        (
            {"objective": {"include_path": "zoo/tasks", "tasks": ["compar"]}},
            ["unknown task 'compar'; did you mean 'compare'?"],
        ),
        (
            {"objective": {"include_path": "zoo/taks", "tasks": ["compare"]}},
            ["include_path", "no such directory", "zoo/taks"],
        ),
        (
            {
                "objective": {
                    "include_path": "zoo/tasks",
                    "tasks": [{"task": "compare", "metric": "ac"}],
                }
            },
            ["task 'compare'", "unknown metric 'ac'; did you mean 'acc'?"],
        ),
        (
            {"space": {"method": "tise", "source": {"weight": [GENE]}}},
            ["unknown merge method 'tise'; did you mean 'ties'?"],
        ),
        ({"space": "source_dept"}, ["'source_dept'", "did you mean 'source_depth'?"]),
        ({"space": "mine.yaml"}, ["mine.yaml", "no such file"]),
        (
            {"space": {"method": "ties", "source": {"weight": [{**GENE, "low": 2}]}}},
            ["source.weight", "low must be below high, got low 2 and high 1"],
        ),
        (
            {"sources": {"sort": "zoo/sorte"}},
            ["zoo/sorte", "no such folder"],
        ),
        (
            {"sources": {"sort": "./zoo/x/sorte"}},
            ["zoo/x/sorte: no such folder, and not the name of a model on the hub"],
        ),
        ({"sampler": {"name": "cmase"}}, ["sampler.name", "'cmaes'", "got 'cmase'"]),
        ({"budget": {"trials": 0}}, ["budget.trials", "greater than or equal to 1, got 0"]),
        ({"budget": None}, ["budget: expected a mapping"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_spec_with_one_fault(
    evomerge: Callable[..., Answer], folder: Path, changes: dict[str, Any], fragments: list[str]
) -> None:
    spec = write_spec(folder / "study.yaml", **changes)
    refused(evomerge, folder, ["run", spec], *fragments)


def test_a_file_that_is_no_spec(evomerge: Callable[..., Answer], folder: Path) -> None:
    for name, text, fragment in [
        ("list.yaml", "- a", "a study spec is a mapping"),
        ("broken.yaml", "a: [", "not YAML"),
        ("binary.yaml", b"\xff\xfe\x00", "is not UTF-8"),
    ]:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(evomerge, folder, ["run", folder / name], name, fragment)
    refused(evomerge, folder, ["run", folder], str(folder), "Is a directory")
    refused(evomerge, folder, ["run", folder / "none.yaml"], "none.yaml", "no such file")


def spoil_tensor(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def spoil_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def architecture(source: Path) -> None:
    spoil_json(
        source / "config.json",
        lambda c: c.update(architectures=["MistralForCausalLM"], model_type="mistral"),
    )


def shape(source: Path) -> None:
    def narrow(weights: dict[str, torch.Tensor]) -> None:
        weights[TENSOR] = weights[TENSOR][:-1].contiguous()

    spoil_tensor(source, narrow)


def vocabulary(source: Path) -> None:
    def swap(tokenizer: dict[str, Any]) -> None:
        vocab = tokenizer["model"]["vocab"]
        one, other = list(vocab)[-2:]
        vocab[one], vocab[other] = vocab[other], vocab[one]

    spoil_json(source / "tokenizer.json", swap)


def missing_tensor(source: Path) -> None:
    spoil_tensor(source, lambda weights: weights.pop(TENSOR))


def nan(source: Path) -> None:
    spoil_tensor(source, lambda weights: weights[TENSOR].view(-1)[3].fill_(float("nan")))


def pickle(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin")


def truncated(source: Path) -> None:
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(10_000)


def no_config(source: Path) -> None:
    (source / "config.json").unlink()


CHECKPOINTS = [
    (architecture, ["sort", "mistral", "llama"]),
    (shape, ["sort", TENSOR]),
    (vocabulary, ["sort", "vocabular"]),
    (missing_tensor, ["sort", TENSOR]),
    (nan, ["sort", TENSOR, "NaN"]),
    (pickle, ["sort/pytorch_model.bin", "a pickle can run code", "save_pretrained"]),
    (truncated, ["sort/model.safetensors", "not a whole safetensors file"]),
    (no_config, ["sort/config.json", "no such file"]),
]


@pytest.mark.parametrize(
    ("spoil", "fragments"), CHECKPOINTS, ids=lambda v: getattr(v, "__name__", "")
)
def test_a_source_that_does_not_fit(
    evomerge: Callable[..., Answer],
    folder: Path,
    spoil: Callable[[Path], None],
    fragments: list[str],
) -> None:
    spoil(folder / "zoo" / "sort")
    spec, recipe = write_spec(folder / "study.yaml"), write_recipe(folder / "recipe.yaml")
    refused(evomerge, folder, ["run", spec], *fragments)
    refused(evomerge, folder, ["merge", recipe, folder / "out"], *fragments)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"metod": "x"}, ["unknown key 'metod'; did you mean 'method'?"]),
        ({"method": "tise"}, ["unknown merge method 'tise'; did you mean 'ties'?"]),
        ({"sources": {"sort": "./zoo/x/sorte"}}, ["zoo/x/sorte", "no such folder"]),
        ({"parameters": {"lamda": 1}}, ["has no parameter 'lamda'"]),
        ({"base": None}, ["task_arithmetic", "needs a `base`"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_recipe_with_one_fault(
    evomerge: Callable[..., Answer], folder: Path, changes: dict[str, Any], fragments: list[str]
) -> None:
    recipe = write_recipe(folder / "recipe.yaml", **changes)
    refused(evomerge, folder, ["merge", recipe, folder / "out"], *fragments)


@pytest.mark.parametrize("arguments", [["out"], ["--plan"]], ids=" ".join)
def test_a_refused_recipe_is_named_by_its_file_and_draws_no_bar(
    evomerge: Callable[..., Answer], folder: Path, arguments: list[str]
) -> None:
    recipe = write_recipe(folder / "mine.yaml", parameters={"lamda": 1})
    answer = evomerge("merge", recipe, *arguments)
    assert answer.code == 2
    (line,) = answer.err.splitlines()
    assert line.startswith(f"evomerge: {recipe}: ")
    assert "has no parameter 'lamda'" in line


def test_a_task_file_that_does_not_parse(evomerge: Callable[..., Answer], folder: Path) -> None:
    (folder / "zoo/tasks/compare.yaml").write_text("task: compare\nmetric_list: [\n")
    spec = write_spec(folder / "study.yaml")
    refused(evomerge, folder, ["run", spec], "zoo/tasks/compare.yaml", "not YAML")


def test_a_task_whose_data_is_missing(evomerge: Callable[..., Answer], folder: Path) -> None:
    task = folder / "zoo/tasks/compare.yaml"
    task.write_text(task.read_text().replace("compare.jsonl", "compared.jsonl"))
    spec = write_spec(folder / "study.yaml")
    refused(evomerge, folder, ["run", spec], "task 'compare'", "compared.jsonl")


def faulty_everywhere(folder: Path) -> Path:
    nan(folder / "zoo" / "sort")
    return write_spec(
        folder / "study.yaml",
        sampler={"seeed": 1},
        space={"method": "tise", "source": {"weight": [GENE]}},
        sources={"compare": "./zoo/x/compare", "sort": "zoo/sort"},
        objective={
            "include_path": "zoo/tasks",
            "tasks": [{"task": "compare", "metric": "ac"}, "sorte"],
        },
    )


EVERY_FAULT = (
    "unknown key 'sampler.seeed'; did you mean 'seed'?",
    "unknown merge method 'tise'; did you mean 'ties'?",
    "zoo/x/compare: no such folder",
    f"tensor {TENSOR} holds NaN",
    "unknown metric 'ac'; did you mean 'acc'?",
    "unknown task 'sorte'; did you mean 'sort'?",
)


def test_all_problems_of_a_spec_are_told_in_one_go(
    evomerge: Callable[..., Answer], folder: Path
) -> None:
    spec = faulty_everywhere(folder)
    refused(evomerge, folder, ["run", spec], "study.yaml: 6 problems", *EVERY_FAULT)


def in_a_process(folder: Path, *arguments: object) -> Answer:
    command = [sys.executable, "-m", "evomerge.cli.main", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
def test_a_worker_process_tells_them_all_too(folder: Path) -> None:
    spec = faulty_everywhere(folder)
    before = contents(folder)
    in_a_process(folder, "run", spec).refuses("study.yaml: 6 problems", *EVERY_FAULT)
    assert contents(folder) == before
    assert studies(folder) == []


def test_a_traceback_comes_with_v_only(evomerge: Callable[..., Answer], folder: Path) -> None:
    assert "Traceback" in evomerge("-v", "run", folder / "none.yaml").err
    assert "Traceback" not in evomerge("run", folder / "none.yaml").err


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a full disk, the operating system refuses to write a file beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_while_exporting(
    evomerge: Callable[..., Answer], folder: Path
) -> None:
    recipe = write_recipe(folder / "recipe.yaml")
    before = contents(folder)
    with largest_file(20_000):
        answer = evomerge("merge", recipe, folder / "out")
    answer.refuses("out: does not fit on the disk", "free some space")
    assert contents(folder) == before


def test_an_export_onto_something_else(evomerge: Callable[..., Answer], folder: Path) -> None:
    recipe = write_recipe(folder / "recipe.yaml")
    refused(evomerge, folder, ["merge", recipe, folder / "zoo"], "zoo", "exists already", "remove")
    refused(evomerge, folder, ["merge", recipe, recipe], "recipe.yaml", "exists already")


READS = [["status"], ["status", "s"], ["trials", "s"], ["best", "s"], ["report", "s"]]


@pytest.mark.parametrize("command", [*READS, ["resume", "s"]], ids=" ".join)
def test_no_store_yet(evomerge: Callable[..., Answer], folder: Path, command: list[str]) -> None:
    refused(evomerge, folder, [*command], "no store at sqlite:///evomerge.db", "evomerge run")
    assert not (folder / "evomerge.db").exists()


@pytest.mark.parametrize("command", [*READS[1:], ["resume", "s"]], ids=" ".join)
def test_no_such_study(evomerge: Callable[..., Answer], folder: Path, command: list[str]) -> None:
    with SqlStoreOf(folder):
        pass
    refused(evomerge, folder, [*command], "no study 's'", "evomerge status")


def test_a_store_of_a_newer_schema(evomerge: Callable[..., Answer], folder: Path) -> None:
    with SqlStoreOf(folder):
        pass
    connection = sqlite3.connect(folder / "evomerge.db")
    connection.execute("UPDATE evomerge_alembic_version SET version_num = '9999'")
    connection.commit()
    connection.close()
    spec = write_spec(folder / "study.yaml")
    for command in (*READS, ["run", spec], ["resume", "s"], ["db", "upgrade"]):
        evomerge(*command).refuses("evomerge.db has schema 9999", "upgrade evomerge")


def test_a_locked_database(
    evomerge: Callable[..., Answer], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(url: str, *, create: bool = True) -> SqlStore:
        return SqlStore(url, lock_wait_s=0.05)

    monkeypatch.setattr(read, "open_store", impatient)
    monkeypatch.setattr(running, "open_store", impatient)
    with SqlStoreOf(folder):
        pass
    spec = write_spec(folder / "study.yaml")
    said = "evomerge.db", "locked by another process", "same command again"
    other = sqlite3.connect(folder / "evomerge.db", isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    evomerge("status").refuses(*said)
    evomerge("run", spec).refuses(*said)
    other.close()
    other = sqlite3.connect(folder / "evomerge.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    evomerge("run", spec).refuses(*said)
    assert evomerge("status").code == 0  # a writer keeps nobody from reading
    other.close()
    assert studies(folder) == []


def test_a_file_that_is_no_database(evomerge: Callable[..., Answer], folder: Path) -> None:
    (folder / "evomerge.db").write_text("not a database, by any means\n" * 100)
    answer = evomerge("status")
    answer.refuses("evomerge.db", "not a database", "name another file")
    evomerge("status", "--store", "evomerge.db").refuses("'evomerge.db' is not a store URL")


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["stats"], ["No such command 'stats'", "'status'", "evomerge --help"]),
        (["trials"], ["Missing argument 'STUDY'", "evomerge trials --help"]),
        (["run", "x.yaml", "--wrokers", "2"], ["--wrokers", "evomerge run --help"]),
        (["run", "x.yaml", "--workers", "0"], ["--workers", "greater than or equal to 1"]),
        (["methods", "tise"], ["unknown merge method 'tise'; did you mean 'ties'?"]),
        (["space", "show", "ties_blok"], ["'ties_blok'", "did you mean 'ties_blocks'?"]),
        (["space", "check", "slerp_depth", "--sources", "a,b,c"], ["slerp merges 2", "has 3"]),
        (["dashboard"], ["no store at sqlite:///evomerge.db"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line(
    evomerge: Callable[..., Answer], folder: Path, arguments: list[object], fragments: list[str]
) -> None:
    refused(evomerge, folder, arguments, *fragments)


def test_an_unknown_executor(evomerge: Callable[..., Answer], folder: Path) -> None:
    spec = write_spec(folder / "study.yaml")
    refused(evomerge, folder, ["run", spec, "--executor", "lokal"], "'lokal'", "'local'")
