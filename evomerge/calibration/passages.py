"""Passages of text for calibration, read from tasks, files and data sets.

A passage is a prompt and its answer, or text to be continued. Knows no tokenizer and no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.calibration.entries import Entry
from evomerge.errors import TaskError, UserError
from evomerge.scoring.splits import item_hash, part_of
from evomerge.scoring.tasks import LoadedTask, load_tasks, silence
from evomerge.spec import Objective, Split, TaskObjective, nearest


@dataclass(frozen=True)
class Passage:
    """`prompt` is context, `answer` what is to come after it; `ends` says that it is all there is
    to say. `item` is the content hash of the record it was made from."""

    prompt: str
    answer: str
    item: str
    ends: bool = False

    @property
    def text_hash(self) -> str:
        """A hash of the words alone: white space does not make another text of it."""
        words = " ".join((self.prompt + self.answer).split())
        return hashlib.sha256(words.encode()).hexdigest()


def read_passages(entry: Entry, split: Split) -> list[Passage]:
    """Every passage that an entry names, in order, but for plain text, which is one.

    Raises UserError for what cannot be read.
    """
    if entry.kind == "task":
        return list(_of_task(entry, split))
    if entry.kind == "text":
        text = _read(Path(entry.place))
        return [Passage("", text, item_hash(text))]
    records = _lines(Path(entry.place)) if entry.kind == "jsonl" else _rows(entry)
    return [_of_record(entry, number, record) for number, record in enumerate(records, 1)]


def scored_passages(name: str, include_path: str | None, split: Split) -> list[Passage]:
    """The items of a task that a study with this split selects or reports on."""
    loaded = _load(name, include_path, split)
    parts = zip(loaded.hashes, loaded.requests, strict=True)
    kept = (requests for h, requests in parts if part_of(h, split) != "search")
    return [_of_doc(loaded, requests[0].doc) for requests in kept]


def _load(name: str, include_path: str | None, split: Split) -> LoadedTask:
    objective = Objective(
        tasks=(TaskObjective(task=name),), include_path=include_path, num_fewshot=0, split=split
    )
    return load_tasks(objective).tasks[0]


def _of_task(entry: Entry, split: Split) -> Iterator[Passage]:
    loaded = _load(entry.place, entry.include_path, split)
    task, part = loaded.task, entry.part
    scores_validation = not task.has_test_docs()
    if part == "auto":
        if task.has_training_docs():
            part = "train"
        elif task.has_validation_docs() and not scores_validation:
            part = "validation"
        else:
            part = "search"
    if part == "search":
        pairs = zip(loaded.hashes, loaded.requests, strict=True)
        docs: Iterable[Any] = [r[0].doc for h, r in pairs if part_of(h, split) == "search"]
    else:
        docs = _docs(entry, task, part, scores_validation=scores_validation)
    return (_of_doc(loaded, doc) for doc in docs)


def _docs(entry: Entry, task: Any, part: str, *, scores_validation: bool) -> Iterable[Any]:
    has = task.has_training_docs() if part == "train" else task.has_validation_docs()
    if not has:
        raise UserError(
            f"task {entry.place!r}: has no {part} items; `part: search` takes those of its scored"
            " items that a search may see"
        )
    if part == "validation" and scores_validation:
        raise UserError(
            f"task {entry.place!r}: its validation items are the ones it is scored on; `part:"
            " search` takes those of them that a search may see"
        )
    with silence():
        docs: Iterable[Any] = task.training_docs() if part == "train" else task.validation_docs()
        return docs


def _of_doc(loaded: LoadedTask, doc: Any) -> Passage:
    """As lm-eval asks it, with the right answer."""
    task, kind = loaded.task, loaded.task.OUTPUT_TYPE
    try:
        context = task.fewshot_context(doc, num_fewshot=0)
        if kind == "generate_until":
            answer = f"{task.config.target_delimiter}{_first(task.doc_to_target(doc))}"
            return Passage(context, answer, item_hash(doc), ends=True)
        made = task.construct_requests(doc, context)
        if kind == "multiple_choice":
            made = made[_right(task, doc)]
        texts = made.args
    except (TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        raise TaskError(
            f"task {loaded.name!r}: the right answer of an item cannot be told"
            f" ({type(error).__name__}: {error}); take its data by `jsonl` or `dataset`"
        ) from error
    if kind == "loglikelihood_rolling":
        return Passage("", texts[0], item_hash(doc))
    return Passage(texts[0], texts[1], item_hash(doc))


def _right(task: Any, doc: Any) -> int:
    """The place of the right choice."""
    wanted = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    wanted = _first(wanted)
    return task.doc_to_choice(doc).index(wanted) if isinstance(wanted, str) else int(wanted)


def _first(target: Any) -> Any:
    return target[0] if isinstance(target, list | tuple) else target


def _of_record(entry: Entry, number: int, record: Any) -> Passage:
    where = f"{entry.place}: record {number}"
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: expected fields by name, got {type(record).__name__}")
    prompt = entry.prompt or ("text" if entry.answer is None else "prompt")
    text = _field(where, record, prompt)
    if entry.answer is None:
        return Passage("", text, item_hash(record))
    return Passage(text, _field(where, record, entry.answer), item_hash(record), ends=True)


def _field(where: str, record: Mapping[str, Any], name: str) -> str:
    if not isinstance(record.get(name), str):
        raise UserError(
            f"{where}: no text in a field {name!r}{nearest(name, map(str, record))}; say which"
            " with `prompt` and `answer`"
        )
    return str(record[name])


def _lines(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON: {error}") from None


def _rows(entry: Entry) -> Iterable[Any]:
    import datasets

    try:
        with silence():
            rows: Iterable[Any] = datasets.load_dataset(
                entry.place, entry.config, split=entry.split
            )
    except Exception as error:  # whatever the library may raise
        raise UserError(
            f"data set {entry.place!r}: cannot be loaded: {' '.join(str(error).split())[:300]};"
            " fetch it once on a connected machine with the same HF_HOME"
        ) from None
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: cannot be read: is not UTF-8 text") from None
