"""An ORM session inside a transaction holds entities of one user, in the application's tables."""

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from typing import Any, Final

import labels
import pytest
import pytest_asyncio
from driver import Connection
from labels import Label, Note
from proxy import Fault, Proxy
from sqlalchemy import bindparam, delete, func, insert, inspect, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import DBAPIError, InvalidRequestError, SAWarning, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import make_transient_to_detached, selectinload
from sqlalchemy.orm.exc import StaleDataError

from todo_db import (
    ConcurrentUseError,
    ConflictError,
    Database,
    InvalidInputError,
    IsolationError,
    TodoDBError,
    Transaction,
    TransactionAbortedError,
    TransactionError,
    UnavailableError,
)
from todo_db.embedded import LOGIN, OWNER
from todo_db.models import Task, User


@pytest.fixture
def login() -> str:
    """One is enough where nothing is said of the role."""
    return LOGIN


@pytest_asyncio.fixture
async def db(db: Database, owner: Connection) -> Database:
    await labels.create_tables(owner)
    return db


async def stored(owner: Connection) -> list[tuple[str, str]]:
    rows = await owner.fetch("SELECT user_id, name FROM labels ORDER BY id")
    return [(row["user_id"], row["name"]) for row in rows]


async def plant(owner: Connection, user: str, name: str) -> int:
    found = await owner.fetchval(
        "INSERT INTO labels (user_id, name) VALUES ($1, $2) RETURNING id", user, name
    )
    return int(found)


def detached(**values: Any) -> Label:  # noqa: ANN401  # of any column
    """Return an entity as another session left it."""
    label = Label(**values)
    make_transient_to_detached(label)
    return label


async def nested(session: AsyncSession) -> None:
    async with session.begin_nested():
        pass


class TestEntities:
    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_are_added_read_changed_and_deleted(
        self, db: Database, owner: Connection
    ) -> None:
        async with db.transaction("alice") as tx:
            session = tx.session()
            label = Label(name="home")
            session.add(label)
            await session.flush()
            assert isinstance(label.id, int)
            assert await session.get(Label, label.id) is label
        async with db.transaction("alice") as tx:
            found = await tx.session().scalar(select(Label).where(Label.name == "home"))
            assert found is not None
            assert (found.id, found.user_id) == (label.id, "alice")
            found.name = "house"
        assert await stored(owner) == [("alice", "house")]
        async with db.transaction("alice") as tx:
            session = tx.session()
            await session.delete(await session.get_one(Label, label.id))
        assert await stored(owner) == []

    async def test_of_the_package_are_entities_too(self, db: Database, owner: Connection) -> None:
        async with db.transaction("alice") as tx:
            task = Task(title="by the session")
            tx.session().add(task)
            await tx.session().flush()
            assert (await tx.tasks.get("alice", task.id)).title == "by the session"
            assert (task.user_id, task.completed) == ("alice", False)
            user = await tx.session().get_one(User, "alice")
            user.name = "Alice Liddell"
        assert await owner.fetchval("SELECT name FROM users WHERE id = 'alice'") == user.name
        assert await db.tasks.count("alice") == 1

    async def test_of_the_repositories_are_seen_at_once(self, db: Database) -> None:
        async with db.transaction("alice") as tx:
            created = await tx.tasks.create("alice", "x")
            task = await tx.session().get_one(Task, created.id)
            await tx.tasks.update("alice", created.id, title="y")
            await tx.session().refresh(task)
            assert task.title == "y"

    async def test_is_one_session_for_the_whole_transaction(self, db: Database) -> None:
        async with db.transaction("alice") as tx:
            assert tx.session() is tx.session()
            assert isinstance(tx.session(), AsyncSession)
        async with db.transaction("alice") as other:
            assert other.session() is not tx.session()

    async def test_keep_their_values_after_the_commit(self, db: Database) -> None:
        async with db.transaction("alice") as tx:
            label = Label(name="home", size=5)
            tx.session().add(label)
        assert (label.name, label.size, label.user_id) == ("home", 5, "alice")
        assert isinstance(label.updated_at, datetime)

    async def test_come_back_with_what_the_server_set(
        self, db: Database, owner: Connection
    ) -> None:
        async with db.transaction("alice") as tx:
            session = tx.session()
            label, task = Label(name="home"), Task(title="x")
            session.add_all([label, task])
            await session.flush()
            before = label.updated_at, task.updated_at
            label.name, task.title = "house", "y"
            await session.flush()
            after = label.updated_at, task.updated_at
        assert after[0] > before[0]
        assert after[0] == await owner.fetchval("SELECT updated_at FROM labels")
        assert after[1] == await owner.fetchval("SELECT updated_at FROM tasks")
        changed = await db.tasks.update("alice", task.id, title="z", expected_updated_at=after[1])
        async with db.transaction("alice") as tx:
            found = await tx.session().get_one(Task, task.id)
            assert found.updated_at == changed.updated_at
            found.completed = True
            await tx.session().flush()
            assert found.updated_at == (await tx.tasks.get("alice", task.id)).updated_at

    async def test_are_streamed(self, db: Database, owner: Connection) -> None:
        await owner.execute(
            "INSERT INTO labels (user_id, name) SELECT user_id, n::text FROM"
            " generate_series(1, 1200) n, (VALUES ('alice'), ('bob')) u (user_id)"
        )
        async with db.transaction("alice") as tx:
            session = tx.session()
            streamed = await session.stream_scalars(select(Label).order_by(Label.id))
            names = [label.name async for label in streamed]
            assert names == [str(number) for number in range(1, 1201)]
            pieces = await session.stream(
                select(Label.user_id).execution_options(yield_per=100), execution_options={}
            )
            async for piece in pieces.partitions():
                assert {row.user_id for row in piece} == {"alice"}

    async def test_stream_goes_on_between_other_statements(
        self, db: Database, owner: Connection
    ) -> None:
        await owner.execute(
            "INSERT INTO labels (user_id, name) SELECT 'alice', n::text FROM"
            " generate_series(1, 300) n"
        )
        async with db.transaction("alice") as tx:
            streamed = await tx.session().stream(select(Label.name))
            names = []
            async for row in streamed:
                names.append(row.name)
                if len(names) % 100 == 0:
                    await tx.tasks.create("alice", row.name)
        assert len(names) == 300
        assert await db.tasks.count("alice") == 3


