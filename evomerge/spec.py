"""The study spec: what a user asks for, checked as far as text alone can be checked.

Reads YAML, names every problem at once and suggests the nearest known key. Opens no checkpoint,
loads no task and knows no merge method: what needs those is checked by `evomerge.service.inspection`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

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
    """Fractions of every task's items: what the search sees, what picks the winner, what is reported."""

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
    """Which sampler proposes genomes. `sigma0` is in widths of a gene's bounds."""

    name: SamplerName = "cmaes"
    population: Literal["auto"] | Annotated[int, Field(ge=2)] = "auto"
    sigma0: float = Field(default=0.1667, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    schedule: Literal["generational"] = "generational"


class Budget(_Section):
    """`trials` counts what the sampler proposes (baselines come on top); `finalists` of them are
    scored again on the selection items to pick the winner."""

    trials: int = Field(ge=1)
    finalists: int = Field(default=8, ge=1)


class Evaluation(_Section):
    """How a candidate is run. `dtype: auto` is the base's; the merged model is rounded to it once."""

    dtype: Dtype = "auto"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    device: str = "auto"


class Workers(_Section):
    """Who runs attempts, with how much of a machine each, and for how long without a sign of life."""

    count: int = Field(default=1, ge=1)
    num_cpus: int = Field(default=1, ge=1)
    num_gpus: float = Field(default=0, ge=0)
    lease_s: float = Field(default=900, gt=0)
    max_attempts: int = Field(default=3, ge=1)


class StudySpec(_Section):
    """Everything a study is defined by. Paths are absolute once `load` has read them."""

    name: Name
    base: str = Field(min_length=1)
    sources: dict[Name, str] = Field(min_length=1)
    space: str | dict[str, Any] = "source_depth"
    objective: Objective
    sampler: SamplerSpec = SamplerSpec()
    budget: Budget
    evaluation: Evaluation = Evaluation()
    workers: Workers = Workers()

    @model_validator(mode="after")
    def _pareto_needs_a_sampler(self) -> StudySpec:
        pareto = self.objective.aggregate == "pareto"
        if pareto and self.sampler.name in ("cmaes", "gp"):
            raise ValueError(
                f"sampler {self.sampler.name!r} has one objective only; "
                "use nsga2, tpe or random with `aggregate: pareto`"
            )
        return self

    @classmethod
    def load(cls, path: Path) -> StudySpec:
        """Read a YAML spec; relative paths are taken from the spec's own folder.

        Raises SpecError with every problem found.
        """
        document = read_yaml(path)
        if not isinstance(document, dict):
            raise SpecError(str(path), ["a study spec is a mapping with `name`, `base`, `sources`"])
        return cls.parse(document, subject=str(path), folder=path.resolve().parent)

    @classmethod
    def parse(cls, document: dict[str, Any], *, subject: str, folder: Path) -> StudySpec:
        """Check a document and make its paths absolute. Raises SpecError."""
        try:
            spec = cls.model_validate(document)
        except ValidationError as error:
            raise SpecError(subject, problems(error, cls)) from None
        objective = spec.objective.model_copy(
            update={"include_path": locate(spec.objective.include_path, folder)}
        )
        space = spec.space
        if isinstance(space, str) and space.endswith((".yaml", ".yml")):
            space = locate(space, folder) or space
        return spec.model_copy(
            update={
                "base": locate(spec.base, folder),
                "sources": {name: locate(path, folder) for name, path in spec.sources.items()},
                "objective": objective,
                "space": space,
            }
        )

    def identity(self) -> dict[str, Any]:
        """The part of a spec that a resumed study may not change: all but budget and workers."""
        return self.model_dump(mode="json", exclude={"budget", "workers"})


def locate(path: str | None, folder: Path) -> str | None:
    """Make a path absolute: from the spec's folder, else from the working directory.

    What is in neither place is left as it is: it may be the name of a model on the hub.
    """
    if path is None:
        return None
    for root in (folder, Path.cwd()):
        candidate = root / Path(path).expanduser()
        if candidate.exists():
            return os.path.normpath(candidate)
    return path


def read_yaml(path: Path) -> object:
    """Parse a YAML file. Raises SpecError if it cannot be read or does not parse."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(str(path), ["no such file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(str(path), [f"cannot be read: {error}"]) from None
    except yaml.YAMLError as error:
        raise SpecError(str(path), [f"is not YAML: {' '.join(str(error).split())}"]) from None


def problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each fault that pydantic found, with the nearest known key for an unknown one."""
    return [_problem(fault["loc"], fault, model) for fault in error.errors()]


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as `; did you mean 'sources'?`, or the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def _problem(location: tuple[int | str, ...], fault: Any, model: type[BaseModel]) -> str:
    path = [str(part) for part in location if part not in _UNION_TAGS]
    where = ".".join(path)
    if fault["type"] == "extra_forbidden":
        return f"unknown key {where!r}{nearest(path[-1], _known_keys(location[:-1], model))}"
    if fault["type"] == "missing":
        return f"missing key {where!r}"
    message = fault["msg"].removeprefix("Value error, ")
    got = "" if fault["type"] == "value_error" else f", got {fault['input']!r}"
    return f"{where}: {message}{got}" if where else message


# pydantic puts the tried branch of a union into an error's location
_UNION_TAGS = {"literal['auto']", "constrained-int", "str", "dict[str,any]", "int"}


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
