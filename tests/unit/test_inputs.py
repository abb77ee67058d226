"""Bad input is refused before any SQL; the error has the field's name and not its value."""

from collections.abc import AsyncIterable, Awaitable, Callable, Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from functools import partial
from inspect import getmembers, isfunction
from itertools import batched
from typing import Any

import pytest
from driver import Connection
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from todo_db import (
    Database,
    EmailTakenError,
    InvalidInputError,
    NewTask,
    PoolExhaustedError,
    StaleTaskError,
    TaskNotFoundError,
    TaskRepository,
    TaskSort,
    UserIdTakenError,
    UsernameTakenError,
    UserNotFoundError,
    UserRepository,
    inputs,
)
from todo_db.inputs import BATCH_MAX
from todo_db.pagination import decode
from todo_db.repositories import Operation

# The ids number the known kinds of bad input.
NOT_TEXT: dict[str, object] = {
    "I16 int": 5_318_008,
    "I17 bytes": b"swordfish",
    "I18 list": ["swordfish"],
    "I24 dict": {"swordfish": 1},
}
BROKEN_TEXT: dict[str, object] = {
    "I01 NUL": "sword\0fish",
    "I02 lone high surrogate": "swordfish\ud800",
    "I02 lone low surrogate": "\udfffswordfish",
    "I02 surrogates in pairs": "swordfish\ud83d\ude00",
    **NOT_TEXT,
}
NOT_AN_INT: dict[str, object] = {
    "I35 True": True,
    "I36 False": False,
    "I37 str": "1",
    "I38 SQL": "1 OR 1=1",
    "I39 empty str": "",
    "I40 float": 1.0,
    "I41 fraction": 1.5,
    "I42 NaN": float("nan"),
    "I43 infinity": float("inf"),
    "I45 Decimal": Decimal(1),
    "I47 bytes": b"1",
}
NOT_64_BITS: dict[str, object] = {
    "I31 2^63": 2**63,
    "I32 -2^63-1": -(2**63) - 1,
    "I46 10^400": 10**400,
}
BLANK: dict[str, object] = {
    "I11 empty": "",
    "I12 spaces": "   ",
    "I13 tab and newline": "\t\n",
    "I14 NBSP, ZWSP, ideographic space": "\u00a0\u200b\u3000",
    "I14 joiner, BOM, word joiner": "\u200d\ufeff\u2060",
    "I19 BEL": "\a",
    "I19 bidi override": "\u202e",
}

