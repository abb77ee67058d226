"""The states of a transaction: what leads from one to another, and what each call does in each."""

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Final

import labels
import pytest
import pytest_asyncio
from driver import Connection
from labels import Label
from proxy import COMMIT, ROLLBACK, Fault, Proxy, timeout_after, until
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from todo_db import (
    ConcurrentUseError,
    ConflictError,
    Database,
    OutcomeUnknownError,
    Transaction,
    TransactionAbortedError,
    TransactionError,
    UnavailableError,
    gate,
)
from todo_db.embedded import LOGIN
from todo_db.gate import NEXT, Event, State
from todo_db.models import Task

OPEN, ABORTED, BROKEN, ENDED = State
FAILED, UNDONE, UNKNOWN, OVER = Event


@pytest.fixture
def login() -> str:
    """Nothing here is said of the role."""
    return LOGIN


@pytest_asyncio.fixture
async def db(db: Database, owner: Connection) -> Database:
    await labels.create_tables(owner)
    return db


async def titles(owner: Connection) -> list[str]:
    return [row["title"] for row in await owner.fetch("SELECT title FROM tasks ORDER BY id")]


async def fail_a_statement(tx: Transaction) -> None:
    with suppress(DBAPIError):
        await tx.execute(text("SELECT 1 / 0"))


async def fail_by_repository(tx: Transaction) -> None:
    with suppress(ConflictError):
        await tx.users.create("alice", email="alice@example.org", name="")


async def fail_a_flush(tx: Transaction) -> None:
    tx.session().add(Label(name="x" * 11))
    with suppress(ValueError):
        await tx.session().flush()


async def fail_a_flush_before_it_is_sent(tx: Transaction) -> None:
    tx.session().add_all([Label(name="sent"), Label(name="not sent", size="text")])
    with suppress(SQLAlchemyError):
        await tx.session().flush()


async def cancel_a_statement(tx: Transaction) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(0.05):
            await tx.execute(text("SELECT pg_sleep(10)"))


async def lose_the_connection(tx: Transaction) -> None:
    tx._gate.connection.terminate()
    with suppress(UnavailableError):
        await tx.tasks.count("alice")


async def use_it_twice(tx: Transaction) -> None:
    first, second = await asyncio.gather(
        tx.tasks.count("alice"), tx.tasks.count("alice"), return_exceptions=True
    )
    # Inside a savepoint the first one is refused, too: it runs in a task of its own.
    assert isinstance(first, int | ConcurrentUseError)
    assert isinstance(second, ConcurrentUseError)


async def close_out_of_order(tx: Transaction) -> None:
    outer, inner = tx.savepoint(), tx.savepoint()
    await outer.__aenter__()
    await inner.__aenter__()
    with pytest.raises(ConcurrentUseError):
        await outer.__aexit__(None, None, None)


type Block = Callable[[Transaction], AbstractAsyncContextManager[object]]
type Step = Callable[[Transaction], Awaitable[None]]

# How each event happens by public calls.
EVENTS: Final[dict[Event, tuple[Step, ...]]] = {
    FAILED: (fail_a_statement, fail_by_repository, fail_a_flush, fail_a_flush_before_it_is_sent),
    UNKNOWN: (cancel_a_statement, lose_the_connection, use_it_twice, close_out_of_order),
}
BREAKING: Final = (cancel_a_statement, lose_the_connection, use_it_twice)


async def reach(tx: Transaction, state: State) -> None:
    match state:
        case State.ABORTED:
            await fail_a_statement(tx)
        case State.BROKEN:
            await cancel_a_statement(tx)
        case _:
            pass
    assert tx._gate.state is state


async def _in_savepoint(tx: Transaction) -> None:
    async with tx.savepoint():
        pass


async def _in_nested(tx: Transaction) -> None:
    async with tx.session().begin_nested():
        pass


async def _flush(tx: Transaction) -> None:
    tx.session().add(Label(name="late"))
    await tx.session().flush()


