"""Workers that fail again and again, or are given back to other studies.

On a Ray made of plain objects and a clock that tests move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from run_synthetic import rows

pytest.importorskip("ray")

from ray.exceptions import RayActorError

from evomerge.errors import InfrastructureError, StudyStopped, UserError, WorkerLost
from evomerge.merging.recipe import ModelRef, Recipe
from evomerge.service.baselines import baselines
from evomerge.service.executor import Event, Job, Setup
from evomerge.service.study import build_controller, controlling, open_study
from evomerge.spec import StudySpec, Workers
from evomerge.store.memory import MemoryStore
from evomerge.testing.synthetic import (
    SyntheticExecutor,
    synthetic_inspection,
    synthetic_score,
    synthetic_spec,
)
from workers import executor as module
from workers.actor import SignBoard, WorkerActor
from workers.executor import RayExecutor

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


SPEC = synthetic_spec().model_dump(mode="json")
RECIPE = baselines(ModelRef("/base"), {"add": ModelRef("/add")}, "float32")[0].recipe


def test_a_broken_worker_rests_longer_each_time_while_others_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = FakeRay(lambda place, before: "broken" if place == 1 else "score")
    executor, clock = executor_on(monkeypatch, ray)
    one_round(executor, "first failure")
    assert executor.free() == 2, "one failure is nobody's habit"
    rests_s = []
    for turn in range(8):
        one_round(executor, f"turn {turn}")
        assert executor.free() == 1
        began_s = clock.now_s
        while not restarted(executor):
            clock.now_s += 1.0
        rests_s.append(clock.now_s - began_s)
    assert rests_s == [1, 2, 4, 8, 16, 32, 64, 64]


def test_a_worker_that_recovers_is_trusted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(lambda place, before: "broken" if place == 1 and before < 2 else "score")
    executor, clock = executor_on(monkeypatch, ray)
    for turn in range(2):
        one_round(executor, f"turn {turn}")
    started = ray.started
    clock.now_s += 1.0
    assert executor.free() == 1
    assert ray.started == started + 1, "a new process, for what a broken device leaves behind"
    executor.poll(0)
    assert len([e for e in one_round(executor, "well") if e.score is not None]) == 2
    assert executor.free() == 2


def test_nobody_rests_where_all_fail_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    executor, _clock = executor_on(monkeypatch, FakeRay(lambda place, before: "broken"))
    for turn in range(20):
        assert len(one_round(executor, f"turn {turn}")) == 2
        executor.free()
        executor.poll(0)


def test_bad_candidates_are_not_held_against_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(lambda place, before: "nan" if place == 1 else "score")
    executor, _clock = executor_on(monkeypatch, ray)
    for turn in range(5):
        assert len(one_round(executor, f"turn {turn}")) == 2
    assert ray.started == 2


def test_where_no_actor_starts_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    executor, _clock = executor_on(monkeypatch, FakeRay(lambda *_: "score", lambda n: False))
    restarted(executor)
    with pytest.raises(InfrastructureError, match=r"died 3 times.*no such module"):
        restarted(executor)


def test_a_node_where_no_actor_starts_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = FakeRay(lambda *_: "score", lambda n: n == 0)
    executor, clock = executor_on(monkeypatch, ray)
    for turn in range(40):
        clock.now_s += 1.0
        assert [e.score is not None for e in one_round(executor, f"turn {turn}")] == [True]
    assert ray.started < 12, "it is tried less and less often"


def _study(executor: Any) -> MemoryStore:
    spec, store = synthetic_spec(), MemoryStore()
    record = open_study(spec, store, executor)
    with controlling(record, store) as token:
        assert build_controller(record, store, executor, token).run()
    return store


def test_a_worker_that_always_fails_changes_nothing_in_a_study(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = FakeRay(lambda place, before: "broken" if place == 2 else "score")
    executor, _clock = executor_on(monkeypatch, ray, 3)
    store = _study(executor)
    assert rows(store, synthetic_spec()) == rows(_study(SyntheticExecutor()), synthetic_spec())


@pytest.mark.parametrize("what", ["broken", "dies"])
def test_a_study_stops_with_the_reason_all_attempts_give(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    reason = {"broken": "RuntimeError: device-side assert", "dies": "the machine is gone"}[what]
    executor, _clock = executor_on(monkeypatch, FakeRay(lambda place, before: what))
    with pytest.raises(StudyStopped, match=reason):
        _study(executor)


def test_an_inspection_moves_on_from_a_machine_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ray", FakeRay(lambda *_: "score", lambda n: n == 2))
    assert RayExecutor(Workers()).inspect(SPEC)["dtype"] == "float32"
    monkeypatch.setattr(module, "ray", FakeRay(lambda *_: "score", lambda n: False))
    with pytest.raises(WorkerLost, match=r"3 workers died.*no such module"):
        RayExecutor(Workers()).inspect(SPEC)


def test_a_worker_that_cannot_be_prepared_says_why() -> None:
    actor = WorkerActor(None)
    actor._worker.prepare = _no_torch  # type: ignore[method-assign]
    refusal = actor.prepare({"spec": {}, "digests": {}, "dtype": "float32"})
    assert refusal is not None
    assert "ModuleNotFoundError: No module named 'torch'" in refusal


REFUSAL = "VersionMismatch: torch is 2.12.0 here and 2.13.0 in the study"


def test_a_study_goes_on_without_a_worker_that_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(lambda *_: "score", refuses=lambda place: REFUSAL if place == 1 else None)
    executor, _clock = executor_on(monkeypatch, ray)
    store = _study(executor)
    assert rows(store, synthetic_spec()) == rows(_study(SyntheticExecutor()), synthetic_spec())
    assert list(ray._ran) == [0]
    attempts = [a for trial in store.trials("synthetic") for a in trial.attempts]
    assert all(attempt.failure is None for attempt in attempts), "it cost no attempt"


def test_a_study_that_every_worker_refuses_stops_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = FakeRay(lambda *_: "score", refuses=lambda place: REFUSAL)
    executor, _clock = executor_on(monkeypatch, ray)
    with pytest.raises(InfrastructureError, match=r"no worker can.*torch is 2\.12\.0 here and"):
        _study(executor)
    assert not ray._ran


def test_a_worker_that_refused_is_asked_again_and_then_trusted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repaired = False
    ray = FakeRay(
        lambda *_: "score", refuses=lambda place: REFUSAL if place == 1 and not repaired else None
    )
    executor, clock = executor_on(monkeypatch, ray)
    executor.prepare(Setup(SPEC, {}, "float32"))
    executor.poll(0)
    assert executor.free() == 1
    clock.now_s, repaired = 63.0, True
    assert not restarted(executor), "not yet"
    clock.now_s = 64.0
    assert restarted(executor)


def test_a_study_that_all_placed_workers_refuse_says_so_and_stops(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two machines with other versions, while the cluster still owes a third."""
    ray = FakeRay(lambda *_: "score", refuses=lambda p: REFUSAL, owed=lambda place: place == 2)
    executor, clock = executor_on(monkeypatch, ray, 3)
    executor.prepare(Setup(SPEC, {}, "float32"))
    executor.poll(0)
    executor.poll(0)
    assert caplog.messages == [
        f"a worker refuses this study and gets no job: {REFUSAL}",
        "nothing runs: every worker so far refuses this study; it stops in 900 s unless the "
        "cluster gives another one",
    ]
    for _ in range(14):
        clock.now_s += 64.0  # asked again, and again
        assert executor.free() == 0
        executor.poll(0)
    assert len(caplog.messages) == 2, "said once"
    clock.now_s += 64.0
    with pytest.raises(InfrastructureError, match=r"2 refuse it.*within 900 s.*torch is 2\.12\.0"):
        executor.poll(0)


