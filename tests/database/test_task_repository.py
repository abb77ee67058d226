import asyncio
import inspect
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import Any, TypedDict, Unpack

import pytest
import pytest_asyncio
from driver import Connection
from locks import until_waiting

from todo_db import (
    Database,
    InvalidCursorError,
    IsolationError,
    NewTask,
    NotFoundError,
    StaleTaskError,
    TaskChanges,
    TaskNotFoundError,
    TaskRecord,
    TaskRepository,
    TaskSort,
    TransactionAbortedError,
    TransactionError,
    UserNotFoundError,
)
from todo_db.repositories import tasks

MISSING = 2**62
PATIENCE = 60

ORDERS: dict[TaskSort, Callable[[TaskRecord], Any]] = {
    TaskSort.NEWEST: lambda task: -task.id,
    TaskSort.OLDEST: lambda task: task.id,
    TaskSort.RECENTLY_UPDATED: lambda task: (
        datetime.max.replace(tzinfo=UTC) - task.updated_at,
        -task.id,
    ),
    TaskSort.TITLE: lambda task: (task.title, task.id),
}


class Query(TypedDict, total=False):
    completed: bool | None
    search: str | None
    sort: TaskSort


@pytest_asyncio.fixture
async def bobs_task(db: Database) -> TaskRecord:
    """A task of bob, which mallory, another user, must not reach."""
    await db.users.create("mallory", email="mallory@example.org", name="Mallory")
    return await db.tasks.create("bob", "secret", description="of bob's")


async def in_pages(
    db: Database, user_id: str, *, limit: int, **query: Unpack[Query]
) -> list[TaskRecord]:
    found: list[TaskRecord] = []
    cursor: str | None = None
    while True:
        page = await db.tasks.list(user_id, limit=limit, cursor=cursor, **query)
        assert len(page.items) <= limit
        found.extend(page.items)
        if page.next_cursor is None:
            return found
        assert len(page.items) == limit
        cursor = page.next_cursor


async def everything(tasks: AsyncIterator[TaskRecord]) -> list[TaskRecord]:
    return [task async for task in tasks]


def titles(tasks: Iterable[TaskRecord]) -> list[str]:
    return [task.title for task in tasks]


def ids(tasks: Iterable[TaskRecord]) -> list[int]:
    return [task.id for task in tasks]


async def assert_not_found(attempt: Callable[[int], Awaitable[object]], foreign: int) -> None:
    """Another user's id and a missing id must get the same error."""
    errors: list[NotFoundError] = []
    for task_id in (foreign, MISSING, 0, -1):
        with pytest.raises(TaskNotFoundError) as caught:
            await attempt(task_id)
        errors.append(caught.value)
    assert len({(repr(error), str(error), error.args, error.__cause__) for error in errors}) == 1


async def store_in_reverse(owner: Connection, user_id: str, number: int, *, completed: int) -> None:
    """Store tasks so that their order on disk is the reverse of their ids."""
    await owner.execute(
        "INSERT INTO tasks (id, user_id, title, completed) OVERRIDING SYSTEM VALUE"
        " SELECT n, $1, 'task ' || n, n <= $3 FROM generate_series($2::int, 1, -1) AS n",
        user_id,
        number,
        completed,
    )
    await owner.execute("ANALYZE tasks")


async def read_rows_in_disk_order(owner: Connection) -> None:
    """Allow new connections only scans and hash joins, which do not keep the order of ids."""
    database = await owner.fetchval("SELECT current_database()")
    for path in ("indexscan", "indexonlyscan", "bitmapscan", "nestloop", "mergejoin"):
        await owner.execute(f"ALTER DATABASE {database} SET enable_{path} = off")


class TestEveryMethod:
    NAMES = (
        "count",
        "create",
        "create_many",
        "delete",
        "delete_completed",
        "delete_many",
        "get",
        "iterate",
        "list",
        "toggle",
        "update",
        "update_many",
    )

    def test_is_named_here(self) -> None:
        public = [
            name
            for name, _ in inspect.getmembers(TaskRepository, inspect.isfunction)
            if not name.startswith("_")
        ]
        assert tuple(public) == self.NAMES

    @pytest.mark.parametrize("name", NAMES)
    def test_takes_user_id_first_and_has_no_default_for_it(self, name: str) -> None:
        method = getattr(TaskRepository, name)
        _, first, *_ = inspect.signature(method).parameters.values()
        assert first.name == "user_id"
        assert first.kind in {first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD}
        assert first.default is first.empty
        with pytest.raises(TypeError, match="user_id"):
            method(None)


