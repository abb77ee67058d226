"""Single calls in one round trip: when, how many at the socket, and as in three."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import asyncpg
import pytest
import pytest_asyncio
from driver import Connection
from every_method import CALLS, People
from locks import until_waiting
from pgbouncer import BOOKWORM, TRIXIE, PgBouncer
from proxy import Proxy
from sqlalchemy import bindparam, insert, text

from todo_db import (
    CallTimeoutError,
    ConflictError,
    Database,
    EmailTakenError,
    IdempotencyKeyReusedError,
    NewTask,
    Settings,
    StaleTaskError,
    TaskNotFoundError,
    TaskRecord,
    TaskSort,
    TodoDBError,
    UserIdTakenError,
    UsernameTakenError,
    UserNotFoundError,
    UserRecord,
    autocommit,
)
from todo_db.embedded import LOGIN, OWNER, EmbeddedPostgres
from todo_db.errors import InvalidInputError
from todo_db.inputs import TaskChanges
from todo_db.logins import create_login
from todo_db.models import Task
from todo_db.pagination import Page
from todo_db.repositories import Operation, Statement

ODD: Final = "odd_login"
"""A login that each test makes anew."""
WITH_TIMEOUT: Final = f"ALTER ROLE {ODD} SET statement_timeout = '5s'"
FENCED: Final = "the login is bound by row-level security and has its own timeouts"
UNPROVEN: Final = "the server does not set the user before it runs a statement"
# Proofs that fail: the user is set after it was read, and never.
LATE: Final = """
    SELECT pg_catalog.current_setting('todo_db.user_id', true),
        pg_catalog.set_config('todo_db.user_id', $1, true)
