"""mallory's attacks, and the checks that they fail. Two kinds of tests use them: those that run
with every defence, and those that remove one defence and expect the same check to fail.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import product
from typing import Final, Protocol

import asyncpg
import pytest
from asyncpg import PostgresError
from asyncpg.connection import LoggedQuery
from driver import Connection
from sqlalchemy import CursorResult, text

from todo_db import (
    ConflictError,
    Database,
    EmailTakenError,
    IsolationError,
    NewTask,
    NotFoundError,
    Page,
    Settings,
    TaskNotFoundError,
    TaskRecord,
    TaskRepository,
    TaskSort,
    Transaction,
    TransactionAbortedError,
    UserIdTakenError,
    UsernameTakenError,
    UserRecord,
    UserRepository,
)
from todo_db.transaction import TransactionPreamble

SECRET: Final = "known to alice"  # noqa: S105  # a title
TABLES: Final = ("users", "tasks", "idempotency_keys")
KEY: Final = "alice's key"
_CUTS: Final = 40
MALLORYS: Final = frozenset({"mallory"})


class Repositories(Protocol):
    """A `Database` or a `Transaction`."""

    @property
    def tasks(self) -> TaskRepository: ...
    @property
    def users(self) -> UserRepository: ...


@dataclass(frozen=True)
class Victim:
    """What mallory knows about alice's tasks."""

    tasks: list[TaskRecord]
    cursors: dict[tuple[TaskSort, bool | None, str | None], str]

    @property
    def ids(self) -> list[int]:
        return [task.id for task in self.tasks]


@dataclass(frozen=True)
class Attack:
    """One call with mallory's own user id, and its expected outcome.

    Attributes:
        expected: The users whose rows may be returned, the number of rows, or the error.
    """

    method: str
    run: Callable[[Repositories, str, Victim], Awaitable[object]]
    expected: object


async def _all(items: AsyncIterator[TaskRecord]) -> list[TaskRecord]:
    return [item async for item in items]


def _list(sort: TaskSort, completed: bool | None, search: str | None, *, after: bool) -> Attack:  # noqa: FBT001
    return Attack(
        "tasks.list",
        lambda at, user_id, victim: at.tasks.list(
            user_id,
            sort=sort,
            completed=completed,
            search=search,
            cursor=victim.cursors[sort, completed, search] if after else None,
        ),
        MALLORYS,
    )


async def _own(at: Repositories, user_id: str, created: TaskRecord) -> TaskRecord:
    """Return the task if it is stored for the user: the result alone only repeats the request."""
    return await at.tasks.get(user_id, created.id)


async def _create_as_alice_did(at: Repositories, user_id: str, victim: Victim) -> list[TaskRecord]:
    created = await at.tasks.create_many(user_id, new_of(victim.tasks), idempotency_key=KEY)
    return [await _own(at, user_id, task) for task in created]


async def _create_another(at: Repositories, user_id: str, _victim: Victim) -> TaskRecord:
    return await _own(
        at, user_id, await at.tasks.create(user_id, "new", idempotency_key=f"{KEY} too")
    )


def new_of(tasks: list[TaskRecord]) -> list[NewTask]:
    """Return the arguments that create such tasks, the oldest first."""
    return [NewTask(task.title, task.description, task.completed) for task in reversed(tasks)]


