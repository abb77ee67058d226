"""One transaction is one user's, and it says what became of it."""

import asyncio
import logging
from contextlib import suppress
from typing import Any, Final

import asyncpg
import pytest
from cluster import Cluster
from driver import Connection
from proxy import BEGIN, COMMIT, ROLLBACK, Fault, Proxy, until
from sqlalchemy import DDL, ClauseElement, Executable, Row, delete, insert, select, text
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler

from todo_db import (
    ConcurrentUseError,
    ConfigurationError,
    ConflictError,
    Database,
    InvalidInputError,
    IsolationError,
    OutcomeUnknownError,
    SchemaError,
    TodoDBError,
    Transaction,
    TransactionAbortedError,
    TransactionError,
    UnavailableError,
)
from todo_db.embedded import LOGIN, OWNER
from todo_db.migrations import upgrade
from todo_db.models import Task
from todo_db.transaction import _begin_failure

# Everything that BEGIN carries, and that must be gone after the end.
CONTEXT: Final = """
    SELECT current_user AS role,
        coalesce(current_setting('todo_db.user_id', true), '') AS user_id,
        current_setting('search_path') AS search_path,
        current_setting('transaction_read_only') AS read_only,
        current_setting('transaction_isolation') AS isolation,
        current_setting('statement_timeout') AS statement,
        current_setting('lock_timeout') AS lock,
        current_setting('idle_in_transaction_session_timeout') AS idle
"""

HOSTILE: Final = (
    "'; DROP TABLE tasks; --",
    "' OR '1'='1",
    "\\'; COMMIT; --",
    "\\x27",
    '"quoted"',
    "$$ $1 $user$",
    "%s %(user)s {} :user",
    "o'b\nSET ROLE todo_owner",
    "/* comment",
    "алиса 🙂 \u202e",
    "NULL",
    " alice",
    "x" * 255,
    "🙂" * 255,
)


@pytest.fixture
def login() -> str:
    """One is enough where nothing is said of the role."""
    return LOGIN


async def context(tx: Transaction) -> Row[Any]:
    return (await tx.execute(text(CONTEXT))).one()


async def context_left(db: Database) -> tuple[object, object]:
    """What the next one would find on the connection."""
    connection = await db._pool.acquire()
    found = await connection.driver.fetchrow(CONTEXT)
    db._pool.release(connection)
    assert found is not None
    return found["role"], found["user_id"]


async def titles(owner: Connection) -> list[str]:
    return [row["title"] for row in await owner.fetch("SELECT title FROM tasks ORDER BY id")]


async def swallow_an_error(tx: Transaction) -> None:
    with suppress(ConflictError):
        await tx.users.create(tx.user_id, email="bob@example.org", name="")