"""
EMPTY: Final = "SELECT $1::text WHERE false"
LONG_AGO: Final = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture
def login() -> str:
    """The other login, where a test needs one: its calls take three round trips."""
    return LOGIN


@pytest_asyncio.fixture
async def proxy(single_url: str) -> AsyncGenerator[Proxy]:
    async with Proxy(single_url) as proxy:
        yield proxy


@pytest_asyncio.fixture
async def single(proxy: Proxy) -> AsyncGenerator[Database]:
    """A Database through the proxy, on one connection that keeps its prepared statements."""
    async with Database.from_url(
        proxy.url, pool_size=1, max_overflow=0, retry_attempts=1
    ) as database:
        yield database


@pytest_asyncio.fixture
async def two(single_url: str) -> AsyncGenerator[Database]:
    """A Database with alice and bob in it, on one connection."""
    async with Database.from_url(
        single_url, pool_size=1, max_overflow=0, retry_attempts=1
    ) as database:
        await database.users.create("alice", email="alice@example.org", name="Alice")
        await database.users.create("bob", email="bob@example.org", name="Bob")
        yield database


@pytest.fixture
def people(owner: Connection) -> People:
    return People(owner)


async def counted(database: Database, proxy: Proxy, people: People) -> dict[str, list[int]]:
    """Count the round trips of every call, for a user with tasks and one who does not exist."""
    trips: dict[str, list[int]] = {}
    for name, calls in CALLS.items():
        for call in calls:
            with suppress(TodoDBError):  # the first use of its statement
                await call(database, *await people.present())
            present = await proxy.turns(call(database, *await people.present()))
            absent = await proxy.turns(call(database, *people.absent()))
            trips.setdefault(name, []).extend((present, absent))
    return trips


def each(trips: int) -> dict[str, list[int]]:
    return {name: [trips, trips] * len(calls) for name, calls in CALLS.items()}


class TestRoundTrips:
    async def test_every_call_is_one(self, single: Database, proxy: Proxy, people: People) -> None:
        assert await counted(single, proxy, people) == each(1)

    @pytest.mark.parametrize("login", [OWNER])
    async def test_under_the_owner_every_call_is_three(self, url: str, people: People) -> None:
        async with (
            Proxy(url) as proxy,
            Database.from_url(proxy.url, pool_size=1, max_overflow=0) as database,
        ):
            assert await counted(database, proxy, people) == each(3)

    async def test_looking_up_a_credential_is_one(self, single: Database, proxy: Proxy) -> None:
        await single.find_credential(session_token="token")  # noqa: S106  # nobody's
        assert await proxy.turns(single.find_credential(session_token="other")) == 1  # noqa: S106
        assert await proxy.turns(single.find_credential(key_id="key")) == 1

    @pytest.mark.parametrize("login", [OWNER])
    async def test_under_the_owner_looking_up_a_credential_is_three(self, url: str) -> None:
        async with Proxy(url) as proxy, Database.from_url(proxy.url) as database:
            await database.find_credential(key_id="key")
            assert await proxy.turns(database.find_credential(key_id="key")) == 3

    async def test_first_use_of_a_statement_on_a_connection_costs_one_more(
        self, single: Database, proxy: Proxy, people: People
    ) -> None:
        user, ids = await people.present()
        assert await proxy.turns(single.tasks.get(user, ids[0])) == 2
        assert await proxy.turns(single.tasks.get(user, ids[1])) == 1

    async def test_repeated_call_with_a_key_is_one(
        self, single: Database, proxy: Proxy, people: People
    ) -> None:
        for name in ("tasks.create with a key", "tasks.create_many with a key"):
            (call,) = CALLS[name]
            user, _ = await people.present()
            await call(single, user, ())
            assert await proxy.turns(call(single, user, ())) == 1

    async def test_each_page_is_one(self, single: Database, proxy: Proxy, people: People) -> None:
        async def pages(user: str, sort: TaskSort) -> None:
            page = await single.tasks.list(user, sort=sort, limit=2)
            page = await single.tasks.list(user, sort=sort, limit=2, cursor=page.next_cursor)
            assert page.next_cursor is None

        async def iterated(user: str) -> int:
            return len([task async for task in single.tasks.iterate(user)])

        user, _ = await people.present()
        for sort in TaskSort:
            await pages(user, sort)
            assert await proxy.turns(pages(user, sort)) == 2
        await single.tasks.create_many(user, [NewTask("Buy milk")] * 500)
        assert await iterated(user) == 503
        assert await proxy.turns(iterated(user)) == 2

    async def test_refused_input_is_none(self, single: Database, proxy: Proxy) -> None:
        async def refused() -> None:
            with pytest.raises(InvalidInputError):
                await single.tasks.create("alice", "")
            assert await single.tasks.update_many("alice", [1]) == 0

        assert await proxy.turns(refused()) == 0

    async def test_transaction_is_its_statements_and_two(
        self, single: Database, proxy: Proxy, people: People
    ) -> None:
        user, ids = await people.present()

        async def statements(number: int) -> None:
            async with single.transaction(user) as tx:
                for _ in range(number):
                    await tx.tasks.get(user, ids[0])

        async def keyed() -> None:
            async with single.transaction(user) as tx:
                await tx.tasks.create(user, "Buy milk", idempotency_key="key")

        await statements(1)
        await keyed()
        assert [await proxy.turns(statements(number)) for number in range(4)] == [2, 3, 4, 5]
        assert await proxy.turns(keyed()) == 3 + 2

    async def test_health_is_one(self, single: Database, proxy: Proxy) -> None:
        assert (await single.health()).ok
        assert await proxy.turns(single.health()) == 1

    async def test_opening_is_eight_at_most(self, proxy: Proxy) -> None:
        async with Database.from_url(proxy.url):
            assert proxy.connections == 1
            assert proxy.round_trips <= 8

    async def test_first_call_is_a_call_and_its_preparation(self, proxy: Proxy) -> None:
        async with Database.from_url(proxy.url) as database:
            before = proxy.round_trips
            await database.tasks.count("alice")
            assert proxy.round_trips == before + 2


# What a login has or lacks, so that one round trip is not right for it.
REASONS: Final[dict[str, tuple[str, ...]]] = {
    "the login does not inherit the role of the transactions": (
        f"CREATE ROLE {ODD} LOGIN NOINHERIT IN ROLE todo_app",
        WITH_TIMEOUT,
    ),
    "the login bypasses row-level security": (
        f"CREATE ROLE {ODD} LOGIN BYPASSRLS IN ROLE todo_app",
        WITH_TIMEOUT,
    ),
    "the login owns tables": (
        f"CREATE ROLE {ODD} LOGIN IN ROLE todo_app",
        WITH_TIMEOUT,
        "CREATE TABLE notes ()",
        f"ALTER TABLE notes OWNER TO {ODD}",
    ),
    "the login has no statement_timeout of its own": (f"CREATE ROLE {ODD} LOGIN IN ROLE todo_app",),
    "the login has a default_transaction_isolation of its own": (
        f"CREATE ROLE {ODD} LOGIN IN ROLE todo_app",
        WITH_TIMEOUT,
        f"ALTER ROLE {ODD} SET default_transaction_isolation = 'repeatable read'",
    ),
}
# Less obvious ways to the same.
MORE: Final[dict[str, tuple[str, str]]] = {
    "superuser": (
        "the login bypasses row-level security",
        f"ALTER ROLE {ODD} SUPERUSER",
    ),
    "reader of what is replicated": (
        "the login bypasses row-level security",
        f"ALTER ROLE {ODD} REPLICATION",
    ),
    "member of a role that bypasses": (
        "the login bypasses row-level security",
        f"GRANT todo_owner TO {ODD} WITH INHERIT FALSE",
    ),
    "owner of a view": (
        "the login owns tables",
        f"CREATE VIEW notes AS SELECT; ALTER VIEW notes OWNER TO {ODD}",
    ),
    "member of a role that owns": (
        "the login owns tables",
        f"CREATE ROLE rich ROLE {ODD}; CREATE TABLE notes (); ALTER TABLE notes OWNER TO rich",
    ),
    "statement_timeout of zero": (
        "the login has no statement_timeout of its own",
        f"ALTER ROLE {ODD} SET statement_timeout = 0",
    ),
    "membership that is not inherited": (
        "the login does not inherit the role of the transactions",
        f"REVOKE todo_app FROM {ODD}; GRANT todo_app TO {ODD} WITH INHERIT FALSE",
    ),
    "serializable": (
        "the login has a default_transaction_isolation of its own",
        f"ALTER ROLE {ODD} SET default_transaction_isolation = 'serializable'",
    ),
}


class TestForm:
    @pytest_asyncio.fixture
    async def odd_url(
        self, todo_postgres: EmbeddedPostgres, todo_database_name: str, superuser: Connection
    ) -> AsyncGenerator[str]:
        yield todo_postgres.url(user=ODD, database=todo_database_name)
        for role in ("rich", ODD):
            if await superuser.fetchval("SELECT to_regrole($1) IS NOT NULL", role):
                await superuser.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")

    async def _assert_three(self, url: str, reason: str, people: People) -> None:
        user, ids = await people.present()
        async with Proxy(url) as proxy, Database.from_url(proxy.url) as database:
            health = await database.health()
            assert (health.round_trips, health.form_reason) == (3, reason)
            assert (await database.tasks.get(user, ids[0])).id == ids[0]
            assert await proxy.turns(database.tasks.get(user, ids[0])) == 3
            with pytest.raises(TaskNotFoundError):
                await database.tasks.get("mallory", ids[0])

    async def test_health_says_one_and_why(self, single: Database) -> None:
        health = await single.health()
        assert (health.ok, health.round_trips, health.form_reason) == (True, 1, FENCED)

    @pytest.mark.parametrize("login", [OWNER])
    async def test_under_the_owner_it_says_three_and_why(self, url: str, people: People) -> None:
        await self._assert_three(url, "the login bypasses row-level security", people)

    async def test_before_it_is_open_health_does_not_know(self) -> None:
        database = Database.from_url("postgresql://alice@127.0.0.1:1/todo", retry_attempts=1)
        health = await database.health()
        assert (health.ok, health.round_trips, health.form_reason) == (False, None, None)
        await database.close()

    @pytest.mark.parametrize("reason", REASONS)
    async def test_each_reason_leads_to_three(
        self, odd_url: str, superuser: Connection, people: People, reason: str
    ) -> None:
        for statement in REASONS[reason]:
            await superuser.execute(statement)
        await self._assert_three(odd_url, reason, people)

    @pytest.mark.parametrize(("reason", "sql"), MORE.values(), ids=MORE)
    async def test_each_way_to_it_leads_to_three(
        self, odd_url: str, superuser: Connection, people: People, reason: str, sql: str
    ) -> None:
        await superuser.execute(f"CREATE ROLE {ODD} LOGIN IN ROLE todo_app")
        await superuser.execute(WITH_TIMEOUT)
        await superuser.execute(sql)
        await self._assert_three(odd_url, reason, people)

    async def test_without_any_of_them_it_is_one(self, odd_url: str, superuser: Connection) -> None:
        await superuser.execute(f"CREATE ROLE {ODD} LOGIN IN ROLE todo_app")
        await superuser.execute(WITH_TIMEOUT)
        async with Database.from_url(odd_url) as database:
            assert (await database.health()).round_trips == 1

    @pytest.mark.parametrize("late", [LATE, EMPTY], ids=["late", "empty"])
    async def test_server_that_fails_the_proof_leads_to_three(
        self, single_url: str, people: People, monkeypatch: pytest.MonkeyPatch, late: str
    ) -> None:
        monkeypatch.setattr(autocommit, "PROOF", late)
        await self._assert_three(single_url, UNPROVEN, people)

    async def test_it_is_chosen_again_when_it_is_opened_again(
        self, odd_url: str, superuser: Connection
    ) -> None:
        await superuser.execute(f"CREATE ROLE {ODD} LOGIN IN ROLE todo_app")
        database = Database.from_url(odd_url)
        forms: list[int | None] = []
        for sql in (WITH_TIMEOUT, f"ALTER ROLE {ODD} RESET ALL", "SELECT"):
            async with database:
                forms.append((await database.health()).round_trips)
            await superuser.execute(sql)
        assert forms == [3, 1, 3]


class TestLog:
    async def test_opening_says_once_which_form_and_why(
        self, single_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO, logger="todo_db"):
            async with Database.from_url(single_url) as database:
                await database.open()
                await database.tasks.count("alice")
        assert [text for text in caplog.messages if "round trips" in text] == [
            f"round trips of a call: 1, because {FENCED}"
        ]

    async def test_three_too(self, url: str, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="todo_db"):
            async with Database.from_url(url):
                pass
        assert [text for text in caplog.messages if "round trips" in text] == [
            "round trips of a call: 3, because the login has no statement_timeout of its own"
        ]

    @pytest.mark.parametrize(
        ("settings", "names"),
        [
            ({"statement_timeout_seconds": 7.5}, "statement_timeout"),
            ({"lock_timeout_seconds": 7.5}, "lock_timeout"),
            (
                {"statement_timeout_seconds": 7.5, "lock_timeout_seconds": 7.5},
                "lock_timeout and statement_timeout",
            ),
        ],
    )
    async def test_timeouts_of_the_login_that_differ_are_a_warning_with_their_names(
        self,
        single_url: str,
        caplog: pytest.LogCaptureFixture,
        settings: dict[str, float],
        names: str,
    ) -> None:
        with caplog.at_level(logging.WARNING, logger="todo_db"):
            async with Database.from_url(single_url, **settings):
                pass
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage().startswith(f"the login's own {names} differ from the settings")
        assert "7500" not in record.getMessage()

    async def test_in_three_they_are_not(self, url: str, caplog: pytest.LogCaptureFixture) -> None:
        # There the transaction sets them.
        with caplog.at_level(logging.WARNING, logger="todo_db"):
            async with Database.from_url(url, lock_timeout_seconds=7.5):
                pass
        assert caplog.records == []


class Raised(NamedTuple):
    """What a caller sees of an error."""

    kind: type[TodoDBError]
    text: str
    field: str | None
    transient: bool | None
    cause: BaseException | None


class Play:
    """One story of every method, its results and its errors; the same in every database."""

    def __init__(self, db: Database, owner: Connection) -> None:
        self.told: list[object] = []
        self._db = db
        self._owner = owner

    async def _tell(self, awaitable: Awaitable[object]) -> Any:  # noqa: ANN401  # what a call returns
        try:
            result = await awaitable
        except TodoDBError as error:
            field, transient = getattr(error, "field", None), getattr(error, "transient", None)
            self.told.append(Raised(type(error), str(error), field, transient, error.__cause__))
            return None
        self.told.append(_timeless(result))
        return result

    async def _iterated(self, user: str, sort: TaskSort) -> list[TaskRecord]:
        return [task async for task in self._db.tasks.iterate(user, sort=sort)]

    async def users(self) -> None:
        users, tell = self._db.users, self._tell
        await tell(users.get("alice"))
        await tell(users.create("alice", email="Alice@example.org", name="Alice", username="al"))
        await tell(users.create("alice", email="other@example.org", name="Alice"))
        await tell(users.create("bob", email="alice@example.org", name="Bob"))
        await tell(users.create("bob", email="bob@example.org", name="Bob", username="al"))
        await tell(users.create("bob", email="bob@example.org", name="Bob"))
        await tell(users.ensure("bob", email="new@example.org", name="New"))
        await tell(users.ensure("carol", email="carol@example.org", name="Carol"))
        await tell(users.ensure("dave", email="carol@example.org", name="Dave"))
        await tell(users.get("alice"))
        await tell(users.update("alice", name="Alice B.", image="https://example.org/a.png"))
        await tell(users.set_email("alice", email="bob@example.org"))
        await tell(users.set_email("alice", email="Alice@example.net"))
        await tell(users.update("alice", username=None))
        await tell(users.update("alice"))
        await tell(users.update("bob", username="rob"))
        await tell(users.update("alice", username="rob"))
        await tell(users.update("nobody", name="Nobody"))
        await tell(users.update("nobody"))

    async def tasks(self) -> None:
        tasks, tell = self._db.tasks, self._tell
        await tell(tasks.create("nobody", "Buy milk"))
        await tell(tasks.create("nobody", "Buy milk", idempotency_key="key"))
        first = await tell(tasks.create("alice", "Buy milk"))
        await tell(tasks.create("alice", "Ä 100%\\_ 🥛", description="", completed=True))
        await tell(tasks.create("alice", ""))
        await tell(tasks.create_many("alice", []))
        await tell(
            tasks.create_many("alice", [NewTask(f"{n}", f"d{n}", n % 2 == 0) for n in range(6)])
        )
        await tell(tasks.create_many("nobody", [NewTask("Buy milk")]))
        for title in ("Buy bread", "Buy bread", "Buy butter"):
            await tell(tasks.create("alice", title, idempotency_key="key"))
            await tell(tasks.create("bob", title, idempotency_key="key"))
        for number in (2, 2, 0):
            new = [NewTask("Buy bread", "Dark", completed=True)] * number
            await tell(tasks.create_many("alice", new, idempotency_key="keys"))
        await tell(tasks.create_many("alice", [], idempotency_key="none"))
        await tell(tasks.create_many("alice", [], idempotency_key="none"))
        await tell(tasks.get("alice", first.id))
        await tell(tasks.get("bob", first.id))
        await tell(tasks.get("alice", 999_999))

    async def lists(self) -> None:
        tasks, tell = self._db.tasks, self._tell
        for user in ("alice", "bob", "nobody"):
            for sort in TaskSort:
                page = await tell(tasks.list(user, sort=sort, limit=3))
                if page.next_cursor:
                    await tell(tasks.list(user, sort=sort, limit=3, cursor=page.next_cursor))
                await tell(self._iterated(user, sort))
            for completed, search in ((True, None), (False, "buy"), (None, "100%\\_"), (None, "D")):
                await tell(tasks.list(user, completed=completed, search=search))
                await tell(tasks.count(user, completed=completed, search=search))
        await tell(tasks.list("alice", cursor="nonsense"))

    async def changes(self) -> None:
        tasks, tell = self._db.tasks, self._tell
        one, two, three = [task.id for task in (await tasks.list("alice", limit=3)).items]
        task = await tell(tasks.update("alice", one, title="New", description="D", completed=True))
        await tell(tasks.update("alice", one, description=None))
        await tell(tasks.update("alice", one))
        nothing, something = TaskChanges(), TaskChanges(title="Newer")
        for change in (nothing, something):
            await tell(tasks.update("alice", one, expected_updated_at=LONG_AGO, **change))
            await tell(tasks.update("alice", two, expected_updated_at=task.updated_at, **change))
            await tell(tasks.update("bob", one, expected_updated_at=LONG_AGO, **change))
            now = (await tasks.get("alice", one)).updated_at
            await tell(tasks.update("alice", one, expected_updated_at=now, **change))
        await tell(tasks.update("bob", one, title="Stolen"))
        await tell(tasks.toggle("alice", two))
        await tell(tasks.toggle("alice", two))
        await tell(tasks.toggle("bob", two))
        await tell(tasks.update_many("alice", [one, two, 999_999], completed=True))
        await tell(tasks.update_many("alice", [one, two, 999_999], completed=True))
        await tell(tasks.update_many("bob", [one, two], title="Stolen"))
        await tell(tasks.update_many("alice", [one]))
        await tell(tasks.delete("bob", three))
        await tell(tasks.delete("alice", three))
        await tell(tasks.delete("alice", three))
        await tell(tasks.delete_many("bob", [one]))
        await tell(tasks.delete_many("alice", [one, three, 999_999]))
        await tell(self._iterated("alice", TaskSort.OLDEST))
        await tell(tasks.delete_completed("alice"))
        await tell(tasks.delete_completed("nobody"))
        await tell(self._iterated("alice", TaskSort.OLDEST))
        await tell(self._iterated("bob", TaskSort.OLDEST))

    async def credentials(self) -> None:
        await self._owner.execute(
            "INSERT INTO sessions (user_id, token, expires_at) VALUES"
            " ('alice', 'alive', 'infinity'), ('alice', 'dead', now() - interval '1 day')"
        )
        await self._owner.execute(
            "INSERT INTO jwks (id, public_key, private_key) VALUES ('key', 'public', 'private')"
        )
        for token in ("alive", "dead", "none", None):
            for key_id in ("key", "none", None):
                await self._tell(self._db.find_credential(session_token=token, key_id=key_id))

    async def waiting(self) -> None:
        """What the timeouts end."""
        task = await self._tell(self._db.tasks.create("bob", "Wait"))
        async with self._owner.transaction():
            await self._owner.execute("SELECT FROM tasks WHERE id = $1 FOR UPDATE", task.id)
            await self._tell(self._db.tasks.toggle("bob", task.id))
            await self._tell(self._db.tasks.delete("bob", task.id))
            await self._tell(self._db.tasks.delete_many("bob", [task.id]))
        await self._tell(self._db.tasks.get("bob", task.id))

    async def ends(self) -> None:
        users, tell = self._db.users, self._tell
        await tell(users.delete("alice"))
        await tell(users.delete("alice"))
        await tell(self._db.tasks.count("alice"))
        await tell(self._db.tasks.create("alice", "Too late"))
        await tell(self._db.tasks.create("alice", "Buy bread", idempotency_key="key"))
        await tell(users.get("bob"))


def _timeless(result: object) -> object:
    """A result without what differs each time: the clock, and cursors made of it."""
    match result:
        case TaskRecord() | UserRecord():
            values = {name: getattr(result, name) for name in type(result).__slots__}
            changed = values.pop("created_at") != values.pop("updated_at")
            return type(result).__name__, values, changed
        case Page():
            return [_timeless(item) for item in result.items], result.next_cursor is not None
        case list():
            return [_timeless(item) for item in result]
        case _:
            return result


class TestSameAsThree:
    @pytest.mark.parametrize(
        "hasty",
        [{"lock_timeout_seconds": 0.1}, {"statement_timeout_seconds": 1}],
        ids=["lock_timeout", "statement_timeout"],
    )
    async def test_results_and_errors_are_equal(
        self,
        todo_postgres: EmbeddedPostgres,
        hasty: dict[str, float],
    ) -> None:
        """What gives a locked row up is one timeout or the other."""
        told: dict[int | None, list[object]] = {}
        for login, name in (("hasty_login", "play_one"), (LOGIN, "play_three")):
            todo_postgres.create_database(name, template="todo_template")
            owner_url = todo_postgres.url(database=name)
            await create_login(owner_url, Settings(**hasty), "hasty_login")
            url = todo_postgres.url(user=login, database=name)
            owner: Connection = await asyncpg.connect(owner_url)
            # Each call is tried once, so that a lock is waited for once.
            async with Database.from_url(url, retry_attempts=1, **hasty) as db:
                play = Play(db, owner)
                for act in (
                    play.users,
                    play.tasks,
                    play.lists,
                    play.changes,
                    play.credentials,
                    play.waiting,
                    play.ends,
                ):
                    await act()
                told[(await db.health()).round_trips] = play.told
            await owner.close()
            todo_postgres.drop_database(name)
        assert told.keys() == {1, 3}
        assert told[1] == told[3]
        raised = {line.kind for line in told[1] if isinstance(line, Raised)}
        assert raised >= {
            CallTimeoutError,
            EmailTakenError,
            IdempotencyKeyReusedError,
            InvalidInputError,
            StaleTaskError,
            TaskNotFoundError,
            UserIdTakenError,
            UserNotFoundError,
            UsernameTakenError,
        }


class TestConnection:
    """What a call leaves on its connection, by which the next user's calls go."""

    async def _assert_nothing_left(self, two: Database) -> None:
        connection = await two._pool.acquire()
        (row,) = await connection.driver.fetch(
            "SELECT coalesce(current_setting('todo_db.user_id', true), ''),"
            " current_user = session_user, (SELECT count(*) FROM tasks),"
            " (SELECT count(*) FROM users)"
        )
        assert not connection.driver.is_in_transaction()
        two._pool.release(connection)
        assert tuple(row) == ("", True, 0, 0)

    async def test_nothing_of_a_user_is_left_for_the_next(self, two: Database) -> None:
        task = await two.tasks.create("alice", "Buy milk")
        await self._assert_nothing_left(two)
        with pytest.raises(TaskNotFoundError):
            await two.tasks.get("bob", task.id)
        assert (await two.tasks.list("bob")).items == ()
        await self._assert_nothing_left(two)

    @pytest.mark.parametrize(
        "failing",
        [
            lambda db: db.users.create("mallory", email="alice@example.org", name="Mallory"),
            lambda db: db.users.update("mallory", name="Mallory"),
            lambda db: db.tasks.create("mallory", "Buy milk"),
            lambda db: db.tasks.get("mallory", 1),
        ],
        ids=["EmailTaken", "UserNotFound", "owner does not exist", "TaskNotFound"],
    )
    async def test_nothing_of_a_failed_call_is_left(
        self, two: Database, failing: Callable[[Database], Awaitable[object]]
    ) -> None:
        await two.tasks.create("alice", "Buy milk")
        with pytest.raises(TodoDBError):
            await failing(two)
        await self._assert_nothing_left(two)

    async def test_nothing_of_a_transaction_is_left_for_a_call(self, two: Database) -> None:
        async with two.transaction("alice") as tx:
            await tx.tasks.create("alice", "Buy milk")
            await tx.execute(text("SELECT set_config('todo_db.user_id', 'alice', false)"))
        assert (await two.tasks.list("bob")).items == ()
        await self._assert_nothing_left(two)
        with pytest.raises(LookupError):
            async with two.transaction("alice") as tx:
                await tx.execute(text("SELECT set_config('todo_db.user_id', 'alice', false)"))
                raise LookupError
        await self._assert_nothing_left(two)


