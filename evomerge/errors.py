"""Every exception evomerge raises on purpose.

    EvomergeError
    ├── UserError                 the input is wrong; the CLI prints one line and exits with 2
    │   ├── SpecError             a study spec, a search space or a recipe; lists every problem
    │   ├── CheckpointError       a checkpoint on disk cannot be used
    │   │   ├── MissingTensor
    │   │   ├── ShapeMismatch
    │   │   ├── NonFiniteTensor   NaN or infinity in a checkpoint
    │   │   └── PickleRefused     a pickle checkpoint: loading it would run its code
    │   ├── MergeError            a recipe cannot be applied to these checkpoints
    │   ├── TaskError             an lm-eval task cannot be loaded, or has too few items
    │   ├── ExportError           a checkpoint cannot be written (a full disk, an existing folder)
    │   └── StoreError            the store cannot be used
    │       ├── StudyNotFound
    │       ├── StudyChanged      a study of that name exists, with another spec
    │       ├── StudyBusy         another controller is running this study
    │       │   └── StudyTaken    and has taken it over from this one, which writes no more
    │       ├── StoreLocked
    │       ├── StoreUnreachable  no connection to the database, or it broke
    │       └── SchemaTooNew      written by a newer evomerge
    ├── CandidateError            the recipe makes no usable model; its trial fails, not the search
    │   └── NonFiniteModel
    ├── InfrastructureError       the attempt failed, not the candidate; it is retried
    │   ├── WorkerLost
    │   │   └── NodeLost          its whole machine went
    │   ├── VersionMismatch       a worker is not like the one that the study was started with
    │   └── OutOfMemory
    ├── StaleAttempt              a result whose attempt is no longer the live one; it is refused
    └── StudyStopped              every attempt fails in the same way, so the study stopped

Exceptions cross process boundaries, so every constructor takes positional arguments only and
passes exactly those to `Exception`: each class survives pickling.
"""

from __future__ import annotations

from collections.abc import Iterable


class EvomergeError(Exception):
    """Base of every error evomerge raises on purpose."""


class UserError(EvomergeError):
    """The input is wrong; the message names the thing and the way out."""


class SpecError(UserError):
    """One or more problems of a spec, a space or a recipe, all reported at once.

    `subject` is what was read (a path or a name), `problems` one line for each fault.
    """

    def __init__(self, subject: str, problems: list[str]) -> None:
        super().__init__(subject, problems)
        self.subject = subject
        self.problems = problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"{self.subject}: {self.problems[0]}"
        return _listed(f"{self.subject}: {len(self.problems)} problems", self.problems)


class CheckpointError(UserError):
    """A checkpoint on disk cannot be used."""


class MissingTensor(CheckpointError):
    """A source lacks a tensor that the base has."""


class ShapeMismatch(CheckpointError):
    """A tensor has another shape in a source than in the base."""


class NonFiniteTensor(CheckpointError):
    """A tensor of a checkpoint holds NaN or infinity."""


class PickleRefused(CheckpointError):
    """The checkpoint is a pickle; loading it would run code from it."""


class MergeError(UserError):
    """A recipe cannot be applied to these checkpoints."""


class TaskError(UserError):
    """An lm-eval task cannot be loaded, or has too few items; one argument for each problem."""

    def __str__(self) -> str:
        if len(self.args) == 1:
            return str(self.args[0])
        return _listed(f"{len(self.args)} problems with the tasks", self.args)


class ExportError(UserError):
    """A checkpoint cannot be written."""


class StoreError(UserError):
    """The store cannot be used."""


class StudyNotFound(StoreError):
    """No study of that name is in the store."""


class StudyChanged(StoreError):
    """A study of that name exists, with another spec."""


class StudyBusy(StoreError):
    """Another controller is running this study."""


class StudyTaken(StudyBusy):
    """Another controller has taken this study over; this one writes no more."""


class StoreLocked(StoreError):
    """The database stayed locked for longer than we wait."""


class StoreUnreachable(StoreError):
    """There is no connection to the database; nothing of the transaction is in it."""


class SchemaTooNew(StoreError):
    """The store was written by a newer evomerge."""


class CandidateError(EvomergeError):
    """This recipe makes no usable model; the trial fails and the search goes on."""


class NonFiniteModel(CandidateError):
    """The merged model holds, or computes, NaN or infinity."""


class InfrastructureError(EvomergeError):
    """The attempt failed, not the candidate; it is retried."""


class WorkerLost(InfrastructureError):
    """The worker died or stopped answering."""


class NodeLost(WorkerLost):
    """The worker's whole machine went, or cannot be reached: no fault of the candidate."""


class VersionMismatch(InfrastructureError):
    """A worker's libraries or device are not those that the study was started with."""


class OutOfMemory(InfrastructureError):
    """The worker ran out of memory."""


class StaleAttempt(EvomergeError):
    """A result came for an attempt that is no longer the live one."""


class StudyStopped(EvomergeError):
    """Every attempt fails in the same way, so the study stopped."""


def _listed(heading: str, lines: Iterable[str]) -> str:
    return "\n".join([heading, *(f"  - {line}" for line in lines)])
