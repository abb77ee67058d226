"""Poolers that pass the names of prepared statements on unchanged, and those that do not.

Behind one that does, a name means whatever the last client prepared under it on that server
connection. No statement may ever run in place of another one, whatever the settings say.
"""

import asyncio
import json
import logging
import os
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
from driver import Connection
from pgbouncer import BOOKWORM, PASSWORD, TRIXIE, PgBouncer

from todo_db import Database, NewTask, UnavailableError
from todo_db.embedded import LOGIN, EmbeddedPostgres

pytestmark = pytest.mark.pooler

# Release, max_prepared_statements, and other settings of PgBouncer.
type Kind = tuple[str, int | None, dict[str, str]]

UNTRACKED: Final[dict[str, Kind]] = {
    "1.24, max_prepared_statements = 0": (TRIXIE, 0, {}),
    "1.18": (BOOKWORM, None, {}),
}
BY_SESSION: Final[dict[str, Kind]] = {
    "1.24, 0, by session": (TRIXIE, 0, {"pool_mode": "session"}),
    "1.24, 1000, by session": (TRIXIE, 1000, {"pool_mode": "session"}),
}
TRACKED: Final[dict[str, Kind]] = {
    f"1.24, max_prepared_statements = {number}": (TRIXIE, number, {}) for number in (1, 200, 1000)
}
SERVERS: Final = 3
"""Server connections, so that those of the pool have to share them."""
CALLS: Final = 200


def kinds(*groups: dict[str, Kind]) -> pytest.MarkDecorator:
    together = {name: kind for group in groups for name, kind in group.items()}
    return pytest.mark.parametrize("kind", together.values(), ids=together)


@pytest.fixture
def login() -> str:
    """One is enough: connections are the same for both."""
    return LOGIN


@pytest_asyncio.fixture
async def pooler(todo_postgres: EmbeddedPostgres, kind: Kind) -> AsyncGenerator[PgBouncer]:
    suite, prepared, settings = kind
    todo_postgres._psql(f"ALTER ROLE {LOGIN} PASSWORD '{PASSWORD}'")
    server = todo_postgres.url(user="postgres", database="postgres")
    size = 20 if settings else SERVERS
    async with PgBouncer(
        suite, server, max_prepared_statements=prepared, default_pool_size=size, **settings
    ) as started:
        yield started


@pytest.fixture
def url(pooler: PgBouncer, todo_database_name: str) -> str:
    return pooler.url(LOGIN, todo_database_name)


@pytest.fixture(autouse=True)
def default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TODO_DB_PREPARED_STATEMENTS", raising=False)


async def warnings_of_opening(
    url: str, caplog: pytest.LogCaptureFixture, **settings: bool
) -> tuple[bool, list[str]]:
    """Return whether an open Database keeps prepared statements, and what it warned of."""
    with caplog.at_level(logging.WARNING, "todo_db"):
        async with Database.from_url(url, **settings) as database:
            keeps = database._pool.keeps_statements
            await asyncio.gather(*(database.tasks.count("alice") for _ in range(20)))
            assert database._pool.keeps_statements == keeps
    said = [record.getMessage() for record in caplog.records if record.name.startswith("todo_db")]
    return keeps, said


