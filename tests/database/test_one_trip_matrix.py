"""One trip against three, for every statement, under many plans and on many tables.

A condition that sets the user too late is rare: it depends on the plan. So each statement runs in
its one-trip form under many combinations of settings, with custom and with generic plans, and its
rows must be those of the form with a transaction.

The whole product would take hours, so it is sampled. Two combinations run on all tables: no
setting, and the one that makes most wrong conditions late. Each other one runs on one of the tables
on PostgreSQL 18, and on one on 15 or 16; a quarter of them on a partitioned table too. Statements
that differ only in the columns that they set take turns.
"""

import asyncio
import random
import re
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, Final, NamedTuple, Self, cast

import asyncpg
import pytest
import pytest_asyncio
from cases import FINGERPRINT, KEY, NOTHING, Case, Outcome, cases, newest_id, outcome_of, rows_of
from cluster import OTHER_VERSIONS, Cluster
from driver import Connection
from pgbouncer import PASSWORD, TRIXIE, PgBouncer
from shapes import TASK_CHANGES, USER_CHANGES
from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Delete,
    Select,
    Text,
    Update,
    bindparam,
    func,
    literal_column,
    select,
    true,
    union_all,
)

from todo_db.embedded import EmbeddedPostgres
from todo_db.migrations import upgrade
from todo_db.repositories import Statement
from todo_db.repositories.statements import OWNER, Compiled, _compiled

pytestmark = pytest.mark.matrix

VERSIONS: Final = (*OTHER_VERSIONS, 18)
LOGIN: Final = "todo_login"
VICTIM, ATTACKER, STRANGER = "alice", "mallory", "carol"
COMBINATIONS: Final = 132
TURNS: Final = 4
MODES: Final = ("force_custom_plan", "force_generic_plan")

type Combination = dict[str, str]
type Form = Callable[[Statement], Compiled]

# Operators that cost nothing are not ordered by their cost.
FREE_OPERATORS: Final[Combination] = {"cpu_operator_cost": "0"}
EVERYWHERE: Final[tuple[Combination, ...]] = ({}, FREE_OPERATORS)

ALL: Final = re.compile("")
# One shape of each kind.
COMMON: Final = re.compile(
    r"tasks_(get|create|create_many|create_keyed|toggle|delete|delete_many|delete_completed|count"
    r"|page-(newest|title-search-after)|update(_if|_many)?-title) |users_(ensure|get|update-name) "
)


class Tables(NamedTuple):
    """What the tables of a database hold."""

    users: int
    tasks_each: int
    analysed: bool
    partitioned: bool = False

    def seed(self) -> Iterator[str]:
        tasks = self.users * self.tasks_each
        yield f"""
            INSERT INTO users (id, email, created_at, updated_at)
            SELECT {_name("n")}, {_name("n")} || '@example.org', '2021-01-01', '2021-01-01'
            FROM generate_series(1, {self.users}) AS n
        """
        yield f"""
            INSERT INTO tasks (user_id, title, description, completed, created_at, updated_at)
            SELECT
                {_name(f"1 + n % {self.users}")},
                'task ' || n * 7919 % {tasks},
                CASE WHEN n % 3 = 0 THEN 'about ' || n END,
                n % 4 = 0,
                timestamptz '2021-01-01 00:00Z' + n * interval '1 minute',
                timestamptz '2021-01-01 00:00Z' + n * 7919 % {tasks} * interval '1 minute'
            FROM generate_series(1, {tasks}) AS n ORDER BY n
        """
        yield f"""
            INSERT INTO idempotency_keys (user_id, key, fingerprint, task_ids, created_at)
            SELECT user_id, '{KEY}', '{FINGERPRINT}', (array_agg(id ORDER BY id))[:3], '2021-01-01'
            FROM tasks GROUP BY user_id
        """
        if self.analysed:
            yield "ANALYZE"


def _name(number: str) -> str:
    return f"CASE {number} WHEN 1 THEN '{VICTIM}' WHEN 2 THEN '{ATTACKER}' ELSE 'u' || {number} END"


EMPTY, NO_TASKS, ONE_ROW, SMALL, LARGE = (0, 0), (3, 0), (1, 1), (3, 4), (200, 50)
WHOLE: Final = tuple(
    Tables(*size, analysed)
    for size in (EMPTY, NO_TASKS, ONE_ROW, SMALL, LARGE)
    for analysed in (False, True)
)
PARTITIONED: Final = tuple(
    Tables(*size, analysed, partitioned=True)
    for size in (ONE_ROW, SMALL, LARGE)
    for analysed in (False, True)
)

