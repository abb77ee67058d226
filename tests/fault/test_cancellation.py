"""Whoever is cancelled leaves nothing behind, wherever it happens."""

import asyncio
import random
from collections.abc import AsyncGenerator, Coroutine
from itertools import product
from typing import Any, Final

import pytest
import pytest_asyncio
from driver import Connection
from locks import until_waiting
from proxy import BEGIN, COMMIT, ROLLBACK, STARTUP, Fault, Proxy, until
from sqlalchemy import text

from todo_db import Database
from todo_db.embedded import LOGIN
from todo_db.records import PoolStatus

WORKERS: Final = 4


@pytest.fixture
def login() -> str:
    """One is enough: connections are the same for both."""
    return LOGIN


@pytest_asyncio.fixture
async def two(db: Database, url: str) -> AsyncGenerator[Database]:
    """alice's and bob's database on two connections, every call tried once."""
    assert (await db.users.get("alice")).id == "alice"
    async with Database.from_url(url, pool_size=2, max_overflow=0, retry_attempts=1) as database:
        yield database


class Crowd:
    """Units of two users on one pool, most of them cancelled on their way.

    A title says whose it is and is never used twice, so that the rows tell what happened.
    """

    def __init__(self, database: Database, seed: int, *, twice: bool) -> None:
        self.acknowledged: set[str] = set()
        self.cancelled = 0
        self._database = database
        self._random = random.Random(seed)  # noqa: S311  # the same every time
        self._twice = twice
        self._started = 0

    async def work(self, units: int) -> None:
        """Cancel that many units, and after each run one that must work."""
        cancelled = 0
        while cancelled < units:
            cancelled += await self._cancelled_unit()
            await self._next_unit()

    async def _cancelled_unit(self) -> bool:
        user, title = self._named()
        unit = asyncio.create_task(self._unit(user, title))
        # Some are cancelled between two steps of the client, some while the server works.
        if self._random.random() < 0.5:
            for _ in range(self._random.randrange(12)):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(self._random.uniform(0, 0.008))
        unit.cancel()
        if self._twice:
            for _ in range(self._random.randrange(4)):
                await asyncio.sleep(0)
            unit.cancel()
        try:
            await unit
        except asyncio.CancelledError:
            self.cancelled += 1
            return True
        self.acknowledged.add(title)
        return False

    async def _next_unit(self) -> None:
        user, title = self._named()
        async with asyncio.timeout(60):
            await self._database.tasks.create(user, title)
            self.acknowledged.add(title)
            newest = await self._database.tasks.list(user, limit=5)
        assert {task.user_id for task in newest.items} == {user}

    def _named(self) -> tuple[str, str]:
        self._started += 1
        user = self._random.choice(("alice", "bob"))
        return user, f"{user}'s {self._started}"

    def _unit(self, user: str, title: str) -> Coroutine[Any, Any, None]:
        return self._random.choice((self._call, self._transaction, self._run))(user, title)

    async def _call(self, user: str, title: str) -> None:
        await self._database.tasks.create(user, title)

    async def _transaction(self, user: str, title: str) -> None:
        async with self._database.transaction(user) as tx:
            await tx.tasks.count(user)
            async with tx.savepoint():
                await tx.tasks.create(user, title)
            await asyncio.sleep(0)

    async def _run(self, user: str, title: str) -> None:
        async def work(tx: Any) -> None:  # noqa: ANN401  # a transaction
            await tx.execute(
                text("INSERT INTO tasks (user_id, title) VALUES (:user_id, :title)"),
                {"user_id": user, "title": title},
            )

        await self._database.run(user, work)


async def assert_nothing_left(database: Database, superuser: Connection) -> None:
    """No connection is pooled_connection, in a transaction, or knows a user."""
    assert database._pool.status == PoolStatus(size=2, in_use=0, waiting=0)
    # A backend whose client cut the connection notices when its statement ends.
    async with asyncio.timeout(30):
        while await superuser.fetchval(  # noqa: ASYNC110  # nothing sets an event
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid() AND state <> 'idle'"
        ):
            await asyncio.sleep(0.01)
    connections = [await database._pool.acquire(), await database._pool.acquire()]
    for connection in connections:
        assert not connection.driver.is_in_transaction()
        left = await connection.driver.fetchrow(
            "SELECT current_user AS role,"
            " coalesce(current_setting('todo_db.user_id', true), '') AS user_id"
        )
        assert left is not None
        assert (left["role"], left["user_id"]) == (LOGIN, "")
    for connection in connections:
        database._pool.release(connection)


