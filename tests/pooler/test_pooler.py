"""The package behind PgBouncer in transaction mode, as on Neon's pooled endpoint."""

import asyncio
import random
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Final, Self

import asyncpg
import attacks
import pytest
import pytest_asyncio
from driver import Connection
from every_method import CALLS, People
from pgbouncer import BOOKWORM, PASSWORD, TRIXIE, PgBouncer
from place import still_waiting
from proxy import COMMIT, Fault, Proxy
from sqlalchemy import text

from todo_db import (
    ConfigurationError,
    Database,
    NewTask,
    OutcomeUnknownError,
    TodoDBError,
    Transaction,
    UnavailableError,
)
from todo_db.embedded import EmbeddedPostgres
from todo_db.migrations import downgrade, upgrade
from todo_db.models import REVISION

pytestmark = pytest.mark.pooler

LOGIN: Final = "pooled_login"
OWNER: Final = "pooled_owner"
USERS: Final = tuple(f"user-{number}" for number in range(12))

# Release, max_prepared_statements, and whether the package may keep prepared statements.
type Kind = tuple[str, int | None, bool]

NEON: Final[Kind] = (TRIXIE, 1000, True)
OLD: Final[Kind] = (BOOKWORM, None, False)
KINDS: Final[tuple[Kind, ...]] = (
    NEON,
    (TRIXIE, 200, True),
    (TRIXIE, 0, False),
    (TRIXIE, 1000, False),
    OLD,
)
# Run by another Python, with the URL and whether to keep prepared statements.
_OTHER_PROCESS: Final = """
import asyncio, sys
from todo_db import Database

async def main():
    url, prepared = sys.argv[1:]
    database = Database.from_url(url, prepared_statements=prepared == "True", retry_attempts=1)
    async with database as db:
        await db.users.create("carol", email="carol@example.org", name="Carol")
        print("ready", flush=True)
        for number in range(60):
            task = await db.tasks.create("carol", f"{number}")
            await db.tasks.toggle("carol", task.id)
            assert {t.user_id for t in (await db.tasks.list("carol")).items} == {"carol"}
        assert await db.tasks.count("carol", completed=True) == 60

asyncio.run(main())
"""
# State that an earlier client may have left on a server connection.
_LEFT: Final = """
    SELECT nullif(current_setting('todo_db.user_id', true), '') AS user_id,
        nullif(current_setting('todo_db.left', true), '') AS own,
        current_user = session_user AS itself,
        (SELECT array_agg(name::text) FROM pg_settings WHERE setting <> reset_val AND name IN (
            'statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout',
            'search_path', 'work_mem', 'role', 'default_transaction_read_only'
        )) AS settings,
        (SELECT count(*) FROM pg_locks
            WHERE locktype = 'advisory' AND pid = pg_backend_pid()) AS locks,
        pg_my_temp_schema() AS temporary,
        (SELECT count(*) FROM pg_cursors WHERE name <> '') AS cursors
"""
NOTHING: Final = (None, None, True, None, 0, 0, 0)


def _named(kind: Kind) -> str:
    suite, prepared, kept = kind
    return f"{suite}-{prepared}-{'prepared' if kept else 'unprepared'}"


@pytest.fixture(scope="module")
def pooled_roles(todo_postgres: EmbeddedPostgres) -> Generator[None]:
    """The two logins of the other tests, but with a password."""
    todo_postgres._psql(
        f"CREATE ROLE {LOGIN} LOGIN IN ROLE todo_app PASSWORD '{PASSWORD}'",
        f"CREATE ROLE {OWNER} LOGIN CREATEROLE BYPASSRLS IN ROLE todo_owner PASSWORD '{PASSWORD}'",
        f"GRANT todo_app TO {OWNER} WITH INHERIT FALSE, SET TRUE",
    )
    rules = todo_postgres.log.parent / "data" / "pg_hba.conf"
    before = rules.read_text()
    rules.write_text(f"local all {LOGIN},{OWNER} scram-sha-256\n{before}")
    todo_postgres._psql("SELECT pg_reload_conf()")
    yield
    rules.write_text(before)
    todo_postgres._psql("SELECT pg_reload_conf()", f"DROP ROLE {LOGIN}, {OWNER}")


