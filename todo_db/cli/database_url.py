"""Which database a command works on: the one of the settings, or an embedded one that it says."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console

from todo_db.embedded import EmbeddedPostgres
from todo_db.settings import Settings

FOLDER: Final = Path(".todo-db")


@contextmanager
def database_url(messages: Console, *, direct: bool = False) -> Generator[str]:
    """Lend the URL of a running database.

    Without `DATABASE_URL` that is a PostgreSQL in `.todo-db/`, which runs as long as a command
    needs it.

    Args:
        messages: Where to say so.
        direct: Whether a migration asks, which goes by `DIRECT_DATABASE_URL` if there is one.
    """
    settings = Settings()
    url = (settings.direct_database_url if direct else None) or settings.database_url
    if url is not None:
        yield url.get_secret_value()
        return
    messages.print(f"DATABASE_URL is not set: using the embedded PostgreSQL in {FOLDER}/")
    with EmbeddedPostgres(FOLDER) as server:
        yield server.url()
