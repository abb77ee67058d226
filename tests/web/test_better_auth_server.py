"""The real Better Auth, over HTTP, on the tables that our migrations create."""

import asyncio
import json
from collections.abc import AsyncGenerator, Generator
from typing import Final
from urllib.parse import unquote

import httpx
import jwt
import pytest
import pytest_asyncio
from alembic import command
from better_auth import (
    NEWEST,
    OLDEST,
    PASSWORD,
    BetterAuth,
    ask,
    tables_that_name,
    todo_api,
)
from driver import Connection
from pgbouncer import PASSWORD as DATABASE_PASSWORD
from pgbouncer import TRIXIE, PgBouncer
from pydantic import SecretStr
from sqlalchemy import make_url

from todo_db import Database, Settings
from todo_db.doctor import examine
from todo_db.embedded import LOGIN, EmbeddedPostgres
from todo_db.migrations import alembic_config
from todo_db.models import Base

pytestmark = pytest.mark.node

AUTH: Final = "better_auth_login"
OWNER: Final = "better_auth_owner"
EVERYWHERE: Final = {"users", "sessions", "accounts", "tasks"}

# The login, and max_prepared_statements of the PgBouncer in between, if there is one.
type Way = tuple[str, int | None]

WAYS: Final[tuple[Way, ...]] = tuple(
    (login, prepared) for login in (AUTH, OWNER) for prepared in (None, 1000, 0)
)


@pytest.fixture(scope="module", autouse=True)
def _logins(todo_postgres: EmbeddedPostgres) -> Generator[None]:
    """An owner like Neon's, and the recommended login; both need a password."""
    todo_postgres._psql(
        f"CREATE ROLE {AUTH} LOGIN IN ROLE todo_auth PASSWORD '{DATABASE_PASSWORD}'",
        f"CREATE ROLE {OWNER} LOGIN BYPASSRLS IN ROLE todo_owner PASSWORD '{DATABASE_PASSWORD}'",
    )
    rules = todo_postgres.log.parent / "data" / "pg_hba.conf"
    before = rules.read_text()
    rules.write_text(f"local all {AUTH},{OWNER} scram-sha-256\n{before}")
    todo_postgres._psql("SELECT pg_reload_conf()")
    yield
    rules.write_text(before)
    todo_postgres._psql("SELECT pg_reload_conf()", f"DROP ROLE {AUTH}, {OWNER}")


@pytest_asyncio.fixture(scope="module")
async def poolers(todo_postgres: EmbeddedPostgres) -> AsyncGenerator[dict[int, PgBouncer]]:
    server = todo_postgres.url(user="postgres", database="postgres")
    async with (
        PgBouncer(TRIXIE, server, max_prepared_statements=1000, default_pool_size=3) as neon,
        PgBouncer(TRIXIE, server, max_prepared_statements=0, default_pool_size=3) as old,
    ):
        yield {1000: neon, 0: old}


@pytest.fixture
def way() -> Way:
    return (AUTH, None)


@pytest.fixture
def auth_url(
    way: Way,
    poolers: dict[int, PgBouncer],
    todo_postgres: EmbeddedPostgres,
    todo_database_name: str,
) -> str:
    login, prepared = way
    if prepared is not None:
        url = poolers[prepared].url(login, todo_database_name)
    else:
        direct = make_url(todo_postgres.url(user=login, database=todo_database_name))
        url = direct.set(password=DATABASE_PASSWORD).render_as_string(hide_password=False)
    # SQLAlchemy does not encode spaces; then Node's driver does not decode the rest.
    return url.replace(" ", "%20")


@pytest.fixture
def version() -> str:
    return NEWEST


@pytest_asyncio.fixture
async def auth(auth_url: str, version: str) -> AsyncGenerator[BetterAuth]:
    async with BetterAuth(auth_url, version=version) as server:
        yield server


every_way = pytest.mark.parametrize(
    "way", WAYS, ids=[f"{login}-{prepared}" for login, prepared in WAYS]
)
both_logins = pytest.mark.parametrize("way", [(AUTH, None), (OWNER, None)], ids=[AUTH, OWNER])
both_versions = pytest.mark.parametrize("version", [NEWEST, OLDEST])


async def user_id_of(browser: httpx.AsyncClient) -> str:
    session = await ask(browser, "get-session")
    return str(session["user"]["id"])


