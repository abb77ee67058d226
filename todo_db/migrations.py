"""The location of Alembic's scripts, and functions to run them."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Final

from alembic import command
from alembic.config import Config

from todo_db.environment import AT, configure
from todo_db.errors import ConfigurationError

__all__ = [
    "alembic_config",
    "alembic_file",
    "configure",
    "downgrade",
    "script_directory",
    "upgrade",
]

# Alembic keeps its state in module globals.
_one_at_a_time: Final = Lock()

_PACKAGE: Final = Path(__file__).resolve().parent


def script_directory() -> Path:
    """Return the folder of the migrations, in the wheel or in a checkout."""
    packaged = _PACKAGE / "_alembic"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "alembic"


def alembic_config(url: str | Callable[[], str] | None = None) -> Config:
    """Return Alembic's configuration. It needs no file, so it works in any folder.

    Args:
        url: The URL of the database, or a function that returns it, called only for a command that
            connects; by default from `Settings` when a command runs.
    """
    config = Config()
    config.set_main_option("script_location", str(script_directory()).replace("%", "%%"))
    config.set_main_option("file_template", "%%(rev)s_%%(slug)s")
    config.set_main_option("revision_environment", "true")
    config.attributes["url"] = url
    return config


def alembic_file(path: Path) -> Config:
    """Return the Alembic configuration of an application, from its `pyproject.toml` or its `.ini`.

    Raises:
        ConfigurationError: There is no such file.
    """
    if not path.is_file():
        raise ConfigurationError("there is no file with the Alembic settings of the application")
    return Config(toml_file=path) if path.suffix == ".toml" else Config(path)


async def upgrade(url: str, revision: str = "head", *, config: Config | None = None) -> str:
    """Migrate a database up to a revision. Migrations that already ran are not run again.

    One transaction, under an advisory lock; it has committed when this returns. Errors of the
    database are SQLAlchemy's.

    Args:
        url: The database, as its owner; the direct endpoint is used.
        revision: Where to stop.
        config: Of an application's own migrations; by default those of todo_db.

    Returns:
        The revision that the database is at, which may be a later one.

    Raises:
        CallTimeoutError: Another migration was running for 60 seconds.
    """
    return await asyncio.to_thread(_run, command.upgrade, config or alembic_config(), url, revision)


async def downgrade(url: str, revision: str) -> None:
    """Migrate a database down to a revision, such as `-1` or `base`. This deletes rows."""
    await asyncio.to_thread(_run, command.downgrade, alembic_config(), url, revision)


def _run(run: Callable[[Config, str], None], config: Config, url: str, revision: str) -> str:
    with _one_at_a_time:
        config.attributes["url"] = url
        run(config, revision)
    return str(config.attributes[AT])
