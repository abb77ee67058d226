"""Compares everything that Alembic does not compare with a live database."""

from collections.abc import AsyncGenerator

import asyncpg
import pytest
import pytest_asyncio
from catalogue import read
from driver import Connection

from todo_db.doctor.catalogue import EXPECTED, QUERIES, Catalogue, differences
from todo_db.embedded import LOGIN, EmbeddedPostgres
from todo_db.migrations import upgrade

DATABASE = "todo_catalogue"


@pytest_asyncio.fixture(scope="module")
async def superuser(todo_postgres: EmbeddedPostgres) -> AsyncGenerator[Connection]:
    todo_postgres.create_database(DATABASE)
    connection = await asyncpg.connect(todo_postgres.url(user="postgres", database=DATABASE))
    # The default grants of CREATE DATABASE, so that the migrations have something to revoke.
    await connection.execute(f"GRANT TEMPORARY ON DATABASE {DATABASE} TO PUBLIC")
    await upgrade(todo_postgres.url(database=DATABASE))
    yield connection
    await connection.close()
    todo_postgres.drop_database(DATABASE)


async def with_weakness(connection: Connection, plant: str) -> Catalogue:
    """Return the catalogue after a script; roll the script back."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(plant)
        return await read(connection)
    finally:
        await transaction.rollback()


async def changed_by(connection: Connection, plant: str) -> set[str]:
    """Return the sections of the catalogue that a script changes."""
    found = await with_weakness(connection, plant)
    return {section for section in found if found[section] != EXPECTED[section]}


async def findings(connection: Connection, plant: str) -> set[tuple[str, str]]:
    """Return code and section of the doctor's findings after a script."""
    found = differences(await with_weakness(connection, plant))
    return {(code, subject.partition(":")[0]) for code, subject in found}


class TestMigratedDatabase:
    async def test_is_exactly_what_is_expected(self, superuser: Connection) -> None:
        assert await read(superuser) == EXPECTED

    def test_is_compared_in_every_section(self) -> None:
        assert QUERIES.keys() == EXPECTED.keys()

    async def test_copy_of_it_is_the_same(self, owner: Connection) -> None:
        assert await read(owner) == EXPECTED

    async def test_is_the_same_however_a_login_wants_it_printed(self, owner: Connection) -> None:
        await owner.execute("""
            SET search_path = ''; SET quote_all_identifiers = on; SET DateStyle = 'German';
            SET TimeZone = 'Asia/Kathmandu'; SET standard_conforming_strings = off;
        """)
        assert await read(owner) == EXPECTED


