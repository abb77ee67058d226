"""The proof that a table of an application is fenced: mallory attacks a row of alice's."""

import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from itertools import count
from typing import Any, Final, NamedTuple, cast
from uuid import UUID, uuid4

from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    Executable,
    Select,
    Table,
    and_,
    delete,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase

from todo_db.database import Database
from todo_db.doctor import examine
from todo_db.errors import ConfigurationError, InvalidInputError, TodoDBError
from todo_db.fence import OWNER, fence_of, kind_of
from todo_db.models import User
from todo_db.transaction import Transaction

type Row = Mapping[str, Any]
type Make = Callable[[Transaction], Awaitable[Row]]
"""Returns the columns of a new row for the user of the transaction, other values at each call."""

_ALICE: Final = "alice"
_MALLORY: Final = "mallory"
_NOBODY: Final = "todo_db-missing"
_USERS: Final = User.__table__
_numbers: Final = count(1)


class _Attack(NamedTuple):
    """What mallory sends.

    Attributes:
        name: What it is, for the message.
        on_alice: Aimed at alice's row.
        on_missing: The same, aimed at a row that does not exist: the answer must be the same.
    """

    name: str
    on_alice: Executable
    on_missing: Executable


class _Outcome(NamedTuple):
    """What mallory learns: how many rows, or which error."""

    rows: int
    error: str


async def assert_fenced(
    database: Database, model: type[DeclarativeBase], *, make: Make | None = None
) -> None:
    """Prove that a user neither reaches another user's rows in a table nor learns of them.

    Asks the doctor about the table first. Then it stores rows of alice and of mallory, with the
    rows that they refer to. As mallory it reads, locks, changes and deletes alice's row, stores a
    row for alice, gives one to alice, takes each of alice's values for a row of its own, and refers
    to what is alice's. Each attempt must end like the same attempt on a row that does not exist.
    Views and functions that read the table are left to `todo-db doctor`.

    ```python
    await assert_fenced(db, Task)
    ```

    Args:
        database: A database with the migrations of the application. It is changed.
        model: An `Owned` class.
        make: Returns the columns of a new row, if a CHECK constraint refuses the values that are
            made up. It may store other rows in the transaction before.

    Raises:
        AssertionError: What mallory did or learnt, and what to write into a migration.
        ConfigurationError: The model is not owned, or no row of it can be stored.
    """
    table = cast("Table", model.__table__)
    if kind_of(table) != "owned":
        raise ConfigurationError(f"{table.fullname} is not owned: derive its class from Owned")
    await _ask_the_doctor(database, table)
    for user in (_ALICE, _MALLORY):
        await database.users.ensure(user, email=f"{user}@example.org", name=user)
    proof = _Proof(database, table, make or partial(_sample, table))
    await proof.run()


async def _ask_the_doctor(database: Database, table: Table) -> None:
    named = re.compile(rf"(?<!\w){re.escape(table.name)}(?!\w)")
    report = await examine(database.settings)
    findings = [
        f"{finding.subject} {finding.problem}: {finding.remedy} ({finding.code})"
        for finding in report.findings
        if named.search(finding.subject)
    ]
    if findings:
        raise AssertionError("\n".join(findings))


class _Undo(Exception):  # noqa: N818  # rolls a transaction back
    """The row is not to be kept."""