class Poolers:
    """PgBouncers by their settings, started on first use."""

    def __init__(self, server_url: str) -> None:
        self.server_url = server_url
        self._started: dict[tuple[str, int | None, int], PgBouncer] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def new(self, kind: Kind, *, size: int = 10) -> PgBouncer:
        suite, prepared, _ = kind
        return PgBouncer(
            suite, self.server_url, max_prepared_statements=prepared, default_pool_size=size
        )

    async def get(self, kind: Kind, *, size: int = 10) -> PgBouncer:
        suite, prepared, _ = kind
        key = (suite, prepared, size)
        if key not in self._started:
            self._started[key] = await self._stack.enter_async_context(self.new(kind, size=size))
        return self._started[key]


@pytest_asyncio.fixture(scope="module")
async def poolers(todo_postgres: EmbeddedPostgres, pooled_roles: None) -> AsyncGenerator[Poolers]:
    del pooled_roles
    async with Poolers(todo_postgres.url(user="postgres", database="postgres")) as poolers:
        yield poolers


@pytest.fixture(params=KINDS, ids=_named)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture(params=[LOGIN, OWNER])
def login(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def size() -> int:
    """How many server connections PgBouncer opens for one user of one database."""
    return 10


@pytest_asyncio.fixture
async def pooler(poolers: Poolers, kind: Kind, size: int) -> PgBouncer:
    return await poolers.get(kind, size=size)


@pytest.fixture
def url(pooler: PgBouncer, todo_database_name: str, login: str) -> str:
    return pooler.url(login, todo_database_name)


@pytest_asyncio.fixture
async def db(url: str, kind: Kind) -> AsyncGenerator[Database]:
    """An open Database with alice and bob in it, through PgBouncer."""
    async with Database.from_url(url, prepared_statements=kind[2]) as database:
        await database.users.create("alice", email="alice@example.org", name="Alice")
        await database.users.create("bob", email="bob@example.org", name="Bob")
        yield database


@asynccontextmanager
async def client(url: str) -> AsyncGenerator[Connection]:
    """A connection of another program through the same pooler."""
    connection = await asyncpg.connect(url, statement_cache_size=0)
    try:
        yield connection
    finally:
        await connection.close()


async def left_for_the_next(url: str) -> tuple[object, ...]:
    async with client(url) as next_one:
        row = await next_one.fetchrow(_LEFT)
    assert row is not None
    return tuple(row)


class Watcher:
    """Reads the state of every backend of a database, as a superuser."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def until(self, number: int, condition: str) -> None:
        """Wait until this number of the application's backends matches."""
        async with asyncio.timeout(30):
            while number != await self._connection.fetchval(  # noqa: ASYNC110  # nothing sets an event
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                f" AND usename IN ('{LOGIN}', '{OWNER}') AND {condition}"
            ):
                await asyncio.sleep(0.01)

    async def kill_idle(self) -> int:
        """Terminate the idle backends; return how many there were."""
        killed = await self._connection.fetchval(
            "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity"
            f" WHERE datname = current_database() AND usename = '{LOGIN}' AND state = 'idle'"
        )
        return int(killed)


@pytest_asyncio.fixture
async def watcher(
    todo_postgres: EmbeddedPostgres, todo_database_name: str
) -> AsyncGenerator[Watcher]:
    connection = await asyncpg.connect(
        todo_postgres.url(user="postgres", database=todo_database_name)
    )
    yield Watcher(connection)
    await connection.close()


BUSY: Final = "state <> 'idle'"
ASLEEP: Final = "wait_event = 'PgSleep'"


class TestRepositories:
    async def test_no_call_crosses_users(self, db: Database, owner: Connection) -> None:
        victim = await attacks.plant_victim(db)
        await attacks.repositories_do_not_cross(db, owner, victim)

    async def test_no_call_of_a_transaction_crosses_users(
        self, db: Database, owner: Connection
    ) -> None:
        victim = await attacks.plant_victim(db)
        before = await attacks.rows_of(owner, "alice")
        async with db.transaction("mallory") as tx:
            await attacks.attack(tx, victim)
        assert await attacks.rows_of(owner, "alice") == before

    async def test_raw_sql_does_not_cross(self, db: Database, owner: Connection) -> None:
        await attacks.raw_sql_does_not_cross(db, owner, await attacks.plant_victim(db))

    @pytest.mark.parametrize("login", [LOGIN])
    async def test_cancelled_transactions_leave_nothing(
        self, db: Database, watcher: Watcher
    ) -> None:
        await attacks.plant_victim(db)
        for step in range(60):
            call = asyncio.create_task(db.tasks.create("alice", "cut off"))
            for _ in range(step % 30):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            async with asyncio.timeout(30), db.transaction("mallory") as tx:
                assert await attacks.rows(tx, "SELECT DISTINCT user_id FROM tasks") == ["mallory"]
        await watcher.until(0, BUSY)

    @pytest.mark.parametrize("login", [LOGIN])
    async def test_two_processes_at_once(self, db: Database, url: str, kind: Kind) -> None:
        other = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _OTHER_PROCESS, url, str(kind[2])),
            stdout=asyncio.subprocess.PIPE,
        )
        assert other.stdout is not None
        async with asyncio.timeout(300):
            assert await other.stdout.readline() == b"ready\n"
            created = 0
            while other.returncode is None and created < 60:
                task = await db.tasks.create("alice", f"{created}")
                assert (await db.tasks.toggle("alice", task.id)).completed
                assert {t.user_id for t in (await db.tasks.list("alice")).items} == {"alice"}
                created += 1
            assert await other.wait() == 0
        assert created
        assert await db.tasks.count("alice", completed=True) == created


