"""Studies, trials, attempts and scores.

Revision ID: 0001
Revises:

Written with plain column types: a migration must not change when the code does.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

UTC = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Create the four tables."""
    op.create_table(
        "evomerge_studies",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(120), nullable=False, unique=True),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("inspection", sa.JSON, nullable=False),
        sa.Column("scorer_digest", sa.String(128), nullable=False),
        sa.Column("created_at", UTC, nullable=False),
        sa.Column("controller_token", sa.String(64)),
        sa.Column("controller_host", sa.String(255)),
        sa.Column("controller_pid", sa.Integer),
        sa.Column("controller_started", sa.Double),
        sa.Column("controller_lease_until", UTC),
    )
    op.create_index("ix_evomerge_studies_scorer_digest", "evomerge_studies", ["scorer_digest"])
    op.create_table(
        "evomerge_trials",
        sa.Column("study_id", sa.Integer, sa.ForeignKey("evomerge_studies.id"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("label", sa.Text, nullable=False),
        sa.Column("genome", sa.LargeBinary),
        sa.Column("recipe", sa.JSON, nullable=False),
        sa.Column("recipe_digest", sa.String(128), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("objectives", sa.LargeBinary),
        sa.Column("error", sa.String(255)),
        sa.Column("message", sa.Text),
        sa.Column("tell_order", sa.Integer),
        sa.UniqueConstraint("study_id", "tell_order", name="uq_evomerge_trials_tell_order"),
    )
    op.create_index("ix_evomerge_trials_recipe_digest", "evomerge_trials", ["recipe_digest"])
    op.create_table(
        "evomerge_attempts",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("study_id", sa.Integer, nullable=False),
        sa.Column("trial", sa.Integer, nullable=False),
        sa.Column("part", sa.String(16), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("token", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("worker", sa.String(255)),
        sa.Column("started_at", UTC, nullable=False),
        sa.Column("lease_until", UTC, nullable=False),
        sa.Column("finished_at", UTC),
        sa.Column("seconds", sa.JSON, nullable=False),
        sa.Column("error", sa.String(255)),
        sa.Column("message", sa.Text),
        sa.ForeignKeyConstraint(
            ["study_id", "trial"], ["evomerge_trials.study_id", "evomerge_trials.number"]
        ),
        sa.UniqueConstraint(
            "study_id", "trial", "part", "number", name="uq_evomerge_attempts_number"
        ),
        sa.UniqueConstraint("study_id", "token", name="uq_evomerge_attempts_token"),
    )
    op.create_table(
        "evomerge_scores",
        sa.Column("study_id", sa.Integer, primary_key=True),
        sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("part", sa.String(16), primary_key=True),
        sa.Column("task", sa.String(255), primary_key=True),
        sa.Column("metric", sa.String(255), nullable=False),
        sa.Column("value", sa.Double, nullable=False),
        sa.Column("stderr", sa.Double),
        sa.Column("n", sa.Integer, nullable=False),
        sa.Column("higher_is_better", sa.Boolean, nullable=False),
        sa.Column("outcomes", sa.LargeBinary, nullable=False),
        sa.ForeignKeyConstraint(
            ["study_id", "trial"], ["evomerge_trials.study_id", "evomerge_trials.number"]
        ),
    )


def downgrade() -> None:
    """Drop them; what they hold is lost."""
    for table in ("scores", "attempts", "trials", "studies"):
        op.drop_table(f"evomerge_{table}")
