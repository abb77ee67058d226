"""Every known way to reach another user's rows, by its number."""

import asyncio
import io
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import asyncpg
import attacks
import pytest
import pytest_asyncio
from attacks import (
    KEY,
    SECRET,
    TABLES,
    Victim,
    begin,
    count,
    key_for,
    pooled_connection,
    refusal,
    rows,
    sent,
)
from driver import Connection
from shapes import SHAPES, without_owner
from sqlalchemy import insert, text, update

from todo_db import (
    Database,
    EmailTakenError,
    InvalidInputError,
    IsolationError,
    TaskNotFoundError,
    TodoDBError,
    Transaction,
    TransactionError,
)
from todo_db.embedded import LOGIN, OWNER, EmbeddedPostgres
from todo_db.migrations import upgrade
from todo_db.models import Task
from todo_db.repositories import Operation, Statement

# The rule of a policy, as the server prints it.
_CONTEXT: Final = (
    "NULLIF(( SELECT current_setting('todo_db.user_id'::text, true) AS current_setting), ''::text)"
)


@pytest_asyncio.fixture
async def victim(db: Database) -> Victim:
    return await attacks.plant_victim(db)


@asynccontextmanager
async def connected(url: str) -> AsyncGenerator[Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture(scope="module")
def roles() -> Generator[EmbeddedPostgres]:
    """A server for this file, because roles belong to all databases of a server."""
    with (
        TemporaryDirectory(prefix="todo-db-") as folder,
        EmbeddedPostgres(Path(folder) / "postgres", durable=False) as server,
    ):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, upgrade(server.url())).result()
        server.create_login()
        yield server


@asynccontextmanager
async def with_weakness(server: EmbeddedPostgres, *plant: str) -> AsyncGenerator[Connection]:
    """Weaken the roles or the tables of a server, and restore them at the end."""
    async with connected(server.url(user="postgres")) as superuser:
        try:
            for sql in plant:
                await superuser.execute(sql)
            yield superuser
        finally:
            await superuser.execute("""
                ALTER ROLE todo_app NOSUPERUSER NOBYPASSRLS NOREPLICATION;
                ALTER TABLE users OWNER TO todo_owner;
                ALTER TABLE tasks OWNER TO todo_owner;
                ALTER TABLE tasks ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
                ALTER TABLE idempotency_keys FORCE ROW LEVEL SECURITY;
                DROP ROLE IF EXISTS planted;
                TRUNCATE users CASCADE
            """)


@pytest_asyncio.fixture
async def superuser(
    todo_postgres: EmbeddedPostgres, todo_database_name: str
) -> AsyncGenerator[Connection]:
    url = todo_postgres.url(user="postgres", database=todo_database_name)
    async with connected(url) as connection:
        yield connection


class TestOpen:
    """A2 to A4: `open` refuses a role that could see every row."""

    @pytest.mark.parametrize(
        "plant",
        [
            ("ALTER TABLE tasks NO FORCE ROW LEVEL SECURITY",),
            ("ALTER TABLE tasks DISABLE ROW LEVEL SECURITY",),
            ("ALTER TABLE tasks OWNER TO todo_app",),
            ("ALTER TABLE idempotency_keys NO FORCE ROW LEVEL SECURITY",),
            ("ALTER ROLE todo_app BYPASSRLS",),
            ("ALTER ROLE todo_app SUPERUSER",),
            ("ALTER ROLE todo_app REPLICATION",),
            (
                "CREATE ROLE planted",
                "ALTER TABLE tasks OWNER TO planted",
                "GRANT planted TO todo_app WITH INHERIT FALSE, SET TRUE",
            ),
            ("CREATE ROLE planted BYPASSRLS", "GRANT planted TO todo_app"),
            (
                "CREATE ROLE planted SUPERUSER",
                "GRANT planted TO todo_app WITH INHERIT FALSE, SET TRUE",
            ),
        ],
        ids=[
            "A1 not forced",
            "A1 disabled",
            "A1 owner",
            "A1 keys not forced",
            "A2 bypasses",
            "A2 superuser",
            "A2 replicates",
            "A3 member of the owner",
            "A4 inherits a bypass",
            "A4 may become a superuser",
        ],
    )
    async def test_refuses_a_role_that_could_bypass(
        self, roles: EmbeddedPostgres, plant: tuple[str, ...]
    ) -> None:
        db = Database.from_url(roles.url(user=LOGIN))
        async with with_weakness(roles, *plant):
            with pytest.raises(IsolationError):
                await db.open()
            with pytest.raises(IsolationError):
                await db.tasks.count("alice")
        await db.open()
        await db.close()

    async def test_A1_D11_owner_that_does_not_bypass_sees_nothing(
        self, roles: EmbeddedPostgres
    ) -> None:
        async with with_weakness(
            roles,
            "CREATE ROLE planted",
            "ALTER TABLE users OWNER TO planted",
            "ALTER TABLE tasks OWNER TO planted",
            "INSERT INTO users (id, email) VALUES ('alice', 'alice@example.org')",
            "INSERT INTO tasks (user_id, title) VALUES ('alice', 'hers')",
            "SET ROLE planted",
        ) as connection:
            assert await connection.fetch("SELECT FROM tasks") == []
            assert await connection.execute("DELETE FROM tasks") == "DELETE 0"
            await connection.execute("ALTER TABLE tasks NO FORCE ROW LEVEL SECURITY")
            assert len(await connection.fetch("SELECT FROM tasks")) == 1
            await connection.execute("RESET ROLE")


