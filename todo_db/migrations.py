"""The location of Alembic's scripts, and functions to run them."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Final

from alembic import command
from alembic.config import Config
from sqlalchemy.ext.asyncio import AsyncEngine

from todo_db.engine import create_direct_engine
from todo_db.errors import ConfigurationError
from todo_db.settings import Settings

LOCK_SQL: Final = (
    # Two deployments at the same time run one after the other; the second finds nothing to do.
    "SELECT pg_advisory_xact_lock(7306001204)",
    # Give up behind a long transaction, because other statements would wait behind this lock.
    "SET LOCAL lock_timeout = '5s'",
    # A statement that takes longer would hold its locks that long. Such a migration sets its own.
    "SET LOCAL statement_timeout = '5min'",
    # The application uses this path, and the migrating role may have another one.
    "SET LOCAL search_path = public, pg_temp",
)

VERSION_TABLE: Final = "todo_db_version"
"""The last migration that ran. Alembic's own `alembic_version` may be another project's."""

# Alembic keeps its state in module globals.
_one_at_a_time: Final = Lock()

_PACKAGE: Final = Path(__file__).resolve().parent


def script_directory() -> Path:
    """Return the folder of the migrations, in the wheel or in a checkout."""
    packaged = _PACKAGE / "_alembic"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "alembic"


def alembic_config(url: str | None = None) -> Config:
    """Return Alembic's configuration. It needs no file, so it works in any folder.

    Args:
        url: The URL of the database; by default from `Settings` when a command runs.
    """
    config = Config()
    config.set_main_option("script_location", str(script_directory()).replace("%", "%%"))
    config.set_main_option("file_template", "%%(rev)s_%%(slug)s")
    config.set_main_option("revision_environment", "true")
    config.attributes["url"] = url
    return config


def direct_engine(url: str | None) -> AsyncEngine:
    """Return an engine on the direct endpoint, which migrations use.

    Raises:
        ConfigurationError: There is no URL.
    """
    settings = Settings()
    if url is None:
        secret = settings.direct_database_url or settings.database_url
        if secret is None:
            raise ConfigurationError("DATABASE_URL is not set")
        url = secret.get_secret_value()
    return create_direct_engine(url, settings)


async def upgrade(url: str, revision: str = "head") -> None:
    """Migrate a database up to a revision. Migrations that already ran are not run again.

    One transaction, under an advisory lock; it has committed when this returns. Errors of the
    database are SQLAlchemy's.
    """
    await asyncio.to_thread(_run, command.upgrade, url, revision)


async def downgrade(url: str, revision: str) -> None:
    """Migrate a database down to a revision, such as `-1` or `base`. This deletes rows."""
    await asyncio.to_thread(_run, command.downgrade, url, revision)


def _run(run: Callable[[Config, str], None], url: str, revision: str) -> None:
    with _one_at_a_time:
        run(alembic_config(url), revision)
