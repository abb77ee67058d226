"""Alembic's operations for the fence, and their part of autogenerate and `alembic check`.

Importing this module registers `op.fence`, `op.share`, `op.unfence`, `op.grant_columns` and
`op.revoke_columns`. The columns stand in the migration: a migration never reads a model.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast, override

from alembic.autogenerate import comparators, renderers
from alembic.autogenerate.api import AutogenContext
from alembic.operations import MigrateOperation, Operations
from alembic.operations.ops import DropTableOp, UpgradeOps
from alembic.util import CommandError, DispatchPriority
from sqlalchemy import Connection, Table, text

from todo_db.fence import (
    OWNER,
    PRINTED_RULE,
    ROLE,
    Fence,
    fence_of,
    fence_sql,
    grant_sql,
    kind_of,
    problems,
    share_sql,
    unfence_sql,
)
from todo_db.models import OUR_COLUMNS, is_ours

APPLICATION: Final = "todo_db_application"
"""The option of Alembic's context that says that an application's own tables are compared."""

type Quote = Callable[[str], str]


class _Operation(MigrateOperation):
    """An operation that is some SQL, and one line of a migration."""

    @abstractmethod
    def statements(self, quote: Quote) -> Iterator[str]: ...

    @abstractmethod
    def source(self) -> str:
        """Return the line of a migration."""
        ...

    @override
    def to_diff_tuple(self) -> tuple[Any, ...]:
        # For the message of `alembic check`.
        return (self.source(),)


@Operations.register_operation("fence")
class FenceTable(_Operation):
    """`op.fence`: put a table behind row-level security, so that each row belongs to one user."""

    def __init__(self, fence: Fence, before: MigrateOperation | None = None) -> None:
        self.new = fence
        self._before = before

    @classmethod
    def fence(  # noqa: PLR0913  # the parts of a fence
        cls,
        operations: Operations,
        table: str,
        *,
        insert: Sequence[str] = (),
        update: Sequence[str] = (),
        delete: bool = True,
        touch: bool = False,
        schema: str | None = None,
    ) -> None:
        """Put a table behind row-level security, so that each row belongs to one user.

        Replaces every policy of the table, and every grant on it to `todo_app` and PUBLIC. It
        takes an ACCESS EXCLUSIVE lock, which ends with the migration.

        Args:
            operations: Given by Alembic.
            table: The name of the table. Its column `user_id` names the user.
            insert: The columns that the application may set in a new row.
            update: The columns that it may change.
            delete: Whether it may delete rows.
            touch: Whether a trigger sets `updated_at` when a row changes.
            schema: The schema of the table, `public` by default.
        """
        operations.invoke(cls(Fence(table, schema, tuple(insert), tuple(update), delete, touch)))

    @override
    def reverse(self) -> MigrateOperation:
        return self._before or Unfence(self.new.table, self.new.schema, self)

    @override
    def statements(self, quote: Quote) -> Iterator[str]:
        return fence_sql(self.new, quote)

    @override
    def source(self) -> str:
        new = self.new
        options: dict[str, object] = {"insert": list(new.insert), "update": list(new.update)}
        if not new.delete:
            options["delete"] = False
        return _call("fence", new.table, **options, touch=new.touch, schema=new.schema)


class _TableOperation(_Operation):
    """An operation on a whole table, which is named by nothing but its name."""

    def __init__(
        self, table: str, schema: str | None, before: MigrateOperation | None = None
    ) -> None:
        self._table = table
        self._schema = schema
        self._before = before


@Operations.register_operation("share")
class ShareTable(_TableOperation):
    """`op.share`: let every user read a table, and no user change it."""

    @classmethod
    def share(cls, operations: Operations, table: str, *, schema: str | None = None) -> None:
        """Let every user read a table, and no user change it.

        Replaces policies and grants, and locks the table, as `fence` does.

        Args:
            operations: Given by Alembic.
            table: The name of the table.
            schema: Its schema, `public` by default.
        """
        operations.invoke(cls(table, schema))

    @override
    def reverse(self) -> MigrateOperation:
        return self._before or Unfence(self._table, self._schema, self)

    @override
    def statements(self, quote: Quote) -> Iterator[str]:
        return share_sql(self._table, self._schema, quote)

    @override
    def source(self) -> str:
        return _call("share", self._table, schema=self._schema)


@Operations.register_operation("unfence")
class Unfence(_TableOperation):
    """`op.unfence`: take a table away from the application."""

    @classmethod
    def unfence(cls, operations: Operations, table: str, *, schema: str | None = None) -> None:
        """Take a table away from the application: no policies, no grants, no row-level security.

        Args:
            operations: Given by Alembic.
            table: The name of a table that was fenced or shared.
            schema: Its schema, `public` by default.
        """
        operations.invoke(cls(table, schema))

    @override
    def reverse(self) -> MigrateOperation:
        return self._before or super().reverse()

    @override
    def statements(self, quote: Quote) -> Iterator[str]:
        return unfence_sql(self._table, self._schema, quote)

    @override
    def source(self) -> str:
        return _call("unfence", self._table, schema=self._schema)


@Operations.register_operation("grant_columns")
@Operations.register_operation("revoke_columns")
class GrantColumns(_Operation):
    """`op.grant_columns` and `op.revoke_columns`: rights on columns that were added to `tasks`."""

    def __init__(self, fence: Fence, *, revoke: bool = False) -> None:
        self._fence = fence
        self._revoke = revoke

    @classmethod
    def grant_columns(
        cls,
        operations: Operations,
        table: str,
        *,
        insert: Sequence[str] = (),
        update: Sequence[str] = (),
    ) -> None:
        """Let the application set and change columns that were added to a table of todo_db.

        Args:
            operations: Given by Alembic.
            table: `tasks`, or `users`.
            insert: The columns that the application may set in a new row.
            update: The columns that it may change.
        """
        operations.invoke(cls(Fence(table, insert=tuple(insert), update=tuple(update))))

    @classmethod
    def revoke_columns(
        cls,
        operations: Operations,
        table: str,
        *,
        insert: Sequence[str] = (),
        update: Sequence[str] = (),
    ) -> None:
        """Take back what `grant_columns` granted."""
        fence = Fence(table, insert=tuple(insert), update=tuple(update))
        operations.invoke(cls(fence, revoke=True))

    @override
    def reverse(self) -> MigrateOperation:
        return GrantColumns(self._fence, revoke=not self._revoke)

    @override
    def statements(self, quote: Quote) -> Iterator[str]:
        return grant_sql(self._fence, quote, revoke=self._revoke)

    @override
    def source(self) -> str:
        return _call(
            "revoke_columns" if self._revoke else "grant_columns",
            self._fence.table,
            insert=list(self._fence.insert),
            update=list(self._fence.update),
        )


def _call(name: str, table: str, **options: object) -> str:
    given = [f"{key}={value!r}" for key, value in options.items() if value or key == "delete"]
    return f"op.{name}({', '.join([repr(table), *given])})"


@Operations.implementation_for(_Operation)
def _run(operations: Operations, operation: _Operation) -> None:
    quote = operations.get_context().dialect.identifier_preparer.quote
    for statement in operation.statements(quote):
        # A text() would take a colon in a name for a parameter.
        operations.execute(statement.replace(":", r"\:"))


@renderers.dispatch_for(_Operation)
def _render(_context: AutogenContext, operation: _Operation) -> str:
    return operation.source()


# What is behind a table in the database: its policies, the rights of the application and of
# PUBLIC, whether row-level security holds for its owner too, and whether its trigger is there.
_STORED: Final = text(f"""
    SELECT relrowsecurity AND relforcerowsecurity
            AND has_schema_privilege('{ROLE}', relnamespace, 'USAGE') AS enabled,
        ARRAY(SELECT concat_ws(' ', polname, polpermissive, polcmd, polroles::regrole[],
                pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid))
            FROM pg_policy WHERE polrelid = c.oid ORDER BY polname) AS policies,
        ARRAY(SELECT concat_ws(' ', nullif(grantee, 0)::regrole, privilege_type,
                CASE WHEN is_grantable THEN 'WITH GRANT OPTION' END)
            FROM aclexplode(relacl) WHERE grantee IN (0, '{ROLE}'::regrole)
            ORDER BY 1) AS rights,
        ARRAY(SELECT concat_ws(' ', nullif(grantee, 0)::regrole,
                CASE WHEN is_grantable THEN 'WITH GRANT OPTION' END, privilege_type, attname)
            FROM pg_attribute, aclexplode(attacl)
            WHERE attrelid = c.oid AND NOT attisdropped AND grantee IN (0, '{ROLE}'::regrole)
            ORDER BY attname COLLATE "C") AS column_rights,
        EXISTS (SELECT FROM pg_trigger WHERE tgrelid = c.oid AND tgname = 'touch'
            AND tgfoid = to_regproc('public.set_updated_at') AND tgenabled IN ('O', 'A')) AS touch
    FROM pg_class c WHERE c.oid = to_regclass(:name)
