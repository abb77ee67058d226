"""A call on the Database inside a transaction of the same task: it needs a second connection."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio
from proxy import until

from todo_db import Database, PoolExhaustedError
from todo_db.embedded import LOGIN

HOLDS_ONE = "this task already holds one"


@pytest.fixture
def login() -> str:
    """One is enough: connections are the same for both."""
    return LOGIN


@pytest_asyncio.fixture
async def two(db: Database, url: str) -> AsyncGenerator[Database]:
    """A Database on two connections; calls wait for one almost for ever."""
    assert (await db.users.get("alice")).id == "alice"
    async with Database.from_url(
        url, pool_size=2, max_overflow=0, pool_timeout_seconds=60
    ) as database:
        yield database


@pytest_asyncio.fixture
async def hasty(db: Database, url: str) -> AsyncGenerator[Database]:
    """The same, but calls wait for 0.3 s."""
    assert (await db.users.get("alice")).id == "alice"
    async with Database.from_url(
        url, pool_size=2, max_overflow=0, pool_timeout_seconds=0.3
    ) as database:
        yield database


class TestDeadlock:
    """Every connection is held by a task that waits for another one."""

    async def test_E10_of_one_task_is_an_error_at_once(self, db: Database, url: str) -> None:
        assert await db.tasks.count("alice") == 0
        async with (
            Database.from_url(url, pool_size=1, max_overflow=0, pool_timeout_seconds=60) as one,
            asyncio.timeout(10),
            one.transaction("alice") as tx,
        ):
            with pytest.raises(PoolExhaustedError, match=HOLDS_ONE):
                await one.tasks.count("alice")
            # The transaction is as it was.
            await tx.tasks.create("alice", "stored")
        assert await db.tasks.count("alice") == 1

    async def test_E10_of_many_tasks_is_an_error_of_the_last_one_and_frees_the_others(
        self, two: Database
    ) -> None:
        inside = asyncio.Barrier(2)

        async def nested(user: str) -> int:
            async with two.transaction(user) as tx:
                await tx.tasks.create(user, "outer")
                await inside.wait()
                return await two.tasks.count(user)

        async with asyncio.timeout(20):
            results = await asyncio.gather(nested("alice"), nested("bob"), return_exceptions=True)
            failures = [result for result in results if isinstance(result, BaseException)]
            assert [type(failure) for failure in failures] == [PoolExhaustedError]
            assert HOLDS_ONE in str(failures[0])
            # Its transaction was rolled back; the other one went on, and is stored.
            assert await two.tasks.count("alice") + await two.tasks.count("bob") == 1
        status = (await two.health()).pool
        assert (status.in_use, status.waiting) == (0, 0)

    async def test_E10_is_none_while_another_task_goes_on(self, two: Database) -> None:
        may_end = asyncio.Event()

        async def holds() -> None:
            async with two.transaction("bob"):
                await may_end.wait()

        async def nested() -> int:
            async with two.transaction("alice"):
                return await two.tasks.count("alice")

        async with asyncio.timeout(20):
            holding = asyncio.create_task(holds())
            await until(lambda: two._pool.status.in_use == 1)
            waiting = asyncio.create_task(nested())
            await until(lambda: two._pool.status.waiting == 1)
            may_end.set()
            assert await waiting == 0
            await holding


class TestExhaustion:
    """No connection became free in time."""

    async def test_E10_names_the_connection_that_the_task_holds(self, hasty: Database) -> None:
        async with hasty.transaction("bob"):
            nested = asyncio.create_task(self._nested(hasty))
            async with asyncio.timeout(20):
                with pytest.raises(PoolExhaustedError, match=HOLDS_ONE):
                    await nested

    async def test_E10_of_a_task_that_holds_none_names_none(self, hasty: Database) -> None:
        async with hasty.transaction("alice"), hasty.transaction("bob"):
            call = asyncio.create_task(hasty.tasks.count("alice"))
            with pytest.raises(PoolExhaustedError) as failure:
                await call
        assert HOLDS_ONE not in str(failure.value)

    @staticmethod
    async def _nested(database: Database) -> int:
        async with database.transaction("alice"):
            return await database.tasks.count("alice")