class TestRoles:
    async def test_A3_A4_role_and_login_are_members_of_nothing_else(
        self, owner: Connection
    ) -> None:
        members = await owner.fetch("""
            SELECT member::regrole::text, roleid::regrole::text FROM pg_auth_members
            WHERE member IN ('todo_app'::regrole, 'todo_login'::regrole)
        """)
        assert [tuple(row) for row in members] == [(LOGIN, "todo_app")]

    @pytest.mark.parametrize("user", [LOGIN, OWNER, "postgres"])
    async def test_A5_transaction_sees_one_user_under_any_login(
        self, todo_postgres: EmbeddedPostgres, todo_database_name: str, user: str
    ) -> None:
        url = todo_postgres.url(user=user, database=todo_database_name)
        async with Database.from_url(url) as db, connected(url) as connection:
            await db.users.create("alice", email="alice@example.org", name="Alice")
            await attacks.plant_victim(db)
            visible = await connection.fetchval("SELECT count(DISTINCT user_id) FROM tasks")
            assert visible == (0 if user == LOGIN else 2)
            async with db.transaction("mallory") as tx:
                assert await rows(tx, "SELECT current_user") == ["todo_app"]
                assert set(await rows(tx, "SELECT user_id FROM tasks")) == {"mallory"}

    async def test_A6_recommended_login_gains_nothing_by_dropping_the_role(
        self, db: Database, victim: Victim, login: str
    ) -> None:
        assert victim.tasks
        async with db.transaction("mallory") as tx:
            with pytest.raises(TransactionError):
                await tx.execute(text("RESET ROLE"))
            await rows(tx, "SELECT set_config('role', 'none', true)")
            seen = set(await rows(tx, "SELECT user_id FROM tasks"))
        # Neon's default login gains every right, so it is not recommended.
        assert seen == ({"mallory"} if login == LOGIN else {"alice", "mallory"})

    async def test_A7_A8_role_may_not_touch_the_schema(self, db: Database) -> None:
        async with db.transaction("alice") as tx:
            for sql in (
                "TRUNCATE tasks",
                "TRUNCATE users CASCADE",
                "ALTER TABLE tasks DISABLE ROW LEVEL SECURITY",
                "ALTER TABLE tasks NO FORCE ROW LEVEL SECURITY",
                "DROP POLICY tasks_fence ON tasks",
                "ALTER POLICY tasks_own ON tasks USING (true)",
                "DROP POLICY idempotency_keys_fence ON idempotency_keys",
                "CREATE POLICY mine ON idempotency_keys USING (true)",
                "TRUNCATE idempotency_keys",
                "CREATE POLICY mine ON tasks USING (true)",
                "CREATE TRIGGER t AFTER UPDATE ON tasks EXECUTE FUNCTION set_updated_at()",
                "CREATE TABLE mine (id bigint)",
                "CREATE TABLE public.mine (id bigint REFERENCES tasks)",
                "CREATE VIEW mine AS SELECT * FROM tasks",
                "CREATE FUNCTION mine() RETURNS int RETURN 1",
                "CREATE TEMPORARY TABLE tasks (id bigint)",
                "CREATE SCHEMA mine",
                "UPDATE todo_db_version SET version_num = '9999'",
                "DELETE FROM todo_db_version",
                "SELECT last_value FROM tasks_id_seq",
                "SELECT setval('tasks_id_seq', 1)",
            ):
                assert await refusal(tx, sql) == "42501", sql

    async def test_A7_A8_role_has_no_privilege_beyond_rows(self, owner: Connection) -> None:
        held = await owner.fetch("""
            SELECT table_name || ':' || privilege_type FROM information_schema.table_privileges
            WHERE grantee IN ('todo_app', 'todo_login', 'PUBLIC') AND table_schema = 'public'
            ORDER BY 1
        """)
        assert [row[0] for row in held] == [
            "idempotency_keys:SELECT",
            "tasks:DELETE",
            "tasks:SELECT",
            "todo_db_version:SELECT",
            "users:DELETE",
            "users:SELECT",
        ]

    async def test_A8_temporary_table_does_not_shadow_the_real_one(
        self, db: Database, owner: Connection, victim: Victim
    ) -> None:
        assert victim.tasks
        name = await owner.fetchval("SELECT current_database()")
        await owner.execute(f"GRANT TEMPORARY ON DATABASE {name} TO todo_app")
        async with db.transaction("mallory") as tx:
            await tx._gate.driver.execute("CREATE TEMPORARY TABLE tasks (LIKE public.tasks)")
            assert await tx.tasks.count("mallory") == 2
            assert len(await rows(tx, "SELECT id FROM tasks")) == 2

    async def test_A9_every_granted_table_is_fenced(self, db: Database, owner: Connection) -> None:
        await attacks.granted_tables_are_fenced(db, owner, Victim([], {}))

    async def test_A10_switching_row_security_off_is_an_error(self, db: Database) -> None:
        async with db.transaction("alice") as tx:
            with pytest.raises(TransactionError):
                await tx.execute(text("SET LOCAL row_security = off"))
            await rows(tx, "SELECT set_config('row_security', 'off', true)")
            for table in TABLES:
                assert await refusal(tx, f"SELECT * FROM {table}") == "42501"
                assert await refusal(tx, f"DELETE FROM {table}") == "42501"


