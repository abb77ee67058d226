"""Real failures of PostgreSQL, PgBouncer, the network, the disk and the process itself."""

import asyncio
import gc
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, suppress
from itertools import count
from pathlib import Path
from typing import Final, Self

import asyncpg
import pytest
import pytest_asyncio
from cluster import Cluster
from driver import Connection
from pgbouncer import PASSWORD, TRIXIE, PgBouncer
from place import ASLEEP, BOUND, WAITING, Place, assert_healthy, still_waiting
from proxy import BEGIN, COMMIT, ROLLBACK, Fault, Proxy, timeout_after, until
from sqlalchemy import text

from todo_db import (
    CallTimeoutError,
    Database,
    OutcomeUnknownError,
    TodoDBError,
    Transaction,
    UnavailableError,
)
from todo_db.embedded import LOGIN, EmbeddedPostgres
from todo_db.migrations import upgrade

pytestmark = pytest.mark.fault

TEMPLATE: Final = "todo_template"
MAX_CONNECTIONS: Final = 40
RESERVED_CONNECTIONS: Final = 3
"""For superusers, as PostgreSQL has it by default."""

# Behaviour of a server at shutdown, by its shutdown mode.
ENDS: Final[dict[str, Callable[[Cluster], None]]] = {
    "F08-fast": lambda server: server.stop("fast"),
    "F07-immediate": lambda server: server.stop("immediate"),
    "F12-kill": lambda server: server.kill(),
}
_numbers: Final = count(1)


async def restart(server: Cluster, end: Callable[[Cluster], None]) -> None:
    await asyncio.to_thread(end, server)
    await asyncio.to_thread(server.start)


@pytest_asyncio.fixture(scope="module")
async def server(todo_postgres: EmbeddedPostgres) -> AsyncGenerator[Cluster]:
    """A durable server. A test that stops or kills it must start it again."""
    del todo_postgres  # creates the user that this one runs as
    with Cluster(18, durable=True, max_connections=MAX_CONNECTIONS) as server:
        await upgrade(await server.create_database(TEMPLATE))
        await server.execute(f"CREATE ROLE {LOGIN} LOGIN IN ROLE todo_app PASSWORD '{PASSWORD}'")
        yield server


@pytest_asyncio.fixture
async def place(server: Cluster) -> AsyncGenerator[Place]:
    name = f"todo_{next(_numbers)}"
    await server.execute(
        f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} OWNER todo_owner",
        f"REVOKE TEMPORARY ON DATABASE {name} FROM PUBLIC",
    )
    yield Place(server, name, LOGIN)
    if not server.is_running:
        server.start()
    await server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def settings() -> dict[str, int]:
    """PgBouncer settings, in addition to Neon's."""
    # With the default, PgBouncer would wait 15 s after each restart.
    return {"server_login_retry": 1}


@pytest_asyncio.fixture
async def pooler(server: Cluster, settings: dict[str, int]) -> AsyncGenerator[PgBouncer]:
    url = server.url("postgres", "postgres")
    async with PgBouncer(TRIXIE, url, max_prepared_statements=1000, **settings) as pooler:
        yield pooler


@pytest.fixture(params=["direct", "pooled"])
def url(request: pytest.FixtureRequest, place: Place) -> str:
    if request.param == "direct":
        return place.url()
    pooler: PgBouncer = request.getfixturevalue("pooler")
    return pooler.url(LOGIN, place.name)


@pytest_asyncio.fixture
async def db(url: str, place: Place) -> AsyncGenerator[Database]:
    """An open Database with alice in it."""
    del place
    async with Database.from_url(url) as database:
        await database.users.create("alice", email="alice@example.org", name="Alice")
        yield database


@pytest_asyncio.fixture
async def once(db: Database, url: str) -> AsyncGenerator[Database]:
    """The same without retries."""
    assert (await db.users.get("alice")).id == "alice"
    async with Database.from_url(url, retry_attempts=1) as database:
        yield database


direct: Final = pytest.mark.parametrize("url", ["direct"], indirect=True)
pooled: Final = pytest.mark.parametrize("url", ["pooled"], indirect=True)
ended: Final = pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)


