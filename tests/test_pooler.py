"""The package behind PgBouncer in transaction mode, as on Neon's pooled endpoint."""

import asyncio
import random
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import asyncpg
import attacks
import pytest
import pytest_asyncio
from driver import Connection
from pgbouncer import BOOKWORM, PASSWORD, TRIXIE, PgBouncer
from proxy import Proxy
from sqlalchemy import text
from test_round_trips import CALLS, People

from todo_db import (
    ConfigurationError,
    Database,
    NewTask,
    TodoDBError,
    Transaction,
    UnavailableError,
)
from todo_db.embedded import EmbeddedPostgres
from todo_db.migrations import downgrade, upgrade
from todo_db.models import REVISION

pytestmark = pytest.mark.pooler

LOGIN: Final = "pooled_login"
OWNER: Final = "pooled_owner"
USERS: Final = tuple(f"user-{number}" for number in range(12))

# Release, max_prepared_statements, and whether the package may keep prepared statements.
type Kind = tuple[str, int | None, bool]

NEON: Final[Kind] = (TRIXIE, 1000, True)
OLD: Final[Kind] = (BOOKWORM, None, False)
KINDS: Final[tuple[Kind, ...]] = (
    NEON,
    (TRIXIE, 200, True),
    (TRIXIE, 0, False),
    (TRIXIE, 1000, False),
    OLD,
)
# Run by another Python, with the URL and whether to keep prepared statements.
_OTHER_PROCESS: Final = """
import asyncio, sys
from todo_db import Database

async def main():
    url, prepared = sys.argv[1:]
    database = Database.from_url(url, prepared_statements=prepared == "True", retry_attempts=1)
    async with database as db:
        await db.users.create("carol", email="carol@example.org", name="Carol")
        print("ready", flush=True)
        for number in range(60):
            task = await db.tasks.create("carol", f"{number}")
            await db.tasks.toggle("carol", task.id)
            assert {t.user_id for t in (await db.tasks.list("carol")).items} == {"carol"}
        assert await db.tasks.count("carol", completed=True) == 60

asyncio.run(main())
"""
# What a client before may have left on a server's connection.
_LEFT: Final = """
    SELECT nullif(current_setting('todo_db.user_id', true), '') AS user_id,
        nullif(current_setting('todo_db.left', true), '') AS own,
        current_user = session_user AS itself,
        (SELECT array_agg(name::text) FROM pg_settings WHERE setting <> reset_val AND name IN (
            'statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout',
            'search_path', 'work_mem', 'role', 'default_transaction_read_only'
        )) AS settings,
        (SELECT count(*) FROM pg_locks
            WHERE locktype = 'advisory' AND pid = pg_backend_pid()) AS locks,
        pg_my_temp_schema() AS temporary,
        (SELECT count(*) FROM pg_cursors) AS cursors
"""
NOTHING: Final = (None, None, True, None, 0, 0, 0)


def _named(kind: Kind) -> str:
    suite, prepared, kept = kind
    return f"{suite}-{prepared}-{'prepared' if kept else 'unprepared'}"


@pytest.fixture(scope="module")
def pooled_roles(todo_postgres: EmbeddedPostgres) -> AsyncIterator[None]:
    """The same two roles as elsewhere, but the server asks them for a password."""
    todo_postgres._psql(
        f"CREATE ROLE {LOGIN} LOGIN IN ROLE todo_app PASSWORD '{PASSWORD}'",
        f"CREATE ROLE {OWNER} LOGIN CREATEROLE BYPASSRLS IN ROLE todo_owner PASSWORD '{PASSWORD}'",
        f"GRANT todo_app TO {OWNER} WITH INHERIT FALSE, SET TRUE",
    )
    rules = Path(todo_postgres._psql("SHOW hba_file").strip())
    before = rules.read_text()
    rules.write_text(f"local all {LOGIN},{OWNER} scram-sha-256\n{before}")
    todo_postgres._psql("SELECT pg_reload_conf()")
    yield
    rules.write_text(before)
    todo_postgres._psql("SELECT pg_reload_conf()", f"DROP ROLE {LOGIN}, {OWNER}")
