"""The round trips of each call, counted at the socket."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from inspect import getmembers, isfunction
from itertools import count
from typing import Any, Final

import pytest
import pytest_asyncio
from driver import Connection
from proxy import Proxy
from sqlalchemy import func, select

from todo_db import (
    Database,
    NewTask,
    TaskRepository,
    TaskSort,
    TodoDBError,
    Transaction,
    UserRepository,
)
from todo_db.embedded import LOGIN, OWNER
from todo_db.models import Task

type Call = Callable[[Database | Transaction, str, Sequence[int]], Awaitable[object]]

LONG_AGO: Final = datetime(2020, 1, 1, tzinfo=UTC)


async def _second_page(to: Database | Transaction, user: str, sort: TaskSort) -> object:
    page = await to.tasks.list(user, sort=sort, limit=1)
    return await to.tasks.list(user, sort=sort, limit=1, cursor=page.next_cursor)


async def _iterated(to: Database | Transaction, user: str) -> list[object]:
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
    "tasks.iterate": (lambda to, user, _ids: _iterated(to, user),),
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


def _public(repository: type) -> set[str]:
    return {name for name, _ in getmembers(repository, isfunction) if not name.startswith("_")}


@pytest.fixture
def login() -> str:
    """One login is enough, except for the calls."""
    return LOGIN


@pytest_asyncio.fixture
async def one_connection(proxy: Proxy) -> AsyncGenerator[Database]:
    """A Database through the proxy, with one connection that keeps its prepared statements."""
    async with Database.from_url(
        proxy.url, pool_size=1, max_overflow=0, retry_attempts=1
    ) as database:
        yield database


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


@pytest.fixture
def people(owner: Connection) -> People:
    return People(owner)


class TestCalls:
    def test_table_has_a_line_for_every_public_method(self) -> None:
        assert {name.partition(" ")[0] for name in CALLS} == (
            {f"tasks.{name}" for name in _public(TaskRepository)}
            | {f"users.{name}" for name in _public(UserRepository)}
        )

    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_on_a_database_each_is_three(
        self, one_connection: Database, proxy: Proxy, people: People
    ) -> None:
        counted: dict[str, list[int]] = {}
        for name, calls in CALLS.items():
            for call in calls:
                with suppress(TodoDBError):  # the first use of its statement
                    await call(one_connection, *await people.present())
                present = await proxy.turns(call(one_connection, *await people.present()))
                absent = await proxy.turns(call(one_connection, *people.absent()))
                counted.setdefault(name, []).extend((present, absent))
        assert counted == {name: [3, 3] * len(calls) for name, calls in CALLS.items()}

    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_in_a_transaction_each_is_one_or_three_with_a_savepoint(
        self, one_connection: Database, proxy: Proxy, people: People
    ) -> None:
        async def turns(call: Call, user: str, ids: Sequence[int]) -> int:
            turns = 0
            with suppress(TodoDBError):
                async with one_connection.transaction(user) as tx:
                    turns = await proxy.turns(call(tx, user, ids))
            return turns

        counted: dict[str, list[int]] = {}
        for name, calls in CALLS.items():
            for call in calls:
                await turns(call, *await people.present())  # the first use of its statement
                present = await turns(call, *await people.present())
                absent = await turns(call, *people.absent())
                counted.setdefault(name, []).extend((present, absent))
        expected = {name: [1, 1] * len(calls) for name, calls in CALLS.items()}
        for name in ("tasks.create with a key", "tasks.create_many with a key", "users.ensure"):
            expected[name] = [3, 3]
        assert counted == expected

    async def test_first_use_of_a_statement_on_a_connection_costs_one_more(
        self, one_connection: Database, proxy: Proxy, people: People
    ) -> None:
        user, ids = await people.present()
        assert await proxy.turns(one_connection.tasks.get(user, ids[0])) == 4
        assert await proxy.turns(one_connection.tasks.get(user, ids[1])) == 3

    async def test_a_repeated_call_with_a_key_costs_what_the_first_one_costs(
        self, one_connection: Database, proxy: Proxy, people: People
    ) -> None:
        for name in ("tasks.create with a key", "tasks.create_many with a key"):
            (call,) = CALLS[name]
            user, _ = await people.present()
            await call(one_connection, user, ())
            assert await proxy.turns(call(one_connection, user, ())) == 3
            async with one_connection.transaction(user) as tx:
                assert await proxy.turns(call(tx, user, ())) == 3

    async def test_a_later_page_costs_what_the_first_one_costs(
        self, one_connection: Database, proxy: Proxy, people: People
    ) -> None:
        user, _ = await people.present()
        for sort in TaskSort:
            await _second_page(one_connection, user, sort)
            assert await proxy.turns(_second_page(one_connection, user, sort)) == 3 + 3

    async def test_iterate_costs_three_for_every_five_hundred_tasks(
        self, one_connection: Database, proxy: Proxy, people: People
    ) -> None:
        user, _ = await people.present()
        await one_connection.tasks.create_many(user, [NewTask("Buy milk")] * 500)
        assert len(await _iterated(one_connection, user)) == 503
        assert await proxy.turns(_iterated(one_connection, user)) == 3 + 3

    async def test_refused_input_costs_nothing(
        self, one_connection: Database, proxy: Proxy
    ) -> None:
        async def refused() -> None:
            with pytest.raises(ValueError, match="title"):
                await one_connection.tasks.create("alice", "")
            assert await one_connection.tasks.update_many("alice", [1]) == 0

        assert await proxy.turns(refused()) == 0


class TestTransaction:
    async def test_begin_and_its_end_are_one_each(
        self, one_connection: Database, proxy: Proxy
    ) -> None:
        async def nothing(*, read_only: bool) -> None:
            before = proxy.round_trips
            async with one_connection.transaction("alice", read_only=read_only):
                assert proxy.round_trips == before + 1

        assert await proxy.turns(nothing(read_only=False)) == 2
        assert await proxy.turns(nothing(read_only=True)) == 2

    async def test_rollback_is_one(self, one_connection: Database, proxy: Proxy) -> None:
        async def failing() -> None:
            with pytest.raises(LookupError):
                async with one_connection.transaction("alice"):
                    raise LookupError

        assert await proxy.turns(failing()) == 2

    async def test_savepoint_is_two(self, one_connection: Database, proxy: Proxy) -> None:
        async def kept(tx: Transaction) -> None:
            async with tx.savepoint():
                pass

        async def undone(tx: Transaction) -> None:
            with pytest.raises(LookupError):
                async with tx.savepoint():
                    raise LookupError

        async with one_connection.transaction("alice") as tx:
            assert await proxy.turns(kept(tx)) == 2
            assert await proxy.turns(undone(tx)) == 2

    async def test_own_statement_is_one(self, one_connection: Database, proxy: Proxy) -> None:
        async def asked(tx: Transaction) -> Any:  # noqa: ANN401  # a count
            return (await tx.execute(select(func.count()).select_from(Task))).scalar_one()

        async with one_connection.transaction("alice") as tx:
            await asked(tx)
            assert await proxy.turns(asked(tx)) == 1
        async with one_connection.transaction("bob") as tx:
            assert await proxy.turns(asked(tx)) == 1


class TestDatabase:
    async def test_health_is_three(self, one_connection: Database, proxy: Proxy) -> None:
        assert (await one_connection.health()).ok
        assert await proxy.turns(one_connection.health()) == 3

    async def test_open_again_is_none(self, one_connection: Database, proxy: Proxy) -> None:
        assert await proxy.turns(one_connection.open()) == 0
