"""`Database`: open, run, retries, health."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from inspect import getmembers, isfunction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, override

import pytest
from cluster import Cluster
from driver import Connection
from locks import until_waiting
from proxy import BEGIN, COMMIT, STARTUP, Fault, Proxy, until
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from todo_db import (
    CallTimeoutError,
    ConfigurationError,
    Database,
    IsolationError,
    NewTask,
    OutcomeUnknownError,
    SchemaError,
    TaskNotFoundError,
    TaskRepository,
    TodoDBError,
    Transaction,
    UnavailableError,
    UserRepository,
)
from todo_db.embedded import LOGIN, OWNER, EmbeddedPostgres
from todo_db.migrations import upgrade
from todo_db.models import REVISION
from todo_db.transaction import TransactionPreamble


@pytest.fixture
def login() -> str:
    """One login is enough for tests that do not depend on the role."""
    return LOGIN


@pytest.fixture
def empty(todo_postgres: EmbeddedPostgres, todo_database_name: str) -> Iterator[str]:
    """The URL of a database without a schema, as its owner."""
    name = f"{todo_database_name}_empty"
    todo_postgres.create_database(name)
    yield todo_postgres.url(database=name)
    todo_postgres.drop_database(name)


async def backends(connection: Connection) -> int:
    """Return how many connections of the package the database has."""
    found = await connection.fetchval(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'todo_db'"
    )
    return int(found)


async def until_disconnected(connection: Connection) -> None:
    """Wait: the server processes Terminate a little after the client sent it."""
    async with asyncio.timeout(30):
        while await backends(connection):  # noqa: ASYNC110  # nothing sets an event
            await asyncio.sleep(0.01)


class Refusal:
    """Makes the server refuse the first inserts of tasks, and counts the attempts.

    A sequence counts them, because it is not rolled back.
    """

    def __init__(self, owner: Connection) -> None:
        self._owner = owner

    async def plant(self, sqlstate: str, *, times: int, deferred: bool = False) -> None:
        kind = "CONSTRAINT TRIGGER refuse AFTER" if deferred else "TRIGGER refuse BEFORE"
        when = "DEFERRABLE INITIALLY DEFERRED" if deferred else ""
        await self._owner.execute(f"""
            DROP TRIGGER IF EXISTS refuse ON tasks;
            DROP SEQUENCE IF EXISTS tries;
            CREATE SEQUENCE tries;
            GRANT USAGE ON SEQUENCE tries TO todo_app;
            CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN
                    IF nextval('tries') <= {times} THEN
                        RAISE EXCEPTION 'planted' USING ERRCODE = '{sqlstate}';
                    END IF;
                    RETURN NEW;
                END
            $$;
            CREATE {kind} INSERT ON tasks {when} FOR EACH ROW EXECUTE FUNCTION refuse()
        """)

    async def tries(self) -> int:
        return int(await self._owner.fetchval("SELECT last_value FROM tries"))


@pytest.fixture
def refusal(owner: Connection) -> Refusal:
    return Refusal(owner)


class Checked(Database):
    """A Database that counts how often it checked that users are isolated."""

    checks = 0

    @override
    async def _check(self) -> None:
        self.checks += 1
        await super()._check()


class TestLifetime:
    async def test_opens_closes_and_opens_again(self, url: str, superuser: Connection) -> None:
        database = Database.from_url(url)
        for _ in range(2):
            async with database:
                assert (await database.health()).ok
                assert await backends(superuser) == 1
            with pytest.raises(ConfigurationError, match="closed"):
                await database.tasks.count("alice")
            with pytest.raises(ConfigurationError, match="closed"):
                async with database.transaction("alice"):
                    pytest.fail("it began")
            await until_disconnected(superuser)

    async def test_open_and_close_may_be_repeated(self, url: str) -> None:
        database = Checked.from_url(url)
        await database.close()
        await database.open()
        await database.open()
        assert database.checks == 1
        await database.close()
        await database.close()

    async def test_opens_itself_once_on_first_use(self, url: str) -> None:
        database = Checked.from_url(url)
        assert await database.tasks.count("alice") == 0
        assert await database.tasks.count("bob") == 0
        assert database.checks == 1
        await database.close()

    async def test_opens_itself_once_for_twenty_tasks_at_once(self, url: str) -> None:
        database = Checked.from_url(url)
        counts = await asyncio.gather(*(database.tasks.count("alice") for _ in range(20)))
        assert counts == [0] * 20
        assert database.checks == 1
        await database.close()

    async def test_close_waits_for_a_running_call(self, url: str, superuser: Connection) -> None:
        database = Database.from_url(url)
        async with database.transaction("alice") as tx:
            await tx.users.create("alice", email="alice@example.org", name="Alice")
            closing = asyncio.create_task(database.close())
            await asyncio.sleep(0)
            await tx.tasks.create("alice", "stored")
        await closing
        assert await superuser.fetchval("SELECT count(*) FROM tasks") == 1
        await until_disconnected(superuser)

    def test_C7_can_be_opened_again_on_another_event_loop(self, url: str) -> None:
        def run() -> None:
            async def use() -> None:
                async with database:
                    # Enough calls that some must wait: only waiting binds the pool to the loop.
                    calls = (database.health() for _ in range(5))
                    assert all(health.ok for health in await asyncio.gather(*calls))

            database = Database.from_url(url, pool_size=1, max_overflow=0)
            asyncio.run(use())
            asyncio.run(use())

        with ThreadPoolExecutor(1) as thread:
            thread.submit(run).result()

    async def test_C7_another_event_loop_is_refused(self, database: Database) -> None:
        def elsewhere() -> None:
            asyncio.run(database.tasks.list("alice"))

        with pytest.raises(ConfigurationError, match="event loop"):
            await asyncio.to_thread(elsewhere)
        assert await database.tasks.count("alice") == 0

    async def test_C8_another_process_is_refused_and_leaves_the_connections_alone(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With a changed process id, as after a fork; `test_faults` really forks."""
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr("todo_db.database.os.getpid", lambda: -1)
            with pytest.raises(ConfigurationError, match="fork"):
                await database.tasks.list("alice")
            await database.close()
        assert await database.tasks.count("alice") == 0

    def test_each_event_loop_can_have_its_own(self, url: str) -> None:
        async def use() -> int:
            async with Database.from_url(url) as database:
                return await database.tasks.count("alice")

        def elsewhere() -> list[int]:
            return [asyncio.run(use()) for _ in range(2)]

        assert elsewhere() == [0, 0]

    async def test_misspelt_setting_is_refused(self, url: str) -> None:
        with pytest.raises(ConfigurationError, match="poolsize"):
            Database.from_url(url, poolsize=1)


