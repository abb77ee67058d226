"""Work that is cut off or cannot begin does not cost the work of others."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from statistics import median
from typing import Final, override

import pytest
import pytest_asyncio
from cluster import Cluster
from deadlines import Storm, asyncpg_pool, slow_down, storm, todo_db
from driver import Connection
from pgbouncer import PASSWORD, TRIXIE, PgBouncer
from proxy import STARTUP, Fault, Proxy

from todo_db import Database, UnavailableError
from todo_db.embedded import LOGIN, OWNER, EmbeddedPostgres
from todo_db.migrations import upgrade

pytestmark = pytest.mark.fault

CANCEL_REQUEST: Final = b"\x00\x00\x00\x10\x04\xd2\x16\x2e"
BUDGET: Final = 20.0
"""Seconds for which a call may wait for a connection: the default of `connect_retry_seconds`."""


@pytest.fixture
def login() -> str:
    """One is enough for all but the first class."""
    return LOGIN


class TestDeadlines:
    """Six callers end each call after 0 to 60 ms; asyncpg's own pool is the measure.

    `benchmarks/goodput.py` prints the figures. The limits here are wide, because both sides are
    slowed down by whatever else the machine does.
    """

    @pytest.fixture
    def their_url(self, todo_postgres: EmbeddedPostgres, todo_database_name: str) -> str:
        """No pool of asyncpg's sets a role and a user, so it must be the owner's."""
        return todo_postgres.url(user=OWNER, database=todo_database_name)

    @pytest.mark.usefixtures("db")
    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    @pytest.mark.parametrize("extra", [0, 0.003], ids=["as it is", "slower"])
    async def test_E2_share_sessions_and_the_time_of_others(
        self, url: str, their_url: str, owner: Connection, extra: float
    ) -> None:
        await slow_down(owner, extra)
        theirs: list[Storm] = []
        ours: list[Storm] = []
        for _ in range(3):
            theirs.append(await storm(owner, asyncpg_pool(their_url), longest=0.06, seconds=1.5))
            ours.append(await storm(owner, todo_db(url), longest=0.06, seconds=1.5))
        assert [each.errors for each in ours] == [{}, {}, {}]
        assert median(each.share for each in ours) >= median(each.share for each in theirs) - 0.15
        most = 3 * max(10, *(each.sessions for each in theirs))
        assert max(each.sessions for each in ours) <= most
        beside = median(each.beside / each.undisturbed for each in ours)
        assert beside <= max(4, 2 * median(each.beside / each.undisturbed for each in theirs))


class Watch:
    """Polls how many connections of the login are at the server."""

    def __init__(self, superuser: Connection) -> None:
        self.most = 0
        self._superuser = superuser

    @asynccontextmanager
    async def polling(self) -> AsyncGenerator[None]:
        polling = asyncio.create_task(self._poll())
        try:
            yield
        finally:
            polling.cancel()
            with suppress(asyncio.CancelledError):
                await polling

    async def _poll(self) -> None:
        while True:
            found = await self._superuser.fetchval(
                "SELECT count(*) FROM pg_stat_activity"
                f" WHERE datname = current_database() AND usename = '{LOGIN}'"
            )
            self.most = max(self.most, int(found))
            await asyncio.sleep(0.002)


@asynccontextmanager
async def locked(owner: Connection) -> AsyncGenerator[None]:
    """Lock `tasks`, so that every call waits."""
    async with owner.transaction():
        await owner.execute("LOCK tasks IN ACCESS EXCLUSIVE MODE")
        yield


class TestSize:
    """`pool_size=2, max_overflow=0`, and calls that are cut off while they wait for a lock."""

    @staticmethod
    async def cut_off(database: Database, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await database.tasks.create("alice", "never")

    @pytest_asyncio.fixture(autouse=True)
    async def alice(self, owner: Connection) -> None:
        await owner.execute("INSERT INTO users (id, email) VALUES ('alice', 'a@example.org')")

    async def test_E3_never_more_connections_at_the_server(
        self, url: str, owner: Connection, superuser: Connection
    ) -> None:
        watch = Watch(superuser)
        async with Database.from_url(url, pool_size=2, max_overflow=0) as two:
            async with locked(owner), watch.polling():
                for number in range(100):
                    await asyncio.gather(
                        *(self.cut_off(two, 0.002 * (number % 10)) for _ in range(3))
                    )
            assert await two.tasks.count("alice") == 0
            status = (await two.health()).pool
        assert 0 < watch.most <= 2
        assert (status.in_use, status.waiting) == (0, 0)

    async def test_E3_with_cancel_requests_that_hang_only_those_cut_are_more(
        self,
        proxy: Proxy,
        owner: Connection,
        superuser: Connection,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level(logging.INFO, "todo_db")
        watch = Watch(superuser)
        async with Database.from_url(
            proxy.url, pool_size=2, max_overflow=0, lock_timeout_seconds=30
        ) as two:
            await asyncio.gather(*(two.tasks.count("alice") for _ in range(2)))
            proxy.break_at(CANCEL_REQUEST, Fault.HANG, times=999)
            async with locked(owner), watch.polling(), asyncio.timeout(30):
                for _ in range(20):
                    await asyncio.gather(*(self.cut_off(two, 0.2) for _ in range(6)))
        cut = [text for text in caplog.messages if text.endswith("not_recovered")]
        assert cut, "no CancelRequest hung: nothing was proven"
        assert watch.most <= 2 + len(cut)


class WithAuthFile(PgBouncer):
    """A PgBouncer that logs its clients in from a file, also while it has no server."""

    @override
    def _write(self, name: str, content: str) -> None:
        if name == "users":
            content += f'"{LOGIN}" "{PASSWORD}"\n'
        super()._write(name, content)


@pytest_asyncio.fixture(scope="module")
async def server(todo_postgres: EmbeddedPostgres) -> AsyncGenerator[Cluster]:
    """A server to stop and start."""
    del todo_postgres  # creates the user that this one runs as
    with Cluster(18) as server:
        await upgrade(await server.create_database("todo"))
        await server.execute(f"CREATE ROLE {LOGIN} LOGIN IN ROLE todo_app PASSWORD '{PASSWORD}'")
        await server.execute(
            "INSERT INTO users (id, email) VALUES ('alice', 'a@example.org')", database="todo"
        )
        yield server
        if not server.is_running:
            server.start()


@asynccontextmanager
async def outage(server: Cluster, seconds: float) -> AsyncGenerator[None]:
    """Stop the server, run the block, and start it after so many seconds."""
    await asyncio.to_thread(server.stop, "fast")
    begun = time.monotonic()
    try:
        yield
        await asyncio.sleep(max(0.0, begun + seconds - time.monotonic()))
    finally:
        await asyncio.to_thread(server.start)


class Callers:
    """Makes calls all at once, and notes how long each took and what failed."""

    def __init__(self, database: Database) -> None:
        self.failures: list[BaseException] = []
        self.longest = 0.0
        self._database = database

    async def run(self, number: int, *, turns: int = 1) -> None:
        await asyncio.gather(*(self._caller(turns) for _ in range(number)))

    async def _caller(self, turns: int) -> None:
        for _ in range(turns):
            begun = time.monotonic()
            try:
                await self._database.tasks.create("alice", "patient")
            except Exception as error:  # noqa: BLE001  # counted
                self.failures.append(error)
            self.longest = max(self.longest, time.monotonic() - begun)


class TestOutage:
    @pytest_asyncio.fixture
    async def pooler(self, server: Cluster) -> AsyncGenerator[PgBouncer]:
        """PgBouncer as it is installed: after a failure it waits 15 s for the next attempt."""
        url = server.url("postgres", "postgres")
        async with WithAuthFile(TRIXIE, url, max_prepared_statements=1000) as pooler:
            yield pooler

    @pytest.fixture
    def url(self, pooler: PgBouncer) -> str:
        return pooler.url(LOGIN, "todo")

    async def test_E4_no_call_fails_behind_a_pooler_that_logs_in_without_a_server(
        self, server: Cluster, url: str
    ) -> None:
        async with Database.from_url(url) as database:
            callers = Callers(database)
            await callers.run(50)
            async with outage(server, 1.2):
                calls = asyncio.create_task(callers.run(50, turns=5))
            async with asyncio.timeout(60):
                await calls
            assert callers.failures == []
            assert callers.longest < BUDGET + 5
            status = (await database.health()).pool
        assert (status.in_use, status.waiting) == (0, 0)

    async def test_E4_connects_are_few_while_the_server_is_down(self, server: Cluster) -> None:
        async with (
            Proxy(server.url(LOGIN, "todo")) as proxy,
            Database.from_url(proxy.url) as database,
        ):
            callers = Callers(database)
            await callers.run(100)
            proxy.break_at(STARTUP, Fault.CUT_BEFORE, times=9_999)
            await proxy.cut()
            before = proxy.connections
            calls = asyncio.create_task(callers.run(100, turns=2))
            await asyncio.sleep(10)
            made = proxy.connections - before
            proxy.heal()
            async with asyncio.timeout(60):
                await calls
        assert 0 < made <= 60
        assert callers.failures == []
        assert callers.longest < 30

    async def test_E4_connects_to_a_pooler_are_few_while_it_has_no_server(
        self, server: Cluster, url: str
    ) -> None:
        async with AsyncExitStack() as stack:
            proxy = await stack.enter_async_context(Proxy(url))
            database = await stack.enter_async_context(Database.from_url(proxy.url))
            callers = Callers(database)
            await callers.run(100)
            async with outage(server, 10):
                before = proxy.connections
                calls = asyncio.create_task(callers.run(100, turns=2))
                await asyncio.sleep(10)
                made = proxy.connections - before
            async with asyncio.timeout(90):
                await calls
        assert 0 < made <= 60
        # PgBouncer's 15 s end later than the budget of those that came first.
        assert {type(failure) for failure in callers.failures} <= {UnavailableError}
        assert callers.longest < 30
