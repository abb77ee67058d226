"""What fences a table: its rows belong to one user each, or all users share them.

`Owned` and `Shared` of `todo_db.models` declare it; `todo_db.operations` writes it into migrations.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Literal, NamedTuple, TypedDict, cast

from sqlalchemy import (
    Column,
    Constraint,
    ForeignKeyConstraint,
    Integer,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.dialects.postgresql import ExcludeConstraint
from sqlalchemy.exc import NoReferencedColumnError, NoReferencedTableError
from sqlalchemy.sql.naming import conv

from todo_db.errors import ConfigurationError

OWNER: Final = "user_id"
ROLE: Final = "todo_app"
"""The role that the transactions of the application run as."""
RULE: Final = "= nullif((SELECT current_setting('todo_db.user_id', true)), '')"
"""Follows the name of the column that names the user, in every policy of an owned table."""

PRINTED_RULE: Final = (
    "= NULLIF(( SELECT current_setting('todo_db.user_id'::text, true) AS current_setting),"
    " ''::text))"
)
"""The same as PostgreSQL 15 to 18 print it, behind a bracket and the name of the column."""

# A key of `Column.info`. Of a table, Alembic would write the info into migrations.
_DECLARED: Final = "todo_db"
_LONGEST_NAME: Final = 63

type Kind = Literal["owned", "shared"]


class FenceOptions(TypedDict, total=False):
    """What the application may do with an owned table, where that is not everything.

    ```python
    __fence__ = FenceOptions(update=["name"], delete=False)
    ```

    Attributes:
        insert: The columns that it may set in a new row.
        update: The columns that it may change.
        delete: Whether it may delete rows.
    """

    insert: Sequence[str]
    update: Sequence[str]
    delete: bool


def object_name(*parts: str) -> conv:
    """Return a name of a constraint or an index, with a digest if PostgreSQL would cut it.

    A naming convention of the application does not change it.
    """
    name = "_".join(parts)
    if _is_cut(name):
        digest = blake2b(name.encode(), digest_size=4).hexdigest()
        name = f"{name.encode()[: _LONGEST_NAME - 9].decode(errors='ignore')}_{digest}"
    return conv(name)


@dataclass(frozen=True, slots=True)
class Fence:
    """What the application may do with a table whose rows belong to one user each.

    Attributes:
        table: Its name.
        schema: Its schema; None is the first one of the search path, `public`.
        insert: The columns that it may set in a new row.
        update: The columns that it may change.
        delete: Whether it may delete rows.
        touch: Whether a trigger sets `updated_at` when a row changes.
    """

    table: str
    schema: str | None = None
    insert: tuple[str, ...] = ()
    update: tuple[str, ...] = ()
    delete: bool = True
    touch: bool = False


class _Declared(NamedTuple):
    kind: Kind
    options: FenceOptions


def declare(table: Table, kind: Kind, options: FenceOptions) -> None:
    """Note in the metadata that a table is owned or shared."""
    for column in table.primary_key:
        column.info[_DECLARED] = _Declared(kind, options)


def kind_of(table: Table) -> Kind | None:
    """Return whether a table was declared as owned or as shared."""
    declared = _declared(table)
    return None if declared is None else declared.kind


def fence_of(table: Table) -> Fence:
    """Return the fence that an owned table was declared with."""
    declared = _declared(table)
    options = FenceOptions() if declared is None else declared.options
    insert = [column.name for column in table.c if _is_given(column)]
    fixed = {OWNER, *(column.name for column in table.primary_key)}
    update = [name for name in insert if name not in fixed]
    return Fence(
        table=table.name,
        schema=table.schema,
        insert=tuple(sorted(options.get("insert", insert))),
        update=tuple(sorted(options.get("update", update))),
        delete=options.get("delete", True),
        touch=any(_is_touched(column) for column in table.c),
    )


def problems(table: Table) -> Iterator[str]:
    """Yield what would let one user learn of another one's rows through a table."""
    name = table.fullname
    for cut in filter(_is_cut, (table.name, *(column.name for column in table.c))):
        yield f"the name {cut} is longer than {_LONGEST_NAME} bytes: PostgreSQL would cut it"
    if kind_of(table) == "owned":
        yield from _owned_problems(name, table)
    # No user may write a shared one.
    for constraint in table.foreign_key_constraints if kind_of(table) != "shared" else ():
        yield from _foreign_key_problems(name, constraint)