class TestStream:
    async def test_of_two_tasks_is_refused_and_stores_nothing(
        self, db: Database, owner: Connection
    ) -> None:
        with pytest.raises(TransactionAbortedError):
            async with db.transaction("alice") as tx:
                await tx.tasks.create("alice", "lost")
                streamed = await tx.session().stream(
                    text(
                        "SELECT pg_sleep(CASE n WHEN 60 THEN 1 ELSE 0 END) AS x"
                        " FROM generate_series(1, 100) n"
                    )
                )
                await streamed.fetchmany(10)
                rest = asyncio.create_task(streamed.fetchall())
                await asyncio.sleep(0.05)
                with pytest.raises(ConcurrentUseError):
                    await tx.tasks.count("alice")
                await asyncio.gather(rest, return_exceptions=True)
        assert await owner.fetchval("SELECT count(*) FROM tasks") == 0

    async def test_that_fails_aborts(self, db: Database) -> None:
        with pytest.raises(TransactionAbortedError):
            async with db.transaction("alice") as tx:
                streamed = await tx.session().stream(
                    text("SELECT 1 / (200 - n) AS x FROM generate_series(1, 300) n")
                )
                with pytest.raises(TodoDBError):
                    await streamed.fetchall()
                with pytest.raises(TransactionAbortedError):
                    await tx.tasks.count("alice")

    async def test_that_loses_its_connection_is_unavailable(
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        with pytest.raises(UnavailableError):
            async with database_without_retries.transaction("alice") as tx:
                streamed = await tx.session().stream(text("SELECT generate_series(1, 3000)"))
                await streamed.fetchmany(10)
                proxy.break_at(b"portal", Fault.CUT_BEFORE)
                await streamed.fetchall()
        assert await database_without_retries.tasks.count("alice") == 0


class TestBlock:
    async def test_changes_that_were_not_flushed_are_stored_at_its_end(
        self, db: Database, owner: Connection
    ) -> None:
        kept = await plant(owner, "alice", "old")
        async with db.transaction("alice") as tx:
            session = tx.session()
            session.add(Label(name="new"))
            (await session.get_one(Label, kept)).name = "renamed"
        assert await stored(owner) == [("alice", "renamed"), ("alice", "new")]

    @pytest.mark.parametrize("way", ["async with", "close", "aclose", "reset", "sync close"])
    async def test_leaving_the_session_stores_them_too(
        self, db: Database, owner: Connection, way: str
    ) -> None:
        async with db.transaction("alice") as tx:
            session = tx.session()
            match way:
                case "async with":
                    async with session as entered:
                        assert entered is session
                        session.add(Label(name="one"))
                case "sync close":
                    session.add(Label(name="one"))
                    await session.run_sync(lambda sync: sync.close())
                case _:
                    session.add(Label(name="one"))
                    await getattr(session, way)()
            assert not session.new
            session.add(Label(name="two"))
            await tx.tasks.create("alice", "x")
        assert await stored(owner) == [("alice", "one"), ("alice", "two")]

    async def test_error_in_it_stores_nothing(self, db: Database, owner: Connection) -> None:
        with pytest.raises(LookupError):
            async with db.transaction("alice") as tx, tx.session() as session:
                session.add(Label(name="sent"))
                await session.flush()
                session.add(Label(name="not sent"))
                raise LookupError
        assert await stored(owner) == []

    async def test_change_that_is_refused_at_its_end_stores_nothing(
        self, db: Database, owner: Connection
    ) -> None:
        await plant(owner, "alice", "taken")
        for values, expected in (
            ({"name": "taken"}, ConflictError),
            ({"name": "much too long"}, InvalidInputError),
            ({}, InvalidInputError),
        ):
            with pytest.raises(expected):
                async with db.transaction("alice") as tx:
                    await tx.tasks.create("alice", "lost")
                    tx.session().add(Label(**values))
            assert tx._gate._pool.status.in_use == 0
        assert await stored(owner) == [("alice", "taken")]
        assert await db.tasks.count("alice") == 0

    async def test_read_only_one_stores_no_change(self, db: Database, owner: Connection) -> None:
        with pytest.raises(TransactionError, match="read-only"):
            async with db.transaction("alice", read_only=True) as tx:
                tx.session().add(Label(name="x"))
        assert await stored(owner) == []

    async def test_session_is_of_no_use_after_it(
        self, database_without_retries: Database, proxy: Proxy, owner: Connection
    ) -> None:
        async with database_without_retries.transaction("alice") as tx:
            session = tx.session()
            session.add(Label(name="home"))
        before = len(proxy.sent)
        session.add(Label(name="late"))
        for call in (
            session.flush(),
            session.scalar(select(Label)),
            session.get(Label, -1),
            nested(session),
        ):
            with pytest.raises(TransactionError, match="ended"):
                await call
        assert len(proxy.sent) == before
        assert await stored(owner) == [("alice", "home")]


_REFUSED: Final[dict[str, Callable[[AsyncSession], Awaitable[object]]]] = {
    "commit": lambda session: session.commit(),
    "rollback": lambda session: session.rollback(),
    "begin": lambda session: session.begin().start(),
    "invalidate": lambda session: session.invalidate(),
    "sync commit": lambda session: session.run_sync(lambda sync: sync.commit()),
    "sync rollback": lambda session: session.run_sync(lambda sync: sync.rollback()),
    "sync begin": lambda session: session.run_sync(lambda sync: sync.begin()),
    "sync prepare": lambda session: session.run_sync(lambda sync: sync.prepare()),
    "sync invalidate": lambda session: session.run_sync(lambda sync: sync.invalidate()),
    "get_transaction": lambda session: session.run_sync(lambda sync: sync.get_transaction()),
}


class TestEnd:
    @pytest.mark.parametrize("call", list(_REFUSED))
    @pytest.mark.parametrize("inside", [False, True])
    async def test_is_the_blocks_and_not_the_sessions(
        self,
        database_without_retries: Database,
        proxy: Proxy,
        owner: Connection,
        call: str,
        inside: bool,  # noqa: FBT001
    ) -> None:
        async with database_without_retries.transaction("alice") as tx:
            session = tx.session()
            session.add(Label(name="one"))
            if inside:
                async with session.begin_nested():
                    await self._refused(session, call, proxy)
            else:
                await self._refused(session, call, proxy)
            session.add(Label(name="two"))
        assert await stored(owner) == [("alice", "one"), ("alice", "two")]

    @staticmethod
    async def _refused(session: AsyncSession, call: str, proxy: Proxy) -> None:
        before = len(proxy.sent)
        with pytest.raises(TransactionError) as caught:
            await _REFUSED[call](session)
        assert len(str(caught.value).split()) > 5
        assert len(proxy.sent) == before

    async def test_can_be_in_no_other_hands(self, db: Database, owner: Connection) -> None:
        async with db.transaction("alice") as tx:
            session = tx.session()
            session.add(Label(name="one"))
            await session.flush()
            with pytest.raises(TransactionError):
                session.get_transaction()
        assert await stored(owner) == [("alice", "one")]


class TestOwner:
    async def test_is_filled_in_where_it_is_missing(self, db: Database, owner: Connection) -> None:
        async with db.transaction("alice") as tx:
            tx.session().add_all([Label(name="one"), Label(name="two", user_id="alice")])
            label = Label(name="three", notes=[Note(body="first"), Note(body="second")])
            tx.session().add(label)
        assert {user for user, _ in await stored(owner)} == {"alice"}
        assert await owner.fetchval("SELECT array_agg(DISTINCT user_id) FROM notes") == ["alice"]
        assert {note.user_id for note in label.notes} == {"alice"}

    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_other_than_the_transactions_is_refused_before_any_sql(
        self, database_without_retries: Database, proxy: Proxy, owner: Connection
    ) -> None:
        theirs = await plant(owner, "bob", "bob's")
        async with database_without_retries.transaction("alice") as tx:
            session = tx.session()
            before = len(proxy.sent)
            with pytest.raises(IsolationError):
                session.add(Label(name="x", user_id="bob"))
            with pytest.raises(IsolationError):
                session.add(detached(id=theirs, name="x", user_id="bob"))
            with pytest.raises(IsolationError):
                await session.delete(detached(id=theirs, name="x", user_id="bob"))
            with pytest.raises(IsolationError):
                session.add(User(id="bob", email="x@example.org"))
            with pytest.raises(IsolationError):
                session.add(Task(user_id="bob", title="x"))
            with pytest.raises(IsolationError):
                session.add(Label(name="y", notes=[Note(body="x", user_id="bob")]))
            assert len(proxy.sent) == before
            session.expunge_all()
            session.add(Label(name="alice's"))
        assert await stored(owner) == [("bob", "bob's"), ("alice", "alice's")]

    async def test_that_is_changed_is_refused_before_any_sql(
        self, database_without_retries: Database, proxy: Proxy, owner: Connection
    ) -> None:
        mine = await plant(owner, "alice", "mine")
        with pytest.raises(IsolationError):
            async with database_without_retries.transaction("alice") as tx:
                label = await tx.session().get_one(Label, mine)
                before = len(proxy.sent)
                label.user_id = "bob"
                with pytest.raises(IsolationError):
                    await tx.session().flush()
                assert len(proxy.sent) == before
        with pytest.raises(IsolationError):
            async with database_without_retries.transaction("alice") as tx:
                pending = Label(name="new")
                tx.session().add(pending)
                pending.user_id = "bob"
        assert await stored(owner) == [("alice", "mine")]

    @pytest.mark.parametrize("load", [False, True])
    async def test_of_a_merged_entity_is_refused(
        self,
        db: Database,
        owner: Connection,
        load: bool,  # noqa: FBT001
    ) -> None:
        theirs = await plant(owner, "bob", "bob's")
        mine = await plant(owner, "alice", "mine")
        for label in (
            detached(id=theirs, name="x", user_id="bob"),
            detached(id=mine, name="x", user_id="bob"),
            Label(id=mine, name="x", user_id="bob"),
        ):
            with pytest.raises((IsolationError, InvalidRequestError)):
                async with db.transaction("alice") as tx:
                    merged = await tx.session().merge(label, load=load)
                    merged.size = 7
                    await tx.session().flush()
        assert await stored(owner) == [("bob", "bob's"), ("alice", "mine")]
        assert await owner.fetchval("SELECT count(size) FROM labels") == 0

    async def test_that_is_hidden_meets_the_fence(self, db: Database, owner: Connection) -> None:
        """The entity claims to be alice's, or says nothing of its owner."""
        theirs = await plant(owner, "bob", "bob's")

        async def change(session: AsyncSession, label: Label) -> None:
            session.add(label)
            label.name = "taken"
            await session.flush()

        async def remove(session: AsyncSession, label: Label) -> None:
            await session.delete(label)
            await session.flush()

        async def fetch(session: AsyncSession, label: Label) -> None:
            session.add(label)
            await session.refresh(label)

        for attack in (change, remove, fetch):
            for label in (
                detached(id=theirs, name="x", user_id="alice"),
                detached(id=theirs, name="x"),
            ):
                # To SQLAlchemy, a DELETE that finds no row is worth a warning.
                with pytest.raises((StaleDataError, SQLAlchemyError, SAWarning)):
                    async with db.transaction("alice") as tx:
                        await attack(tx.session(), label)
                        pytest.fail("it passed")
        assert await stored(owner) == [("bob", "bob's")]


class TestFence:
    """What a session can reach: rows of its user alone, whatever it asks."""

    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_rows_of_others_are_never_seen(self, db: Database, owner: Connection) -> None:
        theirs, mine = await plant(owner, "bob", "bob's"), await plant(owner, "alice", "alice's")
        await owner.execute(
            "INSERT INTO notes (user_id, label_id, body) VALUES ('bob', $1, 'secret')", theirs
        )
        async with db.transaction("alice") as tx:
            session = tx.session()
            assert await session.get(Label, theirs) is None
            assert await session.get(Label, theirs, populate_existing=True) is None
            assert await session.get(Label, theirs, with_for_update=True) is None
            assert await session.get(Note, 1) is None
            assert await session.get(User, "bob") is None
            everything = await session.scalars(select(Label))
            assert [label.id for label in everything] == [mine]
            joined = select(Label).join(Note, isouter=True).options(selectinload(Label.notes))
            assert [label.id for label in (await session.scalars(joined)).unique()] == [mine]
            assert await session.scalar(select(func.count()).select_from(Note)) == 0
            assert (await session.scalars(select(User.id))).all() == ["alice"]
            literal = select(Label).from_statement(text("SELECT * FROM labels"))
            assert [label.id for label in await session.scalars(literal)] == [mine]

    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_rows_of_others_are_never_changed(self, db: Database, owner: Connection) -> None:
        theirs = await plant(owner, "bob", "bob's")
        ids = {"ids": [theirs]}
        async with db.transaction("alice") as tx:
            session = tx.session()
            everything = Label.id.in_(bindparam("ids", expanding=True))
            await session.execute(update(Label).where(everything).values(name="x"), ids)
            await session.execute(update(Label).values(name="x"))
            await session.execute(delete(Label).where(everything), ids)
            await session.execute(delete(Label))
        with pytest.raises(StaleDataError):
            async with db.transaction("alice") as tx:
                await tx.session().execute(update(Label), [{"id": theirs, "name": "x"}])
        assert await stored(owner) == [("bob", "bob's")]

    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_rows_are_never_planted_for_others(self, db: Database, owner: Connection) -> None:
        theirs = await plant(owner, "bob", "bob's")
        rows = [{"name": "one", "user_id": "bob"}, {"name": "two", "user_id": "bob"}]
        takes = upsert(Label).values(user_id="bob", name="bob's")
        attacks: tuple[Callable[[AsyncSession], Awaitable[object]], ...] = (
            lambda session: session.execute(insert(Label), rows),
            lambda session: session.execute(insert(Label), rows[:1]),
            lambda session: session.execute(insert(Label).values(rows)),
            lambda session: session.execute(insert(Label).values(rows[0]).returning(Label)),
            lambda session: session.execute(takes.on_conflict_do_nothing()),
            lambda session: session.execute(
                takes.on_conflict_do_update(
                    index_elements=["user_id", "name"], set_={"name": "taken"}
                )
            ),
            lambda session: session.run_sync(
                lambda sync: sync.bulk_insert_mappings(inspect(Label), rows)
            ),
            lambda session: session.run_sync(
                lambda sync: sync.bulk_save_objects([Label(name="x", user_id="bob")])
            ),
        )
        for plants in attacks:
            with pytest.raises(IsolationError):
                async with db.transaction("alice") as tx:
                    await plants(tx.session())
        with pytest.raises((ConflictError, IsolationError)):
            async with db.transaction("alice") as tx:
                tx.session().add(Note(label_id=theirs, body="x"))
        assert await stored(owner) == [("bob", "bob's")]
        assert await owner.fetchval("SELECT count(*) FROM notes") == 0

    async def test_rows_without_an_owner_are_refused(self, db: Database, owner: Connection) -> None:
        """A bulk statement does not pass the session's check, so nothing fills the owner in."""
        with pytest.raises((IsolationError, InvalidInputError)):
            async with db.transaction("alice") as tx:
                await tx.session().execute(insert(Label), [{"name": "one"}, {"name": "two"}])
        assert await stored(owner) == []

    async def test_many_rows_at_once_are_the_users(self, db: Database, owner: Connection) -> None:
        rows = [{"name": f"{number}", "user_id": "alice"} for number in range(1500)]
        async with db.transaction("alice") as tx:
            made = await tx.session().scalars(insert(Label).returning(Label), rows)
            assert [label.name for label in made] == [row["name"] for row in rows]
        assert len(await stored(owner)) == 1500


class TestLazyLoading:
    async def test_is_refused_and_the_transaction_goes_on(
        self, db: Database, owner: Connection
    ) -> None:
        mine = await plant(owner, "alice", "mine")
        async with db.transaction("alice") as tx:
            session = tx.session()
            label = await session.get_one(Label, mine)
            with pytest.raises(TransactionError, match="selectinload"):
                _ = label.notes
            session.expire(label)
            with pytest.raises(TransactionError, match="selectinload"):
                _ = label.name
            await session.refresh(label, ["name", "notes"])
            assert (label.name, label.notes) == ("mine", [])
            loaded = await session.scalar(
                select(Label)
                .options(selectinload(Label.notes))
                .execution_options(populate_existing=True)
            )
            assert loaded is label
            await tx.tasks.create("alice", "stored")
        assert await db.tasks.count("alice") == 1

    async def test_after_the_end_is_refused_too(self, db: Database, owner: Connection) -> None:
        mine = await plant(owner, "alice", "mine")
        async with db.transaction("alice") as tx:
            label = await tx.session().get_one(Label, mine)
        with pytest.raises((TransactionError, SQLAlchemyError)):
            _ = label.notes
        assert label.name == "mine"


class TestNested:
    async def test_undoes_its_block_and_nothing_else(self, db: Database, owner: Connection) -> None:
        async with db.transaction("alice") as tx:
            session = tx.session()
            kept = Label(name="kept")
            session.add(kept)
            with pytest.raises(LookupError):
                async with session.begin_nested():
                    kept.name = "changed"
                    session.add(Label(name="undone"))
                    await tx.tasks.create("alice", "undone")
                    await session.flush()
                    raise LookupError
            await session.refresh(kept)
            assert kept.name == "kept"
            assert [label.name for label in await session.scalars(select(Label))] == ["kept"]
            async with session.begin_nested():
                session.add(Label(name="kept, too"))
        assert [name for _, name in await stored(owner)] == ["kept", "kept, too"]
        assert await db.tasks.count("alice") == 0

    @pytest.mark.parametrize("session_first", [False, True])
    async def test_savepoint_keeps_the_entities_in_step(
        self,
        db: Database,
        owner: Connection,
        session_first: bool,  # noqa: FBT001
    ) -> None:
        async with db.transaction("alice") as tx:
            if session_first:
                tx.session().add(Label(name="kept"))
            with pytest.raises(LookupError):
                async with tx.savepoint():
                    undone = Label(name="undone")
                    tx.session().add(undone)
                    await tx.tasks.create("alice", "undone")
                    await tx.session().flush()
                    raise LookupError
            assert undone not in tx.session()
            assert await tx.session().get(Label, undone.id) is None
            with pytest.raises(LookupError):
                async with tx.savepoint():
                    tx.session().add(Label(name="never sent"))
                    raise LookupError
            tx.session().add(Label(name="after"))
        names = ["kept", "after"] if session_first else ["after"]
        assert [name for _, name in await stored(owner)] == names
        assert await db.tasks.count("alice") == 0

    async def test_savepoint_without_the_session_is_undone_from_its_begin(
        self, db: Database
    ) -> None:
        """SQLAlchemy would send SAVEPOINT with the next statement of the session."""
        async with db.transaction("alice") as tx:
            for block in (tx.savepoint, tx.session().begin_nested):
                with pytest.raises(LookupError):
                    async with block():
                        await tx.tasks.create("alice", "undone")
                        raise LookupError
        assert await db.tasks.count("alice") == 0

    @pytest.mark.parametrize(
        ("wrong", "expected"),
        [
            ({"name": "taken"}, ConflictError),
            ({"name": "much too long"}, InvalidInputError),
            ({"name": "x", "size": 100}, InvalidInputError),
            ({"name": None}, InvalidInputError),
            ({"name": "x", "size": "text"}, DBAPIError),
            ({"name": "x", "size": 2**40}, DBAPIError),
        ],
    )
    async def test_flush_that_fails_inside_leaves_the_transaction_usable(
        self,
        db: Database,
        owner: Connection,
        wrong: dict[str, object],
        expected: type[Exception],
    ) -> None:
        await plant(owner, "alice", "taken")
        async with db.transaction("alice") as tx:
            for block in (tx.session().begin_nested, tx.savepoint):
                with pytest.raises(expected):
                    async with block():
                        tx.session().add_all([Label(name="undone"), Label(**wrong)])
                        await tx.session().flush()
                assert not tx.session().new
                tx.session().add(Task(title="kept"))
                await tx.session().flush()
        assert await stored(owner) == [("alice", "taken")]
        assert await db.tasks.count("alice") == 2

    async def test_flush_that_fails_at_the_end_of_the_inner_block_is_undone(
        self, db: Database, owner: Connection
    ) -> None:
        await plant(owner, "alice", "taken")
        async with db.transaction("alice") as tx:
            for block in (tx.session().begin_nested, tx.savepoint):
                with pytest.raises(ConflictError):
                    async with block():
                        tx.session().add(Label(name="taken"))
                await tx.tasks.create("alice", "kept")
        assert await stored(owner) == [("alice", "taken")]
        assert await db.tasks.count("alice") == 2

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda: Label(name="taken"),
            lambda: Label(name="x", size="text"),
            # The label is sent, and then asyncpg refuses the value of its note.
            lambda: Label(name="sent", notes=[Note(body=5)]),
        ],
        ids=["conflict", "value", "value after a row"],
    )
    async def test_flush_that_fails_outside_stores_nothing(
        self, db: Database, owner: Connection, wrong: Callable[[], Label]
    ) -> None:
        """What the flush had sent before, the session has forgotten, and the server has not."""
        await plant(owner, "alice", "taken")
        with pytest.raises(TransactionAbortedError):
            async with db.transaction("alice") as tx:
                await tx.tasks.create("alice", "lost")
                tx.session().add_all([Task(title="sent"), wrong()])
                with pytest.raises((ConflictError, DBAPIError)):
                    await tx.session().flush()
                for call in (
                    tx.tasks.count("alice"),
                    tx.session().get(Label, 1),
                    nested(tx.session()),
                ):
                    with pytest.raises(TransactionAbortedError):
                        await call
        assert await stored(owner) == [("alice", "taken")]
        assert await db.tasks.count("alice") == 0

    async def test_flush_that_fails_in_a_savepoint_older_than_the_session(
        self, db: Database, owner: Connection
    ) -> None:
        await plant(owner, "alice", "taken")
        async with db.transaction("alice") as tx:
            with pytest.raises(ConflictError):
                async with tx.savepoint():
                    tx.session().add(Label(name="taken"))
                    await tx.session().flush()
            tx.session().add(Label(name="after"))
            await tx.session().flush()
        assert [name for _, name in await stored(owner)] == ["taken", "after"]