class TestPolicies:
    async def test_bind_sql_that_names_no_user(
        self, db: Database, owner: Connection, victim: Victim
    ) -> None:
        await attacks.raw_sql_does_not_cross(db, owner, victim)

    async def test_B1_permissive_policy_added_by_mistake_opens_nothing(
        self, db: Database, owner: Connection, victim: Victim
    ) -> None:
        await attacks.open_policy_is_fenced(db, owner, victim)

    async def test_B2_B8_are_exactly_these(self, owner: Connection) -> None:
        found = await owner.fetch("""
            SELECT tablename, policyname, permissive, roles::text[], cmd, qual, with_check
            FROM pg_policies WHERE roles <> '{todo_auth}' ORDER BY policyname
        """)
        assert [tuple(row) for row in found] == [
            (table, f"{table}_{name}", kind, ["todo_app"], "ALL", expression, expression)
            for table, expression in (
                ("idempotency_keys", f"(user_id = {_CONTEXT})"),
                ("tasks", f"(user_id = {_CONTEXT})"),
                ("users", f"(id = {_CONTEXT})"),
            )
            for name, kind in (("fence", "RESTRICTIVE"), ("own", "PERMISSIVE"))
        ]
        of_better_auth = await owner.fetch(
            "SELECT tablename FROM pg_policies WHERE roles = '{todo_auth}' ORDER BY tablename"
        )
        tables = ["accounts", "jwks", "sessions", "users", "verifications"]
        assert [row[0] for row in of_better_auth] == tables

    async def test_B3_E3_no_user_and_an_empty_user_see_no_rows(
        self, url: str, db: Database, owner: Connection, victim: Victim
    ) -> None:
        assert victim.tasks
        # A check forbids rows of user ''. Store some here, to see that an empty user id does not
        # match them.
        await owner.execute("""
            ALTER TABLE users DROP CONSTRAINT ck_users_id_length;
            INSERT INTO users (id, email) VALUES ('', 'empty@example.org');
            INSERT INTO tasks (user_id, title) VALUES ('', 'of no user');
            INSERT INTO idempotency_keys (user_id, key, fingerprint, task_ids)
            VALUES ('', 'of no user', repeat('0', 64), '{}')
        """)
        async with connected(url) as connection:
            for context in (
                "SELECT",
                "SET todo_db.user_id = ''",
                begin("alice") + ";COMMIT",
                begin("alice") + ";ROLLBACK",
                "SELECT set_config('todo_db.user_id', 'alice', true)",
            ):
                await connection.execute(context)
                await connection.execute("BEGIN; SET LOCAL ROLE todo_app")
                for table in ("users", "tasks"):
                    assert await connection.fetch(f"SELECT FROM {table}") == [], context
                    assert await connection.execute(f"DELETE FROM {table}") == "DELETE 0", context
                assert await connection.fetch("SELECT FROM idempotency_keys") == [], context
                await connection.execute("ROLLBACK")
        await owner.execute("DELETE FROM users WHERE id = ''")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with connected(url) as connection:
                await connection.execute(
                    "SET ROLE todo_app; INSERT INTO users (id, email) VALUES ('', 'x@example.org')"
                )
        assert await db.tasks.count("alice") == 4

    async def test_B3_empty_user_id_cannot_be_stored(self, owner: Connection) -> None:
        with pytest.raises(asyncpg.CheckViolationError):
            await owner.execute("INSERT INTO users (id, email) VALUES ('', 'x@example.org')")

    async def test_B4_call_nothing_but_the_setting(self, owner: Connection) -> None:
        called = await owner.fetch("""
            SELECT refobjid::regprocedure FROM pg_depend
            WHERE classid = 'pg_policy'::regclass AND refclassid = 'pg_proc'::regclass
        """)
        assert called == []
        stable = "SELECT provolatile FROM pg_proc WHERE proname = 'current_setting'"
        assert {row[0] for row in await owner.fetch(stable)} == {b"s"}

    async def test_B7_call_it_alone_in_a_sub_select(self, owner: Connection) -> None:
        # Supabase's linter looks for this text too.
        alone = re.compile(r"\( SELECT current_setting\('[^']*'::text, true\) AS current_setting\)")
        rules = [
            rule
            for row in await owner.fetch("SELECT qual, with_check FROM pg_policies")
            for rule in row
            if rule != "true"
        ]
        assert len(rules) == 12
        for rule in rules:
            assert len(alone.findall(rule)) == 1
            assert "current_setting(" not in alone.sub("", rule)

    async def test_B5_prepared_plan_does_not_remember_its_user(
        self, url: str, owner: Connection, victim: Victim
    ) -> None:
        name = await owner.fetchval("SELECT current_database()")
        await owner.execute(f"ALTER DATABASE {name} SET plan_cache_mode = force_generic_plan")
        async with connected(url) as connection:
            everything = await connection.prepare("SELECT DISTINCT user_id FROM tasks ORDER BY 1")
            unbound = await connection.fetch("SELECT DISTINCT user_id FROM tasks ORDER BY 1")
            for user_id in ("alice", "mallory", "bob", "alice") * 2:
                await connection.execute(begin(user_id))
                seen = [row[0] for row in await everything.fetch()]
                assert seen == ([] if user_id == "bob" else [user_id])
                await connection.execute("COMMIT")
                assert await everything.fetch() == unbound
        async with Database.from_url(url, pool_size=1, max_overflow=0) as db:
            for user_id, tasks in (("alice", 4), ("mallory", 2), ("bob", 0), ("alice", 4)):
                page = await db.tasks.list(user_id)
                assert [task.user_id for task in page.items] == [user_id] * tasks
                if user_id != "alice":
                    with pytest.raises(TaskNotFoundError):
                        await db.tasks.get(user_id, victim.ids[0])

    async def test_B6_row_for_another_user_is_refused(
        self, db: Database, owner: Connection, victim: Victim
    ) -> None:
        await attacks.owner_cannot_be_changed(db, owner, victim)
        before = await attacks.rows_of(owner, "alice")
        forged = [
            Statement(lambda mine: insert(Task).values(user_id=text("'alice'"), title=mine)),
            Statement(
                lambda mine: (
                    update(Task).where(Task.user_id == mine).values(user_id=text("'alice'"))
                )
            ),
        ]
        for statement in forged:
            with pytest.raises(IsolationError):
                await db.perform("mallory", Operation(statement, {}, lambda found: found))
        assert await attacks.rows_of(owner, "alice") == before

    async def test_B7_D10_setting_is_read_once_and_for_another_user_no_row(
        self, db: Database
    ) -> None:
        async with db.transaction("mallory") as tx:
            for sql in (
                "SELECT * FROM tasks",
                "DELETE FROM tasks",
                "SELECT * FROM users",
                "SELECT * FROM idempotency_keys",
            ):
                plan = "\n".join(map(str, await rows(tx, f"EXPLAIN (COSTS OFF) {sql}")))
                assert "InitPlan" in plan, plan
                assert "current_setting" not in plan, plan
            plan = "\n".join(
                map(str, await rows(tx, "EXPLAIN SELECT * FROM tasks WHERE user_id = 'alice'"))
            )
            # Before 17, EXPLAIN prints the parameter.
            setting = r"(\(InitPlan 1\)\.col1|\$0)"
            assert re.search(rf"One-Time Filter: \(NULLIF\({setting}, ''::text\) = 'alice'", plan)


