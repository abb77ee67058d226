"""`todo-db login`: the login of an application, made by the owner."""

import asyncio
import logging
import re
import subprocess
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import asyncpg
import pytest
import pytest_asyncio
from cluster import OTHER_VERSIONS, Cluster
from driver import Connection
from sqlalchemy import URL, make_url
from texts import texts_of
from typer.testing import CliRunner, Result

from todo_db import ConfigurationError, Database, Settings, TodoDBError, UnavailableError
from todo_db.cli import app
from todo_db.embedded import OWNER, EmbeddedPostgres, folder_in_memory
from todo_db.engine import parse_url
from todo_db.logins import LoginRole, create_login, role_settings
from todo_db.migrations import upgrade

NAME: Final = "made_login"
OTHERS: Final = {"todo_app": "todo_auth", "todo_auth": "todo_app"}
# What the tests below change, except the roles that they create.
RESTORE: Final = f"""
    DO $$
    DECLARE
        planted text;
    BEGIN
        FOR planted IN SELECT rolname FROM pg_roles WHERE oid >= 16384
            AND rolname NOT IN ('{OWNER}', 'todo_app', 'todo_auth')
        LOOP
            EXECUTE format('REASSIGN OWNED BY %I TO {OWNER}', planted);
            EXECUTE format('DROP OWNED BY %I', planted);
            EXECUTE format('DROP ROLE %I', planted);
        END LOOP;
    END
    $$;
    DROP VIEW IF EXISTS planted_view;
    DROP TABLE IF EXISTS planted;
    ALTER ROLE {OWNER} NOSUPERUSER BYPASSRLS CREATEROLE;
    ALTER ROLE todo_app NOSUPERUSER NOBYPASSRLS;
    REVOKE todo_auth FROM todo_app;
    GRANT todo_app TO {OWNER} WITH ADMIN TRUE;
    ALTER DATABASE todo RESET ALL
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app.app, ["login", *arguments])


@pytest.fixture
def server(
    folder: Path,
    todo_postgres: EmbeddedPostgres,  # noqa: ARG001  # makes the wheel's files readable for all
    monkeypatch: pytest.MonkeyPatch,
) -> EmbeddedPostgres:
    """A server that is not started, with its place for the command line."""
    monkeypatch.chdir(folder)
    return EmbeddedPostgres(folder / "postgres")


def test_is_made_once_and_keeps_its_password(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server:
        monkeypatch.setenv("DATABASE_URL", server.url())
        assert "todo-db migrate" in run("todo_application").output
        assert CliRunner().invoke(app.app, ["migrate"]).exit_code == 0
        made = run("todo_application")
        assert made.exit_code == 0
        assert made.stdout.startswith("postgresql://todo_application:")
        again = run("todo_application")
        assert (again.exit_code, again.stdout) == (0, "")
        replaced = run("todo_application", "--new-password")
        assert replaced.stdout.startswith("postgresql://todo_application:")
        assert replaced.stdout != made.stdout
        assert run("better_auth", "--role", "todo_auth").exit_code == 0
        monkeypatch.setenv("DATABASE_URL", made.stdout.strip())
        health = CliRunner().invoke(app.app, ["health"])
        # The table can wrap a line of the reason.
        assert re.search(r"round_trips +│ 1 ", health.stdout), health.stdout
        assert CliRunner().invoke(app.app, ["doctor"]).exit_code == 0


def test_that_owns_tables_is_refused(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server:
        monkeypatch.setenv("DATABASE_URL", server.url())
        assert CliRunner().invoke(app.app, ["migrate"]).exit_code == 0
        refused = run(OWNER)
    assert refused.exit_code == 1
    assert "owns tables" in refused.output


@pytest.mark.parametrize("name", ["", "todo_app", "public", "pg_mine", "Upper", 'a"b', "x" * 64])
async def test_name_that_cannot_be_used_is_refused(url: str, name: str) -> None:
    with pytest.raises(ConfigurationError):
        await create_login(url, Settings(), name)


async def test_health_says_how_many_round_trips(db: Database) -> None:
    health = await db.health()
    assert health.round_trips == 3
    assert health.form_reason


@pytest.fixture(scope="module")
def roles(
    todo_postgres: EmbeddedPostgres,  # noqa: ARG001  # makes the wheel's files readable for all
) -> Generator[EmbeddedPostgres]:
    """A migrated server for this file, because roles belong to all databases of a server."""
    with (
        TemporaryDirectory(prefix="todo-db-", dir=folder_in_memory()) as place,
        EmbeddedPostgres(Path(place) / "postgres", durable=False) as server,
    ):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, upgrade(server.url())).result()
        yield server


@pytest_asyncio.fixture
async def root(roles: EmbeddedPostgres) -> AsyncGenerator[Connection]:
    """A superuser in the migrated database; at the end the roles are as before."""
    connection: Connection = await asyncpg.connect(roles.url(user="postgres"))
    yield connection
    await connection.execute(RESTORE)
    await connection.close()


@pytest.fixture
def restored(roles: EmbeddedPostgres) -> Generator[EmbeddedPostgres]:
    """The same server, for tests of the command, which has an event loop of its own."""
    yield roles
    place = ("-h", roles._socket_folder(), "-U", "postgres", "todo")
    subprocess.run([roles.program("psql"), "-Xq", *place, "-c", RESTORE], check=True)


async def make(server: EmbeddedPostgres, role: LoginRole = "todo_app", name: str = NAME) -> URL:
    created = await create_login(server.url(), Settings(), name, role=role)
    assert created is not None
    return created


@asynccontextmanager
async def connected(url: URL | str) -> AsyncGenerator[Connection]:
    text = url if isinstance(url, str) else url.render_as_string(hide_password=False)
    connection: Connection = await asyncpg.connect(text)
    try:
        yield connection
    finally:
        await connection.close()


async def state_of(root: Connection) -> list[object]:
    """Return all that the server stores about roles."""
    return [
        await root.fetch(f"SELECT to_jsonb(t)::text FROM {table} t ORDER BY 1")
        for table in ("pg_authid", "pg_auth_members", "pg_db_role_setting")
    ]


async def wait_for_waiting(root: Connection) -> None:
    """Wait until a session waits for a lock."""
    async with asyncio.timeout(20):
        waiting = 0
        while not waiting:
            await asyncio.sleep(0.01)
            waiting = await root.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted")


async def settings_of(root: Connection) -> set[str]:
    """Return the settings of the login in every database, and in this one."""
    stored = await root.fetch(
        "SELECT unnest(setconfig) FROM pg_db_role_setting WHERE setrole = $1::regrole", NAME
    )
    return {str(row[0]) for row in stored}


WANTED: Final = {
    f"{key}={value.strip(chr(39))}" for key, value in role_settings(Settings()).items()
}


class TestCreateLogin:
    async def test_calls_take_one_round_trip(
        self, roles: EmbeddedPostgres, root: Connection
    ) -> None:
        created = await make(roles)
        async with Database.from_url(created.render_as_string(hide_password=False)) as db:
            assert (await db.health()).round_trips == 1
        assert await settings_of(root) == WANTED

    async def test_calls_take_one_round_trip_where_it_was_granted_without_inheritance(
        self, roles: EmbeddedPostgres, root: Connection
    ) -> None:
        created = await make(roles)
        async with connected(roles.url()) as owner:
            await owner.execute(f"GRANT todo_app TO {NAME} WITH INHERIT FALSE, SET FALSE")
        await root.execute(f"ALTER ROLE {NAME} NOINHERIT")
        assert await create_login(roles.url(), Settings(), NAME) is None
        async with Database.from_url(created.render_as_string(hide_password=False)) as db:
            assert (await db.health()).round_trips == 1
        assert await root.fetchval("SELECT rolinherit FROM pg_roles WHERE rolname = $1", NAME)

    async def test_second_run_keeps_the_password(
        self, roles: EmbeddedPostgres, root: Connection
    ) -> None:
        await make(roles)
        before = await state_of(root)
        assert await create_login(roles.url(), Settings(), NAME) is None
        assert await state_of(root) == before

    async def test_second_run_restores_settings(
        self, roles: EmbeddedPostgres, root: Connection
    ) -> None:
        await make(roles)
        await root.execute(f"""
            ALTER ROLE {NAME} SET statement_timeout = 0;
            ALTER ROLE {NAME} SET search_path = pg_temp;
            ALTER ROLE {NAME} RESET lock_timeout;
            ALTER ROLE {NAME} IN DATABASE todo SET statement_timeout = 0
        """)
        assert await create_login(roles.url(), Settings(), NAME) is None
        assert await settings_of(root) == WANTED

    @pytest.mark.parametrize("database", ['a "b" :c', "50%25 + x/y?&z#@"])
    async def test_database_may_have_any_name(
        self, roles: EmbeddedPostgres, root: Connection, database: str
    ) -> None:
        quoted = '"' + database.replace('"', '""') + '"'
        await root.execute(f"CREATE DATABASE {quoted} OWNER {OWNER}")
        try:
            url = make_url(roles.url()).set(database=database)
            made = await create_login(url.render_as_string(hide_password=False), Settings(), NAME)
            assert made is not None
            async with connected(url.set(username=NAME)) as login:
                assert await login.fetchval("SELECT current_database()") == database
        finally:
            await root.execute(f"DROP DATABASE {quoted}")

    async def test_url_names_a_database_that_only_a_variable_named(
        self, roles: EmbeddedPostgres, root: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert await root.fetchval("SELECT current_database()") == "todo"
        monkeypatch.setenv("PGDATABASE", "todo")
        url = make_url(roles.url())._replace(database=None).render_as_string(hide_password=False)
        made = await create_login(url, Settings(), NAME)
        assert made is not None
        assert made.database == "todo"

    @pytest.mark.matrix
    @pytest.mark.parametrize("version", OTHER_VERSIONS)
    async def test_calls_take_one_round_trip_on_other_versions(
        self,
        todo_postgres: EmbeddedPostgres,  # noqa: ARG002  # makes the wheel's files readable for all
        version: int,
    ) -> None:
        with Cluster(version) as cluster:
            owners = await cluster.create_database("todo")
            await upgrade(owners)
            assert await create_login(owners, Settings(), NAME) is not None
            await cluster.execute(f"ALTER ROLE {NAME} NOINHERIT")
            assert await create_login(owners, Settings(), NAME) is None
            async with Database.from_url(cluster.url(NAME, "todo")) as db:
                assert (await db.health()).round_trips == 1

    async def test_for_better_auth_writes_accounts_and_no_tasks(
        self, roles: EmbeddedPostgres, root: Connection
    ) -> None:
        assert await root.fetchval("SELECT count(*) FROM users") == 0
        async with connected(await make(roles, "todo_auth")) as auth:
            async with _undone(auth):
                await auth.execute("""
                    INSERT INTO users (id, email, name) VALUES ('alice', 'a@example.org', 'Alice');
                    INSERT INTO sessions (user_id, token, expires_at) VALUES ('alice', 't', now());
                    INSERT INTO accounts (user_id, account_id, provider_id, password)
                        VALUES ('alice', 'alice', 'credential', 'hash');
                    INSERT INTO verifications (identifier, value, expires_at)
                        VALUES ('i', 'v', now());
                    INSERT INTO jwks (public_key, private_key) VALUES ('p', 'p')
                """)
                changes = {
                    "users": "name = 'A'",
                    "sessions": "ip_address = ''",
                    "accounts": "scope = ''",
                    "verifications": "value = 'w'",
                    "jwks": "alg = 'EdDSA'",
                }
                for table, change in reversed(changes.items()):
                    assert await auth.execute(f"UPDATE {table} SET {change}") == "UPDATE 1"
                    assert await auth.fetchval(f"SELECT count(*) FROM {table}") == 1
                    assert await auth.execute(f"DELETE FROM {table}") == "DELETE 1"
            for table in ("tasks", "idempotency_keys"):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await auth.fetch(f"SELECT FROM {table}")


@asynccontextmanager
async def _undone(connection: Connection) -> AsyncGenerator[None]:
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield
    finally:
        await transaction.rollback()


class TestRefusals:
    @pytest.mark.parametrize("role", ["todo_app", "todo_auth"])
    @pytest.mark.parametrize(
        ("plant", "reason"),
        [
            ("CREATE ROLE {name}", "the login is a role that cannot log in"),
            (
                "CREATE ROLE {name} LOGIN BYPASSRLS",
                "the login bypasses row-level security, itself or by a role",
            ),
            ("CREATE ROLE {name} LOGIN SUPERUSER", "the login bypasses row-level security"),
            ("CREATE ROLE {name} LOGIN REPLICATION", "the login bypasses row-level security"),
            (
                (
                    "CREATE ROLE planted BYPASSRLS; CREATE ROLE {name} LOGIN;"
                    "GRANT planted TO {name} WITH INHERIT FALSE, SET FALSE"
                ),
                "the login bypasses row-level security",
            ),
            (
                "CREATE ROLE {name} LOGIN; GRANT postgres TO {name}",
                "the login bypasses row-level security",
            ),
            (
                (
                    "CREATE ROLE planted; CREATE ROLE {name} LOGIN IN ROLE planted;"
                    "CREATE TABLE planted (); ALTER TABLE planted OWNER TO planted"
                ),
                "the login owns tables, itself or by a role",
            ),
            (
                (
                    "CREATE ROLE {name} LOGIN; CREATE VIEW planted_view AS SELECT;"
                    "ALTER VIEW planted_view OWNER TO {name}"
                ),
                "the login owns tables",
            ),
            ("CREATE ROLE {name} LOGIN IN ROLE {other}", "the login is a member of {other}"),
            (
                (
                    "CREATE ROLE planted IN ROLE {other};"
                    "CREATE ROLE {name} LOGIN IN ROLE planted NOINHERIT"
                ),
                "the login is a member of {other}",
            ),
            (
                "CREATE ROLE {name} LOGIN; GRANT {name} TO {role}",
                "the role {role} is a member of the login",
            ),
        ],
        ids=[
            "no login",
            "bypasses",
            "superuser",
            "replicates",
            "member of one that bypasses",
            "member of a superuser",
            "member of an owner",
            "owner",
            "member of the other role",
            "member of a member of the other role",
            "its role is a member of it",
        ],
    )
    async def test_of_an_unfit_role_say_why_and_change_nothing(
        self,
        roles: EmbeddedPostgres,
        root: Connection,
        role: LoginRole,
        plant: str,
        reason: str,
    ) -> None:
        names = {"name": NAME, "role": role, "other": OTHERS[role]}
        await root.execute(plant.format(**names))
        before = await state_of(root)
        for new_password in (False, True):
            with pytest.raises(ConfigurationError) as refused:
                await create_login(
                    roles.url(), Settings(), NAME, role=role, new_password=new_password
                )
            told = str(refused.value)
            assert told.startswith(reason.format(**names))
            # The server's own tables belong to its first superuser.
            assert (", and it owns tables" in told) == ("postgres" in plant)
            assert told.count(", and it ") == ("postgres" in plant)
        assert await state_of(root) == before

    @pytest.mark.parametrize(
        ("plant", "reason"),
        [
            ("ALTER ROLE todo_app BYPASSRLS", "the role todo_app bypasses row-level security"),
            ("GRANT todo_auth TO todo_app", "the role todo_app is a member of todo_auth"),
        ],
    )
    async def test_of_an_unfit_role_to_grant_come_before_the_login(
        self, roles: EmbeddedPostgres, root: Connection, plant: str, reason: str
    ) -> None:
        await root.execute(plant)
        before = await state_of(root)
        with pytest.raises(ConfigurationError, match=reason):
            await create_login(roles.url(), Settings(), NAME)
        assert await state_of(root) == before

    async def test_see_a_role_that_was_made_while_they_waited(
        self, roles: EmbeddedPostgres, root: Connection
    ) -> None:
        await root.execute("ALTER DATABASE todo SET default_transaction_isolation = serializable")
        async with root.transaction():
            await root.execute("SELECT pg_advisory_xact_lock(7306001206)")
            making = asyncio.create_task(create_login(roles.url(), Settings(), NAME))
            await wait_for_waiting(root)
            await root.execute(f"CREATE ROLE {NAME} LOGIN IN ROLE todo_auth")
        with pytest.raises(ConfigurationError, match="is a member of todo_auth"):
            await making

    @pytest.mark.parametrize(
        "plant",
        [
            f"ALTER ROLE {OWNER} NOCREATEROLE",
            f"REVOKE ADMIN OPTION FOR todo_app FROM {OWNER} CASCADE",
            f"CREATE ROLE {NAME} LOGIN",
        ],
        ids=["no CREATEROLE", "no ADMIN OPTION", "the login of another role"],
    )
    async def test_of_a_missing_privilege_name_the_remedy(
        self,
        roles: EmbeddedPostgres,
        root: Connection,
        plant: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        for logger in (None, "sqlalchemy.engine.Engine.todo_db"):
            caplog.set_level(logging.DEBUG, logger)
        if plant.startswith("REVOKE"):
            # The owner made the role, so its ADMIN OPTION is the server's own grant.
            plant = (
                f"REVOKE todo_app FROM {OWNER} GRANTED BY postgres CASCADE;"
                f"GRANT todo_app TO {OWNER}"
            )
        await root.execute(plant)
        before = await state_of(root)
        with pytest.raises(ConfigurationError) as refused:
            await create_login(roles.url(), Settings(), NAME)
        assert await state_of(root) == before
        assert "run this as the owner of the database, the role that ran `todo-db migrate`" in str(
            refused.value
        )
        told = "".join(texts_of(refused.value))
        assert "PASSWORD" not in told + caplog.text
        assert 'ROLE "' not in told

    async def test_of_a_socket_folder_that_is_missing(self, tmp_path: Path) -> None:
        url = f"postgresql://alice@/todo?host={tmp_path}/missing"
        with pytest.raises(ConfigurationError, match="socket folder of the URL does not exist"):
            await create_login(url, Settings(), "todo_login")


class TestRuns:
    async def test_at_once_follow_each_other(
        self, roles: EmbeddedPostgres, root: Connection
    ) -> None:
        made = await asyncio.gather(
            *(create_login(roles.url(), Settings(), NAME) for _ in range(4))
        )
        assert made.count(None) == 3
        assert await settings_of(root) == WANTED

    @pytest.mark.parametrize(
        ("before", "change"),
        [
            ("SELECT", f"CREATE ROLE {NAME} LOGIN"),
            (f"CREATE ROLE {NAME} LOGIN", f"ALTER ROLE {NAME} CONNECTION LIMIT 5"),
        ],
        ids=["the same name", "the same login"],
    )
    async def test_that_collide_with_another_database_say_so(
        self, roles: EmbeddedPostgres, root: Connection, before: str, change: str
    ) -> None:
        async with connected(roles.url(database="postgres")) as elsewhere:
            await elsewhere.execute(before)
            async with elsewhere.transaction():
                await elsewhere.execute(change)
                making = asyncio.create_task(create_login(roles.url(), Settings(), NAME))
                await wait_for_waiting(root)
        with pytest.raises(UnavailableError, match="another session changed the same role") as told:
            await making
        assert told.value.transient
        assert "PASSWORD" not in "".join(texts_of(told.value))
        # The next run succeeds.
        assert await create_login(roles.url(), Settings(), NAME) is None

    async def test_translate_other_errors(self, roles: EmbeddedPostgres) -> None:
        with pytest.raises(TodoDBError, match="does not exist"):
            await create_login(roles.url(database="missing"), Settings(), NAME)


class TestPassword:
    async def test_is_in_no_log_and_no_repr(
        self, roles: EmbeddedPostgres, root: Connection, caplog: pytest.LogCaptureFixture
    ) -> None:
        for logger in (None, "sqlalchemy.engine.Engine.todo_db"):
            caplog.set_level(logging.DEBUG, logger)
        await root.execute("SELECT")
        for _ in range(2):
            made = await create_login(roles.url(), Settings(), NAME, new_password=True)
            assert made is not None
            assert made.password
            assert "GRANT todo_app" in caplog.text
            assert made.password not in caplog.text
            assert made.password not in f"{made!r} {made}"


class TestUrl:
    """The URL that the command prints is for libpq, for Node's driver and for todo_db."""

    @pytest.fixture
    def printed(self, restored: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch) -> "Printed":
        monkeypatch.setenv("DIRECT_DATABASE_URL", restored.url())
        return Printed(monkeypatch)

    @pytest.mark.parametrize(
        "place",
        [
            "postgres://owner:pw@db.example.org:6543/todo",
            "postgresql+asyncpg://owner@db.example.org/todo?sslmode=disable",
            "postgresql://owner@db.example.org/todo?sslmode=require",
            "postgresql://owner@db.example.org/todo?sslmode=verify-full",
            "postgresql://owner@h1:1,h2/todo?sslmode=allow&target_session_attrs=primary",
            "postgresql://owner@[::1]/todo",
            "postgresql://owner@/a%20b+c%2Bd%25?host=/run/my%20folder%2B&port=6000",
            "postgresql://owner@/%3F%23%40%26%3A?host=/tmp",
            "postgresql://owner@ep-a-pooler.eu.aws.neon.tech/todo?channel_binding=require",
        ],
    )
    @pytest.mark.parametrize("role", ["todo_app", "todo_auth"])
    def test_leads_to_the_same_place(
        self, printed: "Printed", monkeypatch: pytest.MonkeyPatch, place: str, role: str
    ) -> None:
        monkeypatch.setenv("HOME", "/missing")
        url = printed.url(place, role)
        assert url.startswith(f"postgresql://{NAME}:")
        assert " " not in url
        assert "+" not in url.partition("?")[2]
        wanted, got = parse_url(place), parse_url(url)
        assert got.url._replace(username="", password="") == wanted.url._replace(
            username="", password=""
        )
        assert got.url.username == NAME
        assert (got.tls, got.options) == (wanted.tls, wanted.options)
        assert ("sslrootcert=system" in url) == (
            role == "todo_app" and wanted.ssl_mode == "verify-full"
        )

    @pytest.mark.parametrize("place", ["postgresql://todo@db.example.org", "postgresql://todo@/"])
    def test_names_the_database(self, printed: "Printed", place: str) -> None:
        assert parse_url(printed.url(place, "todo_app")).url.database == "todo"

    def test_leads_to_the_direct_endpoint_if_there_is_no_other(
        self, restored: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch, folder: Path
    ) -> None:
        monkeypatch.chdir(folder)
        monkeypatch.delenv("DATABASE_URL", raising=False)
        monkeypatch.setenv("DIRECT_DATABASE_URL", restored.url())
        result = run(NAME)
        assert make_url(result.stdout).query == make_url(restored.url()).query
        assert not (folder / ".todo-db").exists()

    def test_is_read_by_psql(
        self, restored: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        database = "my todo+%25"
        restored._psql(f'CREATE DATABASE "{database}" OWNER {OWNER}')
        try:
            made = make_url(restored.url()).set(database=database)
            url = Printed(monkeypatch).url(made.render_as_string(hide_password=False), "todo_app")
            done = subprocess.run(
                [restored.program("psql"), "-XAtc", "SELECT current_user, current_database()", url],
                check=True,
                capture_output=True,
                text=True,
            )
            assert done.stdout == f"{NAME}|{database}\n"
        finally:
            restored._psql(f'DROP DATABASE "{database}"')


class Printed:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def url(self, place: str, role: str) -> str:
        self._monkeypatch.setenv("DATABASE_URL", place)
        result = run(NAME, "--role", role)
        assert result.exit_code == 0, result.output
        return result.stdout.removesuffix("\n")