class TestOpen:
    @kinds(UNTRACKED, BY_SESSION)
    async def test_E1_turns_statements_off_with_one_warning(
        self, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        keeps, warnings = await warnings_of_opening(url, caplog)
        assert not keeps
        (warning,) = warnings
        assert "max_prepared_statements" in warning
        assert "TODO_DB_PREPARED_STATEMENTS" in warning

    @kinds(TRACKED)
    async def test_E1_keeps_statements_and_is_silent(
        self, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert await warnings_of_opening(url, caplog) == (True, [])

    @kinds(UNTRACKED, BY_SESSION, TRACKED)
    async def test_E1_setting_off_is_obeyed(
        self, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        off = await warnings_of_opening(url, caplog, prepared_statements=False)
        assert off == (False, [])

    @kinds(BY_SESSION, TRACKED)
    async def test_E1_setting_on_is_obeyed(
        self, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        on = await warnings_of_opening(url, caplog, prepared_statements=True)
        assert on == (True, [])

    @kinds(UNTRACKED)
    async def test_E1_statements_are_off_on_every_connection(self, url: str) -> None:
        async with Database.from_url(url) as database:
            await asyncio.gather(*(database.tasks.count("alice") for _ in range(20)))
            connections = database._pool._idle
            assert len(connections) > 1
            sizes = {
                connection.driver._stmt_cache.get_max_size()  # type: ignore[attr-defined]
                for connection in connections
            }
        assert sizes == {0}


# A process that only reads alice's tasks in transactions, or only changes bob's. It prints how
# many calls were acknowledged, what failed, and what it saw that cannot be.
_WORKER: Final = """
import asyncio, json, os, sys
from todo_db import Database, NewTask, TodoDBError

async def reads(db, result, calls):
    async def call(number):
        async with db.transaction("alice") as tx:
            match number % 3:
                case 0:
                    page = await tx.tasks.list("alice", limit=1)
                    return {task.title for task in page.items} <= {f"alice's {n}" for n in range(9)}
                case 1:
                    return await tx.tasks.count("alice") == 9
                case _:
                    return await tx.tasks.count("alice", completed=True) == 4
    await every(call, result, calls)

async def changes(db, result, calls):
    async def call(number):
        match number % 4:
            case 0:
                return (await db.tasks.create("bob", f"bob's {number}")).user_id == "bob"
            case 1:
                await db.tasks.delete_completed("bob")
                return True
            case _:
                (task, *_) = (await db.tasks.list("bob")).items
                changed = await db.tasks.toggle("bob", task.id)
                return (changed.id, changed.title) == (task.id, task.title)
    await db.tasks.create_many("bob", [NewTask(f"bob's {n}") for n in range(calls)])
    await every(call, result, calls, at_once=1)

async def every(call, result, calls, at_once=4):
    for first in range(0, calls, at_once):
        for answer in await asyncio.gather(
            *(call(number) for number in range(first, first + at_once)), return_exceptions=True
        ):
            if isinstance(answer, BaseException):
                result["failed"].append(f"{type(answer).__name__}: {answer}")
            elif answer:
                result["acknowledged"] += 1
            else:
                result["wrong"] += 1

async def work(url, kind, calls, forced):
    result = {"acknowledged": 0, "failed": [], "wrong": 0}
    settings = {"prepared_statements": True} if forced else {}
    async with Database.from_url(url, **settings) as db:
        await {"reads": reads, "changes": changes}[kind](db, result, calls)
    os.write(1, json.dumps(result).encode() + b"\\n")  # One piece: forked siblings print at once.
"""
_ALONE: Final = f"""{_WORKER}
url, kind, calls, forced = sys.argv[1:]
asyncio.run(work(url, kind, int(calls), forced == "True"))
"""
# The parent has used a Database of its own, so that its children share all it learnt and counted.
_FORKED: Final = f"""{_WORKER}
async def used(url):
    async with Database.from_url(url) as db:
        await db.tasks.count("alice")

def main(url, calls, forced):
    asyncio.run(used(url))
    children = []
    for kind in ("reads", "changes", "reads"):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                asyncio.run(work(url, kind, int(calls), forced == "True"))
                code = 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    sys.exit(max(codes))

main(*sys.argv[1:])
"""


class Workers:
    """Processes of one application behind one pooler, and alice's tasks, which none may change."""

    def __init__(self, owner: Connection) -> None:
        self._owner = owner
        self._before: list[Any] = []

    async def plant(self) -> None:
        await self._owner.execute(
            "INSERT INTO users (id, email) VALUES ('alice', 'a@example.org'), ('bob', 'b@x.org')"
        )
        await self._owner.execute(
            "INSERT INTO tasks (user_id, title, completed)"
            " SELECT 'alice', 'alice''s ' || n, n % 2 = 1 FROM generate_series(0, 8) n"
        )
        self._before = await self.rows()

    async def rows(self) -> list[Any]:
        return await self._owner.fetch("SELECT * FROM tasks WHERE user_id = 'alice' ORDER BY id")

    @staticmethod
    async def run(script: str, *arguments: object) -> list[dict[str, Any]]:
        """Run a program to its end; return what its workers printed."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", script, *map(str, arguments)),
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
        )
        async with asyncio.timeout(600):
            output, _ = await process.communicate()
        assert process.returncode == 0
        return [json.loads(line) for line in output.decode().splitlines()]

    async def assert_unchanged(self) -> None:
        assert await self.rows() == self._before
        titles = await self._owner.fetch("SELECT title, description FROM tasks")
        assert [row for row in titles if "'s " not in row["title"] or row["description"]] == []


@pytest_asyncio.fixture
async def workers(owner: Connection) -> Workers:
    workers = Workers(owner)
    await workers.plant()
    return workers


@kinds(UNTRACKED)
class TestProcesses:
    """Every acknowledged call ran its own statement."""

    async def test_E1_one_after_the_other(self, workers: Workers, url: str) -> None:
        results: list[dict[str, Any]] = []
        for kind in ("changes", "reads", "changes", "reads"):
            results += await workers.run(_ALONE, url, kind, CALLS, False)  # noqa: FBT003
        assert results == [{"acknowledged": CALLS, "failed": [], "wrong": 0}] * 4
        await workers.assert_unchanged()

    async def test_E1_two_at_once(self, workers: Workers, url: str) -> None:
        results = await asyncio.gather(
            workers.run(_ALONE, url, "changes", CALLS, False),  # noqa: FBT003
            workers.run(_ALONE, url, "reads", CALLS, False),  # noqa: FBT003
        )
        assert list(results) == [[{"acknowledged": CALLS, "failed": [], "wrong": 0}]] * 2
        await workers.assert_unchanged()

    async def test_E1_forked(self, workers: Workers, url: str) -> None:
        results = await workers.run(_FORKED, url, CALLS, False)  # noqa: FBT003
        assert results == [{"acknowledged": CALLS, "failed": [], "wrong": 0}] * 3
        await workers.assert_unchanged()

    async def test_E1_forced_to_keep_statements_calls_may_fail_and_nothing_else(
        self, workers: Workers, url: str
    ) -> None:
        results = [
            *await workers.run(_ALONE, url, "changes", CALLS, True),  # noqa: FBT003
            *await workers.run(_FORKED, url, CALLS, True),  # noqa: FBT003
        ]
        assert [result["wrong"] for result in results] == [0] * 4
        assert sum(result["acknowledged"] for result in results) > CALLS
        kinds = {failure.partition(":")[0] for result in results for failure in result["failed"]}
        assert kinds <= {"UnavailableError"}
        await workers.assert_unchanged()


@kinds(UNTRACKED)
class TestForcedOn:
    """TODO_DB_PREPARED_STATEMENTS=true."""

    async def test_E1_a_failure_names_the_setting(self, url: str) -> None:
        async with Database.from_url(url, prepared_statements=True, retry_attempts=1) as database:
            await database.users.create("alice", email="alice@example.org", name="Alice")
            failures = [
                failure
                for number in range(20)
                for failure in await asyncio.gather(
                    *(database.tasks.create("alice", f"{number}") for _ in range(10)),
                    return_exceptions=True,
                )
                if isinstance(failure, BaseException)
            ]
            assert database._pool.keeps_statements
        assert {type(failure) for failure in failures} == {UnavailableError}
        assert {"TODO_DB_PREPARED_STATEMENTS=false" in str(failure) for failure in failures} == {
            True
        }


class TestPoolerThatChanges:
    """It tracked prepared statements when the Database was opened, and was then reconfigured."""

    @kinds({"1.24": (TRIXIE, 200, {})})
    async def test_E1_statements_go_off_at_the_first_failure_and_calls_succeed(
        self,
        url: str,
        pooler: PgBouncer,
        owner: Connection,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async with Database.from_url(url) as database:
            await database.users.create("alice", email="alice@example.org", name="Alice")
            assert database._pool.keeps_statements
            await pooler.console("SET max_prepared_statements = 0")
            # On other server connections than before, where PgBouncer has prepared nothing.
            await pooler.console("RECONNECT")
            tasks = [NewTask(f"{number}") for number in range(3)]
            for _ in range(10):
                await asyncio.gather(
                    *(database.tasks.create_many("alice", tasks) for _ in range(10))
                )
            assert not database._pool.keeps_statements
        assert await owner.fetchval("SELECT count(*) FROM tasks") == 300
        said = [
            record.getMessage() for record in caplog.records if record.name.startswith("todo_db")
        ]
        assert len([text for text in said if "TODO_DB_PREPARED_STATEMENTS" in text]) == 1


class TestDoctor:
    @staticmethod
    async def examined(url: str) -> tuple[int | None, str]:
        doctor = await asyncio.create_subprocess_exec(
            *(Path(sys.executable).with_name("todo-db"), "doctor"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | {"DATABASE_URL": url, "COLUMNS": "500", "PYTHONWARNINGS": "ignore"},
        )
        async with asyncio.timeout(300):
            output, _ = await doctor.communicate()
        return doctor.returncode, output.decode()

    @kinds(UNTRACKED, BY_SESSION)
    async def test_E1_names_the_setting_and_exits_with_1(self, url: str) -> None:
        code, output = await self.examined(url)
        assert code == 1
        assert "statements-untracked" in output
        assert "TODO_DB_PREPARED_STATEMENTS" in output

    @kinds(TRACKED)
    async def test_E1_finds_nothing_where_they_are_tracked(self, url: str) -> None:
        _, output = await self.examined(url)
        assert "pooled" in output
        assert "statements-untracked" not in output
