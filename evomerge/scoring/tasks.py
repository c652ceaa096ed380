"""lm-eval tasks of an objective: found, checked, seeded as a cold run seeds them, requests built.

Loads no model and no tokenizer. Reports every problem of every task at once. Private names of
lm-eval are used here and in `engine` only, and the package pins lm-eval for that reason.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evomerge.errors import TaskError
from evomerge.scoring.splits import item_hash, part_of
from evomerge.scoring.task_files import (
    TRUSTED_TASKS,
    chain,
    is_trusted,
    trusted_roots,
    unreadable_files,
    untrusted_code,
)
from evomerge.scoring.templates import sandbox_templates
from evomerge.spec import PARTS, Objective, Split, TaskObjective, nearest
from evomerge.trial import Part

# lm-eval's own defaults (lm_eval.defaults); a cold run uses them
RANDOM_SEED = 0
OTHER_SEED = 1234

_FEWEST_ITEMS = 2  # in each part: a standard error needs two


@dataclass(frozen=True)
class LoadedTask:
    """One task, its requests and the metric that counts.

    `name` is the objective's name for it, `task` the lm-eval Task, `filter` the answer filter the
    metric is read behind. `hashes` [n] are the items' content hashes in the task's own order and
    `requests` [n] each item's lm-eval Instances, in the order `process_results` wants them.
    """

    name: str
    task: Any
    metric: str
    filter: str
    hashes: tuple[str, ...]
    requests: tuple[tuple[Any, ...], ...]

    @property
    def higher_is_better(self) -> bool:
        return bool(self.task.higher_is_better().get(self.metric, True))


@dataclass(frozen=True)
class LoadedTasks:
    """Every task of an objective, in its order, and how their items are split."""

    tasks: tuple[LoadedTask, ...]
    split: Split

    def items(self) -> Mapping[str, tuple[str, ...]]:
        """For each task the content hashes of its items, in the task's own order."""
        return {task.name: task.hashes for task in self.tasks}

    def positions(self, part: Part) -> dict[str, list[int]]:
        """For each task the places, in its own order, of the items of one part."""
        return {
            task.name: [i for i, h in enumerate(task.hashes) if part_of(h, self.split) == part]
            for task in self.tasks
        }


def load_tasks(objective: Objective) -> LoadedTasks:
    """Find, check and load the tasks of an objective and build their requests.

    Raises TaskError with every problem found. Code that a task file names runs only if the file
    lies in lm-eval's own tasks or in a directory of the variable EVOMERGE_TRUSTED_TASKS.
    """
    sandbox_templates()
    _quiet_logs()
    problems: list[str] = []
    entries = _find(objective, problems)
    tasks = []
    for wanted in objective.tasks:
        if wanted.task in entries:
            try:
                tasks.append(_load(wanted, *entries[wanted.task], objective))
            except _Problems as error:
                problems += [f"task {wanted.task!r}: {line}" for line in error.lines]
    if problems:
        raise TaskError(*problems)
    return LoadedTasks(tuple(tasks), objective.split)


def seed_everything() -> None:
    """Seed the generators that lm-eval's tasks may draw from, as `simple_evaluate` does."""
    import torch

    random.seed(RANDOM_SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Swallow what lm-eval and datasets print: progress bars, and text on standard output."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


class _Problems(Exception):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(lines)
        self.lines = lines


def _quiet_logs() -> None:
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _find(objective: Objective, problems: list[str]) -> dict[str, tuple[Any, Any]]:
    """For each task its TaskManager and index entry; what cannot be found goes to `problems`."""
    from lm_eval.tasks import TaskManager

    if objective.include_path and not Path(objective.include_path).is_dir():
        problems.append(f"include_path: no such directory: {objective.include_path}")
        return {}
    manager = TaskManager(include_path=objective.include_path, include_defaults=False)
    found, missing = {}, []
    for wanted in objective.tasks:
        try:
            entry = _entry(manager, wanted.task)
        except (OSError, ValueError, yaml.YAMLError) as error:
            problems.append(f"{wanted.task}: is not a task file: {_one_line(error)}")
            continue
        if entry is not None:
            found[wanted.task] = (manager, entry)
        elif wanted.task.endswith((".yaml", ".yml")):
            problems.append(f"no such task file: {wanted.task}")
        else:
            missing.append(wanted.task)
    if missing:
        found |= _find_shipped(missing, objective, problems)
    return found


def _entry(manager: Any, name: str) -> Any:
    from lm_eval.tasks._index import TaskIndex

    known = manager.task_index.get(name)
    if known is not None:
        return known
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return TaskIndex.entry_from_path(Path(name))
    # the file of a shipped task usually bears its name; indexing all of them takes seconds
    files = [p for p in _shipped().glob(f"**/{name}.yaml")] if _plain(name) else []
    entries = [entry for entry in map(TaskIndex.entry_from_path, files) if entry is not None]
    return entries[0] if len(entries) == 1 and entries[0].name == name else None


def _plain(name: str) -> bool:
    return name.replace("_", "").replace("-", "").isalnum()


def _find_shipped(
    missing: list[str], objective: Objective, problems: list[str]
) -> dict[str, tuple[Any, Any]]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=objective.include_path)
    index = manager.task_index
    unknown = [name for name in missing if name not in index]
    problems += [f"unknown task {n!r}{_near_names(n, manager, objective)}" for n in unknown]
    if unknown and objective.include_path:
        problems.extend(unreadable_files(Path(objective.include_path)))
    return {name: (manager, index[name]) for name in missing if name in index}


