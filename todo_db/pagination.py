"""Keyset pagination: pages, and the cursor that marks the start of the next one.

A repository of an application can use it for any order of its rows.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from typing import Any, Final, cast
from uuid import UUID

from todo_db.errors import InvalidCursorError

type Key = str | int | datetime | UUID
"""A value by which rows are ordered; a `datetime` has a time zone."""
type Scope = tuple[str | bool | None, ...]
"""What a cursor belongs to: the name of the list, its order, and its filters."""


class TaskSort(Enum):
    """The order of a task list. Equal keys are ordered by id, so no task is skipped or repeated.

    ```python
    await db.tasks.list("alice", sort=TaskSort.RECENTLY_UPDATED)
    ```
    """

    NEWEST = "newest"
    OLDEST = "oldest"
    RECENTLY_UPDATED = "recently_updated"
    TITLE = "title"
    """By code point, which is the same in every locale."""


@dataclass(frozen=True, slots=True)
class Page[T]:
    """Some items, and the cursor of the next page; None on the last page.

    ```python
    page: Page[TaskRecord] = await db.tasks.list("alice", limit=20)
    while page.next_cursor is not None:
        page = await db.tasks.list("alice", limit=20, cursor=page.next_cursor)
    ```
    """

    items: tuple[T, ...]
    next_cursor: str | None


BIGINT_MAX: Final = 2**63 - 1
_VERSION: Final = "1"
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND: Final = timedelta(microseconds=1)
# Enough for a title of 200 characters, each written as two escapes, and the other items.
_LONGEST: Final = 4_096


def page_of[T](
    items: Sequence[T], limit: int, scope: Scope, keys_of: Callable[[T], tuple[Key, ...]]
) -> Page[T]:
    """Return a page of the first `limit` items, with a cursor if there are more.

    ```python
    scope = ("labels", "by name")
    page = page_of(["a", "b", "c"], 2, scope, lambda name: (name,))
    assert page.items == ("a", "b")
    ```

    Args:
        items: One more than the page has, if there are so many.
        limit: The number of items of a page.
        scope: What the cursor belongs to.
        keys_of: Returns the values by which the items are ordered; together they are unique.
    """
    shown = tuple(items[:limit])
    cursor = encode(scope, keys_of(shown[-1])) if len(items) > limit else None
    return Page(shown, cursor)


def encode(scope: Scope, keys: tuple[Key, ...]) -> str:
    """Return a cursor. It does not contain the user: the next page names its user again.

    ```python
    assert encode(scope, ("b",)) == page.next_cursor
    ```
    """
    items = ",".join([_VERSION, f'"{_digest(scope)}"', *map(_text, keys)])
    return base64.urlsafe_b64encode(f"[{items}]".encode()).rstrip(b"=").decode()


def decode(cursor: object, scope: Scope, kinds: tuple[type[Key], ...]) -> tuple[Any, ...]:
    """Return the keys in a cursor that `encode` returned for the same scope.

    ```python
    assert decode(page.next_cursor, scope, (str,)) == ("b",)
    ```

    Args:
        cursor: What the caller was given with the page before.
        scope: What it must belong to.
        kinds: The types of its keys, in order.

    Raises:
        InvalidCursorError: The cursor is anything else.
    """
    try:
        _, _, *keys = _load(cursor)
        found = tuple(_key(kind, key) for kind, key in zip(kinds, keys, strict=True))
        # Only the exact text that `encode` writes is accepted.
        if encode(scope, found) == cursor:
            return found
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass
    raise InvalidCursorError


def _text(key: Key) -> str:
    """Return a key as JSON. `json.dumps` would take as long as all else that is done for a page."""
    if isinstance(key, datetime):
        key = (key - EPOCH) // MICROSECOND
    elif isinstance(key, UUID):
        key = str(key)
    # The str() of a member of an Enum is its name.
    return int.__repr__(key) if isinstance(key, int) else encode_basestring_ascii(key)


def _key(kind: type[Key], key: object) -> Key:
    if kind is datetime and type(key) is int:
        return EPOCH + key * MICROSECOND
    if kind is int and type(key) is int and -BIGINT_MAX - 1 <= key <= BIGINT_MAX:
        return key
    if kind is str and isinstance(key, str) and "\x00" not in key:
        key.encode()
        return key
    if kind is UUID and isinstance(key, str) and str(found := UUID(key)) == key:
        return found
    raise ValueError


def _load(cursor: object) -> list[object]:
    if not isinstance(cursor, str) or not cursor.isascii() or len(cursor) > _LONGEST:
        raise ValueError
    raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    return cast("list[object]", json.loads(raw))


@lru_cache(maxsize=1_024)
def _digest(scope: Scope) -> str:
    return hashlib.blake2b(
        json.dumps(scope, separators=(",", ":")).encode(), digest_size=8
    ).hexdigest()
