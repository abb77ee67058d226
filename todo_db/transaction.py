"""One transaction is one user's: its BEGIN carries who that is, and its COMMIT's answer is read."""

import logging
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Literal, cast

import asyncpg
from sqlalchemy import Executable, Result, TextClause, TextualSelect
from sqlalchemy.exc import CompileError, DBAPIError, StatementError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import ExecutableDDLElement

from todo_db.engine import Pool, PooledConnection
from todo_db.errors import (
    ConcurrentUseError,
    ConfigurationError,
    IsolationError,
    OutcomeUnknownError,
    SchemaError,
    TodoDBError,
    TransactionAbortedError,
    TransactionError,
    UnavailableError,
    connection_lost,
    translated,
)
from todo_db.repositories import Operation, TaskRepository, UserRepository
from todo_db.repositories.statements import Row
from todo_db.settings import Settings

ROLE: Final = "todo_app"
NO_USER: Final = ""
"""The user id of the package's own transactions: no row belongs to it."""

# What a caller's own SQL may begin with. Anything else could end the transaction, and with it
# the role and the user id, or leave something on the connection for its next user.
_ALLOWED: Final = re.compile(
    r"[\s(]*(delete|explain|insert|merge|select|show|table|update|values|with)\b", re.IGNORECASE
)
# What such SQL can leave behind all the same, by calling functions; undone in the message that
# ends the transaction, because behind a pooler the next message may go to another server.
_RELEASE_ADVISORY_LOCKS: Final = "SELECT pg_catalog.pg_advisory_unlock_all()"
_RESET_SESSION: Final = f"{_RELEASE_ADVISORY_LOCKS};RESET ALL;"
_ROLLBACK_SECONDS: Final = 2.0
# The schema changed under a prepared statement, or somebody deallocated it.
_STALE_STATEMENT_ERRORS: Final = (
    asyncpg.InvalidCachedStatementError,
    asyncpg.InvalidSQLStatementNameError,
    asyncpg.OutdatedSchemaCacheError,
    BufferError,
)

_logger: Final = logging.getLogger("todo_db")

type _State = Literal["open", "aborted", "broken", "ended"]


class TransactionPreamble:
    """What every BEGIN of a database carries, written once."""

    def __init__(self, settings: Settings) -> None:
        timeouts = {
            "statement_timeout": settings.statement_timeout_seconds,
            "lock_timeout": settings.lock_timeout_seconds,
            "idle_in_transaction_session_timeout": settings.idle_in_transaction_timeout_seconds,
        }
        self._rest = "".join(
            f"SET LOCAL {name} = {max(1, round(seconds * 1000))};"
            for name, seconds in timeouts.items()
        )

    def begin(self, user_id: str, *, read_only: bool) -> str:
        """Return one message: BEGIN, role, search path, timeouts and user id.

        The id goes in as hexadecimal digits, so there is nothing to escape.
        """
        access = "READ ONLY" if read_only else "READ WRITE"
        return (
            f"BEGIN ISOLATION LEVEL READ COMMITTED, {access};SET LOCAL ROLE {ROLE};"
            f"SET LOCAL search_path = public, pg_temp;{self._rest}"
            "SELECT pg_catalog.set_config('todo_db.user_id', pg_catalog.convert_from("
            f"pg_catalog.decode('{user_id.encode().hex()}', 'hex'), 'UTF8'), true)"
        )


