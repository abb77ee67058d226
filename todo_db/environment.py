"""The environment in which Alembic runs scripts: the package's own, and those of an application.

All pending migrations run in one transaction under one advisory lock. So two deployments at the
same time, or one that stops half-way, leave the old schema or the new one.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection, MetaData, Table, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.schema import SchemaItem

from todo_db.engine import connect_failure, create_direct_engine
from todo_db.errors import (
    CallTimeoutError,
    ConfigurationError,
    IsolationError,
    TodoDBError,
    translated,
)
from todo_db.models import OUR_COLUMNS, OUR_NAMES, REVISION, VERSION_TABLE, Base, is_ours
from todo_db.operations import APPLICATION
from todo_db.settings import Settings

AT: Final = "todo_db_at"
"""The attribute of Alembic's `Config` with the revision that the database is at afterwards."""

LOCK_SQL: Final = (
    # The application uses this path, and the migrating role may have another one.
    "SET LOCAL search_path = public, pg_temp",
    # It decides how PostgreSQL prints policies, which are compared.
    "SET LOCAL quote_all_identifiers = off",
    # Two deployments at the same time run one after the other; the second finds nothing to do.
    "SET LOCAL lock_timeout = '60s'",
    "SELECT pg_advisory_xact_lock(7306001204)",
    # Give up behind a long transaction, because other statements would wait behind this lock.
    "SET LOCAL lock_timeout = '5s'",
    # A statement that takes longer would hold its locks that long. Such a migration sets its own.
    "SET LOCAL statement_timeout = '5min'",
)
_REVISION: Final = text(f"SELECT max(version_num) FROM public.{VERSION_TABLE}")  # noqa: S608  # a constant


# Only such a table can have been made for the application's own models.
_FENCED: Final = text("""
    SELECT nullif(nspname, 'public'), relname
    FROM pg_policy JOIN pg_class c ON c.oid = polrelid JOIN pg_namespace n ON n.oid = relnamespace
    WHERE polname IN ('fence', 'todo_db_shared')
""")

type Include = Callable[[SchemaItem, str | None, str, bool, SchemaItem | None], bool]
"""Alembic's `include_object`: whether autogenerate looks at an object."""


def configure(metadata: MetaData, *, include_object: Include | None = None, **options: Any) -> None:  # noqa: ANN401  # Alembic's own
    """Run Alembic's command on the tables of an application: all that its `env.py` needs.

    Migrates the database of `DIRECT_DATABASE_URL`, or the direct endpoint of `DATABASE_URL`, in one
    transaction, under the same lock as `todo-db migrate`. What has run stands in `alembic_version`,
    apart from the history of todo_db. Autogenerate neither changes nor drops what belongs to
    todo_db. It proposes to drop a table only if that is fenced or shared.

    Args:
        metadata: The tables of the application: `Base.metadata` of a `Base` of its own, or of
            `todo_db.models`.
        include_object: Which of the other objects autogenerate looks at, as for Alembic.
        **options: Further options of Alembic's `EnvironmentContext.configure`.

    Raises:
        CommandError: The tables of todo_db are not there, the login may not migrate, or the
            metadata has a schema.
    """
    if metadata.schema is not None:
        # Alembic would write it before every table without one, such as users.
        raise CommandError(
            "MetaData(schema=…) would hide the tables of todo_db from the foreign keys: give the "
            'schema to each class, by __table_args__ = {"schema": …}'
        )
    schemas = {table.schema for table in metadata.tables.values()} | {None}
    fenced: set[tuple[str | None, str]] = set()

    def prepare(connection: Connection) -> None:
        exists = connection.scalar(
            text(f"SELECT to_regclass('public.{VERSION_TABLE}') IS NOT NULL")
        )
        if not exists or (connection.scalar(_REVISION) or "") < REVISION:
            raise CommandError("the tables of todo_db are missing or old: run `todo-db migrate`")
        fenced.update((row[0], row[1]) for row in connection.execute(_FENCED))

    def include(
        item: SchemaItem,
        name: str | None,
        kind: str,
        reflected: bool,  # noqa: FBT001  # Alembic's own signature
        model: SchemaItem | None,
    ) -> bool:
        table = cast("Table", item if kind == "table" else getattr(item, "table", None))
        is_dropped = reflected and model is None
        if is_ours(table):
            is_included = kind == "table" or _is_added(table, name, kind, is_dropped=is_dropped)
        else:
            is_included = kind != "table" or not is_dropped or (table.schema, table.name) in fenced
        return is_included and (
            include_object is None or include_object(item, name, kind, reflected, model)
        )

    def include_name(name: str | None, kind: str, _parents: object) -> bool:
        return kind != "schema" or name in schemas

    run(
        [metadata] if metadata is Base.metadata else [metadata, Base.metadata],
        prepare,
        include_object=include,
        include_name=include_name,
        include_schemas=schemas != {None},
        **{APPLICATION: True},
        **options,
    )


