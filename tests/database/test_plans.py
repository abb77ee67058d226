"""The plans of all statements, with 200,000 tasks of 1,000 users."""

import json
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from datetime import datetime
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from cases import Case, Rows, cases, rows_of
from driver import Connection
from shapes import SHAPES

from todo_db import (
    IdempotencyKeyReusedError,
    NewTask,
    Page,
    TaskNotFoundError,
    TaskRecord,
    TaskRepository,
    TaskSort,
    testing,
)
from todo_db.embedded import EmbeddedPostgres
from todo_db.repositories import Operation
from todo_db.repositories.statements import Compiled

DATABASE = "todo_plans"
# heavy and dormant have only old tasks, zoe only new ones. Estimates depend on the position of a
# user id among all ids: these sort before nearly all others, or after all of them.
HEAVY, DORMANT, LATE, USUAL, NO_USER = "heavy", "dormant", "zoe", "user-500", "missing"
USERS = (HEAVY, DORMANT, LATE, USUAL, NO_USER)
PAGE = 50
# A page and one more row. For a short list the planner may sort all of it.
FEW_ROWS = {HEAVY: PAGE + 1, DORMANT: 200, LATE: 200, USUAL: 210, NO_USER: 0}
# The index descent, skipped entries, and dead rows of other tests.
MORE_BUFFERS = 40
# A page of an index or of the table that one run pins again and another does not.
FEW_BUFFERS = 8

SEED = (
    """
    INSERT INTO users (id, email)
    SELECT id, id || '@example.org' FROM (
        SELECT 'user-' || n AS id FROM generate_series(1, 997) AS n
        UNION ALL VALUES ('heavy'), ('dormant'), ('zoe')
    ) AS all_users
    """,
    """
    INSERT INTO tasks (user_id, title, description, completed, created_at, updated_at)
    SELECT
        CASE
            WHEN n <= 10000 THEN 'heavy'
            WHEN n <= 10200 THEN 'dormant'
            WHEN n > 199800 THEN 'zoe'
            ELSE 'user-' || n % 997 + 1
        END,
        'task ' || n * 7919 % 200000,
        CASE WHEN n % 3 = 0 THEN 'about ' || n END,
        n % 4 = 0,
        timestamptz '2026-01-01 00:00Z' + n * interval '1 minute',
        timestamptz '2026-01-01 00:00Z' + n * 7919 % 200000 * interval '1 minute'
    FROM generate_series(1, 200000) AS n
    ORDER BY n
    """,
    """
    INSERT INTO idempotency_keys (user_id, key, fingerprint, task_ids)
    SELECT user_id, 'key ' || id, repeat('0', 64), ARRAY[id] FROM tasks WHERE id % 4 = 0
    """,
    # Without autovacuum, so that the plans depend on the current statistics only.
    "ALTER TABLE tasks SET (autovacuum_enabled = off)",
    "VACUUM (ANALYZE) tasks",
    "ANALYZE users, idempotency_keys",
)