class TestRead:
    """Creates forbidden objects: the tests above would accept what the queries do not see."""

    @pytest.mark.parametrize(
        ("section", "plant"),
        [
            # The rule of a policy and its roles (B1, B2, B3)
            ("policies", "CREATE POLICY extra ON tasks USING (true)"),
            ("policies", "CREATE POLICY extra ON tasks FOR SELECT TO todo_app USING (true)"),
            ("policies", "DROP POLICY tasks_own ON tasks"),
            ("policies", "DROP POLICY tasks_fence ON tasks"),
            ("policies", "DROP POLICY users_own ON users"),
            ("policies", "DROP POLICY users_fence ON users"),
            ("policies", "DROP POLICY idempotency_keys_fence ON idempotency_keys"),
            ("policies", "DROP POLICY sessions_auth ON sessions"),
            ("policies", "ALTER POLICY users_auth ON users TO todo_auth, todo_app"),
            ("policies", "CREATE POLICY extra ON jwks TO todo_app USING (true)"),
            ("policies", "ALTER POLICY tasks_fence ON tasks TO PUBLIC"),
            ("policies", "ALTER POLICY tasks_own ON tasks WITH CHECK (true)"),
            (
                "policies",
                """ALTER POLICY tasks_own ON tasks USING (user_id =
                (SELECT current_setting('todo_db.user_id', true)))""",
            ),
            (
                "policies",
                """DROP POLICY tasks_fence ON tasks; CREATE POLICY tasks_fence ON tasks TO todo_app
                USING (user_id = nullif((SELECT current_setting('todo_db.user_id', true)), ''))
                WITH CHECK
                    (user_id = nullif((SELECT current_setting('todo_db.user_id', true)), ''))""",
            ),
            # A1: row security
            ("relations", "ALTER TABLE tasks DISABLE ROW LEVEL SECURITY"),
            ("relations", "ALTER TABLE tasks NO FORCE ROW LEVEL SECURITY"),
            ("relations", "ALTER TABLE users DISABLE ROW LEVEL SECURITY"),
            ("relations", "ALTER TABLE users NO FORCE ROW LEVEL SECURITY"),
            ("relations", "ALTER TABLE sessions DISABLE ROW LEVEL SECURITY"),
            ("relations", "ALTER TABLE idempotency_keys NO FORCE ROW LEVEL SECURITY"),
            # C: objects that change whose rights apply
            ("relations", "CREATE TABLE notes (id bigint)"),
            ("relations", "CREATE TABLE child () INHERITS (tasks)"),
            ("relations", "CREATE VIEW everything AS SELECT * FROM tasks"),
            ("relations", "CREATE MATERIALIZED VIEW everything AS SELECT * FROM tasks"),
            ("relations", "ALTER TABLE tasks SET UNLOGGED"),
            ("schemas", "CREATE SCHEMA hidden"),
            ("owners", "ALTER TABLE tasks OWNER TO postgres"),
            ("owners", "ALTER TABLE tasks OWNER TO todo_app"),
            ("owners", "ALTER FUNCTION set_updated_at() OWNER TO postgres"),
            ("rules", "CREATE RULE gone AS ON DELETE TO tasks DO INSTEAD NOTHING"),
            # Triggers and functions
            ("triggers", "DROP TRIGGER update_tasks_updated_at ON tasks"),
            ("triggers", "ALTER TABLE tasks DISABLE TRIGGER update_tasks_updated_at"),
            ("triggers", "ALTER TABLE users DISABLE TRIGGER update_users_updated_at"),
            ("triggers", "ALTER TABLE users ENABLE REPLICA TRIGGER update_users_updated_at"),
            ("triggers", "ALTER TABLE users DISABLE TRIGGER ALL"),
            ("triggers", "ALTER TABLE idempotency_keys DISABLE TRIGGER ALL"),
            (
                "triggers",
                """CREATE TRIGGER spy AFTER INSERT ON tasks
                FOR EACH ROW EXECUTE FUNCTION set_updated_at()""",
            ),
            ("functions", "ALTER FUNCTION set_updated_at() RESET search_path"),
            ("functions", "ALTER FUNCTION set_updated_at() SECURITY DEFINER"),
            ("functions", "ALTER FUNCTION set_updated_at() IMMUTABLE"),
            ("functions", "ALTER FUNCTION find_credential(text, text) RESET search_path"),
            ("functions", "ALTER FUNCTION find_credential(text, text) SECURITY INVOKER"),
            ("functions", "ALTER FUNCTION find_credential(text, text) VOLATILE"),
            (
                "functions",
                """CREATE FUNCTION find_credential(text) RETURNS text LANGUAGE sql
                RETURN (SELECT private_key FROM jwks LIMIT 1)""",
            ),
            ("functions", "CREATE FUNCTION everything() RETURNS int LANGUAGE sql RETURN 1"),
            (
                "functions",
                "CREATE AGGREGATE total(int) (sfunc = int4pl, stype = int, initcond = '0')",
            ),
            # A7 A8 D2: grants
            ("grants", "GRANT TRUNCATE ON tasks TO todo_app"),
            ("grants", "GRANT REFERENCES, TRIGGER ON users TO todo_app"),
            ("grants", "GRANT INSERT ON tasks TO todo_app"),
            ("grants", "GRANT INSERT (id) ON tasks TO todo_app"),
            ("grants", "GRANT UPDATE (user_id) ON tasks TO todo_app"),
            ("grants", "GRANT UPDATE (updated_at) ON tasks TO todo_app"),
            ("grants", "GRANT UPDATE (email_verified) ON users TO todo_app"),
            ("grants", "GRANT INSERT (email_verified) ON users TO todo_app"),
            ("grants", "GRANT SELECT ON tasks TO todo_app WITH GRANT OPTION"),
            ("grants", "GRANT SELECT ON tasks TO PUBLIC"),
            ("grants", "GRANT SELECT (title) ON tasks TO PUBLIC"),
            ("grants", f"GRANT SELECT ON tasks TO {LOGIN}"),
            ("grants", "REVOKE DELETE ON tasks FROM todo_app"),
            ("grants", "REVOKE UPDATE (completed) ON tasks FROM todo_app"),
            ("grants", "GRANT USAGE ON SEQUENCE tasks_id_seq TO todo_app"),
            ("grants", "GRANT INSERT ON todo_db_version TO todo_app"),
            ("grants", "GRANT UPDATE (fingerprint) ON idempotency_keys TO todo_app"),
            ("grants", "GRANT DELETE ON idempotency_keys TO todo_app"),
            ("grants", "GRANT SELECT (token) ON sessions TO todo_app"),
            ("grants", "GRANT SELECT ON tasks TO todo_auth"),
            ("grants", "GRANT TRUNCATE ON sessions TO todo_auth"),
            ("grants", "REVOKE DELETE ON verifications FROM todo_auth"),
            ("grants", "GRANT EXECUTE ON FUNCTION find_credential(text, text) TO PUBLIC"),
            ("grants", "REVOKE EXECUTE ON FUNCTION find_credential(text, text) FROM todo_app"),
            ("grants", "GRANT CREATE ON SCHEMA public TO todo_app"),
            ("grants", "GRANT CREATE ON SCHEMA public TO PUBLIC"),
            ("grants", f"GRANT TEMPORARY ON DATABASE {DATABASE} TO PUBLIC"),
            ("grants", f"GRANT TEMPORARY ON DATABASE {DATABASE} TO todo_app"),
            ("grants", f"GRANT CREATE ON DATABASE {DATABASE} TO todo_app"),
            ("default privileges", "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO todo_app"),
            # A2 A4: the role
            ("role", "ALTER ROLE todo_app BYPASSRLS"),
            ("role", "ALTER ROLE todo_app SUPERUSER"),
            ("role", "ALTER ROLE todo_app LOGIN"),
            ("role", "ALTER ROLE todo_app CREATEROLE CREATEDB"),
            ("role", "ALTER ROLE todo_app REPLICATION"),
            ("role", "GRANT pg_read_all_data TO todo_app"),
            ("role", "CREATE ROLE boss; GRANT boss TO todo_app"),
            ("role", "ALTER ROLE todo_auth BYPASSRLS"),
            ("role", "GRANT todo_app TO todo_auth"),
            ("settings", "ALTER ROLE todo_app SET search_path = hidden, public"),
            ("settings", "ALTER TABLE tasks SET (fillfactor = 50)"),
            ("settings", f"ALTER DATABASE {DATABASE} SET todo_db.user_id = 'alice'"),
            ("settings", f"ALTER DATABASE {DATABASE} SET synchronous_commit = off"),
            # Keys, checks, identity and indexes
            ("columns", "ALTER TABLE tasks ALTER id SET GENERATED BY DEFAULT"),
            ("columns", "ALTER TABLE tasks ALTER user_id DROP NOT NULL"),
            ("columns", "ALTER TABLE tasks ALTER user_id SET DEFAULT 'alice'"),
            ("columns", "ALTER TABLE tasks ALTER created_at DROP DEFAULT"),
            ("columns", 'ALTER TABLE users ALTER email TYPE text COLLATE "C"'),
            (
                "columns",
                "ALTER TABLE users ADD shout text GENERATED ALWAYS AS (upper(name)) STORED",
            ),
            ("sequences", "ALTER SEQUENCE tasks_id_seq CYCLE"),
            ("sequences", "ALTER SEQUENCE tasks_id_seq CACHE 50"),
            ("sequences", "ALTER SEQUENCE tasks_id_seq INCREMENT 2"),
            ("constraints", "ALTER TABLE tasks DROP CONSTRAINT ck_tasks_title_not_blank"),
            ("constraints", "ALTER TABLE tasks DROP CONSTRAINT fk_tasks_user_id_users"),
            (
                "constraints",
                "ALTER TABLE users RENAME CONSTRAINT uq_users_email TO users_email_key",
            ),
            (
                "constraints",
                """ALTER TABLE tasks DROP CONSTRAINT fk_tasks_user_id_users,
                ADD CONSTRAINT fk_tasks_user_id_users
                FOREIGN KEY (user_id) REFERENCES users ON DELETE CASCADE NOT VALID""",
            ),
            (
                "constraints",
                """ALTER TABLE tasks DROP CONSTRAINT fk_tasks_user_id_users,
                ADD CONSTRAINT fk_tasks_user_id_users FOREIGN KEY (user_id) REFERENCES users""",
            ),
            ("constraints", "ALTER TABLE sessions DROP CONSTRAINT uq_sessions_token"),
            ("constraints", "ALTER TABLE idempotency_keys DROP CONSTRAINT pk_idempotency_keys"),
            ("indexes", "DROP INDEX idx_tasks_user_id"),
            ("indexes", "DROP INDEX ix_sessions_user_id"),
            ("indexes", "CREATE INDEX extra ON tasks (title)"),
            (
                "indexes",
                """UPDATE pg_index SET indisvalid = false
                WHERE indexrelid = 'idx_tasks_user_id'::regclass""",
            ),
        ],
    )
    async def test_sees(self, superuser: Connection, section: str, plant: str) -> None:
        assert section in await changed_by(superuser, plant)

    async def test_ignores_what_is_not_part_of_it(self, superuser: Connection) -> None:
        rows = """INSERT INTO users (id, email) VALUES ('alice', 'alice@example.org');
            INSERT INTO tasks (user_id, title) VALUES ('alice', 'Buy milk')"""
        assert await changed_by(superuser, rows) == set()

    async def test_does_not_take_a_table_of_another_schema_for_ours(
        self, superuser: Connection
    ) -> None:
        found = await with_weakness(
            superuser,
            """CREATE SCHEMA other; CREATE TABLE other.tasks (id bigint CHECK (id > 0));
            CREATE POLICY open ON other.tasks USING (true); GRANT ALL ON other.tasks TO PUBLIC""",
        )
        for section in ("columns", "constraints", "policies", "grants"):
            more = found[section] - EXPECTED[section]
            assert more
            assert all("other.tasks" in line for line in more)

    async def test_distinguishes_the_triggers_of_foreign_keys(self, superuser: Connection) -> None:
        found = await with_weakness(
            superuser,
            """CREATE TABLE notes (user_id text REFERENCES users ON DELETE CASCADE);
            ALTER TABLE tasks DROP CONSTRAINT fk_tasks_user_id_users""",
        )
        lost = EXPECTED["triggers"] - found["triggers"]
        assert len(lost) == 4
        assert all(line.endswith(" of fk_tasks_user_id_users") for line in lost)