def _is_added(table: Table, name: str | None, kind: str, *, is_dropped: bool) -> bool:
    """Whether the application added a column, an index or a constraint to a table of todo_db."""
    ours = OUR_COLUMNS[table.name] if kind == "column" else OUR_NAMES
    # Better Auth's plugins add columns to the other tables.
    return name not in ours and (table.name == "tasks" or not is_dropped)


def run(
    metadata: MetaData | Sequence[MetaData],
    prepare: Callable[[Connection], None],
    **options: Any,  # noqa: ANN401  # Alembic's own
) -> None:
    """Run the command that Alembic was called with.

    Args:
        metadata: The tables for autogenerate.
        prepare: Called in the transaction of the migrations, before they run.
        **options: Of Alembic's `EnvironmentContext.configure`.
    """
    options = {"compare_type": True, "compare_server_default": True} | options

    def migrate(connection: Connection | None) -> None:
        context.configure(
            connection=connection,
            dialect_name="postgresql",
            target_metadata=metadata,
            literal_binds=connection is None,
            # With the default, an offline script would double every percent sign.
            dialect_opts={"paramstyle": "named"},
            **options,
        )
        with context.begin_transaction():
            _lock()
            if connection is not None:
                prepare(connection)
            context.run_migrations()
            if connection is not None:
                heads = context.get_context().get_current_heads()
                context.config.attributes[AT] = ", ".join(heads)

    if context.is_offline_mode():
        migrate(None)
        return
    # `todo_db.migrations` gives a URL. Otherwise it is Alembic's command line, which prints a
    # CommandError as one line and anything else as a traceback.
    is_called = "url" in context.config.attributes
    url = cast("str | Callable[[], str] | None", context.config.attributes.get("url"))
    try:
        asyncio.run(_online(url() if callable(url) else url, migrate))
    except (TodoDBError, ConnectionError, TimeoutError) as error:
        failure = translated(error)
    except DBAPIError as error:
        if not isinstance(translated(error), IsolationError):
            raise
        # The first migration that may not do its work names the statement to run.
        hint = getattr(getattr(error.orig, "__cause__", None), "hint", None)
        failure = ConfigurationError(
            f"this login may not migrate: {hint or 'migrate as the owner of the database'}"
        )
    else:
        return
    raise failure if is_called else CommandError(str(failure))


def _lock() -> None:
    """Wait until no other migration runs."""
    try:
        for statement in LOCK_SQL:
            context.execute(statement)
    except DBAPIError as error:
        if not isinstance(translated(error), CallTimeoutError):
            raise
    else:
        return
    raise CallTimeoutError(
        "another migration of this database is running, and did not end in time: nothing was done"
    )


async def _online(url: str | None, migrate: Callable[[Connection], None]) -> None:
    engine = direct_engine(url)
    try:
        connection = await _connected(engine)
        try:
            await connection.run_sync(migrate)
        finally:
            await connection.close()
    finally:
        await engine.dispose()


async def _connected(engine: AsyncEngine) -> AsyncConnection:
    try:
        return await engine.connect()
    except Exception as error:  # noqa: BLE001  # raised again as a TodoDBError
        failure = connect_failure(error, engine.url)
    raise failure


def direct_engine(url: str | None) -> AsyncEngine:
    """Return an engine on the direct endpoint, which migrations use.

    Raises:
        ConfigurationError: There is no URL.
    """
    settings = Settings()
    if url is None:
        secret = settings.direct_database_url or settings.database_url
        if secret is None:
            raise ConfigurationError(
                "neither DIRECT_DATABASE_URL nor DATABASE_URL is set: write the owner's URL into"
                " .env, such as the one that `todo-db serve` prints"
            )
        url = secret.get_secret_value()
    return create_direct_engine(url, settings)
