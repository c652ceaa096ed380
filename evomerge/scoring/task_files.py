"""The YAML files of lm-eval tasks, read without running anything that they name.

Finds which files a task is made of, which do not parse, and which would run code. Knows nothing
of data sets and models; never imports a function that a file names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from evomerge.documents import not_yaml

TRUSTED_TASKS = "EVOMERGE_TRUSTED_TASKS"


@dataclass(frozen=True)
class TaskFile:
    """One YAML file: whether it names Python to run, what it includes, the metrics it lists."""

    path: Path
    runs_code: bool
    includes: tuple[Path, ...]
    metrics: tuple[str, ...]


def read_task_file(path: Path) -> TaskFile:
    """Read one task file as a YAML tree. Raises OSError, UnicodeDecodeError or yaml.YAMLError."""
    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    nodes = list(_nodes(root))
    includes = [text for key, value in _items(root) if key == "include" for text in _scalars(value)]
    metrics = [
        text
        for key, value in _items(root)
        if key == "metric_list" and isinstance(value, yaml.SequenceNode)
        for entry in value.value
        for inner, metric in _items(entry)
        if inner == "metric"
        for text in _scalars(metric)
    ]
    return TaskFile(
        path=path,
        runs_code=any(node.tag == "!function" for node in nodes),
        includes=tuple((path.parent / include).resolve() for include in includes),
        metrics=tuple(metrics),
    )


def chain(path: Path) -> list[TaskFile]:
    """A task's file and every file it includes, each once. Raises what `read_task_file` raises."""
    files: dict[Path, TaskFile] = {}
    waiting = [path.resolve()]
    while waiting:
        here = waiting.pop()
        if here not in files:
            files[here] = read_task_file(here)
            waiting.extend(files[here].includes)
    return list(files.values())


def unreadable_files(directory: Path) -> Iterator[str]:
    """One line for each YAML file below a directory that does not parse."""
    for path in sorted(directory.glob("**/*.yaml")):
        try:
            read_task_file(path)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            yield not_yaml(path, error)


def trusted_roots(shipped: Path) -> list[Path]:
    """Directories whose Python may run: lm-eval's own tasks and those the operator allowed."""
    allowed = os.environ.get(TRUSTED_TASKS, "").split(os.pathsep)
    return [shipped.resolve(), *(Path(entry).resolve() for entry in allowed if entry)]


def untrusted_code(path: Path, *, roots: Iterable[Path]) -> list[str]:
    """One line for each file of a task that would run Python from outside the trusted roots."""
    roots = list(roots)
    return [
        f"{file.path}: names Python code with `!function`, which is run only from directories "
        f"listed in {TRUSTED_TASKS} (separated by {os.pathsep!r}); this one is not among them"
        for file in chain(path)
        if file.runs_code and not is_trusted(file.path, roots)
    ]


def is_trusted(path: Path, roots: Iterable[Path]) -> bool:
    """Whether a file lies below one of the roots, symbolic links followed."""
    return any(path.resolve().is_relative_to(root) for root in roots)


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:  # an alias names a node again, even its own parent
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            waiting.extend(part for pair in node.value for part in pair)


def _items(node: yaml.Node | None) -> Iterator[tuple[str, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield key.value, value


def _scalars(node: yaml.Node) -> list[str]:
    inner = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return [
        item.value
        for item in inner
        if isinstance(item, yaml.ScalarNode) and item.tag == "tag:yaml.org,2002:str"
    ]