def _owned_problems(name: str, table: Table) -> Iterator[str]:
    owner = table.c.get(OWNER)
    if owner is None or owner.nullable or not isinstance(owner.type, Text):
        yield (
            f"{name} has no column {OWNER} text NOT NULL, as Owned adds it; a class that inherits "
            "from a mapped class with another table cannot have one: use owned_reference() instead"
        )
        return
    for column in table.primary_key:
        if _is_numbered_by_hand(column):
            yield (
                f"{name}.{column.name} needs a sequence that the application may not use: use "
                "mapped_column(BigInteger, Identity(always=True), primary_key=True), or "
                "autoincrement=False if the application numbers the rows"
            )
    fence = fence_of(table)
    named = {*fence.insert, *fence.update}
    if unknown := named - {column.name for column in table.c}:
        yield f"{name} has no column {', '.join(sorted(unknown))}, which its __fence__ names"
    # What is computed from the values of the application is given by it, too.
    given = named | {column.name for column in table.c if column.computed is not None}
    for columns, has_owner in _unique_keys(table):
        if not has_owner and columns <= given:
            yield (
                f"the unique key ({', '.join(sorted(columns))}) of {name} tells a user by an error "
                f"which values others have: add {OWNER} to it"
            )


def check(table: Table) -> None:
    """Refuse a table through which one user could learn of another one's rows.

    Raises:
        ConfigurationError: The first of its problems.
    """
    for problem in problems(table):
        raise ConfigurationError(problem)


def fence_sql(fence: Fence, quote: Callable[[str], str]) -> Iterator[str]:
    """Yield the statements that put a fence around a table, in place of one that is there.

    Args:
        fence: What to put around it.
        quote: Quotes an identifier.
    """
    table = _named(fence.table, fence.schema, quote)
    mine = f"{OWNER} {RULE}"
    yield from _enabled(table, fence.schema, quote)
    yield f"CREATE POLICY own ON {table} TO {ROLE} USING ({mine}) WITH CHECK ({mine})"
    # Permissive policies are combined by OR, so one that is added by mistake would open the table.
    # A restrictive one is combined with all of them by AND.
    yield (
        f"CREATE POLICY fence ON {table} AS RESTRICTIVE TO {ROLE}"
        f" USING ({mine}) WITH CHECK ({mine})"
    )
    rights = ["SELECT", *(["DELETE"] if fence.delete else [])]
    rights += [f"{right} ({names})" for right, names in _column_rights(fence, quote)]
    yield f"GRANT {', '.join(rights)} ON {table} TO {ROLE}"
    if fence.touch:
        yield (
            f"CREATE TRIGGER touch BEFORE UPDATE ON {table} FOR EACH ROW"
            " WHEN (OLD.* IS DISTINCT FROM NEW.*) EXECUTE FUNCTION public.set_updated_at()"
        )


def share_sql(table: str, schema: str | None, quote: Callable[[str], str]) -> Iterator[str]:
    """Yield the statements that let every user read a table, and no user change it."""
    name = _named(table, schema, quote)
    yield from _enabled(name, schema, quote)
    yield f"CREATE POLICY todo_db_shared ON {name} FOR SELECT TO {ROLE} USING (true)"
    yield f"GRANT SELECT ON {name} TO {ROLE}"


def unfence_sql(table: str, schema: str | None, quote: Callable[[str], str]) -> Iterator[str]:
    """Yield the statements that take a table away from the application."""
    name = _named(table, schema, quote)
    yield from _cleared(name)
    yield f"ALTER TABLE {name} NO FORCE ROW LEVEL SECURITY, DISABLE ROW LEVEL SECURITY"


def grant_sql(fence: Fence, quote: Callable[[str], str], *, revoke: bool = False) -> Iterator[str]:
    """Yield the statements that grant, or revoke, rights on columns of a table that is fenced."""
    table = _named(fence.table, fence.schema, quote)
    verb, preposition = ("REVOKE", "FROM") if revoke else ("GRANT", "TO")
    for right, names in _column_rights(fence, quote):
        yield f"{verb} {right} ({names}) ON {table} {preposition} {ROLE}"