class TestErrors:
    @pytest.mark.parametrize(
        ("make", "expected", "field"),
        [
            (lambda: Label(name="a secret"), ConflictError, "unique"),
            (lambda: Label(name="a secret that is long"), InvalidInputError, "values"),
            (lambda: Label(name="x", size=100), InvalidInputError, "ck_labels_size"),
            (lambda: Label(size=1), InvalidInputError, "name"),
            (lambda: Note(label_id=-1, body="a secret"), ConflictError, "foreign"),
            (lambda: Task(title=" "), InvalidInputError, "title"),
        ],
    )
    async def test_have_names_and_tell_no_value(
        self,
        db: Database,
        owner: Connection,
        make: Callable[[], object],
        expected: type[TodoDBError],
        field: str,
    ) -> None:
        await plant(owner, "alice", "a secret")
        with pytest.raises(expected) as caught:
            async with db.transaction("alice") as tx:
                tx.session().add(make())
                await tx.session().flush()
        error = caught.value
        assert (error.__cause__, error.__context__) == (None, None)
        assert "secret" not in "".join(traceback.format_exception_only(error))
        if isinstance(error, InvalidInputError):
            assert error.field == field

    async def test_stale_entity_is_sqlalchemys_error(self, db: Database, owner: Connection) -> None:
        mine = await plant(owner, "alice", "mine")
        with pytest.raises(StaleDataError):
            async with db.transaction("alice") as tx:
                label = await tx.session().get_one(Label, mine)
                await owner.execute("DELETE FROM labels")
                label.name = "x"