BAD: dict[str, dict[str, object]] = {
    "user_id": {
        "I50 empty": "",
        "I51 None": None,
        "I52 1 MB": "u" * 1_000_000,
        "I54 NUL": "alice\0bob",
        "I55 lone surrogate": "alice\ud800",
        "I56 int": 5,
        "I62 True": True,
        "I66 256 characters": "u" * 256,
        "I68 blanks": " \t\u00a0\u200b",
        **NOT_TEXT,
    },
    "title": {
        **BROKEN_TEXT,
        **BLANK,
        "I04 201 code points": "x" * 201,
        "I07 101 graphemes of 2": "e\u0301" * 101,
        "I08 29 family emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466" * 29,
        "I09 200 and a space": "x" * 200 + " ",
        "I10 200 and many spaces": "x" * 200 + " " * 50,
        "I15 None": None,
    },
    "description": {
        **BROKEN_TEXT,
        "I22 65,537 code points": "x" * 65_537,
        "I23 10 MB": "x" * 10_000_000,
    },
    "completed": {
        "I26 text": "yes",
        "I27 one": 1,
        "I27 zero": 0,
        "I28 two": 2,
        "I26 text true": "true",
    },
    "task_id": {**NOT_AN_INT, **NOT_64_BITS, "I44 None": None},
    "task_ids": {
        **{f"{name} in a list": [1, value] for name, value in (NOT_AN_INT | NOT_64_BITS).items()},
        "I44 None in a list": [None],
        "None": None,
        "an int": 1,
        "text": "123",
        "bytes": b"123",
        "I109 too many": range(BATCH_MAX + 1),
    },
    "tasks": {
        "None": None,
        "text": "swordfish",
        "tuples": [("swordfish", None, False)],
        "None in a list": [NewTask("x"), None],
        "I109 too many": [NewTask("x")] * (BATCH_MAX + 1),
    },
    "idempotency_key": {**BROKEN_TEXT, **BLANK, "256 characters": "k" * 256},
    "changes": {
        "I74 id": {"id": 2},
        "I105 created_at": {"created_at": datetime.now(UTC)},
        "I105 updated_at": {"updated_at": datetime.now(UTC)},
        "another column": {"email_verified": True},
        "no column": {"swordfish": 1},
    },
    "email": {
        **BROKEN_TEXT,
        "None": None,
        "empty": "",
        "no at sign": "swordfish",
        "two at signs": "sword@fish@example.org",
        "no domain": "swordfish@",
        "I64 blank": "swordfish @example.org",
        "newline": "swordfish@example.org\n",
        "I66b 256 characters": "s" * 250 + "@x.org",
        "longer in lower case": "\u0130" * 128 + "@x.org",
    },
    "name": {**BROKEN_TEXT, "None": None, "256 characters": "n" * 256},
    "username": {**BROKEN_TEXT, **BLANK, "256 characters": "n" * 256},
    "image": {**BROKEN_TEXT, "65,537 characters": "n" * 65_537},
    "limit": {
        "I80 zero": 0,
        "I81 negative": -1,
        "I82 10^9": 1_000_000_000,
        "I83 2^63-1": 2**63 - 1,
        "I84 2^63": 2**63,
        "I85 None": None,
        "I86 text": "5",
        "I87 True": True,
        "I88 fraction": 1.5,
        "one too many": 1_001,
    },
    "search": {**BROKEN_TEXT, "201 characters": "s" * 201},
    "sort": {
        "I108 drop table": "title; drop table tasks",
        "I108 sub-select": "(select pg_sleep(10))",
        "I108 second key": "id desc,(select 1)",
        "name of a member": "NEWEST",
        "value of a member": "newest",
        "None": None,
    },
    "cursor": {"I106 junk": "swordfish", "I106 empty": "", "I106 bytes": b"swordfish"},
    "expected_updated_at": {
        "I95 naive": datetime(2026, 1, 1, 12),  # noqa: DTZ001  # what is refused
        "I97 naive maximum": datetime.max,  # noqa: DTZ901  # likewise
        "I99 text": "2026-01-01",
        "I100 date": date(2026, 1, 1),
        "I101 NaN": float("nan"),
        "I104 epoch": 1_767_225_600,
        "I102 before year 1": datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14))),
        "I103 after year 9999": datetime.max.replace(tzinfo=timezone(-timedelta(hours=12))),
    },
}

GOOD: dict[str, object] = {
    "user_id": "alice",
    "title": "Buy milk",
    "description": "",
    "completed": True,
    "task_id": 1,
    "task_ids": (1, 2),
    "tasks": [NewTask("Buy milk")],
    "idempotency_key": "4f7c8f0e-1c3f-4b8a-9a53-0a4f5a0f6d1e",
    "email": "alice@example.org",
    "name": "",
    "username": None,
    "image": None,
    "limit": 1_000,
    "search": "milk",
    "sort": TaskSort.TITLE,
    "expected_updated_at": datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=9))),
}

CHECKS: dict[str, Callable[[Any], object]] = {
    "user_id": inputs.user_id,
    "title": inputs.title,
    "description": inputs.description,
    "completed": inputs.completed,
    "task_id": inputs.task_id,
    "task_ids": inputs.task_ids,
    "tasks": inputs.new_tasks,
    "idempotency_key": inputs.idempotency_key,
    "changes": inputs.task_changes,
    "email": inputs.email,
    "name": inputs.name,
    "username": inputs.username,
    "image": inputs.image,
    "limit": inputs.limit,
    "search": inputs.search,
    "sort": inputs.sort,
    "cursor": partial(decode, scope=("tasks",), kinds=(int,)),
    "expected_updated_at": partial(inputs.timestamp, "expected_updated_at"),
}


async def exhausted(items: AsyncIterable[object]) -> None:
    async for _ in items:
        pass


type Method = Callable[[TaskRepository, UserRepository, Any], Awaitable[object]]

