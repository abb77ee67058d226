"""A database of one test on a server that fails, and what is checked of a Database on it."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Final

import pytest
from cluster import Cluster
from driver import Connection

from todo_db import Database

BOUND: Final = 30
"""Seconds, for what must not take for ever; most of it takes less than one."""
WAITING: Final = "wait_event_type = 'Lock'"
ASLEEP: Final = "wait_event = 'PgSleep'"


class Place:
    """A database of one test; `login` is the one that `url` names by default."""

    def __init__(self, server: Cluster, name: str, login: str) -> None:
        self.server = server
        self.name = name
        self._login = login

    def url(self, login: str | None = None) -> str:
        return self.server.url(login or self._login, self.name)

    async def execute(self, *statements: str) -> None:
        await self.server.execute(*statements, database=self.name)

    @asynccontextmanager
    async def superuser(self) -> AsyncGenerator[Connection]:
        connection = await self.server.connect(database=self.name)
        try:
            yield connection
        finally:
            # The server may be gone.
            connection.terminate()

    async def titles(self, user: str = "alice") -> list[str]:
        async with self.superuser() as connection:
            return [
                row[0]
                for row in await connection.fetch(
                    "SELECT title FROM tasks WHERE user_id = $1 ORDER BY id", user
                )
            ]

    @asynccontextmanager
    async def locked(self) -> AsyncGenerator[Connection]:
        """Lock `tasks`, so that every call waits until the block or the server ends."""
        async with self.superuser() as connection:
            await connection.execute("BEGIN; LOCK tasks IN ACCESS EXCLUSIVE MODE")
            yield connection

    @asynccontextmanager
    async def locked_rows(self) -> AsyncGenerator[Connection]:
        """Lock every row, so that every change waits until the block or the server ends.

        A lock on the table would be waited for before anything is executed, while the statement
        is prepared.
        """
        async with self.superuser() as connection:
            await connection.execute(
                "BEGIN; SELECT FROM users FOR UPDATE; SELECT FROM tasks FOR UPDATE"
            )
            yield connection

    async def make_inserts_wait(self) -> None:
        """Have every insert of a task wait until the server is started again.

        A lock would not do: a server that stops ends the session with the lock first, and what
        waits for it may be done before the server gets to it.
        """
        async with self.superuser() as connection:
            started = await connection.fetchval("SELECT pg_postmaster_start_time()")
            await connection.execute(f"""
                CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                    IF pg_postmaster_start_time() = '{started}' THEN PERFORM pg_sleep(4); END IF;
                    RETURN NEW;
                END $$;
                CREATE TRIGGER wait BEFORE INSERT ON tasks FOR EACH ROW EXECUTE FUNCTION wait()
            """)

    @asynccontextmanager
    async def without_its_standby(self, db: Database) -> AsyncGenerator[list[asyncio.Task[object]]]:
        """Create tasks until the commit of one waits for a standby that does not exist.

        Its change is stored by then. Yield the calls; the last one is that which waits.
        """
        calls: list[asyncio.Task[object]] = []
        await self.execute(
            "ALTER SYSTEM SET synchronous_standby_names = 'missing'", "SELECT pg_reload_conf()"
        )
        try:
            waits = asyncio.create_task(self.until_backends(1, "wait_event = 'SyncRep'"))
            # A session applies changed settings with a delay.
            while not waits.done():
                calls.append(asyncio.create_task(db.tasks.create("alice", "stored")))
                await asyncio.wait({calls[-1], waits}, return_when=asyncio.FIRST_COMPLETED)
            await waits
            yield calls
        finally:
            await self.execute(
                "ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()"
            )

    async def until_backends(self, number: int, condition: str) -> list[int]:
        """Wait until this number of the applications' backends matches; return their pids."""
        async with asyncio.timeout(BOUND), self.superuser() as connection:
            while True:
                rows = await connection.fetch(
                    "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
                    f" AND usename LIKE '%_login' AND {condition}"
                )
                if len(rows) == number:
                    return [row[0] for row in rows]
                await asyncio.sleep(0.01)

    async def terminate(self, pid: int) -> None:
        await self.execute(f"SELECT pg_terminate_backend({pid})")


async def still_waiting[Result](
    call: Coroutine[object, object, Result], seconds: float
) -> asyncio.Task[Result]:
    """Begin a call, check that it has not ended after this time, and return its task."""
    task = asyncio.create_task(call)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.shield(task)
    return task


async def assert_healthy(*databases: Database) -> None:
    """Check that the next call works, and that no connection is in use."""
    for db in databases:
        async with asyncio.timeout(BOUND):
            await db.tasks.count("alice")
            health = await db.health()
        assert health.ok
        assert (health.pool.in_use, health.pool.waiting) == (0, 0)
