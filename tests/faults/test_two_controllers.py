"""Two real controllers on one study: the second is refused, one that wakes too late writes none."""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from synthetic_processes import Place, Process, held_in_mid_search, uninterrupted

from evomerge.service.ledger import utc_now
from evomerge.store.tables import studies

pytestmark = pytest.mark.slow


def lapse(place: Place) -> None:
    """As if the controller had slept for longer than its lease."""
    engine = sa.create_engine(place.url)
    with engine.begin() as connection:
        past = utc_now() - timedelta(seconds=1)
        connection.execute(studies.update().values(controller_lease_until=past))
    engine.dispose()


@pytest.mark.parametrize(("here", "there"), [("node-a", "node-b"), ("node-a", "node-a")])
def test_one_that_slept_through_its_lease_writes_no_more(
    tmp_path: Path, run: Callable[..., Process], here: str, there: str
) -> None:
    place = Place(tmp_path)
    first = held_in_mid_search(place, lambda: run(place, host=here))
    second = run(place, host=there)
    assert second.end() == 2
    assert f"is being run by process {first.popen.pid} on {here}: stop it" in second.last_line
    first.send(signal.SIGSTOP)
    lapse(place)
    place.let_go("score")
    third = run(place, host=there)
    assert third.end() == 0, third.said
    assert place.table() == uninterrupted(place.spec)
    assert len(place.failures()) == 2
    before = place.trials()
    first.send(signal.SIGCONT)
    assert first.end() == 3
    said = "evomerge: this process no longer runs study 'synthetic': it was given up"
    assert first.last_line.startswith(said)
    assert "Traceback" not in first.said
    assert place.trials() == before
