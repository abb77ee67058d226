"""What is known of a change in one round trip when its connection, server or pooler fails."""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from typing import Any, Final, NamedTuple

import pytest
import pytest_asyncio
from cluster import Cluster
from pgbouncer import TRIXIE, PgBouncer
from place import ASLEEP, BOUND, WAITING, Place, assert_healthy, still_waiting
from proxy import Fault, Proxy, Sender, until

from todo_db import (
    CallTimeoutError,
    Database,
    NewTask,
    OutcomeUnknownError,
    Settings,
    UnavailableError,
)
from todo_db.embedded import EmbeddedPostgres
from todo_db.logins import create_login
from todo_db.migrations import upgrade
from todo_db.records import TaskRecord

pytestmark = pytest.mark.fault

TEMPLATE: Final = "todo_template"
SINGLE: Final = "single_login"
TRIPLE: Final = "triple_login"
"""Its calls take three round trips, because it has no timeouts of its own."""
ANSWER: Final = b"Z\x00\x00\x00\x05I"
"""The end of every answer outside a transaction: ReadyForQuery."""
USERS_OF_PLACE: Final = """
    INSERT INTO users (id, email) VALUES ('alice', 'alice@example.org'), ('bob', 'bob@example.org')
"""
CREATED: Final = datetime(2020, 1, 1, tzinfo=UTC)
_numbers: Final = count(1)


async def prepare(server: Cluster) -> None:
    owner = await server.create_database(TEMPLATE)
    await upgrade(owner)
    await create_login(owner, Settings(), SINGLE)
    await server.execute(f"CREATE ROLE {TRIPLE} LOGIN IN ROLE todo_app")


@pytest_asyncio.fixture(scope="module")
async def server(todo_postgres: EmbeddedPostgres) -> AsyncGenerator[Cluster]:
    """A durable server. A test that stops or kills it must start it again."""
    del todo_postgres  # creates the user that this one runs as
    with Cluster(18, durable=True, max_connections=100) as server:
        await prepare(server)
        yield server


@pytest_asyncio.fixture
async def place(server: Cluster) -> AsyncGenerator[Place]:
    name = f"todo_{next(_numbers)}"
    await server.execute(
        f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} OWNER todo_owner",
        f"REVOKE TEMPORARY ON DATABASE {name} FROM PUBLIC",
    )
    place = Place(server, name, SINGLE)
    await place.execute(USERS_OF_PLACE)
    yield place
    if not server.is_running:
        server.start()
    await server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def pooler_settings() -> dict[str, object]:
    """PgBouncer settings, in addition to Neon's."""
    return {}


@pytest_asyncio.fixture
async def pooler(server: Cluster, pooler_settings: dict[str, object]) -> AsyncGenerator[PgBouncer]:
    # With the default, PgBouncer would wait 15 s after each restart.
    settings: dict[str, Any] = {
        "max_prepared_statements": 1000,
        "server_login_retry": 1,
        "auth_type": "trust",
    }
    url = server.url("postgres", "postgres")
    async with PgBouncer(TRIXIE, url, **settings | pooler_settings) as pooler:
        yield pooler


@pytest.fixture(params=["direct", "pooled"])
def way(request: pytest.FixtureRequest, place: Place) -> Callable[[str], str]:
    """The URL of a login, to the server or through PgBouncer."""
    if request.param == "direct":
        return place.url
    pooler: PgBouncer = request.getfixturevalue("pooler")
    return lambda login: pooler.url(login, place.name)


direct: Final = pytest.mark.parametrize("way", ["direct"], indirect=True)
pooled: Final = pytest.mark.parametrize("way", ["pooled"], indirect=True)


@asynccontextmanager
async def opened(url: str, trips: int = 1, **settings: object) -> AsyncGenerator[Database]:
    async with Database.from_url(url, **settings) as database:
        assert (await database.health()).round_trips == trips
        yield database


@pytest_asyncio.fixture
async def db(way: Callable[[str], str]) -> AsyncGenerator[Database]:
    async with opened(way(SINGLE)) as database:
        yield database


@pytest_asyncio.fixture
async def once(way: Callable[[str], str]) -> AsyncGenerator[Database]:
    """The same without retries."""
    async with opened(way(SINGLE), retry_attempts=1) as database:
        yield database


