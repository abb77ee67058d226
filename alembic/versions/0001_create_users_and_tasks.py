"""Create users and tasks."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision: str | None = None
branch_labels: str | None = None
depends_on: str | None = None

# Controls, spaces, and invisible format characters are blank. `\uXXXX` is an escape of the regular
# expression, so the catalogue shows the code points.
_VISIBLE = (
    r"[^\u0001-\u0020\u007f-\u00a0\u00ad\u1680\u180e\u2000-\u200f\u2028-\u202f"
    r"\u205f-\u2064\u2066-\u206f\u3000\ufeff]"
)
# Python's datetime has no infinity and no years BC: one such row would break every list.
_TIMESTAMPS = (
    "created_at >= '0001-01-02 00:00:00+00' AND created_at < '9999-12-31 00:00:00+00' AND "
    "updated_at >= '0001-01-02 00:00:00+00' AND updated_at < '9999-12-31 00:00:00+00'"
)


def _timestamp(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False)


def upgrade() -> None:
    """Create both tables, the index, and the trigger that sets `updated_at`."""
    op.create_table(
        "users",
        # Better Auth's ids are strings; the default is for rows that other programs insert.
        sa.Column("id", sa.Text(), server_default=sa.text("(gen_random_uuid())::text")),
        sa.Column("email", sa.Text(), nullable=False),
        sa.Column("username", sa.Text(), nullable=True),
        sa.Column("name", sa.Text(), server_default="", nullable=False),
        sa.Column("email_verified", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("image", sa.Text(), nullable=True),
        _timestamp("created_at"),
        _timestamp("updated_at"),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("email", name="uq_users_email"),
        sa.UniqueConstraint("username", name="uq_users_username"),
        sa.CheckConstraint("char_length(id) BETWEEN 1 AND 255", name=op.f("ck_users_id_length")),
        sa.CheckConstraint('email = lower(email COLLATE "C")', name=op.f("ck_users_email_lower")),
        sa.CheckConstraint(_TIMESTAMPS, name=op.f("ck_users_timestamps_range")),
    )
    op.create_table(
        "tasks",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True)),
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("title", sa.String(200), nullable=False),
        sa.Column("description", sa.Text(), nullable=True),
        sa.Column("completed", sa.Boolean(), server_default=sa.false(), nullable=False),
        _timestamp("created_at"),
        _timestamp("updated_at"),
        sa.PrimaryKeyConstraint("id", name="pk_tasks"),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name="fk_tasks_user_id_users", ondelete="CASCADE"
        ),
        sa.CheckConstraint(f"title ~ '{_VISIBLE}'", name=op.f("ck_tasks_title_not_blank")),
        sa.CheckConstraint(
            "char_length(description) <= 65536", name=op.f("ck_tasks_description_length")
        ),
        sa.CheckConstraint(_TIMESTAMPS, name=op.f("ck_tasks_timestamps_range")),
    )
    # Unique, so that a composite foreign key of a user's child table can refer to it.
    op.create_index("idx_tasks_user_id", "tasks", ["user_id", "id"], unique=True)

    # `updated_at` is a version: it must grow even if the clock goes back, and between two updates
    # of one transaction, where now() does not change. After the last moment that the check allows
    # it returns to the clock: it no longer grows, but it changes.
    op.execute("""
        CREATE FUNCTION set_updated_at() RETURNS trigger
        LANGUAGE plpgsql SET search_path = '' AS $$
        BEGIN
            NEW.updated_at := pg_catalog.clock_timestamp();
            IF OLD.updated_at < '9999-12-30 23:59:59.999999+00' THEN
                NEW.updated_at := GREATEST(
                    NEW.updated_at, OLD.updated_at + interval '1 microsecond'
                );
            END IF;
            RETURN NEW;
        END
        $$
    """)
    for table in ("users", "tasks"):
        op.execute(f"""
            CREATE TRIGGER update_{table}_updated_at BEFORE UPDATE ON {table}
            FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)
            EXECUTE FUNCTION set_updated_at()
        """)


def downgrade() -> None:
    """Drop both tables with all their rows."""
    op.drop_table("tasks")
    op.drop_table("users")
    op.execute("DROP FUNCTION set_updated_at()")