_PARTITION: Final = """
    CREATE TABLE partitioned (
        LIKE tasks INCLUDING DEFAULTS INCLUDING CONSTRAINTS,
        CONSTRAINT pk_tasks_of_user PRIMARY KEY (user_id, id)
    ) PARTITION BY HASH (user_id);
    DROP TABLE tasks;
    ALTER TABLE partitioned RENAME TO tasks;
    ALTER TABLE tasks ADD CONSTRAINT fk_tasks_user_id_users
        FOREIGN KEY (user_id) REFERENCES users ON DELETE CASCADE;
    CREATE TABLE tasks_0 PARTITION OF tasks FOR VALUES WITH (MODULUS 4, REMAINDER 0);
    CREATE TABLE tasks_1 PARTITION OF tasks FOR VALUES WITH (MODULUS 4, REMAINDER 1);
    CREATE TABLE tasks_2 PARTITION OF tasks FOR VALUES WITH (MODULUS 4, REMAINDER 2);
    CREATE TABLE tasks_3 PARTITION OF tasks FOR VALUES WITH (MODULUS 4, REMAINDER 3);
    CREATE INDEX ix_tasks_id ON tasks (id);
    -- A partitioned table can have an identity column since PostgreSQL 17.
    CREATE SEQUENCE task_ids;
    GRANT USAGE ON SEQUENCE task_ids TO todo_app;
    ALTER TABLE tasks ALTER id SET DEFAULT nextval('task_ids');
    CREATE TRIGGER update_tasks_updated_at BEFORE UPDATE ON tasks
        FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*) EXECUTE FUNCTION set_updated_at();
    GRANT SELECT, DELETE, INSERT (user_id, title, description, completed),
        UPDATE (title, description, completed) ON tasks TO todo_app;
    ALTER TABLE tasks ENABLE ROW LEVEL SECURITY;
    ALTER TABLE tasks FORCE ROW LEVEL SECURITY;
"""
_POLICIES: Final = """
    SELECT policyname, permissive, qual, with_check FROM pg_policies
    WHERE tablename = 'tasks' AND roles = '{todo_app}' ORDER BY permissive
"""