# For each field, every method and argument through which a value reaches a repository.
METHODS: dict[str, dict[str, Method]] = {
    "user_id": {
        "tasks.create": lambda tasks, _, bad: tasks.create(bad, "x"),
        "tasks.create_many": lambda tasks, _, bad: tasks.create_many(bad, [NewTask("x")]),
        "tasks.get": lambda tasks, _, bad: tasks.get(bad, 1),
        "tasks.list": lambda tasks, _, bad: tasks.list(bad),
        "tasks.iterate": lambda tasks, _, bad: exhausted(tasks.iterate(bad)),
        "tasks.count": lambda tasks, _, bad: tasks.count(bad),
        "tasks.update": lambda tasks, _, bad: tasks.update(bad, 1, title="x"),
        "tasks.toggle": lambda tasks, _, bad: tasks.toggle(bad, 1),
        "tasks.delete": lambda tasks, _, bad: tasks.delete(bad, 1),
        "tasks.update_many": lambda tasks, _, bad: tasks.update_many(bad, [1], title="x"),
        "tasks.delete_many": lambda tasks, _, bad: tasks.delete_many(bad, [1]),
        "tasks.delete_completed": lambda tasks, _, bad: tasks.delete_completed(bad),
        "users.create": lambda _, users, bad: users.create(bad, email="a@example.org", name=""),
        "users.ensure": lambda _, users, bad: users.ensure(bad, email="a@example.org", name=""),
        "users.get": lambda _, users, bad: users.get(bad),
        "users.update": lambda _, users, bad: users.update(bad, name="x"),
        "users.set_email": lambda _, users, bad: users.set_email(bad, email="a@example.org"),
        "users.delete": lambda _, users, bad: users.delete(bad),
    },
    "title": {
        "create": lambda tasks, _, bad: tasks.create("alice", bad),
        "create_many": lambda tasks, _, bad: tasks.create_many(
            "alice", [NewTask("x"), NewTask(bad)]
        ),
        "update": lambda tasks, _, bad: tasks.update("alice", 1, title=bad),
        "update_many": lambda tasks, _, bad: tasks.update_many("alice", [1], title=bad),
    },
    "description": {
        "create": lambda tasks, _, bad: tasks.create("alice", "x", description=bad),
        "create_many": lambda tasks, _, bad: tasks.create_many("alice", [NewTask("x", bad)]),
        "update": lambda tasks, _, bad: tasks.update("alice", 1, description=bad),
        "update_many": lambda tasks, _, bad: tasks.update_many("alice", [1], description=bad),
    },
    "completed": {
        "create": lambda tasks, _, bad: tasks.create("alice", "x", completed=bad),
        "create_many": lambda tasks, _, bad: tasks.create_many(
            "alice", [NewTask("x", completed=bad)]
        ),
        "update": lambda tasks, _, bad: tasks.update("alice", 1, completed=bad),
        "update_many": lambda tasks, _, bad: tasks.update_many("alice", [1], completed=bad),
        "list": lambda tasks, _, bad: tasks.list("alice", completed=bad),
        "iterate": lambda tasks, _, bad: exhausted(tasks.iterate("alice", completed=bad)),
        "count": lambda tasks, _, bad: tasks.count("alice", completed=bad),
    },
    "task_id": {
        "get": lambda tasks, _, bad: tasks.get("alice", bad),
        "update": lambda tasks, _, bad: tasks.update("alice", bad, title="x"),
        "update without a change": lambda tasks, _, bad: tasks.update("alice", bad),
        "toggle": lambda tasks, _, bad: tasks.toggle("alice", bad),
        "delete": lambda tasks, _, bad: tasks.delete("alice", bad),
    },
    "task_ids": {
        "update_many": lambda tasks, _, bad: tasks.update_many("alice", bad, completed=True),
        "delete_many": lambda tasks, _, bad: tasks.delete_many("alice", bad),
    },
    "tasks": {
        "create_many": lambda tasks, _, bad: tasks.create_many("alice", bad),
        "create_many with a key": lambda tasks, _, bad: tasks.create_many(
            "alice", bad, idempotency_key="key"
        ),
    },
    "idempotency_key": {
        "create": lambda tasks, _, bad: tasks.create("alice", "x", idempotency_key=bad),
        "create_many": lambda tasks, _, bad: tasks.create_many(
            "alice", [NewTask("x")], idempotency_key=bad
        ),
    },
    "changes": {
        "tasks.update": lambda tasks, _, bad: tasks.update("alice", 1, **bad),
        "tasks.update_many": lambda tasks, _, bad: tasks.update_many("alice", [1], **bad),
        "users.update": lambda _, users, bad: users.update("alice", **bad),
    },
    "email": {
        "create": lambda _, users, bad: users.create("alice", email=bad, name=""),
        "ensure": lambda _, users, bad: users.ensure("alice", email=bad, name=""),
        "set_email": lambda _, users, bad: users.set_email("alice", email=bad),
    },
    "name": {
        "create": lambda _, users, bad: users.create("alice", email="a@example.org", name=bad),
        "ensure": lambda _, users, bad: users.ensure("alice", email="a@example.org", name=bad),
        "update": lambda _, users, bad: users.update("alice", name=bad),
    },
    "username": {
        "create": lambda _, users, bad: users.create(
            "alice", email="a@example.org", name="", username=bad
        ),
        "update": lambda _, users, bad: users.update("alice", username=bad),
    },
    "image": {"update": lambda _, users, bad: users.update("alice", image=bad)},
    "limit": {"list": lambda tasks, _, bad: tasks.list("alice", limit=bad)},
    "search": {
        "list": lambda tasks, _, bad: tasks.list("alice", search=bad),
        "iterate": lambda tasks, _, bad: exhausted(tasks.iterate("alice", search=bad)),
        "count": lambda tasks, _, bad: tasks.count("alice", search=bad),
    },
    "sort": {
        "list": lambda tasks, _, bad: tasks.list("alice", sort=bad),
        "iterate": lambda tasks, _, bad: exhausted(tasks.iterate("alice", sort=bad)),
    },
    "cursor": {"list": lambda tasks, _, bad: tasks.list("alice", cursor=bad)},
    "expected_updated_at": {
        "update": lambda tasks, _, bad: tasks.update(
            "alice", 1, expected_updated_at=bad, title="x"
        ),
        "update without a change": lambda tasks, _, bad: tasks.update(
            "alice", 1, expected_updated_at=bad
        ),
    },
}


