"""A caller's own SQL reads and writes rows of one user, and leaves nothing behind."""

import asyncio
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from itertools import product
from logging import WARNING
from typing import Any, Final

import asyncpg
import labels
import pytest
import pytest_asyncio
from cluster import OTHER_VERSIONS, Cluster
from driver import Connection
from pgbouncer import PASSWORD, TRIXIE, PgBouncer
from proxy import Proxy
from sqlalchemy import (
    DDL,
    BigInteger,
    ClauseElement,
    Column,
    Executable,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    Sequence,
    Table,
    Text,
    UniqueConstraint,
    bindparam,
    column,
    event,
    func,
    insert,
    lambda_stmt,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy import Connection as SyncConnection
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ENUM, JSONB
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import (
    AddConstraint,
    CreateIndex,
    CreateSchema,
    CreateSequence,
    CreateTable,
    DropConstraint,
    DropIndex,
    DropSchema,
    DropSequence,
    DropTable,
    ExecutableDDLElement,
    SetColumnComment,
    SetTableComment,
)
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import (
    ReleaseSavepointClause,
    RollbackToSavepointClause,
    SavepointClause,
)

from todo_db import (
    CallTimeoutError,
    ConflictError,
    Database,
    InvalidInputError,
    IsolationError,
    TodoDBError,
    Transaction,
    TransactionAbortedError,
    TransactionError,
    UnavailableError,
)
from todo_db.embedded import LOGIN, OWNER, EmbeddedPostgres
from todo_db.migrations import upgrade
from todo_db.models import Task

FORBIDDEN: Final = (
    "COMMIT",
    "commit and chain",
    "COMMIT PREPARED 'mine'",
    "END",
    "ROLLBACK",
    "ROLLBACK AND CHAIN",
    "ROLLBACK TO SAVEPOINT todo_db_1",
    "ABORT",
    "BEGIN",
    "START TRANSACTION",
    "SAVEPOINT mine",
    "RELEASE todo_db_1",
    "PREPARE TRANSACTION 'mine'",
    "PREPARE mine AS SELECT 1",
    "EXECUTE mine",
    "DEALLOCATE ALL",
    "DECLARE mine CURSOR WITH HOLD FOR SELECT * FROM tasks",
    "FETCH ALL FROM mine",
    "MOVE ALL FROM mine",
    "CLOSE ALL",
    "LISTEN mine",
    "UNLISTEN *",
    "NOTIFY mine",
    "DO 'BEGIN COMMIT; END'",
    "CALL anything()",
    "SET ROLE none",
    "SET LOCAL ROLE todo_owner",
    "SET todo_db.user_id = 'bob'",
    "SET SESSION AUTHORIZATION DEFAULT",
    "SET TRANSACTION READ WRITE",
    "SET CONSTRAINTS ALL DEFERRED",
    "RESET ROLE",
    "RESET ALL",
    "DISCARD ALL",
    "LOCK TABLE tasks",
    "COPY tasks TO STDOUT",
    "TRUNCATE tasks",
    "CREATE TEMPORARY TABLE tasks ()",
    "ALTER TABLE tasks DISABLE ROW LEVEL SECURITY",
    "DROP TABLE tasks",
    "GRANT todo_owner TO todo_app",
    "REVOKE ALL ON tasks FROM todo_app",
    "REASSIGN OWNED BY todo_owner TO todo_app",
    "VACUUM",
    "ANALYZE tasks",
    "REINDEX TABLE tasks",
    "CLUSTER tasks",
    "CHECKPOINT",
    "LOAD 'anything'",
    "COMMENT ON TABLE tasks IS ''",
    "REFRESH MATERIALIZED VIEW mine",
    "IMPORT FOREIGN SCHEMA mine FROM SERVER mine INTO public",
    "SECURITY LABEL ON TABLE tasks IS ''",
    "/* SELECT */ COMMIT",
    "/* a comment /* in */ another */ COMMIT",
    "-- SELECT\nCOMMIT",
    "-- ends at any line break\rCOMMIT",
    "/**/SELECT 1",
    "; COMMIT",
    " ;SELECT 1",
    "(COMMIT)",
    "( ( ROLLBACK",
    "selectCOMMIT",
    "select_1",
    "shows",
    "'select'",
    '"select"',
    "\ufeffSELECT 1",
    "\\x",
    "$$SELECT$$",
    "",
    " ",
)
"""Texts that end the transaction, its role or its user, or leave something on the connection."""

HIDDEN: Final = (
    "SELECT 1; COMMIT",
    "SELECT 1 AS x; SELECT 2 AS x",
    "VALUES (1);SET ROLE none",
    "EXPLAIN COMMIT",
    "EXPLAIN ANALYZE EXECUTE mine",
    "EXPLAIN ANALYZE CREATE TABLE mine AS SELECT 1",
    "WITH x AS (COMMIT) SELECT 1",
    "SELECT 1 AS x INTO TEMPORARY mine",
    "SELECT query_to_xml('SET ROLE none', true, true, '')",
    "SELECT query_to_xml('COMMIT', true, true, '')",
    "SELECT * FROM tasks FOR SHARE; RESET ROLE",
    "\xa0SELECT 1",
    "TABLE tasks; DISCARD ALL",
)
"""Texts that begin like a query, and that PostgreSQL itself refuses as one statement."""

type Attempt = Callable[[Transaction, str], Awaitable[object]]


class Smuggled(Executable, ClauseElement):
    """A statement that sends any text."""

    inherit_cache = False

    def __init__(self, sql: str) -> None:
        self.sql = sql


@compiles(Smuggled)
def _smuggled(element: Smuggled, _compiler: SQLCompiler, **_options: object) -> str:
    return element.sql


class Disguised(Select[Any]):
    """A SELECT that is compiled to any text."""

    inherit_cache = False
    sql = ""


@compiles(Disguised)
def _disguised(element: Disguised, _compiler: SQLCompiler, **_options: object) -> str:
    return element.sql


class Operation(ExecutableDDLElement):
    """A DDL element of an extension."""

    inherit_cache = False

    def __init__(self, sql: str) -> None:
        self.sql = sql


@compiles(Operation)
def _operation(element: Operation, _compiler: object, **_options: object) -> str:
    return element.sql


def disguised(sql: str) -> Disguised:
    statement = Disguised(literal_column("1"))
    statement.sql = sql
    return statement


def lambda_of(sql: str) -> Executable:
    statement = text(sql)
    return lambda_stmt(lambda: statement)


def escaped(sql: str) -> str:
    """Return a text whose colons and percent signs SQLAlchemy does not read."""
    return sql.replace(":", "\\:")


EXECUTABLES: Final[dict[str, Callable[[str], Any]]] = {
    "text": text,
    "text with parameters": lambda sql: text(sql).bindparams(),
    "text with columns": lambda sql: text(sql).columns(column("id", Integer)),
    "text with positional columns": lambda sql: text(sql).columns(Task.id, Task.title),
    "entity from text": lambda sql: select(Task).from_statement(text(sql)),
    "entity from text with columns": lambda sql: select(Task).from_statement(
        text(sql).columns(Task.id)
    ),
    "columns from text": lambda sql: select(Task.id).from_statement(text(sql)),
    "lambda": lambda_of,
    "custom executable": Smuggled,
    "custom select": disguised,
    "entity from custom select": lambda sql: select(Task).from_statement(disguised(sql)),
    "DDL": DDL,
    "DDL element": Operation,
    "text that streams": lambda sql: text(sql).execution_options(stream_results=True),
    "text in pieces": lambda sql: text(sql).execution_options(yield_per=10),
    "text without parameters": lambda sql: text(sql).execution_options(no_parameters=True),
    "text that commits by itself": lambda sql: text(sql).execution_options(autocommit=True),
    "text with its row count": lambda sql: text(sql).execution_options(preserve_rowcount=True),
    "text in another schema": lambda sql: text(sql).execution_options(
        schema_translate_map={None: "public"}
    ),
    "text with a gate of its own": lambda sql: text(sql).execution_options(todo_db_gate=None),
}


async def _connection(tx: Transaction) -> AsyncConnection:
    return await tx.session().connection()


async def _in_sync_session(tx: Transaction, sql: str) -> object:
    return await tx.session().run_sync(lambda session: session.execute(text(sql)))


async def _query(tx: Transaction, sql: str) -> object:
    return await tx.session().run_sync(
        lambda session: session.query(Task).from_statement(text(sql)).all()
    )


async def _driver_sql(tx: Transaction, sql: str) -> object:
    return await (await _connection(tx)).exec_driver_sql(sql)


async def _driver_sql_of_many(tx: Transaction, sql: str) -> object:
    return await (await _connection(tx)).exec_driver_sql(sql, [(), ()])


async def _driver_sql_without_parameters(tx: Transaction, sql: str) -> object:
    return await (await _connection(tx)).exec_driver_sql(
        sql, execution_options={"no_parameters": True}
    )


async def _many(tx: Transaction, sql: str) -> object:
    return await tx.session().execute(text(sql), [{"a": 1}, {"a": 2}])


async def _streamed_by_connection(tx: Transaction, sql: str) -> object:
    return await (await _connection(tx)).stream(text(sql))


async def _scalar_of_connection(tx: Transaction, sql: str) -> object:
    return await (await _connection(tx)).scalar(text(sql))


async def _by_bind(tx: Transaction, sql: str) -> object:
    bind = tx.session().bind
    assert isinstance(bind, AsyncConnection)
    return await bind.execute(text(sql))


async def _with_options(tx: Transaction, sql: str) -> object:
    connection = await (await _connection(tx)).execution_options(compiled_cache=None)
    return await connection.execute(text(sql))


async def _rewritten(tx: Transaction, sql: str) -> object:
    def rewrite(*arguments: Any) -> tuple[str, object]:  # noqa: ANN401  # as SQLAlchemy calls it
        return sql, arguments[3]

    target = (await _connection(tx)).sync_connection
    event.listen(target, "before_cursor_execute", rewrite, retval=True)
    try:
        return await tx.execute(text("SELECT 1"))
    finally:
        event.remove(target, "before_cursor_execute", rewrite)


async def _in_nested(tx: Transaction, sql: str) -> object:
    return await tx.session().execute(text(sql), bind_arguments={"clause": text("SELECT 1")})


DOORS: Final[dict[str, Attempt]] = {
    "session.execute": lambda tx, sql: tx.session().execute(text(sql)),
    "session.scalar": lambda tx, sql: tx.session().scalar(text(sql)),
    "session.scalars": lambda tx, sql: tx.session().scalars(text(sql)),
    "session.stream": lambda tx, sql: tx.session().stream(text(sql)),
    "session.stream_scalars": lambda tx, sql: tx.session().stream_scalars(text(sql)),
    "session.execute, entity": lambda tx, sql: tx.session().execute(
        select(Task).from_statement(text(sql))
    ),
    "session.execute, many": _many,
    "session.run_sync": _in_sync_session,
    "session.query": _query,
    "session, bind arguments": _in_nested,
    "session.bind": _by_bind,
    "connection.exec_driver_sql": _driver_sql,
    "connection.exec_driver_sql, many": _driver_sql_of_many,
    "connection.exec_driver_sql, no parameters": _driver_sql_without_parameters,
    "connection.stream": _streamed_by_connection,
    "connection.scalar": _scalar_of_connection,
    "connection with options": _with_options,
    "event": _rewritten,
}

metadata = MetaData()
notes = Table(
    "notes",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("user_id", Text, comment="whose"),
    Column("body", Text),
    UniqueConstraint("user_id", "body", name="uq_notes"),
    ForeignKeyConstraint(["user_id"], ["notes.body"], name="fk_notes"),
    comment="a comment",
)
index: Final = Index("ix_notes", notes.c.body)
sequence: Final = Sequence("numbers", metadata=metadata)
mood: Final = ENUM("good", "bad", name="mood", metadata=metadata)
unique: Final = next(each for each in notes.constraints if each.name == "uq_notes")

STRUCTURES: Final[dict[str, Executable]] = {
    "create table": CreateTable(notes),
    "drop table": DropTable(notes),
    "create index": CreateIndex(index),
    "drop index": DropIndex(index),
    "create sequence": CreateSequence(sequence),
    "drop sequence": DropSequence(sequence),
    "create schema": CreateSchema("mine"),
    "drop schema": DropSchema("mine"),
    "add constraint": AddConstraint(unique),
    "drop constraint": DropConstraint(unique),
    "comment on table": SetTableComment(notes),
    "comment on column": SetColumnComment(notes.c.user_id),
    "create type": postgresql.CreateEnumType(mood),
    "drop type": postgresql.DropEnumType(mood),
    "savepoint": SavepointClause("mine"),  # type: ignore[no-untyped-call]
    "rollback to savepoint": RollbackToSavepointClause("todo_db_1"),  # type: ignore[no-untyped-call]
    "release savepoint": ReleaseSavepointClause("todo_db_1"),  # type: ignore[no-untyped-call]
    "insert that is hidden": Smuggled("\tCOMMIT /* INSERT */"),
}


def _sync(method: Callable[[SyncConnection], object]) -> Attempt:
    async def attempt(tx: Transaction, _: str) -> object:
        return await (await _connection(tx)).run_sync(method)

    return attempt


async def _isolation(tx: Transaction, level: str) -> object:
    return await (await _connection(tx)).execution_options(isolation_level=level)


async def _isolation_of_bind(tx: Transaction, level: str) -> object:
    bind = tx.session().bind
    assert isinstance(bind, AsyncConnection)
    return await bind.execution_options(isolation_level=level)


async def _isolation_of_session(tx: Transaction, level: str) -> object:
    return await tx.session().connection(execution_options={"isolation_level": level})


async def _isolation_of_statement(tx: Transaction, level: str) -> object:
    return await tx.execute(text("SELECT 1").execution_options(isolation_level=level))


ESCAPES: Final[dict[str, Attempt]] = {
    "connection.commit": _sync(lambda connection: connection.commit()),
    "connection.rollback": _sync(lambda connection: connection.rollback()),
    "connection.begin": _sync(lambda connection: connection.begin()),
    "connection.begin_twophase": _sync(lambda connection: connection.begin_twophase()),
    "connection.commit_prepared": _sync(lambda connection: connection.commit_prepared("mine")),
    "connection.rollback_prepared": _sync(lambda connection: connection.rollback_prepared("mine")),
    "connection.invalidate": _sync(lambda connection: connection.invalidate()),
    "connection.detach": _sync(lambda connection: connection.detach()),
    "connection.close": _sync(lambda connection: connection.close()),
    "connection.get_transaction": _sync(lambda connection: connection.get_transaction()),
    "connection, isolation level": _isolation,
    "session.bind, isolation level": _isolation_of_bind,
    "session.connection, isolation level": _isolation_of_session,
    "statement, isolation level": _isolation_of_statement,
}


@pytest.fixture
def login() -> str:
    """One is enough where nothing is said of the role."""
    return LOGIN


async def context(tx: Transaction) -> tuple[Any, ...]:
    sql = "SELECT current_user, current_setting('todo_db.user_id', true)"
    row = (await tx.execute(text(sql))).one()
    return tuple(row)


class TestText:
    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_T1_forbidden_one_is_refused_in_every_executable_before_any_sql(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        async with database_without_retries.transaction("alice") as tx:
            before = len(proxy.sent)
            for name, build in EXECUTABLES.items():
                for sql in FORBIDDEN:
                    with pytest.raises(TransactionError, match="begins with"):
                        await tx.execute(build(escaped(sql) if name != "DDL element" else sql))
            assert len(proxy.sent) == before
            assert await context(tx) == ("todo_app", "alice")
            await tx.tasks.create("alice", "stored")
        assert await database_without_retries.tasks.count("alice") == 1

    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_T1_forbidden_one_is_refused_at_every_door_before_any_sql(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        async with database_without_retries.transaction("alice") as tx:
            before = len(proxy.sent)
            for attempt in DOORS.values():
                for sql in FORBIDDEN:
                    with pytest.raises(TransactionError, match="begins with"):
                        await attempt(tx, sql)
            assert len(proxy.sent) == before
            assert await context(tx) == ("todo_app", "alice")
            await tx.tasks.create("alice", "stored")
        assert await database_without_retries.tasks.count("alice") == 1

    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_T1_every_element_that_changes_the_schema_is_refused_before_any_sql(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        async with database_without_retries.transaction("alice") as tx:
            before = len(proxy.sent)
            for statement in STRUCTURES.values():
                with pytest.raises(TransactionError, match="begins with"):
                    await tx.execute(statement)
                with pytest.raises(TransactionError, match="begins with"):
                    await tx.session().execute(statement)
            assert len(proxy.sent) == before
            assert await context(tx) == ("todo_app", "alice")

    async def test_T1_metadata_creates_nothing(self, db: Database, owner: Connection) -> None:
        async with db.transaction("alice") as tx:
            connection = await _connection(tx)
            with pytest.raises(TransactionError):
                await connection.run_sync(metadata.create_all)
            with pytest.raises(TransactionError):
                await connection.run_sync(metadata.drop_all, checkfirst=False)
        assert await owner.fetchval("SELECT to_regclass('notes')") is None

    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    @pytest.mark.parametrize("sql", HIDDEN)
    async def test_T1_second_statement_is_refused_by_the_server(
        self, database_without_retries: Database, owner: Connection, sql: str
    ) -> None:
        for build in (text, lambda sql: select(Task).from_statement(text(sql))):
            with pytest.raises(TransactionAbortedError):
                async with database_without_retries.transaction("alice") as tx:
                    await tx.tasks.create("alice", "lost")
                    with pytest.raises((SQLAlchemyError, TodoDBError)):
                        await tx.execute(build(sql))
            async with database_without_retries.transaction("bob") as tx:
                assert await context(tx) == ("todo_app", "bob")
        assert await owner.fetchval("SELECT count(*) FROM tasks") == 0

    async def test_T1_text_inside_a_query_is_a_part_of_it(
        self, db: Database, owner: Connection
    ) -> None:
        for statement in (
            select(text("COMMIT")),
            select(Task.id).prefix_with("; COMMIT;"),
            select(Task.id).suffix_with("; COMMIT"),
            select(Task.id).with_statement_hint("; COMMIT"),
            select(Task.id).where(text("true; COMMIT")),
            select(literal_column("1; COMMIT")),
            select(Task.id).add_cte(text("COMMIT").columns(column("x")).cte("x")),
            select(text("COMMIT").columns(column("x")).subquery()),
            select(func.commit()),
            select(Task.id).order_by(text("1; COMMIT")),
            insert(Task).prefix_with("; COMMIT;").values(user_id="alice", title="x"),
            update(Task).values(title=literal_column("'x'; COMMIT")),
        ):
            with pytest.raises(TransactionAbortedError):
                async with db.transaction("alice") as tx:
                    await tx.tasks.create("alice", "lost")
                    with pytest.raises((SQLAlchemyError, TodoDBError)):
                        await tx.execute(statement)
        assert await owner.fetchval("SELECT count(*) FROM tasks") == 0

    async def test_T1_plan_of_a_cursor_opens_none(self, db: Database) -> None:
        async with db.transaction("alice") as tx:
            await tx.execute(
                text("EXPLAIN ANALYZE DECLARE mine CURSOR WITH HOLD FOR SELECT * FROM tasks")
            )
            cursors = text("SELECT count(*) FROM pg_cursors WHERE name = 'mine'")
            assert (await tx.execute(cursors)).scalar_one() == 0

    async def test_query_may_begin_with_spaces_and_parentheses(self, db: Database) -> None:
        async with db.transaction("alice") as tx:
            for sql in ("\n\t ((SELECT 1))", "(VALUES (1)) LIMIT 1", "select/**/1", "SELECT(1)"):
                assert (await tx.execute(text(sql))).scalar_one() == 1


class TestDoors:
    """Ways around the text: to SQLAlchemy's transaction, and to the connection itself."""

    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    @pytest.mark.parametrize("escape", list(ESCAPES))
    async def test_T1_way_out_of_the_transaction_is_refused_and_it_goes_on(
        self, database_without_retries: Database, proxy: Proxy, escape: str
    ) -> None:
        for level in ("AUTOCOMMIT", "SERIALIZABLE"):
            async with database_without_retries.transaction("alice") as tx:
                await tx.tasks.create("alice", "stored once")
                before = len(proxy.sent)
                for _ in range(2):
                    with pytest.raises((TransactionError, SQLAlchemyError)):
                        await ESCAPES[escape](tx, level)
                assert len(proxy.sent) == before
                assert await context(tx) == ("todo_app", "alice")
            async with database_without_retries.transaction("bob") as tx:
                assert await context(tx) == ("todo_app", "bob")
        assert await database_without_retries.tasks.count("alice") == 2
        assert proxy.connections == 1

    async def test_T1_isolation_level_of_a_session_that_did_nothing_yet(
        self, database_without_retries: Database
    ) -> None:
        async with database_without_retries.transaction("alice") as tx:
            with pytest.raises((TransactionError, SQLAlchemyError)):
                await _isolation_of_session(tx, "SERIALIZABLE")
        async with database_without_retries.transaction("bob") as tx:
            assert await context(tx) == ("todo_app", "bob")

    async def test_T1_driver_is_not_given_away(self, db: Database) -> None:
        async with db.transaction("alice") as tx:
            bind = tx.session().bind
            assert isinstance(bind, AsyncConnection)
            for connection in (await _connection(tx), bind):
                with pytest.raises(TransactionError):
                    await connection.get_raw_connection()

    async def test_T1_isolation_level_is_told_without_sql(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        async with database_without_retries.transaction("alice") as tx:
            before = len(proxy.sent)
            connection = await _connection(tx)
            assert await connection.get_isolation_level() == "READ COMMITTED"
            assert len(proxy.sent) == before

    async def test_T1_engine_of_the_pool_sends_nothing_by_itself(self, db: Database) -> None:
        async with db.transaction("alice") as tx:
            connection = await _connection(tx)
        async with connection.engine.connect() as stranger, AsyncSession(stranger) as session:
            for execute in (stranger.execute, session.execute):
                with pytest.raises(TransactionError, match="inside a transaction"):
                    await execute(text("SELECT 1"))
            with pytest.raises(TransactionError, match="inside a transaction"):
                _ = await stranger.begin_nested()

    async def test_T1_nothing_is_sent_after_the_end(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        async with database_without_retries.transaction("alice") as tx:
            connection = await _connection(tx)
            streamed = await tx.session().stream(text("SELECT generate_series(1, 1000)"))
            assert await streamed.fetchmany(10)
        before = len(proxy.sent)
        for call in (
            tx.execute(text("SELECT 1")),
            tx.session().execute(text("SELECT 1")),
            connection.execute(text("SELECT 1")),
            connection.begin_nested().start(),
            streamed.fetchall(),
        ):
            with pytest.raises(TransactionError, match="ended"):
                await call
        assert len(proxy.sent) == before


# What alice can leave on a session with queries alone, and with functions of an application.
_LEAVING: Final = (
    "SELECT set_config('todo_db.user_id', 'bob', false), set_config('todo_db.left', 'x', false)",
    """
    SELECT set_config(name, value, false) FROM (VALUES
        ('search_path', 'pg_temp'), ('default_transaction_read_only', 'on'), ('work_mem', '1MB'),
        ('statement_timeout', '1h'), ('TimeZone', 'Asia/Tokyo')
    ) AS settings (name, value)
    """,
    "SELECT set_config('role', 'todo_app', false)",
    "SELECT pg_advisory_lock(1), pg_advisory_lock_shared(2), pg_advisory_xact_lock(3)",
    "SELECT setseed(0.5)",
    "SELECT public.leave()",
)
_PLANTED: Final = """
    CREATE SEQUENCE numbers;
    GRANT USAGE ON SEQUENCE numbers TO todo_app;
    CREATE FUNCTION leave() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
        EXECUTE 'LISTEN left_behind';
        EXECUTE 'DECLARE left_behind CURSOR WITH HOLD FOR SELECT title FROM public.tasks';
    END $$
"""
# PgBouncer sets the name of the application.
_FOUND: Final = """
    SELECT random() AS random, pg_backend_pid() AS pid,
        current_user = session_user AS itself,
        coalesce(current_setting('todo_db.user_id', true), '') AS user_id,
        coalesce(current_setting('todo_db.left', true), '') AS own,
        ARRAY(SELECT name::text FROM pg_settings WHERE source = 'session'
            AND setting <> reset_val AND name <> 'application_name') AS settings,
        ARRAY(SELECT pg_listening_channels()) AS channels,
        ARRAY(SELECT name::text FROM pg_cursors WHERE name <> '') AS cursors,
        ARRAY(SELECT objid::int FROM pg_locks
            WHERE locktype = 'advisory' AND pid = pg_backend_pid()) AS locks,
        ARRAY(SELECT relname::text FROM pg_class
            WHERE relnamespace = pg_my_temp_schema()) AS temporary
"""
_NOTHING: Final[tuple[object, ...]] = (True, "", "", [], [], [], [], [])


async def found_on_connection(db: Database) -> asyncpg.Record:
    found = await raw(db, lambda driver: driver.fetchrow(_FOUND))
    assert found is not None
    return found


async def raw[T](db: Database, call: Callable[[Connection], Awaitable[T]]) -> T:
    """Use the pool's connection as its next user finds it."""
    connection = await db._pool.acquire()
    try:
        return await call(connection.driver)
    finally:
        db._pool.release(connection)


@pytest.fixture(scope="module")
def clusters(
    todo_postgres: EmbeddedPostgres,  # noqa: ARG001  # makes the wheel's files readable for all
) -> Generator[Callable[[int], Cluster]]:
    with ExitStack() as stack:
        yield cache(lambda version: stack.enter_context(Cluster(version)))


@dataclass(frozen=True)
class Place:
    """A migrated database.

    Attributes:
        url: That of the login, through the pooler if there is one.
        superuser: A connection past the pooler.
    """

    url: str
    superuser: Connection


@pytest_asyncio.fixture
async def place(
    kind: str | int,
    login: str,
    todo_postgres: EmbeddedPostgres,
    todo_database_name: str,
    clusters: Callable[[int], Cluster],
) -> AsyncGenerator[Place]:
    async with AsyncExitStack() as stack:
        if isinstance(kind, int):
            cluster = clusters(kind)
            stack.push_async_callback(cluster.clear)
            await upgrade(await cluster.create_database("todo"))
            superuser_url = cluster.url("postgres", "todo")
            await cluster.execute(f"CREATE ROLE {LOGIN} LOGIN IN ROLE todo_app")
            url = cluster.url(login, "todo")
        else:
            superuser_url = todo_postgres.url(user="postgres", database=todo_database_name)
            url = todo_postgres.url(user=login, database=todo_database_name)
        if kind == "pooler":
            todo_postgres._psql(f"ALTER ROLE {login} PASSWORD '{PASSWORD}'")
            bouncer = await stack.enter_async_context(
                PgBouncer(
                    TRIXIE,
                    todo_postgres.url(user="postgres", database="postgres"),
                    max_prepared_statements=1000,
                    default_pool_size=1,
                )
            )
            url = bouncer.url(login, todo_database_name)
        superuser = await asyncpg.connect(superuser_url)
        stack.push_async_callback(superuser.close)
        yield Place(url, superuser)


@pytest_asyncio.fixture
async def one(place: Place) -> AsyncGenerator[Database]:
    """A Database with alice and bob and one connection, behind a pooler one of the server, too."""
    async with Database.from_url(
        place.url, pool_size=1, max_overflow=0, retry_attempts=1
    ) as database:
        for user in ("alice", "bob"):
            await database.users.create(user, email=f"{user}@example.org", name="")
        yield database


KINDS: Final = (
    "direct",
    pytest.param("pooler", marks=pytest.mark.pooler),
    *(pytest.param(version, marks=pytest.mark.matrix) for version in OTHER_VERSIONS),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("login", [LOGIN, OWNER])
class TestLeftovers:
    @pytest.mark.parametrize(
        ("ending", "read_only"),
        list(product(["committed", "failed", "refused", "cancelled"], [False, True])),
    )
    async def test_T2_next_user_of_the_connection_finds_nothing(  # noqa: PLR0913, PLR0917  # fixtures
        self,
        one: Database,
        place: Place,
        login: str,
        ending: str,
        read_only: bool,  # noqa: FBT001
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        await place.superuser.execute(_PLANTED)
        seeded = await place.superuser.fetchval(
            "SELECT random() FROM (SELECT setseed(0.5) OFFSET 0) AS seeded"
        )
        random, pid, *before = await found_on_connection(one)
        assert before == list(_NOTHING)
        randoms = {random}
        for _ in range(2):
            with suppress(LookupError, TransactionAbortedError, TimeoutError):
                async with one.transaction("alice", read_only=read_only) as tx:
                    await self._leave(tx, login, read_only=read_only)
                    await self._end(tx, ending)
            random, now, *found = await found_on_connection(one)
            assert found == list(_NOTHING)
            assert now == pid
            randoms.add(random)
            with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError):
                await raw(one, lambda driver: driver.fetchval("SELECT lastval()"))
        assert len(randoms | {seeded}) == 4
        assert await one.tasks.count("bob") == 0
        assert [record for record in caplog.records if record.levelno >= WARNING] == []

    @staticmethod
    async def _leave(tx: Transaction, login: str, *, read_only: bool) -> None:
        if not read_only:
            await tx.tasks.create("alice", "secret")
            await tx.execute(text("SELECT nextval('numbers')"))
            if login == OWNER:
                # Only the owner of the database may make temporary tables.
                await tx.execute(text("SELECT set_config('role', 'none', true)"))
                await tx.execute(text("SELECT 1 AS x INTO TEMPORARY left_behind"))
        for sql in _LEAVING:
            await tx.execute(text(sql))

    @staticmethod
    async def _end(tx: Transaction, ending: str) -> None:
        match ending:
            case "failed":
                raise LookupError
            case "refused":
                with suppress(DBAPIError):
                    await tx.execute(text("SELECT 1 / 0"))
            case "cancelled":
                async with asyncio.timeout(0.1):
                    await tx.execute(text("SELECT pg_sleep(30)"))
            case _:
                pass

    async def test_T2_deferred_trigger_runs_as_the_user(self, one: Database, place: Place) -> None:
        await place.superuser.execute("""
            CREATE TABLE seen (role text, user_id text);
            GRANT INSERT ON seen TO PUBLIC;
            CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                INSERT INTO public.seen
                VALUES (current_user, current_setting('todo_db.user_id', true));
                RETURN NULL;
            END $$;
            CREATE CONSTRAINT TRIGGER see AFTER INSERT ON tasks
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION see()
        """)
        async with one.transaction("alice") as tx:
            await tx.tasks.create("alice", "x")
            await tx.execute(text("SELECT 1"))
        await one.tasks.create("bob", "x")
        seen = await place.superuser.fetch("SELECT role, user_id FROM seen")
        assert [tuple(row) for row in seen] == [("todo_app", "alice"), ("todo_app", "bob")]

    async def test_T2_deferred_trigger_that_refuses_stores_nothing_and_leaves_nothing(
        self, one: Database, place: Place
    ) -> None:
        await place.superuser.execute(_PLANTED)
        await place.superuser.execute("""
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '40001'; END $$;
            CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON tasks
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()
        """)
        with pytest.raises(UnavailableError):
            async with one.transaction("alice") as tx:
                await tx.tasks.create("alice", "refused")
                for sql in _LEAVING:
                    await tx.execute(text(sql))
        _, _, *found = await found_on_connection(one)
        assert found == list(_NOTHING)
        assert await place.superuser.fetchval("SELECT count(*) FROM tasks") == 0

    async def test_T5_run_heals_what_the_server_forgot(self, place: Place, one: Database) -> None:
        await one.close()
        sql = text("SELECT count(*) FROM tasks")
        runs = 0

        async def work(tx: Transaction) -> int:
            nonlocal runs
            runs += 1
            return int((await tx.execute(sql)).scalar_one())

        async with Database.from_url(place.url, pool_size=1, max_overflow=0) as patient:
            assert await patient.run("alice", work) == 0
            pid = (await found_on_connection(patient))["pid"]
            await place.superuser.execute("SELECT pg_terminate_backend($1, 5000)", pid)
            assert await patient.run("alice", work) == 0
            assert runs <= 3


async def backend(driver: Connection) -> int:
    return driver.get_server_pid()


class TestHealing:
    """PostgreSQL refuses a prepared statement whose columns have changed, or that it forgot."""

    @pytest.mark.parametrize(
        "break_it",
        [
            lambda owner, _: owner.execute("ALTER TABLE tasks ADD COLUMN note text"),
            lambda owner, _: owner.execute("ALTER TABLE tasks ALTER title TYPE text"),
            lambda _, db: raw(db, lambda driver: driver.execute("DEALLOCATE ALL")),
        ],
        ids=["column added", "type changed", "forgotten"],
    )
    @pytest.mark.parametrize("way", ["execute", "session", "stream", "entity", "many"])
    async def test_T5_stale_statement_is_run_again_by_run_and_never_fails_for_ever(
        self,
        database_without_retries: Database,
        owner: Connection,
        way: str,
        break_it: Callable[[Connection, Database], Awaitable[object]],
    ) -> None:
        db = database_without_retries
        await owner.execute("ALTER TABLE tasks DROP CONSTRAINT ck_tasks_title_not_blank")
        every = text("SELECT * FROM tasks ORDER BY id")

        async def work(tx: Transaction) -> list[str]:
            session = tx.session()
            match way:
                case "execute":
                    return [row.title for row in await tx.execute(every)]
                case "session":
                    return [row.title for row in await session.execute(every)]
                case "stream":
                    return [row.title async for row in await session.stream(every)]
                case "entity":
                    found = await session.scalars(select(Task).from_statement(every))
                    return [task.title for task in found]
                case _:
                    change = text("UPDATE tasks SET title = :title WHERE title = :title")
                    await session.execute(change, [{"title": "first"}, {"title": "x"}])
                    return ["first"]

        await db.tasks.create("alice", "first")
        for _ in range(2):
            assert await db.run("alice", work) == ["first"]
        pids = [await raw(db, backend)]
        await break_it(owner, db)
        with suppress(UnavailableError):
            async with db.transaction("alice") as tx:
                await work(tx)
        async with db.transaction("alice") as tx:
            assert await work(tx) == ["first"]
        assert [await raw(db, backend)] == pids

    async def test_T5_run_does_it_again(self, url: str, db: Database, owner: Connection) -> None:
        assert await db.tasks.count("alice") == 0
        runs = 0

        async def work(tx: Transaction) -> int:
            nonlocal runs
            runs += 1
            await tx.tasks.create("alice", "once")
            return len((await tx.execute(text("SELECT * FROM tasks"))).all())

        async with Database.from_url(url, pool_size=1, max_overflow=0) as patient:
            assert await patient.run("alice", work) == 1
            await owner.execute("ALTER TABLE tasks ADD COLUMN note text")
            assert await patient.run("alice", work) == 2
            assert runs == 3
            await raw(patient, lambda driver: driver.execute("DEALLOCATE ALL"))
            assert await patient.run("alice", work) == 3
        assert await owner.fetchval("SELECT count(*) FROM tasks") == 3


class Unserializable:
    pass


_MISTAKES: Final[dict[str, Callable[[Transaction], Awaitable[object]]]] = {
    "a str": lambda tx: tx.execute("SELECT 1"),  # type: ignore[arg-type]
    "None": lambda tx: tx.execute(None),  # type: ignore[arg-type]
    "a class": lambda tx: tx.execute(Task),  # type: ignore[arg-type]
    "a missing parameter": lambda tx: tx.execute(text("SELECT :x")),
    "another parameter": lambda tx: tx.execute(text("SELECT :x"), {"y": 1}),
    "a number as parameters": lambda tx: tx.execute(text("SELECT :x"), 5),  # type: ignore[arg-type]
    "a str as parameters": lambda tx: tx.execute(text("SELECT :x"), "x"),  # type: ignore[arg-type]
    "a tuple as parameters": lambda tx: tx.execute(text("SELECT :x"), (1,)),  # type: ignore[arg-type]
    "text for a number": lambda tx: tx.execute(text("SELECT CAST(:x AS int)"), {"x": "one"}),
    "a number for text": lambda tx: tx.execute(text("SELECT CAST(:x AS text)"), {"x": 1}),
    "text for a date": lambda tx: tx.execute(text("SELECT CAST(:x AS date)"), {"x": "today"}),
    "a number out of range": lambda tx: tx.execute(text("SELECT CAST(:x AS int)"), {"x": 2**70}),
    "half a character": lambda tx: tx.execute(text("SELECT CAST(:x AS text)"), {"x": "\ud800"}),
    "text for bytes": lambda tx: tx.execute(
        text("SELECT :x").bindparams(bindparam("x", type_=LargeBinary)), {"x": "text"}
    ),
    "an object for JSON": lambda tx: tx.execute(
        text("SELECT :x").bindparams(bindparam("x", type_=JSONB)), {"x": Unserializable()}
    ),
    "an object": lambda tx: tx.execute(text("SELECT CAST(:x AS text)"), {"x": Unserializable()}),
    "an array of mixed depth": lambda tx: tx.execute(
        text("SELECT CAST(:x AS int[])"), {"x": [1, [2]]}
    ),
    "a stream": lambda tx: tx.execute(text("SELECT 1").execution_options(stream_results=True)),
    "pieces": lambda tx: tx.execute(text("SELECT 1").execution_options(yield_per=5)),
    "an option that does not exist": lambda tx: tx.execute(
        text("SELECT 1").execution_options(isolation_level="SERIALIZABLE")
    ),
    "many with one that is wrong": lambda tx: tx.session().execute(
        text("SELECT :x"), [{"x": 1}, {"y": 2}]
    ),
    "many that are none": lambda tx: tx.session().execute(text("SELECT :x"), [1, 2]),  # type: ignore[list-item]
    "many that return": lambda tx: tx.session().execute(
        update(Task).values(title=bindparam("x")).returning(Task.id), [{"x": "1"}, {"x": "2"}]
    ),
}


class TestMistakes:
    @pytest.mark.parametrize("mistake", list(_MISTAKES))
    async def test_T6_statement_that_cannot_be_sent_changes_nothing(
        self, database_without_retries: Database, mistake: str
    ) -> None:
        db = database_without_retries
        async with db.transaction("alice") as tx:
            await tx.tasks.create("alice", "before")
            with pytest.raises(SQLAlchemyError) as caught:
                await _MISTAKES[mistake](tx)
            assert not isinstance(caught.value, TodoDBError)
            assert await context(tx) == ("todo_app", "alice")
            await tx.tasks.create("alice", "after")
        assert await db.tasks.count("alice") == 2

    @pytest.mark.parametrize("sql", ["SELECT 'a\x00b'", "SELECT '\ud800'"], ids=["NUL", "lone"])
    async def test_text_that_the_protocol_cannot_carry_changes_nothing(
        self, db: Database, sql: str
    ) -> None:
        async with db.transaction("alice") as tx:
            with pytest.raises(InvalidInputError):
                await tx.execute(text(sql))
            await tx.tasks.create("alice", "after")
        assert await db.tasks.count("alice") == 1

    @pytest.mark.parametrize("count", [2, 300, 5000])
    @pytest.mark.parametrize("returning", [False, True])
    async def test_T6_many_rows_with_a_wrong_one_store_none(
        self,
        database_without_retries: Database,
        owner: Connection,
        count: int,
        returning: bool,  # noqa: FBT001
    ) -> None:
        db = database_without_retries
        rows: list[dict[str, object]] = [
            {"user_id": "alice", "title": f"row {number}"} for number in range(count)
        ]
        for wrong in (count - 1, count // 2):
            bad = [*rows]
            bad[wrong] = {"user_id": "alice", "title": 5}
            statement = insert(Task).returning(Task.id) if returning else insert(Task)
            for execute in (False, True):
                with suppress(TransactionAbortedError):
                    async with db.transaction("alice") as tx:
                        with pytest.raises((SQLAlchemyError, TodoDBError)):
                            if execute:
                                await (await _connection(tx)).execute(statement, bad)
                            else:
                                await tx.session().execute(statement, bad)
                assert await owner.fetchval("SELECT count(*) FROM tasks") == 0
            async with db.transaction("alice") as tx:
                assert await context(tx) == ("todo_app", "alice")

    async def test_T6_many_rows_of_text_with_a_wrong_one_store_none(
        self, database_without_retries: Database, owner: Connection
    ) -> None:
        db = database_without_retries
        statement = text("INSERT INTO tasks (user_id, title) VALUES ('alice', :title)")
        for rows in (["first", 5], ["first", None], ["first", "x" * 201], [*"abc", 5, *"def"]):
            with suppress(TransactionAbortedError):
                async with db.transaction("alice") as tx:
                    with pytest.raises((SQLAlchemyError, TodoDBError)):
                        await tx.session().execute(statement, [{"title": row} for row in rows])
            assert await owner.fetchval("SELECT count(*) FROM tasks") == 0

    async def test_T8_driver_cannot_be_asked_past_the_gate(self, db: Database) -> None:
        async with db.transaction("alice") as tx:
            public = {name for name in dir(tx) if not name.startswith("_")}
            assert not public & {"ask", "fetch", "fetch_row", "connection", "driver"}

    async def test_T8_user_id_among_the_changes_is_a_wrong_field(self, db: Database) -> None:
        task = await db.tasks.create("alice", "x")
        changes: dict[str, Any] = {"user_id": "bob"}
        async with db.transaction("alice") as tx:
            for at in (db, tx):
                with pytest.raises(InvalidInputError):
                    await at.tasks.update("alice", task.id, **changes)
                with pytest.raises(InvalidInputError):
                    await at.users.update("alice", **changes)


_SECRET: Final = "a secret"  # noqa: S105  # a value of a row


@pytest_asyncio.fixture
async def with_labels(db: Database, owner: Connection) -> Database:
    await labels.create_tables(owner)
    await owner.execute("""
        INSERT INTO labels (user_id, name) VALUES ('alice', 'a secret');
        CREATE FUNCTION fail(state text) RETURNS void LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'a secret' USING ERRCODE = state; END $$
    """)
    return db


_REFUSED: Final[dict[str, tuple[str, type[TodoDBError], str]]] = {
    "duplicate": (
        f"INSERT INTO labels (user_id, name) VALUES ('alice', '{_SECRET}')",
        ConflictError,
        "",
    ),
    "too long": (
        f"INSERT INTO labels (user_id, name) VALUES ('alice', '{_SECRET} that is long')",
        InvalidInputError,
        "values",
    ),
    "out of range": (
        "INSERT INTO labels (user_id, name, size) VALUES ('alice', 'x', 40000)",
        InvalidInputError,
        "values",
    ),
    "NULL": (
        "INSERT INTO labels (user_id, name) VALUES ('alice', NULL)",
        InvalidInputError,
        "name",
    ),
    "CHECK": (
        "INSERT INTO labels (user_id, name, size) VALUES ('alice', 'a secret 2', 100)",
        InvalidInputError,
        "ck_labels_size",
    ),
    "foreign key": (
        "INSERT INTO notes (user_id, label_id, body) VALUES ('alice', -1, 'a secret')",
        ConflictError,
        "",
    ),
    "another user": (
        "INSERT INTO labels (user_id, name) VALUES ('bob', 'a secret')",
        IsolationError,
        "",
    ),
    "serialization": ("SELECT fail('40001')", UnavailableError, ""),
    "deadlock": ("SELECT fail('40P01')", UnavailableError, ""),
    "short of memory": ("SELECT fail('53200')", UnavailableError, ""),
    "timeout": ("SELECT pg_sleep(30), 'a secret'", CallTimeoutError, ""),
}


class TestRefusals:
    """Errors of the server in a caller's own SQL, as errors of the tree."""

    @pytest.mark.parametrize("refusal", list(_REFUSED))
    @pytest.mark.parametrize("way", ["execute", "session", "driver SQL"])
    async def test_T7_known_error_is_ours_and_tells_no_value(
        self, url: str, with_labels: Database, owner: Connection, refusal: str, way: str
    ) -> None:
        assert await with_labels.tasks.count("alice") == 0
        sql, expected, field = _REFUSED[refusal]
        async with Database.from_url(url, retry_attempts=1, statement_timeout_seconds=1) as db:
            with pytest.raises(TransactionAbortedError):
                async with db.transaction("alice") as tx:
                    await tx.tasks.create("alice", "lost")
                    with pytest.raises(expected) as caught:
                        match way:
                            case "execute":
                                await tx.execute(text(sql))
                            case "session":
                                await tx.session().execute(text(sql))
                            case _:
                                await (await _connection(tx)).exec_driver_sql(sql)
                    with pytest.raises(TransactionAbortedError):
                        await tx.execute(text("SELECT 1"))
            error = caught.value
            assert type(error) is expected
            assert error.__cause__ is None
            assert error.__context__ is None
            assert "secret" not in "".join(traceback.format_exception_only(error))
            if isinstance(error, InvalidInputError):
                assert error.field == field
            async with db.transaction("alice") as tx:
                with pytest.raises(expected):
                    async with tx.savepoint():
                        await tx.execute(text(sql))
                await tx.tasks.create("alice", "kept")
        assert await owner.fetchval("SELECT array_agg(title) FROM tasks") == ["kept"]

    async def test_T7_lock_that_is_not_free_is_a_timeout(
        self, url: str, db: Database, owner: Connection
    ) -> None:
        task = await db.tasks.create("alice", "x")
        async with (
            Database.from_url(url, retry_attempts=1, lock_timeout_seconds=0.1) as hasty,
            owner.transaction(),
        ):
            await owner.execute("SELECT FROM tasks WHERE id = $1 FOR UPDATE", task.id)
            with pytest.raises(CallTimeoutError) as caught:
                async with hasty.transaction("alice") as tx:
                    await tx.execute(update(Task).values(title="y"))
            assert caught.value.transient
        assert (await db.tasks.get("alice", task.id)).title == "x"

    async def test_T7_write_in_a_read_only_transaction_is_ours(self, db: Database) -> None:
        with pytest.raises(TransactionError, match="read-only"):
            async with db.transaction("alice", read_only=True) as tx:
                await tx.execute(insert(Task).values(user_id="alice", title="x"))

    async def test_T7_run_does_a_collision_again(
        self, with_labels: Database, owner: Connection
    ) -> None:
        runs = 0

        async def work(tx: Transaction) -> None:
            nonlocal runs
            runs += 1
            await tx.tasks.create("alice", f"run {runs}")
            if runs == 1:
                await tx.execute(text("SELECT fail('40001')"))

        await with_labels.run("alice", work)
        assert await owner.fetchval("SELECT array_agg(title) FROM tasks") == ["run 2"]

    @pytest.mark.parametrize(
        "sql",
        [
            "SELECT FROM FROM",
            "SELECT * FROM nonsense",
            "SELECT nonsense FROM tasks",
            "SELECT nonsense()",
            "SELECT 'x' + 1",
            "SELECT 1 / 0",
            "SELECT CAST('x' AS int)",
            "INSERT INTO tasks (nonsense) VALUES (1)",
            "SELECT fail('P0001')",
        ],
    )
    async def test_T7_mistake_in_the_text_is_sqlalchemys(
        self, with_labels: Database, sql: str
    ) -> None:
        with pytest.raises(TransactionAbortedError):
            async with with_labels.transaction("alice") as tx:
                with pytest.raises(DBAPIError):
                    await tx.execute(text(sql))
        assert await with_labels.tasks.count("alice") == 0
