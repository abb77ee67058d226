"""Store which tasks were created with which idempotency key."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision: str | None = "0003"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Create a row for each key of a user, under the same policies as the tasks."""
    op.create_table(
        "idempotency_keys",
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        # SHA-256 over the method and its arguments, in hexadecimal digits.
        sa.Column("fingerprint", sa.Text(), nullable=False),
        # No foreign key: a key outlives its tasks.
        sa.Column("task_ids", postgresql.ARRAY(sa.BigInteger()), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.func.now(),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("user_id", "key", name="pk_idempotency_keys"),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name="fk_idempotency_keys_user_id_users", ondelete="CASCADE"
        ),
        sa.CheckConstraint(
            "char_length(key) BETWEEN 1 AND 255", name=op.f("ck_idempotency_keys_key_length")
        ),
        sa.CheckConstraint(
            "char_length(fingerprint) = 64", name=op.f("ck_idempotency_keys_fingerprint_length")
        ),
        sa.CheckConstraint(
            "created_at >= '0001-01-02 00:00:00+00' AND created_at < '9999-12-31 00:00:00+00'",
            name=op.f("ck_idempotency_keys_timestamps_range"),
        ),
    )
    # Neither UPDATE nor DELETE: without its key, a call could store its tasks again.
    op.execute(
        "GRANT SELECT, INSERT (user_id, key, fingerprint, task_ids) ON idempotency_keys TO todo_app"
    )
    mine = "user_id = nullif((SELECT current_setting('todo_db.user_id', true)), '')"
    op.execute("ALTER TABLE idempotency_keys ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE idempotency_keys FORCE ROW LEVEL SECURITY")
    op.execute(
        "CREATE POLICY idempotency_keys_own ON idempotency_keys TO todo_app "
        f"USING ({mine}) WITH CHECK ({mine})"
    )
    op.execute(
        "CREATE POLICY idempotency_keys_fence ON idempotency_keys AS RESTRICTIVE TO todo_app "
        f"USING ({mine}) WITH CHECK ({mine})"
    )


def downgrade() -> None:
    """Drop the table: a call that is repeated with an old key stores its tasks again."""
    op.drop_table("idempotency_keys")