def test_a_worker_that_comes_in_time_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    owed = True
    ray = FakeRay(
        lambda *_: "score",
        refuses=lambda place: REFUSAL if place == 0 else None,
        owed=lambda place: place == 1 and owed,
    )
    executor, clock = executor_on(monkeypatch, ray)
    executor.prepare(Setup(SPEC, {}, "float32"))
    for _ in range(2):
        executor.poll(0)
        clock.now_s += 800.0
        owed = False
        executor._start(executor._slots[1])  # the cluster gives it
        executor.poll(0)
        assert executor.free() == 1
        executor.poll(0)
    assert len(one_round(executor, "at last")) == 1


def test_a_cluster_that_gives_nothing_is_waited_for_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    executor, clock = executor_on(monkeypatch, FakeRay(lambda *_: "score", owed=lambda place: True))
    executor.prepare(Setup(SPEC, {}, "float32"))
    executor.poll(0)
    assert not caplog.messages, "every start takes a while"
    for _ in range(100):
        clock.now_s += 61.0
        executor.poll(0)
    assert caplog.messages == [
        "nothing has run for 61 s: waiting for the cluster to give a worker 1 CPUs and 0 GPUs"
    ]


def test_a_job_goes_to_the_worker_that_fails_least(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(lambda place, before: "broken" if place == 0 else "score")
    executor, _clock = executor_on(monkeypatch, ray)
    executor.submit(Job("first", RECIPE, "search"))
    executor.poll(0)
    for turn in range(5):
        executor.submit(Job(f"{turn}", RECIPE, "search"))
        assert [event.worker for event in executor.poll(0)] == ["place 1"]


@pytest.mark.parametrize("own", [True, False])
def test_more_gpus_than_any_node_has_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, own: bool
) -> None:
    """But for a cluster that was joined: it may grow, so its user is told what is waited for."""
    fake = FakeRay(lambda *_: "score")
    fake.is_initialized = lambda: False
    monkeypatch.setattr(module, "ray", fake)
    monkeypatch.setattr(module, "_join", lambda workers: None)
    if not own:
        monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    executor = RayExecutor(Workers(num_gpus=2))
    said = "no node of the cluster holds a worker of 1 CPUs and 2 GPUs"
    if own:
        with pytest.raises(UserError, match=f"{said}.*num_gpus.*the most.* 99 CPUs and 0 GPUs"):
            executor.inspect(SPEC)
    else:
        assert executor.inspect(SPEC)["dtype"] == "float32"
        assert caplog.messages[0].startswith(said)
        assert caplog.messages[0].endswith("waiting 900 s for an autoscaler to bring one")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("The actor died because its node has died. Node Id: 1", "NodeLost"),
        ("The actor died because its process has died.", "WorkerLost"),
    ],
)
def test_a_machine_that_went_is_told_from_a_worker_that_died(
    monkeypatch: pytest.MonkeyPatch, text: str, error: str
) -> None:
    ray = FakeRay(lambda place, before: "score")
    ray._run = lambda *_: RayActorError(error_msg=text)  # type: ignore[method-assign]
    executor, _clock = executor_on(monkeypatch, ray)
    event, *_ = one_round(executor, "all")
    assert event.failure is not None
    assert event.failure.error == error
    assert text in event.failure.message