class TestRoundTrips:
    @pytest.mark.parametrize("kind", [NEON, (TRIXIE, 200, True)], ids=_named)
    async def test_each_call_is_three(self, url: str, kind: Kind, owner: Connection) -> None:
        counted = await self._counted(url, kind, owner)
        assert counted == {name: [3, 3] * len(calls) for name, calls in CALLS.items()}

    @pytest.mark.parametrize("kind", [(TRIXIE, 0, False), OLD], ids=_named)
    @pytest.mark.parametrize("login", [LOGIN])
    async def test_each_call_is_four_without_prepared_statements(
        self, url: str, kind: Kind, owner: Connection
    ) -> None:
        counted = await self._counted(url, kind, owner)
        assert counted == {name: [4, 4] * len(calls) for name, calls in CALLS.items()}

    @staticmethod
    async def _counted(url: str, kind: Kind, owner: Connection) -> dict[str, list[int]]:
        people = People(owner)
        counted: dict[str, list[int]] = {}
        async with (
            Proxy(url) as proxy,
            Database.from_url(
                proxy.url,
                pool_size=1,
                max_overflow=0,
                retry_attempts=1,
                prepared_statements=kind[2],
            ) as near,
        ):
            for name, calls in CALLS.items():
                for call in calls:
                    with suppress(TodoDBError):  # the first use of its statement
                        await call(near, *await people.present())
                    present = await proxy.turns(call(near, *await people.present()))
                    absent = await proxy.turns(call(near, *people.absent()))
                    counted.setdefault(name, []).extend((present, absent))
        return counted


