"""asyncpg's connection and SQLAlchemy's dialect, changed in the few places where todo_db must.

Every private name of the two libraries that this package overrides or reads stands in this file,
with the reason; `test_driver.py` fails when a new version of either no longer has it.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import count
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final, Never, Protocol, cast, override

import asyncpg
from asyncpg.protocol import NO_TIMEOUT
from sqlalchemy import Connection, Engine
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.engine.interfaces import AdaptedConnection, DBAPICursor, ExecutionContext
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import PoolProxiedConnection

from todo_db.errors import TransactionError

DRIVERNAME: Final = "postgresql+todo_db"
"""The name under which SQLAlchemy finds `Dialect`."""

STALE_STATEMENT: Final = (
    asyncpg.InvalidCachedStatementError,
    asyncpg.InvalidSQLStatementNameError,
)
"""The schema changed under a prepared statement, or the server has lost it: it was not run."""
STALE_ROWS: Final = (asyncpg.OutdatedSchemaCacheError, BufferError)
"""The rows cannot be read as they were described. By then the statement was run."""

_NOT_YOURS: Final = (
    "the transaction of todo_db begins and ends with its block: it is committed there, or rolled "
    "back if the block raises an error; to undo a part of it, use savepoint()"
)


class Gate(Protocol):
    """Decides what SQLAlchemy may send on a connection, and learns what became of it."""

    def send(self, text: str, run: Callable[[str], object], *, is_batch: bool = False) -> None:
        """Call `run` with the text to send, or raise an error of the tree."""
        ...

    async def receive[T](self, call: Callable[[], Awaitable[T]]) -> T:
        """Await what `call` returns, as a part of a statement that was sent before."""
        ...

    def abort(self) -> None:
        """Note that SQLAlchemy takes its transaction for rolled back: commit nothing of it."""
        ...

    async def open_savepoint(self, name: str) -> None:
        """Send SAVEPOINT."""
        ...

    async def release_savepoint(self, name: str) -> None:
        """Send RELEASE SAVEPOINT."""
        ...

    async def undo_savepoint(self, name: str) -> None:
        """Send ROLLBACK TO SAVEPOINT."""
        ...


# The last bytes of every answer: ReadyForQuery, and the state of the session.
_ANSWERED: Final = re.compile(rb"Z\0\0\0\x05[ITE]\Z")
_observers: Final[list[Callable[[], None]]] = []


@contextmanager
def observe_answers(note: Callable[[], None]) -> Generator[None]:
    """Call `note` at the end of every answer of a server, on all connections of this process."""
    _observers.append(note)
    try:
        yield
    finally:
        _observers.remove(note)


# 57P01, 57P03 and 57P05, fatal: the server ended or refused the session, before it committed. That
# is the end of what it sent, and only a pooler's own error follows: a row may hold the same bytes.
_ERROR: Final = rb"E\0\0..(?:[A-Za-z][^\0]*\0)+\0"
_SERVER_ENDED_IT: Final = re.compile(
    rb"E\0\0..S[^\0]*\0VFATAL\0C57P0[135]\0(?:[A-Za-z][^\0]*\0)+\0(?:%b)?\Z" % _ERROR, re.DOTALL
)
_LONGEST_ERROR: Final = 512


class _Listener(asyncio.Protocol):
    """Passes on what comes from the socket, and keeps the end of it.

    PgBouncer passes the server's last error on and adds its own, of which asyncpg keeps only the
    second.
    """

    __slots__ = ("_before", "_is_encrypted", "_last", "_protocol", "is_refused")

    def __init__(self, protocol: asyncio.Protocol, *, is_encrypted: bool) -> None:
        self._protocol = protocol
        self._is_encrypted = is_encrypted
        self._before = self._last = b""
        self.is_refused = False

    @override
    def data_received(self, data: bytes) -> None:
        self._before, self._last = self._last, data[-_LONGEST_ERROR:]
        if _observers and _ANSWERED.search((self._before + self._last)[-6:]):
            for note in _observers:
                note()
        self._protocol.data_received(data)

    @override
    def eof_received(self) -> bool | None:
        return self._protocol.eof_received()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        # The socket was closed before it took all of the statement. With TLS it may instead have
        # been a message of TLS itself that it did not take.
        is_unsent = isinstance(exc, BrokenPipeError) and not self._is_encrypted
        was_ended = _SERVER_ENDED_IT.search(self._before + self._last) is not None
        self.is_refused = is_unsent or was_ended
        self._protocol.connection_lost(exc)

    @override
    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    @override
    def resume_writing(self) -> None:
        self._protocol.resume_writing()


if TYPE_CHECKING:
    _Connection = asyncpg.Connection[asyncpg.Record]
else:
    _Connection = asyncpg.Connection


class NamedConnection(_Connection):
    """asyncpg's connection, with names of prepared statements that no other connection has.

    asyncpg numbers them from 0 in each process. Behind a pooler that does not track prepared
    statements, the statement of another process with the same number would run instead.

    Attributes:
        statement_prefix: What the name of each of its prepared statements begins with.
    """

    __slots__ = ("_listener", "_numbers", "statement_prefix")

    def __init__(self, *arguments: Any, **keywords: Any) -> None:  # noqa: ANN401  # asyncpg's own
        super().__init__(*arguments, **keywords)
        protocol: asyncio.Protocol = arguments[0]
        socket: asyncio.Transport = arguments[1]
        is_encrypted = socket.get_extra_info("ssl_object") is not None
        self._listener = _Listener(protocol, is_encrypted=is_encrypted)
        socket.set_protocol(self._listener)
        self.statement_prefix: Final = f"__todo_db_{token_hex(8)}_"
        self._numbers = count(1)

    @property
    def is_refused(self) -> bool:
        """Whether it was lost before its last statement can have been committed."""
        return self._listener.is_refused

    def _get_unique_id(self, prefix: str) -> str:
        # The name of asyncpg's own queries about types and of its cursors, too: no public option
        # of asyncpg reaches those.
        return f"{self.statement_prefix}{prefix}_{next(self._numbers):x}"


class TransactionConnection(Connection):
    """SQLAlchemy's connection inside a transaction that todo_db begins and ends.

    Attributes:
        gate: What its statements go through.
    """

    def __init__(self, engine: Engine, proxied: PoolProxiedConnection, gate: Gate) -> None:
        super().__init__(engine, connection=proxied)
        self.gate: Final = gate
        # Sends nothing. A session that finds a transaction does not take it for its own, and
        # SQLAlchemy itself refuses another begin() and another isolation level.
        self.begin()

    def _refuse(self, exception: BaseException | None = None) -> Never:  # noqa: ARG002  # SQLAlchemy's
        raise TransactionError(_NOT_YOURS)

    # An invalidated one would connect again, outside the transaction and as the login.
    commit = rollback = close = detach = invalidate = get_transaction = _refuse


class TransactionAsyncConnection(AsyncConnection):
    """The same for asyncio: it does not give asyncpg's connection away, which knows no gate."""

    @override
    async def get_raw_connection(self) -> Never:
        raise TransactionError("asyncpg's connection would send past the checks of the transaction")


