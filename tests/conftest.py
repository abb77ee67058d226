"""alice and bob are users, mallory attacks."""

import os
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncpg
import pytest
import pytest_asyncio
from driver import Connection
from pgbouncer import BOOKWORM, PASSWORD, TRIXIE, PgBouncer
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pooler",
        choices=(TRIXIE, BOOKWORM),
        help="Run what asks for a URL through the PgBouncer of this Debian release.",
    )


@pytest_asyncio.fixture(scope="session")
async def pooler(
    request: pytest.FixtureRequest, todo_postgres: EmbeddedPostgres
) -> AsyncGenerator[PgBouncer | None]:
    suite = request.config.getoption("pooler")
    if suite is None:
        yield None
        return
    todo_postgres._psql(f"ALTER ROLE {LOGIN} PASSWORD '{PASSWORD}'")
    todo_postgres._psql(f"ALTER ROLE {OWNER} PASSWORD '{PASSWORD}'")
    server = todo_postgres.url(user="postgres", database="postgres")
    prepared = None if suite == BOOKWORM else 1000
    async with PgBouncer(suite, server, max_prepared_statements=prepared) as started:
        yield started


@pytest.fixture
def url(
    todo_postgres: EmbeddedPostgres,
    todo_database_name: str,
    login: str,
    pooler: PgBouncer | None,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    if pooler is None:
        return todo_postgres.url(user=login, database=todo_database_name)
    if pooler.suite == BOOKWORM:
        monkeypatch.setenv("TODO_DB_PREPARED_STATEMENTS", "false")
    return pooler.url(login, todo_database_name)


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


@pytest_asyncio.fixture
async def database_through_proxy(db: Database, proxy: Proxy) -> AsyncGenerator[Database]:
    """alice's and bob's database by way of the proxy, on one connection."""
    assert (await db.users.get("alice")).id == "alice"
    async with Database.from_url(proxy.url, pool_size=1, max_overflow=0) as database:
        yield database
