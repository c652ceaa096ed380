"""The log-likelihood margin of each score.

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; earlier scores have no margin."""
    op.add_column("evomerge_scores", sa.Column("margin", sa.Double))


def downgrade() -> None:
    """Drop it: the margins are lost, nothing else."""
    op.drop_column("evomerge_scores", "margin")
