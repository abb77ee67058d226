"""The SQL text of the repositories; only the last class uses a database."""

import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from itertools import product
from typing import Final, NamedTuple, NoReturn, Self, cast

import pytest
from driver import Connection
from shapes import SHAPES, TASK_CHANGES, USER_CHANGES, parameters
from sqlalchemy import ColumnElement, Executable, Select, bindparam, insert, select, update
from sqlalchemy.sql.selectable import ReturnsRows

from todo_db import (
    ConfigurationError,
    Database,
    NewTask,
    TaskRepository,
    TaskSort,
    UserRepository,
)
from todo_db.models import Task
from todo_db.pagination import Key, encode
from todo_db.repositories import Operation, Statement
from todo_db.repositories.statements import Compiled

_OWNER_COLUMN: Final = {"tasks": "user_id", "users": "id", "idempotency_keys": "user_id"}
_TABLE: Final = re.compile(r"\b(tasks|users|idempotency_keys)\b(?!\.)")
_CLAUSES: Final = re.compile(r"\b(?:ORDER BY|RETURNING|LIMIT|FOR UPDATE|GROUP BY|ON CONFLICT)\b")
_INSERT: Final = re.compile(
    r"INSERT INTO (?P<table>tasks|users|idempotency_keys) \((?P<columns>[^)]*)\) "
    r"(?:VALUES \((?P<values>[^)]*)\)|SELECT (?P<selected>.*?)\s+FROM)",
    re.DOTALL,
)
# The only literals of the package: the value of rows that are only counted, and an empty array of
# ids.
_LITERALS: Final = ("RETURNING 1", "'{}'::bigint[]")
_INSERTABLE: Final = {
    "tasks": {"user_id", "title", "description", "completed"},
    "users": {"id", "email", "username", "name", "image"},
    "idempotency_keys": {"user_id", "key", "fingerprint", "task_ids"},
}
_WIRE_TYPES: Final = {"text", "varchar", "int8", "int4", "bool", "timestamptz", "text[]"}

_MARK: Final = "mark-in-every-value"
_CHANGES: Final[dict[str, object]] = {"title": _MARK, "description": _MARK, "completed": True}
_MOMENT: Final = datetime(2026, 11, 21, tzinfo=UTC)

shapes = pytest.mark.parametrize("statement", SHAPES.values(), ids=SHAPES.keys())


def _queries(sql: str) -> Iterator[str]:
    """Yield each query of the text, without its nested parentheses."""
    nested = [""]
    for char in sql:
        if char == "(":
            nested.append("")
        elif char == ")":
            yield from nested.pop().split("UNION ALL")
            nested[-1] += "()"
        else:
            nested[-1] += char
    yield from nested.pop().split("UNION ALL")


def _conditions(query: str) -> list[str]:
    """Return the conditions that are combined with AND; none if there is an OR."""
    where = _CLAUSES.split(query.partition("WHERE")[2])[0]
    return [] if " OR " in where else [part.strip() for part in where.split(" AND ")]


def unscoped(statement: Statement) -> list[str]:
    """Return the tables that a statement reads or writes without its owner."""
    owner = f"${parameters(statement).index('user_id') + 1}::VARCHAR"
    inserted = [match.group("table") for match in _INSERT.finditer(statement.in_transaction.sql)]
    missed = [
        match.group("table")
        for match in _INSERT.finditer(statement.in_transaction.sql)
        if owner not in _inserted(match)[_OWNER_COLUMN[match.group("table")]]
    ]
    for query in _queries(statement.in_transaction.sql):
        for table in _TABLE.findall(query):
            if f"INSERT INTO {table} ()" in query and table in inserted:
                continue
            if f"{table}.{_OWNER_COLUMN[table]} = {owner}" not in _conditions(query):
                missed.append(table)
    return missed


def _inserted(match: re.Match[str]) -> dict[str, str]:
    values = (match.group("values") or match.group("selected")).split(", ")
    return dict(zip(match.group("columns").split(", "), values, strict=True))