class ReachedError(Exception):
    """A call reached the executor."""


class Recorder:
    """An executor that raises an error when a call reaches it."""

    def __init__(self) -> None:
        self.performed: list[tuple[str, object]] = []

    async def perform[T](self, user_id: str, operation: Operation[T]) -> T:
        self.performed.append((user_id, operation))
        raise ReachedError


def bad_calls() -> Iterator[tuple[str, object, Method]]:
    for field, methods in METHODS.items():
        for method in methods.values():
            for value in BAD[field].values():
                yield field, value, method


def assert_names_the_field_only(error: InvalidInputError, field: str, value: object) -> None:
    assert error.field == field
    assert str(error) == f"{field}: {error.requirement}"
    assert error.__cause__ is None
    assert error.__context__ is None
    # A shorter value may occur by chance in the message.
    if len(text := str(value).strip()[:40]) > 3:
        assert text not in f"{error} {error!r} {error.args} {vars(error)}"
    assert "swordfish" not in f"{error} {error!r} {error.args} {vars(error)}"


class TestChecks:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            pytest.param(field, value, id=f"{field} {name}")
            for field, values in BAD.items()
            for name, value in values.items()
        ],
    )
    def test_refuses_by_field_without_the_value(self, field: str, value: object) -> None:
        with pytest.raises(InvalidInputError) as caught:
            CHECKS[field](value)
        assert_names_the_field_only(caught.value, field, value)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("user_id", "u" * 255),
            ("user_id", "\U0001f642" * 255),
            ("title", "x"),
            ("title", "x" * 200),
            ("title", "\U0001f642" * 200),
            ("title", " x "),
            ("title", "e\u0301" * 100),
            ("description", None),
            ("description", ""),
            ("description", "x" * 65_536),
            ("completed", False),
            ("task_id", 2**63 - 1),
            ("task_id", -(2**63)),
            ("task_id", 0),
            ("tasks", []),
            ("idempotency_key", "k"),
            ("idempotency_key", "k" * 255),
            ("idempotency_key", "\U0001f642" * 255),
            ("idempotency_key", " k "),
            ("name", "n" * 255),
            ("username", "n" * 255),
            ("image", "n" * 65_536),
            ("limit", 1),
            ("search", None),
        ],
        ids=lambda value: str(value)[:12],
    )
    def test_returns_the_boundary_value_unchanged(self, field: str, value: object) -> None:
        assert CHECKS[field](value) == value

    @pytest.mark.parametrize(("field", "value"), GOOD.items())
    def test_takes_a_usual_value(self, field: str, value: object) -> None:
        CHECKS[field](value)

    def test_I71_email_is_lowered_and_stays_so(self) -> None:
        assert inputs.email("Alice@Example.ORG") == "alice@example.org"

    @given(st.emails() | st.from_regex(r"[^\s@]{1,8}@[^\s@]{1,8}", fullmatch=True))
    def test_an_accepted_email_is_accepted_as_it_is_stored(self, text: str) -> None:
        try:
            stored = inputs.email(text)
        except InvalidInputError:
            return
        assert inputs.email(stored) == stored

    def test_ids_are_written_as_text_in_their_order(self) -> None:
        assert inputs.task_ids([3, 1, -1, 3]) == ["3", "1", "-1", "3"]

    def test_I107_wildcards_of_a_search_are_escaped(self) -> None:
        assert inputs.search("100%_\\") == "%100\\%\\_\\\\%"

    def test_an_empty_search_is_none(self) -> None:
        assert inputs.search("") is None

    def test_a_timestamp_is_converted_to_utc(self) -> None:
        noon = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=9)))
        moment = inputs.timestamp("expected_updated_at", noon)
        assert moment == noon
        assert moment.tzinfo is UTC

    def test_I109_an_endless_iterable_is_not_read_to_its_end(self) -> None:
        # Long enough to detect reading it whole, without exhausting the memory.
        ids = iter(range(10 * BATCH_MAX))
        with pytest.raises(InvalidInputError):
            inputs.task_ids(ids)
        assert next(ids, None) is not None


