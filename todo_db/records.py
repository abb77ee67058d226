"""The results of a repository: frozen dataclasses, not attached to any session."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, make_dataclass
from datetime import datetime
from typing import Any, cast


def makers_of[R](
    kind: type[R],
) -> tuple[Callable[[Iterable[object]], R], Callable[[Iterable[Iterable[object]]], list[R]]]:
    """Return what makes a record of a row, and records of rows: the fields' values, in order.

    The `__init__` of a frozen dataclass sets every field by `object.__setattr__`, which took more
    time than all else that is done with a page. So the records begin as objects of a class with
    the same slots that is not frozen, and get their own class at the end.
    """
    names = [field.name for field in fields(cast("Any", kind))]
    draft: Any = make_dataclass(kind.__name__, names, slots=True)

    def record(row: Iterable[object]) -> R:
        made = draft(*row)
        made.__class__ = kind
        return cast("R", made)

    def records(rows: Iterable[Iterable[object]]) -> list[R]:
        made = [draft(*row) for row in rows]
        for each in made:
            each.__class__ = kind
        return made

    return record, records


@dataclass(frozen=True, slots=True)
class UserRecord:
    """One row of `users`. Timestamps are aware and in UTC.

    ```python
    user: UserRecord = await db.users.get("alice")
    assert user.email == "alice@example.org"
    ```
    """

    id: str
    email: str
    username: str | None
    name: str
    email_verified: bool
    image: str | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """One row of `tasks`. Timestamps are aware and in UTC.

    `id` is unique and never used again. Ids increase in the order of allocation, which under
    concurrency is not the order of commits, and they have gaps. `updated_at` grows with every real
    change; pass it as `expected_updated_at` to use it as a version.

    ```python
    task: TaskRecord = await db.tasks.create("alice", "Buy milk")
    assert asdict(task)["title"] == "Buy milk"
    ```
    """

    id: int
    user_id: str
    title: str
    description: str | None
    completed: bool
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """Numbers of connections of one `Database`, in this process."""

    size: int
    in_use: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Health:
    """The result of `Database.health`.

    ```python
    health: Health = await db.health()
    assert health.ok, health.detail
    assert health.round_trips in {1, 3}
    ```

    Attributes:
        ok: Whether the database answered and has every migration this package needs.
        latency_seconds: The time of one read, without connecting.
        server_version: PostgreSQL's version, such as `18.4`.
        revision: The last migration of the database.
        is_current: Whether that is at least the migration this package needs.
        round_trips: Of a single call once it is prepared: 1, or 3 in a transaction of its own; one
            more where no prepared statements are kept. None before the database was opened.
        form_reason: Why a single call is in one trip, or not.
        pool: The state of the connection pool.
        problem: The name of the error class when `ok` is false.
        detail: What that error says: what is wrong and what to do, without a value.
    """

    ok: bool
    latency_seconds: float | None
    server_version: str | None
    revision: str | None
    is_current: bool
    round_trips: int | None
    form_reason: str | None
    pool: PoolStatus
    problem: str | None
    detail: str | None