@ended
class TestRestart:
    """P5: the same behind PgBouncer."""

    async def test_while_idle_is_not_noticed(
        self, db: Database, place: Place, end: Callable[[Cluster], None]
    ) -> None:
        for number in range(2):
            await db.tasks.create("alice", f"{number}")
            await restart(place.server, end)
        await db.tasks.create("alice", "2")
        assert await place.titles() == ["0", "1", "2"]
        await assert_healthy(db)

    async def test_under_a_call_is_waited_for(
        self, db: Database, place: Place, end: Callable[[Cluster], None]
    ) -> None:
        await place.make_inserts_wait()
        calls = [asyncio.create_task(db.tasks.create("alice", f"{n}")) for n in range(3)]
        await place.until_backends(3, ASLEEP)
        await restart(place.server, end)
        async with asyncio.timeout(BOUND):
            await asyncio.gather(*calls)
        assert sorted(await place.titles()) == ["0", "1", "2"]
        await assert_healthy(db)

    async def test_under_a_call_is_unavailable_without_retries(
        self, once: Database, place: Place, end: Callable[[Cluster], None]
    ) -> None:
        await place.make_inserts_wait()
        call = asyncio.create_task(once.tasks.create("alice", "lost"))
        await place.until_backends(1, ASLEEP)
        await asyncio.to_thread(end, place.server)
        async with asyncio.timeout(BOUND):
            with pytest.raises(UnavailableError):
                await call
            assert not (await once.health()).ok
        await asyncio.to_thread(place.server.start)
        async with asyncio.timeout(BOUND):
            while not (await once.health()).ok:  # noqa: ASYNC110  # PgBouncer takes its time
                await asyncio.sleep(0.05)
        assert await place.titles() == []
        await assert_healthy(once)

    async def test_between_statements_is_unavailable(
        self, db: Database, place: Place, end: Callable[[Cluster], None]
    ) -> None:
        with pytest.raises(UnavailableError):
            async with asyncio.timeout(BOUND), db.transaction("alice") as tx:
                await tx.tasks.create("alice", "lost")
                await restart(place.server, end)
                await tx.tasks.create("alice", "lost too")
        assert await place.titles() == []
        await assert_healthy(db)

    async def test_before_the_commit_is_unavailable(
        self, db: Database, place: Place, end: Callable[[Cluster], None]
    ) -> None:
        with pytest.raises(UnavailableError):
            async with asyncio.timeout(BOUND), db.transaction("alice") as tx:
                await tx.tasks.create("alice", "lost")
                await restart(place.server, end)
                await until(tx._gate.connection.driver.is_closed)
        assert await place.titles() == []
        await assert_healthy(db)

    async def test_before_the_commit_is_made_is_unknown(
        self, db: Database, place: Place, end: Callable[[Cluster], None]
    ) -> None:
        await place.execute(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql"
            " AS 'BEGIN PERFORM pg_sleep(4); RETURN NULL; END'",
            "CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON tasks DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION wait()",
        )
        call = asyncio.create_task(db.tasks.create("alice", "lost"))
        await place.until_backends(1, f"{ASLEEP} AND query = 'COMMIT'")
        await restart(place.server, end)
        async with asyncio.timeout(BOUND):
            with pytest.raises(OutcomeUnknownError):
                await call
        assert await place.titles() == []
        await assert_healthy(db)

    async def test_after_the_commit_was_made_is_unknown_too(
        self, db: Database, place: Place, end: Callable[[Cluster], None]
    ) -> None:
        async with place.without_its_standby(db) as calls:
            await restart(place.server, end)
            async with asyncio.timeout(BOUND):
                with pytest.raises(OutcomeUnknownError):
                    await calls[-1]
        assert await place.titles() == ["stored"] * len(calls)
        await assert_healthy(db)


