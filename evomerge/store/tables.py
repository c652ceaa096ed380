"""The tables, and the column types that keep floats and times exactly.

Every name starts with `evomerge_`, so that Optuna's tables live in the same database. Holds no
query. A change here needs a migration in `alembic/versions`; a test compares the two.
"""

from __future__ import annotations

import struct
import zlib
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator

metadata = sa.MetaData()


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime; SQLite, which knows no zones, keeps the UTC clock time."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value} has no time zone; pass an aware datetime")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Float64s(TypeDecorator[tuple[float, ...]]):
    """Floats [n] as their little-endian bytes: every bit comes back, of NaN and -0.0 too."""

    impl = sa.LargeBinary
    cache_ok = True

    def process_bind_param(
        self, value: tuple[float, ...] | None, dialect: sa.Dialect
    ) -> bytes | None:
        return None if value is None else struct.pack(f"<{len(value)}d", *value)

    def process_result_value(
        self, value: bytes | None, dialect: sa.Dialect
    ) -> tuple[float, ...] | None:
        return None if value is None else struct.unpack(f"<{len(value) // 8}d", value)


class CompressedFloat64s(Float64s):
    """Floats [n], compressed: per-item outcomes are mostly 0 and 1."""

    cache_ok = True

    def process_bind_param(
        self, value: tuple[float, ...] | None, dialect: sa.Dialect
    ) -> bytes | None:
        packed = super().process_bind_param(value, dialect)
        return None if packed is None else zlib.compress(packed, 1)

    def process_result_value(
        self, value: bytes | None, dialect: sa.Dialect
    ) -> tuple[float, ...] | None:
        return super().process_result_value(value and zlib.decompress(value), dialect)


# the controller_* columns are null while nobody runs the study
studies = sa.Table(
    "evomerge_studies",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(120), nullable=False, unique=True),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("inspection", sa.JSON, nullable=False),
    sa.Column("scorer_digest", sa.String(128), nullable=False, index=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("controller_token", sa.String(64)),
    sa.Column("controller_host", sa.String(255)),
    sa.Column("controller_pid", sa.Integer),
    sa.Column("controller_started", sa.Double),
    sa.Column("controller_lease_until", UtcDateTime),
)

trials = sa.Table(
    "evomerge_trials",
    metadata,
    sa.Column("study_id", sa.Integer, sa.ForeignKey("evomerge_studies.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("genome", Float64s),
    sa.Column("recipe", sa.JSON, nullable=False),
    sa.Column("recipe_digest", sa.String(128), nullable=False, index=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("objectives", Float64s),
    sa.Column("error", sa.String(255)),
    sa.Column("message", sa.Text),
    sa.Column("tell_order", sa.Integer),
    sa.UniqueConstraint("study_id", "tell_order", name="uq_evomerge_trials_tell_order"),
)

attempts = sa.Table(
    "evomerge_attempts",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_id", sa.Integer, nullable=False),
    sa.Column("trial", sa.Integer, nullable=False),
    sa.Column("part", sa.String(16), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("token", sa.String(64), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("worker", sa.String(255)),
    sa.Column("started_at", UtcDateTime, nullable=False),
    sa.Column("lease_until", UtcDateTime, nullable=False),
    sa.Column("finished_at", UtcDateTime),
    sa.Column("seconds", sa.JSON, nullable=False),
    sa.Column("error", sa.String(255)),
    sa.Column("message", sa.Text),
    sa.ForeignKeyConstraint(
        ["study_id", "trial"], ["evomerge_trials.study_id", "evomerge_trials.number"]
    ),
    sa.UniqueConstraint("study_id", "trial", "part", "number", name="uq_evomerge_attempts_number"),
    sa.UniqueConstraint("study_id", "token", name="uq_evomerge_attempts_token"),
)

scores = sa.Table(
    "evomerge_scores",
    metadata,
    sa.Column("study_id", sa.Integer, primary_key=True),
    sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("part", sa.String(16), primary_key=True),
    sa.Column("task", sa.String(255), primary_key=True),
    sa.Column("metric", sa.String(255), nullable=False),
    sa.Column("value", sa.Double, nullable=False),
    sa.Column("stderr", sa.Double),
    sa.Column("margin", sa.Double),
    sa.Column("n", sa.Integer, nullable=False),
    sa.Column("higher_is_better", sa.Boolean, nullable=False),
    sa.Column("outcomes", CompressedFloat64s, nullable=False),
    sa.ForeignKeyConstraint(
        ["study_id", "trial"], ["evomerge_trials.study_id", "evomerge_trials.number"]
    ),
)

# results that came for an attempt that was not open
refusals = sa.Table(
    "evomerge_refusals",
    metadata,
    sa.Column("study_id", sa.Integer, sa.ForeignKey("evomerge_studies.id"), primary_key=True),
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("count", sa.Integer, nullable=False),
)

# what each study asks of a pool of workers; it does so before the study is there
claims = sa.Table(
    "evomerge_claims",
    metadata,
    sa.Column("study", sa.String(160), primary_key=True),
    sa.Column("token", sa.String(64), nullable=False),
    sa.Column("pool", sa.String(255), nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("wanted", sa.Integer, nullable=False),
    sa.Column("held", sa.Integer, nullable=False),
    sa.Column("worker", sa.JSON, nullable=False),
    sa.Column("since", UtcDateTime, nullable=False),
    sa.Column("lease_until", UtcDateTime, nullable=False),
)

# the last write to a study: whether a commit came through whose connection broke, and whether the
# study is still as its controller left it
marks = sa.Table(
    "evomerge_marks",
    metadata,
    sa.Column("study_id", sa.Integer, sa.ForeignKey("evomerge_studies.id"), primary_key=True),
    sa.Column("mark", sa.String(32), nullable=False),
)