class TestOpen:
    @staticmethod
    async def refusal(url: str) -> str:
        """Return the name of the error, which is the same for every way to open."""
        database = Database.from_url(url)
        with pytest.raises(TodoDBError) as opened:
            await database.open()
        with pytest.raises(type(opened.value)):
            await database.users.get("alice")
        health = await database.health()
        await database.close()
        assert not health.ok
        assert health.problem == type(opened.value).__name__
        return health.problem

    async def test_A1_A3_refuses_tables_that_do_not_bind_the_role(
        self, url: str, superuser: Connection
    ) -> None:
        for table in ("tasks", "users", "idempotency_keys"):
            for weakness, cure in (
                ("DISABLE ROW LEVEL SECURITY", "ENABLE ROW LEVEL SECURITY"),
                ("NO FORCE ROW LEVEL SECURITY", "FORCE ROW LEVEL SECURITY"),
                ("OWNER TO todo_app", "OWNER TO todo_owner"),
            ):
                await superuser.execute(f"ALTER TABLE {table} {weakness}")
                assert await self.refusal(url) == "IsolationError", weakness
                await superuser.execute(f"ALTER TABLE {table} {cure}")
                async with Database.from_url(url) as database:
                    assert (await database.health()).ok

    async def test_refuses_an_incomplete_schema(self, url: str, superuser: Connection) -> None:
        for damage in (
            "UPDATE todo_db_version SET version_num = '0001'",
            "DELETE FROM todo_db_version",
            "REVOKE SELECT ON todo_db_version FROM todo_app",
            "DROP TABLE todo_db_version",
            "DROP TABLE tasks",
        ):
            await superuser.execute(damage)
            assert await self.refusal(url) == "SchemaError", damage

    async def test_refuses_until_the_last_migration(self, empty: str) -> None:
        database = Database.from_url(empty)
        for revision in ("base", "0001", "0002", "0003"):
            if revision != "base":
                await upgrade(empty, revision)
            with pytest.raises(SchemaError):
                await database.open()
        await upgrade(empty)
        await database.open()
        assert (await database.health()).ok
        await database.close()

    async def test_accepts_a_newer_database(self, url: str, superuser: Connection) -> None:
        await superuser.execute("UPDATE todo_db_version SET version_num = '9999'")
        async with Database.from_url(url) as database:
            health = await database.health()
        assert (health.ok, health.is_current, health.revision) == (True, True, "9999")

    async def test_A2_A3_A4_refuses_a_role_that_could_bypass_the_fence(self) -> None:
        with Cluster(18) as cluster:
            url = await cluster.create_database("todo")
            await upgrade(url)
            weaknesses = (
                ("ALTER ROLE todo_app BYPASSRLS", "ALTER ROLE todo_app NOBYPASSRLS"),
                ("ALTER ROLE todo_app SUPERUSER", "ALTER ROLE todo_app NOSUPERUSER"),
                (
                    """ALTER ROLE todo_owner NOBYPASSRLS;
                    REVOKE todo_app FROM todo_owner CASCADE; GRANT todo_owner TO todo_app""",
                    "REVOKE todo_owner FROM todo_app",
                ),
                (
                    "CREATE ROLE seer BYPASSRLS; GRANT seer TO todo_app",
                    "REVOKE seer FROM todo_app",
                ),
                ("GRANT postgres TO todo_app", "REVOKE postgres FROM todo_app"),
            )
            login = cluster.url("postgres", "todo")
            for weakness, cure in weaknesses:
                await cluster.execute(weakness)
                database = Database.from_url(login)
                with pytest.raises(IsolationError):
                    await database.open()
                await cluster.execute(cure)
                await database.open()
                await database.close()

    async def test_refused_one_keeps_its_connections_after_a_repair(
        self, url: str, superuser: Connection
    ) -> None:
        await superuser.execute("UPDATE todo_db_version SET version_num = '0001'")
        database = Database.from_url(url)
        with pytest.raises(SchemaError):
            await database.open()
        await superuser.execute(f"UPDATE todo_db_version SET version_num = '{REVISION}'")
        async with database as db:
            backends = set[int]()
            for _ in range(3):
                async with db.transaction("alice") as tx:
                    backends.add(await tx._gate.driver.fetchval("SELECT pg_backend_pid()"))
        assert len(backends) == 1

    async def test_callers_that_waited_for_an_attempt_get_its_error(self, proxy: Proxy) -> None:
        proxy.break_at(STARTUP, Fault.HANG, times=99)
        database = Database.from_url(proxy.url, connect_retry_seconds=1)
        failures = await asyncio.gather(
            *(database.tasks.count("alice") for _ in range(5)), return_exceptions=True
        )
        assert {type(failure) for failure in failures} == {UnavailableError}
        assert proxy.connections == 1

    async def test_cancelled_one_can_be_opened_again(self, proxy: Proxy) -> None:
        proxy.break_at(STARTUP, Fault.HANG)
        database = Database.from_url(proxy.url)
        opening = asyncio.create_task(database.open())
        await until(lambda: not proxy.pending)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        async with database as db:
            assert await db.tasks.count("alice") == 0

    async def test_closed_while_it_opens_is_closed(self, url: str, superuser: Connection) -> None:
        for turns in range(1, 30):
            database = Database.from_url(url)
            opening = asyncio.create_task(database.open())
            for _ in range(turns):
                await asyncio.sleep(0)
            await database.close()
            await asyncio.gather(opening, return_exceptions=True)
            with pytest.raises(ConfigurationError, match="closed"):
                await database.tasks.count("alice")
        await until_disconnected(superuser)

    async def test_refused_one_holds_no_connection(self, url: str, superuser: Connection) -> None:
        await superuser.execute("ALTER TABLE tasks DISABLE ROW LEVEL SECURITY")
        with pytest.raises(IsolationError):
            async with Database.from_url(url):
                pytest.fail("it opened")
        await until_disconnected(superuser)

    async def test_tries_again_when_the_connection_is_lost(self, proxy: Proxy) -> None:
        for pattern in (STARTUP, BEGIN, b"row_security_active", COMMIT):
            proxy.break_at(pattern, Fault.CUT_AFTER)
            async with Database.from_url(proxy.url) as database:
                assert not proxy.pending
                assert await database.tasks.count("alice") == 0

    async def test_A10_tries_again_when_the_peer_does_not_answer(self, proxy: Proxy) -> None:
        proxy.break_at(STARTUP, Fault.HANG)
        async with (
            asyncio.timeout(10),
            Database.from_url(proxy.url, connect_timeout_seconds=0.2) as database,
        ):
            assert not proxy.pending
            assert await database.tasks.count("alice") == 0


