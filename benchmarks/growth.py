"""Which calls grow: with the table, and with one user's list; and what a partial index changes."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from itertools import cycle
from pathlib import Path
from typing import Final, NamedTuple

import asyncpg
import report
from server import Server

from todo_db import Database, NewTask, TaskSort

_PER_USER: Final = 200
_SECONDS: Final = 0.5
_CALLS: Final = 200
_USER: Final = "user-1"
_HEAVY: Final = """
    INSERT INTO users (id, email) VALUES ('heavy', 'heavy@example.org');
    INSERT INTO tasks (user_id, title, description, completed)
        SELECT 'heavy', 'Task ' || n, 'Milk, bread, and whatever else', n % 3 = 0
        FROM generate_series(1, {}) n;
"""
_FORGET: Final = "DELETE FROM users WHERE id = 'heavy'"
_NO_INDEX: Final = "DROP INDEX IF EXISTS open_tasks"
_INDEX: Final = "CREATE INDEX open_tasks ON tasks (user_id) WHERE NOT completed"
# What a count would be, if each value of `completed` had a statement of its own.
_LITERAL: Final = """
    WITH result AS MATERIALIZED (
        SELECT count(*) FROM tasks WHERE user_id = $1 AND NOT completed
    )
    SELECT * FROM result WHERE (SELECT set_config('todo_db.user_id', $1, true)) IS NOT NULL
"""


class Amount(NamedTuple):
    """How much is measured."""

    tables: tuple[int, ...]
    lists: tuple[int, ...]
    indexed: tuple[int, ...]
    """The lists of which an index is measured, in so many rounds."""
    rounds: int
    users: int = 1_000


FULL: Final = Amount(
    (1_000, 10_000, 100_000, 1_000_000),
    (10, 100, 1_000, 10_000, 100_000),
    indexed=(10_000, 100_000),
    rounds=3,
)
LARGE: Final = FULL._replace(tables=(*FULL.tables, 5_000_000))
ATTEMPT: Final = Amount((1_000,), (10, 1_000), indexed=(1_000,), rounds=1, users=10)

type Call = Callable[[], Awaitable[object]]
type Series = dict[str, dict[int, float]]


async def median(call: Call) -> float:
    """Return the median of a call's milliseconds, over half a second or 200 calls."""
    for _ in range(8):
        await call()
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(times) < _CALLS and (time.perf_counter() < end or len(times) < 3):  # noqa: PLR2004
        begun = time.perf_counter()
        await call()
        times.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(times)


