"""A Ray of plain objects, and a clock that tests move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from evomerge.merging.recipe import ModelRef, Recipe
from evomerge.service.baselines import baselines
from evomerge.service.executor import Event, Job
from evomerge.spec import StudySpec, Workers
from evomerge.testing.synthetic import synthetic_inspection, synthetic_score, synthetic_spec
from workers import executor as module
from workers.actor import SignBoard
from workers.executor import RayExecutor

SPEC = synthetic_spec().model_dump(mode="json")
RECIPE = baselines(ModelRef("/base"), {"add": ModelRef("/add")}, "float32")[0].recipe
DEAD = RayActorError(error_msg="no such module")
Answer = Callable[[int, int], str]
"""(place, how many jobs ran there before) -> `score`, `broken`, `nan` or `dies`."""


class FakeRay:
    """One process: each call runs at once, and its ref is its answer's key.

    An actor takes the lowest free place, as one machine after another; `boots` says whether the
    n-th actor ever made comes up, `refuses` what the actor at a place has against the study, `owed`
    whether the cluster has yet to place it.
    """

    def __init__(
        self,
        answer: Answer,
        boots: Callable[[int], bool] = lambda n: True,
        refuses: Callable[[int], str | None] = lambda place: None,
        owed: Callable[[int], bool] = lambda place: False,
    ) -> None:
        self._answer = answer
        self._boots = boots
        self._refuses = refuses
        self._owed = owed
        self._places: dict[int, Any] = {}
        self._ran: dict[int, int] = {}
        self._answers: dict[str, Any] = {}
        self.started = 0

    def is_initialized(self) -> bool:
        return True

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "ab" * 28, get_session_name=lambda: "fake")

    def nodes(self) -> Any:
        return [{"Alive": True, "Resources": {"CPU": 99.0}}]

    def remote(self, kind: type) -> Any:
        if kind is SignBoard:
            board = SimpleNamespace(place=None, take=self._call(list))
            return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: board))
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._start))

    def wait(self, refs: Sequence[str], num_returns: int, timeout: float) -> Any:
        answered = [ref for ref in refs if not ref.startswith("owed")]
        return answered[:num_returns], []

    def get(self, ref: str, timeout: float | None = None) -> Any:
        answer = self._answers.pop(ref)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self, actor: Any) -> None:
        if self._places.get(actor.place) is actor:
            del self._places[actor.place]

    def _start(self, board: Any) -> Any:
        place = next(i for i in range(99) if i not in self._places)
        up = self._boots(self.started)
        self.started += 1
        actor = SimpleNamespace(place=place)
        actor.ready = self._call(lambda: None if up else DEAD)
        actor.inspect = self._call(
            lambda spec: {"inspection": synthetic_inspection(StudySpec.model_validate(spec))}
        )
        owed = "owed " if self._owed(place) else ""
        actor.prepare = self._call(lambda setup: self._refuses(place) if up else DEAD, owed)
        actor.run = self._call(lambda token, recipe, part: self._run(place, token, recipe, part))
        self._places[place] = actor
        return actor

    def _call(self, method: Callable[..., Any], prefix: str = "") -> Any:
        def remote(*arguments: Any) -> str:
            ref = f"{prefix}ref {len(self._answers)} {id(object())} {self.started}"
            while ref in self._answers:
                ref += "+"
            self._answers[ref] = method(*arguments)
            return ref

        return SimpleNamespace(remote=remote)

    def _run(self, place: int, token: str, recipe: Mapping[str, Any], part: Any) -> Any:
        before = self._ran.get(place, 0)
        self._ran[place] = before + 1
        what = self._answer(place, before)
        event = {"token": token, "worker": f"place {place}", "seconds": {}}
        if what == "dies":
            return RayActorError(error_msg="the machine is gone")
        if what == "score":
            return {**event, "score": _score(recipe, part)}
        error = {"broken": "RuntimeError", "nan": "NonFiniteModel"}[what]
        failure = {"error": error, "message": "device-side assert"}
        return {**event, "failure": failure, "candidate": what == "nan"}


def _score(recipe: Mapping[str, Any], part: Any) -> dict[str, Any]:
    return synthetic_score(Recipe.from_json(recipe), part, ["add", "sort"]).to_json()


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def executor_on(
    monkeypatch: pytest.MonkeyPatch, ray: FakeRay, count: int = 2
) -> tuple[RayExecutor, Clock]:
    monkeypatch.setattr(module, "ray", ray)
    clock = Clock()
    executor = RayExecutor(Workers(count=count), time_s=clock)
    executor.free()
    executor.poll(0)
    return executor, clock


def one_round(executor: RayExecutor, name: str) -> Sequence[Event]:
    """A job for every worker that is free, and what came of them."""
    for n in range(executor.free()):
        executor.submit(Job(f"{name}-{n}", RECIPE, "search"))
    return executor.poll(0)


def restarted(executor: RayExecutor) -> bool:
    """Whether both workers are free, once an actor that was asked for has had its chance."""
    executor.free()
    executor.poll(0)
    return executor.free() == 2