class TestCreate:
    async def test_returns_what_is_stored(self, db: Database, owner: Connection) -> None:
        begun = datetime.now(UTC)

        plain = await db.tasks.create("alice", "Buy milk")
        full = await db.tasks.create("alice", " Käse 🧀 ", description="", completed=True)

        assert (plain.title, plain.description, plain.completed) == ("Buy milk", None, False)
        assert (full.title, full.description, full.completed) == (" Käse 🧀 ", "", True)
        assert (plain.id, full.id) == (1, 2)
        rows = await owner.fetch("SELECT * FROM tasks ORDER BY id")
        assert [TaskRecord(**dict(row)) for row in rows] == [plain, full]
        for task in (plain, full):
            assert task.user_id == "alice"
            assert task.created_at == task.updated_at
            assert task.created_at.utcoffset() == timedelta(0)
            assert abs(task.created_at - begun) < timedelta(minutes=1)
        with pytest.raises(AttributeError):
            plain.title = "Buy beer"  # type: ignore[misc]
        assert not hasattr(plain, "__dict__")

    async def test_refuses_a_user_without_a_row(self, db: Database, owner: Connection) -> None:
        with pytest.raises(UserNotFoundError):
            await db.tasks.create("mallory", "x")
        assert await owner.fetchval("SELECT count(*) FROM tasks") == 0

    async def test_keeps_nothing_of_a_deleted_user(self, db: Database) -> None:
        await db.users.delete("bob")
        with pytest.raises(UserNotFoundError):
            await db.tasks.create("bob", "x")

    async def test_gives_every_task_its_own_id_under_concurrency(self, db: Database) -> None:
        async with asyncio.timeout(PATIENCE):
            created = await asyncio.gather(
                *(db.tasks.create(("alice", "bob")[n % 2], f"task {n}") for n in range(60))
            )
        assert titles(created) == [f"task {n}" for n in range(60)]
        assert sorted(ids(created)) == list(range(1, 61))


class TestCreateMany:
    async def test_keeps_the_order_and_the_fields_of_a_hundred(
        self, db: Database, owner: Connection
    ) -> None:
        descriptions = [None, "", "null", 'a "quoted", {braced} \\ text\n', "NULL"]
        new = [
            # Titles whose sort order differs from their position.
            NewTask(f"{(n * 37) % 100:02}", descriptions[n % 5], completed=n % 3 == 0)
            for n in range(100)
        ]

        created = await db.tasks.create_many("alice", new)

        assert [NewTask(task.title, task.description, task.completed) for task in created] == new
        assert ids(created) == list(range(1, 101))
        assert {(task.user_id, task.created_at, task.updated_at) for task in created} == {
            ("alice", created[0].created_at, created[0].created_at)
        }
        rows = await owner.fetch("SELECT * FROM tasks ORDER BY id")
        assert [TaskRecord(**dict(row)) for row in rows] == created

    async def test_takes_any_iterable_and_none_at_all(self, db: Database) -> None:
        assert await db.tasks.create_many("alice", []) == []
        created = await db.tasks.create_many("alice", (NewTask(title) for title in "ab"))
        assert titles(created) == ["a", "b"]
        assert await db.tasks.count("alice") == 2

    async def test_refuses_a_user_without_a_row(self, db: Database, owner: Connection) -> None:
        with pytest.raises(UserNotFoundError):
            await db.tasks.create_many("mallory", [NewTask("a"), NewTask("b")])
        assert await owner.fetchval("SELECT count(*) FROM tasks") == 0


class TestGet:
    async def test_returns_the_task(self, db: Database) -> None:
        task = await db.tasks.create("alice", "x", description="y", completed=True)
        assert await db.tasks.get("alice", task.id) == task

    async def test_hides_another_users_task(self, db: Database, bobs_task: TaskRecord) -> None:
        await assert_not_found(partial(db.tasks.get, "mallory"), bobs_task.id)