class TestObjects:
    async def test_C1_C2_C4_there_is_nothing_but_plain_tables(self, owner: Connection) -> None:
        others = await owner.fetch("""
            SELECT oid::regclass FROM pg_class
            WHERE relnamespace = 'public'::regnamespace
                AND (relkind NOT IN ('r', 'i', 'S') OR relispartition OR relhassubclass)
        """)
        assert others == []

    async def test_C3_only_the_listed_function_is_security_definer(self, owner: Connection) -> None:
        functions = await owner.fetch("""
            SELECT proname, prosecdef, proconfig FROM pg_proc
            WHERE pronamespace = 'public'::regnamespace ORDER BY proname
        """)
        assert [tuple(row) for row in functions] == [
            ("find_credential", True, ['search_path=""']),
            ("reset_email_verified", False, ['search_path=""']),
            ("set_updated_at", False, ['search_path=""']),
        ]

    async def test_C5_copy_gives_own_rows_and_takes_none(
        self, url: str, owner: Connection, victim: Victim
    ) -> None:
        assert victim.tasks
        before = await attacks.rows_of(owner, "alice")
        async with connected(url) as connection:
            copied = io.BytesIO()
            await connection.execute(begin("mallory"))
            await connection.copy_from_table("tasks", output=copied, columns=["user_id"])
            await connection.copy_from_query("SELECT user_id FROM tasks", output=copied)
            assert copied.getvalue().split() == [b"mallory"] * 4
            with pytest.raises(asyncpg.FeatureNotSupportedError):
                await connection.copy_records_to_table(
                    "tasks", records=[("alice", "planted")], columns=["user_id", "title"]
                )
        assert await attacks.rows_of(owner, "alice") == before


