"""One connection of the pool: how it is made, and whether it can be used again."""

import logging
import re
import time
from os.path import isdir
from secrets import SystemRandom
from typing import Any, Final, Literal, cast

import asyncpg
from sqlalchemy import URL, NullPool, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import PoolProxiedConnection

from todo_db.engine.driver import (
    DRIVERNAME,
    Gate,
    NamedConnection,
    TransactionAsyncConnection,
    TransactionConnection,
)
from todo_db.engine.url import Endpoint, parse_url
from todo_db.errors import ConfigurationError, TodoDBError, UnavailableError, translated
from todo_db.settings import Settings

_EXPIRES_AFTER_SECONDS: Final = 1800.0
# A peer that disappeared without closing its socket is found by a ping. A timer would ping more
# often, and keep Neon's compute awake.
_PING_AFTER_SECONDS: Final = 60.0
_PING_SECONDS: Final = 2.0
_RECOVER_SECONDS: Final = 2.0
_CLOSE_SECONDS: Final = 2.0

# Failures that pass, told from others only by their text: PgBouncer has one SQLSTATE, 08P01, for
# all it refuses, and Neon's proxy has XX000 for a compute that did not start.
_TRANSIENT_MESSAGES: Final = re.compile(
    "no more connections allowed|server login has been failing|query_wait_timeout"
    "|cannot connect to server|shutting down|bouncer config error|server conn crashed"
    "|server connection closed|invalid server parameter"
    "|Couldn't connect to compute node|Control plane request failed"
)
# What asyncpg says of every answer to its request for TLS that is not one of PostgreSQL's, and of
# PostgreSQL's No, in an error that has no other sign of it.
_NO_TLS: Final = "rejected SSL upgrade"

# Outside every transaction: a ROLLBACK undoes none of it.
_RESET_ALWAYS: Final = "SELECT pg_catalog.pg_advisory_unlock_all();DISCARD SEQUENCES"
# Deferred constraints first, while the role and the user are still those of the transaction.
_RESET_COMMITTED: Final = "SET CONSTRAINTS ALL IMMEDIATE;CLOSE ALL;UNLISTEN *;DISCARD TEMP"
_random: Final = SystemRandom()

_LOGGER: Final = "todo_db"
_logger: Final = logging.getLogger(__name__)

# SQLAlchemy's own loggers write SQL, rows and the server's messages. The names below are only
# ours, so that an application that turns on the log of its own engines does not turn on these.
for _name in ("sqlalchemy.engine.Engine", "sqlalchemy.pool.impl.NullPool"):
    logging.getLogger(f"{_name}.{_LOGGER}").setLevel(logging.WARNING)

_ENGINE_OPTIONS: Final[dict[str, Any]] = {
    "poolclass": NullPool,
    "hide_parameters": True,
    "logging_name": _LOGGER,
    "pool_logging_name": _LOGGER,
}


def create_direct_engine(url: str, settings: Settings) -> AsyncEngine:
    """Return an engine for migrations and tests: no pooler, no pool, no role, no gate."""
    endpoint = parse_url(url).direct()
    arguments = {"timeout": settings.connect_timeout_seconds} | endpoint.connect_args()
    return create_async_engine(endpoint.url, connect_args=arguments, **_ENGINE_OPTIONS)


async def execute_unlogged(connection: AsyncConnection, sql: str) -> None:
    """Send a statement that has a secret in its text past SQLAlchemy, which would log it.

    Something else must have been sent before: that began the transaction.
    """
    raw = await connection.get_raw_connection()
    await cast("NamedConnection", raw.driver_connection).execute(sql)


