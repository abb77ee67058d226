"""The database of an application: opens connections, runs calls, retries them, tells its health."""

import asyncio
import copy
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from typing import Any, Final, NamedTuple, Self, cast

from todo_db import autocommit, inputs
from todo_db.calls import UNOBSERVED, Call, Observe
from todo_db.engine import Pool
from todo_db.errors import (
    CallTimeoutError,
    ConfigurationError,
    IsolationError,
    NotFoundError,
    SchemaError,
    TodoDBError,
)
from todo_db.fence import OWNER, PRINTED_RULE, ROLE
from todo_db.logins import role_settings
from todo_db.models import REVISION, VERSION_TABLE
from todo_db.records import Health, PoolStatus
from todo_db.repositories import Operation, Retry, TaskRepository, UserRepository
from todo_db.repositories.statements import Row
from todo_db.retries import Retries
from todo_db.settings import Settings
from todo_db.transaction import NO_USER, Transaction, TransactionPreamble, TransactionScope

# Asked as the role of the transactions, about all tables that it can touch, about itself and its
# login, and about the connection.
_CHECK: Final = f"""
    WITH privileged AS (
        -- REPLICATION reads every change of every table.
        SELECT oid FROM pg_roles WHERE true IN (rolsuper, rolbypassrls, rolreplication)
    ), tables AS (
        SELECT c.*, c.oid::regclass::text AS name,
            EXISTS (SELECT FROM pg_policy WHERE polrelid = c.oid AND polname = 'todo_db_shared')
                AND NOT has_any_column_privilege(c.oid, 'INSERT, UPDATE')
                AND NOT has_table_privilege(c.oid, 'DELETE, TRUNCATE') AS is_shared
        FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
        WHERE relkind IN ('r', 'p', 'f') AND nspname !~ '^pg_' AND nspname <> 'information_schema'
            AND (has_any_column_privilege(c.oid, 'SELECT, INSERT, UPDATE')
                OR has_table_privilege(c.oid, 'DELETE, TRUNCATE')
                OR pg_has_role(current_user, relowner, 'MEMBER'))
    ), touched AS (
        SELECT *, row_security_active(oid) AND relforcerowsecurity AND EXISTS (
            SELECT FROM pg_policy, concat(
                CASE name WHEN 'users' THEN '(id ' ELSE '({OWNER} ' END, $4::text) AS rule
            WHERE polrelid = tables.oid AND NOT polpermissive AND polcmd = '*'
                AND polroles && ARRAY[0, '{ROLE}'::regrole::oid]
                AND pg_get_expr(polqual, polrelid) = rule
                AND coalesce(pg_get_expr(polwithcheck, polrelid), rule) = rule) AS is_fenced
        FROM tables WHERE name <> '{VERSION_TABLE}'
    )
    SELECT
        pg_backend_pid() AS server_pid,
        EXISTS (SELECT FROM pg_prepared_statements WHERE starts_with(name, $1)) AS keeps_our_names,
        (SELECT max(version_num) FROM todo_db_version) AS revision,
        (SELECT count(*) FROM unnest(ARRAY['users', 'tasks', 'idempotency_keys']) AS name
            WHERE to_regclass('public.' || name) IS NULL) AS missing,
        string_agg(name, ', ' ORDER BY name) FILTER (WHERE NOT is_fenced AND NOT is_shared)
            AS unfenced,
        count(*) FILTER (WHERE pg_has_role(current_user, relowner, 'MEMBER')) AS owned,
        (SELECT count(*) FROM privileged WHERE pg_has_role(current_user, oid, 'MEMBER'))
            AS bypassing,
        current_setting('row_security') AS row_security,
        CASE
            WHEN EXISTS (SELECT FROM privileged WHERE pg_has_role(session_user, oid, 'MEMBER'))
                THEN 'the login bypasses row-level security'
            WHEN EXISTS (SELECT FROM pg_class o WHERE relkind IN ('r', 'p', 'v', 'm', 'f')
                    AND pg_has_role(session_user, o.relowner, 'MEMBER'))
                THEN 'the login owns tables'
            WHEN NOT pg_has_role(session_user, current_user, 'USAGE')
                THEN 'the login does not inherit the role of the transactions'
            WHEN EXISTS (SELECT FROM pg_settings s WHERE s.reset_val = '0'
                    AND s.name = 'statement_timeout')
                THEN 'the login has no statement_timeout of its own'
            WHEN EXISTS (SELECT FROM pg_settings s WHERE s.reset_val <> 'read committed'
                    AND s.name = 'default_transaction_isolation')
                THEN 'the login has a default_transaction_isolation of its own'
        END AS needs_transaction,
        (SELECT string_agg(s.name, ' and ' ORDER BY s.name) FROM pg_settings s
            WHERE s.reset_val <> CASE s.name
                WHEN 'statement_timeout' THEN $2 WHEN 'lock_timeout' THEN $3
            END) AS differing
    FROM touched
"""  # noqa: S608  # constants
_STATE: Final = """
    SELECT current_setting('server_version') AS server_version, max(version_num) AS revision
    FROM public.todo_db_version
"""
# An aggregate always returns one row, even if there is no match.
_CREDENTIAL: Final = (
    "SELECT max(user_id), max(public_key), max(algorithm),"
    " extract(epoch FROM max(expires_at))::float8 FROM public.find_credential($1, $2)"
)
_ONE_TRIP: Final = "the login is bound by row-level security and has its own timeouts"
_UNPROVEN: Final = "the server does not set the user before it runs a statement"