class TestRepositories:
    def test_the_table_covers_every_method(self) -> None:
        methods = {
            f"{prefix}.{name}"
            for prefix, repository in (("tasks", TaskRepository), ("users", UserRepository))
            for name, _ in getmembers(repository, isfunction)
            if not name.startswith("_")
        }
        assert METHODS["user_id"].keys() == methods
        assert METHODS.keys() == BAD.keys() == CHECKS.keys()

    @pytest.mark.parametrize("field", METHODS)
    async def test_send_no_statement_for_bad_input(self, field: str) -> None:
        recorder = Recorder()
        tasks, users = TaskRepository(recorder), UserRepository(recorder)
        for method in METHODS[field].values():
            for value in BAD[field].values():
                with pytest.raises(InvalidInputError) as caught:
                    await method(tasks, users, value)
                assert_names_the_field_only(caught.value, field, value)
        assert recorder.performed == []

    @pytest.mark.parametrize("field", GOOD)
    async def test_send_one_call_for_good_input(self, field: str) -> None:
        for method in METHODS[field].values():
            recorder = Recorder()
            with pytest.raises(ReachedError):
                await method(TaskRepository(recorder), UserRepository(recorder), GOOD[field])
            assert [user_id for user_id, _ in recorder.performed] == ["alice"]

    async def test_I74_a_task_id_cannot_be_chosen(self) -> None:
        with pytest.raises(TypeError):
            await TaskRepository(Recorder()).create("alice", "x", id=1)  # type: ignore[call-arg]


