"""What is sent in one transaction, and in which state the transaction is.

A transaction is always in one of four states; `NEXT` says what leads from one to another.

```
event                    open        aborted     broken      ended
a statement failed       aborted     aborted     broken      ended
a savepoint was undone   open        open        broken      ended
its state is unknown     broken      broken      broken      ended
its block ended          ended       ended       ended       ended
```

- open: statements run.
- aborted: no statement runs until a savepoint is undone, or ROLLBACK.
- broken: a statement was cancelled or timed out, the connection was lost, or two tasks used the
  transaction. What the server has done is not known, so only its end is possible: the pool recovers
  or closes the connection, and nothing is committed.
- ended: COMMIT or ROLLBACK was sent.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from functools import cached_property
from typing import Final

import asyncpg
from sqlalchemy.exc import MissingGreenlet
from sqlalchemy.ext.asyncio import AsyncConnection

from todo_db.calls import Call
from todo_db.engine import STALE_ROWS, STALE_STATEMENT, Pool, PooledConnection
from todo_db.errors import (
    ConcurrentUseError,
    InvalidInputError,
    IsolationError,
    OutcomeUnknownError,
    TodoDBError,
    TransactionAbortedError,
    TransactionError,
    UnavailableError,
    connection_lost,
    is_server_error,
    translated,
    translated_if_known,
)
from todo_db.repositories.statements import Row
from todo_db.session import TransactionSession

# What a caller's own SQL may begin with. Anything else could end the transaction, and with it
# the role and the user id, or leave something on the connection for its next user.
_ALLOWED: Final = re.compile(
    r"[\s(]*(delete|explain|insert|merge|select|show|table|update|values|with)\b", re.IGNORECASE
)
# What UTF-8 and the protocol cannot carry. The server would close the connection.
_UNSENDABLE: Final = re.compile("[\x00\ud800-\udfff]")
_ROLLBACK_SECONDS: Final = 2.0

_logger: Final = logging.getLogger(__name__)


class State(Enum):
    """What the next statement of a transaction would meet; see the table above."""

    OPEN = auto()
    ABORTED = auto()
    BROKEN = auto()
    ENDED = auto()


class Event(Enum):
    """What changes the state of a transaction."""

    STATEMENT_FAILED = auto()
    SAVEPOINT_UNDONE = auto()
    STATE_UNKNOWN = auto()
    BLOCK_ENDED = auto()


# What is not listed leaves the state as it is.
NEXT: Final = {
    (State.OPEN, Event.STATEMENT_FAILED): State.ABORTED,
    (State.ABORTED, Event.SAVEPOINT_UNDONE): State.OPEN,
    (State.OPEN, Event.STATE_UNKNOWN): State.BROKEN,
    (State.ABORTED, Event.STATE_UNKNOWN): State.BROKEN,
    (State.OPEN, Event.BLOCK_ENDED): State.ENDED,
    (State.ABORTED, Event.BLOCK_ENDED): State.ENDED,
    (State.BROKEN, Event.BLOCK_ENDED): State.ENDED,
}


class TransactionGate:
    """The gate of one open transaction: the repositories, SQLAlchemy and its end all pass it.

    It implements `engine.Gate`, so that SQLAlchemy can send nothing else.

    Attributes:
        connection: What the transaction runs on.
        driver: asyncpg's connection.
        state: In which state it is.
        savepoints: Those that are open: the name, and the task that opened it.
        session: The ORM session on it, if there is one.
        call: What counts its statements, if it is observed.
    """

    def __init__(self, connection: PooledConnection, pool: Pool, call: Call | None = None) -> None:
        self.connection: Final = connection
        self.driver: Final = connection.driver
        self.state = State.OPEN
        self.savepoints: list[tuple[str, object]] = []
        self.session: TransactionSession | None = None
        self.call = call
        self._pool = pool
        self._busy = False

    def send(self, text: str, run: Callable[[str], object], *, is_batch: bool = False) -> None:
        """Judge a statement of the caller's by the text that would be sent, and send it."""
        if not _ALLOWED.match(text):
            raise TransactionError(
                "a statement may only read or write rows, and begins with the word that says so"
            )
        if _UNSENDABLE.search(text):
            raise InvalidInputError("statement", "must not contain NUL or lone surrogates")
        self._enter()
        self.connection.has_own_sql = True
        try:
            run(f"{text}{self._pool.statement_suffix}")
        except MissingGreenlet:
            failure: TodoDBError = TransactionError(
                "an attribute would be loaded lazily: load it by selectinload() in the query, or "
                "await session.refresh(entity, [name])"
            )
        except Exception as error:
            known = self._own_failure(error, is_batch=is_batch)
            if known is None:
                raise
            failure = known
        except BaseException:
            self._change(Event.STATE_UNKNOWN)
            raise
        else:
            return
        finally:
            self._busy = False
        raise failure

    async def receive[T](self, call: Callable[[], Awaitable[T]]) -> T:
        """Await what `call` returns, as a statement of its own."""
        self._enter()
        try:
            return await call()
        except Exception as error:  # noqa: BLE001  # raised again, as ours
            failure = self._failure(error)
        except BaseException:
            self._change(Event.STATE_UNKNOWN)
            raise
        finally:
            self._busy = False
        raise failure

    @contextmanager
    def observed(self, call: Call) -> Generator[None]:
        """Have `call` observe the block, and count its statements."""
        outer, self.call = self.call, call
        try:
            with call:
                yield
        finally:
            self.call = outer

    def abort(self) -> None:
        """Commit nothing of what was done since the last savepoint."""
        self._change(Event.STATEMENT_FAILED)

    async def open_savepoint(self, name: str) -> None:
        """Send SAVEPOINT."""
        await self._control(f"SAVEPOINT {name}")
        self.savepoints.append((name, asyncio.current_task()))

    async def release_savepoint(self, name: str) -> None:
        """Send RELEASE SAVEPOINT for the savepoint that was opened last.

        Raises:
            ConcurrentUseError: Another savepoint was opened since, and is open.
        """
        if [open_name for open_name, _ in self.savepoints[-1:]] != [name]:
            self._change(Event.STATE_UNKNOWN)
            raise ConcurrentUseError("savepoints must be closed in the reverse order of opening")
        await self._control(f"RELEASE SAVEPOINT {name}")
        self.savepoints.pop()

    async def undo_savepoint(self, name: str) -> None:
        """Send ROLLBACK TO SAVEPOINT, and raise nothing but cancellation.

        It is called while an error is on its way to the caller, which must not be replaced: least
        of all a cancellation. If the savepoint cannot be undone, the transaction is broken.
        """
        names = [open_name for open_name, _ in self.savepoints]
        is_last = names[-1:] == [name]
        if not is_last or self._busy or self.state not in {State.OPEN, State.ABORTED}:
            if name in names:  # pragma: no branch  # SQLAlchemy undoes a failed one, too
                self._change(Event.STATE_UNKNOWN)
            return
        self._change(Event.SAVEPOINT_UNDONE)
        try:
            await self._control(f"ROLLBACK TO SAVEPOINT {name};RELEASE SAVEPOINT {name}")
        except TodoDBError:
            self._change(Event.STATE_UNKNOWN)
        else:
            self.savepoints.pop()

    # Statements

    @cached_property
    def sqlalchemy(self) -> AsyncConnection:
        """SQLAlchemy's view of the connection, which sends through this gate."""
        return self.connection.sqlalchemy(self)

    async def fetch(self, sql: str, arguments: Iterable[object]) -> Sequence[Row]:
        """Send a statement of the package's own."""
        self._enter()
        # Without a suffix the text is the same object, whose hash is known.
        suffix = self._pool.statement_suffix
        try:
            return await self.driver.fetch(f"{sql}{suffix}" if suffix else sql, *arguments)
        except Exception as error:  # noqa: BLE001  # raised again, as ours
            failure = self._failure(error)
        except BaseException:
            self._change(Event.STATE_UNKNOWN)
            raise
        finally:
            self._busy = False
        raise failure

    async def _control(self, sql: str) -> None:
        await self.receive(lambda: self.driver.execute(sql))

    def _enter(self) -> None:
        """Let one task in, if there is a transaction that carries its user."""
        if self.state is State.ENDED:
            raise TransactionError("the transaction has ended")
        if self._busy or (self.savepoints and self.savepoints[-1][1] is not asyncio.current_task()):
            # The other task's work could be committed without this task's, or undone with it.
            self._change(Event.STATE_UNKNOWN)
            raise ConcurrentUseError
        if self.state is not State.OPEN:
            raise TransactionAbortedError
        if self.driver.is_closed():
            self._change(Event.STATE_UNKNOWN)
            raise connection_lost()
        if not self.driver.is_in_transaction():
            self._change(Event.STATE_UNKNOWN)
            raise IsolationError("a statement ended the transaction")
        self._busy = True
        if self.call is not None:
            self.call.round_trips += 1

    def _change(self, event: Event) -> None:
        """Change the state: the only place that does."""
        if self.state is State.ENDED:
            # Its connection may be in another transaction by now.
            return
        self.state = NEXT.get((self.state, event), self.state)
        if event is Event.STATE_UNKNOWN:
            self.connection.is_state_known = False

    def _failure(self, error: Exception) -> TodoDBError:
        self._note(error)
        return self._stale(error) or self._lost(translated(error))

    def _own_failure(self, error: Exception, *, is_batch: bool) -> TodoDBError | None:
        """Return what a failure of a caller's statement means; None leaves SQLAlchemy's error."""
        if _is_unsent(error) and not is_batch and not self.driver.is_closed():
            # Of a batch, the rows before this one were sent.
            return None
        self._note(error)
        known = self._stale(error) or translated_if_known(error)
        return known if known is None else self._lost(known)

    def _note(self, error: Exception) -> None:
        # After an answer of the server the transaction is aborted. After anything else, such as
        # a timeout of the client, the connection may still be in the middle of the statement.
        answered = is_server_error(error) and self.driver.is_in_transaction()
        is_aborted = answered and not self.driver.is_closed()
        self._change(Event.STATEMENT_FAILED if is_aborted else Event.STATE_UNKNOWN)

    def _stale(self, error: BaseException) -> TodoDBError | None:
        for each in (error, error.__cause__):
            if isinstance(each, (*STALE_STATEMENT, *STALE_ROWS)):
                return self._pool.stale_statement(each)
        return None

    def _lost(self, failure: TodoDBError) -> TodoDBError:
        if self.driver.is_closed() and not isinstance(failure, UnavailableError):
            return connection_lost()
        return failure

    # The end

    async def end(self, *, commit: bool, read_only: bool) -> None:
        """End the transaction, or leave it to the pool if its state is not known.

        Raises:
            TransactionAbortedError: It should have been committed, and was not.
            TransactionError: A savepoint was still open, and nothing was committed.
            UnavailableError: The connection was lost before the COMMIT.
            OutcomeUnknownError: The connection was lost during the COMMIT.
        """
        if commit and self.session is not None and self.state is State.OPEN:
            try:
                await self.session.flush()
            except BaseException:
                await self.end(commit=False, read_only=read_only)
                raise
        if self._busy:
            self._change(Event.STATE_UNKNOWN)
        state = self.state
        self._change(Event.BLOCK_ENDED)
        if state is State.OPEN and commit and not self.savepoints:
            await self._commit(read_only=read_only)
            return
        if state is not State.BROKEN:
            await self._rollback()
        if commit:
            if state is State.OPEN:
                raise TransactionError("a savepoint is still open: nothing was committed")
            raise TransactionAbortedError

    async def _rollback(self) -> None:
        try:
            await self.driver.execute(self.connection.ending("ROLLBACK"), timeout=_ROLLBACK_SECONDS)
        except Exception as error:  # noqa: BLE001  # nothing was applied either way
            self.connection.is_state_known = False
            _logger.warning(
                "a connection broke while it rolled back: %s",
                type(error).__name__,
                extra={
                    "event": "todo_db.transaction.rollback_failed",
                    "reason": type(error).__name__,
                },
            )
        except BaseException:
            self.connection.is_state_known = False
            raise
        else:
            self.connection.has_own_sql = False

    async def _commit(self, *, read_only: bool) -> None:
        failure: TodoDBError
        if self.driver.is_closed():
            failure = connection_lost()
        elif not self.driver.is_in_transaction():
            failure = IsolationError("a statement ended the transaction")
            read_only = False
        else:
            try:
                tag = await self.driver.execute(self.connection.ending("COMMIT"))
            except Exception as error:  # noqa: BLE001  # raised again, as ours
                failure = self._commit_failure(error, read_only=read_only)
            except BaseException:
                self.connection.is_state_known = False
                raise
            else:
                self.connection.has_own_sql = False
                if tag == "COMMIT":
                    return
                # The server takes a COMMIT of an aborted transaction, and rolls it back.
                raise TransactionAbortedError
        self.connection.is_state_known = False
        if not read_only:
            raise failure
        _logger.warning(
            "a connection broke after its last row was read",
            extra={"event": "todo_db.transaction.read_only_lost"},
        )

    def _commit_failure(self, error: Exception, *, read_only: bool) -> TodoDBError:
        if is_server_error(error) and not self.driver.is_closed():
            return translated(error)
        if not read_only:
            _logger.warning(
                "the outcome of a transaction is unknown: %s",
                type(error).__name__,
                extra={"event": "todo_db.outcome.unknown", "reason": type(error).__name__},
            )
        return OutcomeUnknownError()


def _is_unsent(error: Exception) -> bool:
    """Return whether asyncpg refused to send a statement, because of its values."""
    cause = error.__cause__
    # Of a value that it cannot encode, asyncpg raises the class of a server's error, without a
    # server's fields.
    is_value = isinstance(cause, asyncpg.DataError) and cause.severity is None
    return is_value or isinstance(cause, asyncpg.InterfaceError)
