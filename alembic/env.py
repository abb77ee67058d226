"""Alembic's environment, for its command line and for `todo_db.migrations`.

All pending migrations run in one transaction under one advisory lock. So two deployments at the
same time, or one that stops half-way, leave the old schema or the new one.
"""

import asyncio
from collections.abc import Iterable

from alembic import context
from alembic.operations import MigrationScript
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.schema import SchemaItem

from todo_db.errors import ConfigurationError, TodoDBError, translated
from todo_db.migrations import LOCK_SQL, VERSION_TABLE, direct_engine
from todo_db.models import Base

# Better Auth's plugins may add columns to these tables.
_SHARED = frozenset({"users", "sessions", "accounts", "verifications", "jwks"})
# Before its first release, this package used Alembic's own name for its version table.
_HAS_OLD_NAME = text("""
    SELECT to_regclass('public.todo_db_version') IS NULL
        AND to_regclass('public.alembic_version') IS NOT NULL
        AND EXISTS (SELECT FROM pg_constraint WHERE conrelid = to_regclass('public.tasks')
            AND conname = 'ck_tasks_title_not_blank')
""")


def _number(
    _context: MigrationContext,
    _revision: str | Iterable[str | None] | Iterable[str],
    directives: list[MigrationScript],
) -> None:
    """Give a new revision the next number, with four digits."""
    head = ScriptDirectory.from_config(context.config).get_current_head()
    for script in directives:
        script.rev_id = f"{int(head or 0) + 1:04}"


def _include(
    item: SchemaItem,
    _name: str | None,
    kind: str,
    reflected: bool,  # noqa: FBT001  # Alembic's own signature
    model: SchemaItem | None,
) -> bool:
    """Ignore other tables and the columns of Better Auth's plugins, instead of dropping them."""
    if not reflected or model is not None:
        return True
    if kind == "table":
        return False
    table = getattr(item, "table", None)
    return table is None or table.name not in _SHARED


def _run(connection: Connection | None) -> None:
    context.configure(
        connection=connection,
        dialect_name="postgresql",
        target_metadata=Base.metadata,
        version_table=VERSION_TABLE,
        literal_binds=connection is None,
        # With the default, an offline script would double every percent sign.
        dialect_opts={"paramstyle": "named"},
        process_revision_directives=_number,
        include_object=_include,
        compare_type=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        for statement in LOCK_SQL:
            context.execute(statement)
        if connection is not None and connection.scalar(_HAS_OLD_NAME):
            raise ConfigurationError(
                "the version table of an earlier todo_db has its old name: "
                f"ALTER TABLE alembic_version RENAME TO {VERSION_TABLE}"
            )
        try:
            context.run_migrations()
        except CommandError:
            if connection is None or not _has_unknown_revision():
                raise
        else:
            return
        raise ConfigurationError(
            f"{VERSION_TABLE} names a migration that this package does not have: the database is "
            "newer than this package, or the table belongs to another project"
        )


def _has_unknown_revision() -> bool:
    script = ScriptDirectory.from_config(context.config)
    known = {revision.revision for revision in script.walk_revisions()}
    return not known.issuperset(context.get_context().get_current_heads())


async def _connected(engine: AsyncEngine) -> AsyncConnection:
    try:
        return await engine.connect()
    except Exception as error:  # noqa: BLE001  # raised again as a TodoDBError
        failure = translated(error)
    raise failure


async def _migrate() -> None:
    engine = direct_engine(context.config.attributes.get("url"))
    try:
        connection = await _connected(engine)
        try:
            await connection.run_sync(_run)
        finally:
            await connection.close()
    finally:
        await engine.dispose()


async def _migrate_for_alembic() -> None:
    try:
        await _migrate()
    except TodoDBError as error:
        failure = CommandError(str(error))
    else:
        return
    # A CommandError is one line on Alembic's command line, not a traceback.
    raise failure


if context.is_offline_mode():
    _run(None)
else:
    asyncio.run(_migrate() if "url" in context.config.attributes else _migrate_for_alembic())
