"""Hand-written asyncpg, without a fence (one round trip) and with one (three): the two floors."""

import asyncio
from collections.abc import Sequence

import asyncpg

from contestants import COLUMNS, PAGE, Contestant

_COLUMNS = ", ".join(COLUMNS)
_GET = f"SELECT {_COLUMNS} FROM tasks WHERE user_id = $1 AND id = $2"
_LIST = f"SELECT {_COLUMNS} FROM tasks WHERE user_id = $1 ORDER BY id DESC LIMIT {PAGE}"
_CREATE = f"INSERT INTO tasks (user_id, title) VALUES ($1, $2) RETURNING {_COLUMNS}"
_CREATE_MANY = (
    f"INSERT INTO tasks (user_id, title) SELECT $1, unnest($2::text[]) RETURNING {_COLUMNS}"
)
_UPDATE = f"UPDATE tasks SET title = $3 WHERE user_id = $1 AND id = $2 RETURNING {_COLUMNS}"
_TOGGLE = (
    "UPDATE tasks SET completed = NOT completed WHERE user_id = $1 AND id = $2 "
    f"RETURNING {_COLUMNS}"
)
_DELETE = "DELETE FROM tasks WHERE user_id = $1 AND id = $2 RETURNING id"
_COUNT = "SELECT count(*) FROM tasks WHERE user_id = $1"

type Rows = list[asyncpg.Record]


class Unfenced(Contestant):
    """One statement in autocommit. Only its WHERE clause keeps users apart."""

    async def open(self, url: str, connections: int) -> None:
        self._url = url
        self._room = asyncio.Semaphore(connections)
        self._idle: list[asyncpg.Connection[asyncpg.Record]] = []

    async def close(self) -> None:
        for connection in self._idle:
            await connection.close()

    async def run(self, sql: str, user: str, *arguments: object) -> Rows:
        """Run one statement on a connection of the smallest possible pool."""
        async with self._room:
            connection = self._idle.pop() if self._idle else await asyncpg.connect(self._url)
            rows = await self.send(connection, sql, user, arguments)
            self._idle.append(connection)
            return rows

    async def send(
        self,
        connection: "asyncpg.Connection[asyncpg.Record]",
        sql: str,
        user: str,
        arguments: Sequence[object],
    ) -> Rows:
        """Send the statement."""
        return await connection.fetch(sql, user, *arguments)

    async def get(self, user: str, task: int) -> object:
        return _first(await self.run(_GET, user, task))

    async def list(self, user: str) -> Sequence[object]:
        return await self.run(_LIST, user)

    async def create(self, user: str, title: str) -> object:
        return _first(await self.run(_CREATE, user, title))

    async def create_many(self, user: str, titles: Sequence[str]) -> Sequence[object]:
        return await self.run(_CREATE_MANY, user, titles)

    async def update(self, user: str, task: int, title: str) -> object:
        return _first(await self.run(_UPDATE, user, task, title))

    async def toggle(self, user: str, task: int) -> object:
        return _first(await self.run(_TOGGLE, user, task))

    async def delete(self, user: str, task: int) -> object:
        return _first(await self.run(_DELETE, user, task))

    async def count(self, user: str) -> int:
        return int((await self.run(_COUNT, user))[0][0])

    def values(self, task: object) -> tuple[object, ...]:
        assert isinstance(task, asyncpg.Record)
        return tuple(task)


class Fenced(Unfenced):
    """The same in a transaction, whose BEGIN carries role and user in one message."""

    async def send(
        self,
        connection: "asyncpg.Connection[asyncpg.Record]",
        sql: str,
        user: str,
        arguments: Sequence[object],
    ) -> Rows:
        """Send BEGIN with its settings, the statement, and COMMIT."""
        quoted = user.replace("'", "''")
        await connection.execute(
            "BEGIN; SET LOCAL ROLE todo_app; "
            f"SELECT set_config('todo_db.user_id', '{quoted}', true)"
        )
        try:
            rows = await connection.fetch(sql, user, *arguments)
        except BaseException:
            await connection.execute("ROLLBACK")
            raise
        await connection.execute("COMMIT")
        return rows


def _first(rows: Rows) -> asyncpg.Record | None:
    return rows[0] if rows else None