class Place:
    """A server, and its databases."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._numbers = count(1)

    async def prepare(self) -> None:
        """Migrate a template, and make another one with a partitioned table of tasks."""
        await upgrade(await self.cluster.create_database("whole"))
        await self.cluster.execute(
            f"CREATE ROLE {LOGIN} LOGIN INHERIT PASSWORD '{PASSWORD}' IN ROLE todo_app",
            f"ALTER ROLE {LOGIN} SET statement_timeout = '5s'",
            "CREATE DATABASE partitioned TEMPLATE whole",
        )
        connection = await self.cluster.connect(database="partitioned")
        policies = await connection.fetch(_POLICIES)
        assert [row["permissive"] for row in policies] == ["PERMISSIVE", "RESTRICTIVE"]
        await connection.execute(_PARTITION)
        for name, permissive, using, check in policies:
            await connection.execute(
                f"CREATE POLICY {name} ON tasks AS {permissive} TO todo_app"
                f" USING ({using}) WITH CHECK ({check})"
            )
        await connection.close()

    @asynccontextmanager
    async def database(self, tables: Tables) -> AsyncGenerator[str]:
        """Yield the name of a new database with these tables."""
        name = f"tables_{next(self._numbers)}"
        template = "partitioned" if tables.partitioned else "whole"
        await self.cluster.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        await self.cluster.execute(*tables.seed(), database=name)
        try:
            yield name
        finally:
            await self.cluster.execute(f"DROP DATABASE {name} WITH (FORCE)")

    @asynccontextmanager
    async def lane(
        self,
        tables: Tables,
        *,
        form: Form | None = None,
        pooler: PgBouncer | None = None,
        only: re.Pattern[str] = ALL,
    ) -> AsyncGenerator["Lane"]:
        """Yield a connection to such a database, with every case prepared."""
        async with (
            self.database(tables) as name,
            connected(self.cluster.url("postgres", name)) as superuser,
            connected(
                pooler.url(LOGIN, name) if pooler else self.cluster.url(LOGIN, name)
            ) as connection,
        ):
            yield await Lane(str(tables), connection, superuser, form or alone).prepare(only)


@asynccontextmanager
async def connected(url: str) -> AsyncGenerator[Connection]:
    connection: Connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


def alone(statement: Statement) -> Compiled:
    return statement.alone


type PreparedStatement = asyncpg.prepared_stmt.PreparedStatement[asyncpg.Record]


class Run(NamedTuple):
    """A case, ready to run, and what it does in three trips."""

    case: Case
    prepared: PreparedStatement
    arguments: list[object]
    expected: Outcome

    @property
    def turn(self) -> int | None:
        """When to run it, if it is one of many updates."""
        shape, _, columns = self.case.name.split()[0].partition("-")
        changes = USER_CHANGES if shape == "users_update" else TASK_CHANGES
        if "update" not in shape:
            return None
        return changes.index(frozenset(columns.split("-"))) % TURNS

    @property
    def is_undone(self) -> bool:
        return not (self.case.is_read or self.case.is_foreign)


class Lane:
    """One connection to one database, with every case prepared in a form.

    What a case changes as its own user is undone.

    Attributes:
        findings: The cases that did not do what they do in three trips, and how they ran.
        compared: How many cases were compared.
    """

    def __init__(
        self, name: str, connection: Connection, superuser: Connection, form: Form
    ) -> None:
        self.connection = connection
        self.findings: list[str] = []
        self.compared = 0
        self._name = name
        self._superuser = superuser
        self._form = form
        self._set: Combination = {}
        self._runs: list[Run] = []
        self._turn = 0

    async def prepare(self, only: re.Pattern[str]) -> Self:
        self._newest_id = await newest_id(self._superuser)
        prepared: dict[str, PreparedStatement] = {}
        for case in cases(await rows_of(self._superuser, VICTIM), ATTACKER, STRANGER):
            if not only.match(case.name):
                continue
            compiled = self._form(case.statement)
            if compiled.sql not in prepared:
                prepared[compiled.sql] = await self.connection.prepare(compiled.sql)
            arguments = list(compiled.arguments(case.user_id, case.values))
            self._runs.append(
                Run(case, prepared[compiled.sql], arguments, await self._in_transaction(case))
            )
        self._victim = await self._rows_of_victim()
        return self

    async def run(self, *combinations: Combination) -> None:
        """Run all cases under these settings, with custom plans and with generic ones."""
        for combination in combinations:
            reset = "".join(f"RESET {name};" for name in self._set)
            # Settings have no effect on generic plans that exist.
            await self.connection.execute(f"{reset}{_set(combination)}DISCARD PLANS")
            self._set = combination
            self._turn += 1
            for mode in MODES:
                await self.connection.execute(f"SET plan_cache_mode = {mode}")
                await self._run(combination, f"{combination} {mode} {self._name}")

    async def _run(self, combination: Combination, how: str) -> None:
        all_columns = combination in EVERYWHERE
        runs = [run for run in self._runs if all_columns or run.turn in (None, self._turn % TURNS)]
        for run in runs:
            if not run.is_undone:
                await self._compare(run, how)
        left = await self.connection.fetchval(_USER)
        if left != combination.get("todo_db.user_id"):
            self.findings.append(f"{left} is left: {how}")
        if await self._rows_of_victim() != self._victim:
            self.findings.append(f"{VICTIM}'s rows changed: {how}")
        await self.connection.execute("BEGIN")
        for run in runs:
            if run.is_undone:
                await self._compare(run, how)
                await self.connection.execute("ROLLBACK; BEGIN")
        await self.connection.execute("ROLLBACK")

    async def plans(self) -> tuple[int, int]:
        """Return how often a custom plan was made, and a generic one was used."""
        row = await self.connection.fetchrow(
            "SELECT sum(custom_plans)::int, sum(generic_plans)::int FROM pg_prepared_statements"
            " WHERE statement LIKE '%set_config%'"
        )
        assert row is not None
        return (row[0], row[1])

    async def _in_transaction(self, case: Case) -> Outcome:
        compiled = case.statement.in_transaction
        await self.connection.execute("BEGIN")
        await self.connection.fetch(_SET_USER, case.user_id)
        arguments = compiled.arguments(case.user_id, case.values)
        outcome = await outcome_of(self.connection.fetch(compiled.sql, *arguments), self._newest_id)
        await self.connection.execute("ROLLBACK")
        return outcome

    async def _compare(self, run: Run, how: str) -> None:
        outcome = await outcome_of(run.prepared.fetch(*run.arguments), self._newest_id)
        self.compared += 1
        if outcome != run.expected:
            self.findings.append(f"{run.case.name}: {outcome} is not {run.expected}: {how}")
        elif run.case.is_foreign and outcome not in NOTHING:
            self.findings.append(f"{run.case.name}: {outcome} is not nothing: {how}")

    async def _rows_of_victim(self) -> object:
        return await self._superuser.fetchval(_ROWS_OF, VICTIM)


_SET_USER: Final = "SELECT set_config('todo_db.user_id', $1, true)"
_ROWS_OF: Final = """
    SELECT ARRAY[
        (SELECT string_agg(u::text, ' ' ORDER BY u.id) FROM users u WHERE u.id = $1),
        (SELECT string_agg(t::text, ' ' ORDER BY t.id) FROM tasks t WHERE t.user_id = $1),
        (SELECT string_agg(k::text, ' ' ORDER BY k.key) FROM idempotency_keys k
            WHERE k.user_id = $1)
    ]