_FILTERS: Final = tuple(product(TaskSort, (None, True), (None, SECRET)))
ATTACKS: Final = (
    *(_list(*narrowed, after=after) for narrowed in _FILTERS for after in (False, True)),
    *(
        Attack(
            "tasks.iterate",
            lambda at, user_id, _, sort=sort: _all(at.tasks.iterate(user_id, sort=sort)),  # type: ignore[misc]
            MALLORYS,
        )
        for sort in TaskSort
    ),
    Attack(
        "tasks.get",
        lambda at, user_id, victim: at.tasks.get(user_id, victim.ids[0]),
        TaskNotFoundError,
    ),
    Attack("tasks.count", lambda at, user_id, _: at.tasks.count(user_id), 2),
    Attack("tasks.count", lambda at, user_id, _: at.tasks.count(user_id, search=SECRET), 0),
    Attack("tasks.count", lambda at, user_id, _: at.tasks.count(user_id, completed=True), 1),
    Attack(
        "tasks.update",
        lambda at, user_id, victim: at.tasks.update(user_id, victim.ids[0], title="taken"),
        TaskNotFoundError,
    ),
    Attack(
        "tasks.update",
        lambda at, user_id, victim: at.tasks.update(user_id, victim.ids[0]),
        TaskNotFoundError,
    ),
    Attack(
        "tasks.update",
        lambda at, user_id, victim: at.tasks.update(
            user_id, victim.ids[0], expected_updated_at=victim.tasks[0].updated_at, title="taken"
        ),
        TaskNotFoundError,
    ),
    Attack(
        # Not stale, because that would reveal that the task exists.
        "tasks.update",
        lambda at, user_id, victim: at.tasks.update(
            user_id, victim.ids[1], expected_updated_at=victim.tasks[0].updated_at, title="taken"
        ),
        TaskNotFoundError,
    ),
    Attack(
        "tasks.toggle",
        lambda at, user_id, victim: at.tasks.toggle(user_id, victim.ids[0]),
        TaskNotFoundError,
    ),
    Attack(
        "tasks.update_many",
        lambda at, user_id, victim: at.tasks.update_many(user_id, victim.ids, title="taken"),
        0,
    ),
    Attack(
        "tasks.delete",
        lambda at, user_id, victim: at.tasks.delete(user_id, victim.ids[0]),
        TaskNotFoundError,
    ),
    Attack(
        "tasks.delete_many",
        lambda at, user_id, victim: at.tasks.delete_many(user_id, victim.ids),
        0,
    ),
    Attack("tasks.delete_completed", lambda at, user_id, _: at.tasks.delete_completed(user_id), 1),
    Attack("tasks.create", lambda at, user_id, _: at.tasks.create(user_id, "new"), MALLORYS),
    Attack(
        "tasks.create_many",
        lambda at, user_id, _: at.tasks.create_many(user_id, [NewTask("new")]),
        MALLORYS,
    ),
    # alice's keys, with the same arguments and with other ones.
    Attack("tasks.create_many", _create_as_alice_did, MALLORYS),
    Attack("tasks.create", _create_another, MALLORYS),
    Attack("users.get", lambda at, user_id, _: at.users.get(user_id), MALLORYS),
    Attack(
        "users.ensure",
        lambda at, user_id, _: at.users.ensure(user_id, email="alice@example.org", name="taken"),
        MALLORYS,
    ),
    Attack("users.update", lambda at, user_id, _: at.users.update(user_id, name="new"), MALLORYS),
    # Without its predicate it would give all users the same address, which is unique.
    Attack(
        "users.set_email",
        lambda at, user_id, _: at.users.set_email(user_id, email="mallory@example.net"),
        MALLORYS,
    ),
    Attack(
        "users.set_email",
        lambda at, user_id, _: at.users.set_email(user_id, email="alice@example.org"),
        EmailTakenError,
    ),
    Attack(
        "users.update",
        lambda at, user_id, _: at.users.update(user_id, username="alice"),
        UsernameTakenError,
    ),
    Attack(
        "users.create",
        lambda at, user_id, _: at.users.create(user_id, email="new@example.org", name="taken"),
        UserIdTakenError,
    ),
    Attack("users.delete", lambda at, user_id, _: at.users.delete(user_id), None),
    Attack(
        "users.ensure",
        lambda at, user_id, _: at.users.ensure(user_id, email="alice@example.org", name="taken"),
        EmailTakenError,
    ),
)


async def plant_victim(db: Database) -> Victim:
    """Create tasks of alice, and tasks of mallory before and after them."""
    await db.users.update("alice", username="alice")
    await db.users.create("mallory", email="mallory@example.org", name="Mallory")
    await db.tasks.create("mallory", "before")
    hers = [NewTask(f"{SECRET} {i}", SECRET, completed=i % 2 == 0) for i in range(4)]
    await db.tasks.create_many("alice", hers, idempotency_key=KEY)
    await db.tasks.create_many("alice", [], idempotency_key=f"{KEY} too")
    await db.tasks.create("mallory", "mine", completed=True, idempotency_key="mallory's key")
    cursors = {}
    for sort, completed, search in _FILTERS:
        page = await db.tasks.list("alice", sort=sort, completed=completed, search=search, limit=1)
        assert page.next_cursor is not None
        cursors[sort, completed, search] = page.next_cursor
    return Victim(await _all(db.tasks.iterate("alice")), cursors)


async def rows_of(owner: Connection, user_id: str) -> list[object]:
    """Return every row of a user."""
    return [
        tuple(row)
        for sql in (
            "SELECT * FROM users WHERE id = $1",
            "SELECT * FROM idempotency_keys WHERE user_id = $1",
            "SELECT * FROM tasks WHERE user_id = $1",
        )
        for row in await owner.fetch(f"{sql} ORDER BY 1, 2", user_id)
    ]