class TestPlanner:
    @both_versions
    @both_logins
    async def test_finds_nothing_to_do(self, auth: BetterAuth) -> None:
        plan = json.loads(await auth.script("plan.mjs"))
        assert plan == {"created": [], "added": [], "indexes": [], "problems": []}

    @pytest.mark.parametrize("column", ["users.email_verified", "jwks.expires_at"])
    async def test_finds_a_column_that_is_missing(
        self, auth: BetterAuth, owner: Connection, column: str
    ) -> None:
        table, name = column.split(".")
        await owner.execute(f"ALTER TABLE {table} DROP {name}")
        assert json.loads(await auth.script("plan.mjs"))["added"] == [column]


class TestAccount:
    @both_versions
    @every_way
    async def test_lives_from_sign_up_to_deletion(
        self, auth: BetterAuth, database: Database, owner: Connection
    ) -> None:
        alice = await auth.sign_up("Alice", email="Alice@Example.org")
        bob = await auth.sign_up("Bob")
        user_id, bob_id = await user_id_of(alice), await user_id_of(bob)

        # Our repositories read what Better Auth wrote, for each user their own row.
        user = await database.users.get(user_id)
        assert (user.email, user.name, user.username) == ("alice@example.org", "Alice", None)
        await database.tasks.create(user_id, "hers", idempotency_key="a key of hers")
        await database.tasks.create(bob_id, "his")
        assert [task.title for task in (await database.tasks.list(user_id)).items] == ["hers"]

        # A JWT for other services, verified with the public keys alone.
        token = (await ask(alice, "token"))["token"]
        keys = jwt.PyJWKSet.from_dict(await ask(auth.browser(), "jwks"))
        key = keys[jwt.get_unverified_header(token)["kid"]]
        claims = jwt.decode(token, key, ["EdDSA"], audience=auth.url, issuer=auth.url)
        assert claims["sub"] == user_id

        # A sign-out ends the session, and signing in creates another one.
        await ask(alice, "sign-out", {})
        assert await ask(alice, "get-session") is None
        wrong = {"email": "alice@example.org", "password": "wrong horse battery"}
        await ask(alice, "sign-in/email", wrong, status=401)
        await ask(alice, "sign-in/email", wrong | {"password": PASSWORD})
        assert await user_id_of(alice) == user_id

        # A change by Better Auth is visible here, and changes the version.
        await ask(alice, "update-user", {"name": "Alice Liddell"})
        changed = await database.users.get(user_id)
        assert (changed.name, changed.created_at) == ("Alice Liddell", user.created_at)
        assert changed.updated_at > user.updated_at

        # After the deletion no row of alice is left, and every row of bob.
        hers = (user_id, "alice@example.org")
        assert await tables_that_name(owner, *hers) >= EVERYWHERE
        await ask(alice, "delete-user", {"password": "wrong horse battery"}, status=400)
        assert await tables_that_name(owner, *hers) >= EVERYWHERE
        await ask(alice, "delete-user", {"password": PASSWORD})
        assert await tables_that_name(owner, *hers) == set()
        assert await tables_that_name(owner, bob_id) == EVERYWHERE
        assert await ask(alice, "get-session") is None


class TestEmail:
    @every_way
    async def test_belongs_to_one_user_in_any_case(
        self, auth: BetterAuth, owner: Connection
    ) -> None:
        async def sign_up(email: str) -> int:
            body = {"name": "", "email": email, "password": PASSWORD}
            answer = await auth.browser().post("/api/auth/sign-up/email", json=body)
            return answer.status_code

        at_once = await asyncio.gather(*(sign_up("alice@example.org") for _ in range(6)))
        assert sorted(at_once) == [200, *[422] * 5]
        for email in ("alice@example.org", "ALICE@example.org", "Alice@Example.ORG"):
            assert await sign_up(email) == 422
        counts = await owner.fetchrow(
            "SELECT (SELECT count(*) FROM users), (SELECT count(*) FROM accounts),"
            " (SELECT count(*) FROM sessions)"
        )
        assert counts is not None
        assert tuple(counts) == (1, 1, 1)

    async def test_of_a_user_that_python_made_is_taken(
        self, auth: BetterAuth, database: Database
    ) -> None:
        await database.users.create("alice", email="Alice@Example.org", name="Alice")
        body = {"name": "Alice", "email": "alice@example.org", "password": PASSWORD}
        await ask(auth.browser(), "sign-up/email", body, status=422)
        await ask(auth.browser(), "sign-in/email", body, status=401)


class TestUsername:
    async def test_of_better_auth_is_in_our_table(
        self, auth: BetterAuth, database: Database
    ) -> None:
        browser = auth.browser()
        body = {
            "name": "Alice",
            "email": "alice@example.org",
            "password": PASSWORD,
            "username": "Alice.L",
        }
        await ask(browser, "sign-up/email", body)
        user = await database.users.get(await user_id_of(browser))
        assert user.username == "alice.l"
        await ask(auth.browser(), "sign-in/username", {"username": "ALICE.l", "password": PASSWORD})


