"""Errors cross processes and are listed where a reader looks for them."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from evomerge import errors
from evomerge.errors import EvomergeError, SpecError, TaskError, UserError

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, EvomergeError)
]
ARGUMENTS = {SpecError: ("study.yaml", ["one", "two"]), TaskError: ("one", "two")}


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_pickling(kind: type[EvomergeError]) -> None:
    error = kind(*ARGUMENTS.get(kind, ("model.norm.weight: is NaN",)))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert copy.args == error.args
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_the_docstring_draws_the_hierarchy() -> None:
    drawn, ancestors = {}, []
    for line in inspect.getdoc(errors).splitlines():
        if found := re.match(r"(?:    )?((?:[│├└─ ]{4})*)([A-Z]\w+)", line):
            depth = len(found[1]) // 4
            if found[2] == "EvomergeError" or found[1].strip():
                ancestors[depth:] = [found[2]]
                drawn[found[2]] = ancestors[depth - 1] if depth else None
    bases = {kind.__name__: kind.__bases__[0].__name__ for kind in CLASSES}
    assert drawn == {**bases, "EvomergeError": None}


def test_several_problems_are_a_list_and_one_is_a_line() -> None:
    assert str(SpecError("s.yaml", ["one"])) == "s.yaml: one"
    assert str(SpecError("s.yaml", ["one", "two"])) == "s.yaml: 2 problems\n  - one\n  - two"
    assert str(TaskError("one")) == "one"
    assert str(TaskError("one", "two")) == "2 problems with the tasks\n  - one\n  - two"


def test_what_the_user_can_mend_is_a_user_error() -> None:
    ours = {"CandidateError", "NonFiniteModel", "InfrastructureError", "WorkerLost", "NodeLost"}
    ours |= {"VersionMismatch", "OutOfMemory"}
    others = {kind.__name__ for kind in CLASSES if not issubclass(kind, UserError)}
    assert others == {*ours, "EvomergeError", "StaleAttempt", "StudyStopped"}