class _Proof:
    """Attacks on the rows of one table."""

    def __init__(self, database: Database, table: Table, make: Make) -> None:
        self._database = database
        self._table = table
        self._make = make
        self._fence = fence_of(table)

    async def run(self) -> None:
        alices = await self._store(_ALICE)
        missing = await self._store(_ALICE, keep=False)
        mallorys = await self._store(_MALLORY)
        async with self._database.transaction(_MALLORY) as tx:
            own = {**await self._make(tx), OWNER: _MALLORY}
        for attack in (
            *self._attacks(alices, missing, mallorys),
            *self._references(alices, missing, mallorys, own),
        ):
            await self._try(attack)
        await self._take_values(alices, own)
        async with self._database.transaction(_ALICE) as tx:
            now = (await tx.execute(self._select(alices))).mappings().one_or_none()
        self._require(now == alices, "something that mallory did", "changed alice's row")

    async def _store(self, user: str, *, keep: bool = True) -> Row:
        stored: Row = {}
        with suppress(_Undo):
            async with self._database.transaction(user) as tx:
                stored = await _store(tx, self._table, await self._make(tx))
                if not keep:
                    raise _Undo
        return stored

    async def _try(self, attack: _Attack) -> None:
        seen = await self._outcome(attack.on_alice)
        expected = await self._outcome(attack.on_missing)
        self._require(not seen.rows, attack.name, "reached a row of alice's")
        self._require(
            seen == expected,
            attack.name,
            f"tells whether a row of alice's exists: {seen.error or 'no error'} instead of "
            f"{expected.error or 'no error'}",
        )

    async def _outcome(self, statement: Executable) -> _Outcome:
        try:
            async with self._database.transaction(_MALLORY) as tx:
                return _Outcome(len((await tx.execute(statement)).all()), "")
        except (TodoDBError, SQLAlchemyError) as error:
            return _Outcome(0, f"{type(error).__name__}: {error}")

    async def _take_values(self, alices: Row, own: Row) -> None:
        """Store mallory's own row with the values of alice's, but for what it refers to."""
        references = {
            each.parent.name for key in self._table.foreign_key_constraints for each in key.elements
        }
        taken = {
            name: alices[name] for name in self._fence.insert if name not in {OWNER, *references}
        }
        outcome = await self._outcome(self._insert({**own, **taken}))
        self._require(
            outcome.rows == 1,
            "INSERT of the same values",
            f"tells that alice has them: {outcome.error}; add {OWNER} to the unique key",
        )

    def _require(self, held: bool, attack: str, seen: str) -> None:  # noqa: FBT001
        fence = self._fence
        if held:
            return
        # An assert statement would be rewritten by pytest, and show the rows.
        raise AssertionError(
            f"{self._table.fullname}: mallory's {attack} {seen}. Its fence is made by "
            f"op.fence({fence.table!r}, insert={list(fence.insert)}, update={list(fence.update)}) "
            "in a migration; owned_reference() makes its foreign keys"
        )

    # What mallory sends

    def _attacks(self, alices: Row, missing: Row, mallorys: Row) -> Iterator[_Attack]:
        yield _Attack("SELECT", self._select(alices), self._select(missing))
        if self._fence.update:
            yield _Attack(
                "SELECT … FOR UPDATE",
                self._select(alices).with_for_update(),
                self._select(missing).with_for_update(),
            )
        for name in self._fence.update:
            yield _Attack(
                f"UPDATE of {name}",
                self._update(alices, name, alices[name]),
                self._update(missing, name, missing[name]),
            )
        if self._fence.delete:
            yield _Attack("DELETE", self._delete(alices), self._delete(missing))
        given = {name: missing[name] for name in self._fence.insert}
        yield _Attack(
            "INSERT of a row for alice",
            self._insert({**given, OWNER: _ALICE}),
            self._insert({**given, OWNER: _NOBODY}),
        )
        yield _Attack(
            "UPDATE that gives a row to alice",
            self._update(mallorys, OWNER, _ALICE),
            self._update(mallorys, OWNER, _NOBODY),
        )

    def _references(self, alices: Row, missing: Row, mallorys: Row, own: Row) -> Iterator[_Attack]:
        for constraint in self._table.foreign_key_constraints:
            target = constraint.referred_table
            for each in constraint.elements:
                name = each.parent.name
                if name == OWNER or kind_of(target) != "owned":
                    continue
                # A reference to a row of the same table has none yet.
                key = each.column.name if target is self._table else name
                found, absent = alices[key], missing[key]
                if found is None:
                    continue
                yield _Attack(
                    f"INSERT that refers to {target.fullname}",
                    self._insert({**own, name: found}),
                    self._insert({**own, name: absent}),
                )
                if name in self._fence.update:
                    yield _Attack(
                        f"UPDATE that refers to {target.fullname}",
                        self._update(mallorys, name, found),
                        self._update(mallorys, name, absent),
                    )

    def _is(self, row: Row) -> ColumnElement[bool]:
        return and_(*(column == row[column.name] for column in self._table.primary_key))

    def _select(self, row: Row) -> Select[Any]:
        return select(self._table).where(self._is(row))

    def _insert(self, values: Row) -> Executable:
        return insert(self._table).values(dict(values)).returning(literal(1))

    def _update(self, row: Row, name: str, value: object) -> Executable:
        return update(self._table).where(self._is(row)).values({name: value}).returning(literal(1))

    def _delete(self, row: Row) -> Executable:
        return delete(self._table).where(self._is(row)).returning(literal(1))


async def _store(tx: Transaction, table: Table, values: Row) -> Row:
    statement = insert(table).values({**values, OWNER: tx.user_id}).returning(*table.c)
    try:
        return dict((await tx.execute(statement)).mappings().one())
    except InvalidInputError as refused:
        problem = f"{table.fullname}: no row can be stored: {refused}; give make="
        raise ConfigurationError(problem) from refused


async def _sample(table: Table, tx: Transaction) -> Row:
    """Return made-up values for the columns that need one, and store what they refer to."""
    values: dict[str, Any] = {}
    for constraint in table.foreign_key_constraints:
        target = constraint.referred_table
        if target is table or target is _USERS:
            continue
        if kind_of(target) == "owned":
            row: Mapping[Any, Any] = await _store(tx, target, await _sample(target, tx))
        else:
            row = (await tx.execute(select(target).limit(1))).mappings().one()
        values |= {each.parent.name: row.get(each.column.name) for each in constraint.elements}
    for name in fence_of(table).insert:
        column = table.c[name]
        is_made = column.default is not None or column.server_default is not None
        if name not in {OWNER, *values} and not column.nullable and not is_made:
            values[name] = _value(column)
    return {name: value for name, value in values.items() if name != OWNER}


def _value(column: Column[Any]) -> object:
    number = next(_numbers)
    kind = column.type.python_type
    enums: Sequence[str] = getattr(column.type, "enums", ())
    if enums:
        return enums[0]
    if isinstance(column.type, JSON):
        return {}
    moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
    made: dict[type, object] = {
        str: str(number)[-(getattr(column.type, "length", None) or 9) :],
        int: number % 30_000,
        bool: False,
        float: float(number),
        Decimal: Decimal(number % 10),
        datetime: moment,
        date: moment.date(),
        time: moment.time(),
        timedelta: timedelta(seconds=number),
        UUID: uuid4(),
        bytes: str(number).encode(),
        list: [],
    }
    if kind not in made:
        raise ConfigurationError(f"{column.name}: no value is known, so give make=")
    return made[kind]