def _near_names(name: str, manager: Any, objective: Objective) -> str:
    hint = nearest(name, manager.all_tasks)
    if hint.startswith("; did you mean"):
        return hint
    if objective.include_path is None:
        return "; `lm-eval ls tasks` lists those that lm-eval ships"
    root = Path(objective.include_path).resolve()
    own = [
        n for n, e in manager.task_index.items() if e.yaml_path and is_trusted(e.yaml_path, [root])
    ]
    return nearest(name, own)


def _load(wanted: TaskObjective, manager: Any, entry: Any, objective: Objective) -> LoadedTask:
    _refuse_groups(entry)
    _refuse_untrusted(entry)
    task = _build(manager, entry)
    _refuse_unrunnable(task)
    metric, filter_ = _metric(task, wanted.metric)
    _set_fewshot(task, objective.num_fewshot)
    requests = _requests(task)
    hashes = tuple(item_hash(group[0].doc) for group in requests)
    _refuse_few(hashes, objective.split)
    return LoadedTask(wanted.task, task, metric, filter_, hashes, requests)


def _refuse_groups(entry: Any) -> None:
    from lm_eval.tasks._index import Kind

    if entry.kind not in (Kind.GROUP, Kind.TAG):
        return
    members = entry.tags if entry.kind is Kind.TAG else (entry.cfg or {}).get("task", [])
    names = sorted(m if isinstance(m, str) else str(m.get("task", m)) for m in members)
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    kind = entry.kind.name.lower()
    raise _Problems([f"is a {kind} of tasks; list its members, each with its weight: {shown}"])


def _refuse_untrusted(entry: Any) -> None:
    """Refuse a task that would run Python from a directory that nobody allowed."""
    from lm_eval.api.metrics import mean  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import metric_registry

    if entry.yaml_path is None:
        return
    roots = trusted_roots(_shipped())
    try:
        files = chain(entry.yaml_path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _Problems([f"cannot be read: {_one_line(error)}"]) from None
    lines = untrusted_code(entry.yaml_path, roots=roots)
    for file in files:
        if not is_trusted(file.path, roots):
            # lm-eval hands an unknown metric to `evaluate.load`, which runs a script of that name
            lines += [
                f"{file.path}: unknown metric {name!r}{nearest(name, metric_registry.keys())} "
                f"(others are loaded only from directories listed in {TRUSTED_TASKS})"
                for name in file.metrics
                if name not in metric_registry
            ]
    if lines:
        raise _Problems(lines)


def _build(manager: Any, entry: Any) -> Any:
    seed_everything()
    try:
        with silence():
            return manager._factory.build(entry, overrides=None, registry=manager.task_index)
    except FileNotFoundError as error:
        raise _Problems([f"data file missing: {_one_line(error)}"]) from None
    except ConnectionError as error:
        raise _Problems(
            [
                f"its data set is not on this machine: {_one_line(error)}; fetch it once on a "
                "connected machine with the same HF_HOME, or point `dataset_path: json` at a file"
            ]
        ) from None
    except Exception as error:
        raise _Problems(
            [f"cannot be loaded: {type(error).__name__}: {_one_line(error)}"]
        ) from error


def _refuse_unrunnable(task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise _Problems(["runs code that the model writes; evomerge does not run such tasks"])
    if getattr(task, "MULTIMODAL", False):
        raise _Problems(["needs images or sound; evomerge scores text models only"])


def _metric(task: Any, wanted: str | None) -> tuple[str, str]:
    """The metric's name and its filter, of `metric`, `metric,filter` or None for the first."""
    filters = [ensemble.name for ensemble in task._filters]
    known = list(task.aggregation())
    metric, _, filter_ = (wanted or known[0]).partition(",")
    if metric not in known and not _has_own_metrics(task):
        raise _Problems([f"unknown metric {metric!r}{nearest(metric, known)}"])
    if filter_ and filter_ not in filters:
        raise _Problems([f"unknown filter {filter_!r}{nearest(filter_, filters)}"])
    return metric, filter_ or filters[0]


def _has_own_metrics(task: Any) -> bool:
    """Whether the task's own code names its metrics, some perhaps only while it scores."""
    listed = getattr(task.config, "metric_list", None) or []
    return any(callable(entry.get("metric")) for entry in listed)


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """As `simple_evaluate`: a task's own 0 is never overridden, and the sampler starts afresh."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=OTHER_SEED)


def _requests(task: Any) -> tuple[tuple[Any, ...], ...]:
    try:
        with silence():
            task.build_all_requests(
                rank=0,
                world_size=1,
                apply_chat_template=False,
                fewshot_as_multiturn=True,
                chat_template=None,
                tokenizer_name="",
            )
    except Exception as error:
        raise _Problems(
            [f"its prompts cannot be built: {type(error).__name__}: {_one_line(error)}"]
        ) from error
    items: dict[int, list[Any]] = defaultdict(list)
    for instance in task.instances:
        items[instance.doc_id].append(instance)
    return tuple(tuple(sorted(items[doc_id], key=lambda r: r.idx)) for doc_id in sorted(items))


def _refuse_few(hashes: tuple[str, ...], split: Split) -> None:
    parts = [part_of(h, split) for h in hashes]
    counts = {part: sum(p == part for p in parts) for part in PARTS}
    short = [f"{n} in {part!r}" for part, n in counts.items() if n < _FEWEST_ITEMS]
    if short:
        raise _Problems(
            [
                f"too few items: {len(hashes)} in all, {', '.join(short)}, where each part needs "
                f"{_FEWEST_ITEMS}; add items or make that part of `split` larger"
            ]
        )


def _shipped() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
