"""The connections: who makes them, who keeps them, and who has one."""

import asyncio
import logging
import re
import time
from collections.abc import Coroutine
from pathlib import Path
from secrets import token_hex
from typing import Any, Final, cast

import asyncpg
import stamina
from sqlalchemy import URL, Connection, NullPool
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import greenlet_spawn

from todo_db.engine.url import parse_url
from todo_db.errors import (
    ConfigurationError,
    PoolExhaustedError,
    TodoDBError,
    UnavailableError,
    translated,
)
from todo_db.records import PoolStatus
from todo_db.settings import Settings

_RECYCLE_SECONDS: Final = 1800.0
_CLOSE_SECONDS: Final = 2.0
_CANCEL_SECONDS: Final = 2.0
# A peer that vanished without a word is found out by asking. A timer would ask more often, and
# keep Neon's compute awake.
_PING_AFTER_SECONDS: Final = 60.0
_PING_SECONDS: Final = 2.0
# PgBouncer has one SQLSTATE, 08P01, for whatever it refuses; these will pass.
_TRANSIENT_POOLER_MESSAGES: Final = re.compile(
    "no more connections allowed|server login has been failing|query_wait_timeout"
    "|cannot connect to server|shutting down|bouncer config error"
)
# What asyncpg says, by an error that has no other sign, when a server has no TLS.
_NO_TLS: Final = "rejected SSL upgrade"

_LOGGER: Final = "todo_db"
_logger: Final = logging.getLogger(_LOGGER)

# SQLAlchemy's own loggers write SQL, rows and the server's messages. These are only ours, so the
# level that an application sets for its own engines does not reach them.
for _name in ("sqlalchemy.engine.Engine", "sqlalchemy.pool.impl.NullPool"):
    logging.getLogger(f"{_name}.{_LOGGER}").setLevel(logging.WARNING)


def create_direct_engine(url: str, settings: Settings) -> AsyncEngine:
    """Return an engine for migrations and tests: no pooler, no pool, no role, no guards."""
    endpoint = parse_url(url).direct()
    return create_async_engine(
        endpoint.url,
        poolclass=NullPool,
        hide_parameters=True,
        logging_name=_LOGGER,
        pool_logging_name=_LOGGER,
        connect_args={"timeout": settings.connect_timeout_seconds} | endpoint.connect_args(),
    )


class PooledConnection:
    """A connection of the pool, lent to one unit of work at a time.

    Attributes:
        driver: asyncpg's connection, outside any transaction.
    """

    __slots__ = ("_engine", "_fairy", "_opened", "_pool", "_terminated", "_used", "driver")

    def __init__(self, pool: "Pool", engine: AsyncEngine, fairy: PoolProxiedConnection) -> None:
        self._pool = pool
        self._engine = engine
        self._fairy = fairy
        self._terminated = False
        self._opened = self._used = time.monotonic()
        self.driver = cast("asyncpg.Connection[asyncpg.Record]", fairy.driver_connection)

    @property
    def is_reusable(self) -> bool:
        """Whether it is connected and outside any transaction, as far as the client knows."""
        return not (self._terminated or self.driver.is_closed() or self.driver.is_in_transaction())

    @property
    def is_expired(self) -> bool:
        """Whether it has served long enough."""
        return time.monotonic() - self._opened > _RECYCLE_SECONDS

    @property
    def needs_ping(self) -> bool:
        """Whether nobody has used it for so long that its peer may be gone unnoticed."""
        return time.monotonic() - self._used > _PING_AFTER_SECONDS

    def touch(self) -> None:
        """Note that nobody uses it from now on."""
        self._used = time.monotonic()

    async def ping(self) -> bool:
        """Ask the server for a sign of life: one round trip."""
        try:
            await self.driver.execute("SELECT 1", timeout=_PING_SECONDS)
        except Exception as error:  # noqa: BLE001  # whatever it is, it did not answer
            _logger.info("an idle connection was gone: %s", type(error).__name__)
            return False
        return True

    @property
    def transport(self) -> asyncio.BaseTransport:
        """The line to the server, to be judged by what it is."""
        return cast("asyncio.BaseTransport", cast("Any", self.driver)._transport)  # noqa: SLF001  # the driver has no other way

    @property
    def statement_suffix(self) -> str:
        """What has to stand behind every statement; see `invalidate_statements`."""
        return self._pool.statement_suffix

    def invalidate_statements(self) -> None:
        """Have every statement prepared anew, on all connections, under another text.

        After a change of the schema a prepared statement fails, or worse, is read by its old
        description. PgBouncer keeps one for each text, for good, and nobody on Neon can make it
        forget; so the text has to change.
        """
        self._pool.statement_suffix = f" /* {token_hex(4)} */"

    def terminate(self) -> None:
        """Cut the connection, because nobody knows what state it is in. Does not wait.

        If the driver is about to tell the server that a statement was given up, that is let
        happen first, in the background: the server would go on with it, and hold its locks, and a
        pooler passes the word on only as long as the connection is there.
        """
        if self._terminated:
            return
        self._terminated = True
        if telling := set(cast("Any", self.driver)._cancellations):  # noqa: SLF001  # the driver has no other way
            self._pool.recover_later(self._recover(telling))
        else:
            self._discard()

    async def _recover(self, telling: set[asyncio.Task[None]]) -> None:
        try:
            await asyncio.wait(telling, timeout=_CANCEL_SECONDS)
        finally:
            self._discard()

    def _discard(self) -> None:
        self.driver.terminate()
        if self._fairy.is_valid:
            self._fairy.invalidate()
        self._fairy.close()

    async def close(self) -> None:
        """Say goodbye to the server, and drop the connection."""
        try:
            await self.driver.close(timeout=_CLOSE_SECONDS)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            _logger.info("a connection broke while it was closed: %s", type(error).__name__)
        finally:
            self.terminate()

    def sqlalchemy(self) -> AsyncConnection:
        """Return SQLAlchemy's view of it, which sends no BEGIN and no COMMIT of its own."""
        sync = Connection(self._engine.sync_engine, connection=self._fairy)
        return AsyncConnection(self._engine, sync)


