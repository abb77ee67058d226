"""One transaction belongs to one user: BEGIN carries the user's id, and COMMIT's answer is read."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from functools import cached_property
from typing import Any, Final

from sqlalchemy import Executable, Result

from todo_db.calls import UNOBSERVED, Call, Observe
from todo_db.engine import Pool, PooledConnection, connect_failure
from todo_db.errors import (
    ConfigurationError,
    IsolationError,
    SchemaError,
    TodoDBError,
    TransactionAbortedError,
    UnavailableError,
    connection_lost,
    is_server_error,
)
from todo_db.fence import ROLE
from todo_db.gate import State, TransactionGate
from todo_db.logins import role_settings
from todo_db.repositories import Operation, TaskRepository, UserRepository
from todo_db.repositories.statements import Row
from todo_db.session import TransactionSession, create_session
from todo_db.settings import Settings

NO_USER: Final = ""
"""The user id of the package's own transactions: no row belongs to it."""


class TransactionPreamble:
    """What every BEGIN of a database carries, written once."""

    def __init__(self, settings: Settings) -> None:
        # BEGIN itself names the isolation level.
        parameters = "".join(
            f"SET LOCAL {name} = {value};"
            for name, value in role_settings(settings).items()
            if name != "default_transaction_isolation"
        )
        self._before, self._after = (
            {
                access: (
                    f"BEGIN ISOLATION LEVEL READ COMMITTED, {access};SET LOCAL ROLE {ROLE};"
                    f"{parameters}SELECT pg_catalog.set_config('todo_db.user_id',"
                    " pg_catalog.convert_from(pg_catalog.decode('"
                )
                for access in ("READ ONLY", "READ WRITE")
            },
            "', 'hex'), 'UTF8'), true)",
        )

    def begin(self, user_id: str, *, read_only: bool) -> str:
        """Return one message: BEGIN, role, search path, timeouts and user id.

        The id goes in as hexadecimal digits, so there is nothing to escape.
        """
        before = self._before["READ ONLY" if read_only else "READ WRITE"]
        return f"{before}{user_id.encode().hex()}{self._after}"