class TestStatement:
    @shapes
    def test_binds_its_owner(self, statement: Statement) -> None:
        assert parameters(statement).count("user_id") == 1

    @shapes
    def test_names_its_owner_wherever_it_names_a_table(self, statement: Statement) -> None:
        assert _TABLE.search(statement.in_transaction.sql)
        assert unscoped(statement) == []

    @shapes
    def test_has_no_value_in_its_text(self, statement: Statement) -> None:
        text = statement.in_transaction.sql
        for literal_ in _LITERALS:
            text = text.replace(literal_, "")
        assert "'" not in text
        assert re.findall(r"(?<![$\w])\d+", text) == []

    @shapes
    def test_binds_no_array_but_of_text(self, statement: Statement) -> None:
        assert set(re.findall(r"\$\d+::([A-Z ]+)\[\]", statement.in_transaction.sql)) <= {"TEXT"}

    @shapes
    def test_lists_its_columns(self, statement: Statement) -> None:
        assert "*" not in statement.in_transaction.sql.replace("count(*)", "")
        inserts = list(_INSERT.finditer(statement.in_transaction.sql))
        assert len(inserts) == statement.in_transaction.sql.count("INSERT")
        for match in inserts:
            assert set(match.group("columns").split(", ")) <= _INSERTABLE[match.group("table")]


_ALONE: Final = re.compile(
    r"WITH (?P<before>.*)\bresult AS (?P<materialized>MATERIALIZED )?\n\((?P<inner>.*)\)\n"
    r" SELECT (?P<columns>[^()]*) \nFROM result \nWHERE (?P<condition>.*)",
    re.DOTALL,
)


class Alone(NamedTuple):
    """The parts of a statement that carries its user, with its parameters by name."""

    before: str
    materialized: str | None
    inner: str
    columns: str
    condition: str

    @classmethod
    def of(cls, statement: Statement) -> Self:
        match = _ALONE.fullmatch(_with_names(statement.alone))
        assert match is not None
        return cls(*match.groups())


def _with_names(compiled: Compiled) -> str:
    return re.sub(r"\$(\d+)", lambda place: f":{compiled.names[int(place[1]) - 1]}", compiled.sql)


def _without_aliases(sql: str) -> str:
    """Drop the name that SQLAlchemy repeats for each column of a CTE, and its own numbers."""
    return re.sub(r"\banon_\d+\b", "anon", re.sub(r"\b(\w+\.(\w+)) AS \2\b", r"\1", sql))


class TestAlone:
    """The statement that carries its user, for autocommit."""

    @shapes
    def test_binds_its_owner_and_the_same_values(self, statement: Statement) -> None:
        assert statement.alone.names.count("user_id") == 1
        assert sorted(statement.alone.names) == sorted(statement.in_transaction.names)

    @shapes
    def test_sets_its_owner_once_and_until_its_end(self, statement: Statement) -> None:
        assert statement.alone.sql.count("set_config(") == 1
        condition = Alone.of(statement).condition
        # An alias is only a name. There is no column in it.
        assert re.sub(r" AS \w+", "", condition) == (
            "(SELECT pg_catalog.set_config('todo_db.user_id', :user_id::VARCHAR, true)) IS NOT NULL"
        )

    @shapes
    def test_returns_every_column_of_the_statement(self, statement: Statement) -> None:
        columns = Alone.of(statement).columns.split(", ")
        assert all(re.fullmatch(r"result\.\w+", column) for column in columns)
        assert len(set(columns)) == len(columns) == _number_of_columns(statement)

    @shapes
    def test_is_the_statement_of_a_transaction_word_for_word(self, statement: Statement) -> None:
        parts = Alone.of(statement)
        before = f"WITH {parts.before.removesuffix(', \n')}\n " if parts.before else ""
        inner = _without_aliases(f"{before}{parts.inner}".replace("public.", ""))
        assert inner == _without_aliases(_with_names(statement.in_transaction))

    @shapes
    def test_names_the_schema_of_every_table(self, statement: Statement) -> None:
        names = re.findall(r"([\w.]*)\b(?:tasks|users|idempotency_keys)\b", statement.alone.sql)
        assert names
        assert set(names) == {"public."}

    @shapes
    def test_keeps_a_query_apart_from_what_is_around_it(self, statement: Statement) -> None:
        parts = Alone.of(statement)
        # PostgreSQL never merges one that changes rows.
        assert (parts.materialized is not None) == parts.inner.startswith("SELECT")

    @shapes
    def test_has_no_value_in_its_text(self, statement: Statement) -> None:
        text = statement.alone.sql.replace("'todo_db.user_id'", "")
        for literal_ in _LITERALS:
            text = text.replace(literal_, "")
        assert "'" not in text
        assert re.findall(r"(?<![$\w])\d+", text) == []

    def test_is_refused_without_its_owner(self) -> None:
        statement = Statement(lambda _owner: _task(Task.id == bindparam("task_id")))
        # The condition binds it, but the statement does not.
        with pytest.raises(AssertionError, match="owner"):
            _ = statement.alone


