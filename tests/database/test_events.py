"""Every log record has an event, which the documentation lists, and each has a test."""

import ast
import asyncio
import gc
import logging
import re
import warnings
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import pytest_asyncio
from driver import Connection
from events import events
from locks import until_waiting
from proxy import (
    COMMIT,
    ROLLBACK,
    STARTUP,
    TERMINATE,
    Fault,
    Proxy,
    timeout_after,
    until,
)
from sqlalchemy import select, text

from todo_db import (
    CallTimeoutError,
    Database,
    OutcomeUnknownError,
    PoolExhaustedError,
    TaskNotFoundError,
    TaskRepository,
    UnavailableError,
    UserRepository,
)
from todo_db.embedded import LOGIN

ROOT: Final = Path(__file__).resolve().parents[2]
MARKER: Final = "hunter2"


class Event(NamedTuple):
    name: str
    level: str
    logger: str
    fields: tuple[str, ...]


def of_the_code() -> list[Event]:
    """Return the event of each line that writes to the log."""
    found = []
    for path in sorted((ROOT / "todo_db").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        logger = ".".join(parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="_logger"), attr=level)):
                    extra = next(each.value for each in node.keywords if each.arg == "extra")
                    assert isinstance(extra, ast.Dict)
                    event, *fields = [ast.literal_eval(key) for key in extra.keys if key]
                    assert event == "event", path
                    name = ast.literal_eval(extra.values[0])
                    found.append(Event(name, level.upper(), logger, tuple(fields)))
                case _:
                    pass
    return found


def of_the_page() -> list[Event]:
    page = (ROOT / "docs" / "reference" / "events.md").read_text()
    rows = re.findall(r"^\| `(todo_db\.[\w.]+)`([^|]*) \| (\w+), ([^|]+) \|", page, re.MULTILINE)
    return [
        Event(name, level, logger, tuple(re.findall(r"`(\w+)`", fields)))
        for name, fields, level, loggers in rows
        for logger in re.findall(r"`([\w.]+)`", loggers)
    ]


class TestReference:
    def test_lists_every_event_of_the_code_and_no_other(self) -> None:
        assert len(of_the_page()) == len(set(of_the_page()))
        assert set(of_the_page()) == set(of_the_code())

    def test_explains_every_reason_of_a_close(self) -> None:
        page = (ROOT / "docs" / "reference" / "events.md").read_text()
        pool = (ROOT / "todo_db" / "engine" / "pool.py").read_text()
        given = re.findall(r'(?:return |else |_discard\(\w+, )"(\w+)"', pool)
        assert set(given) == set(re.findall(r"^\| `([a-z_]+)` \|", page, re.MULTILINE))

    def test_every_event_has_a_test(self) -> None:
        tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
        missing = {event.name for event in of_the_code() if f'"{event.name}"' not in tests}
        assert missing == set()

    def test_loggers_are_named_by_their_modules(self) -> None:
        for path in (ROOT / "todo_db").rglob("*.py"):
            text = path.read_text()
            if "_logger." in text:
                assert "\n_logger: Final = logging.getLogger(__name__)\n" in text, path


@pytest.fixture
def login() -> str:
    """One is enough: `single_url` is for what one trip does in another way."""
    return LOGIN


@pytest.fixture(autouse=True)
def everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "todo_db")