# What a task may be at the end: its title and whether it is completed, or None if it is gone.
type State = tuple[str, bool] | None


@dataclass
class Log:
    """What the callers of one kind of login were told."""

    states: dict[int, set[State]] = field(default_factory=dict[int, set[State]])
    refused: set[str] = field(default_factory=set[str])
    unknown: list[set[str]] = field(default_factory=list[set[str]])
    told: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])

    @property
    def failures(self) -> int:
        return self.told["UnavailableError"] + self.told["OutcomeUnknownError"]


class Writer:
    """Makes unkeyed changes of one user, until it is stopped, and notes what it is told of each."""

    def __init__(self, db: Database, log: Log, user: str, name: str) -> None:
        self._db = db
        self._log = log
        self._user = user
        self._name = name
        self._numbers = count(1)
        self._dice = random.Random(name)  # noqa: S311  # the same every time
        # Those of its tasks whose state is known.
        self._sure: dict[int, tuple[str, bool]] = {}

    async def write(self, stop: asyncio.Event) -> None:
        changes = (self._toggle, self._update, self._delete)
        while not stop.is_set():
            if len(self._sure) < 5 or self._dice.random() < 0.5:
                await self._dice.choice((self._create, self._create_many))()
            else:
                task_id = self._dice.choice(list(self._sure))
                await self._dice.choice(changes)(task_id, *self._sure[task_id])

    def _title(self) -> str:
        return f"{self._name} {next(self._numbers)}"

    async def _create(self) -> None:
        title = self._title()
        await self._created({title}, self._as_list(self._db.tasks.create(self._user, title)))

    async def _create_many(self) -> None:
        titles = [self._title() for _ in range(3)]
        new = [NewTask(title) for title in titles]
        await self._created(set(titles), self._db.tasks.create_many(self._user, new))

    @staticmethod
    async def _as_list(call: Awaitable[TaskRecord]) -> list[TaskRecord]:
        return [await call]

    async def _created(self, titles: set[str], call: Awaitable[list[TaskRecord]]) -> None:
        try:
            tasks = await call
        except UnavailableError:
            self._log.told["UnavailableError"] += 1
            self._log.refused |= titles
        except OutcomeUnknownError:
            self._log.told["OutcomeUnknownError"] += 1
            self._log.unknown.append(titles)
        else:
            self._log.told["acknowledged"] += 1
            for task in tasks:
                self._be_sure(task.id, (task.title, task.completed))

    def _be_sure(self, task_id: int, state: tuple[str, bool]) -> None:
        self._sure[task_id] = state
        self._log.states[task_id] = {state}

    async def _changed(
        self, task_id: int, old: tuple[str, bool], new: State, call: Awaitable[TaskRecord | None]
    ) -> None:
        try:
            task = await call
        except UnavailableError:
            self._log.told["UnavailableError"] += 1
        except OutcomeUnknownError:
            self._log.told["OutcomeUnknownError"] += 1
            del self._sure[task_id]
            self._log.states[task_id] = {old, new}
        except Exception as error:  # noqa: BLE001  # such as TaskNotFoundError
            del self._sure[task_id]
            self._log.wrong.append(f"{type(error).__name__}: {error}")
        else:
            self._log.told["acknowledged"] += 1
            if new is None:
                del self._sure[task_id]
                self._log.states[task_id] = {None}
            else:
                self._be_sure(task_id, new)
                if task is None or (task.title, task.completed) != new:
                    self._log.wrong.append(f"{task} is not {new}")

    async def _toggle(self, task_id: int, title: str, completed: bool) -> None:  # noqa: FBT001
        call = self._db.tasks.toggle(self._user, task_id)
        await self._changed(task_id, (title, completed), (title, not completed), call)

    async def _update(self, task_id: int, title: str, completed: bool) -> None:  # noqa: FBT001
        new = self._title()
        call = self._db.tasks.update(self._user, task_id, title=new)
        await self._changed(task_id, (title, completed), (new, completed), call)

    async def _delete(self, task_id: int, title: str, completed: bool) -> None:  # noqa: FBT001
        call = self._db.tasks.delete(self._user, task_id)
        await self._changed(task_id, (title, completed), None, call)