class TestUpdate:
    async def test_changes_exactly_the_given_fields(self, db: Database) -> None:
        new: TaskChanges = {"title": "new", "description": "new", "completed": True}
        for size in (1, 2, 3):
            for names in itertools.combinations(new, size):
                changes = TaskChanges(**{name: new[name] for name in names})  # type: ignore[literal-required, typeddict-item]
                for expected in (False, True):
                    before = await db.tasks.create("alice", "old", description="old")
                    after = await db.tasks.update(
                        "alice",
                        before.id,
                        expected_updated_at=before.updated_at if expected else None,
                        **changes,
                    )
                    assert after == replace(before, updated_at=after.updated_at, **changes)
                    assert after.updated_at > before.updated_at
                    assert await db.tasks.get("alice", before.id) == after

    async def test_distinguishes_absent_from_none(self, db: Database) -> None:
        before = await db.tasks.create("alice", "x", description="y")
        kept = await db.tasks.update("alice", before.id, completed=True)
        assert kept.description == "y"
        cleared = await db.tasks.update("alice", before.id, description=None)
        assert cleared.description is None
        assert cleared.completed is True
        empty = await db.tasks.update("alice", before.id, description="")
        assert empty.description == ""

    async def test_moves_updated_at_only_on_a_real_change(self, db: Database) -> None:
        before = await db.tasks.create("alice", "x")
        same = await db.tasks.update("alice", before.id, title="x", completed=False)
        assert same == before
        fresh = await db.tasks.update(
            "alice", before.id, expected_updated_at=before.updated_at, title="x"
        )
        assert fresh == before

    async def test_without_fields_is_get(self, db: Database, bobs_task: TaskRecord) -> None:
        assert await db.tasks.update("bob", bobs_task.id) == bobs_task
        await assert_not_found(partial(db.tasks.update, "mallory"), bobs_task.id)

    async def test_hides_another_users_task(self, db: Database, bobs_task: TaskRecord) -> None:
        await assert_not_found(partial(db.tasks.update, "mallory", title="mine"), bobs_task.id)
        assert await db.tasks.get("bob", bobs_task.id) == bobs_task

    async def test_of_a_stale_task_changes_nothing(self, db: Database) -> None:
        first = await db.tasks.create("alice", "first")
        second = await db.tasks.update(
            "alice", first.id, expected_updated_at=first.updated_at, title="second"
        )
        for stale in (first.updated_at, second.updated_at + timedelta(microseconds=1)):
            with pytest.raises(StaleTaskError):
                await db.tasks.update("alice", first.id, expected_updated_at=stale, title="third")
            # Also if the change has no effect.
            with pytest.raises(StaleTaskError):
                await db.tasks.update("alice", first.id, expected_updated_at=stale, title="second")
            with pytest.raises(StaleTaskError):
                await db.tasks.update("alice", first.id, expected_updated_at=stale)
        assert await db.tasks.get("alice", first.id) == second

    async def test_compares_the_time_not_the_time_zone(self, db: Database) -> None:
        task = await db.tasks.create("alice", "x")
        elsewhere = task.updated_at.astimezone(timezone(timedelta(hours=9)))
        assert await db.tasks.update("alice", task.id, expected_updated_at=elsewhere) == task
        changed = await db.tasks.update(
            "alice", task.id, expected_updated_at=elsewhere, completed=True
        )
        assert changed.completed is True

    async def test_distinguishes_a_missing_task_from_a_stale_one(
        self, db: Database, bobs_task: TaskRecord
    ) -> None:
        fresh = bobs_task.updated_at
        stale = fresh - timedelta(seconds=1)
        for expected in (fresh, stale):
            await assert_not_found(
                partial(db.tasks.update, "mallory", expected_updated_at=expected, title="mine"),
                bobs_task.id,
            )
            await assert_not_found(
                partial(db.tasks.update, "mallory", expected_updated_at=expected), bobs_task.id
            )
        assert await db.tasks.get("bob", bobs_task.id) == bobs_task

    async def test_K3_compare_and_set_has_one_winner(self, db: Database) -> None:
        task = await db.tasks.create("alice", "x")
        async with asyncio.timeout(PATIENCE):
            outcomes = await asyncio.gather(
                *(
                    db.tasks.update(
                        "alice", task.id, expected_updated_at=task.updated_at, title=f"by {n}"
                    )
                    for n in range(8)
                ),
                return_exceptions=True,
            )
        won = [outcome for outcome in outcomes if isinstance(outcome, TaskRecord)]
        lost = [outcome for outcome in outcomes if isinstance(outcome, StaleTaskError)]
        assert (len(won), len(lost)) == (1, 7)
        assert await db.tasks.get("alice", task.id) == won[0]

    async def test_K3_compare_and_set_that_had_to_wait_is_stale(
        self, db: Database, owner: Connection
    ) -> None:
        task = await db.tasks.create("alice", "x")
        async with asyncio.timeout(PATIENCE), db.transaction("alice") as first:
            await first.tasks.update("alice", task.id, title="first")
            second = asyncio.create_task(
                db.tasks.update(
                    "alice", task.id, expected_updated_at=task.updated_at, title="second"
                )
            )
            await until_waiting(owner)
        with pytest.raises(StaleTaskError):
            await second
        assert (await db.tasks.get("alice", task.id)).title == "first"


class TestToggle:
    async def test_inverts_completed(self, db: Database) -> None:
        task = await db.tasks.create("alice", "x", description="y")
        done = await db.tasks.toggle("alice", task.id)
        assert done == replace(task, completed=True, updated_at=done.updated_at)
        assert done.updated_at > task.updated_at
        undone = await db.tasks.toggle("alice", task.id)
        assert undone == replace(task, updated_at=undone.updated_at)
        assert undone.updated_at > done.updated_at

    async def test_hides_another_users_task(self, db: Database, bobs_task: TaskRecord) -> None:
        await assert_not_found(partial(db.tasks.toggle, "mallory"), bobs_task.id)
        assert await db.tasks.get("bob", bobs_task.id) == bobs_task

    async def test_K2_sixteen_at_once_are_sixteen(self, db: Database) -> None:
        task = await db.tasks.create("alice", "x")
        async with asyncio.timeout(PATIENCE):
            toggled = await asyncio.gather(*(db.tasks.toggle("alice", task.id) for _ in range(16)))
        in_order = sorted(toggled, key=lambda task: task.updated_at)
        assert [task.completed for task in in_order] == [True, False] * 8
        assert len({task.updated_at for task in toggled}) == 16
        assert await db.tasks.get("alice", task.id) == in_order[-1]


class TestDelete:
    async def test_removes_the_task_for_good(self, db: Database, owner: Connection) -> None:
        first, second = await db.tasks.create_many("alice", [NewTask("a"), NewTask("b")])
        await db.tasks.delete("alice", second.id)
        with pytest.raises(TaskNotFoundError):
            await db.tasks.get("alice", second.id)
        with pytest.raises(TaskNotFoundError):
            await db.tasks.delete("alice", second.id)
        assert [row["id"] for row in await owner.fetch("SELECT id FROM tasks")] == [first.id]

    async def test_leaves_ids_unused(self, db: Database) -> None:
        await db.tasks.create_many("alice", [NewTask("a"), NewTask("b"), NewTask("c")])
        await db.tasks.delete("alice", 3)
        assert (await db.tasks.create("alice", "d")).id == 4
        for task_id in (1, 2, 4):
            await db.tasks.delete("alice", task_id)
        assert (await db.tasks.create("alice", "e")).id == 5

    async def test_hides_another_users_task(self, db: Database, bobs_task: TaskRecord) -> None:
        await assert_not_found(partial(db.tasks.delete, "mallory"), bobs_task.id)
        assert await db.tasks.get("bob", bobs_task.id) == bobs_task