class TestRole:
    async def test_reads_no_task(self, auth: BetterAuth, superuser: Connection) -> None:
        browser = await auth.sign_up("Alice")
        assert await user_id_of(browser)
        granted = await superuser.fetchval(
            "SELECT count(*) FROM pg_class, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE'])"
            " privilege WHERE relname IN ('tasks', 'idempotency_keys', 'todo_db_version')"
            " AND has_table_privilege($1, oid, privilege)",
            AUTH,
        )
        assert granted == 0
        logins = await superuser.fetch(
            "SELECT DISTINCT usename FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        assert [row[0] for row in logins] == [AUTH]


class TestPlugins:
    @pytest.fixture
    def way(self) -> Way:
        return (OWNER, None)

    async def test_may_add_what_alembic_and_the_doctor_ignore(
        self,
        auth: BetterAuth,
        database: Database,
        owner: Connection,
        todo_postgres: EmbeddedPostgres,
        todo_database_name: str,
    ) -> None:
        await auth.script("add-plugins.mjs")
        added = {
            (row[0], row[1])
            for row in await owner.fetch(
                "SELECT relname, attname FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid"
                " WHERE attnum > 0 AND relkind = 'r' AND relnamespace = 'public'::regnamespace"
            )
            if row[0] not in Base.metadata.tables
            or row[1] not in Base.metadata.tables[row[0]].columns
        }
        assert {
            ("users", "role"),
            ("users", "banned"),
            ("users", "twoFactorEnabled"),
            ("sessions", "impersonatedBy"),
            ("twoFactor", "secret"),
            ("twoFactor", "userId"),
        } <= added

        url = todo_postgres.url(database=todo_database_name)
        await asyncio.to_thread(command.check, alembic_config(url))
        login = todo_postgres.url(user=LOGIN, database=todo_database_name)
        report = await examine(Settings(database_url=SecretStr(login)))
        # This finding is about the server of these tests, not about the schema.
        assert {finding.code for finding in report.findings} == {"durability-weakened"}
        await auth.sign_up("Alice")
        user_id = await owner.fetchval("SELECT id FROM users")
        assert (await database.users.get(user_id)).name == "Alice"


class TestFastAPI:
    @pytest.mark.parametrize("version", [NEWEST, OLDEST])
    async def test_accepts_every_credential_of_its_users_and_no_other(
        self, auth: BetterAuth, todo_postgres: EmbeddedPostgres, todo_database_name: str
    ) -> None:
        alice, bob = await auth.sign_up("Alice"), await auth.sign_up("Bob")
        user_id = await user_id_of(alice)
        name = "better-auth.session_token"
        signed = alice.cookies[name]
        tokens = (
            unquote(signed),
            signed.partition(".")[0],
            (await ask(alice, "token"))["token"],
        )
        hers = [
            {"cookie": f"{name}={signed}"},
            *({"authorization": f"Bearer {token}"} for token in tokens),
        ]
        his = {"cookie": f"{name}={bob.cookies[name]}"}

        url = todo_postgres.url(user=LOGIN, database=todo_database_name)
        async with todo_api(url, auth.url) as api:
            created = await api.post("/api/tasks", headers=hers[0], json={"title": "hers"})
            path = created.headers["location"]
            for headers in hers:
                assert (await api.get("/api/me", headers=headers)).json()["id"] == user_id
                assert (await api.get(path, headers=headers)).json()["title"] == "hers"

            # For her task bob gets the same answer as for a task that does not exist.
            assert (await api.get("/api/tasks", headers=his)).json()["items"] == []
            for method in ("GET", "DELETE"):
                foreign = await api.request(method, path, headers=his)
                missing = await api.request(method, "/api/tasks/999999", headers=his)
                assert foreign.status_code == missing.status_code == 404
                assert foreign.content == missing.content

            # After the sign-out the session is refused here too; the JWT is valid until it expires.
            await ask(alice, "sign-out", {})
            states = [(await api.get("/api/me", headers=headers)).status_code for headers in hers]
            assert states == [401, 401, 401, 200]

            # After the deletion the JWT names a user that does not exist.
            await ask(alice, "sign-in/email", {"email": "Alice@example.org", "password": PASSWORD})
            await ask(alice, "delete-user", {"password": PASSWORD})
            assert (await api.get("/api/me", headers=hers[-1])).status_code == 404
            late = await api.post("/api/tasks", headers=hers[-1], json={"title": "late"})
            assert late.status_code == 404
