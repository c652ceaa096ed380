"""What a user writes under `calibration`: data for all sources, or for each its own.

    calibration: {task: gsm8k, count: 100}                  # for all sources

    calibration:
      math: {task: gsm8k, part: train}                      # an lm-eval task
      code: {jsonl: code.jsonl, prompt: question, answer: solution}
      prose: {text: book.txt, tokens: 512}                  # cut into pieces of 512 tokens
      chat: {dataset: org/name, split: train, prompt: instruction, answer: output}
      held_out: [humaneval]                                 # tasks whose items none of it may hold

Text only: opens no data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from evomerge.spec import Split, locate, nearest, problems

KINDS = ("task", "jsonl", "text", "dataset")
_HELD_OUT = "held_out"


class Entry(BaseModel):
    """One set of examples. Exactly one of `task`, `jsonl`, `text` and `dataset` says where from.

    `part` is for a task: its training or validation items, or those of its scored items that a
    study with this `split` searches on; `auto` takes the first of these that there is. `prompt`
    and `answer` are fields of a record; without `answer` all of `prompt` is text to be continued.
    `count` examples of at most `tokens` tokens are drawn.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str | None = None
    jsonl: str | None = None
    text: str | None = None
    dataset: str | None = None
    part: Literal["auto", "train", "validation", "search"] = "auto"
    include_path: str | None = None
    config: str | None = None
    split: str = "train"
    prompt: str | None = None
    answer: str | None = None
    count: int = Field(default=100, ge=1)
    tokens: int = Field(default=512, ge=2)

    @model_validator(mode="after")
    def _one_kind(self) -> Entry:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(KINDS)}, not {' and '.join(given) or 'none'}")
        return self

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def place(self) -> str:
        """The task, file or data set it is taken from."""
        return str(getattr(self, self.kind))

    def located(self, folder: Path) -> Entry:
        """The same with paths made absolute, from `folder`."""
        files = ("jsonl", "text", "include_path")
        changes = {key: locate(getattr(self, key), folder) for key in files if getattr(self, key)}
        return self.model_copy(update=changes)


class CalibrationSpec(BaseModel):
    """`shared` is for all sources that have nothing of their own in `own`. `held_out` names tasks
    whose items none of the data may hold, in the selection and report parts of `split`; their files
    lie in `include_path`, or where an entry's do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shared: Entry | None = None
    own: dict[str, Entry] = {}
    held_out: tuple[str, ...] = ()
    include_path: str | None = None
    split: Split = Split()

    def of(self, source: str) -> Entry | None:
        """The entry for a source."""
        return self.own.get(source, self.shared)

    @classmethod
    def read(
        cls, document: Any, sources: Sequence[str], folder: Path, faults: list[str]
    ) -> CalibrationSpec | None:
        """What stands under `calibration`; None, with a line for each fault, where it is wrong."""
        before = len(faults)
        if not isinstance(document, Mapping):
            faults.append("calibration: expected {task: NAME}, or an entry for each source")
            return None
        held_out = _names(document.get(_HELD_OUT, ()), faults)
        rest = {key: value for key, value in document.items() if key != _HELD_OUT}
        if any(not isinstance(value, Mapping) for value in rest.values()) or not rest:
            shared, own = _entry("calibration", rest, folder, faults), {}
        else:
            shared, own = None, _own(rest, sources, folder, faults)
        if len(faults) > before:
            return None
        return cls(shared=shared, own=own, held_out=held_out)


def _own(
    entries: Mapping[str, Any], sources: Sequence[str], folder: Path, faults: list[str]
) -> dict[str, Entry]:
    for name in entries:
        if name not in sources:
            faults.append(f"calibration.{name}: no such source{nearest(str(name), sources)}")
    for name in sources:
        if name not in entries:
            faults.append(f"calibration: no entry for source {name!r}")
    found = {
        name: _entry(f"calibration.{name}", entry, folder, faults)
        for name, entry in entries.items()
    }
    return {name: entry for name, entry in found.items() if entry is not None}


def _entry(where: str, document: Any, folder: Path, faults: list[str]) -> Entry | None:
    try:
        return Entry.model_validate(document).located(folder)
    except ValidationError as error:
        faults.extend(f"{where}: {line}" for line in problems(error, Entry))
        return None


def _names(value: Any, faults: list[str]) -> tuple[str, ...]:
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return tuple(value)
    faults.append(f"calibration.{_HELD_OUT}: expected a list of tasks, got {value!r}")
    return ()