class TestDatabase:
    async def test_acquires_no_connection_for_bad_input(self, url: str) -> None:
        only_one = Database.from_url(url, pool_size=1, max_overflow=0, pool_timeout_seconds=0.05)
        async with only_one as database, database.transaction("alice"):
            for _, value, method in bad_calls():
                with pytest.raises(InvalidInputError):
                    await method(database.tasks, database.users, value)
            for value in BAD["user_id"].values():
                with pytest.raises(InvalidInputError):
                    await database.run(value, lambda tx: tx.tasks.count("alice"))  # type: ignore[arg-type]
                with pytest.raises(InvalidInputError):
                    await database.transaction(value).__aenter__()  # type: ignore[arg-type]
            # The pool has no free connection.
            with pytest.raises(PoolExhaustedError):
                await database.tasks.count("alice")

    async def test_a_transaction_goes_on_after_bad_input(self, database: Database) -> None:
        await database.users.create("alice", email="alice@example.org", name="")
        async with database.transaction("alice") as tx:
            for field, value, method in bad_calls():
                with pytest.raises(InvalidInputError) as caught:
                    await method(tx.tasks, tx.users, value)
                assert caught.value.field == field
            await tx.tasks.create("alice", "x")
        assert await database.tasks.count("alice") == 1

    async def test_I03_I05_I06_I19_I22_I111_boundary_values_are_stored_unchanged(
        self, database: Database, owner: Connection
    ) -> None:
        texts = [
            "x" * 200,
            "\U0001f642" * 200,
            "e\u0301" * 100,
            "\u00e9" * 200,
            " x ",
            "\u200bx\u00a0",
            "\x1b[31mred\a",
            "\u202egnp.exe",
            "'; DROP TABLE tasks; --",
            "\\x41 \\' $1 :title %s {}",
        ]
        await database.users.create("alice", email="alice@example.org", name="")
        for text in texts:
            # The same text for a varchar and a text column in one statement.
            task = await database.tasks.create("alice", text, description=text)
            assert (task.title, task.description) == (text, text)
            task = await database.tasks.update("alice", task.id, title=text, description=text)
            stored = await owner.fetchrow("SELECT title, description FROM tasks")
            assert stored is not None
            assert tuple(stored) == (text, text)
            await database.tasks.delete("alice", task.id)
        longest = "\U0001f642" * 65_536
        task = await database.tasks.create("alice", "x", description=longest)
        assert (await database.tasks.get("alice", task.id)).description == longest

    async def test_every_code_point_is_stored_unchanged(self, database: Database) -> None:
        points = [n for n in range(1, 0x110000) if not 0xD800 <= n <= 0xDFFF]
        texts = ["".join(map(chr, batch)) for batch in batched(points, 65_536, strict=False)]
        await database.users.create("alice", email="alice@example.org", name="")
        tasks = await database.tasks.create_many("alice", [NewTask("x", text) for text in texts])
        assert [task.description for task in tasks] == texts

    @settings(
        max_examples=60,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(titles=st.lists(st.text(min_size=1, max_size=200), min_size=1, max_size=30))
    async def test_every_accepted_title_is_stored_unchanged(
        self, database: Database, titles: list[str]
    ) -> None:
        accepted = []
        for title in titles:
            try:
                accepted.append(inputs.title(title))
            except InvalidInputError:
                continue
        await database.users.ensure("alice", email="alice@example.org", name="")
        tasks = await database.tasks.create_many("alice", map(NewTask, accepted))
        assert [task.title for task in tasks] == accepted

    async def test_I14_what_postgresql_calls_blank_python_calls_blank(
        self, owner: Connection
    ) -> None:
        check = await owner.fetchval(
            "SELECT pg_get_expr(conbin, conrelid) FROM pg_constraint"
            " WHERE conname = 'ck_tasks_title_not_blank'"
        )
        blank = await owner.fetch(f"""
            SELECT title FROM (
                SELECT chr(n) AS title FROM generate_series(1, 1114111) AS n
                WHERE n NOT BETWEEN 55296 AND 57343
            ) AS points WHERE NOT {check}
        """)
        assert len(blank) > 100
        for (title,) in blank:
            with pytest.raises(InvalidInputError):
                inputs.title(title)

    async def test_I53_I57_I61_I67_ids_of_users_are_compared_exactly(
        self, database: Database
    ) -> None:
        ids = [
            "alice",
            "Alice",
            " alice",
            "alice ",
            "alice\n",
            "al'ice",
            'al"ice',
            "al\\ice",
            "al\\'ice",
            "%",
            "_____",
            "' OR '1'='1",
            "$1",
            "\u00e9",
            "e\u0301",
            "\U0001f642" * 255,
        ]
        for number, user_id in enumerate(ids):
            with pytest.raises(UserNotFoundError):
                await database.users.get(user_id)
            user = await database.users.create(user_id, email=f"{number}@example.org", name="")
            assert user.id == user_id
            await database.tasks.create(user_id, f"of {number}")
        for number, user_id in enumerate(ids):
            assert (await database.users.get(user_id)).email == f"{number}@example.org"
            page = await database.tasks.list(user_id)
            assert [(task.user_id, task.title) for task in page.items] == [
                (user_id, f"of {number}")
            ]

    async def test_I30_I33_I34_ids_without_a_task_are_not_found(self, database: Database) -> None:
        await database.users.create("alice", email="alice@example.org", name="")
        await database.tasks.create("alice", "x")
        for task_id in (2**63 - 1, -(2**63), -1, 0):
            for method in METHODS["task_id"].values():
                with pytest.raises(TaskNotFoundError):
                    await method(database.tasks, database.users, task_id)
            assert await database.tasks.delete_many("alice", [task_id]) == 0

    async def test_I70_I71_I72_I73_conflicts_say_no_value(self, database: Database) -> None:
        alice = await database.users.create(
            "alice", email="Swordfish@Example.ORG", name="", username="swordfish"
        )
        assert alice.email == "swordfish@example.org"
        users = database.users
        conflicts: list[tuple[type[Exception], Awaitable[object]]] = [
            (EmailTakenError, users.create("bob", email="SWORDFISH@example.org", name="")),
            (UserIdTakenError, users.create("alice", email="bob@example.org", name="")),
            (
                UsernameTakenError,
                users.create("bob", email="bob@example.org", name="", username="swordfish"),
            ),
            (UserNotFoundError, database.tasks.create("swordfish", "x")),
        ]
        for expected, call in conflicts:
            with pytest.raises(expected) as caught:
                await call
            error = caught.value
            assert error.args == ()
            assert "swordfish" not in f"{error} {error!r}".lower()
            assert error.__cause__ is None
            assert error.__context__ is None

    async def test_I102_I103_extreme_timestamps_are_stale(self, database: Database) -> None:
        await database.users.create("alice", email="alice@example.org", name="")
        task = await database.tasks.create("alice", "x")
        for moment in (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)):
            with pytest.raises(StaleTaskError):
                await database.tasks.update("alice", task.id, expected_updated_at=moment, title="y")

    async def test_I109_as_many_ids_as_allowed_are_one_call(self, database: Database) -> None:
        await database.users.create("alice", email="alice@example.org", name="")
        await database.tasks.create_many("alice", [NewTask("x")] * BATCH_MAX)
        ids = range(1, BATCH_MAX + 1)
        assert await database.tasks.update_many("alice", ids, completed=True) == BATCH_MAX
        assert await database.tasks.delete_many("alice", ids) == BATCH_MAX


