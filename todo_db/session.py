"""An ORM session inside one user's transaction: its entities are that user's, and nothing else is.

The transaction commits, so the session does not: `commit`, `rollback` and `begin` are refused, and
`begin_nested` is a savepoint of the transaction.
"""

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Final, Never, cast, override

from sqlalchemy import event, inspect
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Mapper, Session, SessionTransaction, UOWTransaction
from sqlalchemy.orm.attributes import instance_dict

from todo_db.engine import TransactionConnection
from todo_db.errors import IsolationError, TransactionError
from todo_db.fence import OWNER
from todo_db.models import User

_USER: Final = "todo_db_user_id"


class _SyncSession(Session):
    """What `AsyncSession` runs: the same rules for its own context managers."""

    @override
    def begin(self, nested: bool = False) -> SessionTransaction:
        if not nested:
            raise TransactionError(
                "the session is inside a transaction that has begun: use begin_nested()"
            )
        transaction = super().begin(nested=True)
        try:
            # SQLAlchemy would send SAVEPOINT no sooner than the next statement of the session, and
            # what the transaction's repositories do before that would not be undone.
            self.connection()
        except BaseException:
            transaction.close()
            raise
        return transaction

    @override
    def commit(self) -> Never:
        raise TransactionError(
            "the transaction commits at the end of its block: use flush() to send the changes now"
        )

    @override
    def rollback(self) -> Never:
        raise TransactionError(
            "the transaction rolls back when its block raises an error: to undo a part of it, "
            "use begin_nested()"
        )

    @override
    def prepare(self) -> Never:
        raise TransactionError("a transaction of todo_db cannot be prepared")

    @override
    def get_transaction(self) -> Never:
        raise TransactionError("the session's transaction ends with the block of todo_db's")

    @override
    def invalidate(self) -> Never:
        raise TransactionError("the pool decides whether the connection can be used again")

    @override
    def flush(self, objects: Sequence[Any] | None = None) -> None:
        try:
            super().flush(objects)
        except BaseException:
            if not self.is_active and not self.in_nested_transaction():
                # The session has undone all that it sent, and the server has not: so the
                # transaction commits nothing, and says so itself. The session would ask for a
                # rollback() before anything else.
                cast("TransactionConnection", self.bind).gate.abort()
                super().rollback()
            raise

    @override
    def close(self) -> None:
        # So that no change is lost without an error.
        self.flush()
        super().close()

    reset = close


class TransactionSession(AsyncSession):
    """SQLAlchemy's `AsyncSession` on the connection of one user's transaction.

    Closing it flushes first.
    """

    sync_session_class = _SyncSession

    async def forget(self) -> None:
        """Forget all entities and changes: what they were made by was undone."""
        await self.run_sync(Session.close)

    @override
    async def __aexit__(
        self,
        type_: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # The session lives as long as the transaction. SQLAlchemy would close it in another task.
        if value is None:
            await self.flush()


def create_session(connection: AsyncConnection, user_id: str) -> TransactionSession:
    """Return a session of one user on a connection whose transaction others begin and end."""
    session = TransactionSession(connection, expire_on_commit=False, info={_USER: user_id})
    event.listen(session.sync_session, "before_attach", _refuse_others)
    event.listen(session.sync_session, "before_flush", _check_owners)
    return session


def owner_attribute(mapper: Mapper[Any]) -> str | None:
    """Return the attribute of an entity that names the user it belongs to, if there is one."""
    table = mapper.local_table
    column = User.__table__.c.id if table is User.__table__ else table.c.get(OWNER)
    return None if column is None else mapper.get_property_by_column(column).key


def _refuse_others(session: Session, instance: object) -> None:
    """Refuse an entity of another user when it is added, before any SQL."""
    attribute = owner_attribute(inspect(instance).mapper)
    owner = None if attribute is None else instance_dict(instance).get(attribute)
    if owner not in {None, session.info[_USER]}:
        raise IsolationError("the entity belongs to another user")


def _check_owners(
    session: Session, _context: UOWTransaction, _instances: Iterable[object] | None
) -> None:
    """Give new entities to the user of the transaction, and refuse changes of the owner."""
    for instance in session.new:
        attribute = owner_attribute(inspect(instance).mapper)
        if attribute is not None and getattr(instance, attribute) is None:
            setattr(instance, attribute, session.info[_USER])
    for instance in (*session.new, *session.dirty, *session.deleted):
        _refuse_others(session, instance)
