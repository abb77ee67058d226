"""Removes each defence in turn: its check must then fail.

A check that passes without its defence proves nothing.
"""

import inspect
import textwrap
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import attacks
import keys
import pytest
import pytest_asyncio
import shadow
from attacks import Victim
from cluster import SINGLE
from driver import Connection
from shapes import SHAPES, without_owner

from todo_db import Database, Transaction, errors
from todo_db.embedded import OWNER, EmbeddedPostgres
from todo_db.engine import Pool
from todo_db.gate import TransactionGate
from todo_db.repositories import Statement, tasks
from todo_db.transaction import TransactionPreamble

type Check = Callable[[Database, Connection, Victim], Awaitable[None]]
type Scene = tuple[Database, Connection, Victim]

pytestmark = pytest.mark.mutation

CHECKS: Final[tuple[Check, ...]] = (
    attacks.answer_of_commit_is_read,
    attacks.cancelled_transactions_leave_nothing,
    attacks.dirty_connection_is_not_kept,
    attacks.dirty_connection_is_not_acquired,
    attacks.granted_tables_are_fenced,
    attacks.keys_cannot_be_planted,
    attacks.keys_cannot_be_deleted,
    attacks.id_cannot_be_chosen,
    attacks.nothing_runs_after_a_commit,
    attacks.nothing_stays_on_a_connection,
    attacks.open_policy_is_fenced,
    attacks.other_user_is_refused,
    attacks.owner_cannot_be_changed,
    attacks.raw_sql_does_not_cross,
    attacks.repositories_do_not_cross,
    keys.first_answer_is_kept,
    keys.lost_commit_is_resolved,
    keys.lost_race_leaves_a_transaction_usable,
    keys.other_arguments_are_refused,
    keys.second_call_finds_the_first,
)


@pytest_asyncio.fixture
async def db(todo_postgres: EmbeddedPostgres, todo_database_name: str) -> AsyncGenerator[Database]:
    """A Database with the login that could see every row, and one connection for all users."""
    url = todo_postgres.url(user=OWNER, database=todo_database_name)
    async with Database.from_url(url, pool_size=1, max_overflow=0) as database:
        await database.users.create("alice", email="alice@example.org", name="Alice")
        yield database


@pytest_asyncio.fixture
async def scene(db: Database, owner: Connection) -> Scene:
    return db, owner, await attacks.plant_victim(db)


async def fails(check: Check, scene: Scene) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        await check(*scene)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_check_passes_with_every_defence(scene: Scene, check: Check) -> None:
    await check(*scene)


@pytest.mark.parametrize("table", attacks.TABLES)
@pytest.mark.parametrize(
    ("mutation", "check"),
    [
        ("DROP POLICY {0}_own ON {0}", attacks.raw_sql_does_not_cross),
        ("DROP POLICY {0}_fence ON {0}", attacks.open_policy_is_fenced),
        ("ALTER TABLE {0} DISABLE ROW LEVEL SECURITY", attacks.raw_sql_does_not_cross),
        ("ALTER TABLE {0} NO FORCE ROW LEVEL SECURITY", attacks.granted_tables_are_fenced),
        ("ALTER POLICY {0}_fence ON {0} TO PUBLIC", attacks.granted_tables_are_fenced),
        (
            "CREATE TABLE mine AS TABLE {0}; GRANT SELECT ON mine TO todo_app",
            attacks.granted_tables_are_fenced,
        ),
        ("GRANT UPDATE ON {0} TO todo_app", attacks.owner_cannot_be_changed),
    ],
)
async def test_schema_without(
    scene: Scene, owner: Connection, table: str, mutation: str, check: Check
) -> None:
    await owner.execute(mutation.format(table))
    await fails(check, scene)


async def test_schema_without_the_column_grant_of_inserts(scene: Scene, owner: Connection) -> None:
    await owner.execute("GRANT INSERT ON tasks TO todo_app")
    await fails(attacks.id_cannot_be_chosen, scene)


@pytest.mark.parametrize("mutation", ["GRANT DELETE", "GRANT UPDATE", "GRANT UPDATE (task_ids)"])
async def test_keys_granted_more(scene: Scene, owner: Connection, mutation: str) -> None:
    await owner.execute(f"{mutation} ON idempotency_keys TO todo_app")
    await fails(attacks.keys_cannot_be_deleted, scene)


