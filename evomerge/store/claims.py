"""Claims to a pool of workers, in an SQL database: a part of `sql.SqlStore`.

They are written under no study's lock and leave no mark, since nothing depends on who wrote last:
a controller that lost its study says so at its next write there, and its claim lapses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from evomerge.errors import StoreUnreachable
from evomerge.store.base import Claim
from evomerge.store.engine import CommitUnknown, transaction
from evomerge.store.reconnecting import reconnecting
from evomerge.store.tables import claims

_CLAIM = tuple(claims.columns)  # in the order of the dataclass's fields
_OLDEST_FIRST = (claims.c.since, claims.c.study)


class SqlClaims:
    """The methods of a StudyStore that are about claims."""

    engine: sa.Engine
    reconnect_s: float

    @reconnecting
    def claim(self, claim: Claim) -> None:
        try:
            self._put(claim)
        except IntegrityError:  # another process was the first to insert that study's
            self._put(claim)

    @reconnecting
    def claims(self, *, now: datetime) -> Sequence[Claim]:
        query = sa.select(*_CLAIM).where(claims.c.lease_until > now).order_by(*_OLDEST_FIRST)
        with transaction(self.engine, write=False) as connection:
            return [Claim(*row) for row in connection.execute(query)]

    @reconnecting
    def withdraw(self, study: str, token: str) -> None:
        mine = (claims.c.study == study, claims.c.token == token)
        with self._repeatable() as connection:
            connection.execute(claims.delete().where(*mine))

    def _put(self, claim: Claim) -> None:
        row = asdict(claim)
        update = claims.update().where(claims.c.study == claim.study).values(**row)
        with self._repeatable() as connection:
            if not connection.execute(update).rowcount:
                connection.execute(claims.insert(), row)

    @contextmanager
    def _repeatable(self) -> Iterator[sa.Connection]:
        """A transaction that may be done twice, so that nobody asks whether it came through."""
        try:
            with transaction(self.engine, write=True) as connection:
                yield connection
        except CommitUnknown as error:
            raise StoreUnreachable(str(error)) from error