"""


def _set(combination: Combination) -> str:
    return "".join(f"SET {name} = '{value}';" for name, value in combination.items())


async def combinations_of(place: Place) -> list[Combination]:
    """Return each switch of the planner, other settings, and random switches."""
    async with connected(place.cluster.url("postgres", "postgres")) as connection:
        switches: dict[str, str] = {
            name: "off" if value == "on" else "on"
            for name, value in await connection.fetch(
                r"SELECT name, boot_val FROM pg_settings WHERE name LIKE 'enable\_%' ORDER BY name"
            )
        }
    free = ("cpu_operator_cost", "cpu_tuple_cost", "cpu_index_tuple_cost")
    parallel = {
        "force_parallel_mode" if place.cluster.version == 15 else "debug_parallel_query": "on",
        "parallel_setup_cost": "0",
        "parallel_tuple_cost": "0",
        "min_parallel_table_scan_size": "0",
        "min_parallel_index_scan_size": "0",
    }
    listed: list[Combination] = [
        *({name: value} for name, value in switches.items()),
        parallel,
        dict.fromkeys(free, "0"),
        dict.fromkeys((*free, "seq_page_cost", "random_page_cost"), "0"),
        {"from_collapse_limit": "1", "join_collapse_limit": "1"},
        {"geqo_threshold": "2"},
        {"work_mem": "64kB"},
        # Another user of the connection left it.
        {"todo_db.user_id": ATTACKER},
    ]
    dice = random.Random(9)  # noqa: S311  # not for secrets
    while len(listed) < COMBINATIONS - len(EVERYWHERE):
        some = {name: value for name, value in switches.items() if dice.random() < 0.4}
        if dice.random() < 0.25:
            some |= FREE_OPERATORS
        if some not in listed:
            listed.append(some)
    return listed


@pytest_asyncio.fixture(scope="module", params=VERSIONS)
async def place(
    request: pytest.FixtureRequest,
    todo_postgres: EmbeddedPostgres,  # noqa: ARG001  # made the user that the server runs as
) -> AsyncGenerator[Place]:
    # Before 18, a switch makes plans so expensive that all of them would be compiled.
    with Cluster(request.param, autovacuum="off", synchronous_commit="off", jit="off") as cluster:
        place = Place(cluster)
        await place.prepare()
        yield place


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Generator[Counter[str]]:
    """Counts the comparisons, and prints their numbers at the end."""
    counted: Counter[str] = Counter()
    yield counted
    plugins = request.config.pluginmanager
    reporter, capture = plugins.getplugin("terminalreporter"), plugins.getplugin("capturemanager")
    assert reporter is not None
    assert capture is not None
    with capture.global_and_fixture_disabled():
        reporter.write_line(f"\n{counted.total():,} comparisons of one trip with three trips")
        for kind, number in counted.items():
            reporter.write_line(f"{number:>9,} {kind}")


async def compare(
    place: Place,
    dealt: Sequence[tuple[Tables, Sequence[Combination]]],
    *,
    form: Form | None = None,
    only: re.Pattern[str] = ALL,
) -> tuple[int, list[str]]:
    """Run the cases on these tables, each under its settings; return their number, and findings."""
    free = asyncio.Semaphore(3)

    async def run(tables: Tables, combinations: Sequence[Combination]) -> tuple[int, list[str]]:
        async with free, place.lane(tables, form=form, only=only) as lane:
            await lane.run(*EVERYWHERE, *combinations)
            # All of them were planned in both modes.
            custom, generic = await lane.plans()
            assert custom + generic >= lane.compared
            assert min(custom, generic) >= lane.compared / 2
            return lane.compared, lane.findings

    done = await asyncio.gather(*(run(*one) for one in dealt))
    return sum(number for number, _ in done), [found for _, some in done for found in some]


class TestRows:
    """The rows, the errors and what is left on the connection."""

    async def test_are_those_of_three_trips(self, place: Place, tally: Counter[str]) -> None:
        number, findings = await compare(
            place, await self._dealt(place, WHOLE, every=1 if place.cluster.version == 18 else 2)
        )
        tally[f"on PostgreSQL {place.cluster.version}"] += number
        assert findings == []

    async def test_of_a_partitioned_table_are_those_of_three_trips(
        self, place: Place, tally: Counter[str]
    ) -> None:
        number, findings = await compare(place, await self._dealt(place, PARTITIONED, every=4))
        tally[f"on partitions of PostgreSQL {place.cluster.version}"] += number
        assert findings == []

    @pytest.mark.parametrize("place", [18], indirect=True)
    async def test_through_a_pooler_are_those_of_three_trips(
        self, place: Place, tally: Counter[str]
    ) -> None:
        server = place.cluster.url("postgres", "postgres")
        combinations = await combinations_of(place)
        async with PgBouncer(
            TRIXIE, server, max_prepared_statements=1000, default_pool_size=1
        ) as pooler:
            for number, tables in enumerate((*WHOLE[4:], *PARTITIONED[2:])):
                async with place.lane(tables, pooler=pooler) as lane:
                    await lane.run(*EVERYWHERE, combinations[-1 - number])
                    tally["through PgBouncer"] += lane.compared
                    assert lane.findings == []

    @pytest.mark.parametrize("place", [15], indirect=True)
    async def test_of_compiled_expressions_are_those_of_three_trips(
        self, place: Place, tally: Counter[str]
    ) -> None:
        # Inlined and optimised, each would take some 200 ms.
        compiled = {
            "jit": "on",
            "jit_above_cost": "0",
            "jit_inline_above_cost": "-1",
            "jit_optimize_above_cost": "-1",
        }
        for tables in (WHOLE[7], PARTITIONED[3]):
            async with place.lane(tables, only=COMMON) as lane:
                await lane.run(compiled)
                assert await lane.connection.fetchval("SELECT pg_jit_available()")
                tally["with JIT"] += lane.compared
                assert lane.findings == []

    @staticmethod
    async def _dealt(
        place: Place, tables: Sequence[Tables], *, every: int
    ) -> list[tuple[Tables, list[Combination]]]:
        """Give some combinations of settings to one of the tables each."""
        first = VERSIONS.index(place.cluster.version)
        combinations = (await combinations_of(place))[first % every :: every]
        return [
            (one, combinations[(first + number) % len(tables) :: len(tables)])
            for number, one in enumerate(tables)
        ]


class TestStored:
    """What autocommit stores, with nothing around the statement."""

    async def test_is_what_three_trips_store(self, place: Place, tally: Counter[str]) -> None:
        dice = random.Random(place.cluster.version)  # noqa: S311  # not for secrets
        combinations = [{}, FREE_OPERATORS, *dice.sample(await combinations_of(place), 3)]
        for number, combination in enumerate(combinations):
            tables = Tables(*SMALL, analysed=number % 2 == 0, partitioned=number % 3 == 2)
            mode = {"plan_cache_mode": MODES[number % 2]}
            async with place.database(tables) as one, place.database(tables) as three:
                tally["in autocommit"] += await self._compare(place, one, three, combination | mode)

    async def _compare(self, place: Place, one: str, three: str, combination: Combination) -> int:
        async with (
            connected(place.cluster.url(LOGIN, one)) as alone,
            connected(place.cluster.url(LOGIN, three)) as in_transaction,
            connected(place.cluster.url("postgres", one)) as stored_alone,
            connected(place.cluster.url("postgres", three)) as stored_in_transaction,
        ):
            await alone.execute(_set(combination))
            rows = await rows_of(stored_alone, VICTIM)
            # After a deletion the other cases would find nothing.
            ordered = sorted(
                (case for case in cases(rows, ATTACKER, STRANGER) if not case.is_read),
                key=lambda case: "_delete" in case.name,
            )
            for case in ordered:
                compiled = case.statement.alone
                arguments = compiled.arguments(case.user_id, case.values)
                outcome = await outcome_of(alone.fetch(compiled.sql, *arguments))
                assert await alone.fetchval(_USER) is None
                expected = await self._commit(in_transaction, case)
                assert outcome == expected, (case.name, combination)
                assert await stored(stored_alone) == await stored(stored_in_transaction), case.name
        return len(ordered)

    @staticmethod
    async def _commit(connection: Connection, case: Case) -> Outcome:
        compiled = case.statement.in_transaction
        transaction = connection.transaction()
        await transaction.start()
        await connection.fetch(_SET_USER, case.user_id)
        arguments = compiled.arguments(case.user_id, case.values)
        outcome = await outcome_of(connection.fetch(compiled.sql, *arguments))
        await (transaction.commit() if isinstance(outcome, list) else transaction.rollback())
        return outcome


_USER: Final = "SELECT nullif(current_setting('todo_db.user_id', true), '')"


async def stored(superuser: Connection) -> list[Outcome]:
    """Return all rows, in the order of their keys."""
    return [
        await outcome_of(superuser.fetch(f"SELECT * FROM {table} ORDER BY 1, 2"))
        for table in ("tasks", "users", "idempotency_keys")
    ]


# Forms that look right, and set the user too late or for too long.


def _owner() -> ColumnElement[str]:
    return bindparam(OWNER, type_=Text())


def _condition(owner: ColumnElement[str]) -> ColumnElement[str]:
    return func.pg_catalog.set_config(literal_column("'todo_db.user_id'"), owner, true())


def _sent(statement: Any) -> Compiled:  # noqa: ANN401  # a Select, an Update or a Delete
    return _compiled(statement, schema_translate_map={None: "public"}, render_schema_translate=True)


def inside(statement: Statement) -> Compiled:
    """The condition is one of the statement's own."""
    owner = _owner()
    inner = statement._build(owner)
    condition = select(_condition(owner)).scalar_subquery().is_not(None)
    match inner:
        case CompoundSelect() if not inner._order_by_clauses:
            *others, last = cast("Sequence[Select[Any]]", inner.selects)
            return _sent(union_all(*others, last.where(condition)))
        case Select() | Update() | Delete():
            return _sent(inner.where(condition))
        case _:
            return statement.alone


