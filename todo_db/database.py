"""The front door: opens, runs, tries again, and says how it is."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final, Self

import stamina
from sqlalchemy.exc import DBAPIError

from todo_db import inputs
from todo_db.engine import Pool
from todo_db.errors import (
    CallTimeoutError,
    ConfigurationError,
    IsolationError,
    NotFoundError,
    OutcomeUnknownError,
    SchemaError,
    TodoDBError,
    UnavailableError,
    connection_lost,
    translated,
)
from todo_db.models import REVISION
from todo_db.records import Health
from todo_db.repositories import Operation, Retry, TaskRepository, UserRepository
from todo_db.settings import Settings
from todo_db.transaction import NO_USER, Transaction, TransactionPreamble, TransactionScope

# Asked as the role that every transaction runs as, about its tables and itself.
_ISOLATION: Final = """
    SELECT
        count(*) FILTER (WHERE c.oid IS NULL) AS missing,
        count(*) FILTER (WHERE NOT row_security_active(c.oid)) AS unfenced,
        count(*) FILTER (WHERE NOT c.relforcerowsecurity) AS unforced,
        count(*) FILTER (WHERE pg_has_role(current_user, c.relowner, 'MEMBER')) AS owned,
        (SELECT count(*) FROM pg_roles r WHERE (r.rolsuper OR r.rolbypassrls)
            AND pg_has_role(current_user, r.oid, 'MEMBER')) AS bypassing,
        coalesce(has_table_privilege(to_regclass('alembic_version'), 'SELECT'), false) AS migrated
    FROM unnest(ARRAY['users', 'tasks', 'idempotency_keys']) AS name
    LEFT JOIN pg_class c ON c.oid = to_regclass('public.' || name)
"""
_STATE: Final = """
    SELECT current_setting('server_version') AS server_version, max(version_num) AS revision
    FROM alembic_version
