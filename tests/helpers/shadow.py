"""Copies of the tables in another schema, to which the login's search path leads first."""

from typing import Final

from cluster import SINGLE
from driver import Connection

PLANTED: Final = "planted"
TABLES: Final = ("users", "tasks", "idempotency_keys")

# The same rows with other values, and each twice.
COPIES: Final = (
    f"""
    CREATE {{0}}users AS
        SELECT u.id, email, username, '{PLANTED}' AS name, email_verified, image, created_at,
            updated_at
        FROM public.users u, generate_series(1, 2)
    """,
    f"""
    CREATE {{0}}tasks AS
        SELECT t.id, user_id, '{PLANTED} 1' AS title, description, completed, created_at, updated_at
        FROM public.tasks t, generate_series(1, 2)
    """,
    """
    CREATE {0}idempotency_keys AS
        SELECT user_id, key, fingerprint, ARRAY[0::bigint] AS task_ids, created_at
        FROM public.idempotency_keys, generate_series(1, 2)
    """,
)
# It sets nothing.
FUNCTION: Final = """
    CREATE FUNCTION shadow.set_config(text, text, boolean) RETURNS text
    LANGUAGE sql AS $$ SELECT $2 $$
"""


async def plant(superuser: Connection) -> None:
    """Copy the tables into another schema, and lead the login's search path there."""
    await superuser.execute("CREATE SCHEMA shadow; GRANT USAGE ON SCHEMA shadow TO PUBLIC")
    await superuser.execute(FUNCTION)
    for copy in COPIES:
        await superuser.execute(copy.format("TABLE shadow."))
    for table in TABLES:
        # `open` refuses a table that is neither fenced nor shared.
        await superuser.execute(f"""
            ALTER TABLE shadow.{table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
            CREATE POLICY todo_db_shared ON shadow.{table} FOR SELECT USING (true);
            GRANT SELECT ON shadow.{table} TO PUBLIC
        """)
    database = await superuser.fetchval("SELECT current_database()")
    await superuser.execute(
        f"ALTER ROLE {SINGLE} IN DATABASE {database} SET search_path = shadow, pg_catalog, public"
    )
