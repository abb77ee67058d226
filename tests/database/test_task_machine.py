"""For any sequence of calls, each user sees the content of a separate model dict."""

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from typing import ClassVar, Self

import asyncpg
import pytest
from driver import Connection
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from shapes import without_owner

from todo_db import (
    Database,
    IdempotencyKeyReusedError,
    NewTask,
    TaskChanges,
    TaskNotFoundError,
    TaskRecord,
    TaskSort,
)
from todo_db.embedded import LOGIN, EmbeddedPostgres
from todo_db.repositories import Statement, tasks

USERS = ("alice", "bob", "mallory")
PROFILE = settings(
    max_examples=40,
    stateful_step_count=25,
    suppress_health_check=list(HealthCheck),
)

users = st.sampled_from(USERS)
titles = st.sampled_from(["milk", "Milk", "tea", "100%"])
descriptions = st.none() | st.sampled_from(["", "milk"])
flags = st.booleans()
new_tasks = st.builds(NewTask, titles, descriptions, flags)
changes = st.fixed_dictionaries(
    {}, optional={"title": titles, "description": descriptions, "completed": flags}
)


class Bench:
    """Shared by all examples: one loop, one open Database, and the owner's connection."""

    def __init__(self, url: str, owner_url: str) -> None:
        self._runner = asyncio.Runner()
        self._owner_url = owner_url
        self.db = Database.from_url(url)

    def __enter__(self) -> Self:
        self.run(self.db.open())
        self._owner: Connection = self.run(asyncpg.connect(self._owner_url))
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self._owner.close())
        self.run(self.db.close())
        self._runner.close()

    def run[T](self, work: Coroutine[object, object, T]) -> T:
        return self._runner.run(work)

    def as_owner(self, sql: str) -> None:
        self.run(self._owner.execute(sql))