def _enabled(table: str, schema: str | None, quote: Callable[[str], str]) -> Iterator[str]:
    """Yield what leaves a table with row-level security, and without policies and rights."""
    if schema is not None and schema != "public":
        yield f"GRANT USAGE ON SCHEMA {quote(schema)} TO {ROLE}"
    yield f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY"
    yield from _cleared(table)


def _cleared(table: str) -> Iterator[str]:
    # Two strings, one in the other: a name may contain any tag of a dollar quote.
    name = _string(table)
    code = (
        "DECLARE policy name; BEGIN FOR policy IN SELECT polname FROM pg_catalog.pg_policy"  # noqa: S608  # DDL
        f" WHERE polrelid = {name}::regclass LOOP EXECUTE"
        f" pg_catalog.format('DROP POLICY %I ON %s', policy, {name}::regclass); END LOOP; END"
    )
    yield f"DO {_string(code)}"
    yield f"DROP TRIGGER IF EXISTS touch ON {table}"
    yield f"REVOKE ALL ON {table} FROM {ROLE}, PUBLIC"


def _column_rights(fence: Fence, quote: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    for right, columns in (("INSERT", fence.insert), ("UPDATE", fence.update)):
        if columns:
            yield right, ", ".join(map(quote, columns))


def _named(table: str, schema: str | None, quote: Callable[[str], str]) -> str:
    return quote(table) if schema is None else f"{quote(schema)}.{quote(table)}"


def _string(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _declared(table: Table) -> _Declared | None:
    for column in table.primary_key:
        return cast("_Declared | None", column.info.get(_DECLARED))
    return None


def _is_touched(column: Column[object]) -> bool:
    return column.name == "updated_at" and column.server_onupdate is not None


def _is_given(column: Column[object]) -> bool:
    """Whether the application gives the value of a column of a new row."""
    if column.identity is not None or column.computed is not None or _is_touched(column):
        return False
    is_default = column.server_default is not None
    return not (is_default and (column.primary_key or column.name == "created_at"))


def _is_numbered_by_hand(column: Column[object]) -> bool:
    """Whether it would become SERIAL, or takes a number from the application as well."""
    if column.identity is not None:
        return not column.identity.always
    is_number = isinstance(column.type, Integer) and column.autoincrement is not False
    return is_number and column.server_default is None and not column.foreign_keys


def _unique_keys(table: Table) -> Iterator[tuple[set[str], bool]]:
    """Yield the columns of each key, and whether it separates the rows of two users."""
    for constraint in table.constraints:
        if isinstance(constraint, PrimaryKeyConstraint | UniqueConstraint | ExcludeConstraint):
            names = {column.name for column in constraint.columns}
            yield names, OWNER in names and _operator(constraint) == "="
    for index in table.indexes:
        if index.unique:
            # In an expression, two users may have the same value.
            alone = [each.name for each in index.expressions if isinstance(each, Column)]
            yield {column.name for column in index.columns}, OWNER in alone


def _operator(key: Constraint) -> str:
    """Return by which operator two rows are compared in the column of the user."""
    if not isinstance(key, ExcludeConstraint):
        return "="
    return cast("dict[str, str]", key.operators).get(OWNER, "")  # pyright: ignore[reportUnknownMemberType]


def _foreign_key_problems(name: str, constraint: ForeignKeyConstraint) -> Iterator[str]:
    subject = f"the foreign key ({', '.join(constraint.column_keys)}) of {name}"
    try:
        pairs = {(each.parent.name, each.column.name) for each in constraint.elements}
    except (NoReferencedTableError, NoReferencedColumnError):
        # A string that names a class which is not defined yet. Autogenerate checks it again.
        return
    target = constraint.referred_table
    kind = kind_of(target)
    if kind == "owned":
        if (OWNER, OWNER) not in pairs:
            yield f"{subject} could name a row of another user: use owned_reference()"
    elif target.fullname == "users":
        if pairs != {(OWNER, "id")}:
            yield f"{subject} tells which users there are: leave the foreign key out"
    elif kind is None:
        yield (
            f"{subject} tells which rows of {target.fullname} there are: derive its class from "
            "Owned or Shared, or leave the foreign key out"
        )


def _is_cut(name: str) -> bool:
    return len(name.encode()) > _LONGEST_NAME