class Pool:
    """The connections of one `Database` on one event loop.

    The engine makes them, and they are kept here. SQLAlchemy's own queue hands a connection to
    whoever asks at the right moment, which starves others under load, and enters a greenlet on
    both ways, which costs more than the driver's own work
    (`docs/decisions/0001-own-pool.md`). Here callers wait in the order in which they came, and
    the connection that was used last is used next, so that few stay warm and the others rest.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.database_url is None:
            raise ConfigurationError("DATABASE_URL is not set")
        endpoint = parse_url(settings.database_url.get_secret_value())
        self._engine = create_async_engine(
            endpoint.url,
            poolclass=NullPool,
            # Transactions are ours. Said once for the engine: said for a connection, it would be
            # undone and said again, and remembered each time.
            isolation_level="AUTOCOMMIT",
            hide_parameters=True,
            logging_name=_LOGGER,
            pool_logging_name=_LOGGER,
            connect_args=_connect_args(settings) | endpoint.connect_args(),
        )
        self._max_idle = settings.pool_size
        self._size = settings.pool_size + settings.max_overflow
        self._timeout = settings.pool_timeout_seconds
        self._connect_seconds = settings.connect_retry_seconds
        self._retries = settings.retry_attempts > 1 and settings.connect_retry_seconds > 0
        self._free = asyncio.Semaphore(self._size)
        self._idle: list[PooledConnection] = []
        self._in_use = 0
        self._waiting = 0
        self._recovering: set[asyncio.Task[None]] = set()
        self._open = True
        self._closing = asyncio.Lock()
        self.statement_suffix = ""

    @property
    def status(self) -> PoolStatus:
        """How many connections there may be, are lent, and are waited for."""
        return PoolStatus(self._size, self._in_use, self._waiting)

    async def acquire(self) -> PooledConnection:
        """Lend a connection; wait for one, first come, first served.

        A connection that has to be made is tried for until `connect_retry_seconds` are over;
        nothing of the caller's has been sent by then, so that is always safe.

        Raises:
            PoolExhaustedError: None became free in time.
            ConfigurationError: The URL, the login or the certificate is wrong. Raised at once.
            UnavailableError: The database cannot be reached. Not worth trying again soon.
        """
        await self._wait()
        try:
            connection = await self._last_used() or await self._connect()
        except BaseException:
            self._free.release()
            raise
        self._in_use += 1
        return connection

    async def release(self, connection: PooledConnection) -> None:
        """Take a connection back, and let the next one in the line have it.

        Waits only to close a sound connection that is not kept.
        """
        self._in_use -= 1
        try:
            if not connection.is_reusable:
                connection.terminate()
            elif self._open and len(self._idle) < self._max_idle and not connection.is_expired:
                connection.touch()
                self._idle.append(connection)
            else:
                await connection.close()
        finally:
            self._free.release()

    def recover_later(self, cut: Coroutine[Any, Any, None]) -> None:
        """Run what cuts a connection, which is no longer counted; `close` waits for it."""
        task = asyncio.get_running_loop().create_task(cut)
        self._recovering.add(task)
        task.add_done_callback(self._recovering.discard)

    async def close(self) -> None:
        """Close all connections, once they are back, for good.

        Waits for those that are lent as long as a caller waits for one. What comes back later
        is closed then.
        """
        async with self._closing:
            taken = 0
            try:
                async with asyncio.timeout(self._timeout):
                    while taken < self._size:
                        await self._free.acquire()
                        taken += 1
            except TimeoutError:
                _logger.warning("closed while %d connections were in use", self._in_use)
            finally:
                for _ in range(taken):
                    self._free.release()
                self._open = False
                idle, self._idle = self._idle, []
                try:
                    await asyncio.gather(
                        *(connection.close() for connection in idle), *self._recovering
                    )
                finally:
                    for connection in idle:
                        connection.terminate()

    async def _last_used(self) -> PooledConnection | None:
        while self._idle:
            connection = self._idle.pop()
            # The server may have closed it meanwhile; asking the client costs no round trip.
            if not connection.is_reusable or connection.is_expired:
                connection.terminate()
                continue
            try:
                if not connection.needs_ping or await connection.ping():
                    return connection
            except BaseException:
                connection.terminate()
                raise
            # The others rested even longer: whatever took this one took them.
            gone, self._idle = [connection, *self._idle], []
            for lost in gone:
                lost.terminate()
        return None

    async def _connect(self) -> PooledConnection:
        if not self._retries:
            return await self._connect_once()
        # Whoever asked for the connection need not try for as long again: it is not transient.
        failure = UnavailableError("the database did not answer in time")

        def should_retry(error: Exception) -> bool:
            nonlocal failure
            if not isinstance(error, UnavailableError):
                return False
            failure = UnavailableError(str(error))
            return True

        try:
            async with asyncio.timeout(self._connect_seconds):
                async for attempt in stamina.retry_context(  # pragma: no branch  # endless
                    on=should_retry,
                    attempts=None,
                    timeout=None,
                    wait_initial=0.05,
                    wait_max=2.0,
                    wait_jitter=0.1,
                ):
                    with attempt:
                        # One may have come back meanwhile.
                        return await self._last_used() or await self._connect_once()
        except TimeoutError:
            pass
        raise failure

    async def _connect_once(self) -> PooledConnection:
        try:
            # SQLAlchemy asks its questions about the server on the first one.
            fairy = await greenlet_spawn(self._engine.sync_engine.pool.connect)
        except Exception as error:  # noqa: BLE001  # raised again, as ours
            failure = _connect_failure(error, self._engine.url)
        else:
            return PooledConnection(self, self._engine, fairy)
        raise failure

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
    }
    if not settings.prepared_statements:
        arguments |= {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
    return arguments


def _connect_failure(error: BaseException, url: URL) -> TodoDBError:
    # While a server restarts, its socket is gone and the folder is not.
    folder = url.query.get("host")
    if isinstance(error, FileNotFoundError) and not Path(str(folder)).is_dir():
        return ConfigurationError("the socket folder of the URL does not exist")
    refusal = error.__cause__ or error
    if isinstance(
        refusal, asyncpg.ProtocolViolationError
    ) and not _TRANSIENT_POOLER_MESSAGES.search(str(refusal)):
        return ConfigurationError("the pooler refused the login, or a startup parameter")
    if isinstance(error, ConnectionError) and _NO_TLS in str(error):
        return ConfigurationError("the server has no TLS, and the database URL demands it")
    if isinstance(error, TimeoutError):
        return UnavailableError("the database did not answer in time", transient=True)
    return translated(error)
