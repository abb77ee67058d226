"""A pytest plugin: a real PostgreSQL, migrated once, and a fresh copy of it for every test.

Say `pytest_plugins = ["todo_db.testing"]` in the topmost `conftest.py` (extra `testing`), and
ask for `database`: an open `Database` under the login that production should have. Tests commit
for real. A transaction that is rolled back around each test would be cheaper, but its user id
would outlive the code that forgot to set one, and hide it.
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
from todo_db.migrations import upgrade

_TEMPLATE: Final = "todo_template"
_numbers: Final = count(1)


@pytest.fixture(scope="session")
def todo_postgres() -> Generator[EmbeddedPostgres]:
    """A server of this test run, with a migrated database to copy."""
    with (
        # Not pytest's own: its start closes that to all but root, which a server cannot be.
        TemporaryDirectory(prefix="todo-db-", dir=folder_in_memory()) as folder,
        EmbeddedPostgres(Path(folder) / "postgres", durable=False) as server,
    ):
        server.create_database(_TEMPLATE)
        # A thread of its own, because the loop of the tests may be running in this one.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, upgrade(server.url(database=_TEMPLATE))).result()
        server.create_login()
        yield server


@pytest.fixture
def todo_database_name(todo_postgres: EmbeddedPostgres) -> Generator[str]:
    """The name of a fresh copy of the migrated database."""
    name = f"todo_test_{next(_numbers)}"
    todo_postgres.create_database(name, template=_TEMPLATE)
    yield name
    todo_postgres.drop_database(name)


@pytest_asyncio.fixture
async def database(
    todo_postgres: EmbeddedPostgres, todo_database_name: str
) -> AsyncGenerator[Database]:
    """An open `Database` on a fresh copy."""
    url = todo_postgres.url(user=LOGIN, database=todo_database_name)
    async with Database.from_url(url) as opened:
        yield opened