class TestOracles:
    async def test_D1_whether_an_email_is_verified_cannot_be_changed(self, db: Database) -> None:
        async with db.transaction("alice") as tx:
            for column in ("id", "email_verified", "created_at", "updated_at"):
                assert await refusal(tx, f"UPDATE users SET {column} = DEFAULT") == "42501"

    async def test_D2_chosen_id_is_refused_whether_or_not_it_exists(
        self, db: Database, owner: Connection, victim: Victim
    ) -> None:
        await attacks.id_cannot_be_chosen(db, owner, victim)

    async def test_D3_task_of_another_user_is_refused_whether_or_not_they_exist(
        self, db: Database
    ) -> None:
        async with db.transaction("bob") as tx:
            for user_id in ("alice", "missing"):
                sql = f"INSERT INTO tasks (user_id, title) VALUES ('{user_id}', 'probe')"
                assert await refusal(tx, sql) == "42501"

    async def test_D1_D2_key_of_another_user_is_refused_whether_or_not_it_exists(
        self, db: Database, owner: Connection, victim: Victim
    ) -> None:
        await attacks.keys_cannot_be_planted(db, owner, victim)

    async def test_D2_refusal_of_a_key_does_not_wait_for_a_call_under_way(
        self, db: Database
    ) -> None:
        async with db.transaction("alice") as hers:
            await hers.tasks.create("alice", SECRET, idempotency_key=KEY)
            async with asyncio.timeout(30), db.transaction("bob") as tx:
                assert await refusal(tx, key_for("alice", KEY)) == "42501"
                await tx.tasks.create("bob", "his", idempotency_key=KEY)
        assert await db.tasks.count("bob") == 1

    async def test_keys_cannot_be_deleted(
        self, db: Database, owner: Connection, victim: Victim
    ) -> None:
        await attacks.keys_cannot_be_deleted(db, owner, victim)

    async def test_D3_key_that_was_given_foreign_ids_shows_no_task(
        self, db: Database, owner: Connection, victim: Victim
    ) -> None:
        asked = attacks.new_of(victim.tasks)
        await db.tasks.create_many("mallory", asked, idempotency_key="probe")
        fingerprint = await owner.fetchval(
            "SELECT fingerprint FROM idempotency_keys WHERE key = 'probe'"
        )
        async with db.transaction("mallory") as tx:
            await rows(
                tx,
                "INSERT INTO idempotency_keys (user_id, key, fingerprint, task_ids) VALUES"
                f" ('mallory', 'forged', '{fingerprint}', ARRAY{victim.ids}) RETURNING key",
            )
        await owner.execute("UPDATE tasks SET title = 'private' WHERE user_id = 'alice'")
        forged = await db.tasks.create_many("mallory", asked, idempotency_key="forged")
        # mallory's own arguments, with ids that she chose.
        assert attacks.new_of(forged[::-1]) == asked
        for task in forged:
            with pytest.raises(TaskNotFoundError):
                await db.tasks.get("mallory", task.id)

    async def test_D4_errors_carry_no_stored_value(self, db: Database) -> None:
        async with db.transaction("bob") as tx:
            await tx.tasks.create("bob", "his")
            for sql in (
                "INSERT INTO users (id, email) VALUES ('bob', 'alice@example.org')",
                "INSERT INTO tasks (user_id, title) VALUES ('alice', 'mark')",
                "INSERT INTO tasks (user_id, title) VALUES ('bob', ' ')",
                "UPDATE tasks SET title = NULL",
                key_for("alice", "mark"),
                f"{key_for('bob', 'mark')}, ('bob', 'mark', repeat('0', 64), '{{}}')",
            ):
                with pytest.raises(TodoDBError) as refused:
                    async with tx.savepoint():
                        await tx.execute(text(sql))
                assert "alice@example.org" not in f"{refused.value!r}"
                assert refused.value.__cause__ is None
                assert getattr(refused.value.__context__, "detail", None) is None, sql
        with pytest.raises(EmailTakenError) as caught:
            await db.users.ensure("mallory", email="alice@example.org", name="mark")
        error = caught.value
        assert "alice" not in f"{error!s}{error!r}{error.args}"
        assert error.__cause__ is None
        assert error.__context__ is None

    async def test_D5_foreign_and_missing_task_get_the_same_answer(
        self, url: str, db: Database, victim: Victim
    ) -> None:
        missing = 10**6
        with pytest.raises(TaskNotFoundError):
            await db.tasks.get("alice", missing)
        async with Database.from_url(url, pool_size=1, max_overflow=0) as one_connection:
            tasks = one_connection.tasks
            expected = victim.tasks[0].updated_at
            calls: list[Callable[[int], Awaitable[object]]] = [
                lambda task_id: tasks.get("mallory", task_id),
                lambda task_id: tasks.toggle("mallory", task_id),
                lambda task_id: tasks.delete("mallory", task_id),
                lambda task_id: tasks.update("mallory", task_id),
                lambda task_id: tasks.update("mallory", task_id, title="taken"),
                lambda task_id: tasks.update(
                    "mallory", task_id, title="taken", expected_updated_at=expected
                ),
            ]
            async with pooled_connection(one_connection) as driver:
                pass
            for call in calls:
                answers = []
                for task_id in (victim.ids[0], missing):
                    async with sent(driver) as queries:
                        with pytest.raises(TaskNotFoundError) as caught:
                            await call(task_id)
                    answers.append(
                        (type(caught.value), str(caught.value), caught.value.args, queries)
                    )
                assert answers[0] == answers[1]
                assert len(answers[0][3]) == 3

    async def test_D8_statistics_are_hidden(
        self, db: Database, owner: Connection, victim: Victim
    ) -> None:
        assert victim.tasks
        await owner.execute("ANALYZE users, tasks, idempotency_keys")
        statistics = f"SELECT count(*) FROM pg_stats WHERE tablename IN {TABLES}"
        assert await owner.fetchval(statistics) > 0
        async with db.transaction("mallory") as tx:
            assert await rows(tx, statistics) == [0]
            assert await refusal(tx, "SELECT count(*) FROM pg_statistic") == "42501"

    async def test_D9_leaky_function_is_not_called_for_hidden_rows(
        self, db: Database, owner: Connection, victim: Victim
    ) -> None:
        # Cheaper than the policy, so that the planner would prefer to call it first.
        await owner.execute(f"""
            CREATE FUNCTION tell(title text) RETURNS boolean LANGUAGE plpgsql COST 0.000001 AS $$
            BEGIN
                IF title LIKE '{SECRET}%' THEN RAISE EXCEPTION 'leaked'; END IF;
                RETURN true;
            END $$
        """)
        with pytest.raises(asyncpg.RaiseError):
            await owner.fetch("SELECT FROM tasks WHERE tell(title)")
        async with db.transaction("mallory") as tx:
            assert len(await rows(tx, "SELECT id FROM tasks WHERE tell(title)")) == 2
            divided = f"SELECT id FROM tasks WHERE 1 / (id - {victim.ids[0]}) IS NOT NULL"
            assert len(await rows(tx, divided)) == 2

    async def test_D11_write_that_reaches_no_row_says_so(
        self, db: Database, victim: Victim
    ) -> None:
        assert await db.tasks.update_many("mallory", victim.ids, completed=True) == 0
        assert await db.tasks.delete_many("mallory", victim.ids) == 0
        with pytest.raises(TaskNotFoundError):
            await db.tasks.delete("mallory", victim.ids[0])

    async def test_D12_activity_of_others_is_hidden(self, db: Database) -> None:
        activity = """
            SELECT query FROM pg_stat_activity
            WHERE pid <> pg_backend_pid() AND query <> '<insufficient privilege>'
        """
        async with db.transaction("alice") as hers, db.transaction("mallory") as tx:
            await hers.tasks.create("alice", SECRET)
            assert await rows(tx, activity) == []
            assert await rows(tx, "SELECT current_setting('application_name')") == ["todo_db"]