_logger: Final = logging.getLogger(__name__)


class StoredCredential(NamedTuple):
    """What Better Auth stored.

    Attributes:
        user_id: The user whose live session has the token.
        public_key: The public key with the id, a JWK.
        algorithm: Its algorithm, if the row has one.
        expires_at: When Better Auth stops signing with it, in seconds since 1970.
    """

    user_id: str | None
    public_key: str | None
    algorithm: str | None
    expires_at: float | None


class Database:
    """A PostgreSQL database with todo_db's schema, and a pool of connections to it.

    Belongs to one event loop. Opens itself on first use; `async with` also closes it.

    ```python
    async with Database(Settings()) as db:  # DATABASE_URL
        await db.tasks.create("alice", "Buy milk")
    ```

    Attributes:
        settings: What it was made with.
        tasks: Tasks, each call in a transaction of its own.
        users: Users, each call in a transaction of its own.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings: Final = settings
        self.tasks: Final = TaskRepository(self)
        self.users: Final = UserRepository(self)
        self._pool = Pool(settings)
        self._preamble = TransactionPreamble(settings)
        self._observe: Observe | None = (
            partial(Call, slow_seconds=settings.slow_call_seconds)
            if settings.slow_call_seconds
            else None
        )
        self._opening = asyncio.Lock()
        self._one_trip = False
        self._form_reason: str | None = None
        self._failures = 0
        self._failure = TodoDBError()
        # What the pool and the lock belong to.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = os.getpid()
        self._is_open = False
        self._closed = False

    @classmethod
    def from_url(cls, url: str, **settings: Any) -> Self:  # noqa: ANN401  # Settings checks them
        """Return a `Database` on a URL, with other fields of `Settings` by name.

        ```python
        db = Database.from_url("postgresql://todo_login@localhost/todo", pool_size=10)
        ```
        """
        return cls(Settings(database_url=url, **settings))

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect, and make sure that users are isolated, before any call relies on it.

        Eight round trips at most for the first connection, the handshake of TLS not counted.

        Raises:
            IsolationError: The role that transactions run as could see every user's rows.
            SchemaError: The database is older than this package.
            ConfigurationError: The URL or the login is wrong, or another loop has it open.
            UnavailableError: The database cannot be reached.
        """
        self._enter_loop()
        failures = self._failures
        async with self._opening:
            if self._is_open:
                return
            if failures != self._failures:
                # The call that tried while this one waited has used the time for retries.
                raise copy.copy(self._failure)
            if self._closed:
                # The old one belongs to the loop that it was used on.
                self._pool = Pool(self.settings)
            try:
                await self._retried("open", self._check, repeatable=True)
            except BaseException as error:
                if isinstance(error, TodoDBError):
                    self._failures, self._failure = self._failures + 1, copy.copy(error)
                # The application does not close what did not open.
                failed, self._pool = self._pool, Pool(self.settings)
                await failed.close()
                raise
            self._is_open = True
            self._closed = False

    async def close(self) -> None:
        """Let the calls under way end, and close all connections. `open` opens it again.

        Raises:
            ConfigurationError: It was opened on another event loop, which still runs.
        """
        if self._is_open and self._process != os.getpid():
            # After fork(), closing would send Terminate on the parent's sockets.
            return
        self._enter_loop()
        async with self._opening:
            self._closed = True
            self._is_open = False
            await self._pool.close()
        _logger.info("the database was closed", extra={"event": "todo_db.database.closed"})

    @property
    def pool_status(self) -> PoolStatus:
        """How many connections there may be, are in use, and are waited for, in this process."""
        return self._pool.status

    def observe(self, observe: Observe) -> None:
        """Have every call and transaction from now on be observed by what `observe` returns."""
        self._observe = observe

    async def perform[T](self, user_id: str, operation: Operation[T]) -> T:
        """Run a repository's operation and commit it: in one round trip, or in three.

        One, if the login is bound by row-level security and has its own timeouts, as a login of
        `todo-db login` is and has: the statement then carries its user in autocommit. Three, if
        not: BEGIN, the statement, COMMIT. It is run again when it is known not to have been
        applied, or may be applied twice.
        """
        retries: Retries | None = None
        with self._observed(operation.statement.name) as call:
            if not self._is_ready:
                await self._ready()
            attempt = self._attempt_alone if self._one_trip else self._attempt_in_transaction
            while True:
                try:
                    return await attempt(user_id, operation, call)
                except NotFoundError:
                    is_delete = operation.retry is Retry.IDEMPOTENT_DELETE
                    if is_delete and retries is not None and retries.is_unknown:
                        # An earlier try may have deleted it: that is what was asked for.
                        return cast("T", None)
                    raise
                except TodoDBError as error:
                    failure = error
                if retries is None:
                    repeatable = operation.retry is not Retry.UNSAFE
                    retries = self._retries(operation.statement.name, call, repeatable=repeatable)
                await retries.wait(failure)

    async def _attempt_alone[T](
        self, user_id: str, operation: Operation[T], call: Call | None
    ) -> T:
        statement = operation.statement.alone
        arguments = statement.arguments(user_id, operation.values)
        is_change = operation.retry is not Retry.READ_ONLY
        try:
            rows = await autocommit.fetch(
                self._pool, statement.sql, arguments, is_change=is_change, call=call
            )
        except TodoDBError as error:
            failure = operation.failure(error)
        else:
            return operation.map_rows(rows)
        raise failure

    async def _attempt_in_transaction[T](
        self, user_id: str, operation: Operation[T], call: Call | None
    ) -> T:
        if operation.needs_savepoint:
            # There is nothing before it in its transaction that a savepoint could keep.
            operation = operation._replace(needs_savepoint=False)
        read_only = operation.retry is Retry.READ_ONLY
        async with TransactionScope(
            self._pool, self._preamble, user_id, read_only=read_only, call=call
        ) as tx:
            return await tx.perform(user_id, operation)

    @asynccontextmanager
    async def transaction(
        self, user_id: str, *, read_only: bool = False
    ) -> AsyncGenerator[Transaction]:
        """Open one user's transaction: committed at the end of the block, undone by an error.

        Two round trips besides its statements. Only the BEGIN is tried again: see `run`.

        ```python
        async with db.transaction("alice") as tx:
            await tx.tasks.create("alice", "Buy bread")
            await tx.tasks.create("alice", "Buy butter")
        ```

        Raises:
            InvalidInputError: `user_id` cannot be an id.
            TransactionAbortedError: A statement failed and the block swallowed its error.
            UnavailableError: The connection was lost before the COMMIT; nothing was applied.
            OutcomeUnknownError: The connection was lost during the COMMIT.
        """
        user_id = inputs.user_id(user_id)
        with self._observed("transaction") as call:
            await self._ready()
            scope = self._scope(user_id, call, read_only=read_only)
            await self._retried("transaction", scope.begin, repeatable=False, call=call)
            async with scope as transaction:
                yield transaction

    async def run[T](
        self,
        user_id: str,
        work: Callable[[Transaction], Awaitable[T]],
        *,
        read_only: bool = False,
    ) -> T:
        """Run `work` as one transaction; again from its start when it was not applied.

        ```python
        async def replace(tx: Transaction) -> TaskRecord:
            await tx.tasks.delete_completed("alice")
            return await tx.tasks.create("alice", "Start again")


        task = await db.run("alice", replace)
        ```

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
        with self._observed("run") as call:
            await self._ready()

            async def attempt() -> T:
                async with self._scope(user_id, call, read_only=read_only) as tx:
                    return await work(tx)

            return await self._retried("run", attempt, repeatable=False, call=call)

    async def health(self, *, timeout_seconds: float = 2.0) -> Health:
        """Say whether the database answers and is migrated. Raises nothing but cancellation.

        ```python
        health = await db.health()
        assert health.ok, health.detail
        ```
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._ready()
                begun = time.perf_counter()
                server_version, revision = await self._read(_STATE)
        except TimeoutError:
            failure: TodoDBError = CallTimeoutError("the database did not answer in time")
        except TodoDBError as error:
            failure = error
        else:
            latency = time.perf_counter() - begun
            is_current = revision is not None and revision >= REVISION
            return Health(
                ok=is_current,
                latency_seconds=latency,
                server_version=server_version.split()[0],
                revision=revision,
                is_current=is_current,
                round_trips=self._round_trips,
                form_reason=self._form_reason,
                pool=self._pool.status,
                problem=None if is_current else SchemaError.__name__,
                detail=None if is_current else str(SchemaError()),
            )
        return Health(
            ok=False,
            latency_seconds=None,
            server_version=None,
            revision=None,
            is_current=False,
            round_trips=self._round_trips,
            form_reason=self._form_reason,
            pool=self._pool.status,
            problem=type(failure).__name__,
            detail=str(failure),
        )

    @property
    def _round_trips(self) -> int | None:
        if self._form_reason is None:
            return None
        return (1 if self._one_trip else 3) + (not self._pool.keeps_statements)

    async def find_credential(
        self, *, session_token: str | None = None, key_id: str | None = None
    ) -> StoredCredential:
        """Look up what Better Auth stored, for `todo_db.better_auth`, without a user id.

        One SELECT by unique index. It returns nothing for a token or key id that does not exist.
        """
        name = "find_credential"
        with self._observed(name) as call:
            await self._ready()

            async def attempt() -> StoredCredential:
                row = await self._read(_CREDENTIAL, session_token, key_id, call=call)
                return StoredCredential(*row)

            return await self._retried(name, attempt, repeatable=True, call=call)

    async def _read(self, sql: str, *arguments: object, call: Call | None = None) -> Row:
        """Return the one row of a statement of the package's own, which reads and names no user."""
        if self._one_trip:
            rows = await autocommit.fetch(self._pool, sql, arguments, is_change=False, call=call)
            return rows[0]
        async with (scope := self._own_scope(call)):
            return await scope.fetch_row(sql, *arguments)

    @property
    def _is_ready(self) -> bool:
        is_here = self._loop is asyncio.get_running_loop() and self._process == os.getpid()
        return is_here and self._is_open

    async def _ready(self) -> None:
        if self._is_ready:
            return
        if self._closed:
            raise ConfigurationError("the database was closed")
        await self.open()

    def _enter_loop(self) -> None:
        """Belong to the running event loop, unless another one uses the database now.

        Raises:
            ConfigurationError: It is open, or about to be, on a loop that still runs, or was
                before a fork.
        """
        loop, process = asyncio.get_running_loop(), os.getpid()
        if self._loop is loop and self._process == process:
            return
        if self._loop is not None:
            is_used = self._is_open or self._opening.locked()
            if is_used and self._process != process:
                raise ConfigurationError(
                    "the database was opened before a fork: make one afterwards"
                )
            if is_used and not self._loop.is_closed():
                raise ConfigurationError(
                    "the database was opened on another event loop: make one for each loop, or "
                    "run your tests on one (asyncio_default_fixture_loop_scope and "
                    "asyncio_default_test_loop_scope of pytest-asyncio)"
                )
            if is_used:
                self._pool.abandon()
            self._pool = Pool(self.settings)
            self._opening = asyncio.Lock()
            self._is_open = False
        self._loop, self._process = loop, process

    def _observed(self, name: str) -> AbstractContextManager[Call | None]:
        return UNOBSERVED if self._observe is None else self._observe(name)

    def _scope(self, user_id: str, call: Call | None, *, read_only: bool) -> TransactionScope:
        """Return a transaction whose calls are observed, too."""
        return TransactionScope(
            self._pool,
            self._preamble,
            user_id,
            read_only=read_only,
            call=call,
            observe=self._observe,
        )

    def _own_scope(self, call: Call | None = None) -> TransactionScope:
        """Return a transaction of the package's own: it reads, and no row belongs to its user."""
        return self._scope(NO_USER, call, read_only=True)

    async def _check(self) -> None:
        async with (scope := self._own_scope()):
            driver = scope.connection.driver
            told_pid = driver.get_server_pid()
            own = role_settings(self.settings)
            timeouts = own["statement_timeout"], own["lock_timeout"]
            try:
                row = tuple(
                    await scope.fetch_row(_CHECK, driver.statement_prefix, *timeouts, PRINTED_RULE)
                )
            except IsolationError:
                # The role may not read the version table.
                raise SchemaError from None
        server_pid, keeps_our_names, revision, missing, unfenced, owned, bypassing = row[:-3]
        row_security, reason, differing = row[-3:]
        if missing or revision is None or revision < REVISION:
            raise SchemaError
        if owned or bypassing:
            raise IsolationError(
                "the role of the transactions is not bound by row-level security: `todo-db doctor` "
                "says why"
            )
        if unfenced is not None:
            raise IsolationError(
                f"{ROLE} can reach tables without a fence: {unfenced}. Use op.fence or op.share in "
                "a migration, or revoke the rights"
            )
        if row_security != "on":
            raise IsolationError(
                "row_security is off for the login or the database, and row-level security then "
                "refuses every query: ALTER ROLE or DATABASE … RESET row_security"
            )
        self._pool.has_pooler = self._pool.is_pooled(told_pid=told_pid, server_pid=server_pid)
        # PgBouncer that tracks prepared statements gives each a name of its own. With
        # `pool_mode=session` the names look untracked, although that is safe.
        if keeps_our_names and self._pool.has_pooler:
            self._pool.forget_statements()
        if reason is None and not await self._is_proven():
            reason = _UNPROVEN
        self._one_trip = reason is None
        self._form_reason = reason or _ONE_TRIP
        _logger.info(
            "round trips of a call: %d, because %s",
            self._round_trips,
            self._form_reason,
            extra={
                "event": "todo_db.database.opened",
                "round_trips": self._round_trips,
                "reason": self._form_reason,
            },
        )
        if self._one_trip and differing is not None:
            _logger.warning(
                "the login's own %s differ from the settings, and hold for single calls: run "
                "`todo-db login` again",
                differing,
                extra={"event": "todo_db.login.differs", "settings": differing},
            )

    async def _is_proven(self) -> bool:
        """Ask the server whether a statement that sets its own user runs as that user."""
        user_id = "todo_db-proof"
        rows = await autocommit.fetch(self._pool, autocommit.PROOF, [user_id], is_change=False)
        return [row[0] for row in rows] == [user_id]

    async def _retried[T](
        self,
        name: str,
        attempt: Callable[[], Awaitable[T]],
        *,
        repeatable: bool,
        call: Call | None = None,
    ) -> T:
        retries = self._retries(name, call, repeatable=repeatable)
        while True:
            try:
                return await attempt()
            except TodoDBError as error:
                failure = error
            await retries.wait(failure)

    def _retries(self, name: str, call: Call | None, *, repeatable: bool) -> Retries:
        return Retries(name, self.settings, repeatable=repeatable, call=call)