class TestDifferences:
    """The doctor's findings for differences of the catalogue."""

    @pytest.mark.parametrize(
        ("plant", "expected"),
        [
            ("DROP TRIGGER update_tasks_updated_at ON tasks", {("missing", "triggers")}),
            ("ALTER TABLE sessions DISABLE ROW LEVEL SECURITY", {("missing", "relations")}),
            ("DROP INDEX ix_verifications_identifier", {("missing", "indexes")}),
            ("REVOKE SELECT ON jwks FROM todo_auth", {("missing", "grants")}),
            (
                "ALTER TABLE tasks DISABLE TRIGGER update_tasks_updated_at",
                {("missing", "triggers"), ("extra", "triggers")},
            ),
            # For the foreign keys' internal triggers only a missing one is a finding.
            ("ALTER TABLE sessions DISABLE TRIGGER ALL", {("missing", "triggers")}),
            (
                "ALTER POLICY users_auth ON users USING (id = 'x')",
                {("missing", "policies"), ("extra", "policies")},
            ),
            ("ALTER FUNCTION find_credential(text, text) VOLATILE", {("missing", "functions")}),
            ("CREATE POLICY extra ON verifications USING (true)", {("extra", "policies")}),
            ("CREATE RULE gone AS ON DELETE TO tasks DO INSTEAD NOTHING", {("extra", "rules")}),
            (
                """CREATE TRIGGER spy AFTER INSERT ON sessions
                FOR EACH ROW EXECUTE FUNCTION set_updated_at()""",
                {("extra", "triggers")},
            ),
            ("ALTER TABLE users ADD CHECK (name <> ' UNIQUE ')", {("extra", "constraints")}),
            ("ALTER TABLE tasks ADD UNIQUE (title)", {("extra", "constraints")}),
            ("GRANT DELETE ON idempotency_keys TO todo_app", {("extra", "grants")}),
            ("GRANT SELECT (title) ON tasks TO todo_auth", {("extra", "grants")}),
            (
                "GRANT SELECT ON tasks TO todo_app WITH GRANT OPTION",
                {("missing", "grants"), ("extra", "grants")},
            ),
            ("GRANT SELECT ON jwks TO PUBLIC", {("extra", "grants")}),
            (
                "GRANT EXECUTE ON FUNCTION find_credential(text, text) TO PUBLIC",
                {("extra", "grants")},
            ),
            ("GRANT SELECT ON SEQUENCE tasks_id_seq TO todo_auth", {("extra", "grants")}),
            ("GRANT CREATE ON SCHEMA public TO todo_auth", {("extra", "grants")}),
            (f"GRANT TEMPORARY ON DATABASE {DATABASE} TO todo_auth", {("extra", "grants")}),
            ("ALTER ROLE todo_app CREATEDB", {("missing", "role"), ("extra", "role")}),
            ("GRANT pg_read_all_data TO todo_auth", {("extra", "role")}),
        ],
    )
    async def test_say(
        self, superuser: Connection, plant: str, expected: set[tuple[str, str]]
    ) -> None:
        assert await findings(superuser, plant) == {
            (f"catalogue-{kind}", section) for kind, section in expected
        }

    @pytest.mark.parametrize(
        "plant",
        [
            # Better Auth's plugins
            "ALTER TABLE users ADD banned boolean, ADD phone text UNIQUE",
            "ALTER TABLE sessions ADD impersonated_by text",
            """CREATE TABLE passkeys (id text PRIMARY KEY,
            user_id text NOT NULL REFERENCES users ON DELETE CASCADE)""",
            # Objects of the owner
            "CREATE INDEX extra ON tasks (title)",
            "ALTER TABLE tasks SET (fillfactor = 50)",
            "ALTER TABLE tasks ENABLE ALWAYS TRIGGER update_tasks_updated_at",
            "CREATE ROLE reporter; GRANT SELECT ON tasks TO reporter",
            """CREATE SCHEMA other; CREATE TABLE other.tasks (id bigint CHECK (id > 0));
            CREATE POLICY open ON other.tasks USING (true); GRANT ALL ON other.tasks TO PUBLIC;
            CREATE RULE gone AS ON DELETE TO other.tasks DO INSTEAD NOTHING;
            CREATE TRIGGER spy AFTER INSERT ON other.tasks
            FOR EACH ROW EXECUTE FUNCTION set_updated_at()""",
            "CREATE VIEW everything AS SELECT * FROM tasks",
            # Stricter than necessary
            f"REVOKE CONNECT ON DATABASE {DATABASE} FROM PUBLIC",
            "REVOKE USAGE ON SCHEMA public FROM PUBLIC",
            "REVOKE EXECUTE ON FUNCTION set_updated_at() FROM PUBLIC",
            # Better Auth may connect as the role itself
            "ALTER ROLE todo_auth LOGIN BYPASSRLS",
        ],
    )
    async def test_say_nothing_of(self, superuser: Connection, plant: str) -> None:
        assert await findings(superuser, plant) == set()

    def test_name_the_line(self) -> None:
        found = EXPECTED | {"indexes": set(), "rules": {"tasks CREATE RULE gone", "notes CREATE"}}
        assert set(differences(found)) == {
            ("catalogue-extra", "rules: tasks CREATE RULE gone"),
            *(("catalogue-missing", f"indexes: {line}") for line in EXPECTED["indexes"]),
        }