"""
# An aggregate, so that what is not there is a row too.
_CREDENTIAL: Final = "SELECT max(user_id), max(public_key) FROM find_credential($1, $2)"


class Database:
    """A PostgreSQL database with todo_db's schema, and a pool of connections to it.

    Belongs to one event loop. Opens itself on first use; `async with` also closes it.

    Attributes:
        tasks: Tasks, each call in a transaction of its own.
        users: Users, each call in a transaction of its own.
    """

    def __init__(self, settings: Settings) -> None:
        self.tasks: Final = TaskRepository(self)
        self.users: Final = UserRepository(self)
        self._settings = settings
        self._pool = Pool(settings)
        self._preamble = TransactionPreamble(settings)
        self._opening = asyncio.Lock()
        self._failures = 0
        self._failure = TodoDBError()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._process = os.getpid()

    @classmethod
    def from_url(cls, url: str, **settings: Any) -> Self:  # noqa: ANN401  # Settings checks them
        """Return a `Database` on a URL, with other fields of `Settings` by name."""
        return cls(Settings(database_url=url, **settings))

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect, and make sure that users are isolated, before anybody relies on it.

        Raises:
            IsolationError: The role that transactions run as could see every user's rows.
            SchemaError: The database is older than this package.
            ConfigurationError: The URL or the login is wrong.
            UnavailableError: The database cannot be reached.
        """
        failures = self._failures
        async with self._opening:
            if self._loop is not None:
                return
            if failures != self._failures:
                # Whoever tried while this one waited has used the time that there is for it.
                raise self._failure
            if self._closed:
                # The old one belongs to the loop that it was used on.
                self._pool = Pool(self._settings)
            try:
                await self._retried(self._check, repeatable=True)
            except BaseException as error:
                if isinstance(error, TodoDBError):
                    self._failures, self._failure = self._failures + 1, error
                # Nobody will close what was not opened; and what is closed keeps nothing.
                failed, self._pool = self._pool, Pool(self._settings)
                await failed.close()
                raise
            self._loop = asyncio.get_running_loop()
            self._process = os.getpid()
            self._closed = False

    async def close(self) -> None:
        """Let the calls under way end, and close all connections. `open` opens it again."""
        if self._loop is not None and self._process != os.getpid():
            # A word on the parent's connections would end them.
            return
        async with self._opening:
            self._closed = True
            self._loop = None
            await self._pool.close()

    async def perform[T](self, user_id: str, operation: Operation[T]) -> T:
        """Run a repository's call as a transaction of its own: three round trips.

        It is run again when it is known not to have been applied, or may be applied twice.
        """
        await self._ready()
        if operation.needs_savepoint:
            # There is nothing before it in its transaction that a savepoint could keep.
            operation = replace(operation, needs_savepoint=False)
        read_only = operation.retry is Retry.READ_ONLY
        previous_result: list[T] = []

        async def attempt() -> T:
            try:
                async with TransactionScope(
                    self._pool, self._preamble, user_id, read_only=read_only
                ) as tx:
                    result = await tx.perform(user_id, operation)
                    previous_result.append(result)
            except NotFoundError:
                # An earlier try saw it, and now it is gone: that is what was asked for.
                if operation.retry is Retry.IDEMPOTENT_DELETE and previous_result:
                    return previous_result[0]
                raise
            return result

        return await self._retried(attempt, repeatable=operation.retry is not Retry.UNSAFE)

    @asynccontextmanager
    async def transaction(
        self, user_id: str, *, read_only: bool = False
    ) -> AsyncGenerator[Transaction]:
        """Open one user's transaction: committed at the end of the block, undone by an error.

        Two round trips besides its statements. Only the BEGIN is tried again: see `run`.

        Raises:
            InvalidInputError: `user_id` cannot be an id.
            TransactionAbortedError: A statement failed and the block swallowed its error.
            UnavailableError: The connection was lost before the COMMIT; nothing was applied.
            OutcomeUnknownError: The connection was lost during the COMMIT.
        """
        user_id = inputs.user_id(user_id)
        await self._ready()
        unit = TransactionScope(self._pool, self._preamble, user_id, read_only=read_only)
        await self._retried(unit.begin, repeatable=False)
        async with unit as transaction:
            yield transaction

    async def run[T](
        self,
        user_id: str,
        work: Callable[[Transaction], Awaitable[T]],
        *,
        read_only: bool = False,
    ) -> T:
        """Run `work` as one transaction; again from its start when it was not applied.

        Args:
            user_id: Whose transaction.
            work: Called with the transaction, once for each try; what it does besides the
                database is done again too.
            read_only: Refuse to write; then the outcome is never unknown.

        Raises:
            UnavailableError: It was not applied by any of the tries.
            OutcomeUnknownError: The connection was lost during the COMMIT.
        """
        user_id = inputs.user_id(user_id)
        await self._ready()

        async def attempt() -> T:
            try:
                async with TransactionScope(
                    self._pool, self._preamble, user_id, read_only=read_only
                ) as tx:
                    return await work(tx)
            except DBAPIError as error:
                # A statement of the caller's own lost a race, or its connection.
                failure = translated(error)
                if error.connection_invalidated:
                    failure = connection_lost()
                if not _is_transient(failure):
                    raise
            raise failure

        return await self._retried(attempt, repeatable=False)

    async def health(self, *, timeout_seconds: float = 2.0) -> Health:
        """Say whether the database answers and is migrated. Raises nothing but cancellation."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._ready()
                begun = time.perf_counter()
                async with TransactionScope(
                    self._pool, self._preamble, NO_USER, read_only=True
                ) as tx:
                    server_version, revision = await tx.ask(_STATE)
        except TimeoutError:
            problem = CallTimeoutError.__name__
        except TodoDBError as error:
            problem = type(error).__name__
        else:
            latency = time.perf_counter() - begun
            is_current = revision is not None and revision >= REVISION
            return Health(
                ok=is_current,
                latency_seconds=latency,
                server_version=server_version.split()[0],
                revision=revision,
                is_current=is_current,
                pool=self._pool.status,
                problem=None if is_current else SchemaError.__name__,
            )
        return Health(
            ok=False,
            latency_seconds=None,
            server_version=None,
            revision=None,
            is_current=False,
            pool=self._pool.status,
            problem=problem,
        )

    async def find_credential(
        self, *, session_token: str | None = None, key_id: str | None = None
    ) -> tuple[str | None, str | None]:
        """Look up what Better Auth stored, for `todo_db.better_auth`, as nobody.

        One SELECT by unique index. Nothing is learnt but by who knows the token.

        Returns:
            The id of the user whose live session has the token, and the public key of that id.
        """
        await self._ready()

        async def attempt() -> tuple[str | None, str | None]:
            async with TransactionScope(self._pool, self._preamble, NO_USER, read_only=True) as tx:
                user_id, public_key = await tx.ask(_CREDENTIAL, session_token, key_id)
                return user_id, public_key

        return await self._retried(attempt, repeatable=True)

    async def _ready(self) -> None:
        if self._loop is not None and self._process != os.getpid():
            raise ConfigurationError("the database was opened before a fork: make one afterwards")
        if self._loop is asyncio.get_running_loop():
            return
        if self._closed:
            raise ConfigurationError("the database was closed")
        if self._loop is not None:
            raise ConfigurationError(
                "the database was opened on another event loop: make one for each"
            )
        await self.open()

    async def _check(self) -> None:
        async with TransactionScope(self._pool, self._preamble, NO_USER, read_only=True) as tx:
            missing, *weaknesses, migrated = await tx.ask(_ISOLATION)
            if missing or not migrated:
                raise SchemaError
            if any(weaknesses):
                raise IsolationError(
                    "the role of the transactions is not bound by row-level security"
                )
            _, revision = await tx.ask(_STATE)
            if revision is None or revision < REVISION:
                raise SchemaError

    async def _retried[T](self, attempt: Callable[[], Awaitable[T]], *, repeatable: bool) -> T:
        """Run `attempt` until it is applied: again only if it was not, or may be applied twice.

        After a try whose outcome is unknown, the failure of those that follow says nothing of
        that one: the outcome stays unknown. The second try follows at once, because most losses
        are of a connection that had been idle; the others wait longer and longer.
        """
        unknown = False

        def should_retry(error: Exception) -> bool:
            nonlocal unknown
            if isinstance(error, OutcomeUnknownError):
                unknown = True
                return repeatable
            return _is_transient(error)

        try:
            return await attempt()
        except TodoDBError as error:
            if self._settings.retry_attempts == 1 or not should_retry(error):
                raise
        try:
            async for retry in stamina.retry_context(  # pragma: no branch  # returns or raises
                on=should_retry,
                attempts=self._settings.retry_attempts - 1,
                timeout=self._settings.retry_timeout_seconds,
                wait_initial=0.05,
                wait_max=2.0,
                wait_jitter=0.1,
            ):
                with retry:
                    return await attempt()
        except (ConfigurationError, IsolationError, SchemaError, UnavailableError):
            if not unknown:
                raise
        raise OutcomeUnknownError


def _is_transient(error: Exception) -> bool:
    return isinstance(error, UnavailableError) and error.transient
