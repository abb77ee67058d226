"""Statements that run alone, on a login whose search path leads to other tables first."""

from collections.abc import AsyncGenerator
from typing import Final

import asyncpg
import pytest
import pytest_asyncio
from cases import FINGERPRINT, KEY, Case, Outcome, cases, newest_id, outcome_of, rows_of
from driver import Connection
from shadow import COPIES, PLANTED, TABLES, plant

from todo_db import Database
from todo_db.repositories.statements import Compiled

SEED: Final = (
    """
    INSERT INTO users (id, email, created_at, updated_at)
    SELECT id, id || '@example.org', '2021-01-01', '2021-01-01'
    FROM unnest(ARRAY['alice', 'mallory']) AS id
    """,
    """
    INSERT INTO tasks (user_id, title, completed, created_at, updated_at)
    SELECT id, 'task ' || n, n % 2 = 0, '2021-01-01', '2021-01-01'
    FROM users, generate_series(1, 4) AS n ORDER BY n, id
    """,
    f"""
    INSERT INTO idempotency_keys (user_id, key, fingerprint, task_ids, created_at)
    SELECT user_id, '{KEY}', '{FINGERPRINT}', array_agg(id ORDER BY id), '2021-01-01'
    FROM tasks GROUP BY user_id
    """,
)


@pytest_asyncio.fixture
async def planted(single_url: str, superuser: Connection) -> str:
    """The URL of the login, for which the names of the tables mean copies of them."""
    for statement in SEED:
        await superuser.execute(statement)
    await plant(superuser)
    return single_url


@pytest_asyncio.fixture(params=["schema", "temporary"])
async def hostile(
    request: pytest.FixtureRequest, planted: str, superuser: Connection, todo_database_name: str
) -> AsyncGenerator[Connection]:
    """A connection of the login, for which the name of a table alone means a copy."""
    if request.param == "temporary":
        await superuser.execute(f"GRANT TEMPORARY ON DATABASE {todo_database_name} TO PUBLIC")
    for table in TABLES:
        await superuser.execute(f"ALTER TABLE shadow.{table} DISABLE ROW LEVEL SECURITY")
        await superuser.execute(f"GRANT ALL ON shadow.{table} TO PUBLIC")
    connection = await asyncpg.connect(planted, statement_cache_size=0)
    if request.param == "temporary":
        await connection.execute("SET todo_db.user_id = 'alice'")
        for copy in COPIES:
            await connection.execute(copy.format("TEMPORARY TABLE "))
        await connection.execute("RESET todo_db.user_id; SET search_path = pg_catalog, public")
    yield connection
    await connection.close()


class TestStatement:
    async def test_means_the_tables_of_the_package(
        self, hostile: Connection, superuser: Connection
    ) -> None:
        newest = await newest_id(superuser)
        for case in cases(await rows_of(superuser, "alice"), "mallory", "carol"):
            expected = await self._in_transaction(hostile, case, newest, path="public, pg_temp")
            await hostile.execute("BEGIN")
            assert await outcome(hostile, case.statement.alone, case, newest) == expected, case.name
            await hostile.execute("ROLLBACK")

    async def test_without_schemas_means_the_copies(
        self, hostile: Connection, superuser: Connection
    ) -> None:
        newest = await newest_id(superuser)
        for case in cases(await rows_of(superuser, "alice"), "mallory", "carol"):
            if case.name in ("tasks_get own", "users_get own", "tasks_update-completed own"):
                found = await self._in_transaction(hostile, case, newest)
                assert PLANTED in str(found), case.name

    @staticmethod
    async def _in_transaction(
        connection: Connection, case: Case, newest: int, *, path: str = ""
    ) -> Outcome:
        await connection.execute("BEGIN")
        if path:
            await connection.execute(f"SET LOCAL search_path = {path}")
        await connection.execute(f"SET LOCAL todo_db.user_id = '{case.user_id}'")
        found = await outcome(connection, case.statement.in_transaction, case, newest)
        await connection.execute("ROLLBACK")
        return found


async def outcome(connection: Connection, compiled: Compiled, case: Case, newest: int) -> Outcome:
    arguments = compiled.arguments(case.user_id, case.values)
    return await outcome_of(connection.fetch(compiled.sql, *arguments), newest)


class TestDatabase:
    async def test_reaches_the_tables_of_the_package(
        self, planted: str, superuser: Connection
    ) -> None:
        async with Database.from_url(planted) as database:
            assert (await database.health()).round_trips == 1
            await attack(database, superuser)


async def attack(database: Database, superuser: Connection) -> None:
    before = await copies(superuser)
    found = (await database.tasks.list("alice")).items
    assert [task.title for task in found] == ["task 4", "task 3", "task 2", "task 1"]
    assert await database.tasks.count("alice") == 4
    created = await database.tasks.create("alice", "new", idempotency_key="new")
    assert await database.tasks.get("alice", created.id) == created
    changed = await database.tasks.toggle("alice", found[0].id)
    assert (changed.title, changed.completed) == ("task 4", not found[0].completed)
    assert await database.tasks.delete_many("alice", [created.id, found[1].id]) == 2
    assert (await database.users.update("alice", image="new")).name == ""
    assert await copies(superuser) == before


async def copies(superuser: Connection) -> list[list[asyncpg.Record]]:
    return [await superuser.fetch(f"SELECT * FROM shadow.{table}") for table in TABLES]
