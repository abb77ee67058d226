"""Compares everything that Alembic does not compare with a live database."""

from collections.abc import AsyncGenerator, Collection

import asyncpg
import pytest
import pytest_asyncio
from catalogue import read
from driver import Connection

from todo_db.doctor.catalogue import EXPECTED, OBJECTS, Catalogue, differences
from todo_db.embedded import EmbeddedPostgres
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


async def with_weakness(
    connection: Connection, plant: str, objects: Collection[str] | None = None
) -> Catalogue:
    """Return the catalogue after a script; roll the script back."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(plant)
        return await read(connection, objects)
    finally:
        await transaction.rollback()


async def findings(connection: Connection, plant: str) -> set[tuple[str, str]]:
    """Return code and first word of the doctor's findings after a script."""
    found = differences(await with_weakness(connection, plant, OBJECTS), ())
    return {(code, subject.partition(": ")[2].partition(" ")[0]) for code, subject in found}


class TestMigratedDatabase:
    async def test_is_exactly_what_is_expected(self, superuser: Connection) -> None:
        assert await read(superuser) == EXPECTED

    async def test_is_the_same_with_only_our_objects(self, superuser: Connection) -> None:
        assert await read(superuser, OBJECTS) == EXPECTED

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
        "plant",
        [
            "CREATE POLICY extra ON tasks USING (true)",
            "CREATE POLICY extra ON tasks FOR SELECT TO todo_app USING (true)",
            "DROP POLICY tasks_own ON tasks",
            "DROP POLICY tasks_fence ON tasks",
            "DROP POLICY users_own ON users",
            "DROP POLICY users_fence ON users",
            "DROP POLICY idempotency_keys_fence ON idempotency_keys",
            "DROP POLICY sessions_auth ON sessions",
            "ALTER POLICY users_auth ON users TO todo_auth, todo_app",
            "CREATE POLICY extra ON jwks TO todo_app USING (true)",
            "ALTER POLICY tasks_fence ON tasks TO PUBLIC",
            "ALTER POLICY tasks_own ON tasks WITH CHECK (true)",
            """ALTER POLICY tasks_own ON tasks USING (user_id =
                (SELECT current_setting('todo_db.user_id', true)))""",
            """DROP POLICY tasks_fence ON tasks; CREATE POLICY tasks_fence ON tasks TO todo_app
                USING (user_id = nullif((SELECT current_setting('todo_db.user_id', true)), ''))
                WITH CHECK
                    (user_id = nullif((SELECT current_setting('todo_db.user_id', true)), ''))""",
            "ALTER TABLE tasks DISABLE ROW LEVEL SECURITY",
            "ALTER TABLE tasks NO FORCE ROW LEVEL SECURITY",
            "ALTER TABLE users DISABLE ROW LEVEL SECURITY",
            "ALTER TABLE users NO FORCE ROW LEVEL SECURITY",
            "ALTER TABLE sessions DISABLE ROW LEVEL SECURITY",
            "ALTER TABLE idempotency_keys NO FORCE ROW LEVEL SECURITY",
            "CREATE TABLE notes (id bigint)",
            "CREATE TABLE child () INHERITS (tasks)",
            "CREATE VIEW everything AS SELECT * FROM tasks",
            "CREATE MATERIALIZED VIEW everything AS SELECT * FROM tasks",
            "ALTER TABLE tasks SET UNLOGGED",
            "DROP TRIGGER update_tasks_updated_at ON tasks",
            """CREATE TRIGGER spy AFTER INSERT ON tasks
                FOR EACH ROW EXECUTE FUNCTION set_updated_at()""",
            "DROP TRIGGER reset_users_email_verified ON users",
            "ALTER FUNCTION reset_email_verified() RESET search_path",
            "ALTER FUNCTION set_updated_at() RESET search_path",
            "ALTER FUNCTION set_updated_at() SECURITY DEFINER",
            "ALTER FUNCTION set_updated_at() IMMUTABLE",
            "ALTER FUNCTION find_credential(text, text) RESET search_path",
            "ALTER FUNCTION find_credential(text, text) SECURITY INVOKER",
            "ALTER FUNCTION find_credential(text, text) VOLATILE",
            """CREATE FUNCTION find_credential(text) RETURNS text LANGUAGE sql
                RETURN (SELECT private_key FROM jwks LIMIT 1)""",
            "CREATE FUNCTION everything() RETURNS int LANGUAGE sql RETURN 1",
            "CREATE AGGREGATE total(int) (sfunc = int4pl, stype = int, initcond = '0')",
            "GRANT TRUNCATE ON tasks TO todo_app",
            "GRANT REFERENCES, TRIGGER ON users TO todo_app",
            "GRANT INSERT ON tasks TO todo_app",
            "GRANT INSERT (id) ON tasks TO todo_app",
            "GRANT UPDATE (user_id) ON tasks TO todo_app",
            "GRANT UPDATE (updated_at) ON tasks TO todo_app",
            "GRANT UPDATE (email_verified) ON users TO todo_app",
            "GRANT INSERT (email_verified) ON users TO todo_app",
            "GRANT SELECT ON tasks TO todo_app WITH GRANT OPTION",
            "GRANT SELECT ON tasks TO PUBLIC",
            "GRANT SELECT (title) ON tasks TO PUBLIC",
            "REVOKE DELETE ON tasks FROM todo_app",
            "REVOKE UPDATE (completed) ON tasks FROM todo_app",
            "GRANT USAGE ON SEQUENCE tasks_id_seq TO todo_app",
            "GRANT INSERT ON todo_db_version TO todo_app",
            "GRANT UPDATE (fingerprint) ON idempotency_keys TO todo_app",
            "GRANT DELETE ON idempotency_keys TO todo_app",
            "GRANT SELECT (token) ON sessions TO todo_app",
            "GRANT SELECT ON tasks TO todo_auth",
            "GRANT TRUNCATE ON sessions TO todo_auth",
            "REVOKE DELETE ON verifications FROM todo_auth",
            "GRANT EXECUTE ON FUNCTION find_credential(text, text) TO PUBLIC",
            "REVOKE EXECUTE ON FUNCTION find_credential(text, text) FROM todo_app",
            "GRANT CREATE ON SCHEMA public TO todo_app",
            "GRANT CREATE ON SCHEMA public TO PUBLIC",
            f"GRANT TEMPORARY ON DATABASE {DATABASE} TO PUBLIC",
            f"GRANT TEMPORARY ON DATABASE {DATABASE} TO todo_app",
            f"GRANT CREATE ON DATABASE {DATABASE} TO todo_app",
            "ALTER ROLE todo_app BYPASSRLS",
            "ALTER ROLE todo_app SUPERUSER",
            "ALTER ROLE todo_app LOGIN",
            "ALTER ROLE todo_app CREATEROLE CREATEDB",
            "ALTER ROLE todo_app REPLICATION",
            "GRANT todo_app TO todo_auth",
            "ALTER TABLE tasks ALTER id SET GENERATED BY DEFAULT",
            "ALTER TABLE tasks ALTER user_id DROP NOT NULL",
            "ALTER TABLE tasks ALTER user_id SET DEFAULT 'alice'",
            "ALTER TABLE tasks ALTER created_at DROP DEFAULT",
            'ALTER TABLE users ALTER username TYPE text COLLATE "C"',
            "ALTER TABLE users ADD shout text GENERATED ALWAYS AS (upper(name)) STORED",
            "ALTER SEQUENCE tasks_id_seq CYCLE",
            "ALTER SEQUENCE tasks_id_seq CACHE 50",
            "ALTER SEQUENCE tasks_id_seq INCREMENT 2",
            "ALTER TABLE tasks DROP CONSTRAINT ck_tasks_title_not_blank",
            "ALTER TABLE tasks DROP CONSTRAINT fk_tasks_user_id_users",
            "ALTER TABLE users RENAME CONSTRAINT uq_users_email TO users_email_key",
            """ALTER TABLE tasks DROP CONSTRAINT fk_tasks_user_id_users,
                ADD CONSTRAINT fk_tasks_user_id_users
                FOREIGN KEY (user_id) REFERENCES users ON DELETE CASCADE NOT VALID""",
            """ALTER TABLE tasks DROP CONSTRAINT fk_tasks_user_id_users,
                ADD CONSTRAINT fk_tasks_user_id_users FOREIGN KEY (user_id) REFERENCES users""",
            "ALTER TABLE sessions DROP CONSTRAINT uq_sessions_token",
            "ALTER TABLE idempotency_keys DROP CONSTRAINT pk_idempotency_keys",
            "DROP INDEX idx_tasks_user_id",
            "DROP INDEX ix_sessions_user_id",
            "CREATE INDEX extra ON tasks (title)",
            """UPDATE pg_index SET indisvalid = false
                WHERE indexrelid = 'idx_tasks_user_id'::regclass""",
        ],
    )
    async def test_sees(self, superuser: Connection, plant: str) -> None:
        assert await with_weakness(superuser, plant) != EXPECTED

    async def test_ignores_what_is_not_part_of_it(self, superuser: Connection) -> None:
        rows = """INSERT INTO users (id, email) VALUES ('alice', 'alice@example.org');
            INSERT INTO tasks (user_id, title) VALUES ('alice', 'Buy milk')"""
        assert await with_weakness(superuser, rows) == EXPECTED

    async def test_does_not_take_a_table_of_another_schema_for_ours(
        self, superuser: Connection
    ) -> None:
        plant = """CREATE SCHEMA other; CREATE TABLE other.tasks (id bigint CHECK (id > 0));
            CREATE POLICY open ON other.tasks USING (true); GRANT ALL ON other.tasks TO PUBLIC"""
        more = await with_weakness(superuser, plant) - EXPECTED
        assert {line.partition(" ")[0] for line in more if "grant" not in line} == {"other.tasks:"}
        assert await with_weakness(superuser, plant, OBJECTS) == EXPECTED