class TestDown:
    """The server is down for longer than all retries."""

    async def test_F10_calls_are_unavailable_in_time_and_work_again_by_themselves(
        self, db: Database, url: str, place: Place
    ) -> None:
        async with Database.from_url(
            url, connect_retry_seconds=0.5, retry_timeout_seconds=0.5, command_timeout_seconds=2
        ) as hasty:
            place.server.stop("fast")
            async with asyncio.timeout(BOUND):
                failures = await asyncio.gather(
                    *(hasty.tasks.create("alice", "never") for _ in range(20)),
                    return_exceptions=True,
                )
                assert not (await hasty.health()).ok
            assert {type(failure) for failure in failures} <= {UnavailableError, CallTimeoutError}
            assert hasty._pool.status.in_use == 0
            place.server.start()
            await assert_healthy(db)
            await assert_healthy(hasty)
        assert await place.titles() == []

    async def test_opening_waits_for_it(self, db: Database, url: str, place: Place) -> None:
        await db.close()
        place.server.stop("fast")
        database = Database.from_url(url)
        opening = await still_waiting(database.open(), 0.5)
        place.server.start()
        async with asyncio.timeout(BOUND):
            await opening
        await assert_healthy(database)
        await database.close()

    @pooled
    @pytest.mark.parametrize("settings", [{}], ids=["15 s"])
    async def test_P5_outlasts_the_15_s_for_which_pgbouncer_waits_after_a_failure(
        self, db: Database, url: str, place: Place, settings: dict[str, int]
    ) -> None:
        del settings
        async with Database.from_url(url, retry_attempts=1, command_timeout_seconds=1) as hasty:
            place.server.stop("fast")
            for _ in range(3):
                async with asyncio.timeout(BOUND):
                    with pytest.raises(UnavailableError):
                        await hasty.tasks.create("alice", "never")
            place.server.start()
            async with asyncio.timeout(BOUND):
                await db.tasks.create("alice", "patient")
            assert await place.titles() == ["patient"]
            await assert_healthy(db)
            await assert_healthy(hasty)


class TestKilledBackend:
    async def test_F11_others_drop_too_and_are_not_noticed(
        self, db: Database, place: Place
    ) -> None:
        async with place.locked():
            calls = [asyncio.create_task(db.tasks.create("alice", f"{n}")) for n in range(3)]
            pids = await place.until_backends(3, WAITING)
            os.kill(pids[0], signal.SIGKILL)
            async with asyncio.timeout(BOUND):
                await asyncio.gather(*calls)
        assert sorted(await place.titles()) == ["0", "1", "2"]
        await assert_healthy(db)

    async def test_F11_is_unavailable_without_retries(self, once: Database, place: Place) -> None:
        async with place.locked():
            call = asyncio.create_task(once.tasks.create("alice", "lost"))
            pids = await place.until_backends(1, WAITING)
            os.kill(pids[0], signal.SIGKILL)
            async with asyncio.timeout(BOUND):
                with pytest.raises(UnavailableError):
                    await call
        async with asyncio.timeout(BOUND):
            while not (await once.health()).ok:  # noqa: ASYNC110  # it recovers
                await asyncio.sleep(0.05)
        assert await place.titles() == []
        await assert_healthy(once)

    @direct
    async def test_F06b_read_that_ended_is_unavailable_unless_it_is_read_only(
        self, db: Database, place: Place
    ) -> None:
        async def read(*, read_only: bool) -> int:
            async with db.transaction("alice", read_only=read_only) as tx:
                found = await tx.tasks.count("alice")
                await place.execute(
                    f"SELECT pg_terminate_backend({tx._gate.connection.driver.get_server_pid()})"
                )
                await until(tx._gate.connection.driver.is_closed)
            return found

        assert await read(read_only=True) == 0
        with pytest.raises(UnavailableError):
            await read(read_only=False)
        await assert_healthy(db)

    @direct
    async def test_F06b_rollback_does_not_hide_the_error(self, db: Database, place: Place) -> None:
        with pytest.raises(LookupError):
            async with db.transaction("alice") as tx:
                await tx.tasks.create("alice", "lost")
                await place.execute(
                    f"SELECT pg_terminate_backend({tx._gate.connection.driver.get_server_pid()})"
                )
                await until(tx._gate.connection.driver.is_closed)
                raise LookupError
        assert await place.titles() == []
        await assert_healthy(db)

    async def test_F04_cancelled_statement_is_a_timeout_and_keeps_its_connection(
        self, db: Database, place: Place
    ) -> None:
        async with place.locked():
            call = asyncio.create_task(db.tasks.create("alice", "cancelled"))
            pids = await place.until_backends(1, WAITING)
            await place.execute(f"SELECT pg_cancel_backend({pids[0]})")
            async with asyncio.timeout(BOUND):
                with pytest.raises(CallTimeoutError):
                    await call
        assert await place.until_backends(1, "state = 'idle'") == pids
        assert await place.titles() == []
        await assert_healthy(db)


class TestCancelled:
    async def test_C1_P10_cancelled_statement_stops_on_the_server(
        self, db: Database, url: str, place: Place
    ) -> None:
        async with Database.from_url(
            url, statement_timeout_seconds=600, lock_timeout_seconds=600
        ) as patient:
            async with place.locked():
                call = asyncio.create_task(patient.tasks.create("alice", "never"))
                await place.until_backends(1, WAITING)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                await place.until_backends(0, "state <> 'idle'")
            await assert_healthy(patient)
        assert await place.titles() == []
        await assert_healthy(db)