class TestTerminated:
    """Many backends are terminated in the middle of their work, 57P01, also while they commit."""

    TERMINATIONS: Final = {SINGLE: 1_000, TRIPLE: 300}

    @pytest_asyncio.fixture
    async def server(self, todo_postgres: EmbeddedPostgres) -> AsyncGenerator[Cluster]:
        """On a disk; and each commit takes a millisecond more, to be interrupted in."""
        del todo_postgres
        delay = {"commit_delay": 1000, "commit_siblings": 0}
        with Cluster(18, durable=True, in_memory=False, max_connections=100, **delay) as server:
            await prepare(server)
            yield server

    async def test_acknowledged_is_stored_once_and_refused_is_not(
        self,
        way: Callable[[str], str],
        place: Place,
        capsys: pytest.CaptureFixture[str],
        request: pytest.FixtureRequest,
    ) -> None:
        logs = {SINGLE: Log(), TRIPLE: Log()}
        begun = time.monotonic()
        async with AsyncExitStack() as stack:
            stop = asyncio.Event()
            writers: list[Writer] = []
            for login, trips in ((SINGLE, 1), (TRIPLE, 3)):
                # Half of the callers see each failure, and the others only what retries leave.
                for attempts in (1, 5):
                    db = await stack.enter_async_context(
                        opened(way(login), trips, retry_attempts=attempts, pool_size=3)
                    )
                    for number, user in enumerate(("alice", "bob", "alice")):
                        name = f"{login} {attempts} {number}"
                        writers.append(Writer(db, logs[login], user, name))
            async with asyncio.TaskGroup() as group:
                for writer in writers:
                    group.create_task(writer.write(stop))
                async with asyncio.TaskGroup() as killers:
                    waits = {
                        login: killers.create_task(self._terminate(place, login, number))
                        for login, number in self.TERMINATIONS.items()
                    }
                stop.set()
        # All statements have ended, those of lost connections too.
        await place.until_backends(0, "state <> 'idle'")
        with capsys.disabled():
            for login, log in logs.items():
                told, doing = dict(log.told), dict(waits[login].result())
                print(f"\n{request.node.name} {login}: {told}, {doing}", end="")  # noqa: T201
            print(f" {time.monotonic() - begun:.0f} s", end=" ")  # noqa: T201
        await self._assert_true(place, logs)
        one, three = logs[SINGLE], logs[TRIPLE]
        # Each termination is seen once, if the server had not just answered.
        assert one.failures >= 100
        assert one.told["OutcomeUnknownError"] / one.failures <= (
            three.told["OutcomeUnknownError"] / three.failures
        )

    @staticmethod
    async def _terminate(place: Place, login: str, number: int) -> Counter[str]:
        """Terminate so many busy backends; return what they were waiting for."""
        waits: Counter[str] = Counter()
        async with place.superuser() as connection:
            while waits.total() < number:
                waits.update(
                    row[0]
                    for row in await connection.fetch(
                        "SELECT event, pg_terminate_backend(pid) FROM (SELECT pid,"
                        " coalesce(wait_event, 'nothing') AS event FROM pg_stat_activity"
                        " WHERE datname = current_database() AND usename = $1"
                        " AND state = 'active' ORDER BY random() LIMIT 1)",
                        login,
                    )
                )
                await asyncio.sleep(0.004)
        return waits

    @staticmethod
    async def _assert_true(place: Place, logs: dict[str, Log]) -> None:
        async with place.superuser() as connection:
            rows = await connection.fetch("SELECT id, title, completed FROM tasks")
        stored: dict[int, State] = {row["id"]: (row["title"], row["completed"]) for row in rows}
        states = {
            task_id: allowed for log in logs.values() for task_id, allowed in log.states.items()
        }
        unknown = [titles for log in logs.values() for titles in log.unknown]
        assert [line for log in logs.values() for line in log.wrong] == []
        # Whatever is known to be stored is, once, as it was told.
        assert {
            task_id: stored.get(task_id)
            for task_id, allowed in states.items()
            if stored.get(task_id) not in allowed
        } == {}
        # What else is stored was unknown: all of a call or nothing, and once.
        others = Counter(state[0] for key, state in stored.items() if key not in states and state)
        assert others.keys() & {title for log in logs.values() for title in log.refused} == set()
        assert others.keys() <= set[str]().union(*unknown)
        assert all(number == 1 for number in others.values())
        assert all(titles & others.keys() in (set(), titles) for titles in unknown)