class TestQuiet:
    @pytest.mark.parametrize("trips", [1, 3])
    async def test_normal_use_logs_only_what_was_opened_and_closed(
        self,
        trips: int,
        url: str,
        single_url: str,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # On a slow machine, connecting can take longer.
        monkeypatch.setattr("todo_db.engine.pool._LONG_WAIT_SECONDS", 60)
        async with Database.from_url(
            single_url if trips == 1 else url, slow_call_seconds=60
        ) as database:
            assert (await database.health()).round_trips == trips
            await database.users.create("alice", email="alice@example.org", name="Alice")
            task = await database.tasks.create("alice", "Buy milk")
            await asyncio.gather(*(database.tasks.get("alice", task.id) for _ in range(9)))
            with pytest.raises(TaskNotFoundError):
                await database.tasks.get("alice", task.id + 1)
            async with database.transaction("alice") as tx:
                await tx.tasks.toggle("alice", task.id)
        assert {record.levelno for record in caplog.records} == {logging.INFO}
        assert {fields["event"] for fields in events(caplog)} == {
            "todo_db.connection.opened",
            "todo_db.connection.closed",
            "todo_db.database.opened",
            "todo_db.database.closed",
        }


class TestSlowCall:
    @pytest_asyncio.fixture
    async def slow(self, db: Database, url: str) -> AsyncGenerator[Database]:
        """Every call is slow; it has alice."""
        assert (await db.users.get("alice")).id == "alice"
        async with Database.from_url(
            url, slow_call_seconds=0.000001, pool_size=1, max_overflow=0
        ) as slow:
            yield slow

    async def test_is_a_warning_with_what_took_the_time(
        self, db: Database, url: str, owner: Connection, caplog: pytest.LogCaptureFixture
    ) -> None:
        task = await db.tasks.create("alice", MARKER)
        async with Database.from_url(
            url, slow_call_seconds=1, lock_timeout_seconds=60, statement_timeout_seconds=60
        ) as database:
            await database.tasks.get("alice", task.id)
            async with owner.transaction():
                await owner.execute("SELECT FROM tasks FOR UPDATE")
                toggling = asyncio.create_task(database.tasks.toggle("alice", task.id))
                await until_waiting(owner)
                await asyncio.sleep(1)
            await toggling
        (slow,) = events(caplog, "todo_db.call.slow")
        assert 1000 <= slow.pop("duration_ms") < 30_000
        assert slow == {
            "event": "todo_db.call.slow",
            "call": "tasks.toggle",
            "retries": 0,
            "pool_wait_ms": 0,
            "round_trips": 3,
        }
        (record,) = (r for r in caplog.records if r.levelno == logging.WARNING)
        assert re.fullmatch(
            r"tasks.toggle took \d+ ms: 0 retries, 0 ms of waiting for a connection, 3 round trips",
            record.getMessage(),
        )

    async def test_has_the_wait_for_a_connection(
        self, slow: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with slow.transaction("alice"):
            counting = asyncio.create_task(slow.tasks.count("alice"))
            await until(lambda: slow._pool.status.waiting == 1)
            await asyncio.sleep(0.1)
        await counting
        found = {each["call"]: each for each in events(caplog, "todo_db.call.slow")}
        assert found["transaction"]["pool_wait_ms"] == 0
        waited = found["tasks.count"]
        assert 50 <= waited["pool_wait_ms"] <= waited["duration_ms"]

    async def test_has_its_retries_and_the_round_trips_of_all_tries(
        self, proxy: Proxy, db: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        task = await db.tasks.create("alice", "Buy milk")
        async with Database.from_url(proxy.url, slow_call_seconds=0.000001) as database:
            await database.users.get("alice")
            proxy.break_at(COMMIT, Fault.CUT_BEFORE)
            await database.tasks.update("alice", task.id, title="Buy bread")
        update = events(caplog, "todo_db.call.slow")[-1]
        assert (update["call"], update["retries"], update["round_trips"]) == ("tasks.update", 1, 6)

    async def test_in_one_trip(self, single_url: str, caplog: pytest.LogCaptureFixture) -> None:
        async with Database.from_url(single_url, slow_call_seconds=0.000001) as database:
            await database.tasks.count("alice")
            await database.find_credential(session_token="none")  # noqa: S106
        assert [
            (each["call"], each["round_trips"]) for each in events(caplog, "todo_db.call.slow")
        ] == [("tasks.count", 1), ("find_credential", 1)]

    async def test_each_call_of_a_transaction_counts_its_own_round_trips(
        self, slow: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with slow.transaction("alice") as tx:
            await tx.tasks.count("alice")
            await tx.tasks.create("alice", "Buy milk", idempotency_key="key")
            await tx.execute(select(text("1")))
            assert await tx.session().scalar(select(text("1"))) == 1

        async def work(tx: Any) -> int:  # noqa: ANN401
            return int(await tx.tasks.count("alice"))

        await slow.run("alice", work)
        assert [
            (each["call"], each["round_trips"]) for each in events(caplog, "todo_db.call.slow")
        ] == [
            ("tasks.count", 1),
            ("tasks.create_keyed", 3),
            ("execute", 1),
            ("transaction", 3),
            ("tasks.count", 1),
            ("run", 2),
        ]

    async def test_that_fails_is_one_too(
        self, slow: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(TaskNotFoundError):
            await slow.tasks.get("alice", 1)
        assert [each["call"] for each in events(caplog, "todo_db.call.slow")] == ["tasks.get"]

    async def test_is_not_told_when_it_is_turned_off(
        self, db: Database, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert db._observe is not None
        async with Database.from_url(url, slow_call_seconds=0) as database:
            assert database._observe is None
            async with database.transaction("alice") as tx:
                await asyncio.sleep(1.1)
                await tx.tasks.count("alice")
        assert events(caplog, "todo_db.call.slow") == []

    async def test_has_no_value(self, slow: Database, caplog: pytest.LogCaptureFixture) -> None:
        await slow.users.create(MARKER, email=f"{MARKER}@example.org", name=MARKER)
        await slow.tasks.create(MARKER, MARKER, description=MARKER, idempotency_key=MARKER)
        await slow.tasks.list(MARKER, search=MARKER)
        assert len(events(caplog, "todo_db.call.slow")) == 3
        assert MARKER not in "".join(f"{r.getMessage()} {vars(r)}" for r in caplog.records)

    @pytest.mark.parametrize(
        ("repository", "kind"), [("tasks", TaskRepository), ("users", UserRepository)]
    )
    def test_every_statement_has_the_name_of_its_method(self, repository: str, kind: type) -> None:
        source = (ROOT / "todo_db" / "repositories" / f"{repository}.py").read_text()
        names = set(re.findall(rf'name="{repository}\.(\w+)"', source))
        methods = {name for name in vars(kind) if not name.startswith("_")}
        keyed = {"create_keyed"} if repository == "tasks" else set()
        assert names == methods - {"iterate"} | keyed
        assert source.count("Statement(") == source.count(f'name="{repository}.')


class TestCalls:
    async def test_retry_has_its_reason(
        self, database_through_proxy: Database, proxy: Proxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        proxy.break_at(b"count(*)", Fault.CUT_BEFORE)
        await database_through_proxy.tasks.count("alice")
        assert events(caplog, "todo_db.call.retried") == [
            {
                "event": "todo_db.call.retried",
                "call": "tasks.count",
                "reason": "the connection was lost",
                "retry": 1,
                "delay_ms": 0,
            }
        ]

    async def test_later_retries_wait_longer(
        self, database_through_proxy: Database, proxy: Proxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        proxy.break_at(b"count(*)", Fault.CUT_BEFORE, times=4)
        await database_through_proxy.tasks.count("alice")
        told = events(caplog, "todo_db.call.retried")
        assert [each["retry"] for each in told] == [1, 2, 3, 4]
        least = [0, 50, 100, 200]
        for each, delay in zip(told, least, strict=True):
            assert delay <= each["delay_ms"] <= delay + 100

    @pytest.mark.parametrize("fault", [Fault.CUT_BEFORE, Fault.CUT_AFTER])
    async def test_outcome_of_a_commit_is_unknown(
        self,
        database_through_proxy: Database,
        proxy: Proxy,
        fault: Fault,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        proxy.break_at(COMMIT, fault)
        with pytest.raises(OutcomeUnknownError):
            await database_through_proxy.tasks.create("alice", MARKER)
        (unknown,) = events(caplog, "todo_db.outcome.unknown")
        assert unknown["reason"] == "ConnectionDoesNotExistError"
        assert MARKER not in str(unknown)

    async def test_outcome_in_one_trip_is_unknown(
        self, db: Database, single_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert (await db.users.get("alice")).id == "alice"
        async with Proxy(single_url) as proxy, Database.from_url(proxy.url) as database:
            await database.tasks.create("alice", "Buy milk")
            proxy.break_at(b"Buy bread", Fault.CUT_AFTER)
            with pytest.raises(OutcomeUnknownError):
                await database.tasks.create("alice", "Buy bread")
        assert [each["reason"] for each in events(caplog, "todo_db.outcome.unknown")] == [
            "ConnectionDoesNotExistError"
        ]

    async def test_read_only_transaction_is_lost(
        self, database_through_proxy: Database, proxy: Proxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        proxy.break_at(COMMIT, Fault.CUT_BEFORE)
        assert await database_through_proxy.tasks.count("alice") == 0
        assert events(caplog, "todo_db.transaction.read_only_lost") != []
        assert events(caplog, "todo_db.outcome.unknown") == []

    async def test_rollback_fails(
        self, database_through_proxy: Database, proxy: Proxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        proxy.break_at(ROLLBACK, Fault.CUT_BEFORE)
        with pytest.raises(TaskNotFoundError):
            await database_through_proxy.tasks.get("alice", 1)
        (failed,) = events(caplog, "todo_db.transaction.rollback_failed")
        assert failed["reason"] == "ConnectionDoesNotExistError"


def closed(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each["reason"] for each in events(caplog, "todo_db.connection.closed")]


class TestConnections:
    async def test_are_opened_and_closed(self, url: str, caplog: pytest.LogCaptureFixture) -> None:
        async with Database.from_url(url, pool_size=1) as database:
            both = asyncio.Barrier(2)
            await asyncio.gather(*(self.held(database, both) for _ in range(2)))
            await until(lambda: closed(caplog) == ["surplus"])
        opened = events(caplog, "todo_db.connection.opened")
        assert [each["connections"] for each in opened] == [1, 2]
        assert closed(caplog) == ["surplus", "pool_closed"]
        left = events(caplog, "todo_db.connection.closed")
        assert [each["connections"] for each in left] == [1, 0]

    @staticmethod
    async def held(database: Database, both: asyncio.Barrier) -> None:
        async with database.transaction("alice"):
            await both.wait()

    async def test_expire(
        self, db: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with db.transaction("alice"):
            monkeypatch.setattr("todo_db.engine.connection._EXPIRES_AFTER_SECONDS", 0)
        assert closed(caplog) == []
        await until(lambda: closed(caplog) == ["expired"])

    async def test_are_lost(
        self, database_through_proxy: Database, proxy: Proxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(UnavailableError):
            async with database_through_proxy.transaction("alice") as tx:
                await proxy.cut()
                await until(tx._gate.driver.is_closed)
        assert closed(caplog) == ["lost"]

    async def test_are_lost_while_they_are_idle(
        self, database_through_proxy: Database, proxy: Proxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        (idle,) = database_through_proxy._pool._idle
        await proxy.cut()
        await until(idle.driver.is_closed)
        await database_through_proxy.tasks.count("alice")
        assert closed(caplog) == ["lost"]

    async def test_do_not_answer_a_ping(
        self,
        database_through_proxy: Database,
        proxy: Proxy,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr("todo_db.engine.connection._PING_AFTER_SECONDS", 0.0)
        monkeypatch.setattr("todo_db.engine.connection._PING_SECONDS", 0.2)
        proxy.break_at(b"SELECT 1", Fault.HANG)
        await database_through_proxy.tasks.count("alice")
        assert closed(caplog) == ["ping_failed"]

    async def test_do_not_recover(
        self,
        database_through_proxy: Database,
        proxy: Proxy,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr("todo_db.engine.connection._RECOVER_SECONDS", 0.2)
        proxy.break_at(b"count(*)", Fault.HANG)
        with pytest.raises(TimeoutError):
            async with timeout_after(until(lambda: not proxy.pending)):
                await database_through_proxy.tasks.count("alice")
        await until(lambda: closed(caplog) == ["not_recovered"])

    async def test_kept_statements_that_are_off_now(
        self, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        # As `open` finds behind a pooler that does not track them; see test_untracked_pooler.
        monkeypatch.setattr("todo_db.engine.Pool.is_pooled", lambda *_, **__: True)
        async with Database.from_url(url) as database:
            await database.tasks.count("alice")
        assert [each["event"] for each in events(caplog, "todo_db.statements.off")] == [
            "todo_db.statements.off"
        ]
        assert closed(caplog) == ["statements_off", "pool_closed"]

    async def test_cannot_be_opened(self, proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
        proxy.break_at(STARTUP, Fault.CUT_BEFORE, times=2)
        async with Database.from_url(proxy.url):
            pass
        failed = events(caplog, "todo_db.connection.failed")
        assert [each["reason"] for each in failed] == ["the connection was lost"] * 2

    async def test_break_when_they_are_closed(
        self, proxy: Proxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with Database.from_url(proxy.url):
            proxy.break_at(TERMINATE, Fault.HANG)
        (broke,) = events(caplog, "todo_db.connection.broke")
        assert broke["reason"] == "TimeoutError"

    def test_outlive_their_event_loop(self, url: str, caplog: pytest.LogCaptureFixture) -> None:
        database = Database.from_url(url)

        async def enter() -> None:
            async with database:
                pass

        with warnings.catch_warnings():
            # Python says of the socket that it was left open, which is true.
            warnings.simplefilter("ignore", ResourceWarning)
            asyncio.run(database.open())
            asyncio.run(enter())
            gc.collect()
        assert events(caplog, "todo_db.connection.orphaned") == [
            {"event": "todo_db.connection.orphaned"}
        ]

    async def test_statement_is_healed(
        self, db: Database, owner: Connection, caplog: pytest.LogCaptureFixture
    ) -> None:
        task = await db.tasks.create("alice", "Buy milk")
        await db.tasks.get("alice", task.id)
        await owner.execute("ALTER TABLE tasks ALTER title TYPE varchar(300)")
        assert await db.tasks.get("alice", task.id) == task
        (healed,) = events(caplog, "todo_db.statements.healed")
        assert healed["reason"] == "InvalidCachedStatementError"


class TestPool:
    async def test_wait_of_more_than_a_second(
        self, database_through_proxy: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with database_through_proxy.transaction("alice"):
            counting = [
                asyncio.create_task(database_through_proxy.tasks.count("alice")) for _ in range(2)
            ]
            await until(lambda: database_through_proxy._pool.status.waiting == 2)
            await asyncio.sleep(1.1)
        await asyncio.gather(*counting)
        first, second = events(caplog, "todo_db.pool.waited")
        assert 1100 <= first.pop("wait_ms") <= second["wait_ms"] < 30_000
        assert first == {
            "event": "todo_db.pool.waited",
            "in_use": 1,
            "connecting": 0,
            "waiting": 1,
        }

    async def test_wait_that_is_given_up(self, url: str, caplog: pytest.LogCaptureFixture) -> None:
        async with (
            Database.from_url(url, pool_size=1, max_overflow=0, pool_timeout_seconds=1.05) as one,
            one.transaction("alice"),
        ):
            counting = asyncio.create_task(one.tasks.count("alice"))
            with pytest.raises(PoolExhaustedError):
                await counting
        assert len(events(caplog, "todo_db.pool.waited")) == 1

    async def test_closed_in_use(self, url: str, caplog: pytest.LogCaptureFixture) -> None:
        database = Database.from_url(url, pool_timeout_seconds=0.05)
        async with database.transaction("alice"):
            await database.close()
        assert events(caplog, "todo_db.pool.closed_in_use") == [
            {"event": "todo_db.pool.closed_in_use", "in_use": 1}
        ]


class TestOpening:
    async def test_tells_the_form_and_why(
        self, single_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with Database.from_url(single_url, lock_timeout_seconds=7.5) as database:
            reason = (await database.health()).form_reason
        assert events(caplog, "todo_db.database.opened") == [
            {"event": "todo_db.database.opened", "round_trips": 1, "reason": reason}
        ]
        assert events(caplog, "todo_db.login.differs") == [
            {"event": "todo_db.login.differs", "settings": "lock_timeout"}
        ]
        assert events(caplog, "todo_db.database.closed") == [{"event": "todo_db.database.closed"}]


class TestLockTimeout:
    async def test_is_a_retry_and_a_slow_call(
        self, db: Database, url: str, owner: Connection, caplog: pytest.LogCaptureFixture
    ) -> None:
        task = await db.tasks.create("alice", "Buy milk")
        async with (
            Database.from_url(url, lock_timeout_seconds=0.2, slow_call_seconds=0.3) as database,
            owner.transaction(),
        ):
            await owner.execute("SELECT FROM tasks FOR UPDATE")
            with pytest.raises(CallTimeoutError):
                await database.tasks.toggle("alice", task.id)
        assert len(events(caplog, "todo_db.call.retried")) == 1
        (slow,) = events(caplog, "todo_db.call.slow")
        assert (slow["call"], slow["retries"]) == ("tasks.toggle", 1)