def joined(statement: Statement) -> Compiled:
    """The owner is what set_config returns, in a sub-select that cannot be pulled up."""
    gate = select(_condition(_owner()).label("owner")).offset(literal_column("0")).subquery("gate")
    if isinstance(statement._build(_owner()), (Update, Delete)):
        return _sent(statement._build(gate.c.owner))
    return statement.alone


def _replaced(statement: Statement, old: str, new: str) -> Compiled:
    compiled = statement.alone
    sql, number = re.subn(old, new, compiled.sql)
    assert number == 1
    return compiled._replace(sql=sql)


def of_each_row(statement: Statement) -> Compiled:
    """The condition reads a column, so that there has to be a row first."""
    column = re.findall(r"SELECT (result\.\w+)", statement.alone.sql)[-1]
    return _replaced(
        statement,
        r"set_config\('todo_db.user_id', (\$\d+::VARCHAR)",
        rf"set_config('todo_db.user_id', CASE WHEN {column} IS NULL THEN \1 ELSE \1 END",
    )


def inlined(statement: Statement) -> Compiled:
    """The planner may merge the statement into the query around it."""
    return statement.alone._replace(sql=statement.alone.sql.replace(" MATERIALIZED", ""))


def selected(statement: Statement) -> Compiled:
    """The user is set for each row of the result."""
    return _replaced(statement, r"FROM result \nWHERE (.*)$", r"FROM result WHERE true OR (\1)")


def for_the_session(statement: Statement) -> Compiled:
    return _replaced(statement, r", true\) AS set_config", ", false) AS set_config")


class TestLateForm:
    @pytest.mark.parametrize(
        ("form", "found"),
        [
            (inside, "tasks_update_if-title fresh"),
            (inside, "tasks_get own"),
            (joined, "tasks_update-title own"),
            (joined, "tasks_delete own"),
            (of_each_row, "tasks_get own"),
            (of_each_row, "tasks_update_if-title fresh"),
            (of_each_row, "tasks_create_keyed new"),
            (inlined, "tasks_get own"),
            (selected, "tasks_get own"),
            (for_the_session, "is left"),
        ],
    )
    async def test_is_found(self, place: Place, form: Form, found: str) -> None:
        tables = [(Tables(*SMALL, analysed=False, partitioned=some), ()) for some in (False, True)]
        _, findings = await compare(place, tables, form=form, only=COMMON)
        assert any(found in finding for finding in findings)