type Call = Callable[[Database, list[int]], Awaitable[object]]


class Kind(NamedTuple):
    """One kind of change of alice, whose tasks are `ids`.

    Attributes:
        call: The change.
        query: What shows whether it was applied, and how often.
        after: What that returns once it was applied once.
    """

    call: Call
    query: str
    after: str


TASKS: Final = "SELECT string_agg(title || completed, ' ' ORDER BY id) FROM tasks"
USERS: Final = "SELECT string_agg(id || name, ' ' ORDER BY id) FROM users"
# alice has three tasks: a is completed, b and c are not.
KINDS: Final = {
    "create": Kind(
        lambda db, _ids: db.tasks.create("alice", "d"), TASKS, "atrue bfalse cfalse dfalse"
    ),
    "create_many": Kind(
        lambda db, _ids: db.tasks.create_many("alice", [NewTask("d"), NewTask("e")]),
        TASKS,
        "atrue bfalse cfalse dfalse efalse",
    ),
    "create with a key": Kind(
        lambda db, _ids: db.tasks.create("alice", "d", idempotency_key="key"),
        TASKS,
        "atrue bfalse cfalse dfalse",
    ),
    "create_many with a key": Kind(
        lambda db, _ids: db.tasks.create_many("alice", [NewTask("d")] * 2, idempotency_key="key"),
        TASKS,
        "atrue bfalse cfalse dfalse dfalse",
    ),
    "update": Kind(
        lambda db, ids: db.tasks.update("alice", ids[1], title="B"), TASKS, "atrue Bfalse cfalse"
    ),
    "update of a version": Kind(
        lambda db, ids: db.tasks.update(
            "alice", ids[1], expected_updated_at=CREATED, completed=True
        ),
        TASKS,
        "atrue btrue cfalse",
    ),
    "toggle": Kind(lambda db, ids: db.tasks.toggle("alice", ids[1]), TASKS, "atrue btrue cfalse"),
    "delete": Kind(lambda db, ids: db.tasks.delete("alice", ids[1]), TASKS, "atrue cfalse"),
    "update_many": Kind(
        lambda db, ids: db.tasks.update_many("alice", ids, completed=True),
        TASKS,
        "atrue btrue ctrue",
    ),
    "delete_many": Kind(lambda db, ids: db.tasks.delete_many("alice", ids[:2]), TASKS, "cfalse"),
    "delete_completed": Kind(
        lambda db, _ids: db.tasks.delete_completed("alice"), TASKS, "bfalse cfalse"
    ),
    "users.create": Kind(
        lambda db, _ids: db.users.create("carol", email="not-alice@example.org", name="Carol"),
        USERS,
        "alice bob carolCarol",
    ),
    "users.ensure": Kind(
        lambda db, _ids: db.users.ensure("carol", email="not-alice@example.org", name="Carol"),
        USERS,
        "alice bob carolCarol",
    ),
    "users.update": Kind(
        lambda db, _ids: db.users.update("alice", name="Alice"), USERS, "aliceAlice bob"
    ),
    "users.delete": Kind(lambda db, _ids: db.users.delete("alice"), USERS, "bob"),
}
REPEATABLE: Final = {
    "create with a key",
    "create_many with a key",
    "update",
    "delete",
    "users.ensure",
    "users.update",
    "users.delete",
}


class Cut(NamedTuple):
    """Where the connection is cut: at what `sender` sends with the bytes `at`."""

    sender: Sender
    at: bytes
    fault: Fault


CUTS: Final = {
    "before the statement arrives": Cut("client", b"alice", Fault.CUT_BEFORE),
    "instead of the answer": Cut("client", b"alice", Fault.CUT_AFTER),
    "before the answer arrives": Cut("server", ANSWER, Fault.CUT_BEFORE),
    "after the answer": Cut("server", ANSWER, Fault.CUT_AFTER),
}