class TestCascade:
    async def test_deletes_children_by_the_database_without_loading_them(
        self, database_without_retries: Database, proxy: Proxy, owner: Connection
    ) -> None:
        db = database_without_retries
        async with db.transaction("alice") as tx:
            label = Label(name="parent", notes=[Note(body="one"), Note(body="two")])
            tx.session().add(label)
        async with db.transaction("alice") as tx:
            found = await tx.session().get_one(Label, label.id)
            before = len(proxy.sent)
            await tx.session().delete(found)
            await tx.session().flush()
            assert b"FROM notes" not in proxy.sent[before:]
        assert await stored(owner) == []
        assert await owner.fetchval("SELECT count(*) FROM notes") == 0

    async def test_orphan_is_deleted(self, db: Database, owner: Connection) -> None:
        async with db.transaction("alice") as tx:
            label = Label(name="parent", notes=[Note(body="one"), Note(body="two")])
            tx.session().add(label)
            await tx.session().flush()
            del label.notes[0]
        assert await owner.fetchval("SELECT array_agg(body) FROM notes") == ["two"]

    async def test_child_of_another_users_parent_is_refused(
        self, db: Database, owner: Connection
    ) -> None:
        theirs = await plant(owner, "bob", "bob's")
        for parent in ({"label_id": theirs}, {"label": detached(id=theirs, user_id="bob")}):
            with pytest.raises((IsolationError, ConflictError)):
                async with db.transaction("alice") as tx:
                    tx.session().add(Note(body="x", **parent))
        assert await owner.fetchval("SELECT count(*) FROM notes") == 0


