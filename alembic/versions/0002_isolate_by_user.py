"""Isolate users by row-level security."""

from alembic import op

revision = "0002"
down_revision: str | None = "0001"
branch_labels: str | None = None
depends_on: str | None = None

# Roles belong to the cluster, not to this database: another database, or another deployment, may
# create the same role at the same time.
_CREATE_ROLE = """
    DO $$
    BEGIN
        IF to_regrole('todo_app') IS NULL THEN
            CREATE ROLE todo_app NOLOGIN;
        END IF;
    EXCEPTION WHEN duplicate_object OR unique_violation THEN
        NULL;
    END
    $$
"""
# The migrating role must be able to SET ROLE todo_app, because it may be the login of the
# application too (Neon's default owner). WITH INHERIT and WITH SET exist from PostgreSQL 16 on.
_GRANT_ROLE = """
    DO $$
    DECLARE
        modern CONSTANT boolean := current_setting('server_version_num')::integer >= 160000;
    BEGIN
        IF pg_has_role(current_user, 'todo_app', CASE WHEN modern THEN 'SET' ELSE 'MEMBER' END)
        THEN
            RETURN;
        END IF;
        IF modern THEN
            EXECUTE 'GRANT todo_app TO CURRENT_USER WITH INHERIT FALSE, SET TRUE';
        ELSE
            GRANT todo_app TO CURRENT_USER;
        END IF;
    EXCEPTION
        WHEN insufficient_privilege THEN
            RAISE EXCEPTION 'The role todo_app was made by another owner of this cluster.'
                USING ERRCODE = 'insufficient_privilege', HINT = format(
                    'As that owner or a superuser run: GRANT todo_app TO %I;', current_user);
        WHEN unique_violation THEN
            NULL;
    END
    $$
"""
# A temporary table with the name of one of ours would be read instead of it, also by the next user
# of the connection. A template does not copy grants on the database: see todo_db.embedded.
_TEMPORARY = """
    DO $$
    BEGIN
        EXECUTE format('{} TEMPORARY ON DATABASE %I {} PUBLIC', current_database());
    END
    $$
"""
# Without the right to revoke, REVOKE only warns.
_REVOKED = """
    DO $$
    BEGIN
        IF has_database_privilege('todo_app', current_database(), 'TEMPORARY')
            OR has_schema_privilege('todo_app', 'public', 'CREATE')
        THEN
            RAISE EXCEPTION 'PUBLIC may still create objects in this database.'
                USING ERRCODE = 'insufficient_privilege',
                HINT = 'Migrate as the owner of the database.';
        END IF;
    END
    $$
"""
_GRANTS = (
    """SELECT, DELETE, INSERT (user_id, title, description, completed),
    UPDATE (title, description, completed) ON tasks""",
    """SELECT, DELETE, INSERT (id, email, name, username, image),
    UPDATE (email, name, username, image) ON users""",
    "SELECT ON todo_db_version",
)
# Better Auth's role and owners may write `email_verified`, and decide themselves. The function asks
# for that right, and not for a name: a login that inherits todo_app has a name of its own.
_RESET = """
    CREATE FUNCTION reset_email_verified() RETURNS trigger
    LANGUAGE plpgsql SET search_path = '' AS $$
    BEGIN
        IF NOT pg_catalog.has_column_privilege(TG_RELID, 'email_verified', 'UPDATE') THEN
            NEW.email_verified := false;
        END IF;
        RETURN NEW;
    END
    $$
"""
_OWNER_COLUMNS = {"users": "id", "tasks": "user_id"}


def upgrade() -> None:
    """Create the role and its grants, for each table two policies, and a trigger for addresses."""
    op.execute(_CREATE_ROLE)
    op.execute(_GRANT_ROLE)
    op.execute(_TEMPORARY.format("REVOKE", "FROM"))
    op.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    op.execute(_REVOKED)
    op.execute("GRANT USAGE ON SCHEMA public TO todo_app")
    for grant in _GRANTS:
        op.execute(f"GRANT {grant} TO todo_app")
    # A role that may change an address, but not whether it is verified, leaves it unverified.
    op.execute(_RESET)
    op.execute("""
        CREATE TRIGGER reset_users_email_verified BEFORE UPDATE OF email ON users
        FOR EACH ROW WHEN (OLD.email IS DISTINCT FROM NEW.email)
        EXECUTE FUNCTION reset_email_verified()
    """)
    for table, column in _OWNER_COLUMNS.items():
        # Without a user id the setting is NULL, or '' after a transaction that set it: both match
        # no row. The sub-select is evaluated once, not for every row; Supabase's linter expects the
        # call alone in it.
        mine = f"{column} = nullif((SELECT current_setting('todo_db.user_id', true)), '')"
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(
            f"CREATE POLICY {table}_own ON {table} TO todo_app USING ({mine}) WITH CHECK ({mine})"
        )
        # Permissive policies are combined with OR, so one added by mistake would open the table.
        # This restrictive policy is combined with all of them by AND.
        op.execute(
            f"CREATE POLICY {table}_fence ON {table} AS RESTRICTIVE TO todo_app "
            f"USING ({mine}) WITH CHECK ({mine})"
        )


def downgrade() -> None:
    """Drop the policies and grants. The role is kept: other databases may use it."""
    for table in _OWNER_COLUMNS:
        op.execute(f"DROP POLICY {table}_fence ON {table}")
        op.execute(f"DROP POLICY {table}_own ON {table}")
        op.execute(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
    op.execute("DROP TRIGGER reset_users_email_verified ON users")
    op.execute("DROP FUNCTION reset_email_verified()")
    for grant in _GRANTS:
        op.execute(f"REVOKE {grant} FROM todo_app")
    op.execute("REVOKE USAGE ON SCHEMA public FROM todo_app")
    op.execute(_TEMPORARY.format("GRANT", "TO"))
