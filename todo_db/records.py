"""What comes out of a repository: plain, frozen, detached from any session."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class UserRecord:
    """One row of `users`. Moments are aware and in UTC."""

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
    """One row of `tasks`. Moments are aware and in UTC.

    `id` is unique and never used again, and increases in the order of allocation, which under
    concurrency is not the order of commits. Gaps are normal. `updated_at` grows with every real
    change and serves as the version for `expected_updated_at`.
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
    """The connections of one `Database`, counted in this process."""

    size: int
    in_use: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Health:
    """What `Database.health` saw.

    Attributes:
        ok: Whether the database answered and has every migration this package needs.
        latency_seconds: For one transaction of three round trips, once connected.
        server_version: As PostgreSQL says it, such as `18.4`.
        revision: The migration the database is at.
        is_current: Whether that is at least the migration this package needs.
        pool: The state of the connection pool.
        problem: The name of the error class when `ok` is false.
    """

    ok: bool
    latency_seconds: float | None
    server_version: str | None
    revision: str | None
    is_current: bool
    pool: PoolStatus
    problem: str | None