async def calls_of(db: Database, user: str, length: int) -> dict[str, Call]:
    """Return what is measured, for a user who has so many tasks."""
    tasks = db.tasks
    first = await tasks.list(user, limit=min(1_000, max(1, length // 2)))
    half, cursor = len(first.items), first.next_cursor
    while half < length // 2 and cursor is not None:
        page = await tasks.list(user, limit=min(1_000, length // 2 - half), cursor=cursor)
        half, cursor = half + len(page.items), page.next_cursor
    one = first.items[0].id
    titles = (f"Title {number}" for number in range(10**9))

    async def create_and_delete() -> None:
        await tasks.delete(user, (await tasks.create(user, "Buy milk")).id)

    return {
        "get": lambda: tasks.get(user, one),
        "list": lambda: tasks.list(user),
        "list, from the middle": lambda: tasks.list(user, cursor=cursor),
        "create and delete": create_and_delete,
        "update": lambda: tasks.update(user, one, title=next(titles)),
        "toggle": lambda: tasks.toggle(user, one),
        "list by title": lambda: tasks.list(user, sort=TaskSort.TITLE),
        "count": lambda: tasks.count(user),
        "count of the open": lambda: tasks.count(user, completed=False),
        "search without a match": lambda: tasks.list(user, search="nowhere"),
    }


async def by_table(server: Server, sizes: tuple[int, ...]) -> Series:
    """Measure a user of 200 tasks, in tables of more and more users."""
    series: Series = {}
    for size in sizes:
        await server.seed(size // _PER_USER, size)
        async with Database.from_url(server.url("application")) as db:
            for name, call in (await calls_of(db, _USER, _PER_USER)).items():
                series.setdefault(name, {})[size] = await median(call)
        await server.execute("VACUUM tasks")
    return series


async def by_list(server: Server, lengths: tuple[int, ...]) -> Series:
    """Measure users with longer and longer lists, beside 1,000 users of 200 tasks."""
    await server.seed(server.users, server.tasks)
    series: Series = {}
    for length in lengths:
        await server.execute(_HEAVY.format(length))
        await server.execute("VACUUM (ANALYZE) tasks")
        async with Database.from_url(server.url("application")) as db:
            for name, call in (await calls_of(db, "heavy", length)).items():
                series.setdefault(name, {})[length] = await median(call)
        await server.execute(_FORGET)
    return series


async def by_index(server: Server, amount: Amount) -> str:
    """Measure reads and writes of a long list without and with the index, in turn."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for _ in range(amount.rounds):
        for column, sql in enumerate((_NO_INDEX, _INDEX)):
            await server.seed(server.users, server.tasks)
            await server.execute(sql)
            for length in amount.indexed:
                await server.execute(_HEAVY.format(length))
                await server.execute("VACUUM (ANALYZE) tasks")
                for name, value in (await _reads_and_writes(server)).items():
                    found.setdefault(f"{name}, of {length:,}", ([], []))[column].append(value)
                await server.execute(_FORGET)
            await server.execute(_NO_INDEX)
    rows = []
    for name, both in found.items():
        without, with_it = map(statistics.median, both)
        rows.append([name, f"{without:.2f}", f"{with_it:.2f}", f"{with_it / without - 1:+.0%}"])
    return report.table(["", "without", "with", "change"], rows)


async def _reads_and_writes(server: Server) -> dict[str, float]:
    found: dict[str, float] = {}
    url = server.url("application")
    async with Database.from_url(url) as db, asyncpg.create_pool(url, min_size=1) as pool:
        tasks = db.tasks
        newest = await tasks.list("heavy", limit=1_000)
        ids = cycle(task.id for task in newest.items)
        hundred = [NewTask("Buy milk")] * 100
        reads: dict[str, Call] = {
            "count of the open, ms": lambda: tasks.count("heavy", completed=False),
            "the same, if the SQL said NOT completed, ms": lambda: pool.fetch(_LITERAL, "heavy"),
            "page of the open, ms": lambda: tasks.list("heavy", completed=False),
        }
        writes: dict[str, Call] = {
            "toggle": lambda: tasks.toggle("heavy", next(ids)),
            "create 100": lambda: tasks.create_many("heavy", hundred),
        }
        for name, call in reads.items():
            found[name] = await median(call)
        for name, call in writes.items():
            found[f"{name}, ms"] = await median(call)
            before = await server.wal()
            for _ in range(_CALLS):
                await call()
            found[f"{name}, KB of WAL"] = (await server.wal() - before) / _CALLS / 1e3
    return found


def measure(page: Path | None, charts: Path | None, amount: Amount) -> None:
    """Measure everything, and report it."""
    with Server(users=amount.users, tasks=amount.users * _PER_USER) as server:
        tables = asyncio.run(by_table(server, amount.tables))
        lists = asyncio.run(by_list(server, amount.lists))
        index = asyncio.run(by_index(server, amount))
    if charts is not None:
        report.lines(charts / "growth-table.svg", "One user has 200 tasks", "tasks in all", tables)
        report.lines(charts / "growth-list.svg", "A long list", "tasks of one user", lists)
    report.publish(
        {"growth by table": _table(tables), "growth by list": _table(lists), "index": index}, page
    )


def _table(series: Series) -> str:
    sizes = next(iter(series.values()))
    rows = ([name, *(f"{of:.2f}" for of in points.values())] for name, points in series.items())
    return report.table(["ms", *(f"{size:,}" for size in sizes)], rows)