class TestCut:
    """The connection is cut around the statement and its answer, for each kind of change."""

    @staticmethod
    async def _begin_again(place: Place) -> list[int]:
        async with place.superuser() as connection:
            await connection.execute("TRUNCATE users CASCADE")
            await connection.execute(USERS_OF_PLACE)
            rows = await connection.fetch(
                "INSERT INTO tasks (user_id, title, completed, created_at, updated_at) SELECT"
                " 'alice', title, title = 'a', $1, $1 FROM unnest('{a,b,c}'::text[]) AS title"
                " RETURNING id",
                CREATED,
            )
        return [row[0] for row in rows]

    @staticmethod
    async def _found(place: Place, query: str) -> str:
        await place.until_backends(0, "state <> 'idle'")
        async with place.superuser() as connection:
            return str(await connection.fetchval(query))

    @staticmethod
    async def _told(call: Awaitable[object]) -> str:
        try:
            async with asyncio.timeout(BOUND):
                await call
        except OutcomeUnknownError:
            return "unknown"
        return "applied"

    @pytest.mark.parametrize("attempts", [1, 5], ids=["once", "retried"])
    @pytest.mark.parametrize("name", KINDS)
    async def test_is_never_doubled_and_never_said_to_be_safe_to_repeat(
        self, place: Place, name: str, attempts: int
    ) -> None:
        call, query, after = KINDS[name]
        is_repeated = name in REPEATABLE and attempts > 1
        told: dict[str, tuple[str, str]] = {}
        expected: dict[str, tuple[str, str]] = {}
        async with (
            Proxy(place.url()) as proxy,
            opened(proxy.url, retry_attempts=attempts, pool_size=1, max_overflow=0) as db,
        ):
            for where, cut in CUTS.items():
                ids = await self._begin_again(place)
                before = await self._found(place, query)
                proxy.break_at(cut.at, cut.fault, sender=cut.sender)
                told[where] = await self._told(call(db, ids)), await self._found(place, query)
                assert not proxy.pending
                assert before != after
                expected[where] = "unknown", after
                if is_repeated or where == "after the answer":
                    expected[where] = "applied", after
                elif where == "before the statement arrives":
                    expected[where] = "unknown", before
                await assert_healthy(db)
        assert told == expected

    async def test_read_is_tried_again_and_nothing_but_a_read_is_sent(self, place: Place) -> None:
        async with Proxy(place.url()) as proxy, opened(proxy.url, pool_size=1) as db:
            for cut in CUTS.values():
                proxy.break_at(cut.at, cut.fault, sender=cut.sender)
                assert await db.tasks.count("alice") == 0
                assert not proxy.pending
                await assert_healthy(db)

    async def test_read_that_is_always_cut_is_tried_as_often_as_any_call(
        self, place: Place
    ) -> None:
        """A statement that brings the server down must not do so for twenty seconds."""
        async with Proxy(place.url()) as proxy, opened(proxy.url) as db:
            proxy.break_at(b"alice", Fault.CUT_BEFORE, times=100)
            async with asyncio.timeout(BOUND):
                with pytest.raises(UnavailableError):
                    await db.tasks.count("alice")
            assert 100 - proxy.pending == 5

    async def test_keyed_call_after_an_unknown_one_tells_its_outcome(self, place: Place) -> None:
        async with (
            Proxy(place.url()) as proxy,
            opened(proxy.url, retry_attempts=1, pool_size=1) as db,
        ):
            for number, fault in enumerate((Fault.CUT_BEFORE, Fault.CUT_AFTER)):
                proxy.break_at(b"alice", fault)
                with pytest.raises(OutcomeUnknownError):
                    await db.tasks.create("alice", f"{number}", idempotency_key=f"{number}")
                await db.tasks.create("alice", f"{number}", idempotency_key=f"{number}")
        assert await place.titles() == ["0", "1"]


