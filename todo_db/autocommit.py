"""One statement that carries its user, in autocommit: one round trip.

There is no BEGIN that a lost connection could fail at, and no COMMIT whose answer tells whether a
change was applied. So the outcome of a change is decided by what the driver and the server say:

```
the driver sent nothing, or not all of it              not applied
57P01, 57P03, 57P05: the server ended the session      not applied: it says so before it commits
PgBouncer had no server for the statement              not applied
any other error of the server, if the session goes on  not applied
57P02, "server conn crashed?" alone, or no message     unknown
no answer in time (command_timeout)                    unknown
```
"""

import asyncio
import logging
import re
from collections.abc import Sequence
from typing import Final

import asyncpg

from todo_db.calls import Call
from todo_db.engine import STALE_ROWS, STALE_STATEMENT, Pool, PooledConnection, fetch_unwatched
from todo_db.errors import (
    OutcomeUnknownError,
    TodoDBError,
    UnavailableError,
    causes,
    connection_lost,
    is_server_error,
    translated,
)
from todo_db.repositories.statements import Row

PROOF: Final = (
    "WITH result AS MATERIALIZED"
    " (SELECT pg_catalog.current_setting('todo_db.user_id', true) AS seen)"
    " SELECT result.seen FROM result"
    " WHERE (SELECT pg_catalog.set_config('todo_db.user_id', $1, true)) IS NOT NULL"
)
"""Returns its parameter if the server sets the user before it runs the statement inside."""

# PgBouncer says these before a server has all of the statement; asyncpg says the last one before it
# sends it.
_NOT_SENT: Final = re.compile(
    "query_wait_timeout|server login has been failing|cannot connect to server"
    "|no more connections allowed|invalid server parameter|server connection closed"
    "|cannot switch to state"
)

_logger: Final = logging.getLogger(__name__)


async def fetch(
    pool: Pool,
    sql: str,
    arguments: Sequence[object],
    *,
    is_change: bool,
    call: Call | None = None,
) -> Sequence[Row]:
    """Run one statement on a connection of the pool, and commit it.

    What fails before the statement can have been applied, as connecting can fail, is tried again
    with other connections until `connect_retry_seconds` are over. `call` counts what is sent.

    Raises:
        OutcomeUnknownError: The change may have been applied.
        UnavailableError: It was not applied.
        TodoDBError: What the server's error means.
    """
    since = asyncio.get_running_loop().time()
    while True:
        connection = pool.take() or await pool.acquire(since, call)
        if call is not None:
            call.round_trips += 1
        connection.has_transaction = False
        suffix = pool.statement_suffix
        pool.watch(connection)
        try:
            rows = await fetch_unwatched(
                connection.driver, f"{sql}{suffix}" if suffix else sql, arguments
            )
        except Exception as error:  # noqa: BLE001  # raised again, as ours
            is_lost = not _is_answer(error, connection)
            is_late = isinstance(error, TimeoutError)
            is_refused = is_lost and _is_refused(error, connection)
            failure = (
                _lost(error, is_unknown=is_change and not is_refused)
                if is_lost
                else _answered(error, pool, is_change=is_change)
            )
        except BaseException:
            connection.is_state_known = False
            is_late = pool.is_late(connection)
            if not is_late:
                pool.release(connection)
                raise
            is_lost, is_refused = True, False
            failure = _lost(TimeoutError(), is_unknown=is_change)
        else:
            pool.release(connection)
            return rows
        if not is_lost:
            pool.release(connection)
            raise failure
        if is_late:
            connection.is_state_known = False
            pool.release(connection)
            raise failure
        pool.reject(connection, connection_lost())
        if not is_refused or not pool.retries_connecting:  # pragma: no branch  # marked fault
            raise failure


def _is_answer(error: Exception, connection: PooledConnection) -> bool:
    """Whether the server answered, or the driver refused a value, and the session goes on."""
    if connection.driver.is_closed():
        return False
    return is_server_error(error) or isinstance(error, (asyncpg.InterfaceError, *STALE_ROWS))


def _answered(error: Exception, pool: Pool, *, is_change: bool) -> TodoDBError:
    if isinstance(error, (*STALE_STATEMENT, *STALE_ROWS)):  # pragma: no cover  # marked pooler
        stale = pool.stale_statement(error)
        if is_change and isinstance(error, STALE_ROWS):
            return _unknown(error)
        return stale
    if getattr(error, "sqlstate", "") == "25006":  # pragma: no cover  # marked fault
        # After a failover the address may lead to a standby for a while.
        return UnavailableError("the database cannot be written to", retry_after=5.0)
    return translated(error)


def _lost(error: Exception, *, is_unknown: bool) -> TodoDBError:
    if is_unknown:
        return _unknown(error)
    failure = translated(error)
    return failure if isinstance(failure, UnavailableError) else connection_lost()


def _unknown(error: Exception) -> OutcomeUnknownError:
    _logger.warning(
        "the outcome of a change is unknown: %s",
        type(error).__name__,
        extra={"event": "todo_db.outcome.unknown", "reason": type(error).__name__},
    )
    return OutcomeUnknownError()


def _is_refused(error: Exception, connection: PooledConnection) -> bool:
    """Whether the server cannot have committed the statement, or did not get it."""
    return (
        connection.driver.is_refused
        or isinstance(error, asyncpg.InterfaceError)
        or any(_NOT_SENT.search(str(cause)) for cause in causes(error))
    )