class Plan:
    def __init__(self, explained: dict[str, Any]) -> None:
        self.root: dict[str, Any] = explained["Plan"]
        self.milliseconds: float = explained["Execution Time"]

    @property
    def nodes(self) -> list[dict[str, Any]]:
        return list(self._below(self.root))

    @property
    def node_types(self) -> set[str]:
        return {node["Node Type"] for node in self.nodes}

    @property
    def indexes(self) -> set[str]:
        return {node["Index Name"] for node in self.nodes if "Index Name" in node}

    @property
    def rows_read(self) -> float:
        """The number of table rows that were read, also those that were filtered out."""
        counted = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Index Recheck")
        scans = [
            node
            for node in self.nodes
            if "Relation Name" in node and node["Node Type"].endswith("Scan")
        ]
        return sum(
            (
                float(scan["Actual Loops"] * sum(scan.get(key, 0) for key in counted))
                for scan in scans
            ),
            start=0.0,
        )

    @property
    def rows_passed(self) -> float:
        """The number of rows that all nodes returned or removed, once for each time they did."""
        return sum(
            float(value * node["Actual Loops"])
            for node in self.nodes
            for key, value in node.items()
            if key == "Actual Rows" or key.startswith("Rows Removed")
        )

    @property
    def buffers(self) -> int:
        return int(self.root["Shared Hit Blocks"] + self.root["Shared Read Blocks"])

    @property
    def touched(self) -> float:
        """What was read, in rows and pages."""
        return self.rows_read + self.buffers

    def _below(self, node: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield node
        for child in node.get("Plans", ()):
            yield from self._below(child)


class Explainer:
    """Runs statements like a transaction of the package, records their plans, and rolls back."""

    def __init__(self, connection: Connection, plan_cache_mode: str) -> None:
        self.plans: list[Plan] = []
        self.tasks = TaskRepository(self)
        self._connection = connection
        self._plan_cache_mode = plan_cache_mode

    @property
    def plan(self) -> Plan:
        return self.plans[-1]

    async def perform[T](self, user_id: str, operation: Operation[T]) -> T:
        statement = operation.statement.in_transaction
        arguments = list(statement.arguments(user_id, operation.values))
        return operation.map_rows(await self.run(user_id, statement.sql, arguments))

    async def run(
        self, user_id: str, sql: str, arguments: Sequence[object]
    ) -> list[asyncpg.Record]:
        transaction = self._connection.transaction()
        await transaction.start()
        try:
            await self._connection.execute("SET LOCAL ROLE todo_app")
            await self._connection.execute(f"SET LOCAL plan_cache_mode = {self._plan_cache_mode}")
            await self._connection.execute(
                "SELECT set_config('todo_db.user_id', $1, true)", user_id
            )
            await self._explain(sql, arguments)
            return await self._connection.fetch(sql, *arguments)
        finally:
            await transaction.rollback()
            await self._connection.execute("DEALLOCATE ALL")

    async def _explain(self, sql: str, arguments: Sequence[object]) -> None:
        # Only a prepared statement can have a generic plan.
        await self._connection.execute(f"PREPARE explained AS {sql}")
        analyzed = self._connection.transaction()
        await analyzed.start()
        values = ", ".join(map(literal, arguments))
        explained = await self._connection.fetchval(
            "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE explained"
            + (f"({values})" if values else "")
        )
        await analyzed.rollback()
        plan = Plan(json.loads(explained)[0])
        assert "Seq Scan" not in plan.node_types, sql
        self.plans.append(plan)


def literal(value: object) -> str:
    match value:
        case None:
            return "NULL"
        case list():
            items = ("NULL" if item is None else f'"{item}"' for item in value)
            return f"'{{{','.join(items)}}}'"
        case datetime():
            return f"'{value.isoformat()}'"
        case _:
            return f"'{value}'"


@pytest_asyncio.fixture(scope="module")
async def connection(todo_postgres: EmbeddedPostgres) -> AsyncGenerator[Connection]:
    """The owner's connection to a database of many tasks, shared by all tests of this file."""
    todo_postgres.create_database(DATABASE, template=testing._TEMPLATE)
    opened = await asyncpg.connect(todo_postgres.url(database=DATABASE), statement_cache_size=0)
    for statement in SEED:
        await opened.execute(statement)
    yield opened
    await opened.close()
    todo_postgres.drop_database(DATABASE)


@pytest.fixture(params=["force_custom_plan", "force_generic_plan"])
def explainer(connection: Connection, request: pytest.FixtureRequest) -> Explainer:
    return Explainer(connection, request.param)


async def deep(explainer: Explainer, user_id: str, sort: TaskSort) -> Page[TaskRecord]:
    """Return a page from the middle of the list, or the second one of a short list."""
    middle = await explainer.tasks.list(
        user_id, sort=sort, limit=1000 if user_id == HEAVY else PAGE
    )
    for _ in range(4 if user_id == HEAVY else 0):
        middle = await explainer.tasks.list(
            user_id, sort=sort, limit=1000, cursor=middle.next_cursor
        )
    return await explainer.tasks.list(user_id, sort=sort, limit=PAGE, cursor=middle.next_cursor)


class TestSeed:
    async def test_is_what_the_other_tests_rely_on(self, connection: Connection) -> None:
        row = await connection.fetchrow(
            "SELECT count(*), count(DISTINCT user_id), count(*) FILTER (WHERE user_id = 'heavy'),"
            " max(id) FILTER (WHERE user_id = 'heavy'), max(id) FILTER (WHERE user_id = 'dormant'),"
            " min(id) FILTER (WHERE user_id = 'zoe'), count(*) FILTER (WHERE user_id = 'user-500')"
            " FROM tasks"
        )
        assert row is not None
        assert tuple(row)[:6] == (200_000, 1_000, 10_000, 10_000, 10_200, 199_801)
        assert 180 < row[6] <= 210


class TestByUser:
    @pytest.mark.parametrize("user_id", USERS)
    async def test_uses_the_index(self, explainer: Explainer, user_id: str) -> None:
        await explainer.run(user_id, "SELECT * FROM tasks WHERE user_id = $1", [user_id])
        assert explainer.plan.node_types & {"Index Scan", "Bitmap Index Scan"}
        assert explainer.plan.indexes == {"idx_tasks_user_id"}

    @pytest.mark.parametrize("user_id", USERS)
    async def test_uses_the_index_without_a_where(self, explainer: Explainer, user_id: str) -> None:
        rows = await explainer.run(user_id, "SELECT * FROM tasks", [])
        assert {row["user_id"] for row in rows} == ({user_id} if user_id != NO_USER else set())
        assert explainer.plan.indexes == {"idx_tasks_user_id"}


class TestList:
    @pytest.mark.parametrize("sort", [TaskSort.NEWEST, TaskSort.OLDEST])
    async def test_by_id_reads_only_the_rows_of_the_page(
        self, explainer: Explainer, sort: TaskSort
    ) -> None:
        for user_id in USERS:
            page = await explainer.tasks.list(user_id, sort=sort, limit=PAGE)
            assert len(page.items) == (0 if user_id == NO_USER else PAGE)
            assert_few(explainer.plan, user_id)
            if user_id != NO_USER:
                page = await deep(explainer, user_id, sort)
                assert len(page.items) == PAGE
                assert_few(explainer.plan, user_id)

    @pytest.mark.parametrize("sort", [TaskSort.RECENTLY_UPDATED, TaskSort.TITLE])
    async def test_by_another_key_reads_only_own_rows(
        self, explainer: Explainer, sort: TaskSort
    ) -> None:
        for user_id, own in ((HEAVY, 10_000), (DORMANT, 200), (LATE, 200), (NO_USER, 0)):
            for page in (
                await explainer.tasks.list(user_id, sort=sort, limit=PAGE),
                *((await deep(explainer, user_id, sort),) if own else ()),
            ):
                assert len(page.items) == min(own, PAGE)
                assert explainer.plan.indexes == {"idx_tasks_user_id"}
                assert explainer.plan.rows_read <= own
                assert explainer.plan.milliseconds < 100

    @pytest.mark.parametrize("sort", TaskSort)
    async def test_filtered_reads_only_own_rows(self, explainer: Explainer, sort: TaskSort) -> None:
        for completed, search in ((True, None), (None, "about 9"), (False, "nothing like it")):
            page = await explainer.tasks.list(
                HEAVY, completed=completed, search=search, sort=sort, limit=5
            )
            await explainer.tasks.list(
                HEAVY,
                completed=completed,
                search=search,
                sort=sort,
                limit=5,
                cursor=page.next_cursor,
            )
        assert len(explainer.plans) == 6
        for plan in explainer.plans:
            assert plan.indexes == {"idx_tasks_user_id"}
            assert plan.rows_read <= 10_000

    async def test_of_open_tasks_reads_only_what_it_passes(self, explainer: Explainer) -> None:
        for user_id in (HEAVY, DORMANT, LATE, USUAL):
            page = await explainer.tasks.list(user_id, completed=False, limit=PAGE)
            assert len(page.items) == PAGE
            # A quarter of the tasks is completed.
            assert explainer.plan.rows_read <= 2 * FEW_ROWS[user_id]
            assert explainer.plan.indexes == {"idx_tasks_user_id"}


def assert_few(plan: Plan, user_id: str) -> None:
    assert plan.indexes == {"idx_tasks_user_id"}
    assert plan.rows_read <= FEW_ROWS[user_id]
    assert plan.buffers <= FEW_ROWS[user_id] + MORE_BUFFERS
    assert plan.milliseconds < 100


class TestCount:
    async def test_reads_only_own_rows(self, explainer: Explainer) -> None:
        for completed, search in ((None, None), (False, None), (None, "about"), (True, "about")):
            for user_id, own in ((HEAVY, 10_000), (DORMANT, 200), (LATE, 200), (NO_USER, 0)):
                await explainer.tasks.count(user_id, completed=completed, search=search)
                assert explainer.plan.indexes == {"idx_tasks_user_id"}
                assert explainer.plan.rows_read <= own


class TestOneTask:
    async def test_is_found_by_an_index_alone(self, explainer: Explainer) -> None:
        task = (await explainer.tasks.list(HEAVY, limit=1)).items[0]
        foreign = (await explainer.tasks.list(LATE, limit=1)).items[0].id
        own = task.id
        tasks = explainer.tasks
        explainer.plans.clear()

        await tasks.get(HEAVY, own)
        await tasks.toggle(HEAVY, own)
        await tasks.update(HEAVY, own, title="x", description=None, completed=True)
        await tasks.delete(HEAVY, own)
        for attempt in (
            tasks.get(HEAVY, foreign),
            tasks.toggle(HEAVY, foreign),
            tasks.update(HEAVY, foreign, title="x"),
            tasks.update(HEAVY, foreign, expected_updated_at=task.updated_at, title="x"),
            tasks.delete(HEAVY, foreign),
        ):
            with pytest.raises(TaskNotFoundError):
                await attempt

        assert len(explainer.plans) == 9
        for plan in explainer.plans:
            assert plan.indexes <= {"pk_tasks", "idx_tasks_user_id"}
            assert plan.rows_read <= 1

    async def test_is_found_twice_to_compare_and_set_it(self, explainer: Explainer) -> None:
        task = (await explainer.tasks.list(HEAVY, limit=1)).items[0]
        await explainer.tasks.update(HEAVY, task.id, expected_updated_at=task.updated_at, title="x")
        # Once to change it, once to tell stale from missing.
        assert explainer.plan.indexes <= {"pk_tasks", "idx_tasks_user_id"}
        assert explainer.plan.rows_read <= 3


class TestBulk:
    @pytest.mark.parametrize("user_id", [HEAVY, DORMANT, LATE])
    async def test_of_a_hundred_ids_reads_a_hundred_rows_twice(
        self, explainer: Explainer, user_id: str
    ) -> None:
        own = [task.id for task in (await explainer.tasks.list(user_id, limit=100)).items]

        assert await explainer.tasks.update_many(user_id, own, title="x") == 100
        assert_hundred_read_twice(explainer.plan)
        assert await explainer.tasks.delete_many(user_id, own) == 100
        assert_hundred_read_twice(explainer.plan)

    async def test_of_completed_tasks_reads_own_rows_twice(self, explainer: Explainer) -> None:
        for user_id, own in ((HEAVY, 10_000), (DORMANT, 200), (LATE, 200), (NO_USER, 0)):
            assert await explainer.tasks.delete_completed(user_id) == own / 4
            assert explainer.plan.indexes <= {"pk_tasks", "idx_tasks_user_id"}
            assert explainer.plan.rows_read <= 2 * own


def assert_hundred_read_twice(plan: Plan) -> None:
    """Once to lock them in order, once to change them."""
    assert plan.indexes <= {"pk_tasks", "idx_tasks_user_id"}
    assert plan.rows_read <= 200


class TestKey:
    async def test_is_found_by_its_index_and_no_task_is_read(
        self, connection: Connection, explainer: Explainer
    ) -> None:
        new = [NewTask("x", "y")] * 10
        for user_id in (HEAVY, DORMANT, LATE, USUAL):
            await explainer.tasks.create_many(user_id, new, idempotency_key="new")
            assert_keyed(explainer.plan, keys=0)
            known = await connection.fetchval(
                "SELECT max(key) FROM idempotency_keys WHERE user_id = $1", user_id
            )
            with pytest.raises(IdempotencyKeyReusedError):
                await explainer.tasks.create_many(user_id, new, idempotency_key=known)
            assert_keyed(explainer.plan, keys=1)


def assert_keyed(plan: Plan, *, keys: int) -> None:
    assert plan.indexes == {"pk_idempotency_keys"}
    assert plan.rows_read == keys
    made = {
        node["Relation Name"]: child["Actual Rows"]
        for node in plan.nodes
        if node["Node Type"] == "ModifyTable"
        for child in node["Plans"]
        if child["Parent Relationship"] == "Outer"
    }
    assert made == {"tasks": 0 if keys else 10, "idempotency_keys": 0 if keys else 1}


class Alone:
    """Explains the statements that carry their user, and those of a transaction."""

    def __init__(self, connection: Connection, own: list[Case]) -> None:
        self._connection = connection
        self._cases = own

    def cases(self, shape: str) -> list[Case]:
        """Return those that the database does not refuse."""
        refused = {"users_create existing", "users_create address taken"}
        refused |= {"users_create of an attacker", "users_ensure address taken"}
        refused.add("users_set_email of an attacker")
        return [
            case
            for case in self._cases
            if case.name.startswith(f"{shape} ") and case.name not in refused
        ]

    async def explain(self, compiled: Compiled, case: Case, mode: str, *, after: int = 0) -> Plan:
        """Explain a statement in this mode, after some executions, and undo all of them."""
        values = ", ".join(map(literal, compiled.arguments(case.user_id, case.values)))
        transaction = self._connection.transaction()
        await transaction.start()
        try:
            await self._connection.execute(
                f"SET LOCAL ROLE todo_app; SET LOCAL plan_cache_mode = {mode}"
            )
            if compiled is case.statement.in_transaction:
                await self._connection.execute(f"SET LOCAL todo_db.user_id = '{case.user_id}'")
            await self._connection.execute(f"PREPARE explained AS {compiled.sql}")
            for _ in range(after):
                await self._connection.execute(
                    f"SAVEPOINT before; EXECUTE explained({values}); ROLLBACK TO before"
                )
            found = await self._connection.fetchval(
                f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE explained({values})"
            )
        finally:
            await transaction.rollback()
            await self._connection.execute("DEALLOCATE ALL")
        return Plan(json.loads(found)[0])


def parts(plan: Plan) -> dict[str, object]:
    """Return the nodes of each WITH query, and those of the query itself as "result"."""

    def nodes(node: dict[str, Any]) -> object:
        kept = ("Node Type", "Relation Name", "Index Name", "Join Type", "Strategy", "Operation")
        below = [nodes(child) for child in node.get("Plans", ()) if not name(child)]
        return [node.get(key) for key in kept], below

    def name(node: dict[str, Any]) -> str:
        return str(node.get("Subplan Name", "")).partition("CTE ")[2]

    return {"result": nodes(plan.root)} | {
        name(node): nodes(node) for node in plan.nodes if name(node)
    }


# alice's tasks, and others' between them.
MINE = """
    INSERT INTO tasks (user_id, title, completed)
    SELECT CASE WHEN n % 2 = 0 THEN 'alice' ELSE 'bob' END, 'task ' || n, n % 4 = 0
    FROM generate_series(1, 4000) AS n
"""
BULKS = [
    name for name in SHAPES if re.match("tasks_(update_many|delete_many|delete_completed)", name)
]


@pytest_asyncio.fixture(params=["never", "before", "when empty", "with one task"])
async def unknown(
    todo_postgres: EmbeddedPostgres, todo_database_name: str, request: pytest.FixtureRequest
) -> AsyncGenerator[tuple[Connection, Rows]]:
    """The owner's connection to a database whose statistics do not tell of alice's 2,000 tasks.

    It was analysed never, or at a time before she had any.
    """
    url = todo_postgres.url(database=todo_database_name)
    owner: Connection = await asyncpg.connect(url, statement_cache_size=0)
    await owner.execute(
        """INSERT INTO users (id, email) SELECT id, id || '@example.org'
        FROM (SELECT 'user-' || n FROM generate_series(1, 2000) AS n
            UNION ALL VALUES ('alice'), ('bob')) AS everyone (id);
        ALTER TABLE tasks SET (autovacuum_enabled = off)"""
    )
    if request.param == "with one task":
        await owner.execute("INSERT INTO tasks (user_id, title) VALUES ('bob', 'x')")
    if request.param == "before":
        await owner.execute(
            "INSERT INTO tasks (user_id, title)"
            " SELECT 'user-' || n % 2000 + 1, 'x' FROM generate_series(1, 20000) AS n"
        )
    if request.param != "never":
        await owner.execute("VACUUM (ANALYZE) tasks")
    await owner.execute(MINE)
    yield owner, await rows_of(owner, "alice")
    await owner.close()


class TestBulkWithoutStatistics:
    @pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
    @pytest.mark.parametrize("shape", BULKS)
    async def test_does_not_compare_every_row_with_every_id(
        self, unknown: tuple[Connection, Rows], shape: str, mode: str
    ) -> None:
        connection, rows = unknown
        everything = {"task_ids": [str(task_id) for task_id in rows.task_ids]}
        assert len(rows.task_ids) == 2000
        explainer = Alone(connection, list(cases(rows, "bob", NO_USER)))
        case = explainer.cases(shape)[0]
        case = case._replace(values={**case.values, **everything})
        for compiled in (case.statement.in_transaction, case.statement.alone):
            plan = await explainer.explain(compiled, case, mode)
            # Each node returns each row once, or removes it. It may be bob's.
            assert plan.rows_passed <= 4000 * len(plan.nodes)
            # An array that is not in the index is compared with each row, which no count shows.
            assert "= ANY" not in "".join(str(node.get("Filter")) for node in plan.nodes)


@pytest_asyncio.fixture(scope="module")
async def alone(connection: Connection) -> Alone:
    rows = await rows_of(connection, HEAVY)
    rows = rows._replace(task_ids=rows.task_ids[4000:5000])
    return Alone(connection, list(cases(rows, DORMANT, NO_USER)))


@pytest.mark.matrix
@pytest.mark.parametrize("shape", SHAPES)
class TestAlone:
    """The statement that carries its user, for autocommit."""

    @pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
    async def test_has_the_plan_of_a_transaction_inside(
        self, alone: Alone, shape: str, mode: str
    ) -> None:
        for case in alone.cases(shape):
            inside = await alone.explain(case.statement.in_transaction, case, mode)
            plan = await alone.explain(case.statement.alone, case, mode)
            assert parts(plan) == parts(inside), case.name
            assert plan.rows_read == inside.rows_read, case.name

    async def test_has_no_generic_plan_of_twice_the_cost(self, alone: Alone, shape: str) -> None:
        # A generic plan cannot know how many rows match a pattern; the server does not choose it.
        mode, after = ("auto", 10) if "search" in shape else ("force_generic_plan", 0)
        for case in alone.cases(shape):
            custom = await alone.explain(case.statement.alone, case, "force_custom_plan")
            plan = await alone.explain(case.statement.alone, case, mode, after=after)
            assert plan.touched <= 2 * custom.touched + FEW_BUFFERS, case.name