class TestConcurrentUse:
    @pytest.mark.parametrize(
        "use",
        [
            lambda session: session.execute(text("SELECT 1")),
            lambda session: session.get(Label, 1),
            lambda session: session.scalar(select(Label)),
        ],
        ids=["execute", "get", "scalar"],
    )
    async def test_second_task_is_refused_and_nothing_is_stored(
        self,
        db: Database,
        owner: Connection,
        use: Callable[[AsyncSession], Awaitable[object]],
    ) -> None:
        with pytest.raises(TransactionAbortedError):
            async with db.transaction("alice") as tx:
                session = tx.session()
                session.add(Label(name="lost"))
                await session.flush()
                slow = asyncio.ensure_future(session.execute(text("SELECT pg_sleep(1)")))
                await asyncio.sleep(0.05)
                with pytest.raises((ConcurrentUseError, SQLAlchemyError)):
                    await use(session)
                await asyncio.gather(slow, return_exceptions=True)
        assert await stored(owner) == []
        assert await db.tasks.count("alice") == 0

    async def test_flush_of_a_second_task_is_refused_by_sqlalchemy(
        self, db: Database, owner: Connection
    ) -> None:
        async with db.transaction("alice") as tx:
            session = tx.session()
            session.add(Label(name="once"))
            first, second = await asyncio.gather(
                session.flush(), session.flush(), return_exceptions=True
            )
            assert (first, type(second)) == (None, InvalidRequestError)
        assert await stored(owner) == [("alice", "once")]


