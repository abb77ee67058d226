"""The repository of users, and its statements."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final, Unpack

from sqlalchemy import BindParameter, ColumnElement, Executable, Text, bindparam, delete, select
from sqlalchemy import update as update_
from sqlalchemy.dialects.postgresql import insert

from todo_db import inputs
from todo_db.errors import EmailTakenError, TodoDBError, UnavailableError, UserNotFoundError
from todo_db.inputs import UserChanges
from todo_db.models import User
from todo_db.records import UserRecord, makers_of
from todo_db.repositories.statements import Executor, Operation, Retry, Row, Statement

_COLUMNS: Final = (
    User.id,
    User.email,
    User.username,
    User.name,
    User.email_verified,
    User.image,
    User.created_at,
    User.updated_at,
)
_ENSURE_TRIES: Final = 3
_record, _ = makers_of(UserRecord)


class UserRepository:
    """One user's row of `users`. Every method takes `user_id` first, and reaches only that row.

    Transactions, retries and the errors of every method are as for `TaskRepository`.

    Args:
        executor: A `Database` or a `Transaction`.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def create(
        self, user_id: str, *, email: str, name: str, username: str | None = None
    ) -> UserRecord:
        """Store a new user under the id that your authentication provides.

        One INSERT. The e-mail address is stored in lower case.

        ```python
        await db.users.create("carol", email="Carol@example.org", name="Carol")
        ```

        Raises:
            UserIdTakenError: A user with this id exists.
            EmailTakenError: Another user has this e-mail address.
            UsernameTakenError: Another user has this username.
        """
        user_id = inputs.user_id(user_id)
        values = {
            "email": inputs.email(email),
            "name": inputs.name(name),
            "username": inputs.username(username),
        }
        return await self._executor.perform(user_id, Operation(_CREATE, values, _one))

    async def ensure(self, user_id: str, *, email: str, name: str) -> UserRecord:
        """Return the user; store it first if it does not exist. An existing row is not changed.

        One INSERT … ON CONFLICT, run up to three times if another call stores the same user at
        the same time. In a transaction it is wrapped in a savepoint.

        ```python
        user = await db.users.ensure("carol", email="another@example.org", name="Carol")
        assert user.email == "carol@example.org"
        ```

        Raises:
            EmailTakenError: There is no such user, and another user has this e-mail address.
        """
        user_id = inputs.user_id(user_id)
        values = {"email": inputs.email(email), "name": inputs.name(name)}
        operation = Operation(_ENSURE, values, _one_or_none, Retry.IDEMPOTENT, needs_savepoint=True)
        failure: TodoDBError = UnavailableError("the user was stored and deleted all the time")
        for _ in range(_ENSURE_TRIES):
            try:
                user = await self._executor.perform(user_id, operation)
            except EmailTakenError as error:
                failure = error
            else:
                if user is not None:
                    return user
        raise failure

    async def get(self, user_id: str) -> UserRecord:
        """Return the user.

        One SELECT by primary key; takes no lock.

        ```python
        assert (await db.users.get("carol")).name == "Carol"
        ```

        Raises:
            UserNotFoundError: There is no such user.
        """
        user_id = inputs.user_id(user_id)
        return await self._executor.perform(user_id, Operation(_GET, {}, _one, Retry.READ_ONLY))

    async def update(self, user_id: str, /, **changes: Unpack[UserChanges]) -> UserRecord:
        """Change the given columns; without any, return the user as `get` does.

        One UPDATE; locks the row. The e-mail address is not among them, so that an API which hands
        the body of a request on cannot change it: see `set_email`.

        ```python
        await db.users.update("carol", username="carol", image=None)
        ```

        Args:
            user_id: The user.
            **changes: `name`, `username`, `image`; None means NULL.

        Raises:
            UserNotFoundError: There is no such user.
            UsernameTakenError: Another user has this username.
        """
        user_id = inputs.user_id(user_id)
        new = inputs.user_changes(changes)
        if not new:
            return await self.get(user_id)
        values: Mapping[str, object] = {f"new_{field}": value for field, value in new.items()}
        operation = Operation(_update_statement(frozenset(new)), values, _one, Retry.IDEMPOTENT)
        return await self._executor.perform(user_id, operation)

    async def set_email(self, user_id: str, *, email: str) -> UserRecord:
        """Store the e-mail address that the authentication gave, in lower case.

        One UPDATE; locks the row. A trigger sets `email_verified` to false if the address changes.

        ```python
        await db.users.set_email("carol", email="carol@example.com")
        ```

        Raises:
            UserNotFoundError: There is no such user.
            EmailTakenError: Another user has this e-mail address.
        """
        user_id = inputs.user_id(user_id)
        values = {"email": inputs.email(email)}
        operation = Operation(_SET_EMAIL, values, _one, Retry.IDEMPOTENT)
        return await self._executor.perform(user_id, operation)

    async def delete(self, user_id: str) -> None:
        """Delete the user and, by cascade, all the user's tasks.

        One DELETE; locks all these rows until the commit.

        ```python
        await db.users.delete("carol")
        ```

        Raises:
            UserNotFoundError: There is no such user.
        """
        user_id = inputs.user_id(user_id)
        await self._executor.perform(
            user_id, Operation(_DELETE, {}, _found, Retry.IDEMPOTENT_DELETE)
        )


def _one(rows: Sequence[Row]) -> UserRecord:
    if not rows:
        raise UserNotFoundError
    return _record(rows[0])


def _one_or_none(rows: Sequence[Row]) -> UserRecord | None:
    return _record(rows[0]) if rows else None


def _found(rows: Sequence[Row]) -> None:
    if not rows:
        raise UserNotFoundError


_NEW: Final[dict[str, BindParameter[Any]]] = {
    field: bindparam(f"new_{field}", type_=Text()) for field in ("name", "username", "image")
}


@cache
def _update_statement(columns: frozenset[str]) -> Statement:
    new = {field: parameter for field, parameter in _NEW.items() if field in columns}
    return Statement(
        lambda owner: update_(User).where(User.id == owner).values(new).returning(*_COLUMNS),
        name="users.update",
    )


def _ensure(owner: ColumnElement[str]) -> Executable:
    created = (
        insert(User)
        .values(id=owner, email=bindparam("email"), name=bindparam("name"))
        .on_conflict_do_nothing(index_elements=[User.id])
        .returning(*_COLUMNS)
        .cte("created")
    )
    # The SELECT does not see a row that its own statement stored, so only one part returns it.
    return select(created).union_all(select(*_COLUMNS).where(User.id == owner))


_CREATE: Final = Statement(
    lambda owner: (
        insert(User)
        .values(
            id=owner,
            email=bindparam("email"),
            name=bindparam("name"),
            username=bindparam("username"),
        )
        .returning(*_COLUMNS)
    ),
    name="users.create",
)
_ENSURE: Final = Statement(_ensure, name="users.ensure")
_GET: Final = Statement(lambda owner: select(*_COLUMNS).where(User.id == owner), name="users.get")
_SET_EMAIL: Final = Statement(
    lambda owner: (
        update_(User).where(User.id == owner).values(email=bindparam("email")).returning(*_COLUMNS)
    ),
    name="users.set_email",
)
_DELETE: Final = Statement(
    lambda owner: delete(User).where(User.id == owner).returning(User.id), name="users.delete"
)