class TestIdle:
    """The connection had been lost before it was used."""

    @pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "not noticed"])
    @direct
    async def test_hundred_of_a_hundred_are_created(
        self,
        db: Database,
        once: Database,
        place: Place,
        noticed: bool,  # noqa: FBT001
    ) -> None:
        await once.close()
        for number in range(100):
            await db.tasks.count("alice")
            pids = [connection.driver.get_server_pid() for connection in db._pool._idle]
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            while any(map(os.path.exists, [f"/proc/{pid}" for pid in pids])):
                # The event loop runs and reads the socket, or does not.
                if noticed:
                    await asyncio.sleep(0.001)
                else:
                    time.sleep(0.001)  # noqa: ASYNC251
            await db.tasks.create("alice", f"{number}")
        assert await place.titles() == [f"{number}" for number in range(100)]
        await assert_healthy(db)

    @pooled
    async def test_behind_a_pooler_too(self, db: Database, place: Place) -> None:
        for number in range(100):
            await asyncio.gather(*(db.tasks.count("alice") for _ in range(3)))
            await place.execute(
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{SINGLE}'"
            )
            await db.tasks.create("alice", f"{number}")
        assert await place.titles() == [f"{number}" for number in range(100)]
        await assert_healthy(db)

    @pooled
    async def test_pooler_that_was_started_again_is_not_noticed(
        self, db: Database, pooler: PgBouncer, place: Place
    ) -> None:
        for number in range(5):
            await db.tasks.create("alice", f"{number}")
            pooler.kill()
            await pooler.start()
        assert await place.titles() == [f"{number}" for number in range(5)]
        await assert_healthy(db)

    async def test_sessions_that_the_server_ends_when_idle_are_not_noticed(
        self, place: Place
    ) -> None:
        await place.execute(f"ALTER DATABASE {place.name} SET idle_session_timeout = '30ms'")
        async with opened(place.url(), pool_size=1, max_overflow=0) as db:
            for number in range(60):
                await asyncio.sleep(0.027 + 0.0002 * (number % 30))
                await db.tasks.create("alice", f"{number}")
        assert await place.titles() == [f"{number}" for number in range(60)]


class TestServer:
    """The server ends a session in which a change waits."""

    async def test_terminated_is_not_applied_and_tried_again(
        self, db: Database, once: Database, place: Place
    ) -> None:
        async with place.locked_rows():
            lost = asyncio.create_task(once.tasks.create("alice", "lost"))
            patient = asyncio.create_task(db.tasks.create("alice", "patient"))
            for pid in await place.until_backends(2, WAITING):
                await place.terminate(pid)
            async with asyncio.timeout(BOUND):
                with pytest.raises(UnavailableError):
                    await lost
        async with asyncio.timeout(BOUND):
            await patient
        assert await place.titles() == ["patient"]
        await assert_healthy(db, once)

    async def test_fast_shutdown_is_not_applied_and_waited_for(
        self, db: Database, once: Database, place: Place
    ) -> None:
        await place.make_inserts_wait()
        lost = asyncio.create_task(once.tasks.create("alice", "lost"))
        patient = asyncio.create_task(db.tasks.create("alice", "patient"))
        await place.until_backends(2, ASLEEP)
        await asyncio.to_thread(place.server.stop, "fast")
        async with asyncio.timeout(BOUND):
            with pytest.raises(UnavailableError):
                await lost
        await asyncio.to_thread(place.server.start)
        async with asyncio.timeout(BOUND):
            await patient
        assert await place.titles() == ["patient"]
        await assert_healthy(db)

    @pytest.mark.parametrize("end", ["crash of another", "killed itself", "immediate", "killed"])
    async def test_crash_is_unknown(
        self, db: Database, once: Database, place: Place, end: str
    ) -> None:
        async with place.locked_rows() as holder:
            calls = [asyncio.create_task(each.tasks.create("alice", "lost")) for each in (db, once)]
            (pid, _) = await place.until_backends(2, WAITING)
            match end:
                case "crash of another":
                    # The others get 57P02.
                    os.kill(holder.get_server_pid(), signal.SIGKILL)
                case "killed itself":
                    os.kill(pid, signal.SIGKILL)
                case "immediate":
                    await asyncio.to_thread(place.server.stop, "immediate")
                case _:
                    await asyncio.to_thread(place.server.kill)
            async with asyncio.timeout(BOUND):
                for call in calls:
                    with pytest.raises(OutcomeUnknownError):
                        await call
        if not place.server.is_running:
            await asyncio.to_thread(place.server.start)
        await self._until_recovered(once)
        assert await place.titles() == []
        await assert_healthy(db)

    @staticmethod
    async def _until_recovered(db: Database) -> None:
        async with asyncio.timeout(BOUND):
            while not (await db.health()).ok:  # noqa: ASYNC110  # it recovers
                await asyncio.sleep(0.05)

    async def test_repeatable_change_outlives_a_crash(self, db: Database, place: Place) -> None:
        task = await db.tasks.create("alice", "old")
        async with place.locked_rows():
            calls = [
                asyncio.create_task(db.tasks.create("alice", "keyed", idempotency_key="key")),
                asyncio.create_task(db.tasks.update("alice", task.id, title="new")),
            ]
            (pid, _) = await place.until_backends(2, WAITING)
            os.kill(pid, signal.SIGKILL)
            async with asyncio.timeout(BOUND):
                await asyncio.gather(*calls)
        assert await place.titles() == ["new", "keyed"]
        await assert_healthy(db)

    @direct
    async def test_terminated_after_it_was_stored_is_unknown(
        self, db: Database, place: Place
    ) -> None:
        """57P01 is also the code of a warning: the session ends, and the change was stored."""
        async with place.without_its_standby(db) as calls:
            (pid,) = await place.until_backends(1, "wait_event = 'SyncRep'")
            await place.terminate(pid)
            async with asyncio.timeout(BOUND):
                with pytest.raises(OutcomeUnknownError):
                    await calls[-1]
        assert await place.titles() == ["stored"] * len(calls)
        await assert_healthy(db)

    async def test_standby_and_read_only_sessions_are_unavailable(self, place: Place) -> None:
        await place.execute(f"ALTER ROLE {SINGLE} SET default_transaction_read_only = on")
        try:
            async with opened(place.url()) as db:
                for call in (
                    db.tasks.create("alice", "never"),
                    db.tasks.create("alice", "never", idempotency_key="key"),
                    db.users.update("alice", name="Never"),
                ):
                    with pytest.raises(UnavailableError) as failure:
                        await call
                    assert not isinstance(failure.value, CallTimeoutError)
                    assert failure.value.retry_after == 5
                assert await db.tasks.count("alice") == 0
                await assert_healthy(db)
        finally:
            await place.execute(f"ALTER ROLE {SINGLE} RESET default_transaction_read_only")
        assert await place.titles() == []

    @direct
    async def test_standby_reads_and_takes_writes_once_it_is_promoted(
        self, db: Database, place: Place
    ) -> None:
        place.server.stop("fast")
        (place.server.data / "standby.signal").touch()
        place.server.start()
        try:
            assert await db.tasks.count("alice") == 0
            with pytest.raises(UnavailableError):
                await db.tasks.create("alice", "too early")
        finally:
            place.server.promote()
        await db.tasks.create("alice", "in time")
        assert await place.titles() == ["in time"]
        await assert_healthy(db)