class TestHealth:
    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_reports_the_state(self, db: Database, superuser: Connection) -> None:
        health = await db.health()
        assert health.ok
        assert health.problem is None
        assert health.is_current
        assert health.revision == await superuser.fetchval(
            "SELECT version_num FROM todo_db_version"
        )
        version = await superuser.fetchval("SELECT current_setting('server_version')")
        assert health.server_version == version.split()[0]
        assert health.latency_seconds is not None
        assert health.latency_seconds > 0
        assert (health.pool.size, health.pool.in_use, health.pool.waiting) == (10, 0, 0)

    async def test_database_that_cannot_be_reached(self) -> None:
        with TemporaryDirectory(prefix="todo-") as folder:
            url = f"postgresql://alice@/todo?host={Path(folder, 'missing')}"
            health = await Database.from_url(url).health()
        assert (health.ok, health.problem) == (False, "ConfigurationError")
        assert (health.latency_seconds, health.server_version) == (None, None)
        assert (health.revision, health.is_current) == (None, False)

    async def test_database_that_does_not_exist(self, url: str) -> None:
        missing = make_url(url).set(database="missing").render_as_string(hide_password=False)
        health = await Database.from_url(missing).health()
        assert (health.ok, health.problem) == (False, "ConfigurationError")

    async def test_closed_one(self, url: str) -> None:
        database = Database.from_url(url)
        await database.close()
        health = await database.health()
        assert (health.ok, health.problem) == (False, "ConfigurationError")

    async def test_role_that_is_not_fenced(self, url: str, superuser: Connection) -> None:
        await superuser.execute("ALTER TABLE tasks DISABLE ROW LEVEL SECURITY")
        health = await Database.from_url(url).health()
        assert (health.ok, health.problem) == (False, "IsolationError")

    async def test_schema_that_became_older_or_vanished_while_open(
        self, database: Database, superuser: Connection
    ) -> None:
        await superuser.execute("UPDATE todo_db_version SET version_num = '0001'")
        health = await database.health()
        assert (health.ok, health.problem, health.revision) == (False, "SchemaError", "0001")
        assert not health.is_current
        for change in (
            "DELETE FROM todo_db_version",
            "REVOKE SELECT ON todo_db_version FROM todo_app",
            "DROP TABLE todo_db_version",
        ):
            await superuser.execute(change)
            health = await database.health()
            assert not health.ok
            assert not health.is_current
            assert health.problem is not None

    async def test_peer_that_never_answers_is_given_up_in_time(
        self, database_through_proxy: Database, proxy: Proxy
    ) -> None:
        for pattern in (BEGIN, b"todo_db_version", COMMIT):
            async with Database.from_url(
                proxy.url, pool_size=1, max_overflow=0, prepared_statements=False
            ) as database:
                proxy.break_at(pattern, Fault.HANG)
                async with asyncio.timeout(30):
                    health = await database.health(timeout_seconds=0.7)
                assert (health.ok, health.problem) == (False, "CallTimeoutError"), pattern
                assert not proxy.pending
                assert database._pool.status.in_use == 0
                # The connection counts until it is known not to recover: 2 s.
                assert (await database.health(timeout_seconds=30)).ok
        assert (await database_through_proxy.health()).ok

    async def test_lost_connection(self, proxy: Proxy) -> None:
        # What is lost at the BEGIN is not applied, and begun again.
        for pattern, problem in ((BEGIN, None), (b"todo_db_version", "UnavailableError")):
            for fault in (Fault.CUT_BEFORE, Fault.CUT_AFTER):
                async with Database.from_url(
                    proxy.url, pool_size=1, max_overflow=0, prepared_statements=False
                ) as database:
                    proxy.break_at(pattern, fault)
                    health = await database.health()
                    assert (health.ok, health.problem) == (problem is None, problem)
                    assert not proxy.pending
                    assert (await database.health()).ok

    async def test_statement_that_takes_too_long(
        self, database: Database, superuser: Connection
    ) -> None:
        async with Database.from_url(
            str(
                database.settings.database_url and database.settings.database_url.get_secret_value()
            ),
            lock_timeout_seconds=0.05,
        ) as hasty:
            async with superuser.transaction():
                await superuser.execute("LOCK todo_db_version IN ACCESS EXCLUSIVE MODE")
                health = await hasty.health()
            assert (health.ok, health.problem) == (False, "CallTimeoutError")
            assert (await hasty.health()).ok

    async def test_pool_that_is_exhausted(self, database_through_proxy: Database) -> None:
        async with database_through_proxy.transaction("alice"):
            asking = asyncio.create_task(database_through_proxy.health(timeout_seconds=0.05))
            async with asyncio.timeout(10):
                health = await asking
        assert (health.ok, health.problem) == (False, "CallTimeoutError")
        assert (health.pool.in_use, health.pool.waiting) == (1, 0)
        assert (await database_through_proxy.health()).ok

    async def test_cancellation_is_raised(
        self, database_through_proxy: Database, proxy: Proxy
    ) -> None:
        proxy.break_at(BEGIN, Fault.HANG)
        asking = asyncio.create_task(database_through_proxy.health())
        await until(lambda: not proxy.pending)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        # The connection counts until it is known not to recover: 2 s.
        assert (await database_through_proxy.health(timeout_seconds=30)).ok


