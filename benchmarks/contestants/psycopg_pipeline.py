"""psycopg 3 in pipeline mode: user and statement are sent together."""

from collections.abc import Sequence
from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool

from contestants import COLUMNS, PAGE, Contestant

_COLUMNS = ", ".join(COLUMNS)
_USER = "SELECT set_config('todo_db.user_id', %s, true)"
_GET = f"SELECT {_COLUMNS} FROM tasks WHERE user_id = %s AND id = %s"
_LIST = f"SELECT {_COLUMNS} FROM tasks WHERE user_id = %s ORDER BY id DESC LIMIT {PAGE}"
_CREATE = f"INSERT INTO tasks (user_id, title) VALUES (%s, %s) RETURNING {_COLUMNS}"
_CREATE_MANY = (
    f"INSERT INTO tasks (user_id, title) SELECT %s, unnest(%s::text[]) RETURNING {_COLUMNS}"
)
_UPDATE = f"UPDATE tasks SET title = %s WHERE user_id = %s AND id = %s RETURNING {_COLUMNS}"
_TOGGLE = (
    "UPDATE tasks SET completed = NOT completed WHERE user_id = %s AND id = %s "
    f"RETURNING {_COLUMNS}"
)
_DELETE = "DELETE FROM tasks WHERE user_id = %s AND id = %s RETURNING id"
_COUNT = "SELECT count(*) FROM tasks WHERE user_id = %s"


class Fenced(Contestant):
    """Each call is one pipeline, which PostgreSQL runs as one transaction."""

    async def open(self, url: str, connections: int) -> None:
        self._pool: AsyncConnectionPool[AsyncConnection[TupleRow]] = AsyncConnectionPool(
            url, min_size=1, max_size=connections, open=False, kwargs={"autocommit": True}
        )
        await self._pool.open(wait=True)

    async def close(self) -> None:
        await self._pool.close()

    async def _run(self, user: str, sql: str, *arguments: object) -> list[tuple[Any, ...]]:
        async with self._pool.connection() as connection:
            async with connection.pipeline():
                await connection.execute(_USER, [user], prepare=True)
                cursor = await connection.execute(sql, arguments, prepare=True)
            rows: list[tuple[Any, ...]] = await cursor.fetchall()
            return rows

    async def get(self, user: str, task: int) -> object:
        return _first(await self._run(user, _GET, user, task))

    async def list(self, user: str) -> Sequence[object]:
        return await self._run(user, _LIST, user)

    async def create(self, user: str, title: str) -> object:
        return _first(await self._run(user, _CREATE, user, title))

    async def create_many(self, user: str, titles: Sequence[str]) -> Sequence[object]:
        return await self._run(user, _CREATE_MANY, user, titles)

    async def update(self, user: str, task: int, title: str) -> object:
        return _first(await self._run(user, _UPDATE, title, user, task))

    async def toggle(self, user: str, task: int) -> object:
        return _first(await self._run(user, _TOGGLE, user, task))

    async def delete(self, user: str, task: int) -> object:
        return _first(await self._run(user, _DELETE, user, task))

    async def count(self, user: str) -> int:
        return int((await self._run(user, _COUNT, user))[0][0])

    def values(self, task: object) -> tuple[object, ...]:
        assert isinstance(task, tuple)
        return task


def _first(rows: list[tuple[Any, ...]]) -> object:
    return rows[0] if rows else None
