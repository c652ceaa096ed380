"""Counts of refused results, and the mark of each study's last write.

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the two tables."""
    op.create_table(
        "evomerge_refusals",
        sa.Column("study_id", sa.Integer, sa.ForeignKey("evomerge_studies.id"), primary_key=True),
        sa.Column("kind", sa.String(16), primary_key=True),
        sa.Column("count", sa.Integer, nullable=False),
    )
    op.create_table(
        "evomerge_marks",
        sa.Column("study_id", sa.Integer, sa.ForeignKey("evomerge_studies.id"), primary_key=True),
        sa.Column("mark", sa.String(32), nullable=False),
    )


def downgrade() -> None:
    """Drop them: the counts are lost, nothing else."""
    op.drop_table("evomerge_marks")
    op.drop_table("evomerge_refusals")