class TestRetries:
    async def test_F15_F16_F17_what_was_not_applied_is_tried_again(
        self, db: Database, refusal: Refusal
    ) -> None:
        for sqlstate, times in (("40001", 2), ("40P01", 2), ("55P03", 1)):
            await refusal.plant(sqlstate, times=times)
            task = await db.tasks.create("alice", sqlstate)
            assert await refusal.tries() == times + 1
            assert (await db.tasks.list("alice")).items == (task,)
            await db.tasks.delete("alice", task.id)

    async def test_F17b_refused_at_the_commit(self, db: Database, refusal: Refusal) -> None:
        await refusal.plant("40001", times=1, deferred=True)
        task = await db.tasks.create("alice", "second try")
        assert await refusal.tries() == 2
        assert (await db.tasks.list("alice")).items == (task,)

    async def test_raised_after_the_last_attempt(
        self, db: Database, url: str, refusal: Refusal
    ) -> None:
        for attempts in (1, 2, 3):
            await refusal.plant("40001", times=99)
            async with Database.from_url(url, retry_attempts=attempts) as stubborn:
                with pytest.raises(UnavailableError):
                    await stubborn.tasks.create("alice", "never")
            assert await refusal.tries() == attempts
        assert await db.tasks.count("alice") == 0

    async def test_raised_when_the_time_is_up(
        self, db: Database, url: str, refusal: Refusal
    ) -> None:
        await refusal.plant("40001", times=99)
        async with Database.from_url(url, retry_timeout_seconds=0.01) as hasty:
            with pytest.raises(UnavailableError):
                await hasty.tasks.create("alice", "never")
        assert await refusal.tries() < 5
        assert await db.tasks.count("alice") == 0

    async def test_anything_else_is_raised_at_once(self, db: Database, refusal: Refusal) -> None:
        for sqlstate in ("57014", "53100", "23514", "P0001", "42501", "42P01"):
            await refusal.plant(sqlstate, times=1)
            with pytest.raises(TodoDBError):
                await db.tasks.create("alice", "refused")
            assert await refusal.tries() == 1, sqlstate
        assert await db.tasks.count("alice") == 0

    async def test_E9_lock_that_is_never_free_is_waited_for_twice(
        self, db: Database, refusal: Refusal
    ) -> None:
        await refusal.plant("55P03", times=99)
        with pytest.raises(CallTimeoutError):
            await db.tasks.create("alice", "never")
        assert await refusal.tries() == 2

    async def test_F15_lock_timeout(self, db: Database, url: str, owner: Connection) -> None:
        task = await db.tasks.create("alice", "locked")
        async with Database.from_url(url, lock_timeout_seconds=0.05, retry_attempts=2) as hasty:
            lock = owner.transaction()
            await lock.start()
            await owner.execute("UPDATE tasks SET title = 'mine' WHERE id = $1", task.id)
            with pytest.raises(CallTimeoutError):
                await hasty.tasks.toggle("alice", task.id)
            await lock.rollback()
            assert (await hasty.tasks.toggle("alice", task.id)).completed

    async def test_F14_statement_timeout_is_not_tried_again(
        self, db: Database, url: str, owner: Connection
    ) -> None:
        task = await db.tasks.create("alice", "locked")
        async with Database.from_url(url, statement_timeout_seconds=1) as hasty:
            lock = owner.transaction()
            await lock.start()
            await owner.execute("UPDATE tasks SET title = 'mine' WHERE id = $1", task.id)
            with pytest.raises(CallTimeoutError) as caught:
                await hasty.tasks.toggle("alice", task.id)
            await lock.rollback()
            assert not caught.value.transient
        assert not (await db.tasks.get("alice", task.id)).completed

    async def test_F16_deadlock(self, db: Database) -> None:
        first = await db.tasks.create("alice", "first")
        second = await db.tasks.create("alice", "second")
        met = asyncio.Barrier(2)
        tries = 0

        def crossing(*ids: int) -> Callable[[Transaction], Awaitable[None]]:
            async def work(tx: Transaction) -> None:
                nonlocal tries
                tries += 1
                await tx.tasks.toggle("alice", ids[0])
                if tries <= 2:
                    await met.wait()
                await tx.tasks.toggle("alice", ids[1])

            return work

        await asyncio.gather(
            db.run("alice", crossing(first.id, second.id)),
            db.run("alice", crossing(second.id, first.id)),
        )
        assert tries == 3
        for task in (first, second):
            assert not (await db.tasks.get("alice", task.id)).completed