class TaskMachine(RuleBasedStateMachine):
    bench: ClassVar[Bench]
    ids: Bundle[int] = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self._answers: dict[tuple[str, str], tuple[list[NewTask], list[TaskRecord]]] = {}
        bench = self.bench
        self._run = bench.run
        self._tasks = bench.db.tasks
        self._model: dict[str, dict[int, TaskRecord]] = {user_id: {} for user_id in USERS}
        bench.as_owner("DELETE FROM users")
        for user_id in USERS:
            bench.run(bench.db.users.create(user_id, email=f"{user_id}@example.org", name=""))

    @rule(target=ids, user_id=users, new=new_tasks)
    def create(self, user_id: str, new: NewTask) -> int:
        task = self._run(
            self._tasks.create(
                user_id, new.title, description=new.description, completed=new.completed
            )
        )
        self._store(user_id, [new], [task])
        return task.id

    @rule(target=ids, user_id=users, new=st.lists(new_tasks, max_size=5))
    def create_many(self, user_id: str, new: list[NewTask]) -> MultipleResults[int]:
        created = self._run(self._tasks.create_many(user_id, new))
        self._store(user_id, new, created)
        return multiple(*(task.id for task in created))

    @rule(
        target=ids,
        user_id=users,
        key=st.sampled_from(["1", "2"]),
        new=st.lists(new_tasks, max_size=2),
    )
    def create_with_a_key(self, user_id: str, key: str, new: list[NewTask]) -> MultipleResults[int]:
        call = self._tasks.create_many(user_id, new, idempotency_key=key)
        asked, answer = self._answers.get((user_id, key), (None, []))
        if asked is None:
            answer = self._run(call)
            self._store(user_id, new, answer)
            self._answers[user_id, key] = new, answer
            return multiple(*(task.id for task in answer))
        if asked == new:
            assert self._run(call) == answer
        else:
            assert self._is_refused(call)
        return multiple()

    @rule(user_id=users, task_id=ids)
    def get(self, user_id: str, task_id: int) -> None:
        self._one(user_id, task_id, self._tasks.get(user_id, task_id))

    @rule(user_id=users, task_id=ids, new=changes)
    def update(self, user_id: str, task_id: int, new: TaskChanges) -> None:
        self._one(user_id, task_id, self._tasks.update(user_id, task_id, **new), new)

    @rule(user_id=users, task_id=ids)
    def toggle(self, user_id: str, task_id: int) -> None:
        before = self._model[user_id].get(task_id)
        new = TaskChanges(completed=before is not None and not before.completed)
        self._one(user_id, task_id, self._tasks.toggle(user_id, task_id), new)

    @rule(user_id=users, task_id=ids)
    def delete(self, user_id: str, task_id: int) -> None:
        if self._model[user_id].pop(task_id, None) is not None:
            self._run(self._tasks.delete(user_id, task_id))
        else:
            assert self._is_refused(self._tasks.delete(user_id, task_id))

    @rule(user_id=users, task_ids=st.lists(ids, max_size=6), new=changes)
    def update_many(self, user_id: str, task_ids: list[int], new: TaskChanges) -> None:
        own = self._model[user_id]
        changed = {
            task_id: replace(own[task_id], **new)
            for task_id in task_ids
            if task_id in own and replace(own[task_id], **new) != own[task_id]
        }
        assert self._run(self._tasks.update_many(user_id, task_ids, **new)) == len(changed)
        for task_id, task in changed.items():
            self._see(user_id, task, self._run(self._tasks.get(user_id, task_id)))

    @rule(user_id=users, task_ids=st.lists(ids, max_size=6))
    def delete_many(self, user_id: str, task_ids: list[int]) -> None:
        gone = self._model[user_id].keys() & set(task_ids)
        assert self._run(self._tasks.delete_many(user_id, task_ids)) == len(gone)
        for task_id in gone:
            del self._model[user_id][task_id]

    @rule(user_id=users)
    def delete_completed(self, user_id: str) -> None:
        gone = [task.id for task in self._model[user_id].values() if task.completed]
        assert self._run(self._tasks.delete_completed(user_id)) == len(gone)
        for task_id in gone:
            del self._model[user_id][task_id]

    @rule(
        user_id=users,
        sort=st.sampled_from(TaskSort),
        limit=st.integers(1, 4),
        completed=st.none() | flags,
        search=st.none() | st.sampled_from(["", "MILK", "%"]),
    )
    def list_in_pages(
        self,
        user_id: str,
        *,
        sort: TaskSort,
        limit: int,
        completed: bool | None,
        search: str | None,
    ) -> None:
        expected = [
            task
            for task in self._model[user_id].values()
            if completed in {None, task.completed}
            and (search or "").lower() in f"{task.title} {task.description or ''}".lower()
        ]
        match sort:
            case TaskSort.NEWEST:
                expected.sort(key=lambda task: task.id, reverse=True)
            case TaskSort.OLDEST:
                expected.sort(key=lambda task: task.id)
            case TaskSort.RECENTLY_UPDATED:
                expected.sort(key=lambda task: (task.updated_at, task.id), reverse=True)
            case TaskSort.TITLE:
                expected.sort(key=lambda task: (task.title, task.id))

        async def listed() -> list[TaskRecord]:
            found: list[TaskRecord] = []
            cursor: str | None = None
            while True:
                page = await self._tasks.list(
                    user_id,
                    completed=completed,
                    search=search,
                    sort=sort,
                    limit=limit,
                    cursor=cursor,
                )
                found.extend(page.items)
                cursor = page.next_cursor
                if cursor is None:
                    return found

        assert self._run(listed()) == expected
        counted = self._run(self._tasks.count(user_id, completed=completed, search=search))
        assert counted == len(expected)

    @invariant()
    def each_list_equals_the_model(self) -> None:
        for user_id in USERS:
            page = self._run(self._tasks.list(user_id, sort=TaskSort.OLDEST, limit=1000))
            assert list(page.items) == list(self._model[user_id].values())

    def _store(self, user_id: str, new: list[NewTask], created: list[TaskRecord]) -> None:
        assert [NewTask(task.title, task.description, task.completed) for task in created] == new
        for task in created:
            assert task.user_id == user_id
            assert task.created_at == task.updated_at
            assert all(task.id > known for own in self._model.values() for known in own)
            self._model[user_id][task.id] = task

    def _one(
        self,
        user_id: str,
        task_id: int,
        call: Coroutine[object, object, TaskRecord],
        new: TaskChanges | None = None,
    ) -> None:
        before = self._model[user_id].get(task_id)
        if before is None:
            assert self._is_refused(call)
        else:
            self._see(user_id, replace(before, **(new or {})), self._run(call))

    def _is_refused(self, call: Coroutine[object, object, object]) -> bool:
        try:
            self._run(call)
        except (IdempotencyKeyReusedError, TaskNotFoundError):
            return True
        return False

    def _see(self, user_id: str, expected: TaskRecord, actual: TaskRecord) -> None:
        before = self._model[user_id][expected.id]
        assert actual == replace(expected, updated_at=actual.updated_at)
        assert (actual.updated_at > before.updated_at) == (expected != before)
        self._model[user_id][expected.id] = actual


@pytest.fixture
def bench(todo_postgres: EmbeddedPostgres, todo_database_name: str) -> Iterator[Bench]:
    with Bench(
        todo_postgres.url(user=LOGIN, database=todo_database_name),
        todo_postgres.url(database=todo_database_name),
    ) as opened:
        TaskMachine.bench = opened
        yield opened


@pytest.mark.parametrize("row_security", ["ENABLE", "DISABLE"])
def test_H1_users_are_isolated(bench: Bench, row_security: str) -> None:
    for table in ("tasks", "idempotency_keys"):
        bench.as_owner(f"ALTER TABLE {table} {row_security} ROW LEVEL SECURITY")
    run_state_machine_as_test(TaskMachine, settings=PROFILE)


@pytest.mark.parametrize("name", ["_CREATE_KEYED", "_DELETE_MANY", "_GET", "_TOGGLE"])
def test_H1_finds_a_dropped_owner_predicate(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for table in ("tasks", "idempotency_keys"):
        bench.as_owner(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
    statement: Statement = getattr(tasks, name)
    compiled = statement.in_transaction
    forgetful = compiled._replace(sql=without_owner(compiled.sql))
    assert forgetful != compiled
    monkeypatch.setattr(statement, "in_transaction", forgetful)
    with pytest.raises((AssertionError, IdempotencyKeyReusedError)):
        run_state_machine_as_test(TaskMachine, settings=settings(PROFILE, phases=[Phase.generate]))