def create_pool_engine(
    endpoint: Endpoint, settings: Settings, *, prepared_statements: bool
) -> AsyncEngine:
    """Return the engine that makes the connections of a pool."""
    arguments: dict[str, Any] = {
        "connection_class": NamedConnection,
        "timeout": settings.connect_timeout_seconds,
        "command_timeout": settings.command_timeout_seconds,
        # asyncpg would prepare each statement anew every 300 s.
        "max_cached_statement_lifetime": 0,
    }
    if not prepared_statements:
        arguments |= {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
    engine = create_async_engine(
        endpoint.url.set(drivername=DRIVERNAME),
        # The transactions are ours: SQLAlchemy sends no BEGIN, COMMIT or ROLLBACK.
        isolation_level="AUTOCOMMIT",
        connect_args=arguments | endpoint.connect_args(),
        **_ENGINE_OPTIONS,
    )
    event.listen(engine.sync_engine, "handle_error", _keep_connection)
    return engine


def _keep_connection(context: ExceptionContext) -> None:
    """Leave it to the pool whether a connection can be used again, after a cancellation too."""
    context.is_disconnect = False


class PooledConnection:
    """A connection of a pool, used by one transaction at a time.

    Attributes:
        driver: asyncpg's connection, outside any transaction when the pool hands it out.
        is_state_known: False after a cancelled or timed-out statement; the pool then recovers it.
        has_transaction: Whether its last statement was inside a transaction.
        has_own_sql: Whether a caller's own SQL ran on it since it was last reset.
        generation: Which of the pool's engines made it.
        is_late: Whether its statement was cancelled by its deadline.
        cancellations: How often the caller's task had been cancelled when its statement began.
    """

    __slots__ = (
        "_engine",
        "_opened",
        "_proxied",
        "_used",
        "cancellations",
        "driver",
        "generation",
        "has_own_sql",
        "has_transaction",
        "is_late",
        "is_state_known",
    )

    def __init__(
        self, engine: AsyncEngine, proxied: PoolProxiedConnection, generation: int
    ) -> None:
        self._engine = engine
        self._proxied = proxied
        self._opened = self._used = time.monotonic()
        self.driver = cast("NamedConnection", proxied.driver_connection)
        # SQLAlchemy's pool would otherwise close it when the garbage collector finds it, on an
        # event loop that may have ended.
        proxied.detach()
        self.generation: Final = generation
        self.is_state_known = True
        self.has_own_sql = False
        self.has_transaction = False
        self.is_late = False
        self.cancellations = 0

    @classmethod
    async def connect(cls, engine: AsyncEngine, generation: int) -> "PooledConnection":
        """Connect and log in.

        Raises:
            ConfigurationError: The URL, the login or the certificate is wrong.
            UnavailableError: The server cannot be reached now.
        """
        try:
            proxied = await engine.raw_connection()
        except Exception as error:  # noqa: BLE001  # raised again, as ours
            failure = connect_failure(error, engine.url)
        else:
            return cls(engine, proxied, generation)
        raise failure

    @property
    def is_reusable(self) -> bool:
        """Whether it is connected and outside any transaction, as far as the client knows."""
        return (
            self.is_state_known
            and not self.driver.is_closed()
            and not self.driver.is_in_transaction()
        )

    @property
    def is_expired(self) -> bool:
        """Whether it has been open for half an hour."""
        return time.monotonic() - self._opened > _EXPIRES_AFTER_SECONDS

    @property
    def is_fresh(self) -> bool:
        """Whether it can be used as it is: it is connected, and was not idle or open for long.

        The peer of one that was idle for long may have disappeared.
        """
        now = time.monotonic()
        return (
            now - self._used <= _PING_AFTER_SECONDS
            and now - self._opened <= _EXPIRES_AFTER_SECONDS
            and self.is_reusable
        )

    def touch(self) -> None:
        """Note that it becomes idle now."""
        self._used = time.monotonic()

    async def ping(self, timeout_seconds: float = _PING_SECONDS) -> None:
        """Send a statement that does nothing: one round trip.

        Raises:
            UnavailableError: There was no answer.
        """
        try:
            await self.driver.execute("SELECT 1", timeout=timeout_seconds)
        except Exception as error:  # noqa: BLE001  # raised again, as ours
            failure = connect_failure(error)
        else:
            return
        raise failure

    def ending(self, command: Literal["COMMIT", "ROLLBACK"]) -> str:
        """Return the message that ends a transaction, with the session as it was before.

        What a caller's SQL can leave on a session by calling functions has to be undone in the same
        message: behind a pooler the next one may go to another server connection. DISCARD ALL
        would do it, and may not run in a transaction.
        """
        if not self.has_own_sql:
            return command
        # The seed of random() is in no transaction, and RESET ALL does not reset it.
        seed = f"SET seed = {_random.uniform(-1, 1):f}"
        if command == "ROLLBACK":
            return f"ROLLBACK;{_RESET_ALWAYS};{seed}"
        return f"{_RESET_COMMITTED};{_RESET_ALWAYS};{seed};RESET ROLE;RESET ALL;COMMIT"

    async def recover(self) -> None:
        """End the transaction of a statement that was cancelled or timed out.

        asyncpg first waits for its own CancelRequest, within the same 2 s.
        """
        # A ROLLBACK without a transaction would write a warning to the log of the server.
        in_transaction = self.has_transaction or self.driver.is_in_transaction()
        sql = self.ending("ROLLBACK") if in_transaction else "SELECT 1"
        await self.driver.execute(sql, timeout=_RECOVER_SECONDS)
        self.is_state_known = True
        self.has_own_sql = False

    def terminate(self) -> None:
        """Close the socket without telling the server. Does not wait."""
        try:
            self.driver.terminate()
        except RuntimeError:
            # The event loop of the connection is closed: the socket goes with its transport.
            _logger.debug(
                "a connection outlived its event loop",
                extra={"event": "todo_db.connection.orphaned"},
            )

    async def close(self) -> None:
        """Send Terminate, and close the socket."""
        try:
            await self.driver.close(timeout=_CLOSE_SECONDS)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            _logger.info(
                "a connection broke while it was closed: %s",
                type(error).__name__,
                extra={"event": "todo_db.connection.broke", "reason": type(error).__name__},
            )
        finally:
            self.terminate()

    def sqlalchemy(self, gate: Gate) -> AsyncConnection:
        """Return SQLAlchemy's view of it, which sends only what `gate` lets pass."""
        connection = TransactionConnection(self._engine.sync_engine, self._proxied, gate)
        return TransactionAsyncConnection(self._engine, connection)


def connect_failure(error: BaseException, url: URL | None = None) -> TodoDBError:
    """Return what a failure before the first statement of a transaction means.

    That is while connecting to `url`, or after the login, at a BEGIN behind a pooler that logs
    clients in without a server.
    """
    # While a server restarts, its socket is gone and the folder is not.
    folders = "" if url is None else str(url.query.get("host", ""))
    if isinstance(error, FileNotFoundError) and not any(map(isdir, folders.split(","))):
        return ConfigurationError("the socket folder of the URL does not exist")
    if isinstance(error, ConnectionError) and _NO_TLS in str(error):
        return ConfigurationError(
            "what answers has no TLS, or is no PostgreSQL: check the host, the port and sslmode of"
            " the database URL"
        )
    if isinstance(error, TimeoutError):
        return UnavailableError("the database did not answer in time", transient=True)
    refusal = error.__cause__ or error
    # During a failover no server of the URL has the wanted role.
    is_failover = isinstance(error, asyncpg.TargetServerAttributeNotMatched)
    if is_failover or _TRANSIENT_MESSAGES.search(str(refusal)):
        return UnavailableError("the database or its pooler is not ready", transient=True)
    if url is not None and isinstance(refusal, asyncpg.ProtocolViolationError):
        return ConfigurationError("the pooler refused the login, or a startup parameter")
    return translated(error)