def whose(result: object) -> object:
    """Return the users whose rows a call returned, or any other result."""
    match result:
        case TaskRecord():
            return {result.user_id}
        case UserRecord():
            return {result.id}
        case Page():
            return {task.user_id for task in result.items}
        case list():
            return {task.user_id for task in result}
        case _:
            return result


async def attack(at: Repositories, victim: Victim, *, method: str = "") -> None:
    """Run all attacks, or those on one method, on a database or in mallory's transaction."""
    for tried in ATTACKS:
        if tried.method.startswith(method):
            assert await _outcome(at, tried, victim) == tried.expected, tried.method


async def _outcome(at: Repositories, tried: Attack, victim: Victim) -> object:
    try:
        if isinstance(at, Transaction):
            async with at.savepoint():
                result = await tried.run(at, "mallory", victim)
        else:
            result = await tried.run(at, "mallory", victim)
    except (ConflictError, NotFoundError) as error:
        return type(error)
    found = whose(result)
    # An empty page shows no row of another user either.
    return MALLORYS if found == set() else found


async def rows(tx: Transaction, sql: str) -> list[object]:
    """Run a statement with `Transaction.execute`; return its first column."""
    return [row[0] for row in await tx.execute(text(sql))]


async def count(tx: Transaction, sql: str) -> int:
    """Run a statement with `Transaction.execute`; return how many rows it changed."""
    result = await tx.execute(text(sql))
    assert isinstance(result, CursorResult)
    return result.rowcount


async def refusal(tx: Transaction, sql: str) -> str:
    """Return the SQLSTATE with which the database refuses a statement."""
    with pytest.raises(PostgresError) as caught:
        await tx._gate.driver.execute("SAVEPOINT attack")
        await tx._gate.driver.execute(sql)
    await tx._gate.driver.execute("ROLLBACK TO SAVEPOINT attack")
    return str(caught.value.sqlstate)


def begin(user_id: str) -> str:
    """Return the BEGIN message of the package, for a connection outside its pool."""
    return TransactionPreamble(Settings()).begin(user_id, read_only=False)


@asynccontextmanager
async def pooled_connection(db: Database) -> AsyncGenerator[Connection]:
    """Yield a connection from the pool, in the state that the next transaction would find."""
    connection = await db._pool.acquire()
    try:
        yield connection.driver
    finally:
        db._pool.release(connection)


@asynccontextmanager
async def sent(driver: Connection) -> AsyncGenerator[list[str]]:
    """Record what is sent on a connection."""
    queries: list[str] = []

    def keep(record: LoggedQuery) -> None:
        queries.append(record.query)

    with driver.query_logger(keep):
        yield queries
        # asyncpg calls its query loggers in the next iteration of the loop.
        await asyncio.sleep(0)


# The checks. Each gets alice's tasks, which were created with every defence in place.


async def repositories_do_not_cross(
    db: Database, owner: Connection, victim: Victim, *, method: str = ""
) -> None:
    before = await rows_of(owner, "alice")
    await attack(db, victim, method=method)
    assert await rows_of(owner, "alice") == before


async def raw_sql_does_not_cross(db: Database, owner: Connection, _victim: Victim) -> None:
    before = await rows_of(owner, "alice")
    async with db.transaction("mallory") as tx:
        assert await rows(tx, "SELECT user_id FROM tasks") == ["mallory", "mallory"]
        assert await rows(tx, "SELECT id FROM users") == ["mallory"]
        assert await rows(tx, "SELECT key FROM idempotency_keys") == ["mallory's key"]
        assert await count(tx, "UPDATE tasks SET title = 'taken'") == 2
        assert await count(tx, "UPDATE users SET name = 'taken'") == 1
        assert await count(tx, "DELETE FROM tasks") == 2
        assert await count(tx, "DELETE FROM users") == 1
    assert await rows_of(owner, "alice") == before


async def open_policy_is_fenced(db: Database, owner: Connection, victim: Victim) -> None:
    for table in TABLES:
        await owner.execute(f"CREATE POLICY open ON {table} USING (true) WITH CHECK (true)")
    await raw_sql_does_not_cross(db, owner, victim)


async def granted_tables_are_fenced(_db: Database, owner: Connection, _victim: Victim) -> None:
    """Every table that the role may use, except todo_db_version, has both policies."""
    found = await owner.fetch("""
        SELECT c.relname, c.relrowsecurity, c.relforcerowsecurity, (
            SELECT array_agg(p.polname::text || p.polpermissive || p.polcmd::text
                ORDER BY p.polname)
            FROM pg_policy p
            WHERE p.polrelid = c.oid AND p.polroles = ARRAY['todo_app'::regrole::oid]
        ) AS policies
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.relname <> 'todo_db_version'
            AND n.nspname NOT IN ('pg_catalog', 'information_schema')
            AND has_any_column_privilege('todo_app', c.oid, 'SELECT, INSERT, UPDATE')
        ORDER BY c.relname
    """)
    assert [tuple(row) for row in found] == [
        (table, True, True, [f"{table}_fencefalse*", f"{table}_owntrue*"])
        for table in sorted(TABLES)
    ]