def _number_of_columns(statement: Statement) -> int:
    inner = statement._build(bindparam("user_id"))
    assert isinstance(inner, ReturnsRows)
    return len(inner.exported_columns)


def _task(*where: ColumnElement[bool]) -> Select[int]:
    return select(Task.id).where(*where)


class TestConstants:
    async def test_value_that_a_statement_brings_itself_is_sent(self, db: Database) -> None:
        task = await db.tasks.create("alice", "Buy milk")
        await db.tasks.create("alice", "Buy bread")
        statement = Statement(
            lambda owner: _task(Task.user_id == owner, Task.title == "Buy milk").limit(2)
        )
        operation = Operation(statement, {}, lambda rows: [row[0] for row in rows])
        assert await db.perform("alice", operation) == [task.id]
        assert await db.perform("bob", operation) == []

    async def test_value_can_be_null(self, db: Database) -> None:
        task = await db.tasks.create("alice", "Buy milk", description="Two litres")
        statement = Statement(
            lambda owner: (
                update(Task)
                .where(Task.user_id == owner)
                .values(description=None)
                .returning(Task.id, Task.description)
            )
        )
        operation = Operation(statement, {}, lambda rows: [tuple(row) for row in rows])
        assert await db.perform("alice", operation) == [(task.id, None)]

    async def test_parameter_without_a_value_is_named(self, db: Database) -> None:
        statement = Statement(
            lambda owner: _task(Task.user_id == owner, Task.title == bindparam("wanted"))
        )
        with pytest.raises(ConfigurationError, match="no value for 'wanted'"):
            await db.perform("alice", Operation(statement, {"title": _MARK}, len))

    @pytest.mark.parametrize("ids", [[1, 2], bindparam("ids", expanding=True)])
    def test_IN_of_values_is_refused(self, ids: object) -> None:
        statement = Statement(lambda owner: _task(Task.user_id == owner, Task.id.in_(ids)))  # type: ignore[arg-type]
        with pytest.raises(AssertionError, match="any_"):
            _ = statement.alone


class TestForgottenOwner:
    def test_statement_that_does_not_bind_it_is_refused(self) -> None:
        statement = Statement(lambda _owner: _task(Task.id == bindparam("task_id")))
        with pytest.raises(AssertionError, match="owner"):
            _ = statement.in_transaction.sql

    @pytest.mark.parametrize(
        "build",
        [
            lambda owner: select(Task.id, owner),
            lambda owner: _task(Task.title == owner),
            lambda owner: _task((Task.user_id == owner) | (Task.completed == owner)),
            lambda owner: _task(Task.user_id >= owner),
            lambda owner: _task(Task.user_id == owner).union_all(_task()),
            lambda owner: _task(Task.id.in_(select(Task.id).where(Task.user_id == owner))),
            lambda owner: _task(Task.user_id == owner, select(Task.id).correlate(None).exists()),
            lambda owner: insert(Task).values(user_id=bindparam("other"), title=owner),
        ],
        ids=[
            "selected only",
            "another column",
            "one of two",
            "not equal",
            "half of a union",
            "inside only",
            "outside only",
            "inserted elsewhere",
        ],
    )
    def test_statement_that_binds_it_without_using_it_is_found(
        self, build: Callable[[ColumnElement[str]], Executable]
    ) -> None:
        assert unscoped(Statement(build)) != []


class _SentError(Exception):
    """Ends a call instead of sending it."""


