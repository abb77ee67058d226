"""The schema: where Alembic's scripts are, and how they are run."""

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
    # Two deploys at once run one after the other; the second finds nothing left to do.
    "SELECT pg_advisory_xact_lock(7306001204)",
    # Behind a long transaction, rather give up than make everybody queue behind us.
    "SET LOCAL lock_timeout = '5s'",
    # Where the application looks, whatever the migrating role's own schema is.
    "SET LOCAL search_path = public, pg_temp",
)

# Alembic keeps what it is doing in module globals.
_one_at_a_time: Final = Lock()

_PACKAGE: Final = Path(__file__).resolve().parent


def script_directory() -> Path:
    """Return the folder of the migrations: in the wheel, or in a checkout."""
    packaged = _PACKAGE / "_alembic"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "alembic"


def alembic_config(url: str | None = None) -> Config:
    """Return Alembic's configuration without a file, so that it works in any folder.

    Args:
        url: The database; by default what `Settings` says at the time of the run.
    """
    config = Config()
    config.set_main_option("script_location", str(script_directory()).replace("%", "%%"))
    config.set_main_option("file_template", "%%(rev)s_%%(slug)s")
    config.set_main_option("revision_environment", "true")
    config.attributes["url"] = url
    return config


def direct_engine(url: str | None) -> AsyncEngine:
    """Return an engine on the endpoint for migrations.

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
    """Migrate a database up to a revision; what is there already stays.

    One transaction, behind a lock. Errors of the database are SQLAlchemy's.
    """
    await asyncio.to_thread(_run, command.upgrade, url, revision)


async def downgrade(url: str, revision: str) -> None:
    """Migrate a database down to a revision, such as `-1` or `base`; rows are lost."""
    await asyncio.to_thread(_run, command.downgrade, url, revision)


def _run(run: Callable[[Config, str], None], url: str, revision: str) -> None:
    with _one_at_a_time:
        run(alembic_config(url), revision)