class TestKilledConnections:
    """With another login of the owner, because an owner may end its own connections."""

    @pytest.fixture
    def login(self) -> str:
        return OWNER

    async def test_F01_between_calls(self, db: Database, owner: Connection) -> None:
        for _ in range(3):
            await owner.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'todo_db' AND datname = current_database()"
            )
            assert await db.tasks.count("alice") == 0

    async def test_F03_during_a_call(self, db: Database, owner: Connection) -> None:
        task = await db.tasks.create("alice", "wanted")
        async with asyncio.TaskGroup() as group, owner.transaction():
            await owner.execute("SELECT FROM tasks FOR UPDATE")
            waiting = group.create_task(db.tasks.update("alice", task.id, title="changed"))
            await until_waiting(owner)
            await owner.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'todo_db' AND datname = current_database()"
                " AND wait_event_type = 'Lock'"
            )
        assert (await waiting).title == "changed"
        assert (await db.tasks.get("alice", task.id)).title == "changed"

    async def test_between_the_statements_of_run(self, db: Database, owner: Connection) -> None:
        tries = 0

        async def work(tx: Transaction) -> None:
            nonlocal tries
            tries += 1
            await tx.tasks.create("alice", f"try {tries}")
            if tries == 1:
                pid = tx._gate.connection.driver.get_server_pid()
                await owner.execute("SELECT pg_terminate_backend($1)", pid)
                await until(tx._gate.connection.driver.is_closed)

        await db.run("alice", work)
        assert [task.title for task in (await db.tasks.list("alice")).items] == ["try 2"]


type Outcome = Callable[[Database, int, datetime], Awaitable[object]]

