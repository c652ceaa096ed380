"""What every command promises: help for all of it, one JSON document, clean pipes."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer.main
from stored import store_study

import evomerge
from evomerge.cli.main import app
from evomerge.cli.main import main as command_line
from evomerge.cli.options import json_text, store_option
from evomerge.cli.read import score_json
from evomerge.cli.running import resume_command
from evomerge.sampling import Restart
from evomerge.service.liveness import process_start
from evomerge.store.base import Claim, Controller
from evomerge.store.sql import SqlStore
from evomerge.trial import Score, TaskScore


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


EVERY = dict(commands(typer.main.get_command(app)))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"sqlite:///{tmp_path_factory.mktemp('cli') / 'evomerge.db'}"
    store = SqlStore(url)
    store_study(store)
    store_study(store, name="another")
    store.close()
    return url


@pytest.fixture
def call(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Any:
    monkeypatch.setenv("EVOMERGE_STORE", url)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evomerge", *arguments])
        with pytest.raises(SystemExit) as left:
            command_line()
        captured = capsys.readouterr()
        return int(str(left.value.code)), captured.out, captured.err

    return run


def test_the_commands_of_the_design_are_there() -> None:
    names = {" ".join(path) for path in EVERY}
    wanted = "demo run resume status trials best report merge methods dashboard"
    assert {*wanted.split(), "space show", "space check", "zoo build", "db upgrade"} <= names


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_every_command_and_each_of_its_parameters_has_help(
    path: tuple[str, ...], call: Any
) -> None:
    command = EVERY[path]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), parameter.name
    code, out, err = call(*path, "--help")
    assert (code, err) == (0, "")
    assert " ".join(["Usage:", "evomerge", *path]) in out


def test_version(call: Any) -> None:
    assert call("--version") == (0, f"evomerge {evomerge.__version__}\n", "")


@pytest.mark.parametrize("path", [(), ("space",), ("zoo",), ("db",)], ids=" ".join)
def test_a_group_by_itself_shows_its_help_and_no_error(path: tuple[str, ...], call: Any) -> None:
    code, out, err = call(*path)
    assert code == 2
    assert "Commands" in out + err
    assert "evomerge:" not in err


JSON = [
    ["status"],
    ["status", "zoo-ties"],
    ["trials", "zoo-ties"],
    ["best", "zoo-ties"],
    ["report", "zoo-ties"],
    ["methods"],
    ["methods", "ties"],
    ["space", "show", "source_depth"],
    ["space", "check", "source_depth"],
]


@pytest.mark.parametrize("arguments", JSON, ids=" ".join)
def test_json_is_one_document_and_nothing_else(arguments: list[str], call: Any) -> None:
    code, out, _ = call(*arguments, "--json")
    assert code == 0
    json.loads(out)
    assert not list(Path.cwd().iterdir())  # no file on the side


@pytest.mark.parametrize("arguments", JSON, ids=" ".join)
def test_text_without_json(arguments: list[str], call: Any) -> None:
    code, out, err = call(*arguments)
    assert code == 0
    assert out or err


def test_status_json(call: Any) -> None:
    rows = json.loads(call("status", "--json")[1])
    assert [row["study"] for row in rows] == ["zoo-ties", "another"]
    assert rows[0]["trials"] == {
        "finished": 6,
        "budget": 6,
        "failed": 2,
        "states": {"COMPLETE": rows[0]["trials"]["states"]["COMPLETE"], "FAIL": 2},
    }
    assert rows[0]["controller"] is None
    assert rows[0]["refused"] == {}
    assert (rows[0]["priority"], rows[0]["workers"]) == (0, None)
    assert json.loads(call("status", "another", "--json")[1])["study"] == "another"


@pytest.mark.parametrize(("started", "shown"), [(0.0, False), (1.0, True)], ids=["killed", "alive"])
def test_status_shows_a_controller_only_while_it_runs(
    call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, started: float, shown: bool
) -> None:
    pid = os.getpid()
    alive = process_start(pid)
    assert alive is not None
    store = SqlStore(f"sqlite:///{tmp_path / 'held.db'}")
    now = store_study(store).created_at
    until = datetime.now(UTC) + timedelta(seconds=30)
    holder = Controller("d", socket.gethostname(), pid, alive * started, until)
    store.acquire("zoo-ties", holder, now=now)
    monkeypatch.setenv("EVOMERGE_STORE", store.engine.url.render_as_string())
    named = f"{socket.gethostname()}, process {pid}" if shown else None
    assert json.loads(call("status", "zoo-ties", "--json")[1])["controller"] == named


def test_status_shows_workers_at_work_and_wanted(
    call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = SqlStore(f"sqlite:///{tmp_path / 'claimed.db'}")
    store_study(store)
    now = datetime.now(UTC)
    until = now + timedelta(seconds=60)
    store.claim(Claim("zoo-ties", "d", "pool", 0, 8, 3, {"CPU": 1.0}, now, until))
    monkeypatch.setenv("EVOMERGE_STORE", store.engine.url.render_as_string())
    assert json.loads(call("status", "--json")[1])[0]["workers"] == {"held": 3, "wanted": 8}
    assert "3/8" in call("status")[1]


def test_trials_json(call: Any, url: str) -> None:
    rows = json.loads(call("trials", "zoo-ties", "--json")[1])
    wanted = {"number", "state", "genome", "recipe_digest", "scores", "attempts", "seconds"}
    assert all(wanted <= set(row) for row in rows)
    assert [row["number"] for row in rows] == list(range(len(rows)))
    stored = SqlStore(url).trials("zoo-ties")
    for row, trial in zip(rows, stored, strict=True):
        assert row["state"] == trial.state
        assert row["recipe_digest"] == trial.recipe_digest
        assert row["genome"] == (None if trial.genome is None else list(trial.genome))
        for part, score in trial.scores.items():
            values = [task.value for task in score.tasks.values()]
            assert [row["scores"][part][name] for name in score.tasks] == values
            assert row["scores"][part]["mean"] == pytest.approx(sum(values) / len(values))
    failed = [row for row in rows if row["state"] == "FAIL"]
    assert failed[0]["error"] == "NonFiniteModel: layer 3 computes NaN"
    assert failed[0]["scores"] == {}


def test_status_and_report_tell_restarts_and_refused_results(
    call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "restart" not in call("status", "zoo-ties")[1]
    assert "refused" not in call("status")[1]
    store = SqlStore(f"sqlite:///{tmp_path / 'told.db'}")
    study = store_study(store)
    now = study.created_at
    store.acquire("zoo-ties", Controller("d", "host", 1, 1.0, now), now=now)
    restarts = [asdict(Restart(n, 40 * n, 4 * 2**n, 8 * 2**n, f"reason {n}")) for n in range(1, 13)]
    inspection = {**study.inspection, "restarts": restarts}
    store.update_study("zoo-ties", study.spec, inspection, controller="d")
    tokens = [attempt.token for trial in store.trials("zoo-ties") for attempt in trial.attempts]
    for token in (tokens[0], tokens[1], "never heard of"):
        store.refuse("zoo-ties", token, controller="d")
    store.release("zoo-ties", "d")
    monkeypatch.setenv("EVOMERGE_STORE", store.engine.url.render_as_string())
    lines = call("status", "zoo-ties")[1].splitlines()[2:]
    assert lines[0] == "zoo-ties: 2 restarts before"
    assert lines[1] == "zoo-ties: restart 3 after 120 trials, population 32 to 64: reason 3"
    assert lines[-1] == "zoo-ties: results refused: 2 repeated, 1 stray"
    assert len(lines) == 1 + 10 + 1
    assert call("status")[1].splitlines()[2:4] == [
        "zoo-ties: 11 restarts before",
        "zoo-ties: restart 12 after 480 trials, population 16384 to 32768: reason 12",
    ]
    found = json.loads(call("status", "zoo-ties", "--json")[1])
    assert found["restarts"] == restarts
    assert found["refused"] == {"repeated": 2, "stray": 1}
    report = json.loads(call("report", "zoo-ties", "--json")[1])
    assert (report["restarts"], report["refused"]) == (restarts, found["refused"])
    assert call("report", "zoo-ties", "-o", "page.html")[0] == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert "restart 12 after 480 trials" in page
    assert "2 repeated, 1 stray" in page


def test_report_json(call: Any) -> None:
    found = json.loads(call("report", "zoo-ties", "--json")[1])
    tasks = {"add", "reverse", "sort", "mean"}
    assert found["study"] == "zoo-ties"
    assert {"complete", "failed"} <= set(found["trials"])
    assert found["trials"]["failed"] == 2
    assert len(found["winner"]["recipe_digest"]) == 64
    assert set(found["winner"]["report"]) == tasks
    for name in ("base", "best_source", "uniform", "task_arithmetic"):
        assert set(found["baselines"][name]["report"]) == tasks
    for comparison in found["comparisons"]:
        assert {"against", "difference", "interval", "p_value"} <= set(comparison)
    assert found["comparisons"]


def test_best_names_the_trial_that_the_report_calls_the_winner(call: Any) -> None:
    best = json.loads(call("best", "zoo-ties", "--json")[1])
    winner = json.loads(call("report", "zoo-ties", "--json")[1])["winner"]
    assert best["recipe_digest"] == winner["recipe_digest"]
    assert best["final"] is True
    text = call("best", "zoo-ties")[1]
    assert f"trial {best['number']} (winner)" in text
    assert text.index("search:") < text.index("selection:") < text.index("report:")


def test_best_ends_with_the_scores_in_the_specs_order_and_has_no_number_to_a_line(
    call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = SqlStore(f"sqlite:///{tmp_path / 'ordered.db'}")
    store_study(store, tasks=("sort", "add"))
    monkeypatch.setenv("EVOMERGE_STORE", store.engine.url.render_as_string())
    lines = call("best", "zoo-ties")[1].splitlines()
    assert re.fullmatch(r"trial \d+ \(winner\)", lines[-5])
    assert [line.split(":")[0] for line in lines[-3:]] == ["search", "selection", "report"]
    assert all(re.search(r": sort [0-9.]+, add [0-9.]+$", line) for line in lines[-3:])
    assert not [line for line in lines if re.fullmatch(r" *[-0-9.e]+,?", line)]
    recipe = json.loads("\n".join(lines[:-5]))
    assert recipe == json.loads(call("best", "zoo-ties", "--json")[1])["recipe"]


@pytest.mark.parametrize(
    "document",
    [{}, [], 1.5, "é", {"a": list(range(99)), "b": [{"c": "x" * 90}, [[1] * 50]], "d": ()}],
    ids=str,
)
def test_json_for_people_is_the_same_json(document: Any) -> None:
    text = json_text(document)
    assert json.loads(text) == json.loads(json.dumps(document))
    assert "é" in text or "é" not in str(document)


def test_best_names_models_where_they_lay_when_the_study_was_last_opened(
    call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = SqlStore(f"sqlite:///{tmp_path / 'moved.db'}")
    study = store_study(store)
    places = {"elsewhere/base": study.inspection["digests"]["zoo/base"]}
    now = study.created_at
    store.acquire("zoo-ties", Controller("d", "host", 1, 1.0, now), now=now)
    moved = {**study.inspection, "digests": places}
    store.update_study("zoo-ties", study.spec, moved, controller="d")
    monkeypatch.setenv("EVOMERGE_STORE", store.engine.url.render_as_string())
    best = json.loads(call("best", "zoo-ties", "--json")[1])
    assert best["recipe"]["base"]["path"] == "elsewhere/base"
    assert '"path": "elsewhere/base"' in call("best", "zoo-ties")[1]
    code, _, err = call("best", "zoo-ties", "--export", "merged")
    assert (code, "elsewhere/base: no such folder" in err) == (2, True), err


def test_a_mean_over_tasks_turns_the_sign_where_less_is_better() -> None:
    tasks = {
        "sort": TaskScore("acc", 0.5, None, 4),
        "text": TaskScore("perplexity", 9.0, None, 4, higher_is_better=False),
    }
    found = score_json(Score(tasks), {"sort": 3.0, "text": 1.0})
    assert found == {"sort": 0.5, "text": 9.0, "mean": (3 * 0.5 - 9.0) / 4}


@pytest.mark.parametrize("command", [["zoo", "build", "zoo"], ["demo"]], ids=" ".join)
def test_training_that_is_interrupted_says_how_to_go_on(
    call: Any, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("evomerge.zoo.build.build_zoo", interrupted)
    code, out, err = call(*command)
    assert (code, out) == (130, "")
    assert "To go on: the same command\n" in err


def test_report_page(call: Any) -> None:
    code, out, err = call("report", "zoo-ties", "-o", "page.html")
    assert (code, out, err) == (0, "", "wrote page.html\n")
    assert Path("page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert os.listdir() == ["page.html"]


@pytest.mark.parametrize("output", ["none/page.html", "."])
def test_a_report_page_that_cannot_be_written(call: Any, output: str) -> None:
    code, _, err = call("report", "zoo-ties", "-o", output)
    assert code == 2
    assert err.startswith(f"evomerge: cannot write {output}: ")
    assert os.listdir() == []


def test_a_table_is_never_cut_in_a_pipe(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    header, first, *_ = call("trials", "zoo-ties")[1].splitlines()
    words = ["number", "kind", "label", "state", "search", "mean", "attempts", "seconds"]
    assert header.split() == words
    assert first.split()[:4] == ["0", "base", "base", "COMPLETE"]


def process(arguments: list[str], url: str, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "EVOMERGE_STORE": url, **options.pop("env", {})}
    command = [sys.executable, "-m", "evomerge.cli.main", *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **options)


def test_a_reader_that_leaves_early_causes_no_noise(url: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with process(["trials", "zoo-ties", "--json"], url, stdout=writer) as running:
        os.close(writer)
        assert running.communicate()[1] == b""


def test_json_is_whole_where_the_terminal_is_not_utf_8(url: str) -> None:
    latin = {"PYTHONIOENCODING": "latin-1"}
    with process(["methods", "ties", "--json"], url, stdout=subprocess.PIPE, env=latin) as it:
        out, err = it.communicate()
    assert (it.returncode, err) == (0, b"")
    assert "θ" in json.loads(out.decode("latin-1"))["formula"]


def test_colour_is_off_where_asked(url: str) -> None:
    ours, theirs = pty.openpty()
    plain = {"NO_COLOR": "1", "TERM": "xterm-256color"}
    with process(["status"], url, stdout=theirs, env=plain) as running:
        os.close(theirs)
        assert running.communicate()[1] == b""
    text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "zoo-ties" in text
    assert "\x1b[3" not in text


def test_hints_name_a_store_so_that_they_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    secret, default = "postgresql+psycopg://me:secret@host/db", "sqlite:///evomerge.db"
    monkeypatch.delenv("EVOMERGE_STORE", raising=False)
    assert resume_command("mine", default, "local") == "evomerge resume mine"
    assert store_option("sqlite:///other.db") == " --store sqlite:///other.db"
    assert shlex.split(store_option("sqlite:///my db?x=1&y=2"))[1] == "sqlite:///my db?x=1&y=2"
    assert store_option(secret) == ' --store "$EVOMERGE_STORE"'
    monkeypatch.setenv("EVOMERGE_STORE", secret)
    assert resume_command("mine", secret, "ray") == "evomerge resume mine --executor ray"
    assert store_option(default) == f" --store {default}", "given beside the environment"


def test_the_page_names_the_store_as_hints_do(
    call: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("report", "zoo-ties", "-o", "a.html")[0] == 0
    assert "evomerge best zoo-ties --export DIR" in Path("a.html").read_text(encoding="utf-8")
    monkeypatch.setenv("EVOMERGE_STORE", "sqlite:///another.db")
    assert call("report", "zoo-ties", "-o", "b.html", "--store", url)[0] == 0
    page = Path("b.html").read_text(encoding="utf-8")
    assert f"evomerge best zoo-ties --store {url} --export DIR" in page
