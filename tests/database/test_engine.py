"""The URL, the connections and who gets them."""

import asyncio
import logging
import socket
import tempfile
import traceback
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Final, cast

import asyncpg
import pytest
import pytest_asyncio
from driver import Connection
from proxy import STARTUP, TERMINATE, Fault, Proxy, until
from sqlalchemy import make_url

from todo_db import (
    ConfigurationError,
    Database,
    PoolExhaustedError,
    Settings,
    TodoDBError,
    UnavailableError,
)
from todo_db.embedded import LOGIN, EmbeddedPostgres
from todo_db.engine import Pool, PooledConnection, connect_failure
from todo_db.engine.pool import _Waiter
from todo_db.records import PoolStatus

MARKER: Final = "hunter2"


@pytest.fixture
def login() -> str:
    """One is enough: connections are the same for both."""
    return LOGIN


def settings(url: str, **values: object) -> Settings:
    defaults = {"pool_size": 2, "max_overflow": 0, "connect_retry_seconds": 0}
    return Settings(database_url=url, **(defaults | values))


@pytest_asyncio.fixture
async def pool(url: str) -> AsyncGenerator[Pool]:
    """Two connections, both warm."""
    pool = Pool(settings(url))
    for connection in [await pool.acquire(), await pool.acquire()]:
        pool.release(connection)
    yield pool
    await pool.close()


@pytest.fixture
def folder() -> Iterator[str]:
    """Short enough for the path of a socket in it."""
    with tempfile.TemporaryDirectory(prefix="todo-") as folder:
        yield folder