class TestContext:
    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_E4_begin_carries_all_of_it_and_the_end_takes_it_away(
        self, url: str, login: str
    ) -> None:
        async with Database.from_url(
            url,
            pool_size=1,
            max_overflow=0,
            statement_timeout_seconds=4.321,
            lock_timeout_seconds=1.5,
            idle_in_transaction_timeout_seconds=7,
        ) as db:
            async with db.transaction("alice") as tx:
                assert tuple(await context(tx)) == (
                    *("todo_app", "alice", "public, pg_temp", "off", "read committed"),
                    *("4321ms", "1500ms", "7s"),
                )
            async with db.transaction("bob", read_only=True) as tx:
                found = await context(tx)
                assert (found.user_id, found.read_only) == ("bob", "on")

            connection = await db._pool.acquire()
            after = await connection.driver.fetchrow(CONTEXT)
            db._pool.release(connection)
            assert after is not None
            assert tuple(after) == (
                *(login, "", '"$user", public', "off", "read committed"),
                *("0", "0", "0"),
            )

    async def test_begin_is_one_message(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        before = len(proxy.sent)
        async with database_without_retries.transaction("alice"):
            sent = bytes(proxy.sent[before:])
        # A simple query is its type, the length of all that follows, and text up to a NUL.
        assert sent[:1] == b"Q"
        assert int.from_bytes(sent[1:5]) == len(sent) - 1
        assert sent[5:].startswith(BEGIN)
        assert b"alice" not in sent
        assert b"alice".hex().encode() in sent

    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_E7_gone_after_an_error_too(
        self, database_without_retries: Database, login: str
    ) -> None:
        with pytest.raises(LookupError):
            async with database_without_retries.transaction("alice"):
                raise LookupError
        assert await context_left(database_without_retries) == (login, "")
        with pytest.raises(TransactionAbortedError):
            async with database_without_retries.transaction("alice") as tx:
                with suppress(DBAPIError):
                    await tx.execute(text("SELECT 1 / 0"))
        assert await context_left(database_without_retries) == (login, "")

    async def test_E10_hostile_user_ids_are_only_ids(
        self, database: Database, owner: Connection
    ) -> None:
        for number, user in enumerate(HOSTILE):
            async with database.transaction(user) as tx:
                await tx.users.create(user, email=f"user{number}@example.org", name="")
                await tx.tasks.create(user, f"of {number}")
                found = await context(tx)
                assert (found.role, found.user_id) == ("todo_app", user)
        for number, user in enumerate(HOSTILE):
            page = await database.tasks.list(user)
            assert [task.title for task in page.items] == [f"of {number}"]
        assert {row["id"] for row in await owner.fetch("SELECT id FROM users")} == set(HOSTILE)

    async def test_E10_impossible_user_ids_are_refused_before_any_sql(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        before = proxy.round_trips
        impossible: list[Any] = ["", " ", "nul\x00", "\ud800", "x" * 256, None, 5]
        for user in impossible:
            with pytest.raises(InvalidInputError):
                async with database_without_retries.transaction(user):
                    pytest.fail("it began")
        assert proxy.round_trips == before


class TestBegin:
    async def test_F05_lost_connection_is_replaced(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        for fault in (Fault.CUT_BEFORE, Fault.CUT_AFTER):
            proxy.break_at(BEGIN, fault)
            with pytest.raises(UnavailableError) as caught:
                async with database_without_retries.transaction("alice"):
                    pytest.fail("it began")
            assert caught.value.transient
            assert database_without_retries._pool.status.in_use == 0
            assert (await database_without_retries.users.get("alice")).id == "alice"

    async def test_F05_is_tried_again(self, db: Database, proxy: Proxy) -> None:
        async with Database.from_url(proxy.url) as patient:
            proxy.break_at(BEGIN, Fault.CUT_AFTER)
            async with patient.transaction("alice") as tx:
                await tx.tasks.create("alice", "stored")
            assert not proxy.pending
            assert patient._pool.status.in_use == 0
        assert await db.tasks.count("alice") == 1

    async def test_A7_peer_that_never_answers_is_given_up(self, proxy: Proxy) -> None:
        async with Database.from_url(
            proxy.url, pool_size=1, max_overflow=0, retry_attempts=1, command_timeout_seconds=1
        ) as db:
            proxy.break_at(BEGIN, Fault.HANG)
            async with asyncio.timeout(20):
                with pytest.raises(UnavailableError):
                    await db.tasks.count("alice")
            assert await db.tasks.count("alice") == 0

    def test_F21_standby_is_unavailable_until_it_is_promoted(self) -> None:
        """It does not begin to write; `test_faults` asks a real one."""
        failure = _begin_failure(asyncpg.FeatureNotSupportedError())
        assert isinstance(failure, UnavailableError)
        assert not failure.transient

    async def test_missing_role_and_missing_membership_are_told_apart(self) -> None:
        with Cluster(18) as cluster:
            owner = await cluster.create_database("todo")
            db = Database.from_url(owner, pool_size=1, max_overflow=0)
            for _ in range(2):
                connection = await db._pool.acquire()
                db._pool.release(connection)
                with pytest.raises(SchemaError):
                    await db.tasks.count("alice")
                assert connection.driver.is_closed()
            await upgrade(owner)
            assert await db.tasks.count("alice") == 0
            await db.close()

            await cluster.execute("CREATE ROLE stranger LOGIN")
            db = Database.from_url(cluster.url("stranger", "todo"), pool_size=1, max_overflow=0)
            for _ in range(2):
                with pytest.raises(ConfigurationError, match="todo_app"):
                    await db.tasks.count("alice")
                assert db._pool.status.in_use == 0
            await cluster.execute("GRANT todo_app TO stranger")
            assert await db.tasks.count("alice") == 0
            await db.close()


class TestUser:
    async def test_another_user_is_refused_before_any_sql(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        async with database_without_retries.transaction("alice") as tx:
            for call in (
                tx.tasks.create("bob", "for bob"),
                tx.tasks.get("bob", 1),
                tx.users.get("bob"),
                tx.users.ensure("bob", email="bob@example.org", name=""),
            ):
                before = proxy.round_trips
                with pytest.raises(IsolationError):
                    await call
                assert proxy.round_trips == before
            task = await tx.tasks.create("alice", "for alice")
        assert (await database_without_retries.tasks.get("alice", task.id)).title == "for alice"


class TestEnd:
    async def test_stores_all_or_nothing(self, db: Database, owner: Connection) -> None:
        async with db.transaction("alice") as tx:
            await tx.tasks.create("alice", "one")
            await tx.tasks.create("alice", "two")
            assert await titles(owner) == []
        assert await titles(owner) == ["one", "two"]
        with pytest.raises(LookupError):
            async with db.transaction("alice") as tx:
                await tx.tasks.create("alice", "three")
                raise LookupError
        assert await titles(owner) == ["one", "two"]

    async def test_nothing_works_after_it(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        async with database_without_retries.transaction("alice") as tx:
            pass
        before = proxy.round_trips
        for call in (
            tx.tasks.count("alice"),
            tx.users.get("alice"),
            tx.execute(select(Task.id)),
            tx.savepoint().__aenter__(),
        ):
            with pytest.raises(TransactionError):
                await call
        assert proxy.round_trips == before

    async def test_Z1_swallowed_error_is_no_success(
        self, database_without_retries: Database, owner: Connection, proxy: Proxy
    ) -> None:
        with pytest.raises(TransactionAbortedError):
            async with database_without_retries.transaction("alice") as tx:
                await tx.tasks.create("alice", "lost")
                await swallow_an_error(tx)
        assert await titles(owner) == []
        assert proxy.connections == 1

    async def test_Z1_answer_of_the_commit_is_read(
        self, database_without_retries: Database, owner: Connection
    ) -> None:
        with pytest.raises(TransactionAbortedError):
            async with database_without_retries.transaction("alice") as tx:
                await tx.tasks.create("alice", "lost")
                with suppress(asyncpg.PostgresError):  # behind the transaction's back
                    await tx._gate.connection.driver.execute("SELECT 1 / 0")
        assert await titles(owner) == []
        assert await database_without_retries.tasks.count("alice") == 0

    async def test_Z1_no_statement_follows_a_swallowed_error(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        with pytest.raises(LookupError):
            async with database_without_retries.transaction("alice") as tx:
                await swallow_an_error(tx)
                before = proxy.round_trips
                for call in (
                    tx.tasks.count("alice"),
                    tx.execute(select(Task.id)),
                    tx.savepoint().__aenter__(),
                ):
                    with pytest.raises(TransactionAbortedError):
                        await call
                assert proxy.round_trips == before
                raise LookupError

    async def test_F17b_verdict_on_the_commit_is_not_unknown(
        self, database_without_retries: Database, owner: Connection
    ) -> None:
        await owner.execute("""
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '40001'; END $$;
            CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON tasks
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()
        """)
        with pytest.raises(UnavailableError) as caught:
            await database_without_retries.tasks.create("alice", "refused")
        assert caught.value.transient
        assert await titles(owner) == []
        assert await database_without_retries.tasks.count("alice") == 0


class TestLostConnection:
    async def test_F06_before_the_commit_was_sent_nothing_is_applied(
        self, database_without_retries: Database, proxy: Proxy, owner: Connection
    ) -> None:
        with pytest.raises(UnavailableError) as caught:
            async with database_without_retries.transaction("alice") as tx:
                await tx.tasks.create("alice", "lost")
                await proxy.cut()
                await until(tx._gate.connection.driver.is_closed)
        assert caught.value.transient
        assert COMMIT not in proxy.sent[proxy.sent.rindex(BEGIN) :]
        assert await titles(owner) == []
        assert await database_without_retries.tasks.count("alice") == 0

    async def test_F05_between_statements(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        with pytest.raises(UnavailableError) as caught:
            async with database_without_retries.transaction("alice") as tx:
                await tx.tasks.create("alice", "lost")
                await proxy.cut()
                await until(tx._gate.connection.driver.is_closed)
                await tx.tasks.count("alice")
        assert caught.value.transient
        assert await database_without_retries.tasks.count("alice") == 0

    async def test_F03_during_a_statement(
        self, database_without_retries: Database, proxy: Proxy, owner: Connection
    ) -> None:
        proxy.break_at(b"slowly", Fault.CUT_AFTER)
        with pytest.raises(UnavailableError) as caught:
            async with database_without_retries.transaction("alice") as tx:
                await tx.tasks.create("alice", "slowly")
        assert caught.value.transient
        assert await titles(owner) == []
        assert await database_without_retries.tasks.count("alice") == 0

    @pytest.mark.parametrize("login", [OWNER])
    async def test_F05_killed_by_an_administrator(self, db: Database, owner: Connection) -> None:
        with pytest.raises(UnavailableError) as caught:
            async with db.transaction("alice") as tx:
                await tx.tasks.create("alice", "lost")
                driver = tx._gate.connection.driver
                await owner.execute("SELECT pg_terminate_backend($1)", driver.get_server_pid())
                await until(driver.is_closed)
        assert caught.value.transient
        assert await db.tasks.count("alice") == 0

    async def test_F18_idle_for_too_long(self, db: Database, url: str, owner: Connection) -> None:
        async with Database.from_url(
            url, retry_attempts=1, idle_in_transaction_timeout_seconds=0.5
        ) as hasty:
            with pytest.raises(UnavailableError):
                async with hasty.transaction("alice") as tx:
                    await tx.tasks.create("alice", "lost")
                    await until(tx._gate.connection.driver.is_closed)
            assert await hasty.tasks.count("alice") == 0
        assert await db.tasks.count("alice") == 0
        assert await titles(owner) == []

    @pytest.mark.parametrize(
        ("fault", "stored"), [(Fault.CUT_BEFORE, []), (Fault.CUT_AFTER, ["maybe"])]
    )
    async def test_Z5_during_the_commit_is_unknown(
        self,
        database_without_retries: Database,
        proxy: Proxy,
        owner: Connection,
        fault: Fault,
        stored: list[str],
    ) -> None:
        proxy.break_at(COMMIT, fault)
        with pytest.raises(OutcomeUnknownError):
            async with database_without_retries.transaction("alice") as tx:
                await tx.tasks.create("alice", "maybe")
        assert await titles(owner) == stored
        assert await database_without_retries.tasks.count("alice") == len(stored)

    async def test_A7_commit_without_an_answer_is_unknown(self, db: Database, proxy: Proxy) -> None:
        async with Database.from_url(
            proxy.url, pool_size=1, max_overflow=0, command_timeout_seconds=1
        ) as hasty:
            proxy.break_at(COMMIT, Fault.SWALLOW)
            async with asyncio.timeout(20):
                with pytest.raises(OutcomeUnknownError):
                    async with hasty.transaction("alice") as tx:
                        await tx.tasks.create("alice", "maybe")
            assert await hasty.tasks.count("alice") == 1
        assert await db.tasks.count("alice") == 1

    async def test_M1_at_the_end_of_a_read_only_one_is_swallowed_and_logged(
        self, database_without_retries: Database, proxy: Proxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        for fault in (Fault.CUT_BEFORE, Fault.CUT_AFTER):
            caplog.clear()
            proxy.break_at(COMMIT, fault)
            async with database_without_retries.transaction("alice", read_only=True) as tx:
                assert await tx.tasks.count("alice") == 0
            assert not proxy.pending
            assert [
                record.levelno for record in caplog.records if record.name.startswith("todo_db")
            ] == [logging.WARNING]
            assert (await database_without_retries.users.get("alice")).id == "alice"

    async def test_during_the_rollback_does_not_hide_the_error(
        self, database_without_retries: Database, proxy: Proxy, owner: Connection
    ) -> None:
        for fault in (Fault.CUT_BEFORE, Fault.CUT_AFTER):
            proxy.break_at(ROLLBACK, fault)
            with pytest.raises(LookupError):
                async with database_without_retries.transaction("alice") as tx:
                    await tx.tasks.create("alice", "lost")
                    raise LookupError
        assert not proxy.pending
        assert await titles(owner) == []
        assert await database_without_retries.tasks.count("alice") == 0


class TestBrokenConnection:
    async def test_savepoint_on_a_lost_connection_is_unavailable(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        proxy.break_at(b"SAVEPOINT", Fault.CUT_BEFORE)
        with pytest.raises(UnavailableError):
            async with database_without_retries.transaction("alice") as tx, tx.savepoint():
                pytest.fail("the block must not run")
        assert await database_without_retries.tasks.count("alice") == 0

    def test_O2_begin_on_a_protocol_that_broke_down_is_unavailable(self) -> None:
        failure = _begin_failure(asyncpg.InternalClientError("cannot switch to state 15"))
        assert type(failure) is UnavailableError
        assert failure.transient

    async def test_O2_protocol_that_broke_down_is_unavailable(self, db: Database) -> None:
        with pytest.raises(TransactionAbortedError):
            async with db.transaction("alice") as tx:
                tx._gate.connection.terminate()
                failure = tx._gate._failure(
                    asyncpg.InternalClientError("cannot switch to state 15")
                )
        assert type(failure) is UnavailableError
        assert failure.transient


class TestConcurrentUse:
    async def test_Z2_second_task_is_refused_before_any_sql_and_nothing_is_stored(
        self, database_without_retries: Database, proxy: Proxy, owner: Connection
    ) -> None:
        with pytest.raises(TransactionAbortedError):
            async with database_without_retries.transaction("alice") as tx:
                first, second = await asyncio.gather(
                    tx.tasks.create("alice", "first"),
                    tx.tasks.create("alice", "second"),
                    return_exceptions=True,
                )
                assert isinstance(second, ConcurrentUseError), first
                with pytest.raises(TransactionAbortedError):
                    await tx.tasks.create("alice", "third")
        assert b"first" in proxy.sent
        assert b"second" not in proxy.sent
        assert b"third" not in proxy.sent
        assert await titles(owner) == []
        assert await database_without_retries.tasks.count("alice") == 0

    async def test_Z2_end_while_another_task_is_at_it(
        self, database_without_retries: Database, owner: Connection
    ) -> None:
        for _ in range(3):
            with pytest.raises(TransactionAbortedError):
                async with database_without_retries.transaction("alice") as tx:
                    other = asyncio.create_task(tx.tasks.create("alice", "stray"))
                    await asyncio.sleep(0)
            with pytest.raises(TodoDBError):
                await other
            with pytest.raises(TransactionError):
                await tx.tasks.count("alice")
            assert database_without_retries._pool.status.in_use == 0
            assert await database_without_retries.tasks.count("alice") == 0
        assert await titles(owner) == []

    async def test_Z2_execute_and_savepoint_are_guarded_too(
        self, database_without_retries: Database
    ) -> None:
        async def saved(tx: Transaction) -> None:
            async with tx.savepoint():
                pass

        for second in (saved, context):
            with pytest.raises(TransactionAbortedError):
                async with database_without_retries.transaction("alice") as tx:
                    _, refused = await asyncio.gather(
                        tx.tasks.count("alice"), second(tx), return_exceptions=True
                    )
                    assert isinstance(refused, ConcurrentUseError)
        assert await database_without_retries.tasks.count("alice") == 0

    async def test_one_transaction_for_each_task_is_fine(self, db: Database) -> None:
        async def work(number: int) -> None:
            async with db.transaction("alice") as tx:
                await tx.tasks.create("alice", f"task {number}")

        await asyncio.gather(*map(work, range(20)))
        assert await db.tasks.count("alice") == 20


class TestSiblings:
    """Tasks that share a transaction although they must not."""

    async def test_block_that_ends_while_a_sibling_works_is_not_committed(
        self, db: Database
    ) -> None:
        async def boom() -> None:
            raise ZeroDivisionError

        with pytest.raises(TransactionAbortedError):
            async with db.transaction("alice") as tx:
                await tx.tasks.create("alice", "ghost")
                slow = text("SELECT pg_sleep(0.2)")
                with suppress(ZeroDivisionError):
                    await asyncio.gather(tx.execute(slow), boom())
        assert await db.tasks.count("alice") == 0

    async def test_T4_task_that_writes_while_another_ones_savepoint_is_open_is_refused(
        self, db: Database
    ) -> None:
        async def write(tx: Transaction) -> None:
            await tx.tasks.create("alice", "would be undone with the savepoint")

        with pytest.raises(TransactionAbortedError):
            async with db.transaction("alice") as tx:
                with suppress(LookupError):
                    async with tx.savepoint():
                        with pytest.raises(ConcurrentUseError):
                            await asyncio.create_task(write(tx))
                        raise LookupError
        assert await db.tasks.count("alice") == 0

    async def test_T4_two_tasks_that_take_turns_with_savepoints_are_refused(
        self, db: Database
    ) -> None:
        async def saved(tx: Transaction, title: str) -> None:
            async with tx.savepoint():
                await tx.tasks.create("alice", title)

        with pytest.raises(TransactionAbortedError):
            async with db.transaction("alice") as tx:
                with pytest.raises(ConcurrentUseError):
                    async with tx.savepoint():
                        await tx.tasks.create("alice", "first")
                        await asyncio.create_task(saved(tx, "second"))
        assert await db.tasks.count("alice") == 0

    async def test_T4_savepoint_that_is_open_at_the_end_commits_nothing(self, db: Database) -> None:
        with pytest.raises(TransactionError, match="savepoint"):
            async with db.transaction("alice") as tx:
                still_open = tx.savepoint()
                await still_open.__aenter__()
                await tx.tasks.create("alice", "half")
        assert await db.tasks.count("alice") == 0

    async def test_refused_one_is_not_forgotten_when_the_other_fails(self, db: Database) -> None:
        async def fails(tx: Transaction) -> None:
            async with tx.savepoint():
                await tx.execute(text("SELECT 1 / (SELECT 0 FROM pg_sleep(1))"))

        with pytest.raises(TransactionAbortedError):
            async with db.transaction("alice") as tx:
                await tx.tasks.create("alice", "half")
                first = asyncio.create_task(fails(tx))
                await asyncio.sleep(0.05)
                with pytest.raises(ConcurrentUseError):
                    await tx.tasks.create("alice", "other half")
                with pytest.raises((DBAPIError, TransactionAbortedError)):
                    await first
        assert await db.tasks.count("alice") == 0


class TestSavepoint:
    async def test_undoes_its_block_and_nothing_else(self, db: Database, owner: Connection) -> None:
        async with db.transaction("alice") as tx:
            await tx.tasks.create("alice", "before")
            with pytest.raises(LookupError):
                async with tx.savepoint():
                    await tx.tasks.create("alice", "inside")
                    raise LookupError
            async with tx.savepoint():
                await tx.tasks.create("alice", "kept")
            await tx.tasks.create("alice", "after")
        assert await titles(owner) == ["before", "kept", "after"]

    async def test_refused_statement_inside_leaves_the_transaction_usable(
        self, db: Database, owner: Connection
    ) -> None:
        async with db.transaction("alice") as tx:
            await tx.tasks.create("alice", "before")
            with pytest.raises(DBAPIError):
                async with tx.savepoint():
                    await tx.tasks.create("alice", "inside")
                    await tx.execute(text("SELECT 1 / 0"))
            await tx.tasks.create("alice", "after")
        assert await titles(owner) == ["before", "after"]

    async def test_Z1_error_swallowed_inside_is_no_success(
        self, db: Database, owner: Connection
    ) -> None:
        async with db.transaction("alice") as tx:
            with pytest.raises(TransactionAbortedError):
                async with tx.savepoint():
                    await tx.tasks.create("alice", "inside")
                    with suppress(DBAPIError):
                        await tx.execute(text("SELECT 1 / 0"))
            await tx.tasks.create("alice", "after")
        assert await titles(owner) == ["after"]

    async def test_nested_ones_undo_their_own(self, db: Database, owner: Connection) -> None:
        async with db.transaction("alice") as tx:
            async with tx.savepoint():
                await tx.tasks.create("alice", "outer")
                with pytest.raises(LookupError):
                    async with tx.savepoint():
                        await tx.tasks.create("alice", "inner")
                        raise LookupError
                async with tx.savepoint():
                    await tx.tasks.create("alice", "inner too")
            with pytest.raises(LookupError):
                async with tx.savepoint():
                    async with tx.savepoint():
                        await tx.tasks.create("alice", "released, then undone")
                    raise LookupError
        assert await titles(owner) == ["outer", "inner too"]

    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_E5_keeps_the_context(self, db: Database) -> None:
        async with db.transaction("alice") as tx:
            with pytest.raises(LookupError):
                async with tx.savepoint():
                    await tx.execute(text("SELECT set_config('todo_db.user_id', 'bob', true)"))
                    await tx.execute(text("SELECT set_config('role', 'todo_app', true)"))
                    raise LookupError
            found = await context(tx)
            assert (found.role, found.user_id) == ("todo_app", "alice")
            async with tx.savepoint():
                pass
            found = await context(tx)
            assert (found.role, found.user_id) == ("todo_app", "alice")

    async def test_commits_nothing_by_itself(self, db: Database, owner: Connection) -> None:
        with pytest.raises(LookupError):
            async with db.transaction("alice") as tx:
                async with tx.savepoint():
                    await tx.tasks.create("alice", "inside")
                raise LookupError
        assert await titles(owner) == []

    async def test_lost_connection_inside_ends_everything(
        self, database_without_retries: Database, proxy: Proxy, owner: Connection
    ) -> None:
        with pytest.raises(TransactionAbortedError):
            async with database_without_retries.transaction("alice") as tx:
                await tx.tasks.create("alice", "before")
                with suppress(UnavailableError):
                    async with tx.savepoint():
                        await proxy.cut()
                        await until(tx._gate.connection.driver.is_closed)
                        await tx.tasks.count("alice")
        assert await titles(owner) == []
        assert await database_without_retries.tasks.count("alice") == 0


class TestReadOnly:
    async def test_refuses_writes(self, db: Database, owner: Connection) -> None:
        with pytest.raises(TransactionError):
            async with db.transaction("alice", read_only=True) as tx:
                await tx.tasks.create("alice", "x")
        with pytest.raises(TransactionError):
            async with db.transaction("alice", read_only=True) as tx:
                await tx.users.delete("alice")
        assert await titles(owner) == []
        assert (await db.users.get("alice")).id == "alice"

    async def test_reads(self, db: Database) -> None:
        await db.tasks.create("alice", "x")
        async with db.transaction("alice", read_only=True) as tx:
            assert await tx.tasks.count("alice") == 1


class Smuggled(Executable, ClauseElement):
    """A statement that does not look like what it sends."""

    inherit_cache = False


@compiles(Smuggled)
def _sent(_element: Smuggled, _compiler: SQLCompiler, **_options: object) -> str:
    return "COMMIT"


class TestExecute:
    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_takes_what_sqlalchemy_takes_under_the_same_fence(self, db: Database) -> None:
        mine = await db.tasks.create("alice", "mine")
        theirs = await db.tasks.create("bob", "theirs")
        both = [mine.id, theirs.id]
        async with db.transaction("alice") as tx:
            rows = (await tx.execute(select(Task.id, Task.title).order_by(Task.id))).all()
            assert [tuple(row) for row in rows] == [(mine.id, "mine")]
            listed = await tx.execute(select(Task.id).where(Task.id.in_(both)))
            assert listed.scalars().all() == [mine.id]
            found = await tx.execute(
                text("SELECT title FROM tasks WHERE title LIKE :like"), {"like": "%"}
            )
            assert found.scalars().all() == ["mine"]
            added = await tx.execute(
                insert(Task).values(user_id="alice", title="own SQL").returning(Task.title)
            )
            assert added.scalar_one() == "own SQL"
            gone = await tx.execute(delete(Task).where(Task.id.in_(both)).returning(Task.id))
            assert gone.scalars().all() == [mine.id]
        assert await db.tasks.count("alice") == 1
        assert (await db.tasks.get("bob", theirs.id)).title == "theirs"

    async def test_error_of_the_text_is_sqlalchemys_and_aborts(
        self, db: Database, owner: Connection
    ) -> None:
        with pytest.raises(TransactionAbortedError):
            async with db.transaction("alice") as tx:
                await tx.tasks.create("alice", "lost")
                with pytest.raises(DBAPIError):
                    async with tx.savepoint():
                        await tx.execute(text("SELECT nonsense"))
                with pytest.raises(IsolationError):
                    await tx.execute(insert(Task).values(user_id="bob", title="not bob's"))
                with pytest.raises(TransactionAbortedError):
                    await tx.tasks.count("alice")
        assert await titles(owner) == []
        assert await db.tasks.count("alice") == 0

    async def test_value_that_is_missing_is_no_failure_of_the_transaction(
        self, db: Database
    ) -> None:
        async with db.transaction("alice") as tx:
            await tx.tasks.create("alice", "kept")
            with pytest.raises(StatementError):
                await tx.execute(text("SELECT :missing"))
            assert await tx.tasks.count("alice") == 1
        assert await db.tasks.count("alice") == 1

    async def test_E2_leaves_nothing_on_the_connection(
        self, database_without_retries: Database, owner: Connection
    ) -> None:
        lasting = """
            SELECT set_config('todo_db.user_id', 'bob', false), pg_advisory_lock(42),
                set_config('row_security', 'off', false)
        """
        locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
        for undone in (False, True):
            with suppress(ZeroDivisionError):
                async with database_without_retries.transaction("alice") as tx:
                    await tx.execute(text(lasting))
                    if undone:
                        raise ZeroDivisionError
            assert await owner.fetchval(locks) == 0
            connection = await database_without_retries._pool.acquire()
            shown = await connection.driver.fetchrow("""
                SELECT coalesce(current_setting('todo_db.user_id', true), '') AS user_id,
                    current_setting('row_security') AS row_security
            """)
            assert shown is not None
            assert tuple(shown) == ("", "on")
            database_without_retries._pool.release(connection)
            assert await database_without_retries.tasks.count("alice") == 0

    async def test_piles_nothing_up_on_the_connection(
        self, database_without_retries: Database
    ) -> None:
        for _ in range(3):
            async with database_without_retries.transaction("alice") as tx:
                await tx.execute(text("SELECT 1"))
        (connection,) = database_without_retries._pool._idle
        # SQLAlchemy's pool keeps nothing for it: no record, no callbacks.
        assert connection._proxied._connection_record is None

    async def test_lost_connection_leaves_the_pool_healthy(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        proxy.break_at(b"slowly", Fault.CUT_AFTER)
        with pytest.raises(UnavailableError):
            async with database_without_retries.transaction("alice") as tx:
                await tx.execute(text("SELECT 'slowly'"))
        assert database_without_retries._pool.status.in_use == 0
        assert await database_without_retries.tasks.count("alice") == 0

    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_A6_text_that_ends_the_transaction_or_its_role_is_refused(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        async with database_without_retries.transaction("alice") as tx:
            before = proxy.round_trips
            for sql in (
                "COMMIT",
                "commit and chain",
                " \n\tROLLBACK",
                "/* a comment /* in */ another */ COMMIT",
                "-- a comment\nCOMMIT AND CHAIN",
                "-- ends at any line break\rCOMMIT",
                "; ; COMMIT",
                "ROLLBACK TO SAVEPOINT todo_db_1",
                "END",
                "ABORT",
                "BEGIN",
                "START TRANSACTION",
                "SAVEPOINT mine",
                "RELEASE todo_db_1",
                "PREPARE TRANSACTION 'mine'",
                "SET ROLE none",
                "RESET ROLE",
                "RESET ALL",
                "set local todo_db.user_id = 'bob'",
                "SET SESSION AUTHORIZATION DEFAULT",
                "DO 'BEGIN COMMIT; END'",
                "CALL anything()",
                "COPY tasks TO STDOUT",
                "DECLARE mine CURSOR WITH HOLD FOR SELECT * FROM tasks",
                "DROP OWNED BY todo_app",
                "",
            ):
                with pytest.raises(TransactionError):
                    await tx.execute(text(sql))
            with pytest.raises(TransactionError):
                await tx.execute(DDL("COMMIT"))  # type: ignore[no-untyped-call]
            assert proxy.round_trips == before
            assert (await context(tx)).user_id == "alice"

    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_T1_construct_that_sends_a_commit_is_refused(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        async with database_without_retries.transaction("alice") as tx:
            before = proxy.round_trips
            with pytest.raises(TransactionError):
                await tx.execute(Smuggled())
            assert proxy.round_trips == before
            assert (await context(tx)).user_id == "alice"

    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_E4_transaction_that_ended_unseen_is_noticed(
        self, database_without_retries: Database
    ) -> None:
        for step in (None, lambda tx: tx.tasks.create("alice", "x"), context):
            with pytest.raises(IsolationError):
                async with database_without_retries.transaction("alice") as tx:
                    await tx._gate.driver.execute("COMMIT")
                    if step is not None:
                        await step(tx)
            assert database_without_retries._pool.status.in_use == 0
            assert await database_without_retries.tasks.count("alice") == 0
