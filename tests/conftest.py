"""alice and bob are users, mallory attacks."""

import os
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncpg
import pytest
import pytest_asyncio
from driver import Connection
from proxy import Proxy

from todo_db import Database
from todo_db.embedded import LOGIN, OWNER, EmbeddedPostgres, folder_in_memory

pytest_plugins = ["todo_db.testing"]

# Each program that a test starts would compile all it imports again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(params=[LOGIN, OWNER])
def login(request: pytest.FixtureRequest) -> str:
    """Both ways to connect: the recommended login, and an owner that bypasses RLS, as Neon's."""
    return str(request.param)


@pytest.fixture
def url(todo_postgres: EmbeddedPostgres, todo_database_name: str, login: str) -> str:
    return todo_postgres.url(user=login, database=todo_database_name)


@pytest.fixture
def folder() -> Generator[Path]:
    """A folder that a PostgreSQL of the test's own can live in, which is not root's."""
    with TemporaryDirectory(prefix="todo-db-", dir=folder_in_memory()) as path:
        yield Path(path)


@pytest_asyncio.fixture
async def db(url: str) -> AsyncGenerator[Database]:
    """An open Database with alice and bob in it, once under each login."""
    async with Database.from_url(url) as database:
        await database.users.create("alice", email="alice@example.org", name="Alice")
        await database.users.create("bob", email="bob@example.org", name="Bob")
        yield database


@pytest_asyncio.fixture
async def owner(
    todo_postgres: EmbeddedPostgres, todo_database_name: str
) -> AsyncGenerator[Connection]:
    """The owner's own connection, which sees everything."""
    folder = todo_postgres.url(database=todo_database_name)
    connection = await asyncpg.connect(folder)
    yield connection
    await connection.close()


@pytest_asyncio.fixture
async def superuser(
    todo_postgres: EmbeddedPostgres, todo_database_name: str
) -> AsyncGenerator[Connection]:
    """Who may do in this database what its owner may not, and sees what every backend does."""
    connection = await asyncpg.connect(
        todo_postgres.url(user="postgres", database=todo_database_name)
    )
    yield connection
    await connection.close()


@pytest_asyncio.fixture
async def proxy(url: str) -> AsyncGenerator[Proxy]:
    """The server by way of a proxy that counts, cuts and hangs."""
    async with Proxy(url) as proxy:
        yield proxy