def _no_torch(*_: Any, **__: Any) -> None:
    raise ModuleNotFoundError("No module named 'torch'")


def test_one_and_a_half_gpus_are_refused() -> None:
    with pytest.raises(UserError, match=r"num_gpus.*1\.5"):
        RayExecutor(Workers(num_gpus=1.5))


def test_what_is_above_the_limit_goes_when_its_job_ends_and_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = FakeRay(lambda place, before: "score")
    executor, _clock = executor_on(monkeypatch, ray, 4)
    for n in range(3):
        executor.submit(Job(f"job-{n}", RECIPE, "search"))
    executor.limit(1)
    assert executor.free() == 0
    assert len(ray._places) == 3, "the idle one went at once, those at work did not"
    assert len(executor.poll(0)) == 3, "no job was cut off"
    assert executor.free() == 1
    assert len(ray._places) == 1
    executor.limit(None)
    executor.free()
    executor.poll(0)
    assert (executor.free(), len(ray._places)) == (4, 4)


def test_places_above_the_limit_stay_asked_for_but_not_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = FakeRay(lambda place, before: "score")
    executor, clock = executor_on(monkeypatch, ray, 2)
    executor.limit(1)
    executor.free()
    assert ray.started == 2
    clock.now_s += module._CROWD_S - 1
    executor.free()
    assert ray.started == 2, "another study's actor comes first"
    clock.now_s += 1
    executor.free()
    assert ray.started == 3, "an autoscaler sees it"
    executor.poll(0)
    assert executor.free() == 1, "it came, and gets no job"
    assert (len(ray._places), ray.started) == (1, 3)


def test_a_worker_that_refuses_is_given_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(lambda *_: "score", refuses=lambda place: REFUSAL if place == 0 else None)
    executor, _clock = executor_on(monkeypatch, ray)
    executor.prepare(Setup(SPEC, {}, "float32"))
    executor.poll(0)
    executor.limit(1)
    assert executor.free() == 1
    assert list(ray._places) == [1]


def test_the_pool_is_the_live_nodes_and_a_worker_fits_on_one_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = FakeRay(lambda *_: "score")
    executor, _clock = executor_on(monkeypatch, ray)
    one = {"CPU": 8.0, "GPU": 3.0, "memory": 1e9}
    small = {"CPU": 9.0, "GPU": 1.0}
    live = [{"Alive": True, "Resources": resources} for resources in (one, small, {})]
    nodes = [*live, {"Alive": False, "Resources": one}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    executor._workers = Workers(num_gpus=2, num_cpus=4)
    pool = executor.pool()
    assert (pool.name, pool.resources) == ("fake", {"CPU": 17.0, "GPU": 4.0})
    assert (pool.worker, pool.capacity) == ({"CPU": 4.0, "GPU": 2.0}, 1)