class Transaction:
    """One user's transaction on one connection; get it from `Database.transaction`.

    It belongs to one task at a time. Nothing is stored before the block ends without an error.

    ```python
    async with db.transaction("alice") as tx:
        task = await tx.tasks.create("alice", "Buy milk")
        await tx.tasks.toggle("alice", task.id)
    ```

    Attributes:
        user_id: Whose transaction this is.
    """

    def __init__(self, gate: TransactionGate, user_id: str, observe: Observe | None = None) -> None:
        self.user_id: Final = user_id
        self._gate = gate
        self._observe = observe
        self._savepoint_number = 0

    @cached_property
    def tasks(self) -> TaskRepository:
        """The user's tasks, in this transaction."""
        return TaskRepository(self)

    @cached_property
    def users(self) -> UserRepository:
        """The user's own row, in this transaction."""
        return UserRepository(self)

    async def perform[T](self, user_id: str, operation: Operation[T]) -> T:
        """Run a repository's operation: one round trip, or three with its savepoint.

        Raises:
            IsolationError: `user_id` is not this transaction's.
            TransactionAbortedError: An earlier statement failed.
            ConcurrentUseError: Another task uses this transaction right now.
        """
        if user_id != self.user_id:
            raise IsolationError("the transaction belongs to another user")
        statement = operation.statement.in_transaction
        arguments = statement.arguments(user_id, operation.values)
        with self._observed(operation.statement.name):
            try:
                if operation.needs_savepoint:
                    async with self.savepoint():
                        rows = await self._gate.fetch(statement.sql, arguments)
                else:
                    rows = await self._gate.fetch(statement.sql, arguments)
            except TodoDBError as error:
                failure = operation.failure(error)
            else:
                return operation.map_rows(rows)
            raise failure

    async def execute(
        self, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> Result[Any]:
        """Run a statement of the caller's own, by SQLAlchemy Core, in this transaction.

        One round trip, two for a statement that this connection has not prepared, under the same
        user, role and fence as everything else. Its values must be parameters: text that is put
        together from input can become any user.

        A `select` of an entity returns its columns, so `scalars()` then returns the first column,
        the ids. Use `mappings()` for rows, and `session` for entities.

        ```python
        async with db.transaction("alice") as tx:
            found = await tx.execute(select(Task).where(Task.completed))
            assert [row["title"] for row in found.mappings()] == ["Buy milk"]
        ```

        Raises:
            TransactionError: The text that SQLAlchemy made of it does not begin with SELECT,
                INSERT, UPDATE, DELETE, MERGE, WITH, VALUES, TABLE, EXPLAIN or SHOW.
            TransactionAbortedError: An earlier statement failed.
            ConcurrentUseError: Another task uses this transaction right now.
            ConflictError: It breaks a unique or foreign key.
            InvalidInputError: A column or a CHECK constraint refuses a value.
            CallTimeoutError: A lock or the statement took too long.
            sqlalchemy.exc.SQLAlchemyError: The statement itself is wrong.
        """
        with self._observed("execute"):
            return await self._gate.sqlalchemy.execute(statement, parameters)

    def session(self) -> TransactionSession:
        """Return the transaction's ORM session, for entities of the application's own tables.

        A SQLAlchemy `AsyncSession` on this transaction's connection: each of its statements runs
        under the same user, role and fence, and enters and fails like those of `execute`. It is
        flushed at the end of the block. An entity without an owner becomes the user's; an entity of
        another user is refused. `begin_nested` is a savepoint; `commit`, `rollback` and `begin`
        raise `TransactionError`, because the block commits or rolls back.

        Attributes are not loaded lazily: use `selectinload` or `await session.refresh(…)`.

        ```python
        async with db.transaction("alice") as tx:
            task = await tx.session().scalar(select(Task).where(Task.completed))
            task.title = "Buy oat milk"
        ```
        """
        if self._gate.session is None:
            self._gate.session = create_session(self._gate.sqlalchemy, self.user_id)
        return self._gate.session

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[None]:
        """Undo what the block did, and nothing else, when it ends with an error.

        Two round trips. The error goes on to the caller, and the transaction can go on too. Only
        the task that opened it may use the transaction until it is closed.

        ```python
        async with db.transaction("alice") as tx:
            try:
                async with tx.savepoint():
                    await tx.users.update("alice", username="bob")
            except UsernameTakenError:
                await tx.users.update("alice", username="bob-2")
        ```
        """
        if self._gate.session is not None:
            # The session, too, has to know what was undone.
            async with self._gate.session.begin_nested():
                yield
                self._raise_if_aborted()
            return
        self._savepoint_number += 1
        name = f"todo_db_{self._savepoint_number}"
        await self._gate.open_savepoint(name)
        try:
            yield
            self._raise_if_aborted()
            await self._gate.release_savepoint(name)
        except BaseException:
            await self._gate.undo_savepoint(name)
            await self._forget_entities()
            raise

    def _observed(self, name: str) -> AbstractContextManager[None]:
        return UNOBSERVED if self._observe is None else self._gate.observed(self._observe(name))

    async def _forget_entities(self) -> None:
        # In a broken transaction another task may be in the middle of the session.
        if self._gate.session is not None and self._gate.state is State.OPEN:
            await self._gate.session.forget()

    def _raise_if_aborted(self) -> None:
        if self._gate.state is State.ABORTED:
            # The block swallowed the error that undid its work.
            raise TransactionAbortedError


class TransactionScope:
    """One transaction, from the BEGIN to the answer of its COMMIT.

    Entering takes a connection and one round trip, leaving takes another one. A connection goes
    back to the pool with the knowledge whether its answer was read; the pool recovers it if not.
    """

    __slots__ = (
        "_call",
        "_gate",
        "_observe",
        "_pool",
        "_preamble",
        "_read_only",
        "_transaction",
        "_user_id",
    )

    _gate: TransactionGate

    def __init__(  # noqa: PLR0913  # two of them are for those who observe it
        self,
        pool: Pool,
        preamble: TransactionPreamble,
        user_id: str,
        *,
        read_only: bool,
        call: Call | None = None,
        observe: Observe | None = None,
    ) -> None:
        self._pool = pool
        self._preamble = preamble
        self._user_id = user_id
        self._read_only = read_only
        self._call = call
        self._observe = observe
        self._transaction: Transaction | None = None

    @property
    def connection(self) -> PooledConnection:
        """The connection, once it has begun."""
        return self._gate.connection

    async def begin(self) -> Transaction:
        """Take a connection, and send BEGIN with the user.

        What fails as connecting can fail is tried again, with other connections, until
        `connect_retry_seconds` are over: behind a pooler a missing server shows here.

        Raises:
            SchemaError: The database has no role `todo_app`: it is not migrated.
            ConfigurationError: The login may not become that role.
            UnavailableError: No connection, or it broke.
        """
        begin = self._preamble.begin(self._user_id, read_only=self._read_only)
        since = asyncio.get_running_loop().time()
        while True:
            connection = await self._pool.acquire(since, self._call)
            connection.has_transaction = True
            try:
                await connection.driver.execute(begin, timeout=self._pool.begin_seconds)
            except Exception as error:  # noqa: BLE001  # raised again, as ours
                failure = _begin_failure(error)
            except BaseException:
                connection.is_state_known = False
                self._pool.release(connection)
                raise
            else:
                if self._call is not None:
                    # BEGIN, and what will end it.
                    self._call.round_trips += 2
                self._gate = TransactionGate(connection, self._pool, self._call)
                self._transaction = Transaction(self._gate, self._user_id, self._observe)
                return self._transaction
            connection.is_state_known = False
            if not isinstance(failure, UnavailableError) or not failure.transient:
                self._pool.release(connection)
                raise failure
            self._pool.reject(connection, failure)
            if not self._pool.retries_connecting:
                raise failure

    async def fetch_row(self, sql: str, *arguments: object) -> Row:
        """Return the one row of a statement of the package's own, which names no user."""
        return (await self._gate.fetch(sql, arguments))[0]

    async def __aenter__(self) -> Transaction:
        """Begin, unless that was done before."""
        return self._transaction or await self.begin()

    async def __aexit__(
        self, _kind: object, error: BaseException | None, _traceback: object
    ) -> None:
        """Send COMMIT, or ROLLBACK after an error, and give the connection back."""
        try:
            await self._gate.end(commit=error is None, read_only=self._read_only)
        finally:
            self._pool.release(self._gate.connection)


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
            failure = connect_failure(error)
            # Whatever broke, nothing of the caller's had been sent.
            broken = type(failure) is TodoDBError and not is_server_error(error)
            return connection_lost() if broken else failure
