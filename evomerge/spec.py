"""The study spec: what a user asks for, checked as far as text alone can be checked.

Reads YAML, names every problem at once and suggests the nearest known key. Opens no checkpoint,
loads no task and knows no merge method: `evomerge.service.inspection` checks what needs those.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from evomerge.documents import read_yaml
from evomerge.errors import SpecError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
SamplerName = Literal["cmaes", "random", "tpe", "gp", "nsga2"]
PARTS = ("search", "selection", "report")


class _Section(BaseModel):
    """A part of a spec: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TaskObjective(_Section):
    """One lm-eval task of the objective. `metric: null` takes the task's first metric."""

    task: str = Field(min_length=1)
    metric: str | None = None
    weight: float = Field(default=1.0, gt=0)


class Split(_Section):
    """Fractions of every task's items: the search's, those that pick the winner, the report's."""

    search: float = Field(default=0.4, gt=0, lt=1)
    selection: float = Field(default=0.2, gt=0, lt=1)
    report: float = Field(default=0.4, gt=0, lt=1)

    @model_validator(mode="after")
    def _sums_to_one(self) -> Split:
        total = self.search + self.selection + self.report
        if abs(total - 1) > 1e-9:
            raise ValueError(f"search + selection + report must be 1, not {total:g}")
        return self


class Objective(_Section):
    """What a candidate is scored on; `aggregate: pareto` keeps one objective for each task."""

    tasks: tuple[TaskObjective, ...] = Field(min_length=1)
    include_path: str | None = None
    num_fewshot: int | None = Field(default=None, ge=0)
    split: Split = Split()
    aggregate: Literal["mean", "pareto"] = "mean"

    @field_validator("tasks", mode="before")
    @classmethod
    def _bare_names(cls, tasks: object) -> object:
        if not isinstance(tasks, list | tuple):
            return tasks
        return [{"task": task} if isinstance(task, str) else task for task in tasks]

    @field_validator("tasks")
    @classmethod
    def _no_task_twice(cls, tasks: tuple[TaskObjective, ...]) -> tuple[TaskObjective, ...]:
        names = [task.task for task in tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"task {twice[0]!r} is listed twice; give it one entry and a weight")
        return tasks