async def _stream(tx: Transaction) -> None:
    await tx.session().stream(text("SELECT 1"))


CALLS: Final[dict[str, Callable[[Transaction], Awaitable[object]]]] = {
    "tasks": lambda tx: tx.tasks.count("alice"),
    "users": lambda tx: tx.users.get("alice"),
    "ensure": lambda tx: tx.users.ensure("alice", email="alice@example.org", name=""),
    "execute": lambda tx: tx.execute(select(Task.id)),
    "session.execute": lambda tx: tx.session().execute(select(Task.id)),
    "session.get": lambda tx: tx.session().get(Task, 1),
    "session.flush": _flush,
    "session.stream": _stream,
    "session.begin_nested": _in_nested,
    "savepoint": _in_savepoint,
}


@asynccontextmanager
async def ending(db: Database, commits: bool) -> AsyncGenerator[Transaction]:  # noqa: FBT001
    """A transaction of alice's that must not commit, or that must."""
    if commits:
        async with db.transaction("alice") as tx:
            yield tx
        return
    with pytest.raises(TransactionAbortedError):
        async with db.transaction("alice") as tx:
            yield tx


class TestTable:
    def test_docstring_is_the_table(self) -> None:
        assert gate.__doc__ is not None
        table = re.search(r"```\n(.*?)```", gate.__doc__, re.DOTALL)
        assert table is not None
        header, *lines = (
            re.split(r" {2,}", line.strip()) for line in table[1].strip().splitlines()
        )
        states = [State[name.upper()] for name in header[1:]]
        assert states == list(State)
        assert [name.replace(" ", "_").upper() for name, *_ in lines] == [
            {
                FAILED: "A_STATEMENT_FAILED",
                UNDONE: "A_SAVEPOINT_WAS_UNDONE",
                UNKNOWN: "ITS_STATE_IS_UNKNOWN",
                OVER: "ITS_BLOCK_ENDED",
            }[event]
            for event in Event
        ]
        for event, (_, *cells) in zip(Event, lines, strict=True):
            for state, cell in zip(states, cells, strict=True):
                assert NEXT.get((state, event), state) is State[cell.upper()]

    @pytest.mark.parametrize("step", EVENTS[FAILED])
    async def test_open_one_is_aborted_by_a_failed_statement(
        self, db: Database, step: Step
    ) -> None:
        async with ending(db, commits=False) as tx:
            await tx.tasks.create("alice", "lost")
            await step(tx)
            assert tx._gate.state is ABORTED
        assert tx._gate.state is ENDED
        assert await db.tasks.count("alice") == 0

    @pytest.mark.parametrize("step", EVENTS[UNKNOWN])
    async def test_open_one_is_broken_when_its_state_is_unknown(
        self, db: Database, step: Step
    ) -> None:
        async with ending(db, commits=False) as tx:
            await step(tx)
            assert tx._gate.state is BROKEN
        assert tx._gate.state is ENDED
        assert await db.tasks.count("alice") == 0

    async def test_open_one_stays_open_when_a_savepoint_is_undone(self, db: Database) -> None:
        async with ending(db, commits=True) as tx:
            await tx.tasks.create("alice", "kept")
            with pytest.raises(LookupError):
                async with tx.savepoint():
                    await tx.tasks.create("alice", "undone")
                    raise LookupError
            assert tx._gate.state is OPEN
        assert await db.tasks.count("alice") == 1

    @pytest.mark.parametrize("step", EVENTS[FAILED])
    async def test_aborted_one_is_open_when_the_savepoint_is_undone(
        self, db: Database, owner: Connection, step: Step
    ) -> None:
        async with ending(db, commits=True) as tx:
            await tx.tasks.create("alice", "kept")
            for _ in range(2):
                with pytest.raises(LookupError):
                    async with tx.savepoint():
                        await tx.tasks.create("alice", "undone")
                        await step(tx)
                        assert tx._gate.state in {ABORTED, OPEN}
                        raise LookupError
                assert tx._gate.state is OPEN
            await tx.tasks.create("alice", "kept, too")
            tx.session().add(Label(name="kept"))
        assert await titles(owner) == ["kept", "kept, too"]
        assert await owner.fetchval("SELECT array_agg(name) FROM labels") == ["kept"]

    async def test_aborted_one_stays_aborted_when_another_statement_is_refused(
        self, db: Database
    ) -> None:
        async with ending(db, commits=False) as tx:
            await reach(tx, ABORTED)
            await fail_a_statement_that_is_refused(tx)
            assert tx._gate.state is ABORTED

    async def test_aborted_one_is_broken_when_two_tasks_use_it(self, db: Database) -> None:
        async with ending(db, commits=False) as tx:
            with suppress(LookupError):
                async with tx.savepoint():
                    await reach(tx, ABORTED)
                    with pytest.raises(ConcurrentUseError):
                        await asyncio.create_task(in_another_task(tx))
                    assert tx._gate.state is BROKEN
                    raise LookupError
            assert tx._gate.state is BROKEN

    async def test_aborted_one_is_broken_when_its_savepoint_cannot_be_undone(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        async with ending(database_without_retries, commits=False) as tx:
            with pytest.raises(LookupError):
                async with tx.savepoint():
                    await reach(tx, ABORTED)
                    proxy.break_at(b"ROLLBACK TO", Fault.CUT_BEFORE)
                    raise LookupError
            assert tx._gate.state is BROKEN

    @pytest.mark.parametrize("step", BREAKING)
    async def test_broken_one_stays_broken_when_its_savepoint_ends(
        self, database_without_retries: Database, proxy: Proxy, step: Step
    ) -> None:
        async with ending(database_without_retries, commits=False) as tx:
            with pytest.raises(LookupError):
                async with tx.savepoint():
                    await step(tx)
                    sent = len(proxy.sent)
                    raise LookupError
            assert tx._gate.state is BROKEN
            assert b"SAVEPOINT" not in proxy.sent[sent:]

    @pytest.mark.parametrize("state", [OPEN, ABORTED, BROKEN])
    @pytest.mark.parametrize("fails", [False, True])
    async def test_every_one_ends_with_its_block(
        self,
        db: Database,
        state: State,
        fails: bool,  # noqa: FBT001
    ) -> None:
        expected = LookupError if fails else TransactionAbortedError
        with suppress(expected):
            async with db.transaction("alice") as tx:
                await reach(tx, state)
                if fails:
                    raise LookupError
        assert tx._gate.state is ENDED
        assert db._pool.status.in_use == 0

    async def test_ended_one_stays_ended(self, db: Database) -> None:
        async with db.transaction("alice") as tx:
            pass
        for step in (fail_a_statement_that_is_refused, in_another_task, cancel_what_is_refused):
            with suppress(TransactionError):
                await step(tx)
            assert tx._gate.state is ENDED


async def fail_a_statement_that_is_refused(tx: Transaction) -> None:
    with pytest.raises(TransactionError):
        await tx.execute(text("SELECT 1 / 0"))


async def in_another_task(tx: Transaction) -> None:
    await tx.tasks.count("alice")


async def cancel_what_is_refused(tx: Transaction) -> None:
    async with asyncio.timeout(0.05):
        await tx.execute(text("SELECT pg_sleep(10)"))


def is_sent(proxy: Proxy, before: int, message: bytes) -> bool:
    return message in proxy.sent[before:]


class TestCalls:
    @pytest.mark.parametrize("call", list(CALLS))
    async def test_open_one_sends(
        self, database_without_retries: Database, proxy: Proxy, call: str
    ) -> None:
        async with database_without_retries.transaction("alice") as tx:
            before = len(proxy.sent)
            await CALLS[call](tx)
            assert len(proxy.sent) > before

    @pytest.mark.parametrize(
        ("state", "expected"),
        [(ABORTED, TransactionAbortedError), (BROKEN, TransactionAbortedError)],
    )
    @pytest.mark.parametrize("call", list(CALLS))
    async def test_aborted_or_broken_one_refuses_and_sends_nothing(
        self,
        database_without_retries: Database,
        proxy: Proxy,
        state: State,
        expected: type[Exception],
        call: str,
    ) -> None:
        async with ending(database_without_retries, commits=False) as tx:
            await reach(tx, state)
            before = len(proxy.sent)
            with pytest.raises(expected):
                await CALLS[call](tx)
            assert len(proxy.sent) == before
            assert tx._gate.state is state

    @pytest.mark.parametrize("call", list(CALLS))
    async def test_ended_one_refuses_and_sends_nothing(
        self, database_without_retries: Database, proxy: Proxy, call: str
    ) -> None:
        for state in (OPEN, ABORTED):
            with suppress(TransactionAbortedError):
                async with database_without_retries.transaction("alice") as tx:
                    await reach(tx, state)
            before = len(proxy.sent)
            with pytest.raises(TransactionError, match="ended"):
                await CALLS[call](tx)
            assert len(proxy.sent) == before

    async def test_only_an_open_one_sends_commit(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        for state, last in ((OPEN, COMMIT), (ABORTED, ROLLBACK), (BROKEN, ROLLBACK)):
            before = len(proxy.sent)
            with suppress(TransactionAbortedError):
                async with database_without_retries.transaction("alice") as tx:
                    await tx.tasks.count("alice")
                    if state is ABORTED:
                        await fail_by_repository(tx)
                    elif state is BROKEN:
                        await use_it_twice(tx)
            await until(partial(is_sent, proxy, before, last))
            assert (COMMIT in proxy.sent[before:]) == (state is OPEN)


async def slow(tx: Transaction) -> None:
    await tx.execute(text("SELECT pg_sleep(10)"))


async def slow_by_session(tx: Transaction) -> None:
    await tx.session().execute(text("SELECT pg_sleep(10)"))


async def slow_stream(tx: Transaction) -> None:
    rows = await tx.session().stream(
        text("SELECT pg_sleep(CASE n WHEN 120 THEN 10 ELSE 0 END) FROM generate_series(1, 200) n")
    )
    await rows.fetchmany(10)
    await rows.fetchall()


@asynccontextmanager
async def no_block(_tx: Transaction) -> AsyncGenerator[None]:
    yield


@asynccontextmanager
async def nested(tx: Transaction) -> AsyncGenerator[None]:
    async with tx.session().begin_nested():
        yield


@asynccontextmanager
async def savepoint_of_session(tx: Transaction) -> AsyncGenerator[None]:
    tx.session()
    async with tx.savepoint():
        yield


@asynccontextmanager
async def savepoint_before_session(tx: Transaction) -> AsyncGenerator[None]:
    async with tx.savepoint():
        tx.session().add(Label(name="undone"))
        await tx.session().flush()
        yield


def savepoint(tx: Transaction) -> AbstractAsyncContextManager[None]:
    return tx.savepoint()


BLOCKS: Final[tuple[Block, ...]] = (
    no_block,
    savepoint,
    nested,
    savepoint_of_session,
    savepoint_before_session,
)


class Runs:
    """Counts how often `run` calls its work, and works with alice's transaction."""

    def __init__(self, work: Callable[[Transaction], Awaitable[None]]) -> None:
        self.count = 0
        self.work = work

    async def __call__(self, tx: Transaction) -> None:
        self.count += 1
        await tx.tasks.create("alice", "lost")
        await self.work(tx)


@pytest.mark.parametrize("block", BLOCKS)
class TestCancellation:
    """A cancellation reaches its caller as such, whatever the database does."""

    @pytest.mark.parametrize("statement", [slow, slow_by_session, slow_stream])
    @pytest.mark.parametrize("by_timeout", [False, True])
    async def test_T3_during_a_statement(
        self,
        db: Database,
        owner: Connection,
        block: Block,
        statement: Callable[[Transaction], Awaitable[None]],
        by_timeout: bool,  # noqa: FBT001
    ) -> None:
        started = asyncio.Event()

        async def work(tx: Transaction) -> None:
            async with block(tx):
                started.set()
                await statement(tx)

        runs = Runs(work)
        await self._ends(db, runs, started, by_timeout=by_timeout)
        assert runs.count == 1
        assert await titles(owner) == []
        assert await db.tasks.count("alice") == 0
        assert await owner.fetchval("SELECT count(*) FROM labels") == 0

    @pytest.mark.parametrize("by_timeout", [False, True])
    async def test_T3_while_the_connection_is_gone(
        self,
        database_without_retries: Database,
        proxy: Proxy,
        owner: Connection,
        block: Block,
        by_timeout: bool,  # noqa: FBT001
    ) -> None:
        started = asyncio.Event()

        async def work(tx: Transaction) -> None:
            async with block(tx):
                await proxy.cut()
                await until(tx._gate.driver.is_closed)
                started.set()
                await asyncio.sleep(10)

        async with Database.from_url(proxy.url, pool_size=1, max_overflow=0) as patient:
            runs = Runs(work)
            await self._ends(patient, runs, started, by_timeout=by_timeout)
            assert runs.count == 1
            assert await titles(owner) == []
            assert await patient.tasks.count("alice") == 0
        assert await database_without_retries.tasks.count("alice") == 0

    @pytest.mark.parametrize("fault", [Fault.CUT_BEFORE, Fault.CUT_AFTER, Fault.SWALLOW])
    async def test_T3_while_its_undoing_is_lost(
        self,
        database_without_retries: Database,
        proxy: Proxy,
        owner: Connection,
        block: Block,
        fault: Fault,
    ) -> None:
        started = asyncio.Event()

        async def work(tx: Transaction) -> None:
            async with block(tx):
                proxy.break_at(b"ROLLBACK", fault)
                started.set()
                await asyncio.sleep(10)

        runs = Runs(work)
        async with Database.from_url(
            proxy.url, pool_size=1, max_overflow=0, command_timeout_seconds=1
        ) as patient:
            await self._ends(patient, runs, started, by_timeout=False)
        assert runs.count == 1
        assert await titles(owner) == []
        assert await database_without_retries.tasks.count("alice") == 0

    async def test_T3_twice(self, db: Database, owner: Connection, block: Block) -> None:
        """The second one arrives while the savepoint is being undone."""
        started = asyncio.Event()

        async def work(tx: Transaction) -> None:
            async with block(tx):
                started.set()
                await asyncio.sleep(10)

        for turns in range(8):
            started.clear()
            runs = Runs(work)
            call = asyncio.create_task(db.run("alice", runs))
            await started.wait()
            call.cancel()
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert runs.count == 1
            assert await titles(owner) == []

    async def test_T3_while_another_task_uses_the_session(
        self, db: Database, owner: Connection, block: Block
    ) -> None:
        started = asyncio.Event()
        others: list[asyncio.Task[None]] = []

        async def work(tx: Transaction) -> None:
            async with block(tx):
                others.append(asyncio.create_task(slow_by_session(tx)))
                await asyncio.sleep(0.05)
                started.set()
                await asyncio.sleep(10)

        runs = Runs(work)
        await self._ends(db, runs, started, by_timeout=False)
        for other in others:
            other.cancel()
            await asyncio.gather(other, return_exceptions=True)
        assert runs.count == 1
        assert await titles(owner) == []
        assert await db.tasks.count("alice") == 0

    @staticmethod
    async def _ends(db: Database, runs: Runs, started: asyncio.Event, *, by_timeout: bool) -> None:
        if by_timeout:
            with pytest.raises(TimeoutError):
                async with timeout_after(started.wait()):
                    await db.run("alice", runs)
            return
        call = asyncio.create_task(db.run("alice", runs))
        async with asyncio.timeout(30):
            await started.wait()
            await asyncio.sleep(0.02)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call


class TestTimeoutInside:
    """The caller catches the timeout of one statement, inside the transaction."""

    @pytest.mark.parametrize("statement", [slow, slow_by_session, slow_stream])
    async def test_T3_commits_nothing_and_is_not_run_again(
        self, db: Database, owner: Connection, statement: Callable[[Transaction], Awaitable[None]]
    ) -> None:
        async def work(tx: Transaction) -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await statement(tx)

        runs = Runs(work)
        with pytest.raises(TransactionAbortedError):
            await db.run("alice", runs)
        assert runs.count == 1
        assert await titles(owner) == []
        assert await db.tasks.count("alice") == 0

    async def test_T3_commit_that_is_cancelled_is_not_run_again(
        self, db: Database, proxy: Proxy, owner: Connection
    ) -> None:
        async def nothing(_tx: Transaction) -> None:
            pass

        async def committed() -> None:
            while await titles(owner) != ["lost"]:
                pass

        async with Database.from_url(proxy.url, pool_size=1, max_overflow=0) as patient:
            await patient.tasks.count("alice")
            proxy.break_at(COMMIT, Fault.SWALLOW)
            runs = Runs(nothing)
            with pytest.raises(TimeoutError):
                async with timeout_after(committed()):
                    await patient.run("alice", runs)
            assert runs.count == 1
        assert await titles(owner) == ["lost"]
        assert await db.tasks.count("alice") == 1


class TestStack:
    """Savepoints are closed in the reverse order of opening, by the task that opened them."""

    @pytest.mark.parametrize("first", ["savepoint", "begin_nested"])
    async def test_T4_both_kinds_mix_in_both_orders(
        self, db: Database, owner: Connection, first: str
    ) -> None:
        def block(tx: Transaction, kind: str) -> AbstractAsyncContextManager[object]:
            return tx.savepoint() if kind == "savepoint" else tx.session().begin_nested()

        second = "begin_nested" if first == "savepoint" else "savepoint"
        async with db.transaction("alice") as tx:
            async with block(tx, first):
                tx.session().add(Label(name="outer"))
                async with block(tx, second):
                    tx.session().add(Label(name="inner"))
                with pytest.raises(LookupError):
                    async with block(tx, second):
                        tx.session().add(Label(name="undone"))
                        await tx.session().flush()
                        raise LookupError
                assert [label.name for label in await tx.session().scalars(select(Label))] == [
                    "outer",
                    "inner",
                ]
            with pytest.raises(LookupError):
                async with block(tx, first):
                    async with block(tx, second):
                        tx.session().add(Label(name="released"))
                    raise LookupError
            assert tx._gate.savepoints == []
            await tx.tasks.create("alice", "kept")
        names = await owner.fetchval("SELECT array_agg(name::text ORDER BY id) FROM labels")
        assert names == ["outer", "inner"]
        assert await titles(owner) == ["kept"]

    async def test_T4_closing_the_outer_one_first_is_refused_and_stores_nothing(
        self, db: Database, owner: Connection
    ) -> None:
        for inner_kind in ("savepoint", "begin_nested"):
            with pytest.raises(ConcurrentUseError):
                async with db.transaction("alice") as tx:
                    await tx.tasks.create("alice", "lost")
                    outer = tx.savepoint()
                    await outer.__aenter__()
                    inner = tx.savepoint()
                    if inner_kind == "savepoint":
                        await inner.__aenter__()
                    else:
                        _ = await tx.session().begin_nested().start()
                    await outer.__aexit__(None, None, None)
            assert await titles(owner) == []
        assert await db.tasks.count("alice") == 0

    async def test_T4_outer_one_of_the_session_closes_the_inner_one(
        self, db: Database, owner: Connection
    ) -> None:
        async with db.transaction("alice") as tx:
            outer, inner = tx.session().begin_nested(), tx.session().begin_nested()
            _ = await outer.start()
            _ = await inner.start()
            await tx.tasks.create("alice", "kept")
            await outer.commit()
            assert not inner.is_active
            assert tx._gate.savepoints == []
        assert await titles(owner) == ["kept"]

    async def test_T4_nested_block_of_the_session_that_is_open_at_the_end_commits_nothing(
        self, db: Database, owner: Connection
    ) -> None:
        with pytest.raises(TransactionError, match="savepoint"):
            async with db.transaction("alice") as tx:
                _ = await tx.session().begin_nested().start()
                await tx.tasks.create("alice", "half")
        assert await titles(owner) == []
        assert await db.tasks.count("alice") == 0

    @pytest.mark.parametrize("block", BLOCKS[1:])
    async def test_T4_another_task_is_refused_while_it_is_open(
        self, db: Database, owner: Connection, block: Block
    ) -> None:
        with pytest.raises((TransactionAbortedError, ConcurrentUseError)):
            async with db.transaction("alice") as tx, block(tx):
                await tx.tasks.create("alice", "lost")
                for call in (in_another_task, context_of_another_task):
                    with pytest.raises((ConcurrentUseError, TransactionAbortedError)):
                        await asyncio.create_task(call(tx))
        assert await titles(owner) == []

    async def test_T4_task_that_opened_it_may_hand_nothing_over(
        self, db: Database, owner: Connection
    ) -> None:
        with pytest.raises((TransactionAbortedError, ConcurrentUseError)):
            async with db.transaction("alice") as tx:
                outer = tx.savepoint()
                await asyncio.create_task(entered(outer))
                await tx.tasks.create("alice", "lost")
        assert await titles(owner) == []

    async def test_T4_another_task_may_use_it_before_and_after(
        self, db: Database, owner: Connection
    ) -> None:
        async with db.transaction("alice") as tx:
            await asyncio.create_task(created(tx, "before"))
            async with tx.savepoint():
                await tx.tasks.create("alice", "inside")
            await asyncio.create_task(created(tx, "after"))
        assert await titles(owner) == ["before", "inside", "after"]

    async def test_T4_hundred_levels(self, db: Database, owner: Connection) -> None:
        async def descend(tx: Transaction, depth: int) -> None:
            if depth == 100:
                raise LookupError
            with suppress(LookupError):
                async with tx.savepoint():
                    await tx.tasks.create("alice", f"{depth}")
                    await descend(tx, depth + 1)

        async with db.transaction("alice") as tx:
            await descend(tx, 0)
            assert tx._gate.savepoints == []
        assert len(await titles(owner)) == 99


async def entered(block: AbstractAsyncContextManager[object]) -> None:
    await block.__aenter__()


async def created(tx: Transaction, title: str) -> None:
    await tx.tasks.create("alice", title)


async def context_of_another_task(tx: Transaction) -> None:
    await tx.execute(text("SELECT 1"))


class TestOutcome:
    async def test_unknown_outcome_is_not_run_again(
        self, database_without_retries: Database, proxy: Proxy, owner: Connection
    ) -> None:
        async def nothing(_tx: Transaction) -> None:
            pass

        async with Database.from_url(proxy.url, pool_size=1, max_overflow=0) as patient:
            await patient.tasks.count("alice")
            proxy.break_at(COMMIT, Fault.CUT_AFTER)
            runs = Runs(nothing)
            with pytest.raises(OutcomeUnknownError):
                await patient.run("alice", runs)
        assert runs.count == 1
        assert await titles(owner) == ["lost"]
        assert await database_without_retries.tasks.count("alice") == 1