# For each method: whether it still returns a result when its COMMIT is lost.
ANSWERS: Final[dict[str, Outcome]] = {
    "tasks.count": lambda db, _id, _at: db.tasks.count("alice"),
    "tasks.create with a key": lambda db, _id, _at: db.tasks.create(
        "alice", "new", idempotency_key="key"
    ),
    "tasks.create_many with a key": lambda db, _id, _at: db.tasks.create_many(
        "alice", [NewTask("new"), NewTask("newer")], idempotency_key="key"
    ),
    "tasks.delete": lambda db, id_, _at: db.tasks.delete("alice", id_),
    "tasks.get": lambda db, id_, _at: db.tasks.get("alice", id_),
    "tasks.iterate": lambda db, _id, _at: anext(aiter(db.tasks.iterate("alice"))),
    "tasks.list": lambda db, _id, _at: db.tasks.list("alice"),
    "tasks.update": lambda db, id_, _at: db.tasks.update("alice", id_, title="new"),
    "tasks.update without changes": lambda db, id_, _at: db.tasks.update("alice", id_),
    "users.delete": lambda db, _id, _at: db.users.delete("alice"),
    "users.ensure": lambda db, _id, _at: db.users.ensure(
        "alice", email="alice@example.org", name="Alice"
    ),
    "users.get": lambda db, _id, _at: db.users.get("alice"),
    "users.set_email": lambda db, _id, _at: db.users.set_email("alice", email="new@example.org"),
    "users.update": lambda db, _id, _at: db.users.update("alice", name="new"),
}
IS_UNKNOWN: Final[dict[str, Outcome]] = {
    "tasks.create": lambda db, _id, _at: db.tasks.create("alice", "new"),
    "tasks.create_many": lambda db, _id, _at: db.tasks.create_many("alice", [NewTask("new")]),
    "tasks.delete_completed": lambda db, _id, _at: db.tasks.delete_completed("alice"),
    "tasks.delete_many": lambda db, id_, _at: db.tasks.delete_many("alice", [id_]),
    "tasks.toggle": lambda db, id_, _at: db.tasks.toggle("alice", id_),
    "tasks.update if unchanged": lambda db, id_, at: db.tasks.update(
        "alice", id_, expected_updated_at=at, title="new"
    ),
    "tasks.update_many": lambda db, id_, _at: db.tasks.update_many("alice", [id_], title="new"),
    "users.create": lambda db, _id, _at: db.users.create(
        "carol", email="carol@example.org", name="Carol"
    ),
}


def _public(repository: type) -> set[str]:
    return {name for name, _ in getmembers(repository, isfunction) if not name.startswith("_")}


async def titles_and_names(owner: Connection) -> tuple[list[str], list[str]]:
    titles = await owner.fetch("SELECT title FROM tasks ORDER BY id")
    names = await owner.fetch("SELECT name FROM users ORDER BY id = 'carol', name")
    return [row["title"] for row in titles], [row["name"] for row in names]


class TestSchemaChange:
    async def test_P14_F38_prepared_statements_heal_by_themselves(
        self, db: Database, owner: Connection
    ) -> None:
        task = await db.tasks.create("alice", "Buy milk")
        for length in (300, 250):
            assert await db.tasks.get("alice", task.id) == task
            await owner.execute(f"ALTER TABLE tasks ALTER title TYPE varchar({length})")
        assert await db.tasks.get("alice", task.id) == task
        assert (await db.tasks.toggle("alice", task.id)).completed

    async def test_one_that_was_deallocated_is_prepared_again(self, db: Database) -> None:
        task = await db.tasks.create("alice", "Buy milk")
        for connection in db._pool._idle:
            await connection.driver.execute("DEALLOCATE ALL")
        assert (await db.tasks.create("alice", "Buy bread")).id > task.id
        assert await db.tasks.count("alice") == 2


