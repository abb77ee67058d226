"""A real PgBouncer in front of a server on a unix socket, configured like Neon's."""

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from tempfile import mkdtemp
from typing import Final, Self

import asyncpg
from cache import ROOT, locked
from driver import Connection
from sqlalchemy import make_url

PASSWORD: Final = "known to the tests"  # noqa: S105  # of roles that these tests make and drop
TRIXIE: Final = "trixie"
"""Has PgBouncer 1.24, as Neon has."""
BOOKWORM: Final = "bookworm"
"""Has PgBouncer 1.18, which forgets prepared statements."""
_CONSOLE: Final = "console"
_SOCKET: Final = ".s.PGSQL.5432"


def fetched(suite: str) -> Path:
    """Return the folder with PgBouncer of a Debian release; unpack it on first use."""
    with locked(f"pgbouncer-{suite}") as folder:
        subprocess.run([ROOT / ".ci" / "fetch-debian", suite, "pgbouncer", folder], check=True)
    return folder


class PgBouncer:
    """Pools by transaction, and authenticates clients with the server's SCRAM secrets.

    Listens on a unix socket in a folder of its own. Started as root it runs as the server's user,
    because it refuses root, and only that user may enter the folder of the server's socket.

    Args:
        suite: The Debian release that it comes from.
        server_url: Any URL of the server; its user reads the SCRAM secrets of other users.
        max_prepared_statements: How many prepared statements it tracks for other connections. Neon
            sets 1000, did not set it earlier, and 1.18 does not have the setting.
        default_pool_size: How many connections to the server it opens for a user of a database.
        settings: Other PgBouncer settings, by name.
    """

    def __init__(
        self,
        suite: str,
        server_url: str,
        *,
        max_prepared_statements: int | None,
        default_pool_size: int = 10,
        **settings: object,
    ) -> None:
        self.suite = suite
        self._run = fetched(suite) / "run"
        url = make_url(server_url)
        self._server = Path(str(url.query["host"]))
        self._auth_user = url.username
        prepared = (
            {}
            if max_prepared_statements is None
            # These two settings exist since 1.21 and 1.23.
            else {"max_prepared_statements": max_prepared_statements, "auth_dbname": "postgres"}
        )
        self._settings = prepared | {"default_pool_size": default_pool_size} | settings
        self._process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        # The path of pytest's own folders can be too long for a socket.
        self._folder = Path(mkdtemp(prefix="todo-"))
        self._write("users", f'"{_CONSOLE}" "{PASSWORD}"\n')
        settings = {
            "unix_socket_dir": self._folder,
            "listen_port": 5432,
            "logfile": self._folder / "log",
            "auth_type": "scram-sha-256",
            "auth_file": self._folder / "users",
            "auth_query": "SELECT usename, passwd FROM pg_catalog.pg_shadow WHERE usename = $1",
            "admin_users": _CONSOLE,
            "pool_mode": "transaction",
            "max_client_conn": 10_000,
            "query_wait_timeout": 120,
            "ignore_startup_parameters": "extra_float_digits",
        } | self._settings
        lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
        server = f"host={self._server} port=5432 auth_user={self._auth_user}"
        self._write(
            "ini",
            f"[databases]\n* = {server} application_name=pgbouncer\n[pgbouncer]\n{lines}",
        )
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._folder)

    async def start(self) -> None:
        """Start it, and wait until it answers."""
        user = () if os.geteuid() else ("-u", self._server.owner())
        if user:
            shutil.chown(self._folder, self._server.owner())
        self._process = subprocess.Popen(  # noqa: ASYNC220  # to be killed by functions too
            [self._run, "pgbouncer", "-q", *user, self._folder / "ini"],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        async with asyncio.timeout(30):
            while True:
                try:
                    await self.console("SHOW VERSION")
                except OSError:
                    assert self._process.poll() is None, (self._folder / "log").read_text()
                    await asyncio.sleep(0.01)
                else:
                    return

    def kill(self) -> None:
        """Kill it, as Neon does when it suspends a compute: clients see a closed socket."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            (self._folder / _SOCKET).unlink(missing_ok=True)

    async def terminate(self) -> None:
        """Ask it to shut down; it lets its clients finish, and accepts no new ones."""
        assert self._process is not None
        self._process.terminate()
        async with asyncio.timeout(30):
            while (self._folder / _SOCKET).exists():  # noqa: ASYNC110  # nothing sets an event
                await asyncio.sleep(0.005)

    async def console(self, command: str) -> None:
        """Run an admin command, such as PAUSE, RESUME or RECONNECT."""
        connection: Connection = await asyncpg.connect(
            host=str(self._folder), user=_CONSOLE, password=PASSWORD, database="pgbouncer"
        )
        await connection.execute(command)
        await connection.close()

    def url(self, user: str, database: str, *, password: str = PASSWORD) -> str:
        return (
            make_url(f"postgresql:///{database}")
            .set(username=user, password=password, query={"host": str(self._folder)})
            .render_as_string(hide_password=False)
        )

    def _write(self, name: str, content: str) -> None:
        path = self._folder / name
        path.write_text(content)
        # PgBouncer reads the file again, after it has dropped root.
        path.chmod(0o644)
