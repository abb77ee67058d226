"""Every shape of SQL with arguments: of alice on her rows, and of mallory on alice's."""

import re
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple

import asyncpg
from driver import Connection
from shapes import SHAPES, parameters

from todo_db.pagination import BIGINT_MAX
from todo_db.repositories import Statement

KEY: Final = "known"
FINGERPRINT: Final = "f" * 64
LONG_AGO: Final = datetime(2020, 1, 1, tzinfo=UTC)
"""No row was changed then."""
MADE_BEFORE: Final = datetime(2022, 1, 1, tzinfo=UTC)
"""The rows that a case finds are older, those that it makes or changes are newer."""

# Rows, or an error.
type Outcome = list[tuple[object, ...]] | tuple[str, str | None]

NOTHING: Final[tuple[Outcome, ...]] = ([], [(0,)])
"""What a statement returns that found no row: none, or their number."""

_NAMING: Final = ("tasks_create_keyed", "users_create", "users_ensure", "users_set_email")
_MISSING: Final = BIGINT_MAX - 1
_CHANGE: Final = re.compile(r"\b(?:INSERT|UPDATE|DELETE)\b")


class Rows(NamedTuple):
    """What a user has, for the arguments of the cases; the ids may be of rows that are missing."""

    user_id: str
    task_ids: tuple[int, ...]
    task_id: int
    title: str
    updated_at: datetime


class Case(NamedTuple):
    """One statement with its arguments.

    Attributes:
        name: The shape, and which arguments.
        statement: What is run.
        user_id: As whom.
        values: Its arguments by name, the user excepted.
        is_foreign: Whether they name rows of another user, and none of `user_id`'s.
    """

    name: str
    statement: Statement
    user_id: str
    values: Mapping[str, object]
    is_foreign: bool = False

    @property
    def is_read(self) -> bool:
        return not _CHANGE.search(self.statement.in_transaction.sql)


async def rows_of(connection: Connection, user_id: str) -> Rows:
    """Read them as a role that sees every row."""
    found = await connection.fetch(
        "SELECT id, title, updated_at FROM public.tasks WHERE user_id = $1 ORDER BY id", user_id
    )
    if not found:
        return Rows(user_id, (1,), 1, "task", LONG_AGO)
    middle: asyncpg.Record = found[len(found) // 2]
    return Rows(user_id, tuple(row["id"] for row in found), *middle)


def cases(rows: Rows, attacker: str, stranger: str) -> Iterator[Case]:
    """Yield the cases of every shape; `stranger` is a user who does not exist yet."""
    for shape, statement in SHAPES.items():
        usual = _arguments(shape, statement, rows)
        for name, user_id, values in _variants(shape, rows, stranger):
            yield Case(f"{shape} {name}", statement, user_id, usual | values)
        if usual.keys() & {"task_id", "task_ids"}:
            yield Case(f"{shape} foreign", statement, attacker, usual, is_foreign=True)
        elif "after" in shape or shape in _NAMING:
            # The cursor, the key or the e-mail address is another user's.
            yield Case(f"{shape} of an attacker", statement, attacker, usual)


def _arguments(shape: str, statement: Statement, rows: Rows) -> dict[str, object]:
    is_bulk = shape.startswith("tasks_create_")
    possible: dict[str, object] = {
        "task_id": rows.task_id,
        "task_ids": [str(task_id) for task_id in rows.task_ids],
        "limit": 21,
        "after_id": rows.task_id if "after" in shape else 0 if "oldest" in shape else BIGINT_MAX,
        "after_key": rows.title if "page-title" in shape else rows.updated_at,
        "pattern": "%1%",
        "title": "new",
        "description": None,
        "completed": ["true", "false", "true"] if is_bulk else False,
        "titles": ["new 1", "new 2", "new 3"],
        "descriptions": [None, "described", None],
        "key": KEY,
        "fingerprint": FINGERPRINT,
        "expected": rows.updated_at,
        "new_title": "changed",
        "new_description": None,
        "new_completed": True,
        "email": f"{rows.user_id}@example.org",
        "name": "New",
        "username": None,
        "new_name": "Changed",
        "new_username": "changed",
        "new_image": None,
    }
    return {name: possible[name] for name in parameters(statement) if name != "user_id"}


def _variants(
    shape: str, rows: Rows, stranger: str
) -> Iterator[tuple[str, str, dict[str, object]]]:
    own = rows.user_id
    none: dict[str, object] = {"titles": [], "descriptions": [], "completed": []}
    match shape.split("-", maxsplit=1)[0]:
        case "tasks_get" | "tasks_update" | "tasks_toggle" | "tasks_delete":
            yield "own", own, {}
            yield "missing", own, {"task_id": _MISSING}
        case "tasks_update_if":
            yield "fresh", own, {}
            yield "stale", own, {"expected": LONG_AGO}
            yield "missing", own, {"task_id": _MISSING}
        case "tasks_update_many" | "tasks_delete_many":
            yield "own and missing", own, {"task_ids": [*map(str, rows.task_ids[:9]), "0"]}
            yield "none", own, {"task_ids": []}
        case "tasks_create_many":
            yield "three", own, {}
            yield "none", own, none
        case "tasks_create_keyed":
            yield "replay", own, {}
            yield "other arguments", own, {"fingerprint": "0" * 64}
            yield "new", own, {"key": "new"}
            yield "new, none", own, none | {"key": "new, none"}
        case "users_create" | "users_ensure":
            yield "existing", own, {}
            yield "new", stranger, {"email": f"{stranger}@example.org"}
            yield "address taken", stranger, {}
        case "users_set_email":
            yield "own", own, {"email": "new@example.org"}
            yield "missing", stranger, {}
        case "users_get" | "users_delete" | "users_update":
            yield "own", own, {}
            yield "missing", stranger, {}
        case "tasks_count":
            yield "own", own, {}
            yield "of a stranger", stranger, {}
        case _:
            yield "own", own, {}


async def outcome_of(
    running: Awaitable[Sequence[asyncpg.Record]], newest_id: int = BIGINT_MAX
) -> Outcome:
    """Return the rows, or the error; all new moments are equal, and new ids begin with 0."""
    try:
        rows = await running
    except asyncpg.PostgresError as error:
        return type(error).__name__, error.constraint_name
    first_id: int = rows[0][0] if rows else 0

    def comparable(place: int, value: object) -> object:
        if isinstance(value, datetime) and value > MADE_BEFORE:
            return "new"
        if place == 0 and isinstance(value, int) and value > newest_id:
            return f"new {value - first_id}"
        return value

    return [tuple(comparable(*placed) for placed in enumerate(row)) for row in rows]


async def newest_id(connection: Connection) -> int:
    """Return the newest id of a task, as a role that sees every row."""
    return int(await connection.fetchval("SELECT coalesce(max(id), 0) FROM public.tasks"))