class TestCancellation:
    @pytest.fixture
    def log(self, todo_postgres: EmbeddedPostgres) -> Callable[[], str]:
        """What the server has logged since the test began."""
        file = todo_postgres.log
        before = len(file.read_bytes())

        def read() -> str:
            return file.read_bytes()[before:].decode()

        return read

    async def test_cancelled_call_recovers_its_connection_and_the_server_logs_no_warning(
        self, two: Database, owner: Connection, log: Callable[[], str]
    ) -> None:
        task = await two.tasks.create("alice", "Buy milk")
        (connection,) = two._pool._idle
        for _ in range(3):
            async with owner.transaction():
                await owner.execute("SELECT FROM tasks FOR UPDATE")
                call = asyncio.create_task(two.tasks.toggle("alice", task.id))
                await until_waiting(owner)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                # On the same connection, while the row is still locked.
                async with asyncio.timeout(10):
                    assert (await two.tasks.list("bob")).items == ()
        assert two._pool._idle == [connection]
        assert two._pool.status.in_use == 0
        assert not (await two.tasks.get("alice", task.id)).completed
        assert "canceling statement due to user request" in log()
        assert "WARNING" not in log()

    async def test_cancelled_read_recovers_too(
        self, two: Database, owner: Connection, log: Callable[[], str]
    ) -> None:
        (connection,) = two._pool._idle
        async with owner.transaction():
            await owner.execute("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
            call = asyncio.create_task(two.tasks.count("alice"))
            await until_waiting(owner)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        assert await two.tasks.count("alice") == 0
        assert two._pool._idle == [connection]
        assert "WARNING" not in log()


@pytest.mark.pooler
class TestPooler:
    """Behind a pooler that does not track prepared statements each call is one turn more."""

    @pytest_asyncio.fixture
    async def pooled_url(
        self,
        request: pytest.FixtureRequest,
        todo_postgres: EmbeddedPostgres,
        todo_database_name: str,
    ) -> AsyncGenerator[str]:
        suite, prepared = request.param
        made = await create_login(
            todo_postgres.url(database=todo_database_name),
            Settings(),
            "pooled_single",
            new_password=True,
        )
        assert made is not None
        server = todo_postgres.url(user="postgres", database="postgres")
        async with PgBouncer(suite, server, max_prepared_statements=prepared) as pooler:
            yield pooler.url("pooled_single", todo_database_name, password=str(made.password))

    @pytest.mark.parametrize(
        ("pooled_url", "trips"),
        [((TRIXIE, 1000), 1), ((TRIXIE, 0), 2), ((BOOKWORM, None), 2)],
        ids=["1.24 that tracks them", "1.24 that does not", "1.18"],
        indirect=["pooled_url"],
    )
    async def test_every_call_is_one_or_two(
        self, pooled_url: str, people: People, trips: int
    ) -> None:
        async with (
            Proxy(pooled_url) as proxy,
            Database.from_url(proxy.url, pool_size=1, max_overflow=0) as database,
        ):
            health = await database.health()
            assert (health.round_trips, health.form_reason) == (trips, FENCED)
            assert await counted(database, proxy, people) == each(trips)
            await database.find_credential(key_id="key")
            assert await proxy.turns(database.find_credential(key_id="key")) == trips

    @pytest.mark.parametrize("pooled_url", [(TRIXIE, 1000)], indirect=True)
    async def test_opening_is_eight_at_most(self, pooled_url: str) -> None:
        async with Proxy(pooled_url) as proxy, Database.from_url(proxy.url):
            # Two more, because PgBouncer asks for the password (SCRAM).
            assert proxy.round_trips <= 8 + 2


class TestErrors:
    """An operation of an application says what the caller gets when a constraint is broken."""

    OPERATION: Final = Operation(
        Statement(
            lambda owner: (
                insert(Task).values(user_id=owner, title=bindparam("title")).returning(Task.id)
            )
        ),
        {"title": "x"},
        len,
        errors={"fk_tasks_user_id_users": lambda: ConflictError("sign up first")},
    )

    async def test_are_the_same_in_each_form(self, url: str, single_url: str) -> None:
        async with Database.from_url(url) as three, Database.from_url(single_url) as one:
            for database in (three, one):
                with pytest.raises(ConflictError, match="sign up first"):
                    await database.perform("nobody", self.OPERATION)
                with pytest.raises(ConflictError, match="sign up first"):
                    async with database.transaction("nobody") as tx:
                        await tx.perform("nobody", self.OPERATION)

    async def test_name_the_constraint(self, db: Database) -> None:
        with pytest.raises(UserNotFoundError) as caught:
            await db.perform("nobody", self.OPERATION._replace(errors={}))
        assert caught.value.constraint == "fk_tasks_user_id_users"
