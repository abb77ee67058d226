"""Statements as values: built and compiled once by SQLAlchemy, run by whoever executes them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from typing import Any, Final, Protocol, cast

from sqlalchemy import ColumnElement, Executable, Text, bindparam
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.sql.compiler import SQLCompiler

OWNER: Final = "user_id"
"""The parameter that every statement has: whose rows it may see and touch."""

_DIALECT: Final = PGDialect_asyncpg()  # type: ignore[no-untyped-call]


class Row(Protocol):
    """What a driver returns for each row: its columns, by position."""

    def __getitem__(self, index: int, /) -> Any: ...  # noqa: ANN401  # whatever the column holds
    def __iter__(self) -> Iterator[Any]: ...


class Statement:
    """One shape of SQL, written once as a function of its owner and compiled at first use.

    The owner is an argument, so that every statement names it: one whose SQL does not bind it
    is refused when it is compiled.
    """

    def __init__(self, build: Callable[[ColumnElement[str]], Executable]) -> None:
        self._build = build

    @cached_property
    def sql(self) -> str:
        """The text that is sent, with `$1`, `$2`, … for its parameters."""
        return self._compiled[0]

    def arguments(self, user_id: str, values: Mapping[str, object]) -> Iterator[object]:
        """Return the values in the order of the parameters; `values` must name each once."""
        given = {**values, OWNER: user_id}
        return map(given.__getitem__, self._compiled[1])

    @cached_property
    def _compiled(self) -> tuple[str, tuple[str, ...]]:
        owner = bindparam(OWNER, type_=Text())
        compiled = cast("SQLCompiler", self._build(owner).compile(dialect=_DIALECT))  # type: ignore[attr-defined]
        names = tuple(compiled.positiontup or ())
        if OWNER not in names:
            raise AssertionError("a statement does not bind its owner")
        return str(compiled), names


class Retry(Enum):
    """What may be done when it is not known whether a call was committed."""

    READ_ONLY = auto()
    """It changed nothing: its rows are right whatever became of its end."""
    IDEMPOTENT = auto()
    """It sets what it sets: run it again."""
    IDEMPOTENT_DELETE = auto()
    """It deletes one row: run it again, and find nothing left to delete."""
    UNSAFE = auto()
    """It would do it twice, or count wrongly: the caller has to know."""


@dataclass(frozen=True, slots=True)
class Operation[T]:
    """One statement with its values, and what its rows mean.

    Attributes:
        map_rows: Turns the rows into what the caller gets; may raise an error of the tree.
        retry: What an unknown outcome allows.
        needs_savepoint: Whether the caller goes on after an error of the statement, so that a
            transaction of the caller's has to put a savepoint around it.
    """

    statement: Statement
    values: Mapping[str, object]
    map_rows: Callable[[Sequence[Row]], T]
    retry: Retry = Retry.UNSAFE
    needs_savepoint: bool = False


class Executor(Protocol):
    """Runs calls of one user, each in a transaction that carries the user's id."""

    async def perform[T](self, user_id: str, operation: Operation[T]) -> T:
        """Run the call as `user_id`, who was checked; return its result."""
        ...
