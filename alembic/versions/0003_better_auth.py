"""Create Better Auth's tables, and a role for it that reads no tasks."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision: str | None = "0002"
branch_labels: str | None = None
depends_on: str | None = None

_TABLES = ("sessions", "accounts", "verifications", "jwks")

_CREATE_ROLE = """
    DO $$
    BEGIN
        IF to_regrole('todo_auth') IS NULL THEN
            CREATE ROLE todo_auth NOLOGIN;
        END IF;
    EXCEPTION WHEN duplicate_object OR unique_violation THEN
        NULL;
    END
    $$
"""
# Arguments have their full name, because a plugin's column of the same name would hide them.
# Better Auth keeps a retired signing key for 30 days by default, for the tokens that it signed. The
# caller compares `expires_at` with a shorter time.
_FIND_CREDENTIAL = """
    CREATE FUNCTION find_credential(session_token text, key_id text)
    RETURNS TABLE (user_id text, public_key text, algorithm text, expires_at timestamptz)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = '' AS $$
        SELECT s.user_id, NULL::text, NULL::text, NULL::timestamptz FROM public.sessions s
        WHERE s.token = find_credential.session_token AND s.expires_at > pg_catalog.now()
        UNION ALL
        SELECT NULL::text, k.public_key, k.alg, k.expires_at FROM public.jwks k
        WHERE k.id = find_credential.key_id
            AND (k.expires_at IS NULL OR k.expires_at > pg_catalog.now() - interval '30 days')
    $$
"""


def _id() -> sa.Column[str]:
    # Better Auth sends its own ids, except with generateId "uuid".
    return sa.Column("id", sa.Text(), server_default=sa.text("(gen_random_uuid())::text"))


def _user_id() -> sa.Column[str]:
    return sa.Column("user_id", sa.Text(), nullable=False)


def _timestamp(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False)


def _of_user(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["user_id"], ["users.id"], name=f"fk_{table}_user_id_users", ondelete="CASCADE"
    )


def upgrade() -> None:
    """Create the tables as Better Auth's migrator would with our names, and the grants."""
    op.create_table(
        "sessions",
        _id(),
        _user_id(),
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ip_address", sa.Text(), nullable=True),
        sa.Column("user_agent", sa.Text(), nullable=True),
        _timestamp("created_at"),
        _timestamp("updated_at"),
        sa.PrimaryKeyConstraint("id", name="pk_sessions"),
        sa.UniqueConstraint("token", name="uq_sessions_token"),
        _of_user("sessions"),
    )
    op.create_index("ix_sessions_user_id", "sessions", ["user_id"])
    op.create_table(
        "accounts",
        _id(),
        _user_id(),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("provider_id", sa.Text(), nullable=False),
        sa.Column("access_token", sa.Text(), nullable=True),
        sa.Column("refresh_token", sa.Text(), nullable=True),
        sa.Column("id_token", sa.Text(), nullable=True),
        sa.Column("access_token_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("refresh_token_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("scope", sa.Text(), nullable=True),
        sa.Column("password", sa.Text(), nullable=True),
        _timestamp("created_at"),
        _timestamp("updated_at"),
        sa.PrimaryKeyConstraint("id", name="pk_accounts"),
        _of_user("accounts"),
    )
    op.create_index("ix_accounts_user_id", "accounts", ["user_id"])
    op.create_table(
        "verifications",
        _id(),
        sa.Column("identifier", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        _timestamp("created_at"),
        _timestamp("updated_at"),
        sa.PrimaryKeyConstraint("id", name="pk_verifications"),
    )
    op.create_index("ix_verifications_identifier", "verifications", ["identifier"])
    op.create_table(
        "jwks",
        _id(),
        sa.Column("public_key", sa.Text(), nullable=False),
        sa.Column("private_key", sa.Text(), nullable=False),
        sa.Column("alg", sa.Text(), nullable=True),
        sa.Column("crv", sa.Text(), nullable=True),
        _timestamp("created_at"),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_jwks"),
    )

    op.execute(_CREATE_ROLE)
    op.execute("GRANT USAGE ON SCHEMA public TO todo_auth")
    for table in _TABLES:
        # Not FORCE, because the owner reads them, as Better Auth and in the function below. For any
        # other role a grant by mistake gives access to no row.
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    for table in ("users", *_TABLES):
        op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO todo_auth")
        op.execute(
            f"CREATE POLICY {table}_auth ON {table} TO todo_auth USING (true) WITH CHECK (true)"
        )

    # The only way to find the user of a request: it returns the user id of a valid session token,
    # and nothing about any other session.
    op.execute(_FIND_CREDENTIAL)
    op.execute("REVOKE ALL ON FUNCTION find_credential(text, text) FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION find_credential(text, text) TO todo_app")


def downgrade() -> None:
    """Drop the tables with all sessions and passwords. The role is kept, as in 0002."""
    op.execute("DROP FUNCTION find_credential(text, text)")
    op.execute("DROP POLICY users_auth ON users")
    op.execute("REVOKE ALL ON users FROM todo_auth")
    op.execute("REVOKE USAGE ON SCHEMA public FROM todo_auth")
    for table in reversed(_TABLES):
        op.drop_table(table)