""")  # noqa: S608  # a constant
_MINE: Final = f"({OWNER} {PRINTED_RULE}"
# The tables of todo_db to which an application may add columns that todo_app reads and writes.
_EXTENSIBLE: Final = frozenset({"tasks", "users"})
_FENCED: Final = [
    f"fence f * {{{ROLE}}} {_MINE} {_MINE}",
    f"own t * {{{ROLE}}} {_MINE} {_MINE}",
]
_SHARED: Final = [f"todo_db_shared t r {{{ROLE}}} true"]


@dataclass(frozen=True)
class _Stored:
    """How a table is protected in the database."""

    enabled: bool
    policies: list[str]
    rights: list[str]
    column_rights: list[str]
    touch: bool

    def columns(self, right: str) -> tuple[str, ...]:
        start = f"{ROLE} {right} "
        return tuple(
            line.removeprefix(start) for line in self.column_rights if line.startswith(start)
        )

    def fence(self, table: Table) -> Fence | None:
        """Return the fence around the table, if all of it is there and nothing else."""
        found = Fence(
            table.name,
            table.schema,
            self.columns("INSERT"),
            self.columns("UPDATE"),
            f"{ROLE} DELETE" in self.rights,
            self.touch,
        )
        rights = [*([f"{ROLE} DELETE"] if found.delete else []), f"{ROLE} SELECT"]
        is_sound = (
            self.enabled
            and self.policies == _FENCED
            and self.rights == rights
            and len(self.column_rights) == len(found.insert) + len(found.update)
        )
        return found if is_sound else None

    @property
    def is_shared(self) -> bool:
        return (
            self.enabled
            and self.policies == _SHARED
            and self.rights == [f"{ROLE} SELECT"]
            and not self.column_rights
        )


def _stored(context: AutogenContext, table: Table) -> _Stored | None:
    connection = cast("Connection", context.connection)
    name = connection.dialect.identifier_preparer.format_table(table)
    row = connection.execute(_STORED, {"name": name}).one_or_none()
    return None if row is None else _Stored(*row)


@comparators.dispatch_for("schema", qualifier="postgresql", priority=DispatchPriority.LAST)
def _compare(context: AutogenContext, upgrade: UpgradeOps, _schemas: object) -> None:
    """Add what the models declare and the database lacks; nothing for the tables of todo_db."""
    if not context.opts.get(APPLICATION):
        return
    first: list[MigrateOperation] = []
    last: list[MigrateOperation] = []
    for table in context.sorted_tables:
        if context.run_object_filters(table, table.name, "table", False, None):  # noqa: FBT003  # Alembic's
            _compare_table(table, _stored(context, table), first, last)
    for operation in upgrade.ops:
        if isinstance(operation, DropTableOp):
            dropped = operation.to_table()
            before = _before(dropped, _stored(context, dropped))
            if before is not None:
                first.append(Unfence(dropped.name, dropped.schema, before))
    # A downgrade runs them in the reverse order: each names only columns that are there then.
    upgrade.ops[:0] = first
    upgrade.ops += last


def _compare_table(
    table: Table,
    stored: _Stored | None,
    first: list[MigrateOperation],
    last: list[MigrateOperation],
) -> None:
    kind = kind_of(table)
    for problem in problems(table) if kind is not None or is_ours(table) else ():
        raise CommandError(problem)
    if is_ours(table):
        _compare_columns(table, stored, first, last)
    elif kind == "owned":
        _compare_fence(table, stored, first, last)
    elif kind == "shared":
        if stored is None or not stored.is_shared:
            # First if it can be: while the policies of an owned table are there, its columns stay.
            share = ShareTable(table.name, table.schema, _before(table, stored))
            (last if stored is None else first).append(share)
    elif before := _before(table, stored):
        first.append(Unfence(table.name, table.schema, before))


def _before(table: Table, stored: _Stored | None) -> MigrateOperation | None:
    """Return the operation that makes what is there again."""
    if stored is None:
        return None
    if stored.is_shared:
        return ShareTable(table.name, table.schema)
    fence = stored.fence(table)
    return None if fence is None else FenceTable(fence)


def _compare_fence(
    table: Table,
    stored: _Stored | None,
    first: list[MigrateOperation],
    last: list[MigrateOperation],
) -> None:
    wanted = fence_of(table)
    found = None if stored is None else stored.fence(table)
    if found == wanted:
        return
    if found is not None:
        kept = replace(
            found,
            insert=_both(found.insert, table),
            update=_both(found.update, table),
        )
        if kept != found:
            # Columns are dropped: in a downgrade, their rights come back after them.
            first.append(FenceTable(kept, FenceTable(found)))
            found = kept
    if found != wanted:
        last.append(
            FenceTable(wanted, _before(table, stored) if found is None else FenceTable(found))
        )


def _both(names: Iterable[str], table: Table) -> tuple[str, ...]:
    kept = {column.name for column in table.c}
    return tuple(name for name in names if name in kept)


def _compare_columns(
    table: Table,
    stored: _Stored | None,
    first: list[MigrateOperation],
    last: list[MigrateOperation],
) -> None:
    """Compare the rights on the columns that an application added to a table of todo_db."""
    ours = OUR_COLUMNS[table.name]
    if stored is None or table.name not in _EXTENSIBLE:
        return
    wanted = fence_of(table)

    def difference(left: Fence | _Stored, right: Fence | _Stored) -> Fence | None:
        insert = _added(left, "INSERT", ours) - _added(right, "INSERT", ours)
        update = _added(left, "UPDATE", ours) - _added(right, "UPDATE", ours)
        if not insert | update:
            return None
        return Fence(table.name, insert=tuple(sorted(insert)), update=tuple(sorted(update)))

    if less := difference(stored, wanted):
        first.append(GrantColumns(less, revoke=True))
    if more := difference(wanted, stored):
        last.append(GrantColumns(more))


def _added(rights: Fence | _Stored, right: str, ours: frozenset[str]) -> set[str]:
    if isinstance(rights, _Stored):
        return set(rights.columns(right)) - ours
    return set(rights.insert if right == "INSERT" else rights.update) - ours