@pytest.mark.parametrize("size", [1])
@pytest.mark.parametrize("kind", [NEON, OLD], ids=_named)
class TestOneServerConnection:
    """All clients share a single connection to the server."""

    async def test_many_users_at_once_see_their_own(self, url: str, kind: Kind) -> None:
        async with Database.from_url(url, prepared_statements=kind[2]) as db:
            await asyncio.gather(*(self._live(db, user) for user in USERS))
        assert await left_for_the_next(url) == NOTHING

    @pytest.mark.parametrize("login", [LOGIN])
    async def test_many_users_see_their_own_while_calls_are_cancelled(
        self, url: str, kind: Kind, watcher: Watcher
    ) -> None:
        dice = random.Random(7)  # noqa: S311  # not for secrets
        async with Database.from_url(
            url, pool_size=2, max_overflow=0, prepared_statements=kind[2]
        ) as db:
            for user in USERS[:4]:
                await db.users.create(user, email=f"{user}@example.org", name=user)
                await db.tasks.create_many(user, [NewTask(user)] * 3)
            for _ in range(30):
                calls = [
                    asyncio.create_task(call(db, user))
                    for user in USERS[:4]
                    for call in (self._seen, self._failing)
                ]
                await asyncio.sleep(dice.random() * 0.01)
                for call in dice.sample(calls, 4):
                    call.cancel()
                async with asyncio.timeout(30):
                    results = await asyncio.gather(*calls, return_exceptions=True)
                assert {type(result) for result in results} <= {
                    asyncio.CancelledError,
                    LookupError,
                    set,
                }
            async with asyncio.timeout(30):
                for user in USERS[:4]:
                    assert await self._seen(db, user) == {user}
            pool = (await db.health()).pool
            assert (pool.in_use, pool.waiting) == (0, 0)
        await watcher.until(0, BUSY)
        assert await left_for_the_next(url) == NOTHING

    @pytest.mark.parametrize(
        "leaving",
        [
            "SELECT set_config('todo_db.user_id', 'bob', false)",
            "SELECT set_config('todo_db.left', 'here', false)",
            "SELECT set_config('work_mem', '1MB', false)",
            "SELECT set_config('search_path', 'pg_catalog', false)",
            "SELECT set_config('default_transaction_read_only', 'on', false)",
            "SELECT pg_advisory_lock(42)",
            "SELECT pg_advisory_lock_shared(42)",
        ],
    )
    @pytest.mark.parametrize("login", [LOGIN])
    async def test_own_sql_leaves_nothing(
        self, db: Database, url: str, watcher: Watcher, leaving: str
    ) -> None:
        async with db.transaction("alice") as tx:
            await tx.execute(text(leaving))
        assert await left_for_the_next(url) == NOTHING
        with pytest.raises(LookupError):
            await db.run("alice", self._then_fails(leaving))
        assert await left_for_the_next(url) == NOTHING
        with pytest.raises(ZeroDivisionError):
            async with db.transaction("alice") as tx:
                await tx.execute(text(leaving))
                with pytest.raises(Exception, match="division by zero"):
                    await tx.execute(text("SELECT 1 / 0"))
                raise ZeroDivisionError
        assert await left_for_the_next(url) == NOTHING
        sleeping = asyncio.create_task(db.run("alice", self._then_sleeps(leaving)))
        await watcher.until(1, ASLEEP)
        sleeping.cancel()
        await asyncio.gather(sleeping, return_exceptions=True)
        async with asyncio.timeout(10):
            assert await left_for_the_next(url) == NOTHING
        assert await db.tasks.count("bob") == 0

    @staticmethod
    def _then_fails(sql: str) -> Callable[[Transaction], Awaitable[None]]:
        async def work(tx: Transaction) -> None:
            await tx.execute(text(sql))
            raise LookupError

        return work

    @staticmethod
    def _then_sleeps(sql: str) -> Callable[[Transaction], Awaitable[None]]:
        async def work(tx: Transaction) -> None:
            await tx.execute(text(sql))
            await tx.execute(text("SELECT pg_sleep(4)"))

        return work

    @staticmethod
    async def _seen(db: Database, user: str) -> set[str]:
        async with db.transaction(user) as tx:
            await tx.tasks.create(user, user)
            rows = await tx.execute(text("SELECT user_id FROM tasks UNION SELECT id FROM users"))
            found = {row[0] for row in rows}
        assert found == {user}
        return found

    @staticmethod
    async def _failing(db: Database, user: str) -> None:
        async with db.transaction(user) as tx:
            await tx.tasks.create(user, "undone")
            raise LookupError

    async def _live(self, db: Database, user: str) -> None:
        await db.users.create(user, email=f"{user}@example.org", name=user)
        for number in range(5):
            assert await self._seen(db, user) == {user}
            with pytest.raises(LookupError):
                await self._failing(db, user)
            task = await db.tasks.create(user, f"{user} {number}")
            assert (await db.tasks.get(user, task.id)).user_id == user
            assert [task.user_id async for task in db.tasks.iterate(user)] == [user] * (
                2 * (number + 1)
            )


