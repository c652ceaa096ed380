"""What changed between two openings of one study, as far as that makes them two studies.

Budget and workers may change, and where files lie; contents may not. Knows records only: neither
stores nor files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from evomerge.spec import StudySpec
from evomerge.store.base import StudyRecord

_ABSENT = object()
_DIGITS = 12  # of a digest; nobody compares more by eye
_SAID = {  # what keys of a scorer's fingerprint are in a user's words
    "threads": "workers.num_cpus",
    "packages": "installed",
    "python": "installed.python",
    "scorer": "installed.evomerge (its scorer)",
    "config": "yaml (sha256)",
    "prompts": "items and prompts (sha256)",
}
_EVALUATION = ("batch_size", "share_context", "dtype", "device")


def changes(known: StudyRecord, opened: StudyRecord) -> list[str]:
    """Every difference as `dotted.key: old -> new`, in the words of a spec; none if they are one.

    The scorer's fingerprint counts too: tasks and their data, versions of libraries, threads.
    """
    lines = _differences(_contents(known), _contents(opened))
    lines += _order(list(known.spec["sources"]), list(opened.spec["sources"]))
    said = {line.partition(":")[0] for line in lines}
    scorer = _differences(_scorer(known, opened), _scorer(opened, known))
    return lines + [line for line in scorer if line.partition(":")[0] not in said]


def text_changes(known: StudyRecord, spec: StudySpec) -> list[str]:
    """Those of `changes` that need no file to be opened, of a spec whose space is written out."""
    old = StudySpec.model_validate(known.spec)
    lines = _differences(_identity(old, _Unopened), _identity(spec, _Unopened))
    lines += _order(list(old.sources), list(spec.sources))
    threads = known.inspection["fingerprint"].get("threads", spec.workers.num_cpus)
    return lines + _differences(threads, spec.workers.num_cpus, _SAID["threads"])


def _contents(record: StudyRecord) -> dict[str, Any]:
    digests = record.inspection["digests"]
    spec = StudySpec.model_validate(record.spec)
    return _identity(spec, lambda path: _Contents(path, digests))


def _identity(spec: StudySpec, contents: Callable[[str], Any]) -> dict[str, Any]:
    """What makes a spec the study's, with what `contents` tells of a path in the path's place."""
    document = spec.identity()
    document["base"] = contents(document["base"])
    document["sources"] = {name: contents(path) for name, path in document["sources"].items()}
    for section, key in ((document, "artifact"), (document["sampler"], "start")):
        if section[key] is not None:
            section[key] = contents(section[key])
    document["objective"].pop("include_path")
    document["space"] = {k: v for k, v in document["space"].items() if k != "about"}
    return document


def _order(old: list[str], new: list[str]) -> list[str]:
    """The genome is laid out by sources in their order, which a mapping's equality overlooks."""
    if old == new or set(old) != set(new):
        return []
    return [f"sources, in this order: {', '.join(old)} -> {', '.join(new)}"]


def _scorer(record: StudyRecord, other: StudyRecord) -> dict[str, Any]:
    """A scorer's fingerprint under the keys of a spec; of the tasks, those that both have."""
    mine, others = (dict(one.inspection["fingerprint"]) for one in (record, other))
    shared = mine.pop("tasks", {}).keys() & others.get("tasks", {}).keys()
    tasks = record.inspection["fingerprint"].get("tasks", {})
    evaluation = {key: mine.pop(key) for key in _EVALUATION if key in mine}
    return {
        "evaluation": evaluation,
        **{_SAID.get(key, f"scorer.{key}"): value for key, value in mine.items()},
        "tasks": {
            name: {_SAID.get(key, key): _short(value) for key, value in tasks[name].items()}
            for name in shared
        },
    }


class _Unopened:
    """A checkpoint or artifact of which only the place is known: it may be the same as another."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unopened)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return self._path


class _Contents:
    """A checkpoint or artifact: it is what is in it, and is shown with the place where it lies."""

    def __init__(self, path: str, digests: Mapping[str, str]) -> None:
        self._path, self._digest = path, digests[path]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Contents) and other._digest == self._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        return f"{self._path} (contents {_short(self._digest)})"


def _short(value: Any) -> Any:
    return value[:_DIGITS] if isinstance(value, str) and len(value) == 64 else value


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Every leaf in which two documents differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line
            for key in sorted({*old, *new})
            for line in _differences(
                old.get(key, _ABSENT), new.get(key, _ABSENT), f"{where}.{key}".lstrip(".")
            )
        ]
    if isinstance(old, list) and isinstance(new, list) and _documents(old + new):
        return _differences(_by_place(old, where), _by_place(new, where))
    return [] if old == new else [f"{where}: {_shown(old)} -> {_shown(new)}"]


def _documents(entries: list[Any]) -> bool:
    return all(isinstance(entry, Mapping) for entry in entries)


def _by_place(entries: list[Any], where: str) -> dict[str, Any]:
    return {f"{where}[{place}]": entry for place, entry in enumerate(entries)}


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)