async def _is_refused(db: Database, sql: str) -> None:
    async with db.transaction("bob") as tx:
        with pytest.raises(TransactionError):
            await tx.execute(text(sql))
        assert await rows(tx, "SELECT current_setting('todo_db.user_id')") == ["bob"], sql
        assert await rows(tx, "SELECT current_user") == ["todo_app"], sql


class TestPool:
    @pytest_asyncio.fixture
    async def one_connection(self, url: str) -> AsyncGenerator[Database]:
        """A Database whose users share one connection."""
        async with Database.from_url(url, pool_size=1, max_overflow=0) as database:
            for user_id in ("alice", "bob"):
                await database.users.create(user_id, email=f"{user_id}@example.org", name=user_id)
            yield database

    def test_E1_user_id_ends_with_its_transaction(self) -> None:
        for command in begin("alice").split(";"):
            assert command.startswith(("BEGIN ", "SET LOCAL ", "SELECT pg_catalog.set_config("))
            assert "set_config" not in command or command.endswith(", true)")

    async def test_E1_E2_transaction_leaves_nothing_on_its_connection(
        self, one_connection: Database, owner: Connection
    ) -> None:
        await attacks.nothing_stays_on_a_connection(one_connection, owner, Victim([], {}))

    async def test_E1_next_user_of_a_connection_sees_only_their_own(
        self, one_connection: Database, owner: Connection
    ) -> None:
        victim = await attacks.plant_victim(one_connection)
        for user_id, tasks in (("alice", 4), ("mallory", 2), ("bob", 0), ("alice", 4)):
            async with one_connection.transaction(user_id) as tx:
                assert await rows(tx, "SELECT user_id FROM tasks") == [user_id] * tasks
        await attacks.repositories_do_not_cross(one_connection, owner, victim)

    async def test_E1_session_setting_of_a_caller_is_overridden(
        self, one_connection: Database
    ) -> None:
        await one_connection.tasks.create("alice", "hers")
        async with one_connection.transaction("bob") as tx:
            await rows(tx, "SELECT set_config('todo_db.user_id', 'alice', false)")
        async with one_connection.transaction("bob") as tx:
            assert await rows(tx, "SELECT user_id FROM tasks") == []

    async def test_E4_caller_cannot_end_the_transaction(self, one_connection: Database) -> None:
        for sql in (
            "COMMIT",
            " end",
            "ROLLBACK",
            "\nAbort",
            "BEGIN",
            "START TRANSACTION",
            "SAVEPOINT a",
            "RELEASE a",
            "PREPARE TRANSACTION 'a'",
            "RESET ROLE",
            "SET ROLE todo_owner",
            "SET LOCAL todo_db.user_id = 'alice'",
        ):
            await _is_refused(one_connection, sql)

    async def test_E4_caller_cannot_end_the_transaction_behind_a_comment(
        self, one_connection: Database
    ) -> None:
        for sql in ("/* why */ COMMIT", "-- why\nRESET ROLE", "; COMMIT", "/* why */ SELECT 1"):
            await _is_refused(one_connection, sql)

    async def test_E4_nothing_runs_after_a_commit_behind_its_back(
        self, one_connection: Database, owner: Connection
    ) -> None:
        await attacks.nothing_runs_after_a_commit(one_connection, owner, Victim([], {}))

    async def test_E5_rolling_back_to_a_savepoint_restores_the_user(
        self, db: Database, victim: Victim
    ) -> None:
        assert victim.tasks

        async def become_alice(tx: Transaction) -> None:
            async with tx.savepoint():
                await rows(tx, "SELECT set_config('todo_db.user_id', 'alice', true)")
                raise ZeroDivisionError

        async with db.transaction("mallory") as tx:
            with pytest.raises(ZeroDivisionError):
                await become_alice(tx)
            assert set(await rows(tx, "SELECT user_id FROM tasks")) == {"mallory"}
            assert await rows(tx, "SELECT current_user") == ["todo_app"]

    async def test_E7_cancelled_transaction_leaves_nothing_to_the_next_user(
        self, one_connection: Database, owner: Connection
    ) -> None:
        await attacks.cancelled_transactions_leave_nothing(
            one_connection, owner, await attacks.plant_victim(one_connection)
        )

    async def test_E8_retry_runs_as_the_same_user(
        self, one_connection: Database, owner: Connection, superuser: Connection
    ) -> None:
        tries: list[list[object]] = []

        async def work(tx: Transaction) -> None:
            tries.append(await rows(tx, "SELECT current_setting('todo_db.user_id')"))
            if len(tries) == 1:
                await superuser.execute(
                    "SELECT pg_terminate_backend($1, 5000)", tx._gate.driver.get_server_pid()
                )
            await tx.tasks.create("bob", "once")

        async with asyncio.timeout(30):
            await asyncio.gather(
                one_connection.run("bob", work), one_connection.tasks.create("alice", "hers")
            )
        assert tries == [["bob"], ["bob"]]
        stored = await owner.fetch("SELECT user_id, title FROM tasks ORDER BY user_id")
        assert [tuple(row) for row in stored] == [("alice", "hers"), ("bob", "once")]

    async def test_answer_of_commit_is_read(
        self, one_connection: Database, owner: Connection
    ) -> None:
        await attacks.answer_of_commit_is_read(one_connection, owner, Victim([], {}))

    async def test_dirty_connection_is_not_acquired(
        self, one_connection: Database, owner: Connection
    ) -> None:
        await attacks.dirty_connection_is_not_acquired(one_connection, owner, Victim([], {}))

    async def test_dirty_connection_is_not_kept(
        self, one_connection: Database, owner: Connection
    ) -> None:
        victim = await attacks.plant_victim(one_connection)
        await attacks.dirty_connection_is_not_kept(one_connection, owner, victim)