class TestLostCommit:
    def test_tables_have_a_line_for_every_public_method(self) -> None:
        named = {line.partition(" ")[0] for line in (ANSWERS | IS_UNKNOWN)}
        assert named == (
            {f"tasks.{name}" for name in _public(TaskRepository)}
            | {f"users.{name}" for name in _public(UserRepository)}
        )

    @staticmethod
    async def contents(owner: Connection) -> dict[str, Any]:
        """Return all rows without timestamps, to compare one and two runs of a call."""
        users = await owner.fetch("SELECT id, name FROM users ORDER BY id")
        tasks = await owner.fetch("SELECT user_id, title, completed FROM tasks ORDER BY id")
        keys = await owner.fetch("SELECT user_id, key, cardinality(task_ids) FROM idempotency_keys")
        return {
            name: [tuple(row) for row in rows]
            for name, rows in {"users": users, "tasks": tasks, "keys": keys}.items()
        }

    @staticmethod
    async def start_again(owner: Connection) -> tuple[int, datetime]:
        await owner.execute("""
            TRUNCATE users CASCADE;
            INSERT INTO users (id, email, name) VALUES
                ('alice', 'alice@example.org', 'Alice'), ('bob', 'bob@example.org', 'Bob')
        """)
        task = await owner.fetchrow(
            "INSERT INTO tasks (user_id, title, completed) VALUES ('alice', 'old', true)"
            " RETURNING id, updated_at"
        )
        assert task is not None
        return task["id"], task["updated_at"]

    @pytest.mark.parametrize("fault", [Fault.CUT_BEFORE, Fault.CUT_AFTER])
    async def test_Z5_idempotent_call_is_run_again(
        self, database_through_proxy: Database, proxy: Proxy, owner: Connection, fault: Fault
    ) -> None:
        for name, call in ANSWERS.items():
            undisturbed = await call(database_through_proxy, *await self.start_again(owner))
            once = await self.contents(owner)
            given = await self.start_again(owner)
            proxy.break_at(COMMIT, fault)
            assert type(await call(database_through_proxy, *given)) is type(undisturbed), name
            assert not proxy.pending, name
            assert await self.contents(owner) == once, name

    @pytest.mark.parametrize("fault", [Fault.CUT_BEFORE, Fault.CUT_AFTER])
    async def test_Z5_other_call_is_unknown_and_not_run_twice(
        self, database_through_proxy: Database, proxy: Proxy, owner: Connection, fault: Fault
    ) -> None:
        for name, call in IS_UNKNOWN.items():
            given = await self.start_again(owner)
            before = await self.contents(owner)
            await call(database_through_proxy, *given)
            once = await self.contents(owner)
            assert once != before, name
            given = await self.start_again(owner)
            proxy.break_at(COMMIT, fault)
            with pytest.raises(OutcomeUnknownError):
                await call(database_through_proxy, *given)
            assert not proxy.pending, name
            expected = before if fault is Fault.CUT_BEFORE else once
            assert await self.contents(owner) == expected, name

    async def test_ensure_of_a_new_user_is_run_again(
        self, database_through_proxy: Database, proxy: Proxy
    ) -> None:
        for fault, user in ((Fault.CUT_BEFORE, "carol"), (Fault.CUT_AFTER, "dave")):
            proxy.break_at(COMMIT, fault)
            ensured = await database_through_proxy.users.ensure(
                user, email=f"{user}@example.org", name=""
            )
            assert not proxy.pending
            assert await database_through_proxy.users.get(user) == ensured

    async def test_delete_of_a_missing_task_is_still_not_found(
        self, database_through_proxy: Database, proxy: Proxy
    ) -> None:
        proxy.break_at(BEGIN, Fault.CUT_AFTER)
        with pytest.raises(TaskNotFoundError):
            await database_through_proxy.tasks.delete("alice", 999)
        assert not proxy.pending

    async def test_read_is_not_run_again(
        self, database_through_proxy: Database, proxy: Proxy
    ) -> None:
        await database_through_proxy.tasks.count("alice")
        proxy.break_at(COMMIT, Fault.CUT_AFTER)
        begun = proxy.sent.count(BEGIN)
        assert await database_through_proxy.tasks.count("alice") == 0
        assert proxy.sent.count(BEGIN) == begun + 1

    async def test_stays_unknown_when_the_tries_that_follow_fail(
        self, db: Database, proxy: Proxy, owner: Connection
    ) -> None:
        task = await db.tasks.create("alice", "old")
        async with Database.from_url(
            proxy.url, retry_attempts=3, connect_retry_seconds=0
        ) as database_through_proxy:
            calls: dict[str, Callable[[], Awaitable[object]]] = {
                "update": lambda: database_through_proxy.tasks.update(
                    "alice", task.id, title="new"
                ),
                "delete": lambda: database_through_proxy.tasks.delete("alice", task.id),
                "create with a key": lambda: database_through_proxy.tasks.create(
                    "alice", "x", idempotency_key="key"
                ),
                "users.update": lambda: database_through_proxy.users.update("alice", name="New"),
                "ensure": lambda: database_through_proxy.users.ensure(
                    "carol", email="carol@example.org", name=""
                ),
            }
            for name, call in calls.items():
                proxy.break_at(COMMIT, Fault.CUT_AFTER)
                proxy.break_at(STARTUP, Fault.CUT_BEFORE, times=2)
                with pytest.raises(OutcomeUnknownError):
                    await call()
                assert not proxy.pending, name
        assert await titles_and_names(owner) == (["x"], ["Bob", "New", ""])

    async def test_stays_unknown_when_the_next_try_is_refused(
        self, db: Database, proxy: Proxy, owner: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = await db.tasks.create("alice", "old")
        begin = TransactionPreamble.begin

        def refused(self: TransactionPreamble, user_id: str, *, read_only: bool) -> str:
            sql = begin(self, user_id, read_only=read_only)
            return sql if proxy.pending else sql.replace("todo_app", "pg_monitor")

        async with Database.from_url(
            proxy.url, pool_size=1, max_overflow=0
        ) as database_through_proxy:
            await database_through_proxy.tasks.count("alice")
            proxy.break_at(COMMIT, Fault.CUT_AFTER)
            monkeypatch.setattr(TransactionPreamble, "begin", refused)
            with pytest.raises(OutcomeUnknownError):
                await database_through_proxy.tasks.update("alice", task.id, title="new")
        assert await owner.fetchval("SELECT title FROM tasks") == "new"

    @pytest.mark.parametrize("sqlstate", ["58030", "23505", "23514"])
    async def test_stays_unknown_when_the_server_refuses_the_next_try(
        self, db: Database, proxy: Proxy, owner: Connection, sqlstate: str
    ) -> None:
        task = await db.tasks.create("alice", "old")
        await owner.execute(f"""
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN RAISE EXCEPTION 'planted' USING ERRCODE = '{sqlstate}'; END
            $$;
            CREATE TRIGGER refuse BEFORE UPDATE ON tasks FOR EACH ROW
                WHEN (OLD.title = NEW.title) EXECUTE FUNCTION refuse()
        """)
        async with Database.from_url(proxy.url) as database_through_proxy:
            proxy.break_at(COMMIT, Fault.CUT_AFTER)
            with pytest.raises(OutcomeUnknownError):
                await database_through_proxy.tasks.update("alice", task.id, title="new")
        assert await owner.fetchval("SELECT title FROM tasks") == "new"

    async def test_retries_turned_off(self, db: Database, proxy: Proxy) -> None:
        task = await db.tasks.create("alice", "old")
        async with Database.from_url(proxy.url, retry_attempts=1) as single:
            proxy.break_at(COMMIT, Fault.CUT_AFTER)
            with pytest.raises(OutcomeUnknownError):
                await single.tasks.update("alice", task.id, title="new")


class TestRun:
    async def test_returns_what_the_work_returns(self, db: Database) -> None:
        async def work(tx: Transaction) -> int:
            await tx.tasks.create("alice", "one")
            return await tx.tasks.count("alice")

        assert await db.run("alice", work) == 1
        assert await db.tasks.count("alice") == 1

    async def test_E8_runs_all_of_it_again_as_the_same_user(
        self, db: Database, refusal: Refusal
    ) -> None:
        await refusal.plant("40001", times=1)
        seen: list[tuple[str, int]] = []

        async def work(tx: Transaction) -> None:
            found = await tx.execute(text("SELECT current_setting('todo_db.user_id')"))
            seen.append((found.scalar_one(), await tx.tasks.count("alice")))
            await tx.tasks.create("alice", "one")
            await tx.tasks.create("alice", "two")

        await db.run("alice", work)
        assert seen == [("alice", 0), ("alice", 0)]
        assert await db.tasks.count("alice") == 2

    async def test_own_statement_that_collides_is_run_again_too(
        self, db: Database, refusal: Refusal
    ) -> None:
        await refusal.plant("40001", times=1)

        async def work(tx: Transaction) -> None:
            await tx.execute(text("INSERT INTO tasks (user_id, title) VALUES ('alice', 'own')"))

        await db.run("alice", work)
        assert await refusal.tries() == 2
        assert await db.tasks.count("alice") == 1

    async def test_other_errors_undo_it_and_are_not_tried_again(self, db: Database) -> None:
        raised: list[type[Exception]] = []

        async def work(tx: Transaction) -> None:
            raised.append(error)
            await tx.tasks.create("alice", "undone")
            raise error

        errors: tuple[type[Exception], ...] = (LookupError, TaskNotFoundError, OSError)
        for error in errors:
            with pytest.raises(error):
                await db.run("alice", work)
        assert raised == list(errors)
        assert await db.tasks.count("alice") == 0

    async def test_own_statement_that_loses_its_connection_is_run_again(
        self, database_through_proxy: Database, proxy: Proxy
    ) -> None:
        async def work(tx: Transaction) -> int:
            await tx.tasks.create("alice", "once")
            return int((await tx.execute(text("SELECT 42 AS slowly"))).scalar_one())

        proxy.break_at(b"slowly", Fault.CUT_AFTER)
        assert await database_through_proxy.run("alice", work) == 42
        assert not proxy.pending
        assert await database_through_proxy.tasks.count("alice") == 1

    async def test_own_statement_that_fails_is_sqlalchemys_error(self, db: Database) -> None:
        async def work(tx: Transaction) -> None:
            tries.append(tx)
            await tx.tasks.create("alice", "undone")
            await tx.execute(text("SELECT 1 / 0"))

        tries: list[Transaction] = []
        with pytest.raises(DBAPIError):
            await db.run("alice", work)
        assert len(tries) == 1
        assert await db.tasks.count("alice") == 0

    @pytest.mark.parametrize("fault", [Fault.CUT_BEFORE, Fault.CUT_AFTER])
    async def test_Z5_lost_commit_is_unknown_and_not_run_again(
        self, database_through_proxy: Database, proxy: Proxy, fault: Fault
    ) -> None:
        tries = 0

        async def work(tx: Transaction) -> None:
            nonlocal tries
            tries += 1
            await tx.tasks.create("alice", "maybe")

        proxy.break_at(COMMIT, fault)
        with pytest.raises(OutcomeUnknownError):
            await database_through_proxy.run("alice", work)
        assert tries == 1
        assert await database_through_proxy.tasks.count("alice") == (fault is Fault.CUT_AFTER)

    async def test_M1_read_only_one_is_never_unknown(
        self, database_through_proxy: Database, proxy: Proxy
    ) -> None:
        async def work(tx: Transaction) -> int:
            return await tx.tasks.count("alice")

        proxy.break_at(COMMIT, Fault.CUT_AFTER)
        assert await database_through_proxy.run("alice", work, read_only=True) == 0
        assert not proxy.pending
