"""What todo_db changes in asyncpg's connection and in SQLAlchemy's dialect, and that both allow it.

A failure here after an upgrade names what `todo_db/engine/driver.py` has to do differently.
"""

import asyncio
import inspect
import struct
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from typing import Final

import asyncpg
import pytest
import pytest_asyncio
import sqlalchemy
from driver import Connection
from proxy import Fault, Proxy, until
from sqlalchemy import insert, select, text
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.engine.interfaces import Dialect as SQLAlchemyDialect
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from todo_db import Database, Settings, TransactionError
from todo_db.embedded import LOGIN
from todo_db.engine import fetch_unwatched, parse_url, transport
from todo_db.engine.connection import create_pool_engine
from todo_db.engine.driver import Dialect, NamedConnection
from todo_db.models import Task, User

type Parameters = dict[str, int] | list[dict[str, int]] | None

# What a message of a frontend is, by its first byte.
_PARSE: Final = b"P"
_BIND: Final = b"B"


@pytest.fixture
def login() -> str:
    """One is enough: connections are the same for both."""
    return LOGIN


def messages(sent: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Split what a client sent on one connection: the startup message, then a type and a body."""
    (position,) = struct.unpack_from("!i", sent)
    while position < len(sent):
        (length,) = struct.unpack_from("!i", sent, position + 1)
        yield sent[position : position + 1], sent[position + 5 : position + 1 + length]
        position += 1 + length


def parsed(proxy: Proxy) -> list[str]:
    """The names under which statements were prepared, in order."""
    return [
        body.partition(b"\x00")[0].decode()
        for kind, body in messages(bytes(proxy.sent))
        if kind == _PARSE
    ]


def portals(proxy: Proxy) -> set[str]:
    """The names of cursors."""
    return {
        body.partition(b"\x00")[0].decode()
        for kind, body in messages(bytes(proxy.sent))
        if kind == _BIND
    } - {""}


def pool_engine(url: str) -> AsyncEngine:
    return create_pool_engine(parse_url(url), Settings(database_url=url), prepared_statements=True)


@pytest_asyncio.fixture
async def one(proxy: Proxy) -> AsyncGenerator[Database]:
    """A Database on one connection through the proxy."""
    async with Database.from_url(proxy.url, pool_size=1, max_overflow=0) as database:
        await database.users.create("alice", email="alice@example.org", name="Alice")
        yield database


@pytest_asyncio.fixture
async def named(one: Database) -> AsyncGenerator[NamedConnection]:
    """The connection of that Database."""
    connection = await one._pool.acquire()
    yield connection.driver
    one._pool.release(connection)


class TestNames:
    """The names of prepared statements and cursors on a connection."""

    async def test_statements_of_the_package_carry_the_prefix_of_their_connection(
        self, one: Database, proxy: Proxy
    ) -> None:
        await one.tasks.create("alice", "Buy milk")
        await one.tasks.list("alice")
        assert len(parsed(proxy)) > 2
        self.assert_ours(one, proxy)

    async def test_statements_of_sqlalchemy_carry_it(self, one: Database, proxy: Proxy) -> None:
        before = len(parsed(proxy))
        async with one.transaction("alice") as tx:
            await tx.execute(text("SELECT 1"))
            await tx.execute(insert(Task), {"user_id": "alice", "title": "Buy milk"})
            tx.session().add(Task(title="Buy bread", completed=False))
            await tx.session().flush()
            assert (await tx.session().scalars(select(User))).one().id == "alice"
        assert len(parsed(proxy)) >= before + 4
        self.assert_ours(one, proxy)

    @pytest.mark.parametrize(
        "query", ["SELECT 'sad'::mood", "SELECT ARRAY['sad']::mood[]", "SELECT '(1,sad)'::pair"]
    )
    async def test_asyncpgs_questions_about_types_carry_it(
        self, one: Database, proxy: Proxy, owner: Connection, query: str
    ) -> None:
        await owner.execute(
            "CREATE TYPE mood AS ENUM ('sad', 'happy'); CREATE TYPE pair AS (number int, how mood)"
        )
        before = len(parsed(proxy))
        async with one.transaction("alice") as tx:
            await tx.execute(text(query))
        assert len(parsed(proxy)) >= before + 2, "asyncpg asked nothing: use another type"
        self.assert_ours(one, proxy)

    async def test_cursors_carry_it(
        self, one: Database, named: NamedConnection, proxy: Proxy
    ) -> None:
        async with named.transaction():
            cursor = await named.cursor("SELECT generate_series(1, 9)")
            assert len(await cursor.fetch(9)) == 9
        assert portals(proxy), "asyncpg gave the cursor no name"
        assert {name.startswith(named.statement_prefix) for name in portals(proxy)} == {True}
        self.assert_ours(one, proxy, named)

    async def test_the_server_knows_them_by_the_same_name(self, named: NamedConnection) -> None:
        await named.fetch("SELECT 1 AS a_statement")
        names = [row[0] for row in await named.fetch("SELECT name FROM pg_prepared_statements")]
        assert names
        assert {name.startswith(named.statement_prefix) for name in names} == {True}

    async def test_no_two_connections_share_one(self, url: str) -> None:
        async with Database.from_url(url) as database:
            connections = [await database._pool.acquire() for _ in range(4)]
            names: Counter[str] = Counter()
            for connection in connections:
                for number in range(5):
                    await connection.driver.fetch(f"SELECT {number}")
                names.update(
                    row[0]
                    for row in await connection.driver.fetch(
                        "SELECT name FROM pg_prepared_statements"
                    )
                )
                database._pool.release(connection)
        assert sum(names.values()) >= 4 * 5
        assert set(names.values()) == {1}

    @staticmethod
    def assert_ours(one: Database, proxy: Proxy, named: NamedConnection | None = None) -> None:
        """Every name begins with the prefix of the one connection, and is used once."""
        prefix = (named or one._pool._idle[0].driver).statement_prefix
        names = [name for name in parsed(proxy) if name]
        assert names
        assert [name for name in names if not name.startswith(prefix)] == []
        assert len(names) == len(set(names))
        assert b"__asyncpg_" not in proxy.sent


class TestFetchUnwatched:
    """After a change of the schema it does what asyncpg's `fetch` does."""

    @pytest_asyncio.fixture(autouse=True)
    async def notes(self, named: NamedConnection, owner: Connection) -> None:
        # After the Database was opened, which refuses a table without a fence.
        del named
        await owner.execute("CREATE TABLE notes (number int); GRANT SELECT ON notes TO PUBLIC")
        await owner.execute("INSERT INTO notes VALUES (1)")

    async def test_prepares_a_statement_again_that_the_server_refused(
        self, named: NamedConnection, owner: Connection
    ) -> None:
        sql = "SELECT * FROM public.notes"
        assert [tuple(row) for row in await fetch_unwatched(named, sql, ())] == [(1,)]
        await owner.execute("ALTER TABLE notes ADD COLUMN title text")
        assert [tuple(row) for row in await fetch_unwatched(named, sql, ())] == [(1, None)]

    async def test_forgets_the_types_of_rows_that_it_could_not_read(
        self, named: NamedConnection, owner: Connection
    ) -> None:
        sql = "SELECT note FROM public.notes AS note"
        ((note,),) = await fetch_unwatched(named, sql, ())
        assert tuple(note) == (1,)
        await owner.execute("ALTER TABLE notes ADD COLUMN title text")
        with pytest.raises(asyncpg.OutdatedSchemaCacheError):
            await fetch_unwatched(named, sql, ())
        ((note,),) = await fetch_unwatched(named, sql, ())
        assert tuple(note) == (1, None)


def _overrides(child: type, parent: type) -> list[tuple[type, type, str]]:
    """Everything that the class replaces or adds, except what Python itself calls."""
    return [
        (child, parent, name)
        for name, value in vars(child).items()
        if callable(value) and not name.startswith("__")
    ]


class TestIsRefused:
    async def test_row_that_holds_the_bytes_of_a_refusal_is_none(
        self, named: NamedConnection, proxy: Proxy
    ) -> None:
        """The server sends the beginning of a long row before it commits."""
        refusal = b"\0VFATAL\0C57P01\0"
        proxy.break_at(refusal, Fault.CUT_AFTER, sender="server")
        with pytest.raises(asyncpg.ConnectionDoesNotExistError):
            await named.fetch("SELECT repeat($1, 100000)::bytea", r"\000VFATAL\000C57P01\000")
        assert refusal in named._listener._last
        assert not named.is_refused

    async def test_session_that_the_server_ended_is(
        self, named: NamedConnection, superuser: Connection
    ) -> None:
        await superuser.execute("SELECT pg_terminate_backend($1)", named.get_server_pid())
        with pytest.raises((asyncpg.PostgresError, OSError)):
            await named.fetch("SELECT pg_sleep(10)")
        await until(named.is_closed)
        assert named.is_refused


class TestPrivateNames:
    """What a new version of asyncpg or SQLAlchemy must still have."""

    @pytest.mark.parametrize(
        ("child", "parent", "name"),
        [
            *_overrides(NamedConnection, asyncpg.Connection),
            *_overrides(Dialect, PGDialect_asyncpg),
        ],
    )
    def test_what_is_overridden_exists_with_the_same_parameters(
        self, child: type, parent: type, name: str
    ) -> None:
        library = parent.__module__.partition(".")[0]
        original = getattr(parent, name, None)
        assert original is not None, f"{library} no longer calls {name}: see driver.py"
        theirs, ours = (
            [parameter.name for parameter in inspect.signature(method).parameters.values()]
            for method in (original, getattr(child, name))
        )
        assert ours == theirs, f"{library} calls {name} with other arguments: see driver.py"

    def test_list_of_overrides_is_complete(self) -> None:
        names = {name for *_, name in _overrides(Dialect, PGDialect_asyncpg)}
        assert names > {
            "_get_default_schema_name",
            "_get_server_version_info",
            "_set_backslash_escapes",
            "get_isolation_level",
        }
        assert {name for *_, name in _overrides(NamedConnection, asyncpg.Connection)} == {
            "_get_unique_id"
        }

    async def test_asyncpg_asks_for_its_names(
        self, named: NamedConnection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []

        def name(_connection: NamedConnection, prefix: str) -> str:
            asked.append(prefix)
            return f"{named.statement_prefix}{len(asked)}_of_this_test"

        monkeypatch.setattr(NamedConnection, "_get_unique_id", name)
        await named.fetch("SELECT 'asked'")
        assert asked == ["stmt"], "asyncpg no longer names statements by _get_unique_id"

    @pytest.mark.parametrize("name", ["_get_statement", "_protocol"])
    def test_asyncpg_has_what_runs_a_statement(self, name: str) -> None:
        assert hasattr(asyncpg.Connection, name), f"asyncpg has no {name}: see fetch_unwatched()"

    async def test_asyncpg_runs_a_statement_without_a_timer(
        self, named: NamedConnection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sql = "SELECT $1::text AS title, $2::int AS number"
        expected = await named.fetch(sql, "Buy milk", 1)
        timers: list[object] = []
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "call_later", lambda *given: timers.append(given))
        monkeypatch.setattr(loop, "call_at", lambda *given: timers.append(given))
        assert await fetch_unwatched(named, sql, ("Buy milk", 1)) == expected
        assert timers == []

    async def test_asyncpg_has_the_transport(self, named: NamedConnection) -> None:
        assert hasattr(named, "_transport"), "asyncpg has no _transport: see transport()"
        assert transport(named).get_extra_info("socket") is not None

    def test_sqlalchemy_takes_a_connection_that_is_open(self) -> None:
        parameters = list(inspect.signature(sqlalchemy.Connection).parameters)
        assert parameters[:2] == ["engine", "connection"], (
            "SQLAlchemy no longer takes Connection(engine, connection=…):"
            " see PooledConnection.sqlalchemy"
        )

    async def test_sqlalchemy_finds_the_dialect_by_its_name(self, url: str) -> None:
        engine = pool_engine(url)
        assert type(engine.dialect) is Dialect


class TestDialect:
    """What the dialect answers in place of the server."""

    @pytest.mark.parametrize("escapes", ["on", "off"])
    async def test_answers_what_sqlalchemys_own_learns_by_asking(
        self, url: str, owner: Connection, todo_database_name: str, escapes: str
    ) -> None:
        await owner.execute(
            f"ALTER DATABASE {todo_database_name} SET standard_conforming_strings = {escapes}"
        )
        asking = create_async_engine(parse_url(url).url, isolation_level="AUTOCOMMIT")
        ours, theirs = await self.learnt(pool_engine(url)), await self.learnt(asking)
        assert theirs["server_version_info"]
        assert ours == theirs
        assert theirs["_backslash_escapes"] is (escapes == "off")

    @staticmethod
    async def learnt(engine: AsyncEngine) -> dict[str, object]:
        """Return all plain attributes of the dialect after the first connection."""
        async with engine.connect():
            pass
        dialect: SQLAlchemyDialect = engine.dialect
        await engine.dispose()
        plain = (bool, int, str, tuple, type(None))
        return {
            name: value
            for name, value in vars(dialect).items()
            # Whether listeners are registered is not learnt from a server.
            if isinstance(value, plain) and name != "_has_events"
        }

    async def test_first_connection_of_an_engine_is_one_turn(self, proxy: Proxy) -> None:
        async def connect() -> None:
            async with pool_engine(proxy.url).connect():
                pass

        # The startup message: with trust there is no password to prove.
        assert await proxy.turns(connect()) == 1

    async def test_first_opening_of_a_database(self, proxy: Proxy) -> None:
        async def opened() -> None:
            async with Database.from_url(proxy.url):
                pass

        # The startup message, BEGIN, Parse and Execute of the check, COMMIT.
        assert await proxy.turns(opened()) == 5


class TestOutsideATransaction:
    """SQLAlchemy's own connection, without the gate of a transaction."""

    @pytest_asyncio.fixture
    async def bare(self, proxy: Proxy) -> AsyncGenerator[AsyncConnection]:
        async with pool_engine(proxy.url).connect() as connection:
            yield connection

    @pytest.mark.parametrize(
        "parameters", [None, {"n": 1}, [{"n": 1}, {"n": 2}]], ids=["none", "one", "many"]
    )
    async def test_statement_is_refused(
        self, bare: AsyncConnection, proxy: Proxy, parameters: Parameters
    ) -> None:
        sql = "SELECT 1" if parameters is None else "SELECT :n"
        before = bytes(proxy.sent)
        with pytest.raises(TransactionError, match="inside a transaction"):
            await bare.execute(text(sql), parameters)
        assert proxy.sent == before

    async def test_driver_sql_is_refused(self, bare: AsyncConnection, proxy: Proxy) -> None:
        before = bytes(proxy.sent)
        with pytest.raises(TransactionError):
            await bare.exec_driver_sql("SELECT 1")
        assert proxy.sent == before

    async def test_stream_is_refused(self, bare: AsyncConnection, proxy: Proxy) -> None:
        before = bytes(proxy.sent)
        with pytest.raises(TransactionError):
            await bare.stream(text("SELECT 1"))
        assert proxy.sent == before

    async def test_savepoint_is_refused(self, bare: AsyncConnection, proxy: Proxy) -> None:
        before = bytes(proxy.sent)
        with pytest.raises(TransactionError):
            async with bare.begin_nested():
                pass
        assert proxy.sent == before