class TestUserId:
    async def test_E10_invalid_id_is_refused_before_any_sql(self, database: Database) -> None:
        await database.users.create("alice", email="alice@example.org", name="Alice")
        victim = await attacks.plant_victim(database)
        unfit: list[Any] = ["", " ", None, b"alice", 1, "a\x00", "\ud800", "x" * 256, "\u200b"]
        async with pooled_connection(database) as driver:
            pass
        async with sent(driver) as queries:
            for user_id in unfit:
                for tried in attacks.ATTACKS:
                    with pytest.raises(InvalidInputError) as caught:
                        await tried.run(database, user_id, victim)
                    assert caught.value.field == "user_id"
                with pytest.raises(InvalidInputError):
                    await database.transaction(user_id).__aenter__()
        assert queries == []
        async with sent(driver) as queries:
            assert await database.tasks.count("alice") == 4
        assert len(queries) == 3

    async def test_E10_hostile_id_is_an_id_like_any_other(
        self, db: Database, owner: Connection
    ) -> None:
        await db.tasks.create("alice", SECRET)
        before = await attacks.rows_of(owner, "alice")
        hostile = [
            "alice ",
            "Alice",
            "\uff41lice",
            "o'b; DROP TABLE tasks; --",
            "', true); RESET ROLE; SELECT ('",
            "\\'; COMMIT; --",
            "$$; ROLLBACK; $$",
            "%(user_id)s %s :user_id $1 {user_id}",
            "alice', 'hex'), 'UTF8'), true); --",
            "\\x616c696365",
            "todo_app",
            "NULL",
            "\U0001f600" * 255,
            "a\r\nb\tc",
        ]
        for number, user_id in enumerate(hostile):
            await db.users.create(user_id, email=f"{number}@example.org", name=user_id)
            task = await db.tasks.create(user_id, user_id[:200])
            assert await db.tasks.get(user_id, task.id) == task
            assert [task.user_id for task in (await db.tasks.list(user_id)).items] == [user_id]
            async with db.transaction(user_id) as tx:
                assert await rows(tx, "SELECT user_id FROM tasks") == [user_id]
                assert await rows(tx, "SELECT id FROM users") == [user_id]
            assert await db.tasks.delete_many(user_id, [task.id]) == 1
            await db.users.delete(user_id)
        assert await attacks.rows_of(owner, "alice") == before