def told(error: BaseException) -> str:
    """All that an error and those behind it could say to anybody."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        parts += [str(cause), repr(cause), repr(cause.args), *traceback.format_exception(cause)]
        cause = cause.__cause__ or cause.__context__
    return "".join(parts)


class TestOrder:
    async def test_first_come_first_served_for_32_tasks_on_two_connections(
        self, pool: Pool
    ) -> None:
        arrived: list[tuple[int, int]] = []
        served: list[tuple[int, int]] = []

        async def work(task: int) -> None:
            for turn in range(8):
                arrived.append((task, turn))
                connection = await pool.acquire()
                served.append((task, turn))
                await connection.driver.execute("SELECT 1")
                pool.release(connection)

        async with asyncio.timeout(20):
            await asyncio.gather(*map(work, range(32)))
        assert served == arrived
        # Nobody had a second turn before everybody had the first one.
        assert sorted(task for task, _ in served[:32]) == list(range(32))

    async def test_one_who_gives_up_does_not_hold_the_others_up(self, pool: Pool) -> None:
        connections = [await pool.acquire(), await pool.acquire()]
        first, second = (asyncio.create_task(pool.acquire()) for _ in range(2))
        await asyncio.sleep(0)
        assert pool.status.waiting == 2
        first.cancel()
        pool.release(connections[0])
        connections[0] = await second
        with pytest.raises(asyncio.CancelledError):
            await first
        assert pool.status == PoolStatus(size=2, in_use=2, waiting=0)
        for connection in connections:
            pool.release(connection)


class TestExhaustion:
    async def test_raises_when_none_is_free_in_time_and_recovers(self, url: str) -> None:
        pool = Pool(settings(url, pool_size=1, pool_timeout_seconds=0.05))
        connection = await pool.acquire()
        for _ in range(2):
            with pytest.raises(PoolExhaustedError) as caught:
                await pool.acquire()
            assert caught.value.retry_after > 0
        assert pool.status == PoolStatus(size=1, in_use=1, waiting=0)
        pool.release(connection)
        pool.release(await pool.acquire())
        await pool.close()

    async def test_overflow_is_lent_and_closed_afterwards(self, url: str) -> None:
        pool = Pool(settings(url, pool_size=1, max_overflow=1))
        connections = [await pool.acquire(), await pool.acquire()]
        assert pool.status == PoolStatus(size=2, in_use=2, waiting=0)
        for connection in connections:
            pool.release(connection)
        await until(connections[1].driver.is_closed)
        assert not connections[0].driver.is_closed()
        await pool.close()

    async def test_status_counts_who_waits(self, pool: Pool) -> None:
        assert pool.status == PoolStatus(size=2, in_use=0, waiting=0)
        connections = [await pool.acquire(), await pool.acquire()]
        waiting = asyncio.create_task(pool.acquire())
        await asyncio.sleep(0)
        assert pool.status == PoolStatus(size=2, in_use=2, waiting=1)
        pool.release(connections.pop())
        connections.append(await waiting)
        assert pool.status == PoolStatus(size=2, in_use=2, waiting=0)
        for connection in connections:
            pool.release(connection)


class TestWaiter:
    """The timer of a caller who waits."""

    @pytest_asyncio.fixture
    async def waiter(self) -> _Waiter:
        loop = asyncio.get_running_loop()
        later = loop.time() + 60
        return _Waiter(
            loop.create_future(), cast("asyncio.Task[None]", asyncio.current_task()), later, later
        )

    async def test_of_one_who_was_served_does_nothing(self, url: str, waiter: _Waiter) -> None:
        waiter.connection.cancel()
        Pool(settings(url))._give_up(waiter)

    async def test_that_comes_too_early_is_set_again(self, url: str, waiter: _Waiter) -> None:
        Pool(settings(url))._give_up(waiter)
        assert not waiter.connection.done()
        # Its timer finds it done.
        waiter.connection.cancel()

    async def test_that_is_closed_leaves_the_queue(self, url: str) -> None:
        pool = Pool(settings(url))
        waiting = pool.acquire()
        # As a loop that ends does with a task that it never cancelled.
        waiting.send(None)
        waiting.close()
        assert pool.status.waiting == 0
        await pool.close()


class TestGuards:
    """What should not be in the pool is put there behind its back."""

    @staticmethod
    async def idle(pool: Pool) -> PooledConnection:
        """Return the connection of the connection that is lent next."""
        connection = await pool.acquire()
        pool.release(connection)
        return connection

    async def test_E7_connection_in_a_transaction_is_not_lent(self, pool: Pool) -> None:
        dirty = (await self.idle(pool)).driver
        await dirty.execute("BEGIN; SET LOCAL todo_db.user_id = 'alice'")
        connection = await pool.acquire()
        assert connection.driver is not dirty
        await until(dirty.is_closed)
        assert not connection.driver.is_in_transaction()
        pool.release(connection)

    async def test_F01_closed_connection_is_not_lent(self, pool: Pool) -> None:
        closed = (await self.idle(pool)).driver
        closed.terminate()
        connection = await pool.acquire()
        assert await connection.driver.fetchval("SELECT 1") == 1
        pool.release(connection)

    async def test_E7_connection_in_a_transaction_is_rolled_back(self, pool: Pool) -> None:
        connection = await pool.acquire()
        await connection.driver.execute("BEGIN")
        pool.release(connection)
        assert connection not in pool._idle
        await until(lambda: connection in pool._idle)
        assert not connection.driver.is_in_transaction()
        assert pool.status.in_use == 0

    async def test_old_connection_is_not_kept(
        self, pool: Pool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        connection = await pool.acquire()
        monkeypatch.setattr("todo_db.engine.connection._EXPIRES_AFTER_SECONDS", 0)
        pool.release(connection)
        await until(connection.driver.is_closed)

    async def test_terminated_connection_is_replaced(self, pool: Pool) -> None:
        for _ in range(5):
            connection = await pool.acquire()
            connection.terminate()
            pool.release(connection)
        connections = [await pool.acquire(), await pool.acquire()]
        for connection in connections:
            assert await connection.driver.fetchval("SELECT 1") == 1
            pool.release(connection)


class TestConnecting:
    @staticmethod
    async def failure(url: str, **values: object) -> TodoDBError:
        pool = Pool(settings(url, **values))
        with pytest.raises(TodoDBError) as caught:
            await pool.acquire()
        assert pool.status.in_use == 0
        await pool.close()
        return caught.value

    async def test_F10_refused(self, url: str, folder: str) -> None:
        with socket.socket(socket.AF_UNIX) as nobody_listens:
            nobody_listens.bind(str(Path(folder, ".s.PGSQL.5432")))
            moved = make_url(url).update_query_dict({"host": folder})
            failure = await self.failure(moved.render_as_string(hide_password=False))
        assert type(failure) is UnavailableError
        assert failure.transient

    async def test_F10_refused_by_tcp(self) -> None:
        with socket.socket() as nobody_listens:
            nobody_listens.bind(("127.0.0.1", 0))
            port = nobody_listens.getsockname()[1]
            failure = await self.failure(f"postgresql://alice@127.0.0.1:{port}/todo")
        assert type(failure) is UnavailableError
        assert failure.transient

    @pytest.mark.parametrize("sslmode", ["allow", "prefer", "require", "verify-full"])
    async def test_answer_of_another_program_is_not_said_to_be_postgresqls(
        self, sslmode: str
    ) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(8)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            failure = await self.failure(f"postgresql://a@127.0.0.1:{port}/t?sslmode={sslmode}")
        assert type(failure) is ConfigurationError
        assert str(failure).startswith("what answers has no TLS, or is no PostgreSQL: check the")

    async def test_F32b_no_such_socket_folder(self, folder: str) -> None:
        failure = await self.failure(f"postgresql://alice@/todo?host={folder}/missing")
        assert type(failure) is ConfigurationError

    async def test_F12_socket_that_is_gone_while_the_server_restarts(self, folder: str) -> None:
        failure = await self.failure(f"postgresql://alice@/todo?host={folder}")
        assert type(failure) is UnavailableError
        assert failure.transient

    async def test_F33_server_without_tls(self) -> None:
        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(8)
            writer.write(b"N")
            writer.close()

        async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            failure = await self.failure(
                f"postgresql://alice@127.0.0.1:{port}/todo?sslmode=require"
            )
        assert type(failure) is ConfigurationError

    async def test_F42_unknown_login(self, todo_postgres: EmbeddedPostgres) -> None:
        failure = await self.failure(todo_postgres.url(user="nobody"))
        assert type(failure) is ConfigurationError

    async def test_F42_unknown_database(self, todo_postgres: EmbeddedPostgres) -> None:
        failure = await self.failure(todo_postgres.url(user=LOGIN, database="missing"))
        assert type(failure) is ConfigurationError

    async def test_F13_no_connection_left(
        self, url: str, owner: Connection, todo_database_name: str
    ) -> None:
        await owner.execute(f"ALTER DATABASE {todo_database_name} CONNECTION LIMIT 0")
        failure = await self.failure(url)
        assert type(failure) is UnavailableError
        assert failure.transient

    async def test_A10_peer_that_never_answers(self, proxy: Proxy) -> None:
        proxy.break_at(STARTUP, Fault.HANG)
        async with asyncio.timeout(10):
            failure = await self.failure(proxy.url, connect_timeout_seconds=0.2)
        assert isinstance(failure, UnavailableError)

    async def test_connection_lost_half_way(self, proxy: Proxy) -> None:
        proxy.break_at(STARTUP, Fault.CUT_AFTER)
        failure = await self.failure(proxy.url)
        assert type(failure) is UnavailableError
        assert failure.transient

    async def test_no_url(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("DATABASE_URL", raising=False)
        with pytest.raises(ConfigurationError, match="todo-db login"):
            Pool(Settings())

    async def test_old_poolers_get_no_prepared_statements(self, url: str, proxy: Proxy) -> None:
        async with Database.from_url(url) as database:
            await database.users.create("alice", email="alice@example.org", name="Alice")
        async with Database.from_url(proxy.url, prepared_statements=False) as database:
            for _ in range(2):
                assert (await database.users.get("alice")).id == "alice"
        assert b"__asyncpg_" not in proxy.sent
        assert b"BEGIN" in proxy.sent


class TestConnectingAgain:
    async def test_until_the_server_is_there(self, proxy: Proxy) -> None:
        proxy.break_at(STARTUP, Fault.CUT_BEFORE, times=4)
        pool = Pool(settings(proxy.url, connect_retry_seconds=20, retry_attempts=2))
        pool.release(await pool.acquire())
        assert proxy.connections == 5
        await pool.close()

    async def test_until_its_time_is_up(self, proxy: Proxy) -> None:
        proxy.break_at(STARTUP, Fault.CUT_BEFORE, times=99)
        pool = Pool(settings(proxy.url, connect_retry_seconds=1.5))
        with pytest.raises(UnavailableError) as caught:
            await pool.acquire()
        assert not caught.value.transient
        assert proxy.connections > 1
        assert pool.status == PoolStatus(2, 0, 0)
        await pool.close()

    async def test_A10_attempt_under_way_ends_when_its_time_is_up(self, proxy: Proxy) -> None:
        proxy.break_at(STARTUP, Fault.HANG)
        pool = Pool(settings(proxy.url, connect_retry_seconds=1))
        async with asyncio.timeout(30):
            with pytest.raises(UnavailableError):
                await pool.acquire()
        assert proxy.connections == 1
        await pool.close()

    async def test_used_up_time_is_not_used_again_by_the_call(self, proxy: Proxy) -> None:
        proxy.break_at(STARTUP, Fault.HANG, times=99)
        database = Database.from_url(proxy.url, connect_retry_seconds=1)
        with pytest.raises(UnavailableError):
            await database.open()
        assert proxy.connections == 1

    @pytest.mark.parametrize(
        ("place", "values"),
        [
            ("nobody@/postgres", {}),
            (f"{LOGIN}@/missing", {}),
            (f"{LOGIN}@/postgres", {"retry_attempts": 1}),
        ],
    )
    async def test_F42_never_after_what_stays_wrong_or_when_turned_off(
        self, proxy: Proxy, place: str, values: dict[str, object]
    ) -> None:
        if values:
            proxy.break_at(STARTUP, Fault.CUT_BEFORE)
        url = f"postgresql://{place}?host={make_url(proxy.url).query['host']!s}"
        pool = Pool(settings(url, connect_retry_seconds=20, **values))
        with pytest.raises(TodoDBError):
            await pool.acquire()
        assert proxy.connections == 1
        await pool.close()


class TestLongIdle:
    @pytest_asyncio.fixture
    async def rested(
        self, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> AsyncGenerator[tuple[Pool, Proxy]]:
        """Two connections that have been idle for long, by way of a proxy."""
        pool = Pool(settings(proxy.url))
        for connection in [await pool.acquire(), await pool.acquire()]:
            pool.release(connection)
        monkeypatch.setattr("todo_db.engine.connection._PING_AFTER_SECONDS", 0.0)
        monkeypatch.setattr("todo_db.engine.connection._PING_SECONDS", 0.2)
        yield pool, proxy
        await pool.close()

    async def test_connection_is_asked_once_for_one_round_trip(
        self, rested: tuple[Pool, Proxy]
    ) -> None:
        pool, proxy = rested
        before = proxy.round_trips
        pool.release(await pool.acquire())
        assert proxy.round_trips == before + 1
        assert proxy.connections == 2

    async def test_connection_in_use_is_not_asked(self, proxy: Proxy) -> None:
        database_through_proxy = Pool(settings(proxy.url))
        database_through_proxy.release(await database_through_proxy.acquire())
        before = proxy.round_trips
        database_through_proxy.release(await database_through_proxy.acquire())
        assert proxy.round_trips == before
        await database_through_proxy.close()

    async def test_A9_half_open_peer_is_replaced_and_so_are_the_others(
        self, rested: tuple[Pool, Proxy]
    ) -> None:
        pool, proxy = rested
        proxy.break_at(b"SELECT 1", Fault.HANG)
        async with asyncio.timeout(30):
            connection = await pool.acquire()
        # The driver asks the server, over one more, to stop what takes so long.
        assert proxy.connections == 2 + 1 + 1
        assert await connection.driver.fetchval("SELECT 2") == 2
        other = await pool.acquire()
        assert proxy.connections == 2 + 1 + 2
        for taken in (connection, other):
            pool.release(taken)

    async def test_cancelled_while_it_asks_gives_the_place_back(
        self, rested: tuple[Pool, Proxy]
    ) -> None:
        pool, proxy = rested
        proxy.break_at(b"SELECT 1", Fault.HANG)
        asking = asyncio.create_task(pool.acquire())
        await until(lambda: not proxy.pending)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert pool.status == PoolStatus(2, 0, 0)
        for connection in [await pool.acquire(), await pool.acquire()]:
            pool.release(connection)


class TestRefusals:
    """PgBouncer's, which have one SQLSTATE; `test_pooler` gets the real ones."""

    @pytest.mark.parametrize(
        ("text", "passes"),
        [
            ("SASL authentication failed", False),
            ("no such user", False),
            ("unsupported startup parameter: jit", False),
            ("no more connections allowed (max_client_conn)", True),
            ("server login has been failing, cached error: connect failed", True),
            ("query_wait_timeout", True),
            ("bouncer config error", True),
            # Its server went away at once; the parameters are those of the login, and right.
            ("server connection closed", True),
            ("invalid server parameter", True),
        ],
    )
    def test_P3_P5_P9_what_passes_is_told_from_what_stays(self, text: str, passes: bool) -> None:  # noqa: FBT001
        refusal = asyncpg.ProtocolViolationError(text)
        failure = connect_failure(refusal, make_url("postgresql://alice@localhost/todo"))
        assert type(failure) is (UnavailableError if passes else ConfigurationError)
        assert text not in str(failure)


