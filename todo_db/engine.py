"""The `AsyncEngine`, its pool and its URL: the only module that knows the pooler."""

import asyncio
from typing import Any, Final, cast

import asyncpg
from sqlalchemy import URL, Connection, event, make_url, pool
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DisconnectionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.util import greenlet_spawn

from todo_db.errors import ConfigurationError, PoolExhaustedError, TodoDBError, translated
from todo_db.records import PoolStatus
from todo_db.settings import Settings

_DRIVERS: Final = frozenset({"postgres", "postgresql", "postgresql+asyncpg"})
_QUERY_KEYS: Final = frozenset({"host", "port"})


def parse_url(url: str) -> URL:
    """Return a URL that SQLAlchemy's asyncpg dialect takes, whichever name it was given.

    Raises:
        ConfigurationError: It is not a PostgreSQL URL, or has a key that means nothing here.
            Names the key, never the URL.
    """
    try:
        parsed = make_url(url.strip())
    except (ArgumentError, ValueError):
        failure = ConfigurationError("the database URL cannot be read")
    else:
        if parsed.drivername not in _DRIVERS:
            raise ConfigurationError("the database URL must begin with postgresql://")
        if unknown := sorted(parsed.query.keys() - _QUERY_KEYS):
            raise ConfigurationError(f"the database URL has unknown keys: {', '.join(unknown)}")
        return parsed.set(drivername="postgresql+asyncpg")
    raise failure


def create_direct_engine(url: str, settings: Settings) -> AsyncEngine:
    """Return an engine for migrations and tests: no pool, no role, no guards."""
    return create_async_engine(
        parse_url(url),
        poolclass=pool.NullPool,
        hide_parameters=True,
        connect_args={"timeout": settings.connect_timeout_seconds},
    )


class Lease:
    """A connection out of the pool, and the way back.

    Attributes:
        driver: asyncpg's connection, outside any transaction.
    """

    __slots__ = ("_engine", "_fairy", "driver")

    def __init__(self, engine: AsyncEngine, fairy: PoolProxiedConnection) -> None:
        self._engine = engine
        self._fairy = fairy
        self.driver = cast("asyncpg.Connection[asyncpg.Record]", fairy.driver_connection)

    def terminate(self) -> None:
        """Cut the connection, because nobody knows what state it is in. Does not wait."""
        self.driver.terminate()

    async def sqlalchemy(self) -> AsyncConnection:
        """Return SQLAlchemy's view of it, which sends no BEGIN and no COMMIT of its own."""
        sync = Connection(self._engine.sync_engine, connection=self._fairy)
        connection = AsyncConnection(self._engine, sync)
        return await connection.execution_options(isolation_level="AUTOCOMMIT")

    async def give_back(self) -> None:
        """Return it to the pool, which forgets it if it was terminated.

        Waits only to close a connection beyond the pool's size, never for a terminated one.
        """
        if self.driver.is_closed():
            if self._fairy.is_valid:
                self._fairy.invalidate()
            self._fairy.close()
        else:
            # Closing the surplus needs a greenlet to wait in.
            await greenlet_spawn(self._fairy.close)


class Pool:
    """The connections of one `Database` on one event loop.

    SQLAlchemy's queue hands a connection to whoever asks at the right moment, and starves the
    others under load. Here callers wait in the order in which they came.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.database_url is None:
            raise ConfigurationError("DATABASE_URL is not set")
        self._size = settings.pool_size + settings.max_overflow
        self._timeout = settings.pool_timeout_seconds
        self._free = asyncio.Semaphore(self._size)
        self._in_use = 0
        self._waiting = 0
        self._engine = create_async_engine(
            parse_url(settings.database_url.get_secret_value()),
            pool_size=settings.pool_size,
            max_overflow=settings.max_overflow,
            # The same few connections stay warm, and the others may age.
            pool_use_lifo=True,
            pool_recycle=1800,
            hide_parameters=True,
            connect_args=_connect_args(settings),
        )
        event.listen(self._engine.sync_engine, "checkout", _refuse_dirty)
        event.listen(self._engine.sync_engine, "checkin", _drop_dirty)

    @property
    def status(self) -> PoolStatus:
        """How many connections there may be, are lent, and are waited for."""
        return PoolStatus(self._size, self._in_use, self._waiting)

    async def acquire(self) -> Lease:
        """Lend a connection; wait for one, first come, first served.

        Raises:
            PoolExhaustedError: None became free in time.
            ConfigurationError: The URL, the login or the certificate is wrong.
            UnavailableError: The database cannot be reached.
        """
        await self._wait()
        try:
            fairy = await greenlet_spawn(self._engine.sync_engine.pool.connect)
        except Exception as error:  # noqa: BLE001  # raised again, as ours
            failure = _connect_failure(error)
        except BaseException:
            self._free.release()
            raise
        else:
            self._in_use += 1
            return Lease(self._engine, fairy)
        self._free.release()
        raise failure

    async def release(self, lease: Lease) -> None:
        """Take a connection back, and let the next one in the line have it."""
        try:
            await lease.give_back()
        finally:
            self._in_use -= 1
            self._free.release()

    async def close(self) -> None:
        """Close all connections that are not lent."""
        await self._engine.dispose()

    async def _wait(self) -> None:
        if not self._free.locked():
            await self._free.acquire()
            return
        self._waiting += 1
        try:
            async with asyncio.timeout(self._timeout):
                await self._free.acquire()
        except TimeoutError:
            failure = PoolExhaustedError()
        else:
            return
        finally:
            self._waiting -= 1
        raise failure


def _connect_args(settings: Settings) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "timeout": settings.connect_timeout_seconds,
        "command_timeout": settings.command_timeout_seconds,
        # asyncpg would prepare each statement anew every 300 s.
        "max_cached_statement_lifetime": 0,
        "server_settings": {"application_name": "todo_db"},
    }
    if not settings.prepared_statements:
        arguments |= {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
    return arguments


def _connect_failure(error: BaseException) -> TodoDBError:
    if isinstance(error, FileNotFoundError):
        return ConfigurationError("the socket folder of the URL does not exist")
    return translated(error)


def _is_dirty(dbapi_connection: DBAPIConnection) -> bool:
    driver = cast("asyncpg.Connection[Any]", dbapi_connection.driver_connection)
    return driver.is_closed() or driver.is_in_transaction()


def _refuse_dirty(
    dbapi_connection: DBAPIConnection, _entry: ConnectionPoolEntry, _fairy: PoolProxiedConnection
) -> None:
    """Second net: a connection that was closed, or is in a transaction, is not lent."""
    if _is_dirty(dbapi_connection):
        raise DisconnectionError


def _drop_dirty(dbapi_connection: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
    """Second net: a connection that is in a transaction is not kept."""
    if dbapi_connection is not None and _is_dirty(dbapi_connection):
        entry.invalidate()
