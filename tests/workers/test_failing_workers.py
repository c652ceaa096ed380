"""Workers that fail again and again, or are given back to other studies.

On a Ray made of plain objects and a clock that tests move.
"""

from __future__ import annotations

from typing import Any

import pytest
from run_synthetic import rows

pytest.importorskip("ray")

from fake_ray import RECIPE, SPEC, FakeRay, executor_on, one_round, restarted
from ray.exceptions import RayActorError

from evomerge.errors import InfrastructureError, StudyStopped, UserError, WorkerLost
from evomerge.service.executor import Job, Setup
from evomerge.service.study import build_controller, controlling, open_study
from evomerge.spec import Workers
from evomerge.store.memory import MemoryStore
from evomerge.testing.synthetic import (
    SyntheticExecutor,
    synthetic_spec,
)
from workers import executor as module
from workers.actor import WorkerActor
from workers.executor import RayExecutor


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