@direct
class TestServerTimeouts:
    async def test_F18b_statement_after_an_idle_transaction_was_ended_is_unavailable(
        self, db: Database, url: str, place: Place
    ) -> None:
        async with Database.from_url(url, idle_in_transaction_timeout_seconds=0.1) as hasty:
            with pytest.raises(UnavailableError):
                async with hasty.transaction("alice") as tx:
                    await tx.tasks.create("alice", "lost")
                    await until(tx._gate.connection.driver.is_closed)
                    await tx.tasks.create("alice", "lost too")
            await assert_healthy(hasty)
        assert await place.titles() == []
        await assert_healthy(db)

    async def test_F19_transaction_timeout_is_unavailable(
        self, db: Database, url: str, place: Place
    ) -> None:
        # Not for the login that holds the lock.
        await place.execute(
            f"ALTER ROLE {LOGIN} IN DATABASE {place.name} SET transaction_timeout = '300ms'"
        )
        async with Database.from_url(url) as limited:
            async with place.locked(), asyncio.timeout(BOUND):
                with pytest.raises(UnavailableError):
                    await limited.tasks.create("alice", "lost")
            await assert_healthy(limited)
        assert await place.titles() == []
        await assert_healthy(db)

    async def test_F20_session_that_was_idle_for_too_long_is_replaced(
        self, db: Database, url: str, place: Place
    ) -> None:
        await place.execute(f"ALTER DATABASE {place.name} SET idle_session_timeout = '1s'")
        async with Database.from_url(url, retry_attempts=1, pool_size=2) as limited:
            for number in range(3):
                await limited.tasks.create("alice", f"{number}")
                await until(limited._pool._idle[-1].driver.is_closed)
            await assert_healthy(limited)
        assert await place.titles() == ["0", "1", "2"]
        await assert_healthy(db)

    async def test_F15b_lock_that_is_not_waited_for_is_tried_again(
        self, db: Database, once: Database, place: Place
    ) -> None:
        tries = 0
        async with place.superuser() as holder:
            await holder.execute("BEGIN; SELECT FROM users FOR UPDATE")

            async def work(tx: Transaction) -> None:
                nonlocal tries
                tries += 1
                if tries == 3:
                    await holder.execute("ROLLBACK")
                await tx.execute(text("SELECT FROM users FOR UPDATE NOWAIT"))
                await tx.tasks.create("alice", f"try {tries}")

            with pytest.raises(CallTimeoutError):
                await once.run("alice", work)
            await db.run("alice", work)
        assert await place.titles() == ["try 3"]
        await assert_healthy(db)
        await assert_healthy(once)

    async def test_F21_standby_reads_and_takes_writes_once_it_is_promoted(
        self, db: Database, place: Place
    ) -> None:
        sign = place.server.data / "standby.signal"
        place.server.stop("fast")
        sign.touch()
        place.server.start()
        try:
            assert await db.tasks.count("alice") == 0
            async with asyncio.timeout(BOUND):
                with pytest.raises(UnavailableError):
                    await db.tasks.create("alice", "too early")
        finally:
            place.server.promote()
        await db.tasks.create("alice", "in time")
        assert await place.titles() == ["in time"]
        await assert_healthy(db)


