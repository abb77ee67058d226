"""Keyset pagination: the sort orders, and the cursor that marks the start of the next page."""

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Final, cast

from todo_db.errors import InvalidCursorError


class TaskSort(Enum):
    """The order of a task list. Equal keys are ordered by id, so no task is skipped or repeated."""

    NEWEST = "newest"
    OLDEST = "oldest"
    RECENTLY_UPDATED = "recently_updated"
    TITLE = "title"
    """By code point, which is the same in every locale."""


@dataclass(frozen=True, slots=True)
class Page[T]:
    """Some items, and the cursor of the next page; None on the last page."""

    items: tuple[T, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Position:
    """The last row of a page: its sort key (None when sorted by id alone) and its id."""

    key: str | datetime | None
    id: int


_VERSION: Final = 1
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
BIGINT_MAX: Final = 2**63 - 1
# Enough for a title of 200 characters, each written as two escapes, and the other items.
_LONGEST: Final = 4_096


def encode(sort: TaskSort, filters: tuple[bool | str | None, ...], position: Position) -> str:
    """Return a cursor. It does not contain the user: the next page names its user again."""
    key: object = position.key
    if isinstance(key, datetime):
        key = (key - _EPOCH) // _MICROSECOND
    payload: list[object] = [_VERSION, sort.value, _digest(filters), key, position.id]
    return _written(payload)


def decode(cursor: object, sort: TaskSort, filters: tuple[bool | str | None, ...]) -> Position:
    """Return the position in a cursor that `encode` returned for the same sort and filters.

    Raises:
        InvalidCursorError: The cursor is anything else.
    """
    try:
        version, sorted_by, digest, key, last = _load(cursor)
        if [version, sorted_by, digest] != [_VERSION, sort.value, _digest(filters)]:
            raise ValueError  # noqa: TRY301  # one exit for every defect
        if type(version) is not int or type(last) is not int or not 0 < last <= BIGINT_MAX:
            raise ValueError  # noqa: TRY301
        return Position(_key(sort, key), last)
    except (ValueError, TypeError, OverflowError, RecursionError):
        failure = InvalidCursorError()
    raise failure


def _key(sort: TaskSort, key: object) -> str | datetime | None:
    match sort:
        case TaskSort.NEWEST | TaskSort.OLDEST if key is None:
            return None
        case TaskSort.RECENTLY_UPDATED if type(key) is int:
            return _EPOCH + key * _MICROSECOND
        case TaskSort.TITLE if isinstance(key, str) and "\x00" not in key:
            key.encode()
            return key
        case _:
            raise ValueError


def _load(cursor: object) -> list[object]:
    if not isinstance(cursor, str) or not cursor.isascii() or len(cursor) > _LONGEST:
        raise ValueError
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        raise ValueError from None
    payload = json.loads(raw)
    # Only the exact text that `encode` writes is accepted.
    if not isinstance(payload, list) or _written(cast("list[object]", payload)) != cursor:
        raise ValueError
    return cast("list[object]", payload)


def _written(payload: list[object]) -> str:
    return base64.urlsafe_b64encode(_dump(payload)).rstrip(b"=").decode()


def _dump(payload: list[object]) -> bytes:
    return json.dumps(payload, separators=(",", ":"), allow_nan=False).encode()


def _digest(filters: tuple[bool | str | None, ...]) -> str:
    return hashlib.blake2b(_dump(list(filters)), digest_size=8).hexdigest()