class TestSecrets:
    async def test_L7_neither_url_nor_password_in_errors_or_logs(
        self,
        url: str,
        folder: str,
        proxy: Proxy,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        # SQLAlchemy's own loggers stay quiet until they are turned up by name.
        caplog.set_level(logging.DEBUG)
        secret = make_url(url).set(password=MARKER)
        good, no_user, no_database, no_server, no_folder, hanging = (
            changed.render_as_string(hide_password=False)
            for changed in (
                secret,
                secret.set(username=f"user-{MARKER}"),
                secret.set(database=f"database-{MARKER}"),
                secret.update_query_dict({"host": folder}),
                secret.update_query_dict({"host": f"{folder}/{MARKER}"}),
                make_url(proxy.url).set(password=MARKER),
            )
        )
        tries = 3
        proxy.break_at(STARTUP, Fault.CUT_AFTER, times=2 * tries)
        proxy.break_at(STARTUP, Fault.HANG, times=99)

        errors: list[BaseException] = []
        shown: list[str] = []
        for broken in (no_user, no_database, no_server, no_folder, hanging, hanging):
            database = Database.from_url(
                broken,
                retry_attempts=tries,
                connect_timeout_seconds=0.05,
                connect_retry_seconds=0,
            )
            with pytest.raises(TodoDBError) as caught:
                await database.open()
            errors.append(caught.value)
            shown += [repr(database), repr(vars(database)), repr(await database.health())]
            await database.close()
        async with Database.from_url(good) as database:
            await database.users.create("alice", email="alice@example.org", name="Alice")
            with pytest.raises(TodoDBError) as caught:
                await database.users.create("bob", email="alice@example.org", name="Bob")
            errors.append(caught.value)

        assert caplog.records
        assert MARKER not in caplog.text
        assert [error for error in errors if MARKER in told(error)] == []
        assert [text for text in shown if MARKER in text] == []

    async def test_settings_do_not_echo(self) -> None:
        with pytest.raises(ConfigurationError) as caught:
            Settings(database_url=f"postgresql://{MARKER}", pool_size=MARKER)
        assert MARKER not in told(caught.value)


class TestClose:
    async def test_leaves_no_connection_behind(self, pool: Pool) -> None:
        connections = [await pool.acquire(), await pool.acquire()]
        for connection in connections:
            pool.release(connection)
        await pool.close()
        assert all(connection.driver.is_closed() for connection in connections)

    async def test_leaves_no_connection_behind_when_it_is_cancelled(self, pool: Pool) -> None:
        connections = [await pool.acquire(), await pool.acquire()]
        for connection in connections:
            pool.release(connection)
        for turns in range(1, 6):
            closing = asyncio.create_task(pool.close())
            for _ in range(turns):
                await asyncio.sleep(0)
            closing.cancel()
            await asyncio.gather(closing, return_exceptions=True)
        await pool.close()
        assert all(connection.driver.is_closed() for connection in connections)

    async def test_waits_for_what_is_lent(self, pool: Pool) -> None:
        connection = await pool.acquire()
        closing = asyncio.create_task(pool.close())
        assert await connection.driver.fetchval("SELECT 1") == 1
        assert not closing.done()
        pool.release(connection)
        await closing
        assert connection.driver.is_closed()

    async def test_what_comes_back_too_late_is_closed_then(self, url: str) -> None:
        pool = Pool(settings(url, pool_timeout_seconds=0.05))
        connection = await pool.acquire()
        await pool.close()
        assert await connection.driver.fetchval("SELECT 1") == 1
        pool.release(connection)
        assert connection.driver.is_closed()

    async def test_A9_peer_that_does_not_say_goodbye_is_left(self, proxy: Proxy) -> None:
        pool = Pool(settings(proxy.url))
        connections = [await pool.acquire() for _ in range(2)]
        for connection in connections:
            pool.release(connection)
        proxy.break_at(TERMINATE, Fault.HANG, times=2)
        async with asyncio.timeout(30):
            await pool.close()
        assert all(connection.driver.is_closed() for connection in connections)

    async def test_refuses_callers_afterwards(self, pool: Pool) -> None:
        await pool.close()
        with pytest.raises(ConfigurationError, match="closed"):
            await pool.acquire()

    async def test_refuses_callers_who_were_in_the_queue(self, url: str) -> None:
        pool = Pool(settings(url, pool_size=1, pool_timeout_seconds=0.2))
        connection = await pool.acquire()
        waiting = asyncio.create_task(pool.acquire())
        await asyncio.sleep(0.1)
        closing = asyncio.create_task(pool.close())
        with pytest.raises((ConfigurationError, PoolExhaustedError)):
            await waiting
        await closing
        pool.release(connection)

    async def test_twice_at_once_is_once(self, pool: Pool) -> None:
        pool.release(await pool.acquire())
        async with asyncio.timeout(10):
            await asyncio.gather(pool.close(), pool.close())
        assert pool.status.in_use == 0
