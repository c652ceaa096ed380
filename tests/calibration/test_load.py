"""Calibration data: the tokens lm-eval would score, and nothing that a report is made of."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_exam import random_llama, text, write_tasks

from evomerge.calibration import CalibrationSpec, load_calibration
from evomerge.calibration.passages import read_passages, scored_passages
from evomerge.errors import TaskError, UserError
from evomerge.scoring.splits import part_of
from evomerge.spec import Split
from evomerge.zoo.vocabulary import build_tokenizer

TOKENIZER = build_tokenizer(64)
SPLIT = Split()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exam") / "tasks"
    write_tasks(folder, lambda prompt: "abcd")
    return folder


def spec_of(document: Any, sources: tuple[str, ...] = ("a",)) -> CalibrationSpec:
    faults: list[str] = []
    spec = CalibrationSpec.read(document, sources, Path.cwd(), faults)
    assert spec is not None, faults
    return spec


def load(document: Any, *sources: str, seed: int = 0) -> Any:
    names = sources or ("a",)
    return load_calibration(spec_of(document, names), names, TOKENIZER, seed=seed)


def of_task(tasks: Path, name: str, **keys: Any) -> dict[str, Any]:
    return {"task": name, "include_path": str(tasks), "count": 1000, **keys}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["choice", "generate", "continue"])
def test_answers_are_the_tokens_that_lm_eval_scores(tasks: Path, name: str) -> None:
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=random_llama(0), tokenizer=TOKENIZER, max_length=64)
    spec = spec_of(of_task(tasks, name, part="search"))
    found = {e.item: e for e in load_calibration(spec, ["a"], TOKENIZER).of("a")}
    passages = [p for p in read_passages(spec.shared, SPLIT) if p.answer.strip()]
    assert len(passages) > 10
    for passage in passages:
        before, after = lm._encode_pair(passage.prompt, passage.answer)
        if name == "generate":
            after = [*after, TOKENIZER.eos_token_id]
        example = found[passage.item]
        assert example.tokens == (*before, *after)
        assert [example.tokens[i] for i in example.predicted] == after


def test_a_tokenizer_that_closes_every_text_moves_no_answer(tmp_path: Path) -> None:
    """As those of encoder-decoders do: the prompt's end is no token of the whole."""
    from tokenizers.processors import TemplateProcessing

    closing = build_tokenizer(64)
    end = closing.eos_token_id
    closing.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {closing.eos_token}", special_tokens=[(closing.eos_token, end)]
    )
    path = write_lines(tmp_path / "data.jsonl", [{"q": "abc ", "a": "d e"}])
    spec = spec_of({"jsonl": str(path), "prompt": "q", "answer": "a"})
    (example,) = load_calibration(spec, ["a"], closing).of("a")
    (plain,) = load_calibration(spec, ["a"], TOKENIZER).of("a")
    assert example.answer == plain.answer
    assert example.tokens.count(end) == 1


def test_the_right_choice_is_the_answer(tasks: Path) -> None:
    rows = [json.loads(line) for line in (tasks / "test.jsonl").read_text().splitlines()]
    right = {row["prompt"]: row["choices"][row["label"]] for row in rows}
    spec = spec_of(of_task(tasks, "choice", part="search"))
    for passage in read_passages(spec.shared, SPLIT):
        assert passage.answer == right[passage.prompt]


def test_a_searched_part_holds_nothing_of_the_others(tasks: Path) -> None:
    spec = spec_of(of_task(tasks, "choice", part="search"))
    found = read_passages(spec.shared, SPLIT)
    others = scored_passages("choice", str(tasks), SPLIT)
    assert found
    assert len(found) + len(others) == 60
    assert {part_of(p.item, SPLIT) for p in found} == {"search"}
    assert {part_of(p.item, SPLIT) for p in others} == {"selection", "report"}


def test_items_that_a_report_is_made_of_are_left_out(tasks: Path, tmp_path: Path) -> None:
    """The same record, and the same words under other names."""
    scored = scored_passages("generate", str(tasks), SPLIT)
    rows = [json.loads(line) for line in (tasks / "test.jsonl").read_text().splitlines()]
    renamed = [{"q": f"  {p.prompt}", "a": f"{p.answer} "} for p in scored]
    mine = [{"q": f"mine {n}=", "a": "yes"} for n in range(5)]
    path = write_lines(tmp_path / "own.jsonl", [*renamed, *mine])
    document = {"jsonl": str(path), "prompt": "q", "answer": "a", "include_path": str(tasks)}
    spec = spec_of(document).model_copy(update={"held_out": ("generate",)})
    loaded = load_calibration(spec, ["a"], TOKENIZER)
    assert loaded.counts == {"a": 5}
    assert loaded.described["a"].endswith(f"; {len(scored)} held out")
    assert len(load(document).of("a")) > 5  # who names no task has nothing held out
    write_lines(tmp_path / "same.jsonl", rows)
    document = {"jsonl": str(tmp_path / "same.jsonl"), "prompt": "prompt", "answer": "start"}
    spec = spec_of({**document, "include_path": str(tasks), "count": 100})
    kept = load_calibration(spec.model_copy(update={"held_out": ("choice",)}), ["a"], TOKENIZER)
    assert {part_of(e.item, SPLIT) for e in kept.of("a")} == {"search"}