class TestUpdateMany:
    async def test_counts_the_rows_really_changed(
        self, db: Database, owner: Connection, bobs_task: TaskRecord
    ) -> None:
        a, b, c, d = await db.tasks.create_many(
            "alice",
            [NewTask("a"), NewTask("b", completed=True), NewTask("c", "kept"), NewTask("d")],
        )
        wanted = [c.id, a.id, MISSING, b.id, a.id, bobs_task.id, -1, c.id]

        assert await db.tasks.update_many("alice", wanted, completed=True) == 2

        after = {task.id: task for task in await in_pages(db, "alice", limit=1000)}
        assert after[b.id] == b
        assert after[d.id] == d
        for before in (a, c):
            changed = after[before.id]
            assert changed == replace(before, completed=True, updated_at=changed.updated_at)
            assert changed.updated_at > before.updated_at
        assert await db.tasks.get("bob", bobs_task.id) == bobs_task
        assert await db.tasks.update_many("alice", wanted, completed=True) == 0
        assert await owner.fetchval("SELECT count(*) FROM tasks WHERE completed") == 3

    async def test_changes_exactly_the_given_fields(self, db: Database) -> None:
        new: TaskChanges = {"title": "new", "description": None, "completed": True}
        for size in (1, 2, 3):
            for names in itertools.combinations(new, size):
                changes = TaskChanges(**{name: new[name] for name in names})  # type: ignore[literal-required, typeddict-item]
                before = await db.tasks.create_many(
                    "alice", [NewTask("old", "old"), NewTask("new", "old")]
                )
                changed = await db.tasks.update_many("alice", ids(before), **changes)
                after = [await db.tasks.get("alice", task.id) for task in before]
                assert after == [
                    replace(old, updated_at=new.updated_at, **changes)
                    for old, new in zip(before, after, strict=True)
                ]
                # The second task has the new title already.
                assert changed == (1 if names == ("title",) else 2)

    async def test_knows_that_null_is_not_the_empty_text(self, db: Database) -> None:
        created = await db.tasks.create_many("alice", [NewTask("a"), NewTask("b", "")])
        assert await db.tasks.update_many("alice", ids(created), description=None) == 1
        assert await db.tasks.update_many("alice", ids(created), description=None) == 0
        assert await db.tasks.update_many("alice", ids(created), description="") == 2

    async def test_of_nothing_or_to_nothing_changes_nothing(self, db: Database) -> None:
        task = await db.tasks.create("alice", "x")
        assert await db.tasks.update_many("alice", [], completed=True) == 0
        assert await db.tasks.update_many("alice", [task.id]) == 0
        assert await db.tasks.get("alice", task.id) == task

    async def test_hides_another_users_tasks(self, db: Database, bobs_task: TaskRecord) -> None:
        assert await db.tasks.update_many("mallory", [bobs_task.id], title="mine") == 0
        assert await db.tasks.get("bob", bobs_task.id) == bobs_task


class TestDeleteMany:
    async def test_counts_the_rows_really_deleted(
        self, db: Database, bobs_task: TaskRecord
    ) -> None:
        a, b, c = await db.tasks.create_many("alice", [NewTask("a"), NewTask("b"), NewTask("c")])
        wanted = [c.id, MISSING, a.id, c.id, bobs_task.id, 0]

        assert await db.tasks.delete_many("alice", wanted) == 2

        assert await in_pages(db, "alice", limit=1000) == [b]
        assert await db.tasks.get("bob", bobs_task.id) == bobs_task
        assert await db.tasks.delete_many("alice", wanted) == 0
        assert await db.tasks.delete_many("alice", []) == 0

    async def test_hides_another_users_tasks(self, db: Database, bobs_task: TaskRecord) -> None:
        assert await db.tasks.delete_many("mallory", [bobs_task.id]) == 0
        assert await db.tasks.get("bob", bobs_task.id) == bobs_task

    async def test_at_once_count_each_row_once(self, db: Database) -> None:
        created = await db.tasks.create_many("alice", [NewTask(f"{n}") for n in range(50)])
        async with asyncio.timeout(PATIENCE):
            deleted = await asyncio.gather(
                *(db.tasks.delete_many("alice", ids(created)) for _ in range(6))
            )
        assert sum(deleted) == 50


class TestDeleteCompleted:
    async def test_deletes_only_own_completed_tasks(
        self, db: Database, bobs_task: TaskRecord
    ) -> None:
        done = await db.tasks.toggle("bob", bobs_task.id)
        _, kept, _ = await db.tasks.create_many(
            "alice", [NewTask("a", completed=True), NewTask("b"), NewTask("c", completed=True)]
        )
        assert await db.tasks.delete_completed("alice") == 2
        assert await db.tasks.delete_completed("alice") == 0
        assert await db.tasks.delete_completed("mallory") == 0
        assert await in_pages(db, "alice", limit=1000) == [kept]
        assert await db.tasks.get("bob", done.id) == done


