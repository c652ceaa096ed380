"""How long an inspection over Ray may take: no limit once the cluster has given a worker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.exceptions import GetTimeoutError

from evomerge.errors import InfrastructureError
from evomerge.spec import Workers
from workers import executor as module


class _Cluster:
    """Stands for ray and for one actor: each call takes the seconds it is given."""

    def __init__(self, **takes_s: float) -> None:
        self._takes_s = takes_s
        self.actor = SimpleNamespace(ready=_call("ready"), inspect=_call("inspect"))

    def get(self, call: str, timeout: float | None = None) -> dict[str, Any]:
        if timeout is not None and self._takes_s[call] > timeout:
            raise GetTimeoutError
        return {"inspection": {"dtype": "float32"}}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 1.0}}]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 1.0}


def _call(name: str) -> Any:
    return SimpleNamespace(remote=lambda *arguments: name)


def executor_on(cluster: _Cluster, monkeypatch: pytest.MonkeyPatch) -> module.RayExecutor:
    monkeypatch.setattr(module, "ray", cluster)
    executor = object.__new__(module.RayExecutor)
    executor._workers = Workers()
    executor._may_grow = False
    executor._slots = [module._Slot(cluster.actor, pending="ready")]
    return executor


def test_large_checkpoints_take_as_long_as_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = executor_on(_Cluster(ready=1, inspect=100_000), monkeypatch)
    assert executor.inspect({}) == {"dtype": "float32"}


def test_a_cluster_without_room_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = executor_on(_Cluster(ready=100_000, inspect=1), monkeypatch)
    with pytest.raises(InfrastructureError, match=r"no worker 1 CPUs .* has \{'CPU': 1.0\}"):
        executor.inspect({})
