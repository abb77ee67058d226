"""Cursors: decoding returns the encoded position, or refuses the cursor before any SQL."""

import base64
import inspect
import json
from datetime import UTC, datetime, timedelta, timezone
from enum import Enum
from typing import Any
from uuid import UUID

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from todo_db import (
    Database,
    InvalidCursorError,
    InvalidInputError,
    NewTask,
    Page,
    TaskRecord,
    TaskSort,
)
from todo_db.pagination import Key, Scope, decode, encode, page_of

type Filters = tuple[bool | str | None, ...]

NONE: Filters = (None, None)
KINDS: dict[TaskSort, tuple[type[Key], ...]] = {
    TaskSort.NEWEST: (int,),
    TaskSort.OLDEST: (int,),
    TaskSort.RECENTLY_UPDATED: (datetime, int),
    TaskSort.TITLE: (str, int),
}
MOMENT = datetime(2026, 11, 21, 12, 30, 15, 123_456, tzinfo=UTC)
POSITIONS: dict[TaskSort, tuple[Key, ...]] = {
    TaskSort.NEWEST: (42,),
    TaskSort.OLDEST: (42,),
    TaskSort.RECENTLY_UPDATED: (MOMENT, 42),
    TaskSort.TITLE: ("swordfish \u00fc\U0001f642", 42),
}

keys: dict[type, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**63 - 1),
    datetime: st.datetimes(timezones=st.just(UTC)),
    # PostgreSQL stores no NUL, and UTF-8 has no lone surrogates.
    str: st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=200),
    UUID: st.uuids(),
}
filters_ = st.tuples(st.none() | st.booleans(), st.none() | st.text(max_size=20))


class Priority(int, Enum):
    HIGH = 1


class Colour(str, Enum):  # noqa: UP042  # the str() of a StrEnum is its value
    RED = "red"


def scope_of(sort: TaskSort, filters: Filters = NONE) -> Scope:
    return "tasks", sort.value, *filters


def written_by(sort: TaskSort, position: tuple[Key, ...], filters: Filters = NONE) -> str:
    return encode(scope_of(sort, filters), position)


def read_as(cursor: object, sort: TaskSort, filters: Filters = NONE) -> tuple[Key, ...]:
    return decode(cursor, scope_of(sort, filters), KINDS[sort])


def payload_of(cursor: str) -> list[Any]:
    payload = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    assert isinstance(payload, list)
    return payload


def unpadded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def written(payload: object) -> str:
    """Return a cursor with this payload, in the format of `encode`."""
    return unpadded(json.dumps(payload, separators=(",", ":")).encode())


def forged(sort: TaskSort, **changes: object) -> str:
    """Return a valid cursor with the given items replaced."""
    version, digest, *keys, last = payload_of(written_by(sort, POSITIONS[sort]))
    payload = {"version": version, "digest": digest}
    payload |= {"key": keys[0]} if keys else {}
    return written(list((payload | {"id": last} | changes).values()))


def assert_refused(cursor: object, sort: TaskSort, filters: Filters = NONE) -> None:
    with pytest.raises(InvalidCursorError) as caught:
        read_as(cursor, sort, filters)
    error = caught.value
    assert isinstance(error, InvalidInputError)
    assert error.field == "cursor"
    # One message for every defect, so that it reveals no value.
    assert str(error) == str(InvalidCursorError())
    assert error.args == InvalidCursorError().args
    assert error.__cause__ is None
    assert error.__context__ is None


