"""The PostgreSQL of a run: started from its wheel, migrated by our migrations, and seeded."""

import asyncio
import tempfile
from pathlib import Path
from typing import Final, Self

import asyncpg
from seed import SEED

from todo_db import Settings
from todo_db.embedded import OWNER, EmbeddedPostgres, folder_in_memory
from todo_db.logins import create_login
from todo_db.migrations import upgrade

APPLICATION: Final = "todo_application"
_CLEAN: Final = "DELETE FROM tasks WHERE id > {}"


class Server:
    """A server in memory if there is room, which does not wait for a disk; a context manager.

    The tasks of all users are interleaved, as they are where users work at the same time.
    """

    def __init__(self, *, users: int, tasks: int) -> None:
        self.users: Final = users
        self.tasks: Final = tasks
        self._folder = tempfile.TemporaryDirectory(prefix="bench-", dir=folder_in_memory())
        self._postgres = EmbeddedPostgres(Path(self._folder.name) / "postgres", durable=False)

    def __enter__(self) -> Self:
        self._postgres.start()
        asyncio.run(self._prepare())
        return self

    def __exit__(self, *_: object) -> None:
        self._postgres.stop()
        self._folder.cleanup()

    def url(self, login: str) -> str:
        """Return the URL of the application's login, the owner's, or of another role."""
        names = {"application": APPLICATION, "owner": OWNER}
        return self._postgres.url(user=names.get(login, login))

    async def _prepare(self) -> None:
        await upgrade(self.url("owner"))
        await create_login(self.url("owner"), Settings(), APPLICATION)
        await self.execute("ALTER TABLE tasks SET (autovacuum_enabled = false)")
        await self.seed(self.users, self.tasks)

    async def seed(self, users: int, tasks: int) -> None:
        """Replace all rows."""
        await self.execute(SEED.format(users=users, tasks=tasks))
        await self.execute("VACUUM (ANALYZE) tasks")
        await self.execute("CHECKPOINT")

    async def clean(self) -> None:
        """Remove what a contestant stored, so that the next one finds the same table."""
        await self.execute(_CLEAN.format(self.tasks))
        await self.execute("VACUUM (ANALYZE) tasks")

    async def execute(self, sql: str) -> None:
        """Run SQL as a superuser."""
        await self._value(sql, execute=True)

    async def version(self) -> str:
        """Return PostgreSQL's version."""
        return str(await self._value("SHOW server_version")).split()[0]

    async def wal(self) -> int:
        """Return how many bytes of the write-ahead log were written so far."""
        return int(str(await self._value("SELECT pg_current_wal_insert_lsn() - '0/0'")))

    async def _value(self, sql: str, *, execute: bool = False) -> object:
        connection = await asyncpg.connect(self.url("postgres"))
        try:
            if execute:
                return await connection.execute(sql)
            return await connection.fetchval(sql)
        finally:
            await connection.close()
