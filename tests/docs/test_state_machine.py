"""The state machine in the docs has exactly the edges that a store has: every one, and no other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from evomerge.errors import StaleAttempt
from evomerge.store.memory import MemoryStore
from evomerge.testing.store_builders import NOW, StudyUnderTest, holder
from evomerge.trial import State

PAGE = Path(__file__).parents[2] / "docs" / "decisions" / "durability.md"
Edges = set[tuple[str, str]]

OPERATIONS: list[Callable[[StudyUnderTest], object]] = [
    lambda s: s.start(),
    lambda s: s.finish(),
    lambda s: s.fail(state=State.WAITING),
    lambda s: s.fail(state=State.FAIL),
    lambda s: s.reuse(),
    lambda s: s.start(part="selection", token="t2"),
    lambda s: s.finish("t2"),
    lambda s: s.fail("t2", state=State.WAITING),
    lambda s: s.fail("t2", state=State.FAIL),
    lambda s: s.store.acquire("s", holder(), now=NOW, force=True),
    lambda s: s.store.mark_told("s", {0: 0}, controller="c1"),
]


def walked() -> tuple[Edges, Edges]:
    """Edges of trials and of attempts that some sequence of writes takes."""
    trials: Edges = set()
    attempts: Edges = set()
    sequences: list[tuple[Callable[[StudyUnderTest], object], ...]] = [()]
    for sequence in sequences:
        study = StudyUnderTest(MemoryStore(), trials=1)
        before, after = None, study.trial()
        for operation in sequence:
            before = after
            try:
                operation(study)
            except (ValueError, StaleAttempt):
                assert study.trial() == before
                break
            after = study.trial()
        else:
            states = {a.token: a.state.value for a in before.attempts} if before else {}
            trials.add((before.state.value if before else "new", after.state.value))
            attempts |= {(states.get(a.token, "new"), a.state.value) for a in after.attempts}
            if len(sequence) < 4 and before != after:
                sequences += [(*sequence, further) for further in OPERATIONS]
    return _moves(trials), _moves(attempts)


def _moves(edges: Edges) -> Edges:
    return {(old, new) for old, new in edges if old != new}


def documented(what: str) -> Iterator[tuple[str, str]]:
    """The edges in the page's table of that name, each with a sentence."""
    section = PAGE.read_text().partition(f"| {what} |")[2].partition("\n\n")[0]
    for row in re.findall(r"^\| (\w+) → (\w+) \| (.{20,}) \|$", section, flags=re.MULTILINE):
        yield row[0], row[1]


def test_every_edge_of_the_page_is_one_of_the_store_and_the_other_way_round() -> None:
    trials, attempts = walked()
    assert set(documented("a trial")) == trials
    assert set(documented("an attempt")) == attempts
    assert len(trials) == 6