class _Stream:
    """asyncpg's cursor, of which every fetch goes through the gate."""

    def __init__(self, cursor: Any, gate: Gate) -> None:  # noqa: ANN401  # asyncpg does not export it
        self._cursor = cursor
        self._gate = gate

    async def fetch(self, rows: int) -> list[asyncpg.Record]:
        return await self._gate.receive(lambda: self._cursor.fetch(rows))


class Dialect(PGDialect_asyncpg):
    """SQLAlchemy's dialect for asyncpg, which asks the server nothing and sends through a `Gate`.

    Its own questions (version, schema, isolation level, escapes) cost ten round trips on the first
    connection of a process; asyncpg has learnt the answers while it connected.
    """

    supports_statement_cache = True

    @override
    def _get_server_version_info(self, connection: Connection) -> tuple[int, int]:
        version = _driver(connection).get_server_version()
        # asyncpg reports version 18.4 as 18.0.4.
        return version.major, version.micro

    @override
    def _get_default_schema_name(self, connection: Connection) -> str:
        return "public"

    @override
    def get_isolation_level(self, dbapi_connection: object) -> Any:
        return "READ COMMITTED"

    @override
    def _set_backslash_escapes(self, connection: Connection) -> None:
        settings = _driver(connection).get_settings()
        self._backslash_escapes = settings.standard_conforming_strings == "off"

    @override
    def do_execute(
        self,
        cursor: DBAPICursor,
        statement: str,
        parameters: Any,
        context: ExecutionContext | None = None,
    ) -> None:
        gate = _gate(context)
        gate.send(
            statement,
            lambda text: cursor.execute(text, parameters),
            is_batch=context is not None and context.executemany,
        )
        adapted = cast("Any", cursor)
        if adapted.server_side:
            adapted._cursor = _Stream(adapted._cursor, gate)  # noqa: SLF001  # the only way in

    @override
    def do_execute_no_params(
        self,
        cursor: DBAPICursor,
        statement: str,
        context: ExecutionContext | None = None,
    ) -> None:
        _gate(context).send(statement, cursor.execute)

    @override
    def do_executemany(
        self,
        cursor: DBAPICursor,
        statement: str,
        parameters: Any,
        context: ExecutionContext | None = None,
    ) -> None:
        _gate(context).send(
            statement, lambda text: cursor.executemany(text, parameters), is_batch=True
        )

    @override
    def do_savepoint(self, connection: Connection, name: str) -> None:
        _run_async(connection, _gate_of(connection).open_savepoint, name)

    @override
    def do_release_savepoint(self, connection: Connection, name: str) -> None:
        _run_async(connection, _gate_of(connection).release_savepoint, name)

    @override
    def do_rollback_to_savepoint(self, connection: Connection, name: str) -> None:
        _run_async(connection, _gate_of(connection).undo_savepoint, name)


