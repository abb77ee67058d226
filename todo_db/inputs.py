"""Validation of arguments, before any SQL is sent. An invalid value is never repeated.

Each check returns the value to store, or raises `InvalidInputError` with the field's name. The
first four are for any column, also of an application's own tables. Values are not trimmed,
case-folded or normalised. Only an e-mail address is lower-cased, because Better Auth searches for
the lower-case form.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Final, TypedDict, cast

from todo_db.errors import InvalidInputError
from todo_db.models import DESCRIPTION_MAX, KEY_MAX, TITLE_MAX, USER_ID_MAX
from todo_db.pagination import BIGINT_MAX, TaskSort

PAGE_MAX: Final = 1_000
BATCH_MAX: Final = 10_000
SEARCH_MAX: Final = 200
EMAIL_MAX: Final = 255
NAME_MAX: Final = 255
IMAGE_MAX: Final = 65_536

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_EMAIL: Final = re.compile(r"[^\s@\x00-\x1f\x7f]+@[^\s@\x00-\x1f\x7f]+")
_BLANK_CATEGORIES: Final = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})


@dataclass(frozen=True, slots=True)
class NewTask:
    """One task for `TaskRepository.create_many`, which validates it.

    ```python
    await db.tasks.create_many("alice", [NewTask("Buy milk", completed=True)])
    ```
    """

    title: str
    description: str | None = None
    completed: bool = False


class TaskChanges(TypedDict, total=False):
    """The columns of a task that may change. An absent key means unchanged, None means NULL.

    ```python
    changes: TaskChanges = {"completed": True, "description": None}
    task = await db.tasks.create("alice", "Buy milk")
    await db.tasks.update("alice", task.id, **changes)
    ```
    """

    title: str
    description: str | None
    completed: bool


class UserChanges(TypedDict, total=False):
    """The columns of a user that may change. An absent key means unchanged, None means NULL.

    ```python
    changes: UserChanges = {"name": "Alice B."}
    await db.users.update("alice", **changes)
    ```
    """

    name: str
    username: str | None
    image: str | None


def text(field: str, value: object, longest: int) -> str:
    """Check a text: up to `longest` code points that PostgreSQL can store; it may be empty.

    ```python
    name = inputs.not_blank("name", inputs.text("name", "home", 50))
    ```
    """
    if not isinstance(value, str):
        raise InvalidInputError(field, "must be a str")
    if len(value) > longest:
        raise InvalidInputError(field, f"must have at most {longest} characters")
    if "\x00" in value:
        raise InvalidInputError(field, "must not contain NUL")
    if not value.isascii() and _SURROGATE.search(value):
        raise InvalidInputError(field, "must not contain lone surrogates")
    return value


def not_blank(field: str, value: str) -> str:
    """Check that a text has a visible character."""
    # Printable text that is not all spaces is the usual case, and needs no look at each character.
    if value.isascii() and value.isprintable() and not value.isspace() and value:
        return value
    if all(char.isspace() or unicodedata.category(char) in _BLANK_CATEGORIES for char in value):
        raise InvalidInputError(field, "must not be blank")
    return value


def bigint(field: str, value: object) -> int:
    """Check a number: an `int` that fits in PostgreSQL's bigint."""
    if type(value) is not int:
        raise InvalidInputError(field, "must be an int")
    if not -BIGINT_MAX - 1 <= value <= BIGINT_MAX:
        raise InvalidInputError(field, "must fit in 64 bits")
    return value


def batch(field: str, value: object) -> list[object]:
    """Check a list of a bulk statement: up to 10,000 items."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise InvalidInputError(field, "must be a list")
    items = list(islice(cast("Iterable[object]", value), BATCH_MAX + 1))
    if len(items) > BATCH_MAX:
        raise InvalidInputError(field, f"must have at most {BATCH_MAX} items")
    return items


def user_id(value: object) -> str:
    """Check a user id: 1 to 255 characters, not all blank; ids are compared exactly."""
    return not_blank("user_id", text("user_id", value, USER_ID_MAX))


def task_id(value: object) -> int:
    """Check a task id: an `int` that fits in PostgreSQL's bigint."""
    return bigint("task_id", value)