class TestBulkLocks:
    async def test_K4b_are_taken_in_the_order_of_the_ids(
        self, url: str, db: Database, owner: Connection
    ) -> None:
        shuffled = [7, 2, 9, 4, 1, 10, 3, 8, 6, 5]
        bulks: list[Callable[[TaskRepository], Coroutine[object, object, int]]] = [
            lambda tasks: tasks.update_many("alice", shuffled, title="new"),
            lambda tasks: tasks.delete_many("alice", shuffled),
            lambda tasks: tasks.delete_completed("alice"),
        ]
        await read_rows_in_disk_order(owner)
        async with asyncio.timeout(PATIENCE), Database.from_url(url) as scanning:
            for bulk in bulks:
                await owner.execute("TRUNCATE tasks")
                await store_in_reverse(owner, "alice", 200, completed=10)
                async with db.transaction("alice") as tx:
                    await tx.tasks.toggle("alice", 5)
                    waiting = asyncio.create_task(bulk(scanning.tasks))
                    await until_waiting(owner)
                    free = await owner.fetch(
                        "SELECT id FROM tasks WHERE id <= 10 FOR UPDATE SKIP LOCKED"
                    )
                    await tx.tasks.toggle("alice", 5)
                assert await waiting == 10
                assert sorted(row["id"] for row in free) == [6, 7, 8, 9, 10]

    async def test_K4b_row_that_changes_meanwhile_is_judged_as_it_is_then(
        self, url: str, db: Database, owner: Connection
    ) -> None:
        bulks: list[tuple[Callable[[TaskRepository], Coroutine[object, object, int]], str]] = [
            (lambda tasks: tasks.update_many("alice", [2, 1, 3], title="c"), "c"),
            (lambda tasks: tasks.delete_many("alice", [2, 1, 3]), ""),
            (lambda tasks: tasks.delete_completed("alice"), "a"),
        ]
        async with asyncio.timeout(PATIENCE), Database.from_url(url) as other:
            for bulk, left in bulks:
                await owner.execute("TRUNCATE tasks RESTART IDENTITY")
                await db.tasks.create_many(
                    "alice", [NewTask(name, completed=True) for name in "abc"]
                )
                async with db.transaction("alice") as tx:
                    await tx.tasks.toggle("alice", 1)
                    await tx.tasks.delete("alice", 2)
                    waiting = asyncio.create_task(bulk(other.tasks))
                    await until_waiting(owner)
                # Task 2 is gone. Of update_many, task 3 has its new title already.
                assert await waiting == {"c": 1, "": 2, "a": 1}[left]
                titles = [row[0] for row in await owner.fetch("SELECT title FROM tasks")]
                assert set(titles) == set(left)

    async def test_K4b_never_deadlock(self, url: str, db: Database, owner: Connection) -> None:
        await store_in_reverse(owner, "alice", 200, completed=0)
        up = list(range(1, 201))
        async with Database.from_url(
            url, retry_attempts=1, lock_timeout_seconds=60, statement_timeout_seconds=60
        ) as once:

            async def change(n: int) -> None:
                # Few ids use the index and many a scan, which read the rows in opposite orders.
                several = [up, up[::-1], up[n::20], up[n::20][::-1]][n % 4]
                for done in range(6):
                    await once.tasks.update_many("alice", several, title=f"{n} {done}")

            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*(change(n) for n in range(16)))
        assert await db.tasks.count("alice") == 200


