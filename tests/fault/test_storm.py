"""Acknowledged changes are stored exactly once, after many restarts under load."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Final

import pytest
import pytest_asyncio
from cluster import Cluster
from pgbouncer import PASSWORD, TRIXIE, PgBouncer

from todo_db import (
    Database,
    NewTask,
    OutcomeUnknownError,
    Settings,
    TaskRecord,
    TodoDBError,
    Transaction,
    UnavailableError,
)
from todo_db.embedded import LOGIN, EmbeddedPostgres
from todo_db.logins import create_login
from todo_db.migrations import upgrade

pytestmark = pytest.mark.fault

SINGLE: Final = "single_login"
USERS: Final = ("alice", "bob")
WRITERS: Final = 4
"""Of each kind."""
ENDS: Final[tuple[Callable[[Cluster], None], ...]] = (
    lambda server: server.stop("fast"),
    lambda server: server.stop("immediate"),
    lambda server: server.kill(),
) * 4
MANY: Final = 3


@dataclass
class Log:
    """The outcome of the calls for each title."""

    acknowledged: set[str] = field(default_factory=set[str])
    refused: set[str] = field(default_factory=set[str])
    unknown: set[str] = field(default_factory=set[str])
    ids: dict[str, int] = field(default_factory=dict[str, int])
    unexpected: list[BaseException] = field(default_factory=list[BaseException])
    again: int = 0


class Writers:
    """Write until `stop`; each call has a title of its own."""

    def __init__(self, db: Database) -> None:
        self.log = Log()
        self._db = db
        self._stopped = False
        self._numbers = 0

    def stop(self) -> None:
        self._stopped = True

    def _titles(self, user: str, number: int) -> list[str]:
        self._numbers += 1
        return [f"{user} {self._numbers} {part}" for part in range(number)]

    async def unkeyed(self, user: str, seed: int) -> None:
        """Use each way to write in turn, and log its outcome."""
        dice = random.Random(seed)  # noqa: S311  # the same every time
        while not self._stopped:
            write = dice.choice((self._create, self._create_many, self._transaction, self._run))
            titles = self._titles(user, 1 if write == self._create else MANY)
            try:
                await write(user, titles)
            except UnavailableError:
                self.log.refused.update(titles)
            except OutcomeUnknownError:
                self.log.unknown.update(titles)
            except Exception as error:  # noqa: BLE001  # counted
                self.log.unexpected.append(error)
            else:
                self.log.acknowledged.update(titles)

    async def keyed(self, user: str, seed: int) -> None:
        """Repeat each call with its key until it is acknowledged."""
        dice = random.Random(seed)  # noqa: S311  # the same every time
        while not self._stopped:
            titles = self._titles(user, dice.choice((1, MANY)))
            try:
                tasks = await self._until_acknowledged(user, titles)
            except Exception as error:  # noqa: BLE001  # counted
                self.log.unexpected.append(error)
            else:
                self.log.acknowledged.update(titles)
                self.log.ids.update((task.title, task.id) for task in tasks)

    async def _until_acknowledged(self, user: str, titles: list[str]) -> list[TaskRecord]:
        (first, *others) = titles
        while True:
            try:
                if others:
                    return await self._db.tasks.create_many(
                        user, [NewTask(title) for title in titles], idempotency_key=first
                    )
                return [await self._db.tasks.create(user, first, idempotency_key=first)]
            except (UnavailableError, OutcomeUnknownError):
                self.log.again += 1

    async def _create(self, user: str, titles: list[str]) -> None:
        await self._db.tasks.create(user, titles[0])

    async def _create_many(self, user: str, titles: list[str]) -> None:
        await self._db.tasks.create_many(user, [NewTask(title) for title in titles])

    async def _transaction(self, user: str, titles: list[str]) -> None:
        async with self._db.transaction(user) as tx:
            for title in titles:
                await tx.tasks.create(user, title)

    async def _run(self, user: str, titles: list[str]) -> None:
        async def work(tx: Transaction) -> None:
            for title in titles:
                await tx.tasks.create(user, title)

        await self._db.run(user, work)


@pytest_asyncio.fixture(scope="module")
async def server(todo_postgres: EmbeddedPostgres) -> AsyncGenerator[Cluster]:
    del todo_postgres  # creates the user that this one runs as
    with Cluster(18, durable=True) as server:
        owner = await server.create_database("template")
        await upgrade(owner)
        await server.execute(f"CREATE ROLE {LOGIN} LOGIN IN ROLE todo_app PASSWORD '{PASSWORD}'")
        await create_login(owner, Settings(), SINGLE)
        await server.execute(f"ALTER ROLE {SINGLE} PASSWORD '{PASSWORD}'")
        yield server


@pytest.fixture(params=[LOGIN, SINGLE])
def login(request: pytest.FixtureRequest) -> str:
    """The calls of the first take three round trips, those of the other take one."""
    return str(request.param)


@pytest_asyncio.fixture(params=["direct", "pooled"])
async def url(request: pytest.FixtureRequest, server: Cluster, login: str) -> AsyncGenerator[str]:
    name = f"storm_{login}_{request.param}"
    await server.execute(
        f"CREATE DATABASE {name} TEMPLATE template OWNER todo_owner",
        f"REVOKE TEMPORARY ON DATABASE {name} FROM PUBLIC",
    )
    if request.param == "direct":
        yield server.url(login, name)
        return
    # With the default, PgBouncer would wait 15 s after each restart.
    async with PgBouncer(
        TRIXIE,
        server.url("postgres", "postgres"),
        max_prepared_statements=1000,
        server_login_retry=1,
    ) as pooler:
        yield pooler.url(login, name)


@pytest_asyncio.fixture
async def db(url: str, login: str) -> AsyncGenerator[Database]:
    async with Database.from_url(url) as database:
        assert (await database.health()).round_trips == (1 if login == SINGLE else 3)
        for user in USERS:
            await database.users.create(user, email=f"{user}@example.org", name=user)
        yield database


class TestRestarts:
    async def test_O2_acknowledged_is_there_once_and_refused_is_not(
        self, db: Database, server: Cluster
    ) -> None:
        writers = Writers(db)
        async with asyncio.timeout(600), asyncio.TaskGroup() as group:
            for number in range(WRITERS):
                user = USERS[number % len(USERS)]
                group.create_task(writers.unkeyed(user, number))
                group.create_task(writers.keyed(user, number))
            for end in ENDS:
                before = len(writers.log.acknowledged)
                while len(writers.log.acknowledged) < before + 300:  # noqa: ASYNC110  # no event
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(end, server)
                await asyncio.to_thread(server.start)
            writers.stop()
        await self._assert_true(writers.log, db, server)

    @staticmethod
    async def _assert_true(log: Log, db: Database, server: Cluster) -> None:
        health = await db.health()
        assert health.ok
        assert (health.pool.in_use, health.pool.waiting) == (0, 0)

        assert [error for error in log.unexpected if not isinstance(error, TodoDBError)] == []
        assert log.unexpected == []

        name = db._pool._engine.url.database
        assert name is not None
        connection = await server.connect(database=name)
        rows = await connection.fetch("SELECT id, user_id, title FROM tasks")
        await connection.close()
        stored = Counter(row["title"] for row in rows)
        assert [title for title, number in stored.items() if number > 1] == []
        assert log.acknowledged - stored.keys() == set()
        assert log.refused & stored.keys() == set()
        assert stored.keys() <= log.acknowledged | log.unknown
        assert all(row["title"].startswith(row["user_id"]) for row in rows)
        # Enough calls that every restart interrupted some.
        assert len(log.acknowledged) >= 300 * len(ENDS)
        # A repeated call returns the stored row.
        ids = {row["title"]: row["id"] for row in rows}
        assert {title: ids[title] for title in log.ids} == log.ids