class TestTimeout:
    """No answer within `command_timeout`: the peer has vanished, or is slow."""

    @pytest_asyncio.fixture
    async def proxy(self, place: Place) -> AsyncGenerator[Proxy]:
        async with Proxy(place.url()) as proxy:
            yield proxy

    @pytest_asyncio.fixture
    async def hasty(self, proxy: Proxy) -> AsyncGenerator[Database]:
        async with opened(
            proxy.url, command_timeout_seconds=1, pool_size=2, max_overflow=0
        ) as database:
            yield database

    @pytest.mark.parametrize(
        ("fault", "stored"), [(Fault.HANG, []), (Fault.SWALLOW, ["one"])], ids=["hangs", "is mute"]
    )
    async def test_of_a_change_is_unknown(
        self, hasty: Database, proxy: Proxy, place: Place, fault: Fault, stored: list[str]
    ) -> None:
        proxy.break_at(b"alice", fault)
        async with asyncio.timeout(BOUND):
            with pytest.raises(OutcomeUnknownError):
                await hasty.tasks.create("alice", "one")
        assert not proxy.pending
        assert await place.titles() == stored
        await assert_healthy(hasty)

    async def test_of_a_repeatable_change_is_tried_again(
        self, hasty: Database, proxy: Proxy, place: Place
    ) -> None:
        proxy.break_at(b"alice", Fault.SWALLOW)
        async with asyncio.timeout(BOUND):
            await hasty.tasks.create("alice", "one", idempotency_key="key")
        assert not proxy.pending
        assert await place.titles() == ["one"]
        await assert_healthy(hasty)

    async def test_of_a_read_is_raised_at_once_as_in_three_trips(
        self, hasty: Database, proxy: Proxy
    ) -> None:
        """The read itself may be slow: it is not sent again, and no other call waits."""
        await asyncio.gather(hasty.tasks.count("bob"), hasty.tasks.count("bob"))
        proxy.break_at(b"alice", Fault.SWALLOW, times=10)
        call = asyncio.create_task(hasty.tasks.count("alice"))
        await until(lambda: proxy.pending == 9)
        begun = time.monotonic()
        with pytest.raises(CallTimeoutError):
            await call
        assert time.monotonic() - begun < 10
        assert proxy.pending == 9
        assert hasty._pool._failure is None


