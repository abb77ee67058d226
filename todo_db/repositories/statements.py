"""Statements as values: built and compiled once by SQLAlchemy, run by an `Executor`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum, auto
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Protocol, cast

from sqlalchemy import (
    BindParameter,
    ClauseElement,
    ColumnElement,
    Executable,
    Select,
    SelectBase,
    Text,
    bindparam,
    func,
    literal_column,
    select,
    true,
)
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.sql import visitors
from sqlalchemy.sql.compiler import SQLCompiler

from todo_db.errors import ConfigurationError, TodoDBError

OWNER: Final = "user_id"
"""The parameter that every statement has: whose rows it may see and touch."""

_DIALECT: Final = PGDialect_asyncpg()  # type: ignore[no-untyped-call]


class Row(Protocol):
    """What a driver returns for each row: its columns, by position."""

    def __getitem__(self, index: int, /) -> Any: ...  # noqa: ANN401  # whatever the column holds
    def __iter__(self) -> Iterator[Any]: ...


class Compiled(NamedTuple):
    """A statement as it is sent.

    Attributes:
        sql: The text, with `$1`, `$2`, … for its parameters.
        names: The parameters' names, in this order.
        constants: The values of those that the statement brings itself, as `Label.size > 3` does.
    """

    sql: str
    names: tuple[str, ...]
    constants: Mapping[str, object]

    def arguments(self, user_id: str, values: Mapping[str, object]) -> tuple[object, ...]:
        """Return the values in the order of the parameters, as asyncpg takes them.

        Raises:
            ConfigurationError: `values` has none for a parameter of the statement.
        """
        given = {**self.constants, **values, OWNER: user_id}
        try:
            return tuple([given[name] for name in self.names])
        except KeyError as error:
            failure = ConfigurationError(f"the operation has no value for {error}")
        raise failure


class Statement:
    """One shape of SQL, written once as a function of its owner and compiled at first use.

    The owner is an argument, so that every statement names it: one whose SQL does not bind it
    is refused when it is compiled.

    Attributes:
        name: What logs and traces call it: the repository and the method, such as `tasks.list`.

    ```python
    FIRST = Statement(lambda owner: select(func.min(Task.id)).where(Task.user_id == owner))
    ```
    """

    def __init__(
        self, build: Callable[[ColumnElement[str]], Executable], *, name: str = "statement"
    ) -> None:
        self.name: Final = name
        self._build = build

    @cached_property
    def in_transaction(self) -> Compiled:
        """The statement for a transaction, whose BEGIN has set user, role and search path."""
        _, statement = self._built()
        return _compiled(statement)

    @cached_property
    def alone(self) -> Compiled:
        """The same statement for autocommit: it sets its user itself.

        It stays as it is, inside `WITH result AS (…)`, and is read under a condition that sets the
        user and names no column: PostgreSQL evaluates that once, before it starts the statement
        (docs/decisions/0011-one-trip.md). Tables are written with their schema.
        """
        owner, inner = self._built()
        result = cast("Select[Any]", inner).cte("result")
        if isinstance(inner, SelectBase):
            result = result.prefix_with("MATERIALIZED")
        user = func.pg_catalog.set_config(literal_column("'todo_db.user_id'"), owner, true())
        return _compiled(
            select(result).where(select(user).scalar_subquery().is_not(None)),
            schema_translate_map={None: "public"},
            render_schema_translate=True,
        )

    def _built(self) -> tuple[BindParameter[str], Executable]:
        owner = bindparam(OWNER, type_=Text())
        statement = self._build(owner)
        if not any(
            _is_owner(element) for element in visitors.iterate(cast("ClauseElement", statement))
        ):
            raise AssertionError("a statement does not bind its owner")
        return owner, statement


def _is_owner(element: object) -> bool:
    return isinstance(element, BindParameter) and element.key == OWNER


def _compiled(statement: Executable, **options: object) -> Compiled:
    compiled = cast("SQLCompiler", statement.compile(dialect=_DIALECT, **options))  # type: ignore[attr-defined]
    if compiled.post_compile_params:
        raise AssertionError("IN needs a text of its own for each number of values: use any_")
    names = tuple(compiled.positiontup or ())
    binds = compiled.binds
    constants = {name: binds[name].value for name in names if not binds[name].required}
    return Compiled(str(compiled), names, constants)


class Retry(Enum):
    """What may be done when it is not known whether an operation was committed."""

    READ_ONLY = auto()
    """It changed nothing, so its rows are right whether or not its transaction was committed."""
    IDEMPOTENT = auto()
    """Running it twice leaves what running it once leaves, so it is run again."""
    IDEMPOTENT_DELETE = auto()
    """It deletes one row, so it is run again, and a missing row is its success."""
    UNSAFE = auto()
    """Not safe to repeat. If the outcome is unknown, `OutcomeUnknownError` is raised."""


class Operation[T](NamedTuple):
    """One statement with its values, and what its rows mean.

    ```python
    def first(rows: Sequence[Row]) -> int | None:
        return rows[0][0]


    operation = Operation(FIRST, {}, first, Retry.READ_ONLY)
    assert await db.perform("alice", operation) is None  # alice has no task yet
    ```

    Attributes:
        statement: What is sent.
        values: Its parameters by name, the owner excepted.
        map_rows: Turns the rows into what the caller gets; may raise an error of the tree.
        retry: What an unknown outcome allows.
        needs_savepoint: Whether the caller goes on after an error of the statement, so that a
            transaction of the caller's has to put a savepoint around it.
        errors: What the caller gets when a constraint, by its name, is broken.
    """

    statement: Statement
    values: Mapping[str, object]
    map_rows: Callable[[Sequence[Row]], T]
    retry: Retry = Retry.UNSAFE
    needs_savepoint: bool = False
    errors: Mapping[str, Callable[[], TodoDBError]] = MappingProxyType({})

    def failure(self, error: TodoDBError) -> TodoDBError:
        """Return what the caller gets for an error of the statement."""
        make = self.errors.get(error.constraint or "")
        return error if make is None else make()


class Executor(Protocol):
    """Runs calls of one user, each in a transaction that carries the user's id.

    `Database` and `Transaction` are executors. A repository takes one:

    ```python
    class FirstTask:
        def __init__(self, executor: Executor) -> None:
            self._executor = executor

        async def id(self, user_id: str) -> int | None:
            return await self._executor.perform(user_id, operation)


    assert await FirstTask(db).id("alice") is None
    ```
    """

    async def perform[T](self, user_id: str, operation: Operation[T]) -> T:
        """Run the call as `user_id`, who was checked; return its result."""
        ...
