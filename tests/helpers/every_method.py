"""Every public method of the repositories, in each of its shapes, and users to call them as."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from itertools import count
from typing import Final

from driver import Connection

from todo_db import Database, NewTask, TaskSort, Transaction

type Call = Callable[[Database | Transaction, str, Sequence[int]], Awaitable[object]]

LONG_AGO: Final = datetime(2020, 1, 1, tzinfo=UTC)


async def second_page(to: Database | Transaction, user: str, sort: TaskSort) -> object:
    page = await to.tasks.list(user, sort=sort, limit=1)
    return await to.tasks.list(user, sort=sort, limit=1, cursor=page.next_cursor)


async def iterated(to: Database | Transaction, user: str) -> list[object]:
    return [task async for task in to.tasks.iterate(user)]


# Every public method, in each of its shapes. A user's three tasks are `ids`.
CALLS: Final[dict[str, tuple[Call, ...]]] = {
    "tasks.count": (
        lambda to, user, _ids: to.tasks.count(user),
        lambda to, user, _ids: to.tasks.count(user, completed=True, search="milk"),
    ),
    "tasks.create": (
        lambda to, user, _ids: to.tasks.create(user, "Buy milk"),
        lambda to, user, _ids: to.tasks.create(user, "Buy", description="Milk", completed=True),
    ),
    "tasks.create_many": (
        lambda to, user, _ids: to.tasks.create_many(user, [NewTask("Buy milk")] * 100),
    ),
    "tasks.create with a key": (
        lambda to, user, _ids: to.tasks.create(user, "Buy milk", idempotency_key="key"),
    ),
    "tasks.create_many with a key": (
        lambda to, user, _ids: to.tasks.create_many(
            user, [NewTask("Buy milk")] * 100, idempotency_key="key"
        ),
    ),
    "tasks.delete": (lambda to, user, ids: to.tasks.delete(user, ids[0]),),
    "tasks.delete_completed": (lambda to, user, _ids: to.tasks.delete_completed(user),),
    "tasks.delete_many": (
        lambda to, user, ids: to.tasks.delete_many(user, ids),
        lambda to, user, ids: to.tasks.delete_many(user, [*ids, *range(10_000, 10_097)]),
    ),
    "tasks.get": (lambda to, user, ids: to.tasks.get(user, ids[0]),),
    "tasks.iterate": (lambda to, user, _ids: iterated(to, user),),
    "tasks.list": (
        *(lambda to, user, _ids, sort=sort: to.tasks.list(user, sort=sort) for sort in TaskSort),
        lambda to, user, _ids: to.tasks.list(user, completed=False, search="%", limit=1),
    ),
    "tasks.toggle": (lambda to, user, ids: to.tasks.toggle(user, ids[0]),),
    "tasks.update": (
        lambda to, user, ids: to.tasks.update(user, ids[0], title="Buy bread"),
        lambda to, user, ids: to.tasks.update(user, ids[0], description=None, completed=True),
        lambda to, user, ids: to.tasks.update(user, ids[0]),
        lambda to, user, ids: to.tasks.update(
            user, ids[0], expected_updated_at=LONG_AGO, completed=True
        ),
    ),
    "tasks.update_many": (
        lambda to, user, ids: to.tasks.update_many(
            user, [*ids, *range(10_000, 10_097)], completed=True
        ),
    ),
    "users.create": (
        lambda to, user, _ids: to.users.create(user, email=f"{user}@example.org", name=user),
    ),
    "users.delete": (lambda to, user, _ids: to.users.delete(user),),
    "users.set_email": (
        lambda to, user, _ids: to.users.set_email(user, email=f"{user}@example.net"),
    ),
    "users.get": (lambda to, user, _ids: to.users.get(user),),
    "users.ensure": (
        lambda to, user, _ids: to.users.ensure(user, email=f"{user}@example.org", name=user),
    ),
    "users.update": (
        lambda to, user, _ids: to.users.update(user, name="New", username=None),
        lambda to, user, _ids: to.users.update(user),
    ),
}


class People:
    """Creates users as the owner, one for each call to count."""

    def __init__(self, owner: Connection) -> None:
        self._owner = owner
        self._numbers = count(1)

    async def present(self) -> tuple[str, Sequence[int]]:
        user, _ = self.absent()
        await self._owner.execute(
            "INSERT INTO users (id, email) VALUES ($1, $2)", user, f"{user}@example.org"
        )
        rows = await self._owner.fetch(
            "INSERT INTO tasks (user_id, title) SELECT $1, 'Buy milk' FROM generate_series(1, 3)"
            " RETURNING id",
            user,
        )
        return user, [row["id"] for row in rows]

    def absent(self) -> tuple[str, Sequence[int]]:
        return f"user-{next(self._numbers)}", [999_999]