class TestConnecting:
    @pytest.mark.parametrize("login", [LOGIN])
    async def test_startup_parameters_are_accepted(self, db: Database) -> None:
        async with db.transaction("alice") as tx:
            assert await attacks.rows(tx, "SHOW application_name") == ["todo_db"]
            assert await attacks.rows(tx, "SHOW statement_timeout") == ["5s"]
            assert await attacks.rows(tx, "SHOW lock_timeout") == ["3s"]
            assert await attacks.rows(tx, "SHOW idle_in_transaction_session_timeout") == ["10s"]
        assert (await db.health()).ok

    @pytest.mark.parametrize("kind", [NEON, OLD], ids=_named)
    @pytest.mark.parametrize("login", [LOGIN])
    async def test_wrong_password_is_refused_at_once(
        self, pooler: PgBouncer, todo_database_name: str, login: str
    ) -> None:
        url = pooler.url(login, todo_database_name, password="wrong")  # noqa: S106  # it is
        async with asyncio.timeout(10):
            with pytest.raises(ConfigurationError):
                await Database.from_url(url).open()


class TestMigrations:
    @pytest.mark.parametrize("login", [OWNER])
    async def test_run_through_the_pooler_back_and_forth(
        self, url: str, owner: Connection, todo_postgres: EmbeddedPostgres
    ) -> None:
        del todo_postgres
        await downgrade(url, "base")
        assert await owner.fetchval("SELECT to_regclass('tasks')") is None
        await upgrade(url)
        await upgrade(url)
        assert await owner.fetchval("SELECT version_num FROM todo_db_version") == REVISION


