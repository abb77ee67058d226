"""Client CPU time of the repositories, compared with hand-written asyncpg.

Both send the same BEGIN, statement and COMMIT on open connections, and build the same records. Run
it with `uv run python benchmarks/repositories.py`, and compare the ratios, not the microseconds. It
measures the CPU time of this process, without the server's.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg

from todo_db import Database, NewTask, Settings, TaskRecord
from todo_db.embedded import LOGIN, EmbeddedPostgres
from todo_db.migrations import upgrade
from todo_db.transaction import TransactionPreamble

ROUNDS = 15
CALLS = 300

COLUMNS = "id, user_id, title, description, completed, created_at, updated_at"
GET = f"SELECT {COLUMNS} FROM tasks WHERE user_id = $1 AND id = $2"
PAGE = (
    f"SELECT {COLUMNS} FROM tasks WHERE user_id = $1 AND (user_id, id) < ($1, $2) "
    "ORDER BY user_id DESC, id DESC LIMIT $3"
)
UPDATE = f"UPDATE tasks SET title = $3 WHERE user_id = $1 AND id = $2 RETURNING {COLUMNS}"
CREATE = (
    "INSERT INTO tasks (user_id, title, description, completed) "
    f"VALUES ($1, $2, NULL, false) RETURNING {COLUMNS}"
)

type Work = Callable[[], Awaitable[object]]


class Floor:
    """Minimal hand-written code with the same behaviour."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        self._free = [connection]
        self._preamble = TransactionPreamble(Settings())

    async def run(self, sql: str, *arguments: object) -> list[TaskRecord]:
        """One transaction: acquire, BEGIN with user id, statement, COMMIT, release, records."""
        connection = self._free.pop()
        await connection.execute(self._preamble.begin("alice", read_only=False))
        rows = await connection.fetch(sql, *arguments)
        await connection.execute("COMMIT")
        self._free.append(connection)
        return [TaskRecord(*row) for row in rows]


async def cpu(work: Work) -> float:
    """Return microseconds of this process's CPU for one call."""
    begun = time.process_time()
    for _ in range(CALLS):
        await work()
    return (time.process_time() - begun) / CALLS * 1e6


async def compare(name: str, ours: Work, floor: Work) -> None:
    """Measure both alternately; print the medians and the median of the ratios."""
    for work in (ours, floor):
        await cpu(work)
    pairs = [(await cpu(ours), await cpu(floor)) for _ in range(ROUNDS)]
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{name:<12} {mine:8.0f} µs {theirs:8.0f} µs   × {ratio:.2f}")


async def measure(url: str) -> None:
    """Compare a get, a page of 50, an update and a create."""
    connection = await asyncpg.connect(url, max_cached_statement_lifetime=0)
    floor = Floor(connection)
    async with Database.from_url(url) as db:
        await db.users.create("alice", email="alice@example.org", name="Alice")
        tasks = await db.tasks.create_many("alice", [NewTask(f"Task {n}") for n in range(200)])
        one = tasks[100].id
        print(f"{'':<12} {'todo_db':>11} {'by hand':>11}")
        await compare(
            "get", lambda: db.tasks.get("alice", one), lambda: floor.run(GET, "alice", one)
        )
        await compare(
            "list 50",
            lambda: db.tasks.list("alice"),
            lambda: floor.run(PAGE, "alice", 2**63 - 1, 51),
        )
        await compare(
            "update",
            lambda: db.tasks.update("alice", one, title="x"),
            lambda: floor.run(UPDATE, "alice", one, "x"),
        )
        await compare(
            "create",
            lambda: db.tasks.create("alice", "x"),
            lambda: floor.run(CREATE, "alice", "x"),
        )
    await connection.close()


def main() -> None:
    """Measure on a temporary embedded PostgreSQL."""
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedPostgres(Path(folder) / "postgres", durable=False) as server,
    ):
        asyncio.run(upgrade(server.url()))
        server.create_login()
        asyncio.run(measure(server.url(user=LOGIN)))


if __name__ == "__main__":
    main()
