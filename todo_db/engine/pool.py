"""The pool: who waits for a connection, who gets one, and which are kept."""

import asyncio
import copy
import logging
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass
from math import inf
from random import uniform
from secrets import token_hex
from typing import Any, Final, cast

import asyncpg

from todo_db.calls import Call
from todo_db.engine.connection import PooledConnection, create_pool_engine
from todo_db.engine.deadlines import Deadlines
from todo_db.engine.url import parse_url
from todo_db.errors import ConfigurationError, PoolExhaustedError, TodoDBError, UnavailableError
from todo_db.records import PoolStatus
from todo_db.settings import Settings

# A cold start of many callers opens this many connections at a time, and one at a time while the
# server does not answer.
_MAX_CONNECTING: Final = 3
_FIRST_DELAY_SECONDS: Final = 0.05
_MAX_DELAY_SECONDS: Final = 2.0
_LONG_WAIT_SECONDS: Final = 1.0

type _Task = asyncio.Task[Any]

_logger: Final = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Waiter:
    """A caller of `acquire` in the queue.

    Attributes:
        connection: What it waits for.
        task: The caller's.
        queue_until: When it gives up if all connections are in use.
        connect_until: When it gives up if no connection can be made.
    """

    connection: asyncio.Future[PooledConnection]
    task: _Task
    queue_until: float
    connect_until: float