class TestAtRandom:
    @pytest.mark.parametrize(
        ("twice", "units"),
        [
            pytest.param(False, 1_500, id="once"),
            pytest.param(True, 300, id="twice"),
            pytest.param(False, 3_000, id="once, for long", marks=pytest.mark.fault),
            pytest.param(True, 3_000, id="twice, for long", marks=pytest.mark.fault),
        ],
    )
    async def test_E7_C2_every_next_unit_works_and_nothing_is_left(
        self,
        two: Database,
        superuser: Connection,
        twice: bool,  # noqa: FBT001
        units: int,
    ) -> None:
        crowd = Crowd(two, seed=20_261_121, twice=twice)
        await asyncio.gather(*(crowd.work(units // WORKERS) for _ in range(WORKERS)))

        assert crowd.cancelled == units
        await assert_nothing_left(two, superuser)
        rows = await superuser.fetch("SELECT user_id, title FROM tasks")
        titles = [row["title"] for row in rows]
        assert crowd.acknowledged <= set(titles)
        assert len(titles) == len(set(titles))
        assert [row for row in rows if not row["title"].startswith(row["user_id"])] == []


class TestAt:
    """At a point that the proxy holds until the task was cancelled there."""

    @staticmethod
    async def cancel_held(task: asyncio.Task[Any], proxy: Proxy, times: int) -> None:
        await until(lambda: not proxy.pending)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(30):
                await task

    async def test_C1_C1b_each_step_of_a_unit(
        self, database_without_retries: Database, proxy: Proxy, owner: Connection
    ) -> None:
        async def unit(step: bytes) -> None:
            async with database_without_retries.transaction("alice") as tx:
                await tx.tasks.create("alice", "held")
                if step is ROLLBACK:
                    raise LookupError

        for step, times in product((BEGIN, b"held", COMMIT, ROLLBACK), (1, 2)):
            proxy.break_at(step, Fault.HANG)
            task = asyncio.create_task(unit(step))
            await self.cancel_held(task, proxy, times)
            assert database_without_retries._pool.status.in_use == 0
            assert await database_without_retries.tasks.count("alice") == 0
            assert await owner.fetchval("SELECT count(*) FROM tasks") == 0

    async def test_C3_waiting_for_the_pool(self, two: Database, superuser: Connection) -> None:
        async with two.transaction("alice"), two.transaction("bob"):
            waiting = [asyncio.create_task(two.tasks.count("alice")) for _ in range(5)]
            await until(lambda: two._pool.status.waiting == 5)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert all(task.cancelled() for task in waiting)
            assert two._pool.status == PoolStatus(size=2, in_use=2, waiting=0)
        await assert_nothing_left(two, superuser)

    async def test_C3_as_its_turn_comes(self, two: Database, superuser: Connection) -> None:
        for _ in range(20):
            async with two.transaction("alice"):
                async with two.transaction("bob"):
                    waiting = asyncio.create_task(two.tasks.count("alice"))
                    await until(lambda: two._pool.status.waiting == 1)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            assert await two.tasks.count("bob") == 0
        await assert_nothing_left(two, superuser)

    @pytest.mark.usefixtures("db")
    async def test_C4_connecting(self, proxy: Proxy) -> None:
        async with Database.from_url(
            proxy.url,
            pool_size=1,
            max_overflow=0,
            retry_attempts=1,
            connect_timeout_seconds=0.3,
        ) as one:
            for times in (1, 2, 1, 2):
                connection = await one._pool.acquire()
                connection.terminate()
                one._pool.release(connection)
                proxy.break_at(STARTUP, Fault.HANG)
                task = asyncio.create_task(one.tasks.count("alice"))
                await self.cancel_held(task, proxy, times)
                assert one._pool.status.in_use == 0
                # The pool's own task goes on connecting until its attempt times out.
                await until(lambda: not one._pool._connecting)
            assert await one.tasks.count("alice") == 0

    async def test_C1b_statement_is_stopped_on_the_server(
        self, two: Database, superuser: Connection
    ) -> None:
        lock = superuser.transaction()
        await lock.start()
        await superuser.execute("LOCK tasks IN ACCESS EXCLUSIVE MODE")
        task = asyncio.create_task(two.tasks.create("alice", "never"))
        await until_waiting(superuser)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await lock.rollback()
        await assert_nothing_left(two, superuser)
        assert await two.tasks.count("alice") == 0
