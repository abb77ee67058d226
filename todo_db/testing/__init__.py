"""A pytest plugin: a real PostgreSQL, a fresh copy of a database for every test, and proofs.

Put `pytest_plugins = ["todo_db.testing"]` into the topmost `conftest.py` (extra `testing`), and use
the fixture `database`: an open `Database`, connected with the recommended kind of login. Tests
really commit. A transaction that is rolled back around each test would be faster, but its user id
would hide code that forgets to set one.
"""

import asyncio
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import pytest
import pytest_asyncio

from todo_db.database import Database
from todo_db.embedded import LOGIN, EmbeddedPostgres, folder_in_memory
from todo_db.migrations import alembic_file, upgrade
from todo_db.testing.fenced import assert_fenced
from todo_db.testing.isolated import assert_isolated
from todo_db.testing.trips import RoundTrips, count_round_trips

__all__ = ["RoundTrips", "assert_fenced", "assert_isolated", "count_round_trips"]

_TEMPLATE: Final = "todo_template"
_numbers: Final = count(1)


@pytest.fixture(scope="session")
def todo_migrations() -> Path | None:
    """The Alembic settings of the application's own migrations: none; override it in `conftest.py`.

    ```python
    @pytest.fixture(scope="session")
    def todo_migrations() -> Path:
        return Path(__file__).parent.parent / "pyproject.toml"
    ```
    """
    return None


@pytest.fixture(scope="session")
def todo_postgres(todo_migrations: Path | None) -> Generator[EmbeddedPostgres]:
    """The server of this test run, with a migrated database as a template."""
    with (
        # Only root can enter pytest's own folders, and PostgreSQL does not run as root.
        TemporaryDirectory(prefix="todo-db-", dir=folder_in_memory()) as folder,
        EmbeddedPostgres(Path(folder) / "postgres", durable=False) as server,
    ):
        server.create_database(_TEMPLATE)
        # In another thread, because an event loop may be running in this one.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, _migrate(server, todo_migrations)).result()
        server.create_login()
        yield server


async def _migrate(server: EmbeddedPostgres, migrations: Path | None) -> None:
    url = server.url(database=_TEMPLATE)
    await upgrade(url)
    if migrations is not None:  # pragma: no cover  # test_installed: models change all of a process
        await upgrade(url, config=alembic_file(migrations))


@pytest.fixture
def todo_database_name(todo_postgres: EmbeddedPostgres) -> Generator[str]:
    """The name of a fresh copy of the migrated database."""
    name = f"todo_test_{next(_numbers)}"
    todo_postgres.create_database(name, template=_TEMPLATE)
    yield name
    todo_postgres.drop_database(name)


@pytest.fixture
def todo_database_url(todo_postgres: EmbeddedPostgres, todo_database_name: str) -> str:
    """The URL of a fresh copy, for the recommended login: for anyio, unittest, other programs."""
    return todo_postgres.url(user=LOGIN, database=todo_database_name)


@pytest_asyncio.fixture
async def database(todo_database_url: str) -> AsyncGenerator[Database]:
    """An open `Database` on a fresh copy, for tests that pytest-asyncio runs."""
    async with Database.from_url(todo_database_url) as opened:
        yield opened