class Pool:
    """The connections of one `Database` on one event loop.

    Callers wait in the order in which they came. The connection that was used last is used next,
    so that its prepared statements are used and the others can expire.

    Only tasks of the pool connect, recover and close connections. A caller who is cancelled
    therefore never wastes a connection that is being made, and a connection counts against the
    size of the pool until it is closed (`docs/decisions/0010-pool-tasks.md`).

    Attributes:
        begin_seconds: How long a BEGIN may take, behind a pooler that has no server yet.
        retries_connecting: Whether attempts to connect are repeated.
        keeps_statements: Whether its connections keep prepared statements.
        has_pooler: Whether a pooler stands before the server, as `Database.open` found.
        statement_suffix: What stands behind every statement; see `invalidate_statements`.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.database_url is None:
            raise ConfigurationError(
                "DATABASE_URL is not set: write the URL that `todo-db login` prints into .env, or "
                "use Database.from_url"
            )
        self._settings = settings
        self._endpoint = parse_url(settings.database_url.get_secret_value())
        self.begin_seconds: Final = min(
            settings.connect_timeout_seconds, settings.command_timeout_seconds
        )
        self._max_idle = settings.pool_size
        self._size = settings.pool_size + settings.max_overflow
        self._timeout = settings.pool_timeout_seconds
        self._statement_seconds = settings.command_timeout_seconds
        self.retries_connecting: Final = (
            settings.retry_attempts > 1 and settings.connect_retry_seconds > 0
        )
        # Without retries, the failure of one attempt ends the waiting.
        self._connect_seconds = settings.connect_retry_seconds if self.retries_connecting else inf
        self._idle: list[PooledConnection] = []
        self._lent: dict[PooledConnection, _Task] = {}
        self._waiters: deque[_Waiter] = deque()
        self._waiting = Deadlines(self._give_up)
        self._running = Deadlines(self._interrupt)
        self._total = 0
        self._proving = 0
        self._connecting: set[asyncio.Task[None]] = set()
        self._failures = 0
        self._failure: TodoDBError | None = None
        self._next_attempt = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._drained = asyncio.Event()
        self._open = True
        self._generation = 0
        self.statement_suffix = ""
        self.keeps_statements = (
            not self._endpoint.assumes_untracked_pooler
            if settings.prepared_statements is None
            else settings.prepared_statements
        )
        self.has_pooler = False
        self._create_engine()

    @property
    def status(self) -> PoolStatus:
        """How many connections there may be, are in use, and are waited for."""
        return PoolStatus(self._size, len(self._lent), len(self._waiters))

    def is_pooled(self, *, told_pid: int, server_pid: int) -> bool:
        """Whether a pooler stands before the server.

        Args:
            told_pid: The process id that came with the login (BackendKeyData).
            server_pid: What the server says (`pg_backend_pid()`).
        """
        if self._endpoint.is_neon:
            # Neon's proxy has a process id of its own, pooled or not.
            return self._endpoint.is_pooled
        return server_pid != told_pid

    def invalidate_statements(self) -> None:
        """Have every statement prepared anew, on all connections, under another text.

        After a change of the schema a prepared statement fails, or its rows are read by the old
        description. PgBouncer keeps one statement for each text until it restarts, and users of
        Neon cannot make it forget one; so the text has to change.
        """
        self.statement_suffix = f" /* {token_hex(4)} */"

    def forget_statements(self) -> None:
        """Keep no prepared statements from now on, behind a pooler that does not track them.

        Connections that keep some are replaced. If the setting says to keep them, they are kept.
        """
        if self._settings.prepared_statements is not None or not self.keeps_statements:
            return
        _logger.warning(
            "the pooler does not track prepared statements (or pools by session): they are off, "
            "and each statement costs one round trip more; set max_prepared_statements of "
            "PgBouncer above 0, or TODO_DB_PREPARED_STATEMENTS",
            extra={"event": "todo_db.statements.off"},
        )
        self.keeps_statements = False
        self._generation += 1
        self._create_engine()
        idle, self._idle = self._idle, []
        for connection in idle:
            self._spawn(self._close(connection), self._tasks)

    def stale_statement(self, error: Exception) -> UnavailableError:
        """Have statements prepared anew after one failed, and return what the failure means."""
        self.invalidate_statements()
        _logger.info(
            "a prepared statement was out of date, and all are prepared again: %s",
            type(error).__name__,
            extra={"event": "todo_db.statements.healed", "reason": type(error).__name__},
        )
        if not self.has_pooler or not isinstance(error, asyncpg.InvalidSQLStatementNameError):
            return UnavailableError("a prepared statement was out of date", transient=True)
        # The pooler sent it to a server connection that it was not prepared on.
        self.forget_statements()
        return UnavailableError(
            "the pooler does not track prepared statements: set max_prepared_statements of "
            "PgBouncer above 0, or TODO_DB_PREPARED_STATEMENTS=false",
            transient=True,
        )

    def take(self) -> PooledConnection | None:
        """Return a connection that is idle and can be used as it is, unless others wait for one."""
        if not self._idle or self._waiters or self._failure is not None:
            return None
        connection = self._idle[-1]
        if connection.generation != self._generation or not connection.is_fresh:
            return None
        return self._lend(self._idle.pop(), _current_task())

    async def acquire(
        self, since: float | None = None, call: Call | None = None
    ) -> PooledConnection:
        """Wait for a connection, first come, first served.

        Connecting is tried until `connect_retry_seconds` after `since` are over. Nothing of the
        caller's has been sent by then, so that is always safe.

        Args:
            since: When the caller began to wait, by the clock of the loop; now by default.
            call: What counts the time, if it is observed.

        Raises:
            PoolExhaustedError: No connection became free in time.
            ConfigurationError: The URL, the login or the certificate is wrong. Raised at once.
            UnavailableError: The database cannot be reached. Not worth trying again soon.
        """
        connection = self.take()
        if connection is not None:
            return connection
        if not self._open:
            raise ConfigurationError("the database was closed")
        loop = asyncio.get_running_loop()
        now = loop.time()
        waiter = _Waiter(
            connection=loop.create_future(),
            task=_current_task(),
            queue_until=now + self._timeout,
            connect_until=(now if since is None else since) + self._connect_seconds,
        )
        self._waiters.append(waiter)
        self._raise_if_deadlocked(waiter)
        self._serve()
        self._waiting.add(waiter, min(waiter.queue_until, waiter.connect_until))
        try:
            return await waiter.connection
        except BaseException:
            self._leave(waiter)
            raise
        finally:
            self._waiting.remove(waiter)
            self._note_wait(loop.time() - now, call)

    def watch(self, connection: PooledConnection) -> None:
        """Cancel the caller's statement if it is not over in `command_timeout_seconds`.

        Until the connection is released. If it is cancelled by that, `is_late` says so.
        """
        connection.is_late = False
        connection.cancellations = self._lent[connection].cancelling()
        now = asyncio.get_running_loop().time()
        self._running.add(connection, now + self._statement_seconds)

    def is_late(self, connection: PooledConnection) -> bool:
        """Whether the caller was cancelled by the deadline of `watch`, and by nobody else.

        The caller has to ask before the connection is released, and once.
        """
        return connection.is_late and self._lent[connection].uncancel() <= connection.cancellations

    def release(self, connection: PooledConnection) -> None:
        """Take a connection back, and give it to the first caller in the queue.

        Does not wait: what has to be recovered or closed is, by a task of the pool, and counts
        until then.
        """
        self._take_back(connection)
        if self._open and connection.is_reusable:
            self._keep(connection)
        elif self._open and not connection.driver.is_closed():
            self._spawn(self._recover(connection), self._tasks)
        else:
            self._discard(connection)

    def reject(self, connection: PooledConnection, failure: TodoDBError) -> None:
        """Take back a connection whose BEGIN failed as connecting can fail.

        Until a round trip proves a connection, the pool treats the database as down.
        """
        self._note_failure(failure)
        connection.is_state_known = False
        self.release(connection)

    async def close(self) -> None:
        """Close all connections, for good.

        Waits for those that are in use, as long as a caller waits for one. What is released later
        is closed then.
        """
        try:
            if self._lent or self._waiters:
                self._drained.clear()
                async with asyncio.timeout(self._timeout):
                    await self._drained.wait()
        except TimeoutError:
            _logger.warning(
                "closed while %d connections were in use",
                len(self._lent),
                extra={"event": "todo_db.pool.closed_in_use", "in_use": len(self._lent)},
            )
        finally:
            self._open = False
            self._fail_waiters(ConfigurationError("the database was closed"))
            for task in self._connecting:
                task.cancel()
            idle, self._idle = self._idle, []
            try:
                await asyncio.gather(
                    *(self._close(connection) for connection in idle),
                    *self._tasks,
                    *self._connecting,
                    return_exceptions=True,
                )
            finally:
                for connection in idle:
                    connection.terminate()

    def abandon(self) -> None:
        """Close the sockets of a pool whose event loop has ended."""
        for connection in (*self._idle, *self._lent):
            connection.terminate()

    def _create_engine(self) -> None:
        self._engine = create_pool_engine(
            self._endpoint, self._settings, prepared_statements=self.keeps_statements
        )

    def _is_current(self, connection: PooledConnection) -> bool:
        return connection.generation == self._generation and not connection.is_expired

    # Callers

    def _lend(self, connection: PooledConnection, task: _Task) -> PooledConnection:
        self._lent[connection] = task
        return connection

    def _take_back(self, connection: PooledConnection) -> None:
        del self._lent[connection]
        self._running.remove(connection)
        if not self._lent and not self._waiters:
            self._drained.set()

    def _leave(self, waiter: _Waiter) -> None:
        """Take a caller out of the queue who was cancelled or closed, or got an error."""
        future = waiter.connection
        # Only a coroutine that was closed, and not cancelled, has left it pending.
        future.cancel()
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        if not future.cancelled() and future.exception() is None:
            # It was cancelled after the connection was given to it, and before it ran again.
            self.release(future.result())
        elif not self._lent and not self._waiters:
            self._drained.set()

    def _give_up(self, waiter: _Waiter) -> None:
        """Fail a caller whose time is over, by what it waits for: a connect, or a release."""
        if waiter.connection.done():
            return
        loop = asyncio.get_running_loop()
        deadline = waiter.connect_until if self._connecting else waiter.queue_until
        if loop.time() < deadline:
            # Which one counts can change before the later of the two, which can be infinite.
            self._waiting.add(waiter, min(deadline, loop.time() + self._timeout))
        elif self._connecting:
            # Not transient: trying for as long again would multiply the time.
            reason = self._failure or "the database did not answer in time"
            waiter.connection.set_exception(UnavailableError(str(reason)))
        else:
            waiter.connection.set_exception(self._exhausted(waiter.task in self._lent.values()))

    def _interrupt(self, connection: PooledConnection) -> None:
        """Cancel the statement of a caller whose time is over."""
        connection.is_late = True
        self._lent[connection].cancel()

    def _note_wait(self, seconds: float, call: Call | None) -> None:
        if call is not None:
            call.pool_wait_seconds += seconds
        if seconds > _LONG_WAIT_SECONDS:
            milliseconds = round(seconds * 1000)
            in_use, waiting, connecting = map(len, (self._lent, self._waiters, self._connecting))
            _logger.warning(
                "waited %d ms for a connection: %d in use, %d connecting, %d callers waiting",
                *(milliseconds, in_use, connecting, waiting),
                extra={
                    "event": "todo_db.pool.waited",
                    "wait_ms": milliseconds,
                    "in_use": in_use,
                    "connecting": connecting,
                    "waiting": waiting,
                },
            )

    def _raise_if_deadlocked(self, waiter: _Waiter) -> None:
        """Raise if every connection is held by a task that waits for another one.

        The last of them to wait is the one that finds out.
        """
        if len(self._lent) < self._size or waiter.task not in (holders := self._lent.values()):
            return
        if set(holders) <= {waiter.task for waiter in self._waiters}:
            self._waiters.remove(waiter)
            raise self._exhausted(True)  # noqa: FBT003

    @staticmethod
    def _exhausted(holds_one: bool) -> PoolExhaustedError:  # noqa: FBT001
        if holds_one:
            return PoolExhaustedError(
                "no connection became free, and this task already holds one: inside a transaction "
                "use the transaction's own repositories"
            )
        return PoolExhaustedError()

    def _fail_waiters(self, failure: TodoDBError) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.connection.done():  # pragma: no branch  # a race of one turn of the loop
                # One for each: a shared one would collect the tracebacks of all of them.
                waiter.connection.set_exception(copy.copy(failure))

    # Connections

    def _serve(self) -> None:
        """Start what the callers in the queue need: a ping of what is idle, or a connect."""
        while self._idle and self._proving < len(self._waiters):
            connection = self._idle.pop()
            if not connection.is_reusable or not self._is_current(connection):
                self._retire(connection)
            elif self._failure is None and connection.is_fresh:
                self._keep(connection)
            else:
                self._proving += 1
                self._spawn(self._prove(connection), self._tasks)
        most = _MAX_CONNECTING if self._failure is None else 1
        while (
            self._total < self._size
            and len(self._connecting) < most
            and len(self._connecting) + self._proving < len(self._waiters)
        ):
            self._total += 1
            self._spawn(self._connect(), self._connecting)

    def _keep(self, connection: PooledConnection) -> None:
        """Give a sound connection to the first caller in the queue, or keep it, or close it."""
        if self._open and self._is_current(connection):
            while self._waiters:
                waiter = self._waiters.popleft()
                if not waiter.connection.done():
                    waiter.connection.set_result(self._lend(connection, waiter.task))
                    return
            if len(self._idle) < self._max_idle:
                connection.touch()
                self._idle.append(connection)
                return
        self._retire(connection)

    def _retire(self, connection: PooledConnection) -> None:
        if self._open and not connection.driver.is_closed():
            self._spawn(self._close(connection), self._tasks)
        else:
            self._discard(connection)

    def _discard(self, connection: PooledConnection, reason: str | None = None) -> None:
        reason = reason or self._closing_reason(connection)
        connection.terminate()
        self._note_closed(reason)
        if self._open:
            self._serve()

    def _closing_reason(self, connection: PooledConnection) -> str:
        if connection.driver.is_closed():
            return "lost"
        if not self._open:
            return "pool_closed"
        if connection.generation != self._generation:
            return "statements_off"
        return "expired" if connection.is_expired else "surplus"

    def _note_closed(self, reason: str) -> None:
        self._total -= 1
        _logger.info(
            "a connection was closed: %s",
            reason,
            extra={
                "event": "todo_db.connection.closed",
                "reason": reason,
                "connections": self._total,
            },
        )

    def _note_failure(self, failure: TodoDBError) -> None:
        """Note that the database is down, and delay the next attempt to connect, by full jitter."""
        self._failure = failure
        # Only attempts to connect are counted: many transactions can fail at one moment.
        self._failures = max(self._failures, 1)
        longest = min(
            _FIRST_DELAY_SECONDS * 2 ** min(self._failures, 9),
            _MAX_DELAY_SECONDS,
            # So that a short budget is not over before an attempt.
            self._connect_seconds / 4,
        )
        self._next_attempt = asyncio.get_running_loop().time() + uniform(0, longest)  # noqa: S311  # not a secret

    def _note_success(self) -> None:
        self._failures, self._failure, self._next_attempt = 0, None, 0.0

    @staticmethod
    def _spawn(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _connect(self) -> None:
        """Make a connection for the callers in the queue, until one is made or all have left."""
        task = asyncio.current_task()
        try:
            connection = await self._connect_until_left()
        except BaseException:
            self._total -= 1
            raise
        finally:
            # At once, and not by the callback of the task: what follows counts them.
            self._connecting -= {task}
        if connection is None:
            self._total -= 1
        else:
            _logger.info(
                "a connection was opened",
                extra={"event": "todo_db.connection.opened", "connections": self._total},
            )
            self._note_success()
            self._keep(connection)
        self._serve()

    async def _connect_until_left(self) -> PooledConnection | None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._next_attempt - loop.time())
            if not self._waiters:
                return None
            try:
                return await self._connect_once()
            except TodoDBError as error:
                failure = error
            _logger.warning(
                "a connection could not be opened: %s",
                failure,
                extra={"event": "todo_db.connection.failed", "reason": str(failure)},
            )
            if isinstance(failure, UnavailableError) and self.retries_connecting:
                self._failures += 1
                self._note_failure(failure)
            else:
                self._fail_waiters(failure)
                return None

    async def _connect_once(self) -> PooledConnection:
        connection = await PooledConnection.connect(self._engine, self._generation)
        if self._failure is not None:
            # A pooler may log clients in while it has no server.
            try:
                await connection.ping(self.begin_seconds)
            except BaseException:  # pragma: no cover  # test_goodput, marked fault
                connection.terminate()
                raise
        return connection

    async def _prove(self, connection: PooledConnection) -> None:
        """Ping a connection that was idle for long, or of which others have failed."""
        lost = [connection]
        try:
            await connection.ping()
            lost = []
        except TodoDBError as error:
            self._note_failure(error)
            # The others have been idle for longer: assume that they are lost, too.
            lost += self._idle
            self._idle = []
        finally:
            self._proving -= 1
            for each in lost:
                self._discard(each, "ping_failed")
        if not lost:
            self._note_success()
            self._keep(connection)
            self._serve()

    async def _recover(self, connection: PooledConnection) -> None:
        """Make a connection usable again whose statement was cancelled, or close it."""
        try:
            await connection.recover()
        except Exception:  # noqa: BLE001  # whatever it is, the connection is given up
            self._discard(connection, "not_recovered")
        except BaseException:  # pragma: no cover  # the loop ends while it recovers
            self._discard(connection, "not_recovered")
            raise
        else:
            self._note_success()
            self._keep(connection)

    async def _close(self, connection: PooledConnection) -> None:
        reason = self._closing_reason(connection)
        try:
            await connection.close()
        finally:
            self._note_closed(reason)
            if self._open:
                self._serve()


def _current_task() -> _Task:
    return cast("_Task", asyncio.current_task())
