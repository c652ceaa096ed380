"""What each running study asks of the pool of workers that it shares with others.

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

UTC = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "evomerge_claims",
        sa.Column("study", sa.String(160), primary_key=True),
        sa.Column("token", sa.String(64), nullable=False),
        sa.Column("pool", sa.String(255), nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("wanted", sa.Integer, nullable=False),
        sa.Column("held", sa.Integer, nullable=False),
        sa.Column("worker", sa.JSON, nullable=False),
        sa.Column("since", UTC, nullable=False),
        sa.Column("lease_until", UTC, nullable=False),
    )


def downgrade() -> None:
    """Drop it: running studies claim anew."""
    op.drop_table("evomerge_claims")
