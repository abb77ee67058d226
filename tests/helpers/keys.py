"""Checks of the guarantees of idempotency keys. Two kinds of tests use them: those that run on the
whole package, and those that remove a part of it and expect the same check to fail.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from typing import Final

from attacks import Victim
from driver import Connection
from locks import until_waiting
from proxy import COMMIT, Fault, Proxy

from todo_db import Database, IdempotencyKeyReusedError, NewTask, TodoDBError, UnavailableError

ASKED: Final = (NewTask("z"), NewTask("a", "", completed=True), NewTask("m", "null"))


async def outcome[T](call: Awaitable[T]) -> T | type[TodoDBError]:
    """Return the result of a call, or the error of the package that it raises."""
    try:
        return await call
    except TodoDBError as error:
        return type(error)


async def stored(owner: Connection, user_id: str = "alice") -> tuple[int, int]:
    """Count a user's tasks and keys, as the owner."""
    row = await owner.fetchrow(
        "SELECT (SELECT count(*) FROM tasks WHERE user_id = $1),"
        " (SELECT count(*) FROM idempotency_keys WHERE user_id = $1)",
        user_id,
    )
    assert row is not None
    return row[0], row[1]


@asynccontextmanager
async def claimed(owner: Connection, key: str) -> AsyncGenerator[None]:
    """A key of alice that another transaction stores, and commits at the end of the block.

    The block makes calls with the same key. It ends when one of them waits.
    """
    async with owner.transaction():
        await owner.execute(
            "INSERT INTO idempotency_keys (user_id, key, fingerprint, task_ids)"
            " VALUES ('alice', $1, repeat('0', 64), '{}')",
            key,
        )
        yield
        await until_waiting(owner)


async def first_answer_is_kept(db: Database, owner: Connection, _victim: Victim) -> None:
    tasks, keys = await stored(owner)
    one = await db.tasks.create("alice", "x", description="y", completed=True, idempotency_key="1")
    many = await db.tasks.create_many("alice", ASKED, idempotency_key="2")
    for _ in range(2):
        again = db.tasks.create("alice", "x", description="y", completed=True, idempotency_key="1")
        assert await outcome(again) == one
        assert await outcome(db.tasks.create_many("alice", ASKED, idempotency_key="2")) == many
        assert await stored(owner) == (tasks + 4, keys + 2)


async def other_arguments_are_refused(db: Database, owner: Connection, _victim: Victim) -> None:
    first = await db.tasks.create("alice", "x", idempotency_key="1")
    before = await stored(owner)
    other = await outcome(db.tasks.create("alice", "y", idempotency_key="1"))
    assert other is IdempotencyKeyReusedError
    assert await stored(owner) == before
    assert await outcome(db.tasks.create("alice", "x", idempotency_key="1")) == first


async def lost_commit_is_resolved(db: Database, owner: Connection, _victim: Victim) -> None:
    url = db.settings.database_url
    assert url is not None
    async with (
        Proxy(url.get_secret_value()) as proxy,
        Database.from_url(proxy.url, pool_size=1, max_overflow=0) as database_through_proxy,
    ):
        for number, fault in enumerate((Fault.CUT_BEFORE, Fault.CUT_AFTER)):
            tasks, keys = await stored(owner)
            key = f"lost {number}"
            proxy.break_at(COMMIT, fault)
            created = await outcome(
                database_through_proxy.tasks.create_many("alice", ASKED, idempotency_key=key)
            )
            assert not proxy.pending
            assert await stored(owner) == (tasks + 3, keys + 1)
            assert created == await db.tasks.create_many("alice", ASKED, idempotency_key=key)
            assert isinstance(created, list)
            assert created == [await db.tasks.get("alice", task.id) for task in created]


async def second_call_finds_the_first(db: Database, owner: Connection, _victim: Victim) -> None:
    """The second of two calls at the same time waits, and is retried after it lost."""
    tasks, keys = await stored(owner)
    call = outcome(db.tasks.create("alice", "x", idempotency_key="1"))
    async with claimed(owner, "1"):
        second = asyncio.create_task(call)
    assert await second is IdempotencyKeyReusedError
    assert await stored(owner) == (tasks, keys + 1)


async def lost_race_leaves_a_transaction_usable(
    db: Database, owner: Connection, _victim: Victim
) -> None:
    tasks, keys = await stored(owner)
    async with db.transaction("alice") as tx:
        await tx.tasks.create("alice", "before")
        async with claimed(owner, "1"):
            call = outcome(tx.tasks.create("alice", "x", idempotency_key="1"))
            second = asyncio.create_task(call)
        assert await second is UnavailableError
        # The first call has committed, so its key is found now.
        call = outcome(tx.tasks.create("alice", "x", idempotency_key="1"))
        assert await call is IdempotencyKeyReusedError
        await tx.tasks.create("alice", "after")
    assert await stored(owner) == (tasks + 2, keys + 1)