class TestLimits:
    @direct
    async def test_F13_no_connection_left_is_waited_for_and_then_unavailable(
        self, db: Database, url: str, place: Place
    ) -> None:
        await db.close()
        others: list[Connection] = []
        async with asyncio.timeout(BOUND):
            while len(others) < MAX_CONNECTIONS - RESERVED_CONNECTIONS:
                # The server ends a session a little after its client has gone.
                with suppress(asyncpg.TooManyConnectionsError):
                    others.append(await asyncpg.connect(place.url()))
        try:
            async with asyncio.timeout(BOUND):
                with pytest.raises(UnavailableError):
                    await Database.from_url(url, connect_retry_seconds=0.3).open()
            opening = await still_waiting(db.open(), 0.3)
        finally:
            for other in others:
                await other.close()
        async with asyncio.timeout(BOUND):
            await opening
        await assert_healthy(db)

    @direct
    async def test_F13b_limit_of_the_role_is_waited_for_and_then_unavailable(
        self, db: Database, place: Place
    ) -> None:
        await place.execute(
            "CREATE ROLE limited LOGIN CONNECTION LIMIT 1",
            "GRANT todo_app TO limited",
        )
        async with Database.from_url(
            place.url("limited"), connect_retry_seconds=0.3, retry_timeout_seconds=0.3
        ) as hasty:
            async with hasty.transaction("alice"), asyncio.timeout(BOUND):
                with pytest.raises(UnavailableError):
                    await hasty.tasks.count("alice")
            await assert_healthy(hasty)
        async with Database.from_url(place.url("limited")) as patient:
            async with patient.transaction("alice"):
                waiting = await still_waiting(patient.tasks.count("alice"), 0.5)
            # A connection that returns to the pool ends the wait for a new one.
            async with asyncio.timeout(BOUND):
                assert await waiting == 0
            await assert_healthy(patient)
        await place.execute("DROP ROLE limited")
        await assert_healthy(db)

    @pooled
    @pytest.mark.parametrize(
        "settings", [{"max_client_conn": 2, "server_login_retry": 1}], ids=["two"]
    )
    async def test_P3_max_client_conn_is_waited_for_and_then_unavailable(
        self, db: Database, url: str, settings: dict[str, int]
    ) -> None:
        del settings
        other: Connection = await asyncpg.connect(url)
        hasty = Database.from_url(url, connect_retry_seconds=0.3)
        async with asyncio.timeout(BOUND):
            with pytest.raises(UnavailableError):
                await hasty.open()
            patient = Database.from_url(url)
            opening = await still_waiting(patient.open(), 0.3)
            await other.close()
            await opening
            await patient.close()
        await assert_healthy(db)

    @pooled
    @pytest.mark.parametrize(
        "settings",
        [{"query_wait_timeout": 1, "default_pool_size": 1, "server_login_retry": 1}],
        ids=["one"],
    )
    async def test_P2_query_wait_timeout_is_waited_for_and_then_unavailable(
        self, db: Database, once: Database, place: Place, settings: dict[str, int]
    ) -> None:
        del settings
        async with db.transaction("alice"):
            async with asyncio.timeout(BOUND):
                with pytest.raises(UnavailableError):
                    await once.tasks.create("alice", "never")
            patient = await still_waiting(db.tasks.create("alice", "patient"), 1.5)
        async with asyncio.timeout(BOUND):
            await patient
        assert await place.titles() == ["patient"]
        await assert_healthy(db)
        await assert_healthy(once)