class TestList:
    async def test_orders_and_ends(self, db: Database) -> None:
        for title in ("b", "a", "é", "Z", "a", "🧀", "_", "a b"):
            await db.tasks.create("alice", title)
        await db.tasks.toggle("alice", 2)
        await db.tasks.toggle("alice", 7)
        await db.tasks.create("bob", "a")
        tasks = [await db.tasks.get("alice", task_id) for task_id in range(1, 9)]
        for sort in TaskSort:
            page = await db.tasks.list("alice", sort=sort)
            assert list(page.items) == sorted(tasks, key=ORDERS[sort])
            assert page.next_cursor is None
            for limit in (1, 3, 7, 8, 9):
                assert await in_pages(db, "alice", sort=sort, limit=limit) == list(page.items)

    @pytest.mark.parametrize("after", [False, True])
    def test_orders_titles_by_code_point_in_any_collation(self, *, after: bool) -> None:
        # The test servers have no collation with another order.
        sql = tasks._page_statement(TaskSort.TITLE, False, False, after).in_transaction.sql  # noqa: FBT003
        assert 'ORDER BY tasks.title COLLATE "C"' in sql
        assert ('(tasks.title COLLATE "C", tasks.id) >' in sql) == after

    async def test_is_newest_first_and_fifty_long_by_default(self, db: Database) -> None:
        created = await db.tasks.create_many("alice", [NewTask(f"{n}") for n in range(60)])
        page = await db.tasks.list("alice")
        assert list(page.items) == created[:9:-1]
        rest = await db.tasks.list("alice", cursor=page.next_cursor)
        assert list(rest.items) == created[9::-1]
        assert rest.next_cursor is None

    async def test_has_no_cursor_at_the_last_row(self, db: Database) -> None:
        await db.tasks.create_many("alice", [NewTask(f"{n}") for n in range(6)])
        first = await db.tasks.list("alice", limit=3)
        assert first.next_cursor is not None
        second = await db.tasks.list("alice", limit=3, cursor=first.next_cursor)
        assert (len(second.items), second.next_cursor) == (3, None)
        whole = await db.tasks.list("alice", limit=6)
        assert (len(whole.items), whole.next_cursor) == (6, None)
        assert (await db.tasks.list("alice", limit=1000)).items == whole.items
        # The cursor also works with another page size.
        other = await db.tasks.list("alice", limit=1, cursor=first.next_cursor)
        assert other.items == second.items[:1]

    async def test_of_a_user_without_tasks_or_row_is_empty(self, db: Database) -> None:
        await db.tasks.create("alice", "x")
        for user_id in ("bob", "mallory", "Alice", "alice "):
            page = await db.tasks.list(user_id)
            assert (page.items, page.next_cursor) == ((), None)
            assert await db.tasks.count(user_id) == 0

    async def test_combines_filters_and_sorts_like_count_and_iterate(self, db: Database) -> None:
        words = ["milk", "Milk tea", "bread", "MILKSHAKE", "tea", "bread and milk"]
        notes = [None, "", "with milk", "Tea"]
        await db.tasks.create_many(
            "alice",
            [NewTask(words[n % 6], notes[n % 4], completed=n % 3 == 0) for n in range(24)],
        )
        await db.tasks.create("bob", "milk")
        tasks = await in_pages(db, "alice", limit=1000)
        for completed, search, sort in itertools.product(
            (None, True, False), (None, "", "milk", "TEA", "lk t", "nothing"), TaskSort
        ):
            expected = [
                task
                for task in sorted(tasks, key=ORDERS[sort])
                if completed in {None, task.completed}
                and (
                    not search
                    or search.lower() in task.title.lower()
                    or search.lower() in (task.description or "").lower()
                )
            ]
            query = Query(completed=completed, search=search, sort=sort)
            assert await in_pages(db, "alice", limit=5, **query) == expected
            assert await everything(db.tasks.iterate("alice", **query)) == expected
            counted = await db.tasks.count("alice", completed=completed, search=search)
            assert counted == len(expected)

    async def test_I107_wildcards_are_literal(self, db: Database) -> None:
        texts = ["100%", "1000", "a_b", "axb", "c:\\temp", "c:temp", "\\%", "'; --", "plain"]
        await db.tasks.create_many("alice", [NewTask(text) for text in texts])
        await db.tasks.create_many("alice", [NewTask(f"note {n}", t) for n, t in enumerate(texts)])
        for search in ("%", "0%", "_", "a_b", "\\", "\\\\", ":\\t", "\\%", "%%", "__", "'", "n_te"):
            expected = [text for text in texts if search in text]
            found = await in_pages(db, "alice", search=search, sort=TaskSort.OLDEST, limit=4)
            assert [task.description or task.title for task in found] == expected * 2

    async def test_searches_in_any_case_of_any_script(self, db: Database) -> None:
        await db.tasks.create_many("alice", [NewTask("Äpfel"), NewTask("x", "ÖL"), NewTask("МИР")])
        for search in ("äPFEL", "öl", "мир"):
            assert await db.tasks.count("alice", search=search) == 1


