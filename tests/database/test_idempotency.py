"""A call with an idempotency key is applied once, even if it is repeated."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Final

import keys
import pytest
from attacks import Victim
from driver import Connection
from hypothesis import example, given
from hypothesis import strategies as st
from keys import ASKED, outcome, stored
from locks import until_waiting
from proxy import BEGIN, COMMIT, STARTUP, Fault, Proxy, until
from sqlalchemy import text

from todo_db import (
    Database,
    IdempotencyKeyReusedError,
    InvalidInputError,
    NewTask,
    OutcomeUnknownError,
    TaskNotFoundError,
    TaskRecord,
    TodoDBError,
    Transaction,
    TransactionError,
    UnavailableError,
    UserNotFoundError,
)
from todo_db.embedded import LOGIN, OWNER
from todo_db.repositories import tasks

type Answer = TaskRecord | list[TaskRecord]
type Asked = tuple[str, list[NewTask]]
type Keyed = Callable[[Database | Transaction, str], Awaitable[Answer]]

VICTIM: Final = Victim([], {})
PATIENCE: Final = 60

# Both methods that take a key, as calls of alice with that key.
METHODS: Final[dict[str, tuple[int, Keyed]]] = {
    "create": (1, lambda to, key: to.tasks.create("alice", "x", idempotency_key=key)),
    "create_many": (
        len(ASKED),
        lambda to, key: to.tasks.create_many("alice", ASKED, idempotency_key=key),
    ),
}
both = pytest.mark.parametrize(("number", "call"), METHODS.values(), ids=METHODS.keys())
both_logins = pytest.mark.parametrize("login", [LOGIN, OWNER])


@pytest.fixture
def login() -> str:
    """One login is enough for tests that do not depend on the role."""
    return LOGIN


def listed(answer: Answer) -> list[TaskRecord]:
    return answer if isinstance(answer, list) else [answer]


class TestAnswer:
    @both_logins
    async def test_of_the_first_call_is_what_is_stored(self, db: Database) -> None:
        for _, call in METHODS.values():
            for task in listed(await call(db, f"key of {call}")):
                assert task == await db.tasks.get("alice", task.id)
                assert task.created_at == task.updated_at

    async def test_keeps_every_argument(self, db: Database) -> None:
        task = await db.tasks.create(
            "alice", " Käse 🧀 ", description="", completed=True, idempotency_key="k"
        )
        assert (task.title, task.description, task.completed) == (" Käse 🧀 ", "", True)
        many = await db.tasks.create_many("alice", iter(ASKED), idempotency_key="m")
        assert [NewTask(task.title, task.description, task.completed) for task in many] == [*ASKED]
        assert [task.id for task in many] == [2, 3, 4]

    @both_logins
    async def test_of_the_same_call_is_the_first_one(self, db: Database, owner: Connection) -> None:
        await keys.first_answer_is_kept(db, owner, VICTIM)

    @both
    async def test_is_the_first_one_after_changes_and_deletions(
        self, db: Database, owner: Connection, number: int, call: Keyed
    ) -> None:
        first = await call(db, "key")
        task_ids = [task.id for task in listed(first)]

        await db.tasks.update("alice", task_ids[-1], title="changed", description="changed")
        await db.tasks.update_many("alice", task_ids, completed=True)
        assert await call(db, "key") == first
        assert (await db.tasks.get("alice", task_ids[-1])).title == "changed"
        assert await stored(owner) == (number, 1)

        await db.tasks.delete("alice", task_ids[0])
        assert await call(db, "key") == first
        await db.tasks.delete_completed("alice")
        assert await call(db, "key") == first
        assert await stored(owner) == (0, 1)

    async def test_of_no_tasks_is_no_tasks_again(self, db: Database, owner: Connection) -> None:
        for _ in range(2):
            assert await db.tasks.create_many("alice", [], idempotency_key="key") == []
            assert await stored(owner) == (0, 1)
        with pytest.raises(IdempotencyKeyReusedError):
            await db.tasks.create_many("alice", [NewTask("x")], idempotency_key="key")
        assert await stored(owner) == (0, 1)

    async def test_of_ten_thousand_tasks_is_in_their_order(
        self, db: Database, owner: Connection
    ) -> None:
        new = [NewTask(f"{n * 7919 % 10_000}", f"{n}") for n in range(10_000)]
        first = await db.tasks.create_many("alice", new, idempotency_key="key")
        assert [NewTask(task.title, task.description) for task in first] == new
        assert [task async for task in db.tasks.iterate("alice")] == first[::-1]
        assert await db.tasks.create_many("alice", new, idempotency_key="key") == first
        assert await stored(owner) == (10_000, 1)

    async def test_without_a_key_is_of_a_new_call(self, db: Database, owner: Connection) -> None:
        for _ in range(2):
            await db.tasks.create("alice", "x", idempotency_key=None)
            await db.tasks.create_many("alice", [NewTask("x")], idempotency_key=None)
        assert await stored(owner) == (4, 0)

    async def test_with_another_key_is_of_a_new_call(self, db: Database, owner: Connection) -> None:
        first = await db.tasks.create("alice", "x", idempotency_key="1")
        assert (await db.tasks.create("alice", "x", idempotency_key="2")).id > first.id
        assert await stored(owner) == (2, 2)


def fingerprint(method: str, *new: NewTask) -> object:
    return tasks._keyed(method, "key", "alice", new).values["fingerprint"]


ONE: Final = NewTask("a", "b")
# Pairs of calls that differ in one argument, also in ways that are easy to confuse.
DIFFERENT: Final[dict[str, tuple[Asked, Asked]]] = {
    "title": (("create", [ONE]), ("create", [replace(ONE, title="A")])),
    "space in the title": (("create", [ONE]), ("create", [replace(ONE, title="a ")])),
    "accent in two ways": (("create", [NewTask("é")]), ("create", [NewTask("e\u0301")])),
    "description": (("create", [ONE]), ("create", [replace(ONE, description="B")])),
    "no description": (("create", [ONE]), ("create", [replace(ONE, description=None)])),
    "empty description": (
        ("create", [NewTask("a")]),
        ("create", [replace(ONE, description="")]),
    ),
    "null as text": (("create", [NewTask("a")]), ("create", [NewTask("a", "null")])),
    "completed": (("create", [ONE]), ("create", [replace(ONE, completed=True)])),
    "method": (("create", [ONE]), ("create_many", [ONE])),
    "number": (("create_many", [ONE]), ("create_many", [ONE, ONE])),
    "none": (("create_many", []), ("create_many", [ONE])),
    "order": (
        ("create_many", [ONE, NewTask("c")]),
        ("create_many", [NewTask("c"), ONE]),
    ),
    "place of a description": (
        ("create_many", [NewTask("a", "b"), NewTask("a")]),
        ("create_many", [NewTask("a"), NewTask("a", "b")]),
    ),
    "title and description exchanged": (
        ("create", [NewTask("a", "b")]),
        ("create", [NewTask("b", "a")]),
    ),
    "quotes that would end a text": (
        ("create_many", [NewTask('a", null, false], ["b')]),
        ("create_many", [NewTask("a"), NewTask("b")]),
    ),
    "escaped character": (("create", [NewTask("a\n")]), ("create", [NewTask("a\\n")])),
    "escaped code point": (("create", [NewTask("é")]), ("create", [NewTask("\\u00e9")])),
}
# A few texts with JSON's special characters, so that many combinations are similar.
texts = st.text('a\\"[],\n:nul\u00e9', min_size=1, max_size=3)
methods = st.sampled_from(["create", "create_many"])
new_tasks = st.lists(st.builds(NewTask, texts, st.none() | texts, st.booleans()), max_size=3)
calls = st.tuples(methods, new_tasks)


class TestFingerprint:
    @pytest.mark.parametrize(("one", "other"), DIFFERENT.values(), ids=DIFFERENT.keys())
    def test_differs_with(self, one: Asked, other: Asked) -> None:
        assert fingerprint(one[0], *one[1]) != fingerprint(other[0], *other[1])

    @given(calls, calls)
    @example(("create", [NewTask("a")]), ("create", [NewTask("a")]))
    def test_is_the_same_for_the_same_call_alone(self, one: Asked, other: Asked) -> None:
        same = fingerprint(one[0], *one[1]) == fingerprint(other[0], *other[1])
        assert same == (one == other)

    @given(new_tasks, new_tasks, new_tasks)
    def test_separates_the_tasks(
        self, first: list[NewTask], second: list[NewTask], third: list[NewTask]
    ) -> None:
        one = fingerprint("create_many", *first, *second)
        assert (one == fingerprint("create_many", *first, *third)) == (second == third)

    def test_has_the_length_that_the_table_demands(self) -> None:
        assert len(str(fingerprint("create", ONE))) == 64

    def test_does_not_change_between_versions(self) -> None:
        """A changed fingerprint would refuse every call that is repeated after a deployment."""
        assert fingerprint("create_many", NewTask("Käse"), NewTask("b", "c", completed=True)) == (
            "906c128ce3fc4737ea725c0256b5e87fbb032d1fe050403602e13c46c6b5dcb2"
        )


async def make(
    db: Database, key: str, method: str, new: list[NewTask]
) -> Answer | type[TodoDBError]:
    if method == "create_many":
        return await outcome(db.tasks.create_many("alice", new, idempotency_key=key))
    (task,) = new
    return await outcome(
        db.tasks.create(
            "alice",
            task.title,
            description=task.description,
            completed=task.completed,
            idempotency_key=key,
        )
    )


class TestReusedKey:
    @both_logins
    async def test_is_refused_and_nothing_is_stored(self, db: Database, owner: Connection) -> None:
        await keys.other_arguments_are_refused(db, owner, VICTIM)

    async def test_is_refused_with_any_other_argument(
        self, db: Database, owner: Connection
    ) -> None:
        for name, (one, other) in DIFFERENT.items():
            first = await make(db, name, *one)
            before = await stored(owner)
            assert await make(db, name, *other) is IdempotencyKeyReusedError, name
            assert await make(db, name, *one) == first, name
            assert await stored(owner) == before, name

    async def test_contains_neither_key_nor_argument(self, db: Database) -> None:
        await db.tasks.create("alice", "swordfish", idempotency_key="swordfish")
        with pytest.raises(IdempotencyKeyReusedError) as caught:
            await db.tasks.create("alice", "swordfish 2", idempotency_key="swordfish")
        assert "swordfish" not in f"{caught.value!s}{caught.value!r}{caught.value.args}"
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None

    async def test_is_refused_after_its_tasks_are_gone(self, db: Database) -> None:
        task = await db.tasks.create("alice", "x", idempotency_key="key")
        await db.tasks.delete("alice", task.id)
        with pytest.raises(IdempotencyKeyReusedError):
            await db.tasks.create("alice", "y", idempotency_key="key")


class TestKey:
    @both_logins
    async def test_is_its_users_own(self, db: Database, owner: Connection) -> None:
        hers = await db.tasks.create("alice", "hers", idempotency_key="key")
        his = await db.tasks.create("bob", "his", idempotency_key="key")
        assert (hers.user_id, his.user_id) == ("alice", "bob")
        assert await db.tasks.create("alice", "hers", idempotency_key="key") == hers
        assert await db.tasks.create("bob", "his", idempotency_key="key") == his
        with pytest.raises(IdempotencyKeyReusedError):
            await db.tasks.create("bob", "hers", idempotency_key="key")
        assert (await stored(owner), await stored(owner, "bob")) == ((1, 1), (1, 1))

    async def test_is_compared_exactly(self, db: Database) -> None:
        alike = ["key", "Key", " key", "key ", "key\n", "k\u00e9y", "ke\u0301y", "k%y", "k_y", "'"]
        created = [await db.tasks.create("alice", "x", idempotency_key=key) for key in alike]
        assert len({task.id for task in created}) == len(alike)
        again = [await db.tasks.create("alice", "x", idempotency_key=key) for key in alike]
        assert again == created

    async def test_can_be_as_long_as_allowed_for_the_longest_user_id(self, db: Database) -> None:
        # Characters that do not compress: an index row holds 2,704 bytes.
        longest = "".join(chr(0x10000 + n * 3571) for n in range(255))
        await db.users.create(longest, email="longest@example.org", name="")
        first = await db.tasks.create(longest, "x", idempotency_key=longest[::-1])
        assert await db.tasks.create(longest, "x", idempotency_key=longest[::-1]) == first

    async def test_that_is_invalid_sends_no_statement(
        self, database_through_proxy: Database, proxy: Proxy
    ) -> None:
        async def refused() -> None:
            for unfit in ("", " \t", "\u200b", "k" * 256, "k\0", "\ud800", 1, True, b"key"):
                for _, call in METHODS.values():
                    with pytest.raises(InvalidInputError) as caught:
                        await call(database_through_proxy, unfit)  # type: ignore[arg-type]
                    assert caught.value.field == "idempotency_key"

        assert await proxy.turns(refused()) == 0

    @both
    async def test_of_an_unknown_user_is_not_taken(
        self, db: Database, owner: Connection, number: int, call: Keyed
    ) -> None:
        await db.users.delete("alice")
        with pytest.raises(UserNotFoundError):
            await call(db, "key")
        assert await stored(owner) == (0, 0)
        await db.users.create("alice", email="alice@example.org", name="")
        assert len(listed(await call(db, "key"))) == number
        assert await stored(owner) == (number, 1)

    async def test_of_an_unknown_user_is_not_taken_for_no_tasks_either(self, db: Database) -> None:
        with pytest.raises(UserNotFoundError):
            await db.tasks.create_many("mallory", [], idempotency_key="key")

    @both_logins
    async def test_is_deleted_with_its_user(self, db: Database, owner: Connection) -> None:
        first = await db.tasks.create("alice", "x", idempotency_key="key")
        await db.tasks.create("bob", "x", idempotency_key="key")
        await db.users.delete("alice")
        assert (await stored(owner), await stored(owner, "bob")) == ((0, 0), (1, 1))
        await db.users.create("alice", email="alice@example.org", name="")
        assert (await db.tasks.create("alice", "y", idempotency_key="key")).id > first.id

    async def test_is_free_again_once_the_owner_purged_it(
        self, db: Database, owner: Connection
    ) -> None:
        old = await db.tasks.create("alice", "x", idempotency_key="old")
        young = await db.tasks.create("alice", "x", idempotency_key="young")
        await owner.execute(
            "UPDATE idempotency_keys SET created_at = now() - interval '31 days' WHERE key = 'old'"
        )
        purge = "DELETE FROM idempotency_keys WHERE created_at < now() - interval '30 days'"
        assert await owner.execute(purge) == "DELETE 1"
        assert await db.tasks.create("alice", "x", idempotency_key="young") == young
        assert (await db.tasks.create("alice", "x", idempotency_key="old")).id > young.id
        assert await db.tasks.get("alice", old.id) == old
        assert await stored(owner) == (3, 2)


class TestAtOnce:
    @both_logins
    async def test_twenty_calls_store_once(self, db: Database, owner: Connection) -> None:
        for number, (_, call) in enumerate(METHODS.values()):
            before = await stored(owner)
            async with asyncio.timeout(PATIENCE):
                answers = await asyncio.gather(*(call(db, f"{number}") for _ in range(20)))
            assert answers == [answers[0]] * 20
            after = await stored(owner)
            assert after == (before[0] + len(listed(answers[0])), before[1] + 1)
        assert db._pool.status.size == 10

    async def test_twenty_different_calls_are_one_and_nineteen_refusals(
        self, db: Database, owner: Connection
    ) -> None:
        async with asyncio.timeout(PATIENCE):
            made = await asyncio.gather(
                *(
                    outcome(db.tasks.create("alice", f"{n}", idempotency_key="key"))
                    for n in range(20)
                )
            )
        created = [answer for answer in made if isinstance(answer, TaskRecord)]
        assert [await db.tasks.get("alice", task.id) for task in created] == created
        assert sorted(map(str, set(made) - set(created))) == [str(IdempotencyKeyReusedError)]
        assert await stored(owner) == (1, 1)

    async def test_twenty_users_do_not_wait_for_each_other(
        self, db: Database, owner: Connection
    ) -> None:
        async with db.transaction("alice") as tx, asyncio.timeout(PATIENCE):
            await tx.tasks.create("alice", "x", idempotency_key="key")
            await db.tasks.create("bob", "x", idempotency_key="key")
            await db.tasks.create("alice", "x", idempotency_key="another key")
            assert await stored(owner) == (1, 1)
        assert await stored(owner) == (2, 2)

    @both_logins
    async def test_second_call_tries_again_by_itself(self, db: Database, owner: Connection) -> None:
        await keys.second_call_finds_the_first(db, owner, VICTIM)

    @both
    async def test_second_call_has_the_answer_of_the_first(
        self, db: Database, owner: Connection, number: int, call: Keyed
    ) -> None:
        async with db.transaction("alice") as tx:
            first = await call(tx, "key")
            second = asyncio.ensure_future(call(db, "key"))
            await until_waiting(owner)
        assert await second == first
        assert await stored(owner) == (number, 1)

    @both
    async def test_second_call_stores_if_the_first_is_rolled_back(
        self, db: Database, owner: Connection, number: int, call: Keyed
    ) -> None:
        second = None
        with pytest.raises(ZeroDivisionError):
            async with db.transaction("alice") as tx:
                undone = await call(tx, "key")
                second = asyncio.ensure_future(call(db, "key"))
                await until_waiting(owner)
                raise ZeroDivisionError
        assert second is not None
        answer = await second
        assert answer != undone
        assert await call(db, "key") == answer
        assert await stored(owner) == (number, 1)

    async def test_crossing_keys_are_both_stored_once(
        self, db: Database, owner: Connection
    ) -> None:
        met = asyncio.Barrier(2)
        tries = 0

        def crossing(*order: str) -> Callable[[Transaction], Awaitable[dict[str, TaskRecord]]]:
            async def work(tx: Transaction) -> dict[str, TaskRecord]:
                nonlocal tries
                tries += 1
                answers = {}
                for key in order:
                    answers[key] = await tx.tasks.create("alice", "x", idempotency_key=key)
                    if tries <= 2 and len(answers) == 1:
                        await met.wait()
                return answers

            return work

        async with asyncio.timeout(PATIENCE):
            one, other = await asyncio.gather(
                db.run("alice", crossing("1", "2")), db.run("alice", crossing("2", "1"))
            )
        # The retry of the aborted call may start before the other one has committed.
        assert tries >= 3
        assert one == other
        assert await stored(owner) == (2, 2)

    async def test_purge_and_call_at_once_end_well(self, db: Database, owner: Connection) -> None:
        first = await db.tasks.create("alice", "x", idempotency_key="key")
        async with owner.transaction():
            await owner.execute("DELETE FROM idempotency_keys")
            # The purge is not committed, so the key is found, and no call waits.
            assert await db.tasks.create("alice", "x", idempotency_key="key") == first
        assert (await db.tasks.create("alice", "x", idempotency_key="key")).id > first.id


class TestLostConnection:
    @both_logins
    async def test_Z5_lost_commit_is_resolved(self, db: Database, owner: Connection) -> None:
        await keys.lost_commit_is_resolved(db, owner, VICTIM)

    @both
    async def test_Z5_wherever_it_is_lost_it_is_stored_once(
        self,
        database_through_proxy: Database,
        proxy: Proxy,
        owner: Connection,
        number: int,
        call: Keyed,
    ) -> None:
        for time, (pattern, fault) in enumerate(breaks()):
            key = f"key {time}"
            # The key is among the values of the statement, prepared or not.
            proxy.break_at(pattern or key.encode(), fault)
            async with asyncio.timeout(PATIENCE):
                answer = await call(database_through_proxy, key)
            assert not proxy.pending, (pattern, fault)
            assert await stored(owner) == (number * (time + 1), time + 1)
            assert await call(database_through_proxy, key) == answer
            for task in listed(answer):
                assert await database_through_proxy.tasks.get("alice", task.id) == task

    async def test_answer_of_the_server_may_be_lost_twice(
        self, database_through_proxy: Database, proxy: Proxy, owner: Connection
    ) -> None:
        proxy.break_at(COMMIT, Fault.CUT_AFTER, times=2)
        task = await database_through_proxy.tasks.create("alice", "x", idempotency_key="key")
        assert not proxy.pending
        assert await database_through_proxy.tasks.get("alice", task.id) == task
        assert await stored(owner) == (1, 1)

    @both
    async def test_Z5_unknown_after_all_tries_is_resolved_by_the_next_call(
        self, db: Database, proxy: Proxy, owner: Connection, number: int, call: Keyed
    ) -> None:
        async with Database.from_url(
            proxy.url, retry_attempts=2, connect_retry_seconds=0
        ) as database_through_proxy:
            for time, fault in enumerate((Fault.CUT_BEFORE, Fault.CUT_AFTER)):
                key = f"key {time}"
                proxy.break_at(COMMIT, fault)
                proxy.break_at(STARTUP, Fault.CUT_BEFORE)
                with pytest.raises(OutcomeUnknownError):
                    await call(database_through_proxy, key)
                assert not proxy.pending
                answer = await call(database_through_proxy, key)
                assert await call(db, key) == answer
                assert await stored(owner) == (number * (time + 1), time + 1)

    async def test_another_call_stays_unknown_without_a_key(
        self, database_through_proxy: Database, proxy: Proxy, owner: Connection
    ) -> None:
        proxy.break_at(COMMIT, Fault.CUT_AFTER)
        with pytest.raises(OutcomeUnknownError):
            await database_through_proxy.tasks.create("alice", "x")
        assert await stored(owner) == (1, 0)

    @pytest.mark.parametrize("login", [OWNER])
    async def test_F03_backend_that_is_killed_half_way_stores_nothing(
        self, db: Database, owner: Connection
    ) -> None:
        async with owner.transaction():
            # The tasks are inserted now, the key is not.
            await owner.execute("LOCK idempotency_keys IN EXCLUSIVE MODE")
            call = asyncio.ensure_future(db.tasks.create("alice", "x", idempotency_key="key"))
            await until_waiting(owner)
            await owner.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'todo_db' AND datname = current_database()"
                " AND wait_event_type = 'Lock'"
            )
        task = await call
        assert await db.tasks.create("alice", "x", idempotency_key="key") == task
        assert await stored(owner) == (1, 1)

    async def test_client_that_is_gone_before_its_commit_leaves_the_key_free(
        self, database_through_proxy: Database, db: Database, proxy: Proxy, owner: Connection
    ) -> None:
        with pytest.raises(UnavailableError):
            async with database_through_proxy.transaction("alice") as tx:
                await tx.tasks.create("alice", "lost", idempotency_key="key")
                await proxy.cut()
                await until(tx._gate.connection.driver.is_closed)
        async with asyncio.timeout(PATIENCE):
            task = await db.tasks.create("alice", "kept", idempotency_key="key")
        assert [found async for found in db.tasks.iterate("alice")] == [task]
        assert await stored(owner) == (1, 1)

    async def test_cancelled_call_is_resolved_by_the_next_one(
        self, db: Database, owner: Connection
    ) -> None:
        async with owner.transaction():
            await owner.execute("LOCK idempotency_keys IN EXCLUSIVE MODE")
            call = asyncio.ensure_future(db.tasks.create("alice", "x", idempotency_key="key"))
            await until_waiting(owner)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        async with asyncio.timeout(PATIENCE):
            task = await db.tasks.create("alice", "x", idempotency_key="key")
        assert await db.tasks.create("alice", "x", idempotency_key="key") == task
        assert await stored(owner) == (1, 1)


def breaks() -> Iterator[tuple[bytes | None, Fault]]:
    """Yield each point of a call to break it, and whether the server gets the message."""
    for pattern in (BEGIN, None, COMMIT):
        for fault in (Fault.CUT_BEFORE, Fault.CUT_AFTER):
            yield pattern, fault


class TestInATransaction:
    @both_logins
    @both
    async def test_key_is_stored_with_it(
        self, db: Database, owner: Connection, number: int, call: Keyed
    ) -> None:
        async with db.transaction("alice") as tx:
            first = await call(tx, "key")
            assert await stored(owner) == (0, 0)
        assert await stored(owner) == (number, 1)
        assert await call(db, "key") == first

    @both
    async def test_key_is_free_again_when_it_is_undone(
        self, db: Database, owner: Connection, number: int, call: Keyed
    ) -> None:
        with pytest.raises(ZeroDivisionError):
            async with db.transaction("alice") as tx:
                await call(tx, "key")
                raise ZeroDivisionError
        assert await stored(owner) == (0, 0)
        await db.tasks.create("alice", "another", idempotency_key="key")
        assert await stored(owner) == (1, 1)
        assert len(listed(await call(db, "key of its own"))) == number

    async def test_key_is_free_again_behind_a_savepoint(
        self, db: Database, owner: Connection
    ) -> None:
        async with db.transaction("alice") as tx:
            with pytest.raises(ZeroDivisionError):
                async with tx.savepoint():
                    await tx.tasks.create("alice", "undone", idempotency_key="key")
                    raise ZeroDivisionError
            task = await tx.tasks.create("alice", "kept", idempotency_key="key")
        assert await db.tasks.create("alice", "kept", idempotency_key="key") == task
        assert await stored(owner) == (1, 1)

    @both
    async def test_same_call_twice_is_done_once(
        self, db: Database, owner: Connection, number: int, call: Keyed
    ) -> None:
        async with db.transaction("alice") as tx:
            first = await call(tx, "key")
            await tx.tasks.update_many("alice", [listed(first)[0].id], title="changed")
            assert await call(tx, "key") == first
        assert await stored(owner) == (number, 1)

    async def test_call_of_before_has_its_answer(self, db: Database, owner: Connection) -> None:
        first = await db.tasks.create("alice", "x", idempotency_key="key")
        async with db.transaction("alice") as tx:
            assert await tx.tasks.create("alice", "x", idempotency_key="key") == first
        assert await stored(owner) == (1, 1)

    @both
    async def test_reused_key_leaves_it_usable(
        self, db: Database, owner: Connection, number: int, call: Keyed
    ) -> None:
        await db.tasks.create("alice", "another", idempotency_key="key")
        async with db.transaction("alice") as tx:
            before = await tx.tasks.create("alice", "before")
            with pytest.raises(IdempotencyKeyReusedError):
                await call(tx, "key")
            await call(tx, "a key of its own")
            assert await tx.tasks.get("alice", before.id) == before
        assert await stored(owner) == (2 + number, 2)

    @both
    async def test_unknown_user_leaves_it_usable(
        self, db: Database, owner: Connection, number: int, call: Keyed
    ) -> None:
        await db.users.delete("alice")
        async with db.transaction("alice") as tx:
            with pytest.raises(UserNotFoundError):
                await call(tx, "key")
            await tx.users.create("alice", email="alice@example.org", name="")
            await call(tx, "key")
        assert await stored(owner) == (number, 1)

    @both_logins
    async def test_lost_race_leaves_it_usable(self, db: Database, owner: Connection) -> None:
        await keys.lost_race_leaves_a_transaction_usable(db, owner, VICTIM)

    async def test_lost_race_says_that_it_may_be_tried_again(
        self, db: Database, owner: Connection
    ) -> None:
        with pytest.raises(UnavailableError) as caught:
            async with db.transaction("alice") as tx:
                async with keys.claimed(owner, "key"):
                    call = asyncio.ensure_future(
                        tx.tasks.create("alice", "x", idempotency_key="key")
                    )
                await call
        assert caught.value.transient

    async def test_read_only_one_does_not_take_it(self, db: Database, owner: Connection) -> None:
        with pytest.raises(TransactionError):
            async with db.transaction("alice", read_only=True) as tx:
                await tx.tasks.create("alice", "x", idempotency_key="key")
        assert await stored(owner) == (0, 0)

    async def test_own_statement_of_the_caller_sees_what_it_stored(self, db: Database) -> None:
        async with db.transaction("alice") as tx:
            task = await tx.tasks.create("alice", "x", idempotency_key="key")
            found = await tx.execute(text("SELECT key, task_ids, created_at FROM idempotency_keys"))
            assert [tuple(row) for row in found] == [("key", [task.id], task.created_at)]


class TestRun:
    async def test_is_run_again_and_stored_once(self, db: Database, owner: Connection) -> None:
        tries = 0

        async def work(tx: Transaction) -> TaskRecord:
            nonlocal tries
            tries += 1
            await tx.tasks.create("alice", "with it")
            return await tx.tasks.create("alice", "x", idempotency_key="key")

        async with db.transaction("alice") as tx:
            first = await tx.tasks.create("alice", "x", idempotency_key="key")
            second = asyncio.ensure_future(db.run("alice", work))
            await until_waiting(owner)
        assert await second == first
        assert tries == 2
        assert await stored(owner) == (2, 1)

    @pytest.mark.parametrize("fault", [Fault.CUT_BEFORE, Fault.CUT_AFTER])
    async def test_Z5_unknown_one_may_be_run_again_by_the_caller(
        self, database_through_proxy: Database, proxy: Proxy, owner: Connection, fault: Fault
    ) -> None:
        async def work(tx: Transaction) -> list[TaskRecord]:
            one = await tx.tasks.create("alice", "x", idempotency_key="1")
            return [one, *await tx.tasks.create_many("alice", ASKED, idempotency_key="2")]

        proxy.break_at(COMMIT, fault)
        with pytest.raises(OutcomeUnknownError):
            await database_through_proxy.run("alice", work)
        assert not proxy.pending
        answer = await database_through_proxy.run("alice", work)
        assert await database_through_proxy.run("alice", work) == answer
        assert [
            await database_through_proxy.tasks.get("alice", task.id) for task in answer
        ] == answer
        assert await stored(owner) == (4, 2)

    async def test_other_user_is_not_found(self, db: Database) -> None:
        hers = await db.tasks.create("alice", "x", idempotency_key="key")

        async def work(tx: Transaction) -> TaskRecord:
            return await tx.tasks.create("bob", "x", idempotency_key="key")

        his = await db.run("bob", work)
        assert his.id != hers.id
        with pytest.raises(TaskNotFoundError):
            await db.tasks.get("bob", hers.id)