class SamplerSpec(_Section):
    """Which sampler proposes genomes. `sigma0` is in widths of a gene's bounds.

    The last four are for CMA-ES: `schedule`, when results are learned from; `restarts`, how it
    starts again once it stagnates; `warm_start`, an earlier study of the same store and space,
    whose best genomes say where it starts; `start`, an artifact with weights by source and tensor,
    to whose nearest genome it goes first.
    """

    name: SamplerName = "cmaes"
    population: Literal["auto"] | Annotated[int, Field(ge=2)] = "auto"
    sigma0: float = Field(default=0.1667, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    schedule: Literal["generational", "pipelined", "asynchronous"] = "generational"
    restarts: Literal["ipop", "bipop", "same"] = "ipop"
    warm_start: Name | None = None
    start: str | None = Field(default=None, min_length=1)


class Budget(_Section):
    """`trials` counts what the sampler proposes (baselines come on top); `finalists` of them are
    scored again on the selection items to pick the winner."""

    trials: int = Field(ge=1)
    finalists: int = Field(default=8, ge=1)


class Evaluation(_Section):
    """How a candidate is run. `dtype: auto` is the base's; a merged model is rounded to it once.

    `share_context` runs what requests begin with once for all of them: `auto` in float32 only,
    where no outcome depends on it; `true` also in half precision, where rounding may decide
    between near choices otherwise than lm-eval's own; `false` never.
    """

    dtype: Dtype = "auto"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    share_context: Literal["auto"] | bool = "auto"
    device: str = "auto"


class Workers(_Section):
    """Who runs attempts, with how much of a machine each; an attempt whose worker gives no sign of
    life for `lease_s` seconds, while it loads a model or scores, is lost and counts as one of
    `max_attempts`. Of studies that share a store and a pool of workers, one of a higher `priority`
    has all the workers it asks for before the next one has any.
    """

    count: int = Field(default=1, ge=1)
    num_cpus: int = Field(default=1, ge=1)
    num_gpus: float = Field(default=0, ge=0)
    lease_s: float = Field(default=3600, gt=0)
    max_attempts: int = Field(default=3, ge=1)
    priority: int = Field(default=0, ge=-1000, le=1000)


class StudySpec(_Section):
    """Everything a study is defined by. Paths are absolute once `load` has read them.

    `artifact` is what `evomerge fit` left, for a space whose merge method learns from data.
    """

    name: Name
    base: str = Field(min_length=1)
    sources: dict[Name, str] = Field(min_length=1)
    space: str | dict[str, Any] = "source_depth"
    artifact: str | None = Field(default=None, min_length=1)
    objective: Objective
    sampler: SamplerSpec = SamplerSpec()
    budget: Budget
    evaluation: Evaluation = Evaluation()
    workers: Workers = Workers()

    @classmethod
    def load(cls, path: Path) -> StudySpec:
        """Read a YAML spec; relative paths are taken from the spec's own folder.

        Raises SpecError with every problem found.
        """
        spec, faults = cls.examine(path)
        if spec is None or faults:
            raise SpecError(str(path), faults)
        return spec

    @classmethod
    def examine(cls, path: Path) -> tuple[StudySpec | None, list[str]]:
        """Read a YAML spec: the spec without its faulty entries, and every problem found.

        What is left of a faulty spec is there to be inspected, so that the problems of its
        checkpoints and tasks can be told in the same go; None if too little is left. Raises
        SpecError if the file cannot be read.
        """
        document = read_yaml(path)
        if not isinstance(document, dict):
            raise SpecError(str(path), ["a study spec is a mapping with `name`, `base`, `sources`"])
        return cls.examine_document(document, path)

    @classmethod
    def examine_document(
        cls, document: dict[str, Any], path: Path
    ) -> tuple[StudySpec | None, list[str]]:
        """What `examine` says of a document that was read from `path`."""
        spec, faults = _mended(cls, document)
        if spec is None:
            return None, faults
        return spec._located(path.resolve().parent), faults + spec._conflicts()

    def _conflicts(self) -> list[str]:
        """What is wrong between sections, each of them being fine by itself."""
        sampler, faults = self.sampler, list[str]()
        if self.objective.aggregate == "pareto" and sampler.name in ("cmaes", "gp"):
            faults.append(
                f"sampler.name: {sampler.name!r} has one objective only; "
                "use nsga2, tpe or random with `aggregate: pareto`"
            )
        if sampler.warm_start is not None and sampler.start is not None:
            faults.append("sampler: starts from `warm_start` or from `start`; give one of them")
        if sampler.name == "cmaes":
            return faults
        if sampler.schedule != "generational":
            faults.append(
                f"sampler.schedule: {sampler.name!r} is generational only; "
                f"{sampler.schedule!r} is for cmaes"
            )
        if sampler.warm_start is not None:
            faults.append(f"sampler.warm_start: is for cmaes, not for {sampler.name!r}")
        if sampler.start is not None:
            faults.append(f"sampler.start: is for cmaes, not for {sampler.name!r}")
        return faults

    def _located(self, folder: Path) -> StudySpec:
        objective = self.objective.model_copy(
            update={"include_path": locate(self.objective.include_path, folder)}
        )
        space = self.space
        if isinstance(space, str) and space.endswith((".yaml", ".yml")):
            space = locate(space, folder) or space
        return self.model_copy(
            update={
                "base": locate(self.base, folder),
                "sources": {name: locate(path, folder) for name, path in self.sources.items()},
                "objective": objective,
                "space": space,
                "artifact": locate(self.artifact, folder),
                "sampler": self.sampler.model_copy(
                    update={"start": locate(self.sampler.start, folder)}
                ),
            }
        )

    def identity(self) -> dict[str, Any]:
        """The part of a spec that a resumed study may not change: all but budget and workers."""
        return self.model_dump(mode="json", exclude={"budget", "workers"})


def locate(path: str | None, folder: Path) -> str | None:
    """Make a path absolute: from the spec's folder, else from the working directory.

    What is in neither place is left as it is: it may be the name of a model on the hub. Of
    `MODEL+ADAPTER` each side is looked for.
    """
    if path is None:
        return None
    for root in (folder, Path.cwd()):
        candidate = root / Path(path).expanduser()
        if candidate.exists():
            return os.path.normpath(candidate)
    model, plus, adapter = path.partition("+")
    return f"{locate(model, folder)}+{locate(adapter, folder)}" if plus else path


def problems(error: ValidationError, model: type[BaseModel], under: str = "") -> list[str]:
    """One line for each fault that pydantic found; an unknown key's names the nearest known one.

    `under` is the key that the model's document stands under.
    """
    return _lines(_faults(error), model, under)


def _faults(error: ValidationError) -> list[Any]:
    """What pydantic found, but for lists that are too short only because entries are faulty."""
    faults: list[Any] = list(error.errors())
    places = [fault["loc"] for fault in faults]
    return [
        fault
        for fault, place in zip(faults, places, strict=True)
        if fault["type"] != "too_short"
        or not any(inner != place and inner[: len(place)] == place for inner in places)
    ]


def _mended(model: type[StudySpec], document: dict[str, Any]) -> tuple[StudySpec | None, list[str]]:
    """The document without its faulty entries, if the rest is a spec; and a line for each fault."""
    rest, faults = copy.deepcopy(document), list[str]()
    while True:
        try:
            return model.model_validate(rest), faults
        except ValidationError as error:
            # what was dropped may be missed now: only rules that could not be tried before are news
            found = _faults(error)
            news = [f for f in found if not faults or f["type"] == "value_error"]
            faults += _lines(news, model)
            dropped = [_drop(rest, fault["loc"]) for fault in reversed(found)]
            if not all(dropped):
                return None, faults


def _drop(document: Any, location: tuple[int | str, ...]) -> bool:
    """Remove the entry at a location, if there is one; its last parts may be pydantic's own."""
    place: Any = None
    for part in location:
        try:
            inner = document[part]
        except (KeyError, IndexError, TypeError):
            continue
        place, document = (document, part), inner
    if place is None:
        return False
    del place[0][place[1]]
    return True


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as `; did you mean 'sources'?`, or the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def _lines(faults: Sequence[Any], model: type[BaseModel], under: str = "") -> list[str]:
    """One line for each place; a place where several types were tried is told what each expects."""
    places: dict[str, list[Any]] = {}
    for fault in faults:
        where = _where((under, *fault["loc"]) if under else fault["loc"])
        places.setdefault(where, []).append(fault)
    return [_problem(where, tried, model, under) for where, tried in places.items()]


def _where(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if part not in _NO_KEYS)


def _problem(where: str, tried: Sequence[Any], model: type[BaseModel], under: str) -> str:
    fault = tried[0]
    if fault["type"] == "extra_forbidden":
        known = _known_keys(fault["loc"][:-1], model)
        return f"unknown key {where!r}{nearest(str(fault['loc'][-1]), known)}"
    if fault["type"] == "missing":
        return f"missing key {where!r}"
    if fault["type"] == "value_error":
        message = fault["msg"].removeprefix("Value error, ")
        if not fault["loc"]:  # a rule of the whole, which names its key itself
            return f"{under}.{message}" if under else message
        return f"{where}: {message}"
    expected = " or ".join(dict.fromkeys(_expected(fault) for fault in tried))
    return f"{where}: expected {expected}, got {fault['input']!r}"


def _expected(fault: Any) -> str:
    """What pydantic wanted, in the words of a YAML file's author."""
    own = {
        "string_pattern_mismatch": "letters, digits, '.', '_' and '-', a letter or digit first",
        "string_too_short": "a name",
        "too_short": "at least one entry",
        "dict_type": "a mapping",
        "model_type": "a mapping",
        "list_type": "a list",
        "tuple_type": "a list",
        "string_type": "a string",
        "int_parsing": "a whole number",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_parsing": "a number",
        "float_type": "a number",
        "bool_parsing": "true or false",
        "bool_type": "true or false",
    }
    message = str(fault["msg"]).removeprefix("Input should be ")
    if message.startswith(("greater", "less")):
        message = f"a number {message}"
    return own.get(fault["type"], message)


# what pydantic puts into an error's location beside keys: the tried branch of a union, for one
_NO_KEYS = {"[key]", "literal['auto']", "constrained-int", "str", "dict[str,any]", "int", "bool"}
_NO_KEYS |= {"tuple[int, ...]"}


def _known_keys(location: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            inner = _section_of(model.model_fields[part].annotation)
            if inner is None:
                return []
            model = inner
    return list(model.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_of(argument)
        if found is not None:
            return found
    return None