class TestPages:
    async def test_give_rows_with_equal_keys_exactly_once(
        self, db: Database, owner: Connection
    ) -> None:
        # One statement gives equal created_at and updated_at; twenty tasks share three titles.
        await db.tasks.create_many("alice", [NewTask("abc"[n % 3]) for n in range(20)])
        for user_id in ("bob", "alice", "bob", "alice"):
            await db.tasks.create(user_id, "b")
        moment = datetime(2026, 1, 1, 12, 0, 0, 123457, tzinfo=UTC)
        await owner.execute("ALTER TABLE tasks DISABLE TRIGGER update_tasks_updated_at")
        await owner.execute("UPDATE tasks SET updated_at = $1 WHERE id % 2 = 0", moment)
        await owner.execute("UPDATE tasks SET completed = true WHERE id % 5 = 0")
        await owner.execute("ALTER TABLE tasks ENABLE TRIGGER update_tasks_updated_at")
        tasks = await in_pages(db, "alice", limit=1000)
        assert sum(task.updated_at == moment for task in tasks) == 12
        for sort in TaskSort:
            expected = sorted(tasks, key=ORDERS[sort])
            for limit in (1, 2, 3, 7, 22):
                assert await in_pages(db, "alice", sort=sort, limit=limit) == expected
            done = [task for task in expected if task.completed]
            assert await in_pages(db, "alice", sort=sort, limit=2, completed=True) == done

    async def test_go_on_when_rows_come_and_go_between_them(self, db: Database) -> None:
        for sort in TaskSort:
            await db.tasks.create_many("alice", [NewTask("mn"[n % 2]) for n in range(12)])
            listed = await in_pages(db, "alice", sort=sort, limit=1000)
            first = await db.tasks.list("alice", sort=sort, limit=4)

            # The row of the cursor, one before it, and one of the next page.
            for gone in (listed[3], listed[1], listed[6]):
                await db.tasks.delete("alice", gone.id)
            new = await db.tasks.create("alice", "n")

            second = await db.tasks.list("alice", sort=sort, limit=1000, cursor=first.next_cursor)
            comes_last = sort in {TaskSort.OLDEST, TaskSort.TITLE}
            expected = [listed[4], listed[5], *listed[7:], *([new] if comes_last else [])]
            assert list(second.items) == expected
            await db.tasks.delete_many("alice", range(new.id + 1))

    async def test_of_titles_go_past_any_character(self, db: Database) -> None:
        longest = ["🧀" * 200, "\x01" * 199 + "x", '"' * 200, "\\" * 200, "\u202e" * 199 + "y"]
        await db.tasks.create_many("alice", [NewTask(title) for title in longest])
        found = await in_pages(db, "alice", sort=TaskSort.TITLE, limit=1)
        assert titles(found) == sorted(longest)

    async def test_of_timestamps_keep_every_microsecond(
        self, db: Database, owner: Connection
    ) -> None:
        await db.tasks.create_many("alice", [NewTask(f"{n}") for n in range(6)])
        await owner.execute("ALTER TABLE tasks DISABLE TRIGGER update_tasks_updated_at")
        for task_id, moment in enumerate(
            [
                datetime(1, 1, 2, tzinfo=UTC),
                datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
                datetime(1970, 1, 1, tzinfo=UTC),
                datetime(1970, 1, 1, 0, 0, 0, 1, tzinfo=UTC),
                datetime(9999, 12, 30, 23, 59, 59, 999998, tzinfo=UTC),
                datetime(9999, 12, 30, 23, 59, 59, 999999, tzinfo=UTC),
            ],
            start=1,
        ):
            await owner.execute("UPDATE tasks SET updated_at = $2 WHERE id = $1", task_id, moment)
        found = await in_pages(db, "alice", sort=TaskSort.RECENTLY_UPDATED, limit=1)
        assert ids(found) == [6, 5, 4, 3, 2, 1]

    async def test_refuse_the_cursor_of_another_list(self, db: Database) -> None:
        await db.tasks.create_many("alice", [NewTask("a", completed=True) for _ in range(3)])
        queries = [
            Query(sort=sort, completed=completed, search=search)
            for sort in TaskSort
            for completed in (None, True)
            for search in (None, "a", "A")
        ]
        cursors = [
            (await db.tasks.list("alice", limit=1, **query)).next_cursor for query in queries
        ]
        for (index, cursor), (other, query) in itertools.product(
            enumerate(cursors), enumerate(queries)
        ):
            if index == other:
                page = await db.tasks.list("alice", limit=1, cursor=cursor, **query)
                assert len(page.items) == 1
            else:
                with pytest.raises(InvalidCursorError):
                    await db.tasks.list("alice", cursor=cursor, **query)

    async def test_treat_no_filter_and_the_empty_search_alike(self, db: Database) -> None:
        await db.tasks.create_many("alice", [NewTask("a"), NewTask("b")])
        first = await db.tasks.list("alice", limit=1)
        second = await db.tasks.list("alice", limit=1, search="", cursor=first.next_cursor)
        assert titles(second.items) == ["a"]

    async def test_I106_of_another_users_cursor_show_only_own_rows(
        self, db: Database, bobs_task: TaskRecord
    ) -> None:
        for n in range(3):
            await db.tasks.create("mallory", f"secret {n}")
            await db.tasks.create("bob", f"secret {n}")
        own = await in_pages(db, "mallory", limit=1000)
        for sort in TaskSort:
            page = await db.tasks.list("bob", sort=sort, limit=2)
            stolen = await db.tasks.list("mallory", sort=sort, cursor=page.next_cursor)
            assert stolen.items
            assert set(stolen.items) <= set(own)
            assert bobs_task not in stolen.items


class TestIterate:
    async def test_yields_every_task_of_a_long_list_once(self, db: Database) -> None:
        created = await db.tasks.create_many(
            "alice", [NewTask(f"{n % 7}", completed=n % 2 == 0) for n in range(1_201)]
        )
        await db.tasks.create("bob", "x")
        for sort in TaskSort:
            found = await everything(db.tasks.iterate("alice", sort=sort))
            assert found == sorted(created, key=ORDERS[sort])
            done = await everything(
                db.tasks.iterate("alice", sort=sort, completed=True, search="3")
            )
            assert done == [task for task in found if task.completed and task.title == "3"]

    async def test_ends_exactly_at_a_full_page(self, db: Database) -> None:
        created = await db.tasks.create_many("alice", [NewTask("x") for _ in range(1_000)])
        assert await everything(db.tasks.iterate("alice")) == created[::-1]
        assert await everything(db.tasks.iterate("bob")) == []

    async def test_holds_no_connection_while_the_caller_works(self, url: str, db: Database) -> None:
        await db.tasks.create_many("alice", [NewTask(f"{n}") for n in range(1_001)])
        async with Database.from_url(
            url, pool_size=1, max_overflow=0, pool_timeout_seconds=5
        ) as single:
            seen = 0
            async for task in single.tasks.iterate("alice"):
                if seen % 250 == 0:
                    await single.tasks.toggle("alice", task.id)
                seen += 1
            assert seen == 1_001
            async for _ in single.tasks.iterate("alice"):
                break
            assert (await single.health()).pool.in_use == 0
            assert await single.tasks.count("alice", completed=True) == 5

    async def test_passes_over_what_is_deleted_on_the_way(self, db: Database) -> None:
        created = await db.tasks.create_many("alice", [NewTask("x") for _ in range(1_200)])
        found: list[int] = []
        async for task in db.tasks.iterate("alice", sort=TaskSort.OLDEST):
            if not found:
                # The last row of the first page, and one of the third page.
                await db.tasks.delete_many("alice", [created[499].id, created[1_100].id])
            found.append(task.id)
        assert found == [task.id for task in created if task is not created[1_100]]