@pytest.mark.parametrize("login", [LOGIN])
@pytest.mark.parametrize("kind", [NEON, OLD], ids=_named)
class TestFaults:
    @pytest_asyncio.fixture
    async def pooler(self, poolers: Poolers, kind: Kind) -> AsyncGenerator[PgBouncer]:
        """A PgBouncer of this test's own, to be killed."""
        async with poolers.new(kind) as pooler:
            yield pooler

    async def test_killed_and_started_again_between_calls_is_not_noticed(
        self, db: Database, pooler: PgBouncer
    ) -> None:
        for number in range(3):
            pooler.kill()
            await pooler.start()
            await db.tasks.create("alice", f"{number}")
        assert await db.tasks.count("alice") == 3

    async def test_call_waits_for_it_to_come_back(self, db: Database, pooler: PgBouncer) -> None:
        pooler.kill()
        call = asyncio.create_task(db.tasks.create("alice", "patient"))
        await asyncio.sleep(0.2)
        await pooler.start()
        async with asyncio.timeout(20):
            await call
        assert await db.tasks.count("alice") == 1

    async def test_killed_for_good_is_unavailable(
        self, url: str, kind: Kind, pooler: PgBouncer
    ) -> None:
        async with Database.from_url(
            url,
            prepared_statements=kind[2],
            connect_retry_seconds=0.5,
            retry_timeout_seconds=0.5,
        ) as db:
            await db.tasks.count("alice")
            pooler.kill()
            async with asyncio.timeout(10):
                with pytest.raises(UnavailableError):
                    await db.tasks.count("alice")
                assert not (await db.health()).ok
            await pooler.start()
            assert await db.tasks.count("alice") == 0

    async def test_killed_while_a_statement_runs_is_unavailable(
        self, url: str, kind: Kind, db: Database, pooler: PgBouncer, watcher: Watcher
    ) -> None:
        async def slow(tx: Transaction) -> None:
            await tx.tasks.create("alice", "lost")
            await tx.execute(text("SELECT pg_sleep(4)"))

        async with Database.from_url(
            url, prepared_statements=kind[2], retry_attempts=1
        ) as impatient:
            call = asyncio.create_task(impatient.run("alice", slow))
            await watcher.until(1, ASLEEP)
            pooler.kill()
            async with asyncio.timeout(10):
                with pytest.raises(UnavailableError):
                    await call
        await pooler.start()
        assert await db.tasks.count("alice") == 0

    async def test_killed_while_a_statement_runs_it_runs_again(
        self, db: Database, pooler: PgBouncer, watcher: Watcher
    ) -> None:
        tries = 0

        async def slow_at_first(tx: Transaction) -> None:
            nonlocal tries
            tries += 1
            await tx.tasks.create("alice", "once")
            if tries == 1:
                await tx.execute(text("SELECT pg_sleep(4)"))

        call = asyncio.create_task(db.run("alice", slow_at_first))
        await watcher.until(1, ASLEEP)
        pooler.kill()
        await pooler.start()
        async with asyncio.timeout(20):
            await call
        assert tries > 1
        assert await db.tasks.count("alice") == 1

    async def test_lost_at_commit_is_unknown(self, url: str, kind: Kind, db: Database) -> None:
        async with (
            Proxy(url) as proxy,
            Database.from_url(proxy.url, prepared_statements=kind[2]) as near,
        ):
            proxy.break_at(COMMIT, Fault.CUT_AFTER)
            with pytest.raises(OutcomeUnknownError):
                await near.tasks.create("alice", "stored")
            await near.tasks.create("bob", "stored too")
        assert (await db.tasks.count("alice"), await db.tasks.count("bob")) == (1, 1)

    async def test_reconnect_under_calls_is_not_noticed(
        self, db: Database, pooler: PgBouncer
    ) -> None:
        async def work(user: str) -> None:
            for number in range(4):
                await db.tasks.create(user, f"{number}")
                assert {task.user_id for task in (await db.tasks.list(user)).items} == {user}

        for _ in range(5):
            await asyncio.gather(work("alice"), work("bob"), pooler.console("RECONNECT"))
        assert (await db.tasks.count("alice"), await db.tasks.count("bob")) == (20, 20)

    async def test_pause_makes_calls_wait(
        self, db: Database, pooler: PgBouncer, owner: Connection
    ) -> None:
        await pooler.console("PAUSE")
        call = await still_waiting(db.tasks.create("alice", "patient"), 0.3)
        assert await owner.fetchval("SELECT count(*) FROM tasks") == 0
        await pooler.console("RESUME")
        async with asyncio.timeout(10):
            await call
        assert await owner.fetchval("SELECT count(*) FROM tasks") == 1

    async def test_idle_backends_killed_under_it_are_not_noticed(
        self, db: Database, watcher: Watcher
    ) -> None:
        for number in range(3):
            await db.tasks.create("alice", f"{number}")
            await watcher.until(0, BUSY)
            assert await watcher.kill_idle()
        assert await db.tasks.count("alice") == 3

    async def test_P14_statements_prepared_before_a_change_of_the_schema_heal(
        self, db: Database, owner: Connection, pooler: PgBouncer
    ) -> None:
        task = await db.tasks.create("alice", "Buy milk")
        for length in (300, 250):
            assert await db.tasks.get("alice", task.id) == task
            await owner.execute(f"ALTER TABLE tasks ALTER title TYPE varchar({length})")
        assert await db.tasks.get("alice", task.id) == task
        # Prepared before the change, and used on server connections opened after it.
        await pooler.console("RECONNECT")
        assert await db.tasks.get("alice", task.id) == task
        assert (await db.tasks.toggle("alice", task.id)).completed
