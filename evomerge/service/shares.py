"""Shares of a pool: how many of its workers each of the studies that draw on it may hold.

Every controller computes all shares by itself, from the claims in the store, and keeps to its own:
no further process has to live. Knows nothing of trials, and of executors only what their pool is.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta

from evomerge.service.executor import Executor
from evomerge.spec import Workers
from evomerge.store.base import Claim, StudyStore

_log = logging.getLogger(__name__)
_INSPECTION_S = 1200.0  # nothing renews its claim: longer than a worker is waited for
_FIRST = 2**31 - 1  # the priority of an inspection: else a study of low priority could never start
_UNITS = 10_000  # of a resource; Ray counts in these too, so that 10 times 0.1 GPUs are one


def shares(claims: Sequence[Claim], pool: Mapping[str, float]) -> dict[str, int]:
    """How many workers each study may hold of a pool of so much of each resource.

    Dominant resource fairness: worker after worker goes to the study that has least of the pool,

        sₛ = max over resources r of  nₛ · workerₛ[r] / pool[r],

    as long as it wants another and one fits in what is left. Where all workers are of one size that
    is max-min fairness. A higher priority is served in full before a lower one gets what it leaves.
    Of equals the earlier claim of the sequence comes first.

    Source: Ghodsi et al. 2011, NSDI, algorithm 1, carried out for each priority in turn.
    """
    left = {resource: round(amount * _UNITS) for resource, amount in pool.items()}
    whole, held = dict(left), {claim.study: 0 for claim in claims}
    for priority in sorted({claim.priority for claim in claims}, reverse=True):
        open_ = [claim for claim in claims if claim.priority == priority]
        while open_ := [c for c in open_ if held[c.study] < c.wanted and _fits(c, left)]:
            poorest = min(open_, key=lambda claim: held[claim.study] * _dominant(claim, whole))
            held[poorest.study] += 1
            for resource, amount in _units(poorest).items():
                left[resource] -= amount
    return held


class PoolShare:
    """One study's share of the pool that its executor draws on.

    `token` tells this process's claim from one of another that runs, or ran, the same study.
    """

    def __init__(
        self,
        store: StudyStore,
        executor: Executor,
        study: str,
        workers: Workers,
        *,
        token: str,
        clock: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._executor = executor
        self._study = study
        self._workers = workers
        self._token = token
        self._clock = clock
        self._since = clock()
        self._waits = False

    def renew(self, wanted: int, held: int, lease_s: float) -> None:
        """Claim `wanted` workers for `lease_s` seconds, and hold no more than what that comes to.

        A study that nobody shares with is not limited: pools grow, and a machine takes more
        workers than it has cores if that is what was asked for.
        """
        pool = self._executor.pool()
        if pool is None:
            return
        now, asked = self._clock(), min(wanted, self._workers.count, pool.capacity)
        self._claim(self._study, self._workers.priority, asked, held, lease_s)
        sharing = [c for c in self._store.claims(now=now) if c.pool == pool.name]
        limit = None
        if any(claim.study != self._study and claim.wanted for claim in sharing):
            limit = shares(sharing, pool.resources).get(self._study, 0)
        self._executor.limit(limit)
        self._say(waits=bool(asked) and limit == 0)

    @contextlib.contextmanager
    def inspecting(self) -> Iterator[None]:
        """Have one worker before everybody else's attempts, for the length of a `with`."""
        name = f"{self._study} (inspection)"  # the study itself may be running
        self._claim(name, _FIRST, 1, 0, _INSPECTION_S)
        try:
            yield
        finally:
            self._store.withdraw(name, self._token)

    def _say(self, *, waits: bool) -> None:
        if waits and not self._waits:
            _log.warning(
                "study %s waits: others that share its workers come first; `evomerge status` lists "
                "them, and `workers.priority` puts one before another", self._study
            )  # fmt: skip
        self._waits = waits

    def _claim(self, name: str, priority: int, wanted: int, held: int, lease_s: float) -> None:
        pool = self._executor.pool()
        if pool is None:
            return
        until = self._clock() + timedelta(seconds=lease_s)
        counts = (priority, wanted, held)
        claim = Claim(name, self._token, pool.name, *counts, pool.worker, self._since, until)
        self._store.claim(claim)


def _units(claim: Claim) -> dict[str, int]:
    units = {resource: round(amount * _UNITS) for resource, amount in claim.worker.items()}
    return {resource: amount for resource, amount in units.items() if amount}


def _fits(claim: Claim, left: Mapping[str, int]) -> bool:
    return all(left.get(resource, 0) >= amount for resource, amount in _units(claim).items())


def _dominant(claim: Claim, whole: Mapping[str, int]) -> float:
    """The part of the pool that one worker takes, of the resource of which it takes most."""
    return max((amount / whole[resource] for resource, amount in _units(claim).items()), default=0)
