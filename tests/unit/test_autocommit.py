"""One statement in autocommit, on connections that break before it is sent."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest
import pytest_asyncio
from driver import Connection
from proxy import Fault, Proxy, until

from todo_db import CallTimeoutError, Database, OutcomeUnknownError
from todo_db.autocommit import fetch
from todo_db.embedded import LOGIN


@pytest.fixture
def login() -> str:
    """The one whose calls are single statements."""
    return LOGIN


async def _set_timeout(superuser: Connection, name: str) -> None:
    """Give the login a timeout of its own: a call is a single statement then."""
    await superuser.execute(f"ALTER ROLE {LOGIN} IN DATABASE {name} SET statement_timeout = '60s'")


class TestFetch:
    async def test_E4_read_that_was_not_answered_is_sent_again_with_its_arguments(
        self, db: Database, proxy: Proxy, superuser: Connection, todo_database_name: str
    ) -> None:
        await _set_timeout(superuser, todo_database_name)
        task = await db.tasks.create("alice", "Buy milk")
        async with Database.from_url(proxy.url, pool_size=1, max_overflow=0) as near:
            assert await near.tasks.get("alice", task.id) == task
            for fault in (Fault.CUT_BEFORE, Fault.CUT_AFTER):
                proxy.break_at(b"alice", fault)
                assert await near.tasks.get("alice", task.id) == task
                assert not proxy.pending
            assert (await near.health()).round_trips == 1


class TestLateStatement:
    """One that is not answered within `command_timeout_seconds`."""

    @pytest_asyncio.fixture
    async def hasty(
        self, proxy: Proxy, db: Database, superuser: Connection, todo_database_name: str
    ) -> AsyncGenerator[Database]:
        await db.tasks.create("alice", "Buy milk")
        await _set_timeout(superuser, todo_database_name)
        async with Database.from_url(
            proxy.url, pool_size=1, max_overflow=0, command_timeout_seconds=1
        ) as hasty:
            await hasty.tasks.create("alice", "Buy bread")
            yield hasty

    @pytest.mark.parametrize(
        ("call", "failure"),
        [
            (lambda db: db.tasks.count("alice"), CallTimeoutError),
            (lambda db: db.tasks.create("alice", "Buy salt"), OutcomeUnknownError),
        ],
        ids=["read", "change"],
    )
    async def test_ends_as_such_and_leaves_the_connection_usable(
        self,
        hasty: Database,
        proxy: Proxy,
        call: Callable[[Database], Awaitable[object]],
        failure: type[Exception],
    ) -> None:
        proxy.break_at(b"alice", Fault.SWALLOW, times=3)
        async with asyncio.timeout(10):
            with pytest.raises(failure):
                await call(hasty)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        proxy.heal()
        assert await hasty.tasks.count("alice") >= 2

    async def test_is_cancelled_at_the_server(self, hasty: Database, superuser: Connection) -> None:
        sql = "SELECT $1::text, pg_sleep(30) /* late */"
        with pytest.raises(CallTimeoutError):
            await fetch(hasty._pool, sql, ("alice",), is_change=False)
        running = (
            "SELECT FROM pg_stat_activity WHERE query LIKE '%pg_sleep(30) /* late */%'"
            " AND state = 'active' AND pid <> pg_backend_pid()"
        )
        async with asyncio.timeout(10):
            while await superuser.fetch(running):  # noqa: ASYNC110  # the server's state
                await asyncio.sleep(0.05)
        assert await hasty.tasks.count("alice") == 2

    async def test_of_a_caller_who_is_cancelled_too_is_cancelled(
        self, hasty: Database, proxy: Proxy
    ) -> None:
        pool = hasty._pool
        proxy.break_at(b"alice", Fault.SWALLOW)
        call = asyncio.create_task(hasty.tasks.count("alice"))
        await until(lambda: not proxy.pending)
        (connection,) = pool._lent
        # Both in one turn of the loop.
        pool._interrupt(connection)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: pool.status.in_use == 0)

    async def test_of_a_caller_who_was_cancelled_before_ends_as_late(
        self, hasty: Database, proxy: Proxy
    ) -> None:
        """As a clean-up does that makes a call after its task was cancelled."""
        started, ended = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            try:
                started.set()
                await asyncio.sleep(60)
            finally:
                proxy.break_at(b"alice", Fault.SWALLOW)
                with pytest.raises(CallTimeoutError):
                    await hasty.tasks.count("alice")
                ended.set()

        call = asyncio.create_task(work())
        await started.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert ended.is_set()
