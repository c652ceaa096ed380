"""Is a recorded controller alive? Asked of this process, of one that ended, of another host."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from evomerge.service.liveness import is_dead, is_running, process_start
from evomerge.store.base import Controller

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def me() -> Controller:
    started = process_start(os.getpid())
    assert started is not None
    until = NOW + timedelta(seconds=30)
    return Controller("token", socket.gethostname(), os.getpid(), started, until)


def test_this_process_lives(me: Controller) -> None:
    assert not is_dead(me)
    assert is_running(me, NOW)


def test_a_process_that_was_killed_is_dead_before_and_after_it_is_waited_for(
    me: Controller,
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        started = process_start(child.pid)
        assert started is not None
        holder = replace(me, pid=child.pid, started=started)
        assert not is_dead(holder)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
        assert is_dead(holder)
    assert is_dead(holder)
    assert not is_running(holder, NOW)


def test_another_process_under_the_same_id_is_not_the_controller(me: Controller) -> None:
    assert is_dead(replace(me, started=me.started - 1))


def test_of_another_host_only_the_lease_tells(me: Controller) -> None:
    elsewhere = replace(me, host="another-host", pid=1, started=0.0)
    assert not is_dead(elsewhere)
    assert is_running(elsewhere, NOW)
    assert not is_running(elsewhere, elsewhere.lease_until)
