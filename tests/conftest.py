"""Shared fixtures. alice and bob are users, mallory is an attacker."""

import gc
import os
import signal
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import override

import asyncpg
import pytest
import pytest_asyncio
from cluster import OTHER_VERSIONS, SINGLE, embeddable
from driver import Connection
from hypothesis import HealthCheck, settings
from pgbouncer import BOOKWORM, PASSWORD, TRIXIE, PgBouncer
from proxy import Proxy

from todo_db import Database, Settings, embedded
from todo_db.embedded import LOGIN, OWNER, EmbeddedPostgres, folder_in_memory
from todo_db.logins import create_login

pytest_plugins = ["todo_db.testing"]

# Without a cache, each program that a test starts would compile its imports again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# A shell ignores Ctrl-C for what it starts in the background; programs of tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The same examples in every run. How long one takes says more of the machine than of the package.
settings.register_profile(
    "any machine",
    database=None,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("any machine")


@pytest.fixture(params=[LOGIN, OWNER])
def login(request: pytest.FixtureRequest) -> str:
    """The two kinds of login: the recommended one, and an owner with BYPASSRLS, as on Neon."""
    return str(request.param)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pooler",
        choices=(TRIXIE, BOOKWORM),
        help="Run what asks for a URL through the PgBouncer of this Debian release.",
    )
    parser.addoption(
        "--postgres",
        type=int,
        choices=OTHER_VERSIONS,
        help="Run what asks for a URL on this version of PostgreSQL.",
    )
    parser.addoption(
        "--one-trip",
        action="store_true",
        help="Run single calls under the recommended login in one round trip, not in three.",
    )


class _ReachableDirectory(TemporaryDirectory[str]):
    """A folder that other users can enter: PostgreSQL 15 returns to its folder by a path."""

    @override
    def __enter__(self) -> str:
        Path(self.name).chmod(0o711)
        return super().__enter__()


def pytest_configure(config: pytest.Config) -> None:
    version = config.getoption("postgres")
    if version is not None:
        patch = pytest.MonkeyPatch()
        patch.setattr(embedded, "_PROGRAMS", embeddable(version))
        patch.setattr("todo_db.testing.TemporaryDirectory", _ReachableDirectory)


def pytest_collection_finish() -> None:
    """Leave the collected tests out of garbage collections: else each takes 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def todo_postgres(
    request: pytest.FixtureRequest, todo_postgres: EmbeddedPostgres
) -> EmbeddedPostgres:
    """The plugin's server; without `--one-trip` its login has no timeouts of its own.

    Most tests are about the transaction of a single call. `test_one_trip` is about the other form.
    """
    # PgBouncer runs as the server's user, and has to get to its folder by a path.
    todo_postgres.log.parent.parent.chmod(0o711)
    if not request.config.getoption("one_trip"):
        todo_postgres._psql(f"ALTER ROLE {LOGIN} RESET ALL")
    return todo_postgres


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


@pytest_asyncio.fixture
async def single_url(todo_postgres: EmbeddedPostgres, todo_database_name: str) -> str:
    """The URL of a login that `todo-db login` made: its calls take one round trip."""
    await create_login(todo_postgres.url(database=todo_database_name), Settings(), SINGLE)
    return todo_postgres.url(user=SINGLE, database=todo_database_name)


@pytest.fixture
def folder() -> Generator[Path]:
    """A folder for a PostgreSQL of the test's own, which does not run as root."""
    with TemporaryDirectory(prefix="todo-db-", dir=folder_in_memory()) as path:
        yield Path(path)


@pytest_asyncio.fixture
async def db(url: str) -> AsyncGenerator[Database]:
    """An open Database with alice and bob in it, once with each login."""
    async with Database.from_url(url) as database:
        await database.users.create("alice", email="alice@example.org", name="Alice")
        await database.users.create("bob", email="bob@example.org", name="Bob")
        yield database


@pytest_asyncio.fixture
async def owner(
    todo_postgres: EmbeddedPostgres, todo_database_name: str
) -> AsyncGenerator[Connection]:
    """A connection of the owner, which sees every row."""
    folder = todo_postgres.url(database=todo_database_name)
    connection = await asyncpg.connect(folder)
    yield connection
    await connection.close()


@pytest_asyncio.fixture
async def superuser(
    todo_postgres: EmbeddedPostgres, todo_database_name: str
) -> AsyncGenerator[Connection]:
    """A superuser's connection, which may do what the owner may not, and sees all backends."""
    connection = await asyncpg.connect(
        todo_postgres.url(user="postgres", database=todo_database_name)
    )
    yield connection
    await connection.close()


@pytest_asyncio.fixture
async def proxy(url: str) -> AsyncGenerator[Proxy]:
    """A proxy to the server that counts round trips, cuts connections and hangs."""
    async with Proxy(url) as proxy:
        yield proxy


@pytest_asyncio.fixture
async def database_through_proxy(db: Database, proxy: Proxy) -> AsyncGenerator[Database]:
    """A Database with alice and bob, through the proxy, with a pool of one connection."""
    assert (await db.users.get("alice")).id == "alice"
    async with Database.from_url(proxy.url, pool_size=1, max_overflow=0) as database:
        yield database


@pytest_asyncio.fixture
async def database_without_retries(db: Database, proxy: Proxy) -> AsyncGenerator[Database]:
    """The same, with every call tried once."""
    assert (await db.users.get("alice")).id == "alice"
    async with Database.from_url(
        proxy.url, pool_size=1, max_overflow=0, retry_attempts=1
    ) as database:
        yield database