def test_training_items_that_are_scored_too_are_left_out(tasks: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (tasks / "test.jsonl").read_text().splitlines()]
    own = [{**rows[0], "prompt": f"only here {n}="} for n in range(4)]
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, content in (("test", rows), ("train", [*rows, *own])):
        write_lines(folder / f"{name}.jsonl", content)
    config = yaml.safe_load((tasks / "generate.yaml").read_text())
    files = {name: str(folder / f"{name}.jsonl") for name in ("test", "train")}
    config |= {"dataset_kwargs": {"data_files": files}, "training_split": "train"}
    (folder / "generate.yaml").write_text(yaml.safe_dump({**config, "task": "leaky"}))
    document = {"task": "leaky", "include_path": str(folder), "count": 1000}
    found = load(document)
    hashes = {e.item for e in found.of("a")}
    held_out = {p.item for p in scored_passages("leaky", str(folder), SPLIT)}
    assert held_out
    assert not hashes & held_out
    assert "held out" in found.described["a"]


def test_text_that_holds_scored_items_is_refused(tasks: Path, tmp_path: Path) -> None:
    scored = scored_passages("generate", str(tasks), SPLIT)
    words = [text(random.Random(n), 30) for n in range(50)]
    path = tmp_path / "book.txt"
    path.write_text("\n".join(words))
    document = {"text": str(path), "tokens": 16, "include_path": str(tasks)}
    spec = spec_of(document).model_copy(update={"held_out": ("generate",)})
    assert load_calibration(spec, ["a"], TOKENIZER).of("a")
    inside = f" {scored[3].prompt}{scored[3].answer} "
    path.write_text("\n".join([*words[:20], inside, *words[20:]]))
    with pytest.raises(UserError, match="holds 1 of the items that the result is scored on"):
        load_calibration(spec, ["a"], TOKENIZER)


def test_text_is_cut_into_pieces_that_cover_it(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(" ".join(text(random.Random(n), 9) for n in range(100)))
    ids = TOKENIZER.encode(path.read_text())
    found = load({"text": str(path), "tokens": 32, "count": 1000}).of("a")
    assert sum(len(e.tokens) for e in found) == len(ids)
    assert max(len(e.tokens) for e in found) == 32
    assert all(e.answer == 0 for e in found)


def test_what_is_drawn_depends_on_content_and_seed_alone(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}=", "answer": f"a{n}"} for n in range(40)]
    one = write_lines(tmp_path / "one.jsonl", rows)
    other = write_lines(tmp_path / "other.jsonl", rows[::-1])
    keys = {"prompt": "prompt", "answer": "answer", "count": 10}
    first = load({"jsonl": str(one), **keys})
    assert first.counts == {"a": 10}
    assert first.digest == load({"jsonl": str(other), **keys}).digest
    assert first.digest != load({"jsonl": str(one), **keys}, seed=1).digest
    more = load({"jsonl": str(one), **keys, "count": 20})
    assert set(first.of("a")) < set(more.of("a"))


def test_a_long_prompt_loses_its_beginning_and_never_its_answer(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"prompt": "abcdefghij" * 5, "answer": "0123"}])
    document = {"jsonl": str(path), "prompt": "prompt", "answer": "answer", "tokens": 12}
    (example,) = load(document).of("a")
    (whole,) = load({**document, "tokens": 500}).of("a")
    assert example.tokens == whole.tokens[-12:]
    answer = [whole.tokens[i] for i in whole.predicted]
    assert [example.tokens[i] for i in example.predicted] == answer


def test_each_source_has_its_own_or_all_share(tasks: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"text": "abc abc"}, {"text": "0123"}])
    found = load({"a": of_task(tasks, "choice"), "b": {"jsonl": str(path)}}, "a", "b")
    assert found.counts["b"] == 2
    assert found.counts["a"] > 10
    shared = load({"jsonl": str(path)}, "a", "b")
    assert shared.of("a") == shared.of("b")


@pytest.mark.parametrize(
    ("document", "faults"),
    [
        ({"jsonl": "a", "text": "b"}, ["calibration: give one of task, jsonl, text, dataset, not"]),
        ({"count": 3}, ["calibration: give one of task, jsonl, text, dataset, not none"]),
        ({"jsonl": "a", "cuont": 3}, ["calibration: unknown key 'cuont'; did you mean 'count'?"]),
        ({"jsonl": "a", "count": 0}, ["calibration: count: expected a number"]),
        ("gsm8k", ["calibration: expected {task: NAME}, or an entry for each source"]),
        (
            {"math": {"task": "t"}, "cod": {"task": "t"}},
            [
                "calibration.cod: no such source; did you mean 'code'?",
                "calibration: no entry for source 'code'",
            ],
        ),
        ({"task": "t", "held_out": "gsm8k"}, ["calibration.held_out: expected a list of tasks"]),
    ],
)
def test_what_is_written_wrong_is_named(document: Any, faults: list[str]) -> None:
    found: list[str] = []
    assert CalibrationSpec.read(document, ["math", "code"], Path.cwd(), found) is None
    assert len(found) == len(faults), found
    for line, start in zip(found, faults, strict=True):
        assert line.startswith(start), line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"\n', "line 1 is not JSON"),
        ('{"prompt": "a", "anwser": "b"}\n', "record 1: no text in a field 'answer'; did you mean"),
        ("[1, 2]\n", "record 1: expected fields by name, got list"),
        ('{"prompt": "a", "answer": 3}\n', "record 1: no text in a field 'answer'"),
    ],
)
def test_data_that_cannot_be_read_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load({"jsonl": str(path), "prompt": "prompt", "answer": "answer"})
    with pytest.raises(UserError, match="no-such: cannot be read"):
        load({"text": str(tmp_path / "no-such")})


def test_a_part_that_a_task_lacks_is_said(tasks: Path) -> None:
    with pytest.raises(UserError, match="has no validation items; `part: search` takes"):
        load(of_task(tasks, "choice", part="validation"))
    with pytest.raises(TaskError, match="unknown task 'chioce'"):
        load(of_task(tasks, "chioce"))