async def fetch_unwatched(
    driver: NamedConnection, sql: str, values: Sequence[object]
) -> list[asyncpg.Record]:
    """Run a statement as `driver.fetch` does, without its layers and without its timer.

    They take a quarter of the client's time of a call. The caller has to watch the time.
    """
    connection: Any = driver
    statement = await connection._get_statement(sql, None)  # noqa: SLF001  # the public ones have both
    execute: Callable[..., Awaitable[list[asyncpg.Record]]] = connection._protocol.bind_execute  # noqa: SLF001
    try:
        return await execute(statement, values, "", 0, False, NO_TIMEOUT)  # noqa: FBT003  # asyncpg's order
    except asyncpg.InvalidCachedStatementError:
        # The server did not run it. asyncpg prepares it again.
        return await driver.fetch(sql, *values)
    except asyncpg.OutdatedSchemaCacheError:
        await driver.reload_schema_state()
        raise


def transport(driver: NamedConnection) -> asyncio.BaseTransport:
    """Return the socket's transport: the only place that says whether TLS is in use, and which."""
    return cast("asyncio.BaseTransport", cast("Any", driver)._transport)  # noqa: SLF001  # asyncpg has no public name for it


def _driver(connection: Connection) -> NamedConnection:
    return cast("NamedConnection", connection.connection.driver_connection)


def _gate(context: ExecutionContext | None) -> Gate:
    return _gate_of(None if context is None else context.root_connection)


def _gate_of(connection: Connection | None) -> Gate:
    if not isinstance(connection, TransactionConnection):
        raise TransactionError("a statement can only be sent inside a transaction of todo_db")
    return connection.gate


def _run_async(connection: Connection, method: Callable[[str], Awaitable[None]], name: str) -> None:
    adapted = cast("AdaptedConnection", connection.connection.dbapi_connection)
    adapted.run_async(lambda _driver: method(name))


registry.register("postgresql.todo_db", __name__, Dialect.__name__)