class TestRoundTrip:
    @given(data=st.data(), filters=filters_)
    def test_returns_the_position(self, data: st.DataObject, filters: Filters) -> None:
        kinds = tuple(data.draw(st.lists(st.sampled_from(list(keys)), max_size=4)))
        position = tuple(data.draw(keys[kind]) for kind in kinds)
        cursor = encode(filters, position)
        assert decode(cursor, filters, kinds) == position
        assert encode(filters, position) == cursor

    @pytest.mark.parametrize("sort", TaskSort)
    def test_is_plain_in_a_url(self, sort: TaskSort) -> None:
        cursor = written_by(sort, POSITIONS[sort])
        assert cursor.replace("-", "").replace("_", "").isalnum()
        assert cursor.isascii()

    def test_the_longest_title_fits(self) -> None:
        position = ("\U0001f642" * 200, 2**63 - 1)
        filters = (True, "%" + "\\%" * 200 + "%")
        cursor = written_by(TaskSort.TITLE, position, filters)
        assert read_as(cursor, TaskSort.TITLE, filters) == position

    def test_another_time_zone_is_the_same_timestamp(self) -> None:
        there = MOMENT.astimezone(timezone(timedelta(hours=9)))
        cursor = written_by(TaskSort.RECENTLY_UPDATED, (there, 1))
        assert cursor == written_by(TaskSort.RECENTLY_UPDATED, (MOMENT, 1))

    @pytest.mark.parametrize(("key", "value"), [(Priority.HIGH, 1), (Colour.RED, "red")])
    def test_a_member_of_an_enum_is_its_value(self, key: Key, value: Key) -> None:
        assert encode(NONE, (key,)) == encode(NONE, (value,))

    @pytest.mark.parametrize("key", [None, 1.5, MOMENT.date(), b"red"])
    def test_refuses_what_it_cannot_return(self, key: Any) -> None:  # noqa: ANN401  # not a key
        with pytest.raises(TypeError):
            encode(NONE, (key,))

    def test_does_not_contain_the_user(self) -> None:
        assert list(inspect.signature(encode).parameters) == ["scope", "keys"]

    @pytest.mark.parametrize("sort", TaskSort)
    def test_contains_the_keys_and_a_digest_of_the_scope(self, sort: TaskSort) -> None:
        version, digest, *keys = payload_of(written_by(sort, POSITIONS[sort]))
        assert version == 1
        assert digest == payload_of(written_by(sort, (7,)))[1]
        moment = (MOMENT - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
        assert keys == [moment if key is MOMENT else key for key in POSITIONS[sort]]

    def test_does_not_contain_the_search(self) -> None:
        cursor = written_by(TaskSort.NEWEST, (1,), (None, "%swordfish%"))
        assert "swordfish" not in str(payload_of(cursor))


class TestPageOf:
    def test_ends_at_the_limit_with_a_cursor_after_its_last_item(self) -> None:
        page = page_of("abc", 2, ("letters",), lambda letter: (letter,))
        assert page.items == ("a", "b")
        assert decode(page.next_cursor, ("letters",), (str,)) == ("b",)

    @pytest.mark.parametrize("items", ["", "a", "ab"])
    def test_has_no_cursor_where_there_is_no_more(self, items: str) -> None:
        page = page_of(items, 2, ("letters",), lambda letter: (letter,))
        assert page == Page(tuple(items), None)


class TestDecode:
    @pytest.mark.parametrize(
        "cursor",
        [None, True, 1, 1.0, b"WzFd", ["WzFd"], {}, object()],
        ids=lambda cursor: type(cursor).__name__,
    )
    def test_I106_refuses_values_other_than_text(self, cursor: object) -> None:
        assert_refused(cursor, TaskSort.NEWEST)

    @pytest.mark.parametrize(
        "cursor",
        [
            "",
            "swordfish",
            "A",
            "!!!!",
            "WzFd\n",
            "WzFd WzFd",
            "\u00fcber",
            "\uff37\uff5a\uff26\uff44",
            "\ud800",
            "\0",
            "=" * 4,
            "' OR '1'='1",
        ],
        ids=ascii,
    )
    def test_I106_refuses_bad_base64(self, cursor: str) -> None:
        assert_refused(cursor, TaskSort.NEWEST)

    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"swordfish",
            b"\xff\xfe\x00",
            b"[",
            b"[1,]",
            b"NaN",
            b"[" * 2_000,
            b"[" * 1_500 + b"]" * 1_500,
            b"9" * 3_000,
            "[1]".encode("utf-16"),
            b"\xef\xbb\xbf[1]",
        ],
        ids=lambda raw: f"{raw[:8]!r} of {len(raw)}",
    )
    def test_I106_refuses_bad_json(self, raw: bytes) -> None:
        assert_refused(unpadded(raw), TaskSort.NEWEST)

    @pytest.mark.parametrize(
        "payload",
        [
            None,
            True,
            1,
            "swordfish",
            {},
            {"0": 1, "1": "", "2": 1},
            [],
            [1],
            [1, ""],
            [[], [], []],
            [None, None, None],
        ],
        ids=repr,
    )
    def test_I106_refuses_another_shape(self, payload: object) -> None:
        assert_refused(written(payload), TaskSort.NEWEST)

    @pytest.mark.parametrize("sort", TaskSort)
    def test_I106_refuses_missing_and_extra_items(self, sort: TaskSort) -> None:
        payload = payload_of(written_by(sort, POSITIONS[sort]))
        assert read_as(written(payload), sort) == POSITIONS[sort]
        assert_refused(written(payload[:-1]), sort)
        assert_refused(written([*payload, None]), sort)
        assert_refused(written([*payload, "alice"]), sort)
        assert_refused(written([payload]), sort)

    @pytest.mark.parametrize("version", [0, 2, -1, 1.0, True, "1", None, [1]], ids=repr)
    def test_I106_refuses_another_version(self, version: object) -> None:
        assert_refused(forged(TaskSort.NEWEST, version=version), TaskSort.NEWEST)

    @pytest.mark.parametrize(
        "last",
        [
            1.0,
            1.5,
            1e300,
            True,
            False,
            float("nan"),
            float("inf"),
            2**63,
            -(2**63) - 1,
            10**400,
            "1",
            "1 OR 1=1",
            None,
            [1],
            {"id": 1},
        ],
        ids=lambda last: repr(last)[:12],
    )
    def test_I106_refuses_a_bad_id(self, last: object) -> None:
        for sort in TaskSort:
            assert_refused(forged(sort, id=last), sort)

    @pytest.mark.parametrize(
        ("sort", "key"),
        [
            (TaskSort.RECENTLY_UPDATED, None),
            (TaskSort.RECENTLY_UPDATED, True),
            (TaskSort.RECENTLY_UPDATED, 1.0),
            (TaskSort.RECENTLY_UPDATED, float("nan")),
            (TaskSort.RECENTLY_UPDATED, "2026-01-01T00:00:00+00:00"),
            (TaskSort.RECENTLY_UPDATED, 10**18),
            (TaskSort.RECENTLY_UPDATED, -(10**18)),
            (TaskSort.RECENTLY_UPDATED, 10**400),
            (TaskSort.TITLE, None),
            (TaskSort.TITLE, 1),
            (TaskSort.TITLE, ["x"]),
            (TaskSort.TITLE, "sword\0fish"),
            (TaskSort.TITLE, "swordfish\ud800"),
        ],
        ids=lambda part: ascii(part)[:24],
    )
    def test_I106_refuses_a_bad_key(self, sort: TaskSort, key: object) -> None:
        assert_refused(forged(sort, key=key), sort)

    def test_I106_refuses_another_sort(self) -> None:
        for sort in TaskSort:
            cursor = written_by(sort, POSITIONS[sort])
            for other in set(TaskSort) - {sort}:
                assert_refused(cursor, other)

    def test_I106_refuses_other_filters(self) -> None:
        every: list[Filters] = [
            (None, None),
            (True, None),
            (False, None),
            (None, "%true%"),
            (True, "%x%"),
            (None, "%x%"),
            (None, "%X%"),
        ]
        for filters in every:
            cursor = written_by(TaskSort.NEWEST, (1,), filters)
            assert read_as(cursor, TaskSort.NEWEST, filters) == (1,)
            for other in every:
                if other != filters:
                    assert_refused(cursor, TaskSort.NEWEST, other)

    @pytest.mark.parametrize("key", [None, 1, "", "x", "0" * 32, f"{{{UUID(int=1)}}}"], ids=repr)
    def test_refuses_what_is_not_the_text_of_a_uuid(self, key: object) -> None:
        _, digest, good = payload_of(encode(("files",), (UUID(int=1),)))
        assert decode(written([1, digest, good]), ("files",), (UUID,)) == (UUID(int=1),)
        with pytest.raises(InvalidCursorError):
            decode(written([1, digest, key]), ("files",), (UUID,))

    @pytest.mark.parametrize("digest", [None, "", 0, True, [], "0" * 16], ids=repr)
    def test_I106_refuses_a_bad_digest(self, digest: object) -> None:
        assert_refused(forged(TaskSort.NEWEST, digest=digest), TaskSort.NEWEST)

    def test_I106_refuses_another_spelling(self) -> None:
        cursor = written_by(TaskSort.TITLE, ("\u00fc?>~", 42))
        payload = payload_of(cursor)
        compact = json.dumps(payload, separators=(",", ":"))
        assert written(payload) == cursor
        spellings = [
            cursor + "=",
            cursor + "==",
            cursor + "=" * (-len(cursor) % 4 or 4),
            cursor + "\n",
            " " + cursor,
            cursor + "A",
            unpadded(json.dumps(payload).encode()),
            unpadded(json.dumps(payload, separators=(",", ":"), ensure_ascii=False).encode()),
            unpadded(compact.replace("\\u00fc", "\\u00FC").encode()),
            unpadded(compact.replace("?", "\\u003f").encode()),
            unpadded(compact.replace("42]", "42.0]").encode()),
            unpadded(compact.replace("42]", "4.2e1]").encode()),
            unpadded(compact.encode("utf-16")),
            unpadded(compact.encode() + b"\n"),
        ]
        for spelling in spellings:
            assert spelling != cursor
            assert_refused(spelling, TaskSort.TITLE)

    def test_I106_refuses_the_other_alphabet(self) -> None:
        cursors = [written_by(TaskSort.TITLE, (f"{n}~?>", n)) for n in range(1, 200)]
        other = [cursor.replace("-", "+").replace("_", "/") for cursor in cursors]
        different = [new for new, old in zip(other, cursors, strict=True) if new != old]
        assert different
        for cursor in different:
            assert_refused(cursor, TaskSort.TITLE)

    def test_I106_refuses_set_unused_bits(self) -> None:
        # If the length is not a multiple of 4, the last character has unused bits.
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        spare = 0
        for number in (1, 12, 123):
            cursor = written_by(TaskSort.NEWEST, (number,))
            if len(cursor) % 4:
                spare += 1
                twin = cursor[:-1] + alphabet[alphabet.index(cursor[-1]) + 1]
                assert_refused(twin, TaskSort.NEWEST)
        assert spare == 2

    def test_I106_refuses_what_is_too_long(self) -> None:
        assert_refused("A" * 1_000_000, TaskSort.NEWEST)
        assert_refused(forged(TaskSort.TITLE, key="x" * 4_096), TaskSort.TITLE)

    @given(st.text() | st.binary(max_size=200).map(unpadded), st.sampled_from(TaskSort))
    def test_I106_refuses_anything_else(self, cursor: str, sort: TaskSort) -> None:
        assert_refused(cursor, sort)

    @settings(max_examples=300)
    @given(st.sampled_from(TaskSort), st.data())
    def test_I106_one_position_has_one_spelling(self, sort: TaskSort, data: st.DataObject) -> None:
        cursor = written_by(sort, POSITIONS[sort])
        at = data.draw(st.integers(0, len(cursor) - 1))
        changed = cursor[:at] + data.draw(st.characters(codec="ascii")) + cursor[at + 1 :]
        assume(changed != cursor)
        try:
            position = read_as(changed, sort)
        except InvalidCursorError:
            return
        assert position != POSITIONS[sort]
        assert written_by(sort, position) == changed


