"""The repository of tasks, and its statements."""

import builtins
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache, partial
from hashlib import sha256
from typing import Any, Final, Unpack

from sqlalchemy import (
    ARRAY,
    CTE,
    BigInteger,
    BindParameter,
    Boolean,
    ColumnElement,
    DateTime,
    Executable,
    Insert,
    Integer,
    String,
    TableValuedAlias,
    Text,
    any_,
    bindparam,
    cast,
    column,
    delete,
    exists,
    false,
    func,
    insert,
    literal_column,
    or_,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by

from todo_db import inputs
from todo_db.errors import IdempotencyKeyReusedError, StaleTaskError, TaskNotFoundError
from todo_db.inputs import NewTask, TaskChanges
from todo_db.models import IdempotencyKey, Task
from todo_db.pagination import BIGINT_MAX, Key, Page, Scope, TaskSort, decode, page_of
from todo_db.records import TaskRecord, makers_of
from todo_db.repositories.statements import Executor, Operation, Retry, Row, Statement

_COLUMNS: Final = (
    Task.id,
    Task.user_id,
    Task.title,
    Task.description,
    Task.completed,
    Task.created_at,
    Task.updated_at,
)
_TITLE: Final = Task.title.collate("C")

type Filters = tuple[bool | None, str | None]
"""The filters of a list or a count: `completed`, and the LIKE pattern of a search."""


class TaskRepository:
    """The tasks of one user. Every method takes `user_id` first, and reaches only that user's rows.

    On a `Database` each call is its own transaction: one round trip with a login of
    `todo-db login`, three with the owner's URL. It has committed when it returns, and it is retried
    if it is known not to have been applied. On a `Transaction` each call is one round trip inside
    it, and `user_id` must be the transaction's.

    ```python
    async def tidy(tasks: TaskRepository, user_id: str) -> int:
        return await tasks.delete_completed(user_id)


    assert await tidy(db.tasks, "alice") == 0
    ```

    Every method can raise these errors:

    - `InvalidInputError`, before any SQL, for an argument that cannot be stored.
    - `IsolationError`, for a `user_id` that is not the transaction's.
    - `UnavailableError`, if the database did not accept the call. Nothing was applied.
    - `OutcomeUnknownError`, on a `Database`, if no answer came to a change that is not idempotent,
      or if no retry of an idempotent one succeeded.

    Args:
        executor: A `Database` or a `Transaction`.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def create(
        self,
        user_id: str,
        title: str,
        *,
        description: str | None = None,
        completed: bool = False,
        idempotency_key: str | None = None,
    ) -> TaskRecord:
        """Store a new task.

        One INSERT. Takes a FOR KEY SHARE lock on the user's row, which blocks only its deletion
        and changes of its unique columns.

        ```python
        task = await db.tasks.create("alice", "Buy milk", description="2 litres")
        assert task.user_id == "alice"
        ```

        Args:
            user_id: The owner of the task.
            title: 1 to 200 characters.
            description: Up to 65,536 characters.
            completed: Whether the task is completed already.
            idempotency_key: Identifies this call when it is repeated: 1 to 255 characters, such as
                a random UUID. Each user has their own keys. The task is stored exactly once, even
                if the call is repeated, and a repeated call resolves an unknown outcome. Every
                repeated call returns the result of the first one, even if the task was changed or
                deleted since. In a transaction a key costs two more round trips, for a savepoint.

        Raises:
            UserNotFoundError: There is no such user.
            IdempotencyKeyReusedError: The key belongs to a call with other arguments.
        """
        user_id = inputs.user_id(user_id)
        title, description = inputs.title(title), inputs.description(description)
        completed = inputs.completed(completed)
        if idempotency_key is not None:
            key = inputs.idempotency_key(idempotency_key)
            operation = _keyed("create", key, user_id, [NewTask(title, description, completed)])
            return (await self._executor.perform(user_id, operation))[0]
        values = {"title": title, "description": description, "completed": completed}
        return await self._executor.perform(user_id, Operation(_CREATE, values, _one))

    async def create_many(
        self, user_id: str, tasks: Iterable[NewTask], *, idempotency_key: str | None = None
    ) -> builtins.list[TaskRecord]:
        """Store up to 10,000 new tasks with one INSERT, all or none, and return them in order.

        ```python
        await db.tasks.create_many("alice", [NewTask("Buy bread"), NewTask("Buy salt")])
        ```

        Args:
            user_id: The owner of the tasks.
            tasks: The new tasks.
            idempotency_key: One key for all tasks; otherwise as for `create`.

        Raises:
            UserNotFoundError: There is no such user.
            IdempotencyKeyReusedError: The key belongs to a call with other arguments.
        """
        user_id = inputs.user_id(user_id)
        new = inputs.new_tasks(tasks)
        if idempotency_key is not None:
            key = inputs.idempotency_key(idempotency_key)
            operation = _keyed("create_many", key, user_id, new)
        else:
            operation = Operation(_CREATE_MANY, _arrays(new), partial(_created, user_id, new))
        return await self._executor.perform(user_id, operation)

    async def get(self, user_id: str, task_id: int) -> TaskRecord:
        """Return one task.

        One SELECT by primary key and owner; takes no lock.

        ```python
        assert (await db.tasks.get("alice", task.id)).title == "Buy milk"
        ```

        Raises:
            TaskNotFoundError: The user has no such task; another user may have it.
        """
        user_id = inputs.user_id(user_id)
        values = {"task_id": inputs.task_id(task_id)}
        return await self._executor.perform(user_id, Operation(_GET, values, _one, Retry.READ_ONLY))

    async def list(  # noqa: PLR0913  # each narrows or orders the same list
        self,
        user_id: str,
        *,
        completed: bool | None = None,
        search: str | None = None,
        sort: TaskSort = TaskSort.NEWEST,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page[TaskRecord]:
        """Return one page of tasks.

        One SELECT; takes no lock. It reads no row of another user. For a deep page it skips the
        user's own index entries of the pages before.

        ```python
        first = await db.tasks.list("alice", sort=TaskSort.TITLE, limit=2)
        second = await db.tasks.list(
            "alice", sort=TaskSort.TITLE, limit=2, cursor=first.next_cursor
        )
        assert [task.title for task in second.items] == ["Buy salt"]
        ```

        Args:
            user_id: The owner of the tasks.
            completed: Only tasks that are completed (True) or not (False); None for both.
            search: Only tasks with this text in title or description, by ILIKE. Upper and lower
                case are equal, as the database's locale has them; the Greek final sigma is not
                equal to sigma. Nothing is normalised: a letter with an accent in one code point
                (NFC) does not find the same letter in two (NFD).
            sort: The order of the tasks.
            limit: The number of tasks of a page, 1 to 1,000.
            cursor: `next_cursor` of the previous page, for the same sort and filters.

        Raises:
            InvalidCursorError: The cursor is damaged, or belongs to another sort or filter.
        """
        user_id = inputs.user_id(user_id)
        filters = _filters(completed, search)
        size = inputs.limit(limit)
        sort = inputs.sort(sort)
        after = None if cursor is None else decode(cursor, _scope(sort, filters), _KEYS[sort])
        return await self._executor.perform(user_id, _page(sort, filters, size, after))

    async def iterate(
        self,
        user_id: str,
        *,
        completed: bool | None = None,
        search: str | None = None,
        sort: TaskSort = TaskSort.NEWEST,
    ) -> AsyncIterator[TaskRecord]:
        """Yield all tasks; only one page of 500 is in memory at a time.

        On a `Database` each page is its own transaction, so no connection is held while the
        caller processes a task. A task that changes during the iteration is yielded in its old or
        its new state. If its sort key changes, it may be missed or yielded twice; `NEWEST` and
        `OLDEST` sort by id, which never changes.

        ```python
        titles = [task.title async for task in db.tasks.iterate("alice")]
        ```
        """
        user_id = inputs.user_id(user_id)
        filters = _filters(completed, search)
        sort = inputs.sort(sort)
        after: tuple[Key, ...] | None = None
        while True:
            page = await self._executor.perform(user_id, _page(sort, filters, _ITERATE_SIZE, after))
            for task in page.items:
                yield task
            if page.next_cursor is None:
                return
            after = _keys(sort, page.items[-1])

    async def count(
        self, user_id: str, *, completed: bool | None = None, search: str | None = None
    ) -> int:
        """Count the tasks that `list` would return on all its pages.

        One SELECT; takes no lock. Its time grows with the number of the user's own tasks.

        ```python
        assert await db.tasks.count("alice", completed=False) == 3
        ```
        """
        user_id = inputs.user_id(user_id)
        completed, pattern = _filters(completed, search)
        statement = _count_statement(completed is not None, pattern is not None)
        values = {"completed": completed, "pattern": pattern}
        return await self._executor.perform(
            user_id, Operation(statement, values, _number, Retry.READ_ONLY)
        )

    async def update(
        self,
        user_id: str,
        task_id: int,
        /,
        *,
        expected_updated_at: datetime | None = None,
        **changes: Unpack[TaskChanges],
    ) -> TaskRecord:
        """Change the given columns of one task; without any, return it as `get` does.

        One UPDATE; locks the row. `updated_at` moves only when a column really changes.

        ```python
        task = await db.tasks.update("alice", task.id, title="Buy oat milk", description=None)
        await db.tasks.update(
            "alice", task.id, completed=True, expected_updated_at=task.updated_at
        )
        ```

        Args:
            user_id: The owner of the task.
            task_id: The task.
            expected_updated_at: Change the task only if its `updated_at` still has this value, to
                the microsecond. A JavaScript `Date` has only milliseconds: a client must keep the
                text that it got, or the ETag.
            **changes: `title`, `description`, `completed`; None means NULL.

        Raises:
            TaskNotFoundError: The user has no such task; another user may have it.
            StaleTaskError: `expected_updated_at` no longer holds; nothing was changed.
        """
        user_id = inputs.user_id(user_id)
        values: dict[str, object] = {"task_id": inputs.task_id(task_id)}
        new = inputs.task_changes(changes)
        if expected_updated_at is not None:
            values["expected"] = inputs.timestamp("expected_updated_at", expected_updated_at)
        if not new:
            task = await self.get(user_id, task_id)
            if values.get("expected", task.updated_at) != task.updated_at:
                raise StaleTaskError
            return task
        values |= _column_values(new)
        columns = frozenset(new)
        if expected_updated_at is None:
            operation = Operation(_update_statement(columns), values, _one, Retry.IDEMPOTENT)
        else:
            operation = Operation(_update_if_statement(columns), values, _one_if_fresh)
        return await self._executor.perform(user_id, operation)

    async def toggle(self, user_id: str, task_id: int) -> TaskRecord:
        """Change `completed` to its opposite.

        One UPDATE; locks the row, so that two toggles at the same time both take effect.

        ```python
        assert not (await db.tasks.toggle("alice", task.id)).completed
        ```

        Raises:
            TaskNotFoundError: The user has no such task; another user may have it.
        """
        user_id = inputs.user_id(user_id)
        values = {"task_id": inputs.task_id(task_id)}
        return await self._executor.perform(user_id, Operation(_TOGGLE, values, _one))

    async def delete(self, user_id: str, task_id: int) -> None:
        """Delete one task permanently. Its id is never used again.

        One DELETE.

        ```python
        await db.tasks.delete("alice", task.id)
        ```

        Raises:
            TaskNotFoundError: The user has no such task; another user may have it.
        """
        user_id = inputs.user_id(user_id)
        values = {"task_id": inputs.task_id(task_id)}
        await self._executor.perform(
            user_id, Operation(_DELETE, values, _found, Retry.IDEMPOTENT_DELETE)
        )

    async def update_many(
        self, user_id: str, task_ids: Iterable[int], /, **changes: Unpack[TaskChanges]
    ) -> int:
        """Change the given columns of up to 10,000 tasks; return how many really changed.

        One UPDATE; locks the rows in the order of their ids. It ignores ids that are not the
        user's, and tasks that have the new values already.

        ```python
        shown = [task.id for task in first.items]
        assert await db.tasks.update_many("alice", shown, completed=True) == 1  # one is deleted
        ```
        """
        user_id = inputs.user_id(user_id)
        ids = inputs.task_ids(task_ids)
        new = inputs.task_changes(changes)
        if not new:
            return 0
        values = {"task_ids": ids} | _column_values(new)
        operation = Operation(_update_many_statement(frozenset(new)), values, _number)
        return await self._executor.perform(user_id, operation)

    async def delete_many(self, user_id: str, task_ids: Iterable[int]) -> int:
        """Delete up to 10,000 tasks; return how many were deleted.

        One DELETE; locks the rows in the order of their ids. It ignores ids that are not the
        user's.

        ```python
        assert await db.tasks.delete_many("bob", shown) == 0
        ```
        """
        user_id = inputs.user_id(user_id)
        values = {"task_ids": inputs.task_ids(task_ids)}
        return await self._executor.perform(user_id, Operation(_DELETE_MANY, values, _number))

    async def delete_completed(self, user_id: str) -> int:
        """Delete all completed tasks; return how many were deleted.

        One DELETE; locks the rows in the order of their ids.

        ```python
        assert await db.tasks.delete_completed("alice") == 1
        ```
        """
        user_id = inputs.user_id(user_id)
        return await self._executor.perform(user_id, Operation(_DELETE_COMPLETED, {}, _number))


_ITERATE_SIZE: Final = 500
_JSON: Final = json.JSONEncoder(ensure_ascii=False).encode
_record, _records = makers_of(TaskRecord)


def _one(rows: Sequence[Row]) -> TaskRecord:
    if not rows:
        raise TaskNotFoundError
    return _record(rows[0])


def _one_if_fresh(rows: Sequence[Row]) -> TaskRecord:
    if not rows:
        raise TaskNotFoundError
    *columns, changed = rows[0]
    if not changed:
        raise StaleTaskError
    return _record(columns)


def _found(rows: Sequence[Row]) -> None:
    if not rows:
        raise TaskNotFoundError


def _number(rows: Sequence[Row]) -> int:
    return int(rows[0][0])


def _arrays(tasks: Sequence[NewTask]) -> dict[str, object]:
    return {
        "titles": [task.title for task in tasks],
        "descriptions": [task.description for task in tasks],
        "completed": ["true" if task.completed else "false" for task in tasks],
    }


def _created(user_id: str, tasks: Sequence[NewTask], rows: Sequence[Row]) -> list[TaskRecord]:
    """Return the tasks as they were given, with the ids and the times of the rows."""
    return _records(
        (row[0], user_id, task.title, task.description, task.completed, row[1], row[1])
        for task, row in zip(tasks, rows, strict=False)
    )


def _keyed(
    method: str, key: str, user_id: str, tasks: Sequence[NewTask]
) -> Operation[list[TaskRecord]]:
    digest = sha256(method.encode())
    # One by one, because the JSON text of all tasks at once would need much memory.
    for task in tasks:
        digest.update(
            _JSON([task.title, task.description, task.completed]).encode(errors="surrogatepass")
        )
    fingerprint = digest.hexdigest()

    def result(rows: Sequence[Row]) -> list[TaskRecord]:
        if rows and rows[0][2] != fingerprint:
            raise IdempotencyKeyReusedError
        # A known key without any task still returns one row, which zip drops.
        return _created(user_id, tasks, rows)

    values = {"key": key, "fingerprint": fingerprint} | _arrays(tasks)
    return Operation(_CREATE_KEYED, values, result, Retry.IDEMPOTENT, needs_savepoint=True)


def _filters(completed: bool | None, search: str | None) -> Filters:  # noqa: FBT001
    return (None if completed is None else inputs.completed(completed), inputs.search(search))


def _column_values(changes: Mapping[str, object]) -> dict[str, object]:
    return {f"new_{name}": value for name, value in changes.items()}


_KEYS: Final[dict[TaskSort, tuple[type[Key], ...]]] = {
    TaskSort.NEWEST: (int,),
    TaskSort.OLDEST: (int,),
    TaskSort.RECENTLY_UPDATED: (datetime, int),
    TaskSort.TITLE: (str, int),
}


def _keys(sort: TaskSort, task: TaskRecord) -> tuple[Key, ...]:
    match sort:
        case TaskSort.NEWEST | TaskSort.OLDEST:
            return (task.id,)
        case TaskSort.RECENTLY_UPDATED:
            return task.updated_at, task.id
        case TaskSort.TITLE:  # pragma: no branch  # mypy holds the match to be exhaustive
            return task.title, task.id


def _scope(sort: TaskSort, filters: Filters) -> Scope:
    return "tasks", sort.value, *filters


# What a first page comes after.
_FIRST: Final[dict[TaskSort, tuple[Key | None, ...]]] = {
    TaskSort.NEWEST: (BIGINT_MAX,),
    TaskSort.OLDEST: (0,),
    TaskSort.RECENTLY_UPDATED: (None,),
    TaskSort.TITLE: (None,),
}


def _page(
    sort: TaskSort, filters: Filters, limit: int, after: tuple[Key, ...] | None
) -> Operation[Page[TaskRecord]]:
    def result(rows: Sequence[Row]) -> Page[TaskRecord]:
        return page_of(_records(rows), limit, _scope(sort, filters), partial(_keys, sort))

    completed, pattern = filters
    keys = _FIRST[sort] if after is None else after
    values = {
        "completed": completed,
        "pattern": pattern,
        "after_key": keys[0],
        "after_id": keys[-1],
        # One more row than the page shows whether there is a next page.
        "limit": limit + 1,
    }
    statement = _page_statement(sort, completed is not None, pattern is not None, after is not None)
    return Operation(statement, values, result, Retry.READ_ONLY)


# The statements, one for each shape of SQL.

_TASK_ID: Final = bindparam("task_id", type_=BigInteger())
_AFTER_ID: Final = bindparam("after_id", type_=BigInteger())
_NEW: Final[dict[str, BindParameter[Any]]] = {
    "title": bindparam("new_title", type_=String()),
    "description": bindparam("new_description", type_=Text()),
    "completed": bindparam("new_completed", type_=Boolean()),
}


def _strings(name: str) -> BindParameter[Any]:
    # For any other array type asyncpg queries the catalogue once on each connection.
    return bindparam(name, type_=ARRAY(Text()))


def _filter_clauses(completed: bool, search: bool) -> list[ColumnElement[bool]]:  # noqa: FBT001
    clauses: list[ColumnElement[bool]] = []
    if completed:
        clauses.append(Task.completed == bindparam("completed", type_=Boolean()))
    if search:
        pattern = bindparam("pattern", type_=Text())
        clauses.append(or_(Task.title.ilike(pattern), Task.description.ilike(pattern)))
    return clauses


@cache
def _page_statement(
    sort: TaskSort,
    completed: bool,  # noqa: FBT001
    search: bool,  # noqa: FBT001
    after: bool,  # noqa: FBT001
    /,
) -> Statement:
    def build(owner: ColumnElement[str]) -> Executable:
        first = select(owner).scalar_subquery()
        page = (
            select(*_COLUMNS)
            .where(Task.user_id == owner, *_filter_clauses(completed, search))
            .limit(bindparam("limit", type_=Integer()))
        )
        match sort:
            # With the owner in the key and in the order, the planner does not walk the primary
            # key past other users' rows. The sub-select hides its value, from which the planner
            # would estimate too few rows (docs/decisions/0002-keyset-by-owner.md).
            case TaskSort.NEWEST:
                return page.where(
                    tuple_(Task.user_id, Task.id) < tuple_(first, _AFTER_ID)
                ).order_by(Task.user_id.desc(), Task.id.desc())
            case TaskSort.OLDEST:
                return page.where(
                    tuple_(Task.user_id, Task.id) > tuple_(first, _AFTER_ID)
                ).order_by(Task.user_id, Task.id)
            case TaskSort.RECENTLY_UPDATED:
                key = bindparam("after_key", type_=DateTime(timezone=True))
                if after:
                    page = page.where(tuple_(Task.updated_at, Task.id) < tuple_(key, _AFTER_ID))
                return page.order_by(Task.updated_at.desc(), Task.id.desc())
            case TaskSort.TITLE:  # pragma: no branch  # mypy holds the match to be exhaustive
                title = bindparam("after_key", type_=Text())
                if after:
                    page = page.where(tuple_(_TITLE, Task.id) > tuple_(title, _AFTER_ID))
                return page.order_by(_TITLE, Task.id)

    return Statement(build, name="tasks.list")


@cache
def _count_statement(completed: bool, search: bool) -> Statement:  # noqa: FBT001
    return Statement(
        lambda owner: (
            select(func.count())
            .select_from(Task)
            .where(Task.user_id == owner, *_filter_clauses(completed, search))
        ),
        name="tasks.count",
    )


def _assignments(columns: frozenset[str]) -> dict[str, BindParameter[Any]]:
    return {name: parameter for name, parameter in _NEW.items() if name in columns}


@cache
def _update_statement(columns: frozenset[str]) -> Statement:
    return Statement(
        lambda owner: (
            update(Task)
            .where(Task.user_id == owner, Task.id == _TASK_ID)
            .values(_assignments(columns))
            .returning(*_COLUMNS)
        ),
        name="tasks.update",
    )


@cache
def _update_if_statement(columns: frozenset[str]) -> Statement:
    """Change the row if it has the expected version; else return it unchanged, marked false."""

    def build(owner: ColumnElement[str]) -> Executable:
        changed = (
            update(Task)
            .where(
                Task.user_id == owner,
                Task.id == _TASK_ID,
                Task.updated_at == bindparam("expected", type_=DateTime(timezone=True)),
            )
            .values(_assignments(columns))
            .returning(*_COLUMNS)
            .cte("changed")
        )
        unchanged = select(*_COLUMNS, false()).where(
            Task.user_id == owner, Task.id == _TASK_ID, ~exists(select(changed.c.id))
        )
        return select(changed, true()).union_all(unchanged)

    return Statement(build, name="tasks.update")


def _locked(owner: ColumnElement[str], *which: ColumnElement[bool]) -> CTE:
    """Lock the rows in the order of their ids, so that two bulk changes do not deadlock."""
    return (
        select(Task.id)
        .where(Task.user_id == owner, *which)
        .order_by(Task.id)
        .with_for_update()
        .cte("locked")
    )


def _given_ids() -> CTE:
    return select(cast(func.unnest(_strings("task_ids")), BigInteger()).label("id")).cte("given")


def _is_in(ids: CTE) -> ColumnElement[bool]:
    """Find the rows by an array of the ids, in the index.

    A join would compare every row with every id where the statistics tell of one row: they do so
    of a table that was never analysed, and of a user who had no tasks when it was. The array is
    made by a sub-select, so it is made once even where it is not used in the index: PostgreSQL 15
    and 16 compare every row with it in a table that was never analysed (10,000 ids: 1.7 s).
    """
    return Task.id == any_(func.array(select(ids.c.id).scalar_subquery()))


@cache
def _update_many_statement(columns: frozenset[str]) -> Statement:
    def build(owner: ColumnElement[str]) -> Executable:
        new = _assignments(columns)
        locked = _locked(owner, _is_in(_given_ids()))
        changed = (
            update(Task)
            .where(
                Task.user_id == owner,
                _is_in(locked),
                or_(*(getattr(Task, name).is_distinct_from(new[name]) for name in new)),
            )
            .values(new)
            .returning(literal_column("1", Integer()))
            .cte("changed")
        )
        return select(func.count()).select_from(changed)

    return Statement(build, name="tasks.update_many")


def _delete_many(owner: ColumnElement[str]) -> Executable:
    return _deleted(owner, _is_in(_locked(owner, _is_in(_given_ids()))))


def _delete_completed(owner: ColumnElement[str]) -> Executable:
    is_completed = Task.completed == true()
    # Only for its locks: it has the same rows, because the snapshot is the same, and then nobody
    # else can change them.
    locked = select(func.count()).select_from(_locked(owner, is_completed)).scalar_subquery()
    return _deleted(owner, is_completed, locked.is_not(None))


def _deleted(owner: ColumnElement[str], *which: ColumnElement[bool]) -> Executable:
    deleted = (
        delete(Task)
        .where(Task.user_id == owner, *which)
        .returning(literal_column("1", Integer()))
        .cte("deleted")
    )
    return select(func.count()).select_from(deleted)


def _given_tasks() -> TableValuedAlias:
    return (
        func.unnest(_strings("titles"), _strings("descriptions"), _strings("completed"))
        .table_valued(
            column("title", Text()),
            column("description", Text()),
            column("completed", Text()),
            with_ordinality="position",
            name="given",
        )
        .render_derived()
    )


def _create_given(owner: ColumnElement[str], *unless: ColumnElement[bool]) -> Insert:
    given = _given_tasks()
    return insert(Task).from_select(
        ["user_id", "title", "description", "completed"],
        select(owner, given.c.title, given.c.description, cast(given.c.completed, Boolean()))
        .where(*unless)
        .order_by(given.c.position),
    )


def _create_keyed(owner: ColumnElement[str]) -> Executable:
    """Store the tasks and the key, or find the key, in one statement.

    Two calls at the same time may both find no key and insert their tasks. Then the primary key
    makes the second call fail and undoes its tasks, and its retry finds the first call's key.
    """
    key, fingerprint = bindparam("key", type_=Text()), bindparam("fingerprint", type_=Text())
    known = (
        select(
            IdempotencyKey.key,
            IdempotencyKey.fingerprint,
            IdempotencyKey.task_ids,
            IdempotencyKey.created_at,
        )
        .where(IdempotencyKey.user_id == owner, IdempotencyKey.key == key)
        .cte("known")
    )
    unknown = ~exists(select(known.c.key))
    created = _create_given(owner, unknown).returning(Task.id, Task.created_at).cte("created")
    task_ids = select(func.array_agg(aggregate_order_by(created.c.id, created.c.id)))
    none = literal_column("'{}'::bigint[]", ARRAY(BigInteger()))
    noted = (
        insert(IdempotencyKey)
        .from_select(
            ["user_id", "key", "fingerprint", "task_ids"],
            select(owner, key, fingerprint, func.coalesce(task_ids.scalar_subquery(), none)).where(
                unknown
            ),
        )
        .cte("noted")
    )
    task = func.unnest(known.c.task_ids).table_valued("id").render_derived("task").lateral()
    found = select(task.c.id, known.c.created_at, known.c.fingerprint).select_from(
        known.outerjoin(task, true())
    )
    return (
        select(created.c.id, created.c.created_at, fingerprint)
        .add_cte(noted)
        .union_all(found)
        .order_by("id")
    )


_GET: Final = Statement(
    lambda owner: select(*_COLUMNS).where(Task.user_id == owner, Task.id == _TASK_ID),
    name="tasks.get",
)
_CREATE: Final = Statement(
    lambda owner: (
        insert(Task)
        .values(
            user_id=owner,
            title=bindparam("title"),
            description=bindparam("description"),
            completed=bindparam("completed"),
        )
        .returning(*_COLUMNS)
    ),
    name="tasks.create",
)
# The caller has the other columns. The ids are in the order of the tasks.
_CREATE_MANY: Final = Statement(
    lambda owner: _create_given(owner).returning(Task.id, Task.created_at), name="tasks.create_many"
)
_CREATE_KEYED: Final = Statement(_create_keyed, name="tasks.create_keyed")
_TOGGLE: Final = Statement(
    lambda owner: (
        update(Task)
        .where(Task.user_id == owner, Task.id == _TASK_ID)
        .values(completed=~Task.completed)
        .returning(*_COLUMNS)
    ),
    name="tasks.toggle",
)
_DELETE: Final = Statement(
    lambda owner: delete(Task).where(Task.user_id == owner, Task.id == _TASK_ID).returning(Task.id),
    name="tasks.delete",
)
_DELETE_MANY: Final = Statement(_delete_many, name="tasks.delete_many")
_DELETE_COMPLETED: Final = Statement(_delete_completed, name="tasks.delete_completed")