class TestSearch:
    async def test_I107_wildcards_find_themselves_only(self, database: Database) -> None:
        texts = [
            "100%",
            "100 percent",
            "%",
            "_",
            "snake_case",
            "snakeXcase",
            "C:\\temp",
            "C:temp",
            "\\",
            "\\%",
            "\\_",
            'it\'s "quoted"',
            "line\nbreak",
            "[a-z]*.?+(x|y)",
        ]
        searches = [*texts, "%%", "__", "\\\\", "0%", "e_c", "E_C", "\\t", ":\\", "'", ".*", "n\nb"]
        await database.users.create("alice", email="alice@example.org", name="")
        await database.tasks.create_many("alice", map(NewTask, texts))
        await database.tasks.create_many("alice", [NewTask("plain", text) for text in texts])
        for search in searches:
            expected = sorted(text for text in texts if search.lower() in text.lower())
            page = await database.tasks.list("alice", search=search)
            titles = [task.title for task in page.items if task.description is None]
            descriptions = [task.description for task in page.items if task.description is not None]
            assert sorted(titles) == expected
            assert sorted(descriptions) == expected
            iterated = {task.id async for task in database.tasks.iterate("alice", search=search)}
            assert iterated == {task.id for task in page.items}
            assert await database.tasks.count("alice", search=search) == len(page.items)

    async def test_is_in_any_case_beyond_ascii(self, database: Database) -> None:
        await database.users.create("alice", email="alice@example.org", name="")
        await database.tasks.create("alice", "\u00c4PFEL")
        assert await database.tasks.count("alice", search="\u00e4pfel") == 1

    async def test_I107_an_empty_search_finds_everything(self, database: Database) -> None:
        await database.users.create("alice", email="alice@example.org", name="")
        await database.tasks.create("alice", "x")
        assert await database.tasks.count("alice", search="") == 1