class TestList:
    async def test_I106_another_users_cursor_shows_only_own_tasks(self, db: Database) -> None:
        for user in ("alice", "bob"):
            await db.tasks.create_many(user, [NewTask(f"{user} {n}") for n in range(5)])
        for sort in TaskSort:
            page = await db.tasks.list("alice", sort=sort, limit=2)
            assert page.next_cursor is not None
            stolen = await db.tasks.list("bob", sort=sort, cursor=page.next_cursor)
            assert {task.user_id for task in stolen.items} <= {"bob"}
            own = await db.tasks.list("alice", sort=sort, cursor=page.next_cursor)
            assert {task.user_id for task in own.items} == {"alice"}
            assert len(own.items) == 3

    async def test_I106_a_forged_position_is_a_position(self, database: Database) -> None:
        await database.users.create("alice", email="alice@example.org", name="")
        task = await database.tasks.create("alice", "x")
        everything, nothing = Page((task,), None), Page[object]((), None)
        first = datetime.min.replace(tzinfo=UTC)
        last = datetime.max.replace(tzinfo=UTC)
        largest = 2**63 - 1
        expected: list[tuple[TaskSort, tuple[Key, ...], Page[TaskRecord] | Page[object]]] = [
            (TaskSort.NEWEST, (largest,), everything),
            (TaskSort.NEWEST, (1,), nothing),
            (TaskSort.OLDEST, (largest,), nothing),
            (TaskSort.RECENTLY_UPDATED, (first, largest), nothing),
            (TaskSort.RECENTLY_UPDATED, (last, largest), everything),
            (TaskSort.RECENTLY_UPDATED, (task.updated_at, 1), nothing),
            (TaskSort.RECENTLY_UPDATED, (task.updated_at, 2), everything),
            (TaskSort.TITLE, ("", 1), everything),
            (TaskSort.TITLE, ("\U0010ffff" * 200, 1), nothing),
            (TaskSort.TITLE, ("x", 1), nothing),
            (TaskSort.TITLE, ("'; DROP TABLE tasks; --", 1), everything),
        ]
        for sort, position, page in expected:
            cursor = written_by(sort, position)
            assert await database.tasks.list("alice", sort=sort, cursor=cursor) == page

    async def test_pages_are_the_whole_list_in_order(self, database: Database) -> None:
        # Equal titles and timestamps, so that only the id distinguishes the rows.
        titles = ["b", "a", "B", "b", "\u00e4", "a", "\U0001f642", "b", "Z", "a"]
        await database.users.create("alice", email="alice@example.org", name="")
        tasks = await database.tasks.create_many("alice", map(NewTask, titles))
        assert len({task.updated_at for task in tasks}) == 1
        await database.tasks.update("alice", tasks[4].id, completed=True)
        tasks[4] = await database.tasks.get("alice", tasks[4].id)
        orders = {
            TaskSort.NEWEST: sorted(tasks, key=lambda task: -task.id),
            TaskSort.OLDEST: sorted(tasks, key=lambda task: task.id),
            TaskSort.RECENTLY_UPDATED: sorted(
                tasks, key=lambda task: (task.updated_at, task.id), reverse=True
            ),
            TaskSort.TITLE: sorted(tasks, key=lambda task: (task.title, task.id)),
        }
        assert orders.keys() == set(TaskSort)
        for sort, expected in orders.items():
            found: list[TaskRecord] = []
            cursor, more = None, True
            while more:
                page = await database.tasks.list("alice", sort=sort, limit=3, cursor=cursor)
                found += page.items
                cursor = page.next_cursor
                more = cursor is not None
            assert found == expected

    async def test_a_cursor_outlives_its_row(self, database: Database) -> None:
        await database.users.create("alice", email="alice@example.org", name="")
        tasks = await database.tasks.create_many("alice", [NewTask(t) for t in "abcd"])
        for sort in (TaskSort.OLDEST, TaskSort.TITLE):
            page = await database.tasks.list("alice", sort=sort, limit=1)
            await database.tasks.delete("alice", page.items[0].id)
            tasks.remove(page.items[0])
            rest = await database.tasks.list("alice", sort=sort, cursor=page.next_cursor)
            assert list(rest.items) == tasks

    async def test_a_full_last_page_has_no_cursor(self, database: Database) -> None:
        await database.users.create("alice", email="alice@example.org", name="")
        await database.tasks.create_many("alice", [NewTask("x")] * 2)
        for sort in TaskSort:
            assert (await database.tasks.list("alice", sort=sort, limit=1)).next_cursor
            assert (await database.tasks.list("alice", sort=sort, limit=2)).next_cursor is None
