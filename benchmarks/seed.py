"""The tasks that a run begins with: the SQL that stores them, and the same rows in Python."""

from datetime import UTC, datetime, timedelta
from typing import Final

_BEGUN: Final = datetime(2026, 1, 1, tzinfo=UTC)
SEED: Final = """
    TRUNCATE users CASCADE;
    INSERT INTO users (id, email)
        SELECT 'user-' || n, 'user-' || n || '@example.org' FROM generate_series(0, {users} - 1) n;
    INSERT INTO tasks OVERRIDING SYSTEM VALUE
        SELECT n, 'user-' || n % {users}, 'Task ' || n,
            CASE WHEN n % 2 = 0 THEN 'Milk, bread, and whatever else task ' || n || ' needs' END,
            n % 3 = 0, moment, moment
        FROM generate_series(1, {tasks}) n, LATERAL
            (SELECT timestamptz '2026-01-01 00:00:00+00' + n * interval '1 second') t (moment);
    SELECT setval(pg_get_serial_sequence('tasks', 'id'), {tasks});
"""


def seeded(number: int, users: int) -> tuple[object, ...]:
    """Return the columns of a task that was seeded."""
    moment = _BEGUN + timedelta(seconds=number)
    description = f"Milk, bread, and whatever else task {number} needs"
    return (
        number,
        f"user-{number % users}",
        f"Task {number}",
        description if number % 2 == 0 else None,
        number % 3 == 0,
        moment,
        moment,
    )