def task_ids(value: object) -> list[str]:
    """Check the ids of a bulk statement; return them as strings, for its text[] parameter."""
    return [str(bigint("task_ids", item)) for item in batch("task_ids", value)]


def new_tasks(value: object) -> list[NewTask]:
    """Check tasks for one bulk INSERT."""
    tasks = batch("tasks", value)
    for task in tasks:
        if not isinstance(task, NewTask):
            raise InvalidInputError("tasks", "must contain NewTask and nothing else")
        title(task.title)
        description(task.description)
        completed(task.completed)
    return cast("list[NewTask]", tasks)


def title(value: object) -> str:
    """Check a title: 1 to 200 code points, at least one of them visible."""
    return not_blank("title", text("title", value, TITLE_MAX))


def description(value: object) -> str | None:
    """Check a description: up to 65,536 code points, or None."""
    return None if value is None else text("description", value, DESCRIPTION_MAX)


def completed(value: object) -> bool:
    """Check a flag: `True` or `False`, and no other truthy or falsy value."""
    if not isinstance(value, bool):
        raise InvalidInputError("completed", "must be True or False")
    return value


def idempotency_key(value: object) -> str:
    """Check an idempotency key: 1 to 255 characters, not all blank."""
    return not_blank("idempotency_key", text("idempotency_key", value, KEY_MAX))


def task_changes(values: TaskChanges) -> TaskChanges:
    """Check the given columns of a task."""
    return cast("TaskChanges", _changes(values, _TASK_CHECKS))


def user_changes(values: UserChanges) -> UserChanges:
    """Check the given columns of a user."""
    return cast("UserChanges", _changes(values, _USER_CHECKS))


def email(value: object) -> str:
    """Check an e-mail address, and return it in lower case."""
    address = text("email", value, EMAIL_MAX).lower()
    if not _EMAIL.fullmatch(address):
        raise InvalidInputError("email", "must be an e-mail address")
    # Lower-casing can make a text longer.
    return text("email", address, EMAIL_MAX)


def name(value: object) -> str:
    """Check a person's name; it may be empty."""
    return text("name", value, NAME_MAX)


def username(value: object) -> str | None:
    """Check a username, or None."""
    if value is None:
        return None
    return not_blank("username", text("username", value, NAME_MAX))


def image(value: object) -> str | None:
    """Check the URL of an image, or None."""
    return None if value is None else text("image", value, IMAGE_MAX)


def limit(value: object) -> int:
    """Check a page size: 1 to 1,000 rows."""
    if type(value) is not int or not 1 <= value <= PAGE_MAX:
        raise InvalidInputError("limit", f"must be a whole number from 1 to {PAGE_MAX}")
    return value


def search(value: object) -> str | None:
    """Check a search text; return a LIKE pattern in which its wildcards are escaped by a backslash.

    None and the empty text mean no search, so that every task matches.
    """
    if value is None or value == "":
        return None
    found = text("search", value, SEARCH_MAX)
    return f"%{re.sub(r'([\\%_])', r'\\\1', found)}%"


def sort(value: object) -> TaskSort:
    """Check a sort order: a member of `TaskSort`, never SQL."""
    if not isinstance(value, TaskSort):
        raise InvalidInputError("sort", "must be a TaskSort")
    return value


def timestamp(field: str, value: object) -> datetime:
    """Check a timestamp: a `datetime` with a time zone, as in records; return it in UTC."""
    if not isinstance(value, datetime) or value.utcoffset() is None:
        raise InvalidInputError(field, "must be a datetime with a time zone")
    try:
        return value.astimezone(UTC)
    except OverflowError:
        failure = InvalidInputError(field, "must be within the years 1 to 9999 in UTC")
    raise failure


_TASK_CHECKS: Final[dict[str, Callable[[object], object]]] = {
    "title": title,
    "description": description,
    "completed": completed,
}
_USER_CHECKS: Final[dict[str, Callable[[object], object]]] = {
    "name": name,
    "username": username,
    "image": image,
}


def _changes(
    values: TaskChanges | UserChanges, checks: dict[str, Callable[[object], object]]
) -> dict[str, object]:
    for field in values:
        if field not in checks:
            raise InvalidInputError("changes", f"may name {', '.join(checks)}")
    return {field: checks[field](value) for field, value in values.items()}