class Transaction:
    """One user's unit of work on one connection; get it from `Database.transaction`.

    It belongs to one task at a time. Nothing is stored before the block ends without an error.

    Attributes:
        user_id: Whose transaction this is.
        tasks: The user's tasks, in this transaction.
        users: The user's own row, in this transaction.
    """

    def __init__(self, connection: PooledConnection, user_id: str) -> None:
        self.user_id: Final = user_id
        self.tasks: Final = TaskRepository(self)
        self.users: Final = UserRepository(self)
        self._connection = connection
        self._driver = connection.driver
        self._state: _State = "open"
        self._busy = False
        self._savepoints = 0
        self._sqlalchemy: AsyncConnection | None = None

    async def perform[T](self, user_id: str, operation: Operation[T]) -> T:
        """Run a repository's call: one round trip, or three where it may fail.

        Raises:
            IsolationError: `user_id` is not this transaction's.
            TransactionAbortedError: An earlier statement failed.
            ConcurrentUseError: Another task uses this transaction right now.
        """
        if user_id != self.user_id:
            raise IsolationError("the transaction belongs to another user")
        if not operation.needs_savepoint:
            return operation.map_rows(await self._run(operation, user_id))
        async with self.savepoint():
            rows = await self._run(operation, user_id)
        return operation.map_rows(rows)

    async def execute(
        self, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> Result[Any]:
        """Run a statement of the caller's own, by SQLAlchemy, in this transaction.

        One round trip, under the same user, role and fence as everything else. Its values must
        be parameters: text put together from input can become any user. Errors of the statement
        are SQLAlchemy's.

        Raises:
            TransactionError: It is DDL, or text that does not begin with SELECT, INSERT, UPDATE,
                DELETE, MERGE, WITH, VALUES, TABLE, EXPLAIN or SHOW.
            TransactionAbortedError: An earlier statement failed.
            ConcurrentUseError: Another task uses this transaction right now.
        """
        text = statement.element if isinstance(statement, TextualSelect) else statement
        if isinstance(text, ExecutableDDLElement) or (
            isinstance(text, TextClause) and not _ALLOWED.match(text.text)
        ):
            raise TransactionError(
                "a statement may only read or write rows, and begins with the word that says so"
            )
        self._enter()
        try:
            if self._sqlalchemy is None:
                self._sqlalchemy = self._connection.sqlalchemy()
            return await self._sqlalchemy.execute(statement, parameters)
        except (CompileError, StatementError) as error:
            # A value that is missing or of the wrong type: nothing was sent.
            if isinstance(error, DBAPIError):
                self._fail(error)
            raise
        except Exception as error:
            self._fail(error)
            raise
        except BaseException:
            self._state = "broken"
            raise
        finally:
            self._busy = False

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[None]:
        """Undo what the block did, and nothing else, when it ends with an error.

        Two round trips. The error goes on to the caller, and the transaction can go on too.
        """
        self._savepoints += 1
        name = f"todo_db_{self._savepoints}"
        await self._control(f"SAVEPOINT {name}")
        try:
            yield
            if self._state == "aborted":
                # The block swallowed the error that undid its work.
                raise TransactionAbortedError  # noqa: TRY301  # undone below like any other
        except BaseException:
            if self._busy:
                # Another task's statement is under way: the block cannot be undone alone.
                self._state = "broken"
            elif self._state in {"open", "aborted"}:
                self._state = "open"
                await self._control(f"ROLLBACK TO SAVEPOINT {name};RELEASE SAVEPOINT {name}")
            raise
        await self._control(f"RELEASE SAVEPOINT {name}")

    async def ask(self, sql: str, *arguments: object) -> Row:
        """Return the one row of a statement of the package's own, which names no user."""
        return (await self._fetch(sql, *arguments))[0]

    async def _run(self, operation: Operation[Any], user_id: str) -> Sequence[Row]:
        statement = operation.statement
        return await self._fetch(statement.sql, *statement.arguments(user_id, operation.values))

    async def _fetch(self, sql: str, *arguments: object) -> Sequence[Row]:
        self._enter()
        try:
            return await self._driver.fetch(f"{sql}{self._connection.statement_suffix}", *arguments)
        except Exception as error:  # noqa: BLE001  # raised again, as ours
            failure = self._failed(error)
        except BaseException:
            self._state = "broken"
            raise
        finally:
            self._busy = False
        raise failure

    async def _control(self, sql: str) -> None:
        self._enter()
        try:
            await self._driver.execute(sql)
        except Exception as error:  # noqa: BLE001  # raised again, as ours
            failure = self._failed(error)
        except BaseException:
            self._state = "broken"
            raise
        else:
            return
        finally:
            self._busy = False
        raise failure

    def _enter(self) -> None:
        """Let one task in, if there is a transaction that carries its context."""
        if self._busy:
            # Whatever the other task does now, half of the caller's work will be missing.
            self._state = "broken"
            raise ConcurrentUseError
        if self._state == "ended":
            raise TransactionError("the transaction has ended")
        if self._state != "open":
            raise TransactionAbortedError
        if self._driver.is_closed():
            self._state = "broken"
            raise connection_lost()
        if not self._driver.is_in_transaction():
            self._state = "broken"
            raise IsolationError("the transaction was ended behind its back")
        self._busy = True

    def _failed(self, error: Exception) -> TodoDBError:
        self._fail(error)
        if isinstance(error, _STALE_STATEMENT_ERRORS):
            self._connection.invalidate_statements()
            return UnavailableError("a prepared statement was out of date", transient=True)
        failure = translated(error)
        if self._driver.is_closed() and not isinstance(failure, UnavailableError):
            return connection_lost()
        return failure

    def _fail(self, error: Exception) -> None:
        # After a server's verdict the transaction is aborted, and known to be. After anything
        # else (a timeout, a broken protocol) the connection may still be in the middle of it.
        known = _is_server_error(error) and self._driver.is_in_transaction()
        if self._state == "open":
            self._state = "aborted" if known and not self._driver.is_closed() else "broken"

    async def end(self, *, commit: bool, read_only: bool) -> None:
        """End the transaction, or cut its connection if it cannot be known to have ended.

        Raises:
            TransactionAbortedError: It should have been committed, and was not.
            UnavailableError: The connection was lost before the COMMIT.
            OutcomeUnknownError: The connection was lost during the COMMIT.
        """
        state, self._state = self._state, "ended"
        if state == "broken" or self._busy:
            self._connection.terminate()
            if commit:
                raise TransactionAbortedError
        elif state == "aborted" or not commit:
            await self._rollback()
            if commit:
                raise TransactionAbortedError
        else:
            await self._commit(read_only=read_only)

    async def _rollback(self) -> None:
        try:
            await self._driver.execute(
                f"ROLLBACK;{_RELEASE_ADVISORY_LOCKS}" if self._sqlalchemy else "ROLLBACK",
                timeout=_ROLLBACK_SECONDS,
            )
        except Exception as error:  # noqa: BLE001  # nothing was applied either way
            self._connection.terminate()
            _logger.warning("a connection broke while it rolled back: %s", type(error).__name__)
        except BaseException:
            self._connection.terminate()
            raise

    async def _commit(self, *, read_only: bool) -> None:
        failure: TodoDBError
        if self._driver.is_closed():
            failure = connection_lost()
        elif not self._driver.is_in_transaction():
            failure = IsolationError("the transaction was ended behind its back")
            read_only = False
        else:
            try:
                tag = await self._driver.execute(
                    f"{_RESET_SESSION}COMMIT" if self._sqlalchemy else "COMMIT"
                )
            except Exception as error:  # noqa: BLE001  # raised again, as ours
                failure = self._commit_failure(error)
            except BaseException:
                self._connection.terminate()
                raise
            else:
                if tag == "COMMIT":
                    return
                # The server takes a COMMIT of an aborted transaction, and rolls it back.
                raise TransactionAbortedError
        self._connection.terminate()
        if not read_only:
            raise failure
        _logger.warning("a connection broke after its last row was read")

    def _commit_failure(self, error: Exception) -> TodoDBError:
        if _is_server_error(error) and not self._driver.is_closed():
            return translated(error)
        return OutcomeUnknownError()


class TransactionScope:
    """One transaction, from the BEGIN to the answer of its COMMIT.

    Entering takes a connection and one round trip, leaving takes another one. A connection goes
    back to the pool only when the answer was read; else it is cut first.
    """

    __slots__ = ("_connection", "_pool", "_preamble", "_read_only", "_transaction", "_user_id")

    _connection: PooledConnection

    def __init__(
        self, pool: Pool, preamble: TransactionPreamble, user_id: str, *, read_only: bool
    ) -> None:
        self._pool = pool
        self._preamble = preamble
        self._user_id = user_id
        self._read_only = read_only
        self._transaction: Transaction | None = None

    async def begin(self) -> Transaction:
        """Take a connection, and send BEGIN with the context; to be tried again if it fails.

        Raises:
            SchemaError: The database has no role `todo_app`: it is not migrated.
            ConfigurationError: The login may not become that role.
            UnavailableError: No connection, or it broke.
        """
        connection = await self._pool.acquire()
        begin = self._preamble.begin(self._user_id, read_only=self._read_only)
        try:
            await connection.driver.execute(begin)
        except Exception as error:  # noqa: BLE001  # raised again, as ours
            failure = _begin_failure(error)
        except BaseException:
            connection.terminate()
            await self._pool.release(connection)
            raise
        else:
            self._connection = connection
            self._transaction = Transaction(connection, self._user_id)
            return self._transaction
        connection.terminate()
        await self._pool.release(connection)
        raise failure

    async def __aenter__(self) -> Transaction:
        """Begin, unless that was done before."""
        return self._transaction or await self.begin()

    async def __aexit__(
        self, _kind: object, error: BaseException | None, _traceback: object
    ) -> None:
        """Send COMMIT, or ROLLBACK after an error, and give the connection back."""
        try:
            await cast("Transaction", self._transaction).end(
                commit=error is None, read_only=self._read_only
            )
        finally:
            await self._pool.release(self._connection)


def _begin_failure(error: Exception) -> TodoDBError:
    match getattr(error, "sqlstate", None):
        case "0A000":
            # Before it is promoted, a standby only reads.
            return UnavailableError("the database cannot be written to", retry_after=5.0)
        case "22023":
            return SchemaError()
        case "42501":
            return ConfigurationError(f"the login is not a member of {ROLE}: GRANT {ROLE} TO it")
        case _:
            failure = translated(error)
            # Whatever broke, nothing of the caller's had been sent.
            broken = type(failure) is TodoDBError and not _is_server_error(error)
            return connection_lost() if broken else failure


def _is_server_error(error: BaseException) -> bool:
    """Return whether the server answered, and lived on to take the next message."""
    for cause in (error, getattr(error, "orig", None), getattr(error, "__cause__", None)):
        sqlstate = getattr(cause, "sqlstate", None)
        if isinstance(sqlstate, str):
            return not sqlstate.startswith(("08", "57P"))
    return False