class TestRoundTrips:
    """Statements are prepared once for each connection; that costs one round trip more."""

    async def test_each_statement_is_one(  # noqa: C901  # many small functions
        self, database_without_retries: Database, proxy: Proxy
    ) -> None:
        async def turns(work: Callable[[Transaction], Awaitable[object]]) -> int:
            before = proxy.round_trips
            async with database_without_retries.transaction("alice") as tx:
                await work(tx)
            return proxy.round_trips - before - 2

        number = 0

        async def add(tx: Transaction) -> None:
            nonlocal number
            number += 1
            tx.session().add(Label(name=f"{number}"))

        async def add_many(tx: Transaction) -> None:
            for _ in range(10):
                await add(tx)

        async def nothing(tx: Transaction) -> None:
            tx.session()
            async with tx.session():
                pass

        async def read(tx: Transaction) -> None:
            await tx.session().scalars(select(Label))

        async def change(tx: Transaction) -> None:
            label = await tx.session().scalar(select(Label).limit(1))
            assert label is not None
            label.size = (label.size or 0) + 1

        async def remove(tx: Transaction) -> None:
            label = await tx.session().scalar(select(Label).limit(1))
            await tx.session().delete(label)

        async def nested(tx: Transaction) -> None:
            async with tx.session().begin_nested():
                await add(tx)

        async def savepoint(tx: Transaction) -> None:
            tx.session()
            async with tx.savepoint():
                pass

        async def undone(tx: Transaction) -> None:
            with suppress(LookupError):
                async with tx.session().begin_nested():
                    raise LookupError

        expected = {
            nothing: (0, 0),
            add: (2, 1),
            add_many: (2, 1),
            read: (2, 1),
            change: (4, 2),
            remove: (3, 2),
            nested: (3, 3),
            savepoint: (2, 2),
            undone: (2, 2),
        }
        counted = {work: (await turns(work), await turns(work)) for work in expected}
        assert counted == expected