class TestRepositories:
    """Every public method, with mallory's user id and her knowledge of alice's tasks."""

    async def test_do_not_cross_on_a_database(
        self, db: Database, owner: Connection, victim: Victim
    ) -> None:
        await attacks.repositories_do_not_cross(db, owner, victim)

    async def test_do_not_cross_in_a_transaction(
        self, db: Database, owner: Connection, victim: Victim
    ) -> None:
        before = await attacks.rows_of(owner, "alice")
        async with db.transaction("mallory") as tx:
            await attacks.attack(tx, victim)
        assert await attacks.rows_of(owner, "alice") == before

    async def test_refuse_another_user_in_a_transaction(
        self, db: Database, owner: Connection, victim: Victim
    ) -> None:
        await attacks.other_user_is_refused(db, owner, victim)

    def test_are_attacked_in_every_public_method(self, database: Database) -> None:
        public = {
            f"{subject}.{name}"
            for subject in ("tasks", "users")
            for name in dir(getattr(database, subject))
            if not name.startswith("_")
        }
        assert {tried.method for tried in attacks.ATTACKS} == public


class TestEitherDefenceAlone:
    async def test_statements_hold_without_row_security(
        self, db: Database, owner: Connection, victim: Victim
    ) -> None:
        await attacks.disable_row_security(owner)
        async with db.transaction("mallory") as tx:
            assert "alice" in await rows(tx, "SELECT user_id FROM tasks")
            assert KEY in await rows(tx, "SELECT key FROM idempotency_keys")
        await attacks.repositories_do_not_cross(db, owner, victim)

    async def test_row_security_holds_without_predicates(
        self, db: Database, owner: Connection, victim: Victim, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for statement in SHAPES.values():
            if not statement.in_transaction.sql.startswith("INSERT"):
                assert without_owner(statement.in_transaction.sql) != statement.in_transaction.sql
                compiled = statement.in_transaction
                forgetful = compiled._replace(sql=without_owner(compiled.sql))
                monkeypatch.setitem(statement.__dict__, "in_transaction", forgetful)
        await attacks.repositories_do_not_cross(db, owner, victim)
        async with db.transaction("alice") as tx:
            assert await count(tx, "DELETE FROM tasks") == 4