@pooled
class TestPgBouncer:
    @pytest.mark.parametrize(
        "pooler_settings", [{"query_wait_timeout": 1, "default_pool_size": 1}], ids=["one server"]
    )
    async def test_query_wait_timeout_is_not_applied_and_waited_for(
        self, db: Database, once: Database, place: Place, pooler_settings: dict[str, object]
    ) -> None:
        del pooler_settings
        async with db.transaction("bob"):
            async with asyncio.timeout(BOUND):
                with pytest.raises(UnavailableError):
                    await once.tasks.create("alice", "never")
            patient = await still_waiting(db.tasks.create("alice", "patient"), 1.5)
        async with asyncio.timeout(BOUND):
            await patient
        assert await place.titles() == ["patient"]
        await assert_healthy(db, once)

    async def test_server_that_is_down_is_not_applied_and_waited_for(
        self, db: Database, way: Callable[[str], str], place: Place
    ) -> None:
        async with opened(way(SINGLE), retry_attempts=1, command_timeout_seconds=1) as hasty:
            await assert_healthy(db, hasty)
            await asyncio.to_thread(place.server.stop, "fast")
            async with asyncio.timeout(BOUND):
                # PgBouncer lets the first caller wait, who cannot know for what.
                with pytest.raises((OutcomeUnknownError, UnavailableError)):
                    await hasty.tasks.create("alice", "never")
                for _ in range(3):
                    # "server login has been failing"
                    with pytest.raises(UnavailableError):
                        await hasty.tasks.create("alice", "never")
            patient = await still_waiting(db.tasks.create("alice", "patient"), 0.5)
            await asyncio.to_thread(place.server.start)
            async with asyncio.timeout(BOUND):
                await patient
            assert await place.titles() == ["patient"]
            await assert_healthy(db, hasty)

    async def test_pause_makes_calls_wait(
        self, once: Database, pooler: PgBouncer, place: Place
    ) -> None:
        await pooler.console("PAUSE")
        call = await still_waiting(once.tasks.create("alice", "patient"), 0.3)
        assert await place.titles() == []
        await pooler.console("RESUME")
        async with asyncio.timeout(BOUND):
            await call
        assert await place.titles() == ["patient"]
        await assert_healthy(once)

    async def test_reconnect_under_calls_is_not_noticed(
        self, once: Database, pooler: PgBouncer, place: Place
    ) -> None:
        for number in range(10):
            await asyncio.gather(
                once.tasks.create("alice", f"{number}"), pooler.console("RECONNECT")
            )
        assert await place.titles() == [f"{number}" for number in range(10)]
        await assert_healthy(once)

    @pytest.mark.parametrize("command", ["KILL", "kill -9"])
    async def test_killed_under_a_call_is_unknown(
        self, once: Database, pooler: PgBouncer, place: Place, command: str
    ) -> None:
        async with place.locked_rows():
            call = asyncio.create_task(once.tasks.create("alice", "stored or not"))
            await place.until_backends(1, WAITING)
            if command == "KILL":
                await pooler.console(f"KILL {place.name}")
            else:
                pooler.kill()
            async with asyncio.timeout(BOUND):
                with pytest.raises(OutcomeUnknownError):
                    await call
        # The server goes on with a statement whose client has gone.
        await place.until_backends(0, "state <> 'idle'")
        assert await place.titles() in ([], ["stored or not"])
        if command == "KILL":
            await pooler.console(f"RESUME {place.name}")
        else:
            await pooler.start()
        await assert_healthy(once)

    @pytest.mark.parametrize("pooler_settings", [{"query_timeout": 1}], ids=["query_timeout"])
    async def test_query_timeout_is_unknown(
        self, once: Database, place: Place, pooler_settings: dict[str, object]
    ) -> None:
        del pooler_settings
        async with place.locked_rows(), asyncio.timeout(BOUND):
            with pytest.raises(OutcomeUnknownError):
                await once.tasks.create("alice", "lost")
        await assert_healthy(once)