async def id_cannot_be_chosen(db: Database, _owner: Connection, victim: Victim) -> None:
    async with db.transaction("mallory") as tx:
        for task_id in (victim.ids[0], 999):
            insert = (
                "INSERT INTO tasks (id, user_id, title) OVERRIDING SYSTEM VALUE "
                f"VALUES ({task_id}, 'mallory', 'probe')"
            )
            assert await refusal(tx, insert) == "42501"


async def owner_cannot_be_changed(db: Database, owner: Connection, _victim: Victim) -> None:
    before = await rows_of(owner, "alice")
    async with db.transaction("mallory") as tx:
        columns = (("tasks", "user_id"), ("users", "id"), ("idempotency_keys", "user_id"))
        for table, column in columns:
            for value in ("'alice'", column):
                assert await refusal(tx, f"UPDATE {table} SET {column} = {value}") == "42501"
    assert await rows_of(owner, "alice") == before


async def keys_cannot_be_planted(db: Database, owner: Connection, _victim: Victim) -> None:
    """A key for alice would block hers; a refusal that depends on her keys would reveal them."""
    before = await rows_of(owner, "alice")
    async with db.transaction("mallory") as tx:
        for user_id in ("alice", "missing"):
            for key in (KEY, "new"):
                for conflict in (
                    "",
                    "ON CONFLICT DO NOTHING",
                    "ON CONFLICT (key, user_id) DO NOTHING",
                ):
                    insert = f"{key_for(user_id, key)} {conflict}"
                    assert await refusal(tx, insert) == "42501"
    assert await rows_of(owner, "alice") == before


def key_for(user_id: str, key: str) -> str:
    """Return the INSERT of a key, with the columns that the role may insert."""
    literal = key.replace("'", "''")
    return (
        "INSERT INTO idempotency_keys (user_id, key, fingerprint, task_ids)"
        f" VALUES ('{user_id}', '{literal}', repeat('0', 64), '{{}}')"
    )


async def keys_cannot_be_deleted(db: Database, owner: Connection, _victim: Victim) -> None:
    """A user cannot delete their own keys: a repeated call could store its tasks again."""
    before = await rows_of(owner, "mallory")
    async with db.transaction("mallory") as tx:
        for sql in (
            "DELETE FROM idempotency_keys",
            "TRUNCATE idempotency_keys",
            "UPDATE idempotency_keys SET key = key || '!'",
            "UPDATE idempotency_keys SET fingerprint = repeat('0', 64)",
            "UPDATE idempotency_keys SET task_ids = '{}'",
            "UPDATE idempotency_keys SET created_at = DEFAULT",
            f"{key_for('mallory', KEY)} ON CONFLICT (user_id, key) DO UPDATE SET task_ids = '{{}}'",
        ):
            assert await refusal(tx, sql) == "42501", sql
    assert await rows_of(owner, "mallory") == before


async def other_user_is_refused(db: Database, _owner: Connection, victim: Victim) -> None:
    async with db.transaction("mallory") as tx:
        async with sent(tx._gate.driver) as queries:
            for tried in ATTACKS:
                with pytest.raises(IsolationError):
                    await tried.run(tx, "alice", victim)
        assert queries == []


async def _break_off(tx: Transaction) -> None:
    await tx.users.update("alice", name="missing")
    raise ZeroDivisionError


async def nothing_stays_on_a_connection(db: Database, _owner: Connection, _victim: Victim) -> None:
    await db.tasks.list("alice")
    with pytest.raises(TaskNotFoundError):
        await db.tasks.get("alice", 999)
    with pytest.raises(ZeroDivisionError):
        await db.run("alice", _break_off)
    async with pooled_connection(db) as driver:
        left = await driver.fetchrow("""
            SELECT nullif(current_setting('todo_db.user_id', true), '') AS user_id,
                current_user = session_user AS itself,
                (SELECT count(*) FROM pg_settings
                    WHERE source = 'session' AND name NOT LIKE 'todo_db.%') AS settings,
                (SELECT count(*) FROM pg_locks
                    WHERE pid = pg_backend_pid() AND locktype = 'advisory') AS locks,
                pg_my_temp_schema() AS temporary
        """)
    assert left is not None
    assert tuple(left) == (None, True, 0, 0, 0)