async def test_keys_without_the_check_of_their_policies(scene: Scene, owner: Connection) -> None:
    for policy in ("own", "fence"):
        await owner.execute(
            f"ALTER POLICY idempotency_keys_{policy} ON idempotency_keys WITH CHECK (true)"
        )
    await fails(attacks.keys_cannot_be_planted, scene)


@pytest.mark.parametrize(
    "shape",
    [
        "tasks_get",
        "tasks_page-newest",
        "tasks_page-oldest-after",
        "tasks_page-recently_updated-search-after",
        "tasks_page-title-completed",
        "tasks_count",
        "tasks_create_keyed",
        "tasks_update-title",
        "tasks_update_if-title",
        "tasks_update_many-title",
        "tasks_toggle",
        "tasks_delete",
        "tasks_delete_many",
        "tasks_delete_completed",
        "users_get",
        "users_ensure",
        "users_update-name",
        "users_set_email",
        "users_delete",
    ],
)
async def test_statement_without_its_owner_and_row_security(
    scene: Scene, owner: Connection, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    statement = SHAPES[shape]
    await attacks.disable_row_security(owner)
    compiled = statement.in_transaction
    forgetful = compiled._replace(sql=without_owner(compiled.sql))
    monkeypatch.setitem(statement.__dict__, "in_transaction", forgetful)
    await fails(attacks.repositories_do_not_cross, scene)


@dataclass(frozen=True)
class Mutation:
    """One function of the package, with a piece of its source replaced."""

    holder: object
    name: str
    old: str
    new: str

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        function = getattr(self.holder, self.name)
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.old) == 1
        namespace = dict(function.__globals__)
        exec(compile(source.replace(self.old, self.new), "<mutant>", "exec"), namespace)  # noqa: S102
        monkeypatch.setattr(self.holder, self.name, namespace[self.name])