class _Recorder:
    """An executor that records the operations of a repository."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Operation[object]]] = []

    async def perform[T](self, user_id: str, operation: Operation[T]) -> NoReturn:
        self.calls.append((user_id, cast("Operation[object]", operation)))
        raise _SentError


async def _first[T](items: AsyncIterator[T]) -> T:
    return await anext(items)


def _lists(tasks: TaskRepository) -> Iterator[tuple[str, Awaitable[object]]]:
    keys: dict[TaskSort, tuple[Key, ...]] = {
        TaskSort.RECENTLY_UPDATED: (_MOMENT, 1),
        TaskSort.TITLE: (_MARK, 1),
    }
    for sort, completed, search in product(TaskSort, (None, True), (None, _MARK)):
        pattern = None if search is None else f"%{search}%"
        cursor = encode(("tasks", sort.value, completed, pattern), keys.get(sort, (1,)))
        for after in (None, cursor):
            yield (
                "list",
                tasks.list("alice", sort=sort, completed=completed, search=search, cursor=after),
            )
        yield "iterate", _first(tasks.iterate("alice", sort=sort))
        yield "count", tasks.count("alice", completed=completed, search=search)


def _task_calls(tasks: TaskRepository) -> Iterator[tuple[str, Awaitable[object]]]:
    yield from _lists(tasks)
    yield "create", tasks.create("alice", _MARK, description=_MARK)
    yield "create", tasks.create("alice", _MARK, idempotency_key=_MARK)
    yield "create_many", tasks.create_many("alice", [NewTask(_MARK, _MARK)])
    yield (
        "create_many",
        tasks.create_many("alice", [NewTask(_MARK, _MARK)], idempotency_key=_MARK),
    )
    yield "get", tasks.get("alice", 1)
    yield "toggle", tasks.toggle("alice", 1)
    yield "delete", tasks.delete("alice", 1)
    yield "delete_many", tasks.delete_many("alice", [1])
    yield "delete_completed", tasks.delete_completed("alice")
    yield "update", tasks.update("alice", 1)
    yield "update", tasks.update("alice", 1, expected_updated_at=_MOMENT)
    for columns in TASK_CHANGES:
        changes = {name: _CHANGES[name] for name in columns}
        yield "update", tasks.update("alice", 1, **changes)  # type: ignore[arg-type]
        yield (
            "update",
            tasks.update("alice", 1, expected_updated_at=_MOMENT, **changes),  # type: ignore[arg-type]
        )
        yield "update_many", tasks.update_many("alice", [1], **changes)  # type: ignore[arg-type]


def _user_calls(users: UserRepository) -> Iterator[tuple[str, Awaitable[object]]]:
    yield "create", users.create("alice", email=f"{_MARK}@example.org", name=_MARK)
    yield "ensure", users.ensure("alice", email=f"{_MARK}@example.org", name=_MARK)
    yield "get", users.get("alice")
    yield "set_email", users.set_email("alice", email=f"{_MARK}@example.org")
    yield "delete", users.delete("alice")
    yield "update", users.update("alice")
    for columns in USER_CHANGES:
        yield "update", users.update("alice", **dict.fromkeys(columns, _MARK))


def _methods(repository: type) -> set[str]:
    return {
        name
        for name, _ in inspect.getmembers(repository, inspect.isfunction)
        if not name.startswith("_")
    }


async def _sent() -> list[tuple[str, Operation[object]]]:
    """Call every method in every shape; return the operations."""
    recorder = _Recorder()
    for repository, calls in (
        (TaskRepository, _task_calls(TaskRepository(recorder))),
        (UserRepository, _user_calls(UserRepository(recorder))),
    ):
        called = set()
        for method, call in calls:
            called.add(method)
            with suppress(_SentError):
                await call
        assert called == _methods(repository)
    return recorder.calls


class TestRepositories:
    async def test_send_these_statements_and_no_others(self) -> None:
        sent = {operation.statement.in_transaction.sql for _, operation in await _sent()}
        assert sent == {statement.in_transaction.sql for statement in SHAPES.values()}

    async def test_give_every_parameter_its_value(self) -> None:
        for user_id, operation in await _sent():
            assert user_id == "alice"
            assert {*operation.values, "user_id"} >= set(parameters(operation.statement))

    async def test_send_values_apart_from_the_text(self) -> None:
        for _, operation in await _sent():
            assert _MARK not in operation.statement.in_transaction.sql


class TestPostgreSQL:
    async def test_takes_every_statement_with_types_the_driver_knows(
        self, owner: Connection
    ) -> None:
        for name, statement in SHAPES.items():
            prepared = await owner.prepare(statement.in_transaction.sql)
            alone = await owner.prepare(statement.alone.sql)
            assert alone.get_parameters() == prepared.get_parameters(), name
            returned = [one.type for one in alone.get_attributes()]
            assert returned == [one.type for one in prepared.get_attributes()], name
            types = {parameter.name for parameter in prepared.get_parameters()}
            types |= {attribute.type.name for attribute in prepared.get_attributes()}
            assert types <= _WIRE_TYPES, name