class TestCount:
    async def test_counts_only_own_tasks(self, db: Database, bobs_task: TaskRecord) -> None:
        assert await db.tasks.count("alice") == 0
        await db.tasks.create_many("alice", [NewTask("a", completed=True), NewTask("b")])
        assert await db.tasks.count("alice") == 2
        assert await db.tasks.count("alice", completed=True) == 1
        assert await db.tasks.count("alice", completed=False, search="B") == 1
        assert await db.tasks.count("mallory", search=bobs_task.title) == 0


class TestOnATransaction:
    async def test_all_calls_share_one_transaction(self, db: Database, owner: Connection) -> None:
        async with db.transaction("alice") as tx:
            task = await tx.tasks.create("alice", "a")
            done = await tx.tasks.toggle("alice", task.id)
            named = await tx.tasks.update(
                "alice", task.id, expected_updated_at=done.updated_at, title="b"
            )
            assert task.updated_at < done.updated_at < named.updated_at
            more = await tx.tasks.create_many("alice", [NewTask("c"), NewTask("d")])
            assert await tx.tasks.update_many("alice", ids(more), completed=True) == 2
            await tx.tasks.delete("alice", more[0].id)
            assert await tx.tasks.get("alice", task.id) == named
            page = await tx.tasks.list("alice", sort=TaskSort.TITLE, limit=1)
            assert (titles(page.items), page.next_cursor is None) == (["b"], False)
            assert titles(await everything(tx.tasks.iterate("alice"))) == ["d", "b"]
            assert await tx.tasks.count("alice", completed=True) == 2
            # No other connection sees these changes yet.
            assert await db.tasks.count("alice") == 0
            assert await tx.tasks.delete_many("alice", [more[1].id]) == 1
            assert await tx.tasks.delete_completed("alice") == 1
            last = await tx.tasks.create("alice", "e")
        assert await in_pages(db, "alice", limit=1000) == [last]
        assert await owner.fetchval("SELECT count(*) FROM tasks") == 1

    async def test_an_error_of_the_block_undoes_all(self, db: Database) -> None:
        async def fail() -> None:
            async with db.transaction("alice") as tx:
                await tx.tasks.create("alice", "a")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        assert await db.tasks.count("alice") == 0

    async def test_what_is_not_found_or_stale_does_not_end_it(
        self, db: Database, bobs_task: TaskRecord
    ) -> None:
        async with db.transaction("mallory") as tx:
            task = await tx.tasks.create("mallory", "mine")
            await assert_not_found(partial(tx.tasks.get, "mallory"), bobs_task.id)
            await assert_not_found(partial(tx.tasks.toggle, "mallory"), bobs_task.id)
            with pytest.raises(StaleTaskError):
                await tx.tasks.update(
                    "mallory", task.id, expected_updated_at=bobs_task.updated_at, title="x"
                )
        assert await db.tasks.get("mallory", task.id) == task

    async def test_a_user_without_a_row_aborts_it(self, db: Database) -> None:
        async def go_on() -> None:
            async with db.transaction("mallory") as tx:
                with pytest.raises(UserNotFoundError):
                    await tx.tasks.create("mallory", "x")
                with pytest.raises(TransactionAbortedError):
                    await tx.tasks.count("mallory")

        with pytest.raises(TransactionAbortedError):
            await go_on()

    async def test_refuses_every_call_for_another_user(
        self, db: Database, bobs_task: TaskRecord
    ) -> None:
        async with db.transaction("mallory") as tx:
            for attempt in (
                tx.tasks.create("bob", "x"),
                tx.tasks.create_many("bob", [NewTask("x")]),
                tx.tasks.create("bob", "x", idempotency_key="key"),
                tx.tasks.create_many("bob", [NewTask("x")], idempotency_key="key"),
                tx.tasks.get("bob", bobs_task.id),
                tx.tasks.list("bob"),
                anext(tx.tasks.iterate("bob")),
                tx.tasks.count("bob"),
                tx.tasks.update("bob", bobs_task.id),
                tx.tasks.update("bob", bobs_task.id, title="x"),
                tx.tasks.toggle("bob", bobs_task.id),
                tx.tasks.delete("bob", bobs_task.id),
                tx.tasks.update_many("bob", [bobs_task.id], title="x"),
                tx.tasks.delete_many("bob", [bobs_task.id]),
                tx.tasks.delete_completed("bob"),
            ):
                with pytest.raises(IsolationError):
                    await attempt
        assert await db.tasks.get("bob", bobs_task.id) == bobs_task
        assert await db.tasks.count("bob") == 1

    async def test_read_only_it_reads_and_does_not_write(self, db: Database) -> None:
        task = await db.tasks.create("alice", "a")

        async def read_then_write() -> None:
            async with db.transaction("alice", read_only=True) as tx:
                assert await tx.tasks.get("alice", task.id) == task
                assert (await tx.tasks.list("alice")).items == (task,)
                assert await tx.tasks.count("alice") == 1
                await tx.tasks.toggle("alice", task.id)

        with pytest.raises(TransactionError):
            await read_then_write()
        assert await db.tasks.get("alice", task.id) == task
