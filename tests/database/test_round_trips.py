"""The round trips of each call, counted at the socket."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from inspect import getmembers, isfunction
from typing import Any

import pytest
import pytest_asyncio
from driver import Connection
from every_method import CALLS, Call, People, iterated, second_page
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
            await second_page(one_connection, user, sort)
            assert await proxy.turns(second_page(one_connection, user, sort)) == 3 + 3

    async def test_iterate_costs_three_for_every_five_hundred_tasks(
        self, one_connection: Database, proxy: Proxy, people: People
    ) -> None:
        user, _ = await people.present()
        await one_connection.tasks.create_many(user, [NewTask("Buy milk")] * 500)
        assert len(await iterated(one_connection, user)) == 503
        assert await proxy.turns(iterated(one_connection, user)) == 3 + 3

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