async def own_rows_are_found_in_one_trip(db: Database, owner: Connection, victim: Victim) -> None:
    assert (await db.health()).round_trips == 1
    first = victim.ids[0]
    assert [task.id for task in (await db.tasks.list("alice")).items] == victim.ids
    try:
        task = await db.tasks.get("alice", first)
        task = await db.tasks.update(
            "alice", first, expected_updated_at=task.updated_at, title="mine"
        )
        await db.tasks.toggle("alice", first)
    except NotFoundError:
        pytest.fail("an own task was not found")
    assert task.title == "mine"
    assert await db.tasks.delete_many("alice", victim.ids) == len(victim.ids)
    assert await owner.fetchval("SELECT count(*) FROM tasks WHERE user_id = 'alice'") == 0


async def nothing_stays_of_one_trip(db: Database, _owner: Connection, victim: Victim) -> None:
    assert (await db.health()).round_trips == 1
    await db.tasks.toggle("alice", victim.ids[0])
    await db.tasks.list("alice")
    async with pooled_connection(db) as driver:
        left = await driver.fetchval("SELECT current_setting('todo_db.user_id', true)")
    # Empty is what PostgreSQL leaves of a setting that was local.
    assert left == ""


async def nothing_runs_after_a_commit(db: Database, owner: Connection, _victim: Victim) -> None:
    before = await rows_of(owner, "alice")
    with pytest.raises(IsolationError):
        await db.run("alice", _end_early)
    assert await rows_of(owner, "alice") == before


async def _end_early(tx: Transaction) -> None:
    await tx._gate.driver.execute("COMMIT")
    async with sent(tx._gate.driver) as queries:
        with pytest.raises(IsolationError):
            await tx.tasks.list("alice")
    assert queries == []
    raise IsolationError


async def dirty_connection_is_not_acquired(
    db: Database, _owner: Connection, _victim: Victim
) -> None:
    async with pooled_connection(db) as driver:
        dirty = driver.get_server_pid()
    # The connection is in the pool now.
    await driver.execute(begin("alice"))
    async with db.transaction("mallory") as tx:
        assert await rows(tx, "SELECT pg_backend_pid()") != [dirty]
    assert driver.is_closed()


async def dirty_connection_is_not_kept(db: Database, _owner: Connection, _victim: Victim) -> None:
    async with pooled_connection(db) as driver:
        await driver.execute(begin("alice"))
    assert await db.tasks.count("mallory") == 2
    async with pooled_connection(db) as driver:
        assert not driver.is_in_transaction()
        assert await driver.fetchval("SELECT current_setting('todo_db.user_id', true)") == ""


async def _fail_unseen(tx: Transaction) -> None:
    await tx.tasks.create("alice", "lost")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await tx._gate.driver.execute("SELECT 1 / 0")


async def answer_of_commit_is_read(db: Database, owner: Connection, _victim: Victim) -> None:
    before = await rows_of(owner, "alice")
    with pytest.raises(TransactionAbortedError):
        await db.run("alice", _fail_unseen)
    assert await rows_of(owner, "alice") == before


async def cancelled_transactions_leave_nothing(
    db: Database, owner: Connection, _victim: Victim
) -> None:
    """Cancel transactions at every step: the next user gets nothing of them."""
    before = await rows_of(owner, "alice")
    uncut = await _turns(asyncio.create_task(db.tasks.create("alice", "uncut")))
    for step in range(_CUTS):
        cut = asyncio.create_task(db.tasks.create("alice", "cut off"))
        await _turns(cut, 1 + uncut * step // _CUTS)
        cut.cancel()
        await asyncio.gather(cut, return_exceptions=True)
        async with asyncio.timeout(30), db.transaction("mallory") as tx:
            assert await rows(tx, "SELECT DISTINCT user_id FROM tasks") == ["mallory"]
    # Each transaction holds one. A backend whose client has gone ends a little later.
    left = "SELECT count(*) FROM pg_locks WHERE locktype = 'virtualxid' AND pid <> pg_backend_pid()"
    async with asyncio.timeout(5):
        while await owner.fetchval(left):
            pass
    assert (await rows_of(owner, "alice"))[: len(before)] == before


async def _turns(task: asyncio.Task[TaskRecord], most: int = 1_000_000) -> int:
    """Run the event loop until a task is done; return the number of iterations."""
    for turn in range(most):
        if task.done():
            return turn
        await asyncio.sleep(0)
    return most


async def disable_row_security(owner: Connection) -> None:
    for table in TABLES:
        await owner.execute(
            f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY"
        )