class TestDifferences:
    """The doctor's findings for differences of the catalogue."""

    @pytest.mark.parametrize(
        ("plant", "expected"),
        [
            ("DROP TRIGGER update_tasks_updated_at ON tasks", {("missing", "trigger")}),
            ("ALTER TABLE sessions DISABLE ROW LEVEL SECURITY", {("missing", "table")}),
            ("DROP INDEX ix_verifications_identifier", {("missing", "index")}),
            ("REVOKE SELECT ON jwks FROM todo_auth", {("missing", "grant")}),
            (
                "ALTER POLICY users_auth ON users USING (id = 'x')",
                {("missing", "permissive"), ("extra", "permissive")},
            ),
            ("ALTER FUNCTION find_credential(text, text) VOLATILE", {("missing", "function")}),
            ("CREATE POLICY extra ON verifications USING (true)", {("extra", "permissive")}),
            ("CREATE POLICY extra ON jwks TO todo_app USING (true)", {("extra", "permissive")}),
            (
                "ALTER POLICY users_auth ON users TO todo_app, todo_auth",
                {("missing", "permissive"), ("extra", "permissive")},
            ),
            ("GRANT DELETE ON idempotency_keys TO todo_app", {("extra", "grant")}),
            ("GRANT SELECT (title) ON tasks TO todo_auth", {("extra", "grant")}),
            (
                "GRANT SELECT ON tasks TO todo_app WITH GRANT OPTION",
                {("missing", "grant"), ("extra", "grant")},
            ),
            ("GRANT SELECT ON jwks TO PUBLIC", {("extra", "grant")}),
            (
                "GRANT EXECUTE ON FUNCTION find_credential(text, text) TO PUBLIC",
                {("extra", "grant")},
            ),
            ("GRANT SELECT ON SEQUENCE tasks_id_seq TO todo_auth", {("extra", "grant")}),
            ("GRANT CREATE ON SCHEMA public TO todo_auth", {("extra", "grant")}),
            (f"GRANT TEMPORARY ON DATABASE {DATABASE} TO todo_auth", {("extra", "grant")}),
            ("ALTER ROLE todo_app CREATEDB", {("missing", "role")}),
            ("GRANT pg_read_all_data TO todo_auth", {("extra", "member")}),
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
            # What an application adds; the rules judge it
            """ALTER TABLE tasks ADD priority int CHECK (priority > 0), ADD UNIQUE (title);
            GRANT INSERT (priority), UPDATE (priority) ON tasks TO todo_app""",
            "CREATE POLICY extra ON tasks TO todo_app USING (title <> '')",
            "CREATE POLICY extra ON users AS RESTRICTIVE USING (true)",
            """CREATE TRIGGER extra AFTER INSERT ON tasks
            FOR EACH ROW EXECUTE FUNCTION set_updated_at()""",
            # The rules judge these too
            f"GRANT TEMPORARY ON DATABASE {DATABASE} TO todo_app",
            # Objects of the owner
            "CREATE ROLE reporter; CREATE POLICY extra ON tasks TO reporter USING (true)",
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
        index = next(line for line in EXPECTED if ": index " in line)
        extra = "public.tasks: grant SELECT to PUBLIC"
        assert set(differences(EXPECTED - {index} | {extra}, ())) == {
            ("catalogue-missing", index),
            ("catalogue-extra", extra),
        }

    def test_leave_out_an_object_that_has_a_finding(self) -> None:
        lost = {line for line in EXPECTED if line.startswith(("public.tasks: ", "public.jwks: "))}
        found = {subject for _, subject in differences(EXPECTED - lost, {"public.tasks"})}
        assert found == {line for line in lost if line.startswith("public.jwks: ")}