@direct
class TestHalfOpen:
    """The peer has vanished without closing the connection."""

    @pytest_asyncio.fixture
    async def database_through_proxy(self, db: Database, proxy: Proxy) -> AsyncGenerator[Database]:
        await assert_healthy(db)
        async with Database.from_url(
            proxy.url,
            retry_attempts=1,
            pool_size=1,
            max_overflow=0,
            command_timeout_seconds=1,
        ) as database_through_proxy:
            yield database_through_proxy

    async def test_A6_callers_own_timeout_ends_a_commit_without_an_answer(
        self, db: Database, proxy: Proxy, place: Place
    ) -> None:
        async def stored() -> None:
            while await place.titles() != ["stored"]:
                pass

        await assert_healthy(db)
        async with Database.from_url(proxy.url, pool_size=1, max_overflow=0) as patient:
            proxy.break_at(COMMIT, Fault.SWALLOW)
            with pytest.raises(TimeoutError):
                async with timeout_after(stored()):
                    await patient.tasks.create("alice", "stored")
            assert await place.titles() == ["stored"]
            await assert_healthy(patient)

    @pytest.mark.parametrize(
        ("step", "fault", "error", "stored"),
        [
            (BEGIN, Fault.HANG, UnavailableError, []),
            (BEGIN, Fault.SWALLOW, UnavailableError, []),
            (b"held", Fault.HANG, CallTimeoutError, []),
            (b"held", Fault.SWALLOW, CallTimeoutError, []),
            (COMMIT, Fault.HANG, OutcomeUnknownError, []),
            (COMMIT, Fault.SWALLOW, OutcomeUnknownError, ["held"]),
            (ROLLBACK, Fault.HANG, LookupError, []),
            (ROLLBACK, Fault.SWALLOW, LookupError, []),
        ],
    )
    async def test_A7_A8_A9_command_timeout_ends_each_step(  # noqa: PLR0913, PLR0917
        self,
        database_through_proxy: Database,
        proxy: Proxy,
        place: Place,
        step: bytes,
        fault: Fault,
        error: type[Exception],
        stored: list[str],
    ) -> None:
        async def work() -> None:
            async with database_through_proxy.transaction("alice") as tx:
                await tx.tasks.create("alice", "held")
                if step is ROLLBACK:
                    raise LookupError

        proxy.break_at(step, fault)
        async with asyncio.timeout(BOUND):
            with pytest.raises(error):
                await work()
        assert not proxy.pending
        await place.until_backends(0, "state <> 'idle' AND pid <> pg_backend_pid()")
        assert await place.titles() == stored
        await assert_healthy(database_through_proxy)

    async def test_F02_A11_connection_that_was_idle_for_long_is_pinged_first(
        self,
        database_through_proxy: Database,
        proxy: Proxy,
        place: Place,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("todo_db.engine.connection._PING_AFTER_SECONDS", 0.0)
        monkeypatch.setattr("todo_db.engine.connection._PING_SECONDS", 0.3)
        for fault in (Fault.HANG, Fault.SWALLOW, Fault.CUT_BEFORE, Fault.CUT_AFTER):
            proxy.break_at(b"SELECT 1\x00", fault)
            async with asyncio.timeout(BOUND):
                await database_through_proxy.tasks.create("alice", fault.name)
            assert not proxy.pending
        assert await place.titles() == ["HANG", "SWALLOW", "CUT_BEFORE", "CUT_AFTER"]
        await assert_healthy(database_through_proxy)

    async def test_A9_call_is_tried_again_on_another_connection(
        self, db: Database, proxy: Proxy, place: Place
    ) -> None:
        await assert_healthy(db)
        async with Database.from_url(
            proxy.url, connect_timeout_seconds=0.3
        ) as database_through_proxy:
            proxy.break_at(b"application_name\x00todo_db", Fault.HANG)
            for connection in database_through_proxy._pool._idle:
                connection.terminate()
            async with asyncio.timeout(BOUND):
                await database_through_proxy.tasks.create("alice", "stored")
            assert not proxy.pending
            await assert_healthy(database_through_proxy)
        assert await place.titles() == ["stored"]


class TestDiskFull:
    async def test_M2_is_unavailable_loses_nothing_and_ends_with_the_shortage(
        self, folder: Path, todo_postgres: EmbeddedPostgres
    ) -> None:
        del todo_postgres  # creates the user that this one runs as
        description = secrets.token_hex(30_000)
        with SmallDisk(folder) as disk, Cluster(18) as server:
            disk.give(server.data.owner())
            url = await server.create_database("full_disk")
            await server.execute(
                f"CREATE TABLESPACE small LOCATION '{folder}'",
                "ALTER DATABASE full_disk SET TABLESPACE small",
            )
            await upgrade(url)
            await server.execute(f"CREATE ROLE {LOGIN} LOGIN IN ROLE todo_app")
            place = Place(server, "full_disk", LOGIN)
            async with Database.from_url(place.url()) as db:
                await db.users.create("alice", email="alice@example.org", name="Alice")
                stored: list[str] = []
                async with asyncio.timeout(BOUND):
                    with pytest.raises(UnavailableError) as failure:
                        while len(stored) < 2_000:
                            title = f"{len(stored)}"
                            await db.tasks.create("alice", title, description=description)
                            stored.append(title)
                assert not failure.value.transient
                assert failure.value.retry_after >= 5
                assert await place.titles() == stored
                await assert_healthy(db)
                disk.grow()
                await db.tasks.create("alice", "after", description=description)
                assert await place.titles() == [*stored, "after"]
                await assert_healthy(db)


class SmallDisk:
    """A tmpfs of a fixed size, mounted at a folder; needs root."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        if os.geteuid():
            pytest.skip("only root may mount a small disk")
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", self._folder], check=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", self._folder], check=True)

    def give(self, user: str) -> None:
        shutil.chown(self._folder, user)

    def grow(self) -> None:
        subprocess.run(["mount", "-o", "remount,size=80m", self._folder], check=True)


# A program for another Python process, which a signal ends during a transaction.
_VICTIM: Final = """
import asyncio, sys
from sqlalchemy import text
from todo_db import Database

async def main(url, doing):
    async with Database.from_url(url, statement_timeout_seconds=2) as db:
        async with db.transaction("alice") as tx:
            await tx.tasks.create("alice", "never")
            print("ready", flush=True)
            if doing == "waiting":
                await asyncio.sleep(60)
            else:
                await tx.execute(text("SELECT pg_sleep(60)"))

asyncio.run(main(*sys.argv[1:]))
"""
# Forks without any thread, and uses the parent's Database in the child.
_PARENT: Final = """
import asyncio, os, sys
from todo_db import ConfigurationError, Database

async def used(db):
    try:
        async with asyncio.timeout(10):
            await db.tasks.count("alice")
    except ConfigurationError:
        return 17
    return 1

def child(loop, db, close):
    if loop is None:
        loop = asyncio.new_event_loop()
    code = loop.run_until_complete(used(db))
    if close:
        loop.run_until_complete(db.close())
    return code

def main(url, same_loop, close):
    loop = asyncio.new_event_loop()
    db = Database.from_url(url, retry_attempts=1)
    loop.run_until_complete(db.open())
    loop.run_until_complete(db.tasks.create("alice", "before"))
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = child(loop if same_loop == "True" else None, db, close == "True")
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    for number in range(3):
        loop.run_until_complete(db.tasks.create("alice", f"after {number}"))
    health = loop.run_until_complete(db.health())
    assert health.ok and not health.pool.in_use, health
    loop.run_until_complete(db.close())
    sys.exit(os.waitstatus_to_exitcode(status))

main(*sys.argv[1:])
"""


@direct
class TestProcess:
    @pytest.mark.parametrize("doing", ["waiting", "asking"])
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    async def test_X7_signal_in_a_transaction_stores_nothing_and_holds_nothing(
        self, db: Database, url: str, place: Place, number: signal.Signals, doing: str
    ) -> None:
        await db.close()
        victim = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _VICTIM, url, doing),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert victim.stdout is not None
        async with asyncio.timeout(BOUND):
            assert await victim.stdout.readline() == b"ready\n"
            if doing == "asking":
                await place.until_backends(1, ASLEEP)
            victim.send_signal(number)
            assert await victim.wait() != 0
        # The server continues a statement after its client has gone, up to the timeout.
        await place.until_backends(0, "true")
        assert await place.titles() == []
        await place.execute("BEGIN; LOCK tasks, users IN ACCESS EXCLUSIVE MODE NOWAIT; COMMIT")

    @pytest.mark.parametrize("close", [False, True], ids=["leaves it", "closes it"])
    @pytest.mark.parametrize("same_loop", [False, True], ids=["own loop", "same loop"])
    async def test_C8_fork_is_refused_at_once_and_the_parent_goes_on(
        self,
        db: Database,
        url: str,
        place: Place,
        same_loop: bool,  # noqa: FBT001
        close: bool,  # noqa: FBT001
    ) -> None:
        await assert_healthy(db)
        parent = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _PARENT, url, str(same_loop), str(close))
        )
        async with asyncio.timeout(BOUND):
            assert await parent.wait() == 17
        assert await place.titles() == ["before", "after 0", "after 1", "after 2"]

    async def test_X6_close_waits_for_the_call_and_it_opens_again(
        self, db: Database, place: Place
    ) -> None:
        async with place.locked():
            call = asyncio.create_task(db.tasks.create("alice", "stored"))
            await place.until_backends(1, WAITING)
            closing = await still_waiting(db.close(), 0.2)
        async with asyncio.timeout(BOUND):
            assert (await call).title == "stored"
            await closing
            await place.until_backends(0, "true")
            await db.open()
        await assert_healthy(db)

    async def test_C9_transaction_that_was_dropped_is_rolled_back(
        self, db: Database, place: Place
    ) -> None:
        async def forgetful() -> None:
            block = db.transaction("alice")
            tx = await block.__aenter__()
            await tx.tasks.create("alice", "never")

        await forgetful()
        gc.collect()
        await until(lambda: not db._pool.status.in_use)
        await place.until_backends(0, "state <> 'idle'")
        assert await place.titles() == []
        await assert_healthy(db)

    async def test_C10_record_outlives_its_connection(self, db: Database) -> None:
        task = await db.tasks.create("alice", "kept")
        await db.close()
        assert (task.user_id, task.title, task.description) == ("alice", "kept", None)


@pooled
class TestPgBouncer:
    async def test_P4b_asked_to_end_lets_calls_finish(
        self, db: Database, pooler: PgBouncer, place: Place
    ) -> None:
        async with place.locked() as holder:
            call = asyncio.create_task(db.tasks.create("alice", "finished"))
            await place.until_backends(1, WAITING)
            await pooler.terminate()
            await holder.execute("ROLLBACK")
            async with asyncio.timeout(BOUND):
                await call
        pooler.kill()
        await pooler.start()
        await db.tasks.create("alice", "after")
        assert await place.titles() == ["finished", "after"]
        await assert_healthy(db)

    async def test_P4_killed_under_calls_is_waited_for(
        self, db: Database, pooler: PgBouncer, place: Place
    ) -> None:
        async with place.locked():
            calls = [asyncio.create_task(db.tasks.create("alice", f"{n}")) for n in range(3)]
            await place.until_backends(3, WAITING)
            pooler.kill()
            await pooler.start()
            # The server continues a statement that PgBouncer can no longer cancel.
            await place.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                f" WHERE usename = '{LOGIN}' AND {WAITING}"
            )
        async with asyncio.timeout(BOUND):
            await asyncio.gather(*calls)
        assert sorted(await place.titles()) == ["0", "1", "2"]
        await assert_healthy(db)

    async def test_P6_killed_database_is_waited_for(
        self, db: Database, once: Database, pooler: PgBouncer, place: Place
    ) -> None:
        async with place.locked():
            lost = asyncio.create_task(once.tasks.create("alice", "lost"))
            patient = asyncio.create_task(db.tasks.create("alice", "patient"))
            await place.until_backends(2, WAITING)
            await pooler.console(f"KILL {place.name}")
            async with asyncio.timeout(BOUND):
                with pytest.raises(UnavailableError):
                    await lost
        await pooler.console(f"RESUME {place.name}")
        async with asyncio.timeout(BOUND):
            await patient
        assert await place.titles() == ["patient"]
        await assert_healthy(db)
        await assert_healthy(once)

    @pytest.mark.parametrize("settings", [{"query_timeout": 1}], ids=["query_timeout"])
    async def test_P7_query_timeout_is_unavailable(
        self, db: Database, once: Database, place: Place, settings: dict[str, int]
    ) -> None:
        del settings
        async with place.locked():
            async with asyncio.timeout(BOUND):
                with pytest.raises(UnavailableError):
                    await once.tasks.create("alice", "lost")
            patient = await still_waiting(db.tasks.create("alice", "patient"), 1.5)
        async with asyncio.timeout(BOUND):
            await patient
        assert await place.titles() == ["patient"]
        await assert_healthy(db)
        await assert_healthy(once)

    @pytest.mark.parametrize(
        "settings", [{"idle_transaction_timeout": 1}], ids=["idle_transaction_timeout"]
    )
    async def test_P7b_idle_transaction_timeout_is_unavailable(
        self, db: Database, place: Place, settings: dict[str, int]
    ) -> None:
        del settings
        with pytest.raises(UnavailableError):
            async with db.transaction("alice") as tx:
                await tx.tasks.create("alice", "lost")
                await until(tx._gate.connection.driver.is_closed)
        assert await place.titles() == []
        await assert_healthy(db)

    @pytest.mark.parametrize("settings", [{"client_idle_timeout": 1}], ids=["client_idle_timeout"])
    async def test_P7c_client_idle_timeout_is_not_noticed(
        self, once: Database, place: Place, settings: dict[str, int]
    ) -> None:
        del settings
        await once.tasks.create("alice", "before")
        await until(once._pool._idle[-1].driver.is_closed)
        await once.tasks.create("alice", "after")
        assert await place.titles() == ["before", "after"]
        await assert_healthy(once)

    async def test_P1b_untracked_prepared_statements_raise_only_our_errors(
        self, server: Cluster, place: Place, db: Database
    ) -> None:
        async with AsyncExitStack() as stack:
            pooler = await stack.enter_async_context(
                PgBouncer(TRIXIE, server.url("postgres", "postgres"), max_prepared_statements=0)
            )
            wrong = await stack.enter_async_context(
                Database.from_url(pooler.url(LOGIN, place.name))
            )
            results = await asyncio.gather(
                *(wrong.tasks.create("alice", f"{n}") for n in range(60)), return_exceptions=True
            )
            failures = [result for result in results if isinstance(result, BaseException)]
            assert [failure for failure in failures if not isinstance(failure, TodoDBError)] == []
            assert len(await place.titles()) == 60 - len(failures)
        await assert_healthy(db)
