"""A Database and the event loops of its process: what is left open, opened again or refused."""

import asyncio
import gc
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest
from driver import Connection

from todo_db import ConfigurationError, Database, Settings, TodoDBError
from todo_db.embedded import LOGIN

type Use = Callable[[Database], Coroutine[Any, Any, object]]

CALLERS: Final = 6
"""Enough that some wait: only waiting binds a lock of asyncio's to its loop."""


@pytest.fixture
def login() -> str:
    """One is enough: connections are the same for both."""
    return LOGIN


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    """Where other event loops can run."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


async def _entered(database: Database) -> None:
    async with database:
        await _counted(database)


async def _counted(database: Database) -> None:
    counts = await asyncio.gather(*(database.tasks.count("alice") for _ in range(CALLERS)))
    assert counts == [0] * CALLERS


async def _transaction(database: Database) -> None:
    async with database.transaction("alice") as tx:
        assert await tx.tasks.count("alice") == 0


async def _healthy(database: Database) -> None:
    assert (await database.health()).ok


USES: Final[dict[str, Use]] = {
    "async with": _entered,
    "open": Database.open,
    "calls": _counted,
    "transaction": _transaction,
    "health": _healthy,
}


class TestEndedLoop:
    """The Database was left open, and its event loop has ended."""

    @pytest.fixture(autouse=True)
    def left_open(self) -> Iterator[None]:
        """Python says of each socket that it was left open, which is true."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            yield
            gc.collect()

    @pytest.mark.parametrize("use", USES.values(), ids=USES)
    def test_E8_it_opens_anew_on_the_next_loop(
        self, thread: ThreadPoolExecutor, url: str, use: Use
    ) -> None:
        async def left_open(database: Database) -> None:
            await database.open()
            await _counted(database)

        def run() -> None:
            database = Database.from_url(url)
            for _ in range(2):
                asyncio.run(left_open(database))
                asyncio.run(use(database))
            asyncio.run(left_open(database))
            asyncio.run(database.close())

        thread.submit(run).result(120)

    def test_E8_it_can_be_closed_on_the_next_loop(
        self, thread: ThreadPoolExecutor, url: str
    ) -> None:
        async def closed(database: Database) -> None:
            await database.close()
            with pytest.raises(ConfigurationError, match="was closed"):
                await database.tasks.count("alice")

        def run() -> None:
            database = Database.from_url(url)
            asyncio.run(_counted(database))
            asyncio.run(closed(database))
            asyncio.run(_entered(database))

        thread.submit(run).result(120)

    def test_E8_opening_that_failed_is_tried_anew_on_the_next_loop(
        self, thread: ThreadPoolExecutor, url: str
    ) -> None:
        async def failures(database: Database) -> set[type[BaseException]]:
            results = await asyncio.gather(
                *(database.tasks.count("alice") for _ in range(CALLERS)), return_exceptions=True
            )
            return {type(result) for result in results if isinstance(result, BaseException)}

        def run() -> None:
            database = Database.from_url(url.replace(LOGIN, "unknown_login"))
            for _ in range(2):
                assert asyncio.run(failures(database)) == {ConfigurationError}

        thread.submit(run).result(120)

    def test_E8_one_that_was_closed_is_opened_by_many_callers_on_the_next_loop(
        self, thread: ThreadPoolExecutor, url: str
    ) -> None:
        async def opened_and_closed(database: Database) -> None:
            await asyncio.gather(*(database.open() for _ in range(CALLERS)))
            await database.close()

        def run() -> None:
            database = Database.from_url(url)
            for _ in range(2):
                asyncio.run(opened_and_closed(database))

        thread.submit(run).result(120)

    @pytest.mark.parametrize("then", ["nothing", "use", "close"])
    async def test_E8_nothing_is_printed_at_garbage_collection_and_its_connections_end(
        self, url: str, superuser: Connection, then: str
    ) -> None:
        other = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-X", "dev", "-c", _LEFT_OPEN, url, then],
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert other.stdout == "done\n", other.stderr
        said = [line for line in other.stderr.splitlines() if "ResourceWarning" not in line]
        assert [line for line in said if any(word in line for word in _COMPLAINTS)] == []
        if then != "nothing":
            assert "unclosed connection" not in other.stderr, "asyncpg was not told"
        async with asyncio.timeout(30):
            while await superuser.fetchval(  # noqa: ASYNC110  # nothing sets an event
                "SELECT count(*) FROM pg_stat_activity"
                f" WHERE datname = current_database() AND usename = '{LOGIN}'"
            ):
                await asyncio.sleep(0.01)


_COMPLAINTS: Final = (
    "Error",
    "Exception",
    "Traceback",
    "garbage collector",
    "never awaited",
    "never retrieved",
    "was destroyed",
)
# Leaves a Database open on a loop that ends, with a call cut off half-way.
_LEFT_OPEN: Final = """
import asyncio, gc, sys
from todo_db import Database

async def use(db):
    await asyncio.gather(*(db.tasks.count("alice") for _ in range(6)))

async def cut(db):
    await use(db)
    call = asyncio.create_task(db.tasks.count("alice"))
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.sleep(0)

def main(url, then):
    db = Database.from_url(url)
    asyncio.run(cut(db))
    gc.collect()
    if then == "use":
        asyncio.run(use(db))
    if then != "nothing":
        asyncio.run(db.close())
    del db
    gc.collect()
    print("done")

main(*sys.argv[1:])
"""


class TestRunningLoop:
    """The Database is open on an event loop that still runs."""

    @pytest.mark.parametrize("use", [*USES.values(), Database.close], ids=[*USES, "close"])
    async def test_E8_another_one_is_refused_by_naming_the_setting(
        self, thread: ThreadPoolExecutor, database: Database, use: Use
    ) -> None:
        def elsewhere() -> None:
            asyncio.run(self._refused(database, use))

        await asyncio.get_running_loop().run_in_executor(thread, elsewhere)
        await _counted(database)

    @staticmethod
    async def _refused(database: Database, use: Use) -> None:
        if use is _healthy:
            health = await database.health()
            assert (health.ok, health.problem) == (False, "ConfigurationError")
            return
        with pytest.raises(ConfigurationError, match="asyncio_default_test_loop_scope"):
            await use(database)

    def test_E8_another_one_is_refused_while_it_opens(self, url: str) -> None:
        opening, refused = threading.Event(), threading.Event()

        class Slow(Database):
            async def _check(self) -> None:
                opening.set()
                await asyncio.to_thread(refused.wait, 60)
                await super()._check()

        def elsewhere() -> None:
            opening.wait(60)
            try:
                asyncio.run(self._refused(database, Database.open))
                asyncio.run(self._refused(database, Database.close))
            finally:
                refused.set()

        database = Slow(Settings(database_url=url))
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(asyncio.run, _entered(database))
            threads.submit(elsewhere).result(120)
            first.result(120)

    async def test_E8_another_one_may_open_it_once_it_is_closed(
        self, thread: ThreadPoolExecutor, url: str
    ) -> None:
        database = Database.from_url(url)
        await _entered(database)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(thread, lambda: asyncio.run(_entered(database)))
        await _entered(database)


class TestFork:
    async def test_opening_it_in_the_child_is_refused(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With a changed process id, as after a fork; `test_faults` really forks."""
        with monkeypatch.context() as child:
            child.setattr("todo_db.database.os.getpid", lambda: -1)
            with pytest.raises(ConfigurationError, match="fork"):
                await database.open()
            with pytest.raises(TodoDBError, match="fork"):
                await database.tasks.count("alice")
            await database.close()
        await _counted(database)
