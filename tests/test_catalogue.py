"""What Alembic does not compare, held against the live database as a whole."""

from collections.abc import AsyncGenerator

import asyncpg
import catalogue
import pytest
import pytest_asyncio
from driver import Connection

from todo_db.embedded import LOGIN, EmbeddedPostgres
from todo_db.migrations import upgrade

DATABASE = "todo_catalogue"


@pytest_asyncio.fixture(scope="module")
async def superuser(todo_postgres: EmbeddedPostgres) -> AsyncGenerator[Connection]:
    todo_postgres.create_database(DATABASE)
    connection = await asyncpg.connect(todo_postgres.url(user="postgres", database=DATABASE))
    # As CREATE DATABASE leaves it, so that the migrations have something to revoke.
    await connection.execute(f"GRANT TEMPORARY ON DATABASE {DATABASE} TO PUBLIC")
    await upgrade(todo_postgres.url(database=DATABASE))
    yield connection
    await connection.close()
    todo_postgres.drop_database(DATABASE)


async def changed_by(connection: Connection, plant: str) -> set[str]:
    """Return the sections of the catalogue that a script changes; undo the script."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(plant)
        found = await catalogue.read(connection)
    finally:
        await transaction.rollback()
    return {section for section in found if found[section] != catalogue.EXPECTED[section]}


class TestMigratedDatabase:
    @pytest.mark.parametrize("section", catalogue.EXPECTED)
    async def test_is_exactly_what_is_expected(self, superuser: Connection, section: str) -> None:
        found = await superuser.fetch(catalogue.QUERIES[section])
        assert sorted(row[0] for row in found) == catalogue.EXPECTED[section]

    def test_is_compared_in_every_section(self) -> None:
        assert catalogue.QUERIES.keys() == catalogue.EXPECTED.keys()

    async def test_copy_of_it_is_the_same(self, owner: Connection) -> None:
        assert await catalogue.read(owner) == catalogue.EXPECTED


class TestRead:
    """Plants what must never be there: whatever the queries overlook, the tests above allow."""

    @pytest.mark.parametrize(
        ("section", "plant"),
        [
            # What a policy says and whom it binds (B1, B2, B3)
            ("policies", "CREATE POLICY extra ON tasks USING (true)"),
            ("policies", "CREATE POLICY extra ON tasks FOR SELECT TO todo_app USING (true)"),
            ("policies", "DROP POLICY tasks_own ON tasks"),
            ("policies", "DROP POLICY tasks_fence ON tasks"),
            ("policies", "DROP POLICY users_own ON users"),
            ("policies", "DROP POLICY users_fence ON users"),
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
                USING (user_id = (SELECT nullif(current_setting('todo_db.user_id', true), '')))
                WITH CHECK
                    (user_id = (SELECT nullif(current_setting('todo_db.user_id', true), '')))""",
            ),
            # A1: row security
            ("relations", "ALTER TABLE tasks DISABLE ROW LEVEL SECURITY"),
            ("relations", "ALTER TABLE tasks NO FORCE ROW LEVEL SECURITY"),
            ("relations", "ALTER TABLE users DISABLE ROW LEVEL SECURITY"),
            ("relations", "ALTER TABLE users NO FORCE ROW LEVEL SECURITY"),
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
            (
                "triggers",
                """CREATE TRIGGER spy AFTER INSERT ON tasks
                FOR EACH ROW EXECUTE FUNCTION set_updated_at()""",
            ),
            ("functions", "ALTER FUNCTION set_updated_at() RESET search_path"),
            ("functions", "ALTER FUNCTION set_updated_at() SECURITY DEFINER"),
            ("functions", "ALTER FUNCTION set_updated_at() IMMUTABLE"),
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
            ("grants", "GRANT UPDATE (email) ON users TO todo_app"),
            ("grants", "GRANT INSERT (email_verified) ON users TO todo_app"),
            ("grants", "GRANT SELECT ON tasks TO todo_app WITH GRANT OPTION"),
            ("grants", "GRANT SELECT ON tasks TO PUBLIC"),
            ("grants", "GRANT SELECT (title) ON tasks TO PUBLIC"),
            ("grants", f"GRANT SELECT ON tasks TO {LOGIN}"),
            ("grants", "REVOKE DELETE ON tasks FROM todo_app"),
            ("grants", "REVOKE UPDATE (completed) ON tasks FROM todo_app"),
            ("grants", "GRANT USAGE ON SEQUENCE tasks_id_seq TO todo_app"),
            ("grants", "GRANT INSERT ON alembic_version TO todo_app"),
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
            ("settings", "ALTER ROLE todo_app SET search_path = hidden, public"),
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
            ("indexes", "DROP INDEX idx_tasks_user_id"),
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

    async def test_leaves_alone_what_is_not_part_of_it(self, superuser: Connection) -> None:
        rows = """INSERT INTO users (id, email) VALUES ('alice', 'alice@example.org');
            INSERT INTO tasks (user_id, title) VALUES ('alice', 'Buy milk')"""
        assert await changed_by(superuser, rows) == set()