@pytest.mark.parametrize(
    ("mutation", "check"),
    [
        (
            Mutation(TransactionPreamble, "__init__", "SET LOCAL ROLE {ROLE};", ""),
            attacks.raw_sql_does_not_cross,
        ),
        (
            Mutation(TransactionPreamble, "begin", "user_id.encode()", "b''"),
            attacks.raw_sql_does_not_cross,
        ),
        (
            Mutation(TransactionPreamble, "__init__", "'UTF8'), true)", "'UTF8'), false)"),
            attacks.nothing_stays_on_a_connection,
        ),
        (
            Mutation(Transaction, "perform", "user_id != self.user_id", "False"),
            attacks.other_user_is_refused,
        ),
        (
            Mutation(TransactionGate, "_enter", "not self.driver.is_in_transaction()", "False"),
            attacks.nothing_runs_after_a_commit,
        ),
        (
            Mutation(TransactionGate, "_commit", 'tag == "COMMIT"', "tag"),
            attacks.answer_of_commit_is_read,
        ),
        (
            Mutation(Pool, "take", "not connection.is_fresh", "False"),
            attacks.dirty_connection_is_not_acquired,
        ),
    ],
    ids=[
        "role",
        "user id",
        "end of the user id",
        "one user",
        "transaction under way",
        "answer of COMMIT",
        "guard of the pool",
    ],
)
async def test_package_without(
    scene: Scene, mutation: Mutation, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation.apply(monkeypatch)
    # What the database wrote before the mutation is written again.
    monkeypatch.setattr(scene[0], "_preamble", TransactionPreamble(scene[0].settings))
    await fails(check, scene)


@pytest.mark.parametrize(
    ("mutation", "check"),
    [
        (
            Mutation(
                tasks, "_create_keyed", "_create_given(owner, unknown)", "_create_given(owner)"
            ),
            keys.first_answer_is_kept,
        ),
        (
            Mutation(tasks, "_create_keyed", ".where(\n                unknown\n            )", ""),
            keys.first_answer_is_kept,
        ),
        (
            Mutation(tasks, "_keyed", "rows[0][2] != fingerprint", "False"),
            keys.other_arguments_are_refused,
        ),
        (
            Mutation(tasks, "_keyed", "digest.update(", "id("),
            keys.other_arguments_are_refused,
        ),
        (
            Mutation(tasks, "_keyed", "Retry.IDEMPOTENT", "Retry.UNSAFE"),
            keys.lost_commit_is_resolved,
        ),
        (
            Mutation(tasks, "_keyed", "needs_savepoint=True", "needs_savepoint=False"),
            keys.lost_race_leaves_a_transaction_usable,
        ),
    ],
    ids=[
        "unless the key is known: the tasks",
        "unless the key is known: the key",
        "comparison of the arguments",
        "arguments in the fingerprint",
        "repetition",
        "savepoint",
    ],
)
async def test_key_without(
    scene: Scene, mutation: Mutation, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation.apply(monkeypatch)
    monkeypatch.setattr(tasks, "_CREATE_KEYED", Statement(tasks._create_keyed))
    await fails(check, scene)


async def test_key_without_the_meaning_of_its_collision(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(errors._BY_CONSTRAINT, "pk_idempotency_keys")
    await fails(keys.second_call_finds_the_first, scene)


@pytest_asyncio.fixture
async def single(single_url: str) -> AsyncGenerator[Database]:
    """A Database whose calls take one round trip, on one connection for all users."""
    async with Database.from_url(single_url, pool_size=1, max_overflow=0) as database:
        await database.users.create("alice", email="alice@example.org", name="Alice")
        yield database


@pytest_asyncio.fixture
async def single_scene(single: Database, owner: Connection) -> Scene:
    return single, owner, await attacks.plant_victim(single)


type Preparation = Callable[[Database, Connection], Awaitable[None]]


async def free_operators(single: Database, superuser: Connection) -> None:
    """Let the planner evaluate conditions in an order that their cost does not decide."""
    database = await superuser.fetchval("SELECT current_database()")
    await superuser.execute(f"ALTER ROLE {SINGLE} IN DATABASE {database} SET cpu_operator_cost = 0")
    await single.close()
    await single.open()


async def hostile_path(single: Database, superuser: Connection) -> None:
    """Let the names of the tables alone mean copies of them."""
    await shadow.plant(superuser)
    await single.close()
    await single.open()


@pytest.mark.parametrize("prepare", [free_operators, hostile_path])
@pytest.mark.parametrize(
    "check",
    [
        attacks.own_rows_are_found_in_one_trip,
        attacks.nothing_stays_of_one_trip,
        attacks.repositories_do_not_cross,
    ],
    ids=lambda check: check.__name__,
)
async def test_check_passes_in_one_trip_with_every_defence(
    single_scene: Scene, superuser: Connection, prepare: Preparation, check: Check
) -> None:
    await prepare(single_scene[0], superuser)
    await check(*single_scene)


@pytest.mark.parametrize(
    ("old", "new", "prepare", "check"),
    [
        (
            "select(user).scalar_subquery().is_not(None)",
            "true()",
            None,
            attacks.own_rows_are_found_in_one_trip,
        ),
        ("owner, true())", "owner, ~true())", None, attacks.nothing_stays_of_one_trip),
        (
            'result.prefix_with("MATERIALIZED")',
            "result",
            free_operators,
            attacks.own_rows_are_found_in_one_trip,
        ),
        (
            'schema_translate_map={None: "public"}',
            "schema_translate_map={}",
            hostile_path,
            attacks.own_rows_are_found_in_one_trip,
        ),
        (
            "func.pg_catalog.set_config",
            "func.set_config",
            hostile_path,
            attacks.own_rows_are_found_in_one_trip,
        ),
    ],
    ids=["condition", "end of the user id", "MATERIALIZED", "schema", "schema of set_config"],
)
async def test_one_trip_without(  # noqa: PLR0913  # what is replaced, where and who sees it
    *,
    single_scene: Scene,
    superuser: Connection,
    old: str,
    new: str,
    prepare: Preparation | None,
    check: Check,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function = vars(Statement)["alone"].func
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1
    namespace = dict(function.__globals__)
    exec(compile(source.replace(old, new), "<mutant>", "exec"), namespace)  # noqa: S102
    for statement in SHAPES.values():
        monkeypatch.setitem(statement.__dict__, "alone", namespace["alone"].func(statement))
    if prepare is not None:
        await prepare(single_scene[0], superuser)
    await fails(check, single_scene)


@pytest.mark.parametrize("shape", ["tasks_page-newest", "tasks_get", "tasks_delete_many"])
async def test_one_trip_without_its_owner_and_row_security(
    single_scene: Scene, owner: Connection, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    statement = SHAPES[shape]
    await attacks.disable_row_security(owner)
    compiled = statement.alone
    forgetful = compiled._replace(sql=without_owner(compiled.sql))
    assert forgetful != compiled
    monkeypatch.setitem(statement.__dict__, "alone", forgetful)
    await fails(attacks.repositories_do_not_cross, single_scene)
