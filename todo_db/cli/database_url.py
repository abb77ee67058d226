"""The database that a command uses: the one in the settings, or the embedded one."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console

from todo_db.embedded import EmbeddedPostgres
from todo_db.engine import parse_url
from todo_db.errors import ConfigurationError
from todo_db.server import socket_folder
from todo_db.settings import Settings

FOLDER: Final = Path(".todo-db")


@contextmanager
def database_url(messages: Console, *, direct: bool = False) -> Generator[str]:
    """Yield the URL of a running database.

    Without `DATABASE_URL`, or if it names it, this is the embedded PostgreSQL in `.todo-db/`. It
    runs until the last command that uses it ends.

    Args:
        messages: Prints that the embedded PostgreSQL is used.
        direct: Whether to prefer `DIRECT_DATABASE_URL`, as migrations do.

    Raises:
        ConfigurationError: Only `DIRECT_DATABASE_URL` is set, and `direct` is false.
    """
    settings = Settings()
    url = (settings.direct_database_url if direct else None) or settings.database_url
    if url is None and settings.direct_database_url is not None:
        raise ConfigurationError(
            "only DIRECT_DATABASE_URL is set, which is for migrations: set DATABASE_URL too"
        )
    if url is None:
        messages.print(f"DATABASE_URL is not set: using the embedded PostgreSQL in {FOLDER}/")
        with EmbeddedPostgres(FOLDER) as server:
            yield server.url()
    elif is_embedded(url.get_secret_value()):
        with EmbeddedPostgres(FOLDER):
            yield url.get_secret_value()
    else:
        yield url.get_secret_value()


def is_embedded(url: str) -> bool:
    """Whether this URL names the embedded PostgreSQL of this folder, such as one in `.env`."""
    return parse_url(url).hosts == (str(socket_folder(FOLDER.resolve())),)
