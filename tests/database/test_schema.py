"""Rules that the database itself enforces, for every program and any SQL."""

import asyncio
import re
import secrets
import string
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
import pytest_asyncio
from driver import Connection

from todo_db import Database, inputs
from todo_db.embedded import LOGIN, EmbeddedPostgres
from todo_db.errors import InvalidInputError

TASK = "INSERT INTO tasks (user_id, title) VALUES ($1, $2) RETURNING id"
USER = "INSERT INTO users (id, email) VALUES ($1, $2)"


@pytest_asyncio.fixture
async def people(owner: Connection) -> Connection:
    """The owner's connection, to a database with alice and bob in it."""
    for name in ("alice", "bob"):
        await owner.execute(USER, name, f"{name}@example.org")
    return owner


async def connect_as(server: EmbeddedPostgres, database: str, user_id: str) -> Connection:
    """Connect with the settings of the package's transactions, for the whole session."""
    connection = await asyncpg.connect(server.url(user=LOGIN, database=database))
    await connection.execute("SET ROLE todo_app")
    await connection.execute("SELECT set_config('todo_db.user_id', $1, false)", user_id)
    return connection


@pytest_asyncio.fixture
async def alice(
    todo_postgres: EmbeddedPostgres,
    todo_database_name: str,
    people: Connection,  # noqa: ARG001  # she is one of them
) -> AsyncGenerator[Connection]:
    """todo_app's connection, as alice."""
    connection = await connect_as(todo_postgres, todo_database_name, "alice")
    yield connection
    await connection.close()


async def broken_by(connection: Connection, query: str, *arguments: object) -> str | None:
    """Return the name of the constraint that refuses a statement."""
    with pytest.raises(asyncpg.IntegrityConstraintViolationError) as refusal:
        await connection.execute(query, *arguments)
    return refusal.value.constraint_name


async def denied(connection: Connection, query: str, *arguments: object) -> str:
    """Return the error message for a statement that the role may not run."""
    with pytest.raises(asyncpg.InsufficientPrivilegeError) as refusal:
        await connection.execute(query, *arguments)
    return str(refusal.value)


async def add(connection: Connection, count: int, user_id: str = "alice") -> list[int]:
    return [await connection.fetchval(TASK, user_id, f"{number}") for number in range(count)]


class TestTasks:
    async def test_without_or_with_a_null_owner_is_refused(self, people: Connection) -> None:
        for query in (
            "INSERT INTO tasks (title) VALUES ('x')",
            "INSERT INTO tasks (user_id, title) VALUES (NULL, 'x')",
        ):
            with pytest.raises(asyncpg.NotNullViolationError) as refusal:
                await people.execute(query)
            assert refusal.value.column_name == "user_id"

    async def test_of_an_unknown_or_empty_owner_is_refused(self, people: Connection) -> None:
        for user_id in ("carol", "", "Alice", "alice "):
            assert await broken_by(people, TASK, user_id, "x") == "fk_tasks_user_id_users"

    async def test_of_another_owner_is_refused_to_the_app_role_as_an_unknown_one(
        self, alice: Connection
    ) -> None:
        unknown = await denied(alice, TASK, "carol", "x")
        assert "row-level security" in unknown
        for user_id in ("bob", ""):
            assert await denied(alice, TASK, user_id, "x") == unknown
        for query in (
            "INSERT INTO tasks (title) VALUES ('x')",
            "INSERT INTO tasks (user_id, title) VALUES (NULL, 'x')",
        ):
            assert await denied(alice, query) == unknown

    async def test_title_has_at_most_200_characters(self, people: Connection) -> None:
        for letter in ("x", "\N{DUCK}"):
            await people.execute(TASK, "alice", letter * 200)
            with pytest.raises(asyncpg.StringDataRightTruncationError):
                await people.execute(TASK, "alice", letter * 201)
        assert await people.fetchval("SELECT min(char_length(title)) FROM tasks") == 200

    async def test_title_is_not_null(self, people: Connection) -> None:
        with pytest.raises(asyncpg.NotNullViolationError) as refusal:
            await people.execute(TASK, "alice", None)
        assert refusal.value.column_name == "title"

    @pytest.mark.parametrize("role", ["owner", "todo_app"])
    async def test_blank_title_is_refused(
        self, people: Connection, alice: Connection, role: str
    ) -> None:
        connection = people if role == "owner" else alice
        blank = [
            "",
            " ",
            "\t\r\n",
            "\x01",
            "\u00a0\u200b\u3000",
            "\u2028\u2029",
            "\ufeff",
            "\u00ad",
        ]
        for title in blank:
            assert await broken_by(connection, TASK, "alice", title) == "ck_tasks_title_not_blank"
        task_id = await connection.fetchval(TASK, "alice", " \u00a0x\u200b ")
        for title in blank:
            assert (
                await broken_by(
                    connection, "UPDATE tasks SET title = $2 WHERE id = $1", task_id, title
                )
                == "ck_tasks_title_not_blank"
            )

    async def test_no_title_that_the_package_takes_is_blank_to_the_database(
        self, owner: Connection
    ) -> None:
        definition = await owner.fetchval(
            "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = $1",
            "ck_tasks_title_not_blank",
        )
        visible = re.search(r"'(.*)'", definition)
        assert visible is not None
        blank = await owner.fetch(
            """SELECT chr(point) FROM generate_series(1, 1114111) AS point
            WHERE point NOT BETWEEN 55296 AND 57343 AND chr(point) !~ $1""",
            visible[1],
        )
        assert len(blank) > 90
        for (title,) in blank:
            with pytest.raises(InvalidInputError):
                inputs.title(title)

    async def test_description_has_at_most_65536_characters(self, people: Connection) -> None:
        query = "INSERT INTO tasks (user_id, title, description) VALUES ('alice', 'x', $1)"
        await people.execute(query, "\N{DUCK}" * 65_536)
        assert await broken_by(people, query, "x" * 65_537) == "ck_tasks_description_length"

    async def test_defaults(self, alice: Connection) -> None:
        row = await alice.fetchrow(
            "INSERT INTO tasks (user_id, title) VALUES ('alice', 'x') RETURNING *"
        )
        assert row is not None
        assert (row["description"], row["completed"]) == (None, False)

    async def test_filter_alone_shows_only_the_owners(self, people: Connection) -> None:
        await people.execute("ALTER TABLE tasks DISABLE ROW LEVEL SECURITY")
        await add(people, 5, "alice")
        await add(people, 3, "bob")
        found = await people.fetch("SELECT user_id FROM tasks WHERE user_id = 'alice'")
        assert [row["user_id"] for row in found] == ["alice"] * 5

    async def test_row_security_alone_shows_only_the_owners(
        self, people: Connection, alice: Connection
    ) -> None:
        await add(people, 5, "alice")
        await add(people, 3, "bob")
        assert [row["user_id"] for row in await alice.fetch("SELECT * FROM tasks")] == ["alice"] * 5
        assert [row["id"] for row in await alice.fetch("SELECT * FROM users")] == ["alice"]
        assert await alice.execute("UPDATE tasks SET completed = true") == "UPDATE 5"
        assert await alice.execute("DELETE FROM tasks") == "DELETE 5"
        assert await people.fetchval("SELECT count(*) FROM tasks WHERE NOT completed") == 3


class TestChildTable:
    """A table whose composite foreign key names the owner of the task too."""

    async def test_D3_row_of_another_users_task_is_refused_as_of_a_missing_one(
        self, people: Connection, alice: Connection
    ) -> None:
        await people.execute(
            """CREATE TABLE notes (user_id text NOT NULL, task_id bigint NOT NULL, CONSTRAINT mine
                FOREIGN KEY (user_id, task_id) REFERENCES tasks (user_id, id) ON DELETE CASCADE);
            GRANT INSERT ON notes TO todo_app"""
        )
        note = "INSERT INTO notes VALUES ('alice', $1)"
        (own,) = await add(people, 1)
        (foreign,) = await add(people, 1, "bob")
        await alice.execute(note, own)
        for task_id in (foreign, 999):
            assert await broken_by(alice, note, task_id) == "mine"
        await alice.execute("DELETE FROM tasks")
        assert await people.fetch("SELECT FROM notes") == []


class TestTaskIds:
    async def test_deleted_one_is_not_given_out_again(self, alice: Connection) -> None:
        assert await add(alice, 3) == [1, 2, 3]
        await alice.execute("DELETE FROM tasks WHERE id = 2")
        assert await add(alice, 1) == [4]

    async def test_last_one_deleted_is_not_given_out_again(self, alice: Connection) -> None:
        await add(alice, 3)
        await alice.execute("DELETE FROM tasks WHERE id = 3")
        assert await add(alice, 1) == [4]

    async def test_deleted_at_random_are_not_given_out_again(self, alice: Connection) -> None:
        assert await add(alice, 100) == list(range(1, 101))
        await alice.execute(
            "DELETE FROM tasks WHERE id IN (SELECT id FROM tasks ORDER BY random() LIMIT 50)"
        )
        assert await alice.fetchval("SELECT count(*) FROM tasks") == 50
        assert await add(alice, 10) == list(range(101, 111))

    async def test_all_deleted_are_not_given_out_again(self, alice: Connection) -> None:
        await add(alice, 100)
        await alice.execute("DELETE FROM tasks")
        assert await add(alice, 1) == [101]

    async def test_rolled_back_one_leaves_a_gap(self, alice: Connection) -> None:
        transaction = alice.transaction()
        await transaction.start()
        assert await add(alice, 1) == [1]
        await transaction.rollback()
        assert await add(alice, 1) == [2]

    async def test_two_users_creating_at_once_never_collide(
        self, todo_postgres: EmbeddedPostgres, todo_database_name: str, alice: Connection
    ) -> None:
        bob = await connect_as(todo_postgres, todo_database_name, "bob")
        async with asyncio.timeout(30):
            hers, his = await asyncio.gather(add(alice, 200), add(bob, 200, "bob"))
        await bob.close()
        assert sorted(hers + his) == list(range(1, 401))
        assert hers == sorted(hers)
        assert his == sorted(his)

    async def test_is_chosen_by_the_database(self, people: Connection) -> None:
        for query in (
            "INSERT INTO tasks (id, user_id, title) VALUES (7, 'alice', 'x')",
            "UPDATE tasks SET id = 7",
        ):
            with pytest.raises(asyncpg.GeneratedAlwaysError):
                await people.execute(query)

    async def test_D2_override_is_denied_to_the_app_role(self, alice: Connection) -> None:
        await add(alice, 1)
        for task_id in (1, 2):
            said = await denied(
                alice,
                f"""INSERT INTO tasks (id, user_id, title) OVERRIDING SYSTEM VALUE
                VALUES ({task_id}, 'alice', 'x')""",
            )
            assert said == "permission denied for table tasks"
        await denied(alice, "SELECT last_value FROM tasks_id_seq")
        await denied(alice, "SELECT nextval('tasks_id_seq')")

    async def test_A7_restart_is_denied_to_the_app_role(self, alice: Connection) -> None:
        await denied(alice, "TRUNCATE tasks")
        await denied(alice, "TRUNCATE tasks RESTART IDENTITY")


class TestTimestamps:
    @pytest.mark.parametrize("table", ["users", "tasks"])
    async def test_are_set_by_the_database_and_equal_on_creation(
        self, people: Connection, table: str
    ) -> None:
        await add(people, 1)
        async with people.transaction():
            before = await people.fetchval("SELECT now()")
            await people.execute(USER, "carol", "carol@example.org")
            await people.execute(TASK, "carol", "x")
            owner_column = {"users": "id", "tasks": "user_id"}[table]
            row = await people.fetchrow(
                f"SELECT created_at, updated_at FROM {table} WHERE {owner_column} = 'carol'"
            )
        assert row is not None
        assert row["created_at"] == row["updated_at"] == before

    @pytest.mark.parametrize(
        ("table", "column"), [("users", "name"), ("users", "email"), ("tasks", "title")]
    )
    async def test_updated_at_moves_with_each_update_of_raw_sql(
        self, people: Connection, table: str, column: str
    ) -> None:
        await add(people, 1)
        moments = [await people.fetchval(f"SELECT min(created_at) FROM {table}")]
        for number in range(3):
            update = f"UPDATE {table} SET {column} = id || '{number}' RETURNING updated_at"
            moments.append(await people.fetchval(update))
        assert moments == sorted(set(moments))
        assert await people.fetchval(f"SELECT min(created_at) FROM {table}") == moments[0]

    async def test_updated_at_moves_for_the_app_role(self, alice: Connection) -> None:
        await add(alice, 1)
        for table, change in (("tasks", "completed = true"), ("users", "name = 'Alice'")):
            assert await alice.fetchval(
                f"UPDATE {table} SET {change} RETURNING updated_at > created_at"
            )

    async def test_updated_at_moves_twice_in_one_transaction(self, people: Connection) -> None:
        async with people.transaction():
            await add(people, 1)
            moments = [await people.fetchval("SELECT updated_at FROM tasks")]
            for title in ("y", "z"):
                update = f"UPDATE tasks SET title = '{title}' RETURNING updated_at"
                moments.append(await people.fetchval(update))
        assert moments == sorted(set(moments))

    async def test_updated_at_stays_when_nothing_changes(self, people: Connection) -> None:
        await add(people, 1)
        for table, unchanged in (
            ("tasks", "title = title, completed = completed, description = description"),
            ("tasks", "updated_at = updated_at"),
            ("users", "name = name, username = username"),
        ):
            assert await people.fetchval(
                f"UPDATE {table} SET {unchanged} RETURNING updated_at = created_at"
            )

    async def test_updated_at_cannot_be_set_by_the_caller(self, people: Connection) -> None:
        await add(people, 1)
        for table in ("tasks", "users"):
            for moment in ("2000-01-01", "2100-01-01", "infinity"):
                row = await people.fetchrow(
                    f"""UPDATE {table} SET updated_at = '{moment}'
                    RETURNING updated_at > created_at AS moved, updated_at <= clock_timestamp()
                    AS past"""
                )
                assert row is not None
                assert row["moved"]
                assert row["past"]

    async def test_updated_at_grows_when_the_clock_goes_back(self, people: Connection) -> None:
        await add(people, 1)
        ahead = datetime.now(UTC) + timedelta(hours=1)
        for table, column in (("tasks", "title"), ("users", "name")):
            await people.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
            await people.execute(f"UPDATE {table} SET updated_at = $1", ahead)
            await people.execute(f"ALTER TABLE {table} ENABLE TRIGGER USER")
            for step in (1, 2):
                update = f"UPDATE {table} SET {column} = '{step}' RETURNING updated_at"
                assert await people.fetchval(update) == ahead + step * timedelta(microseconds=1)

    async def test_are_denied_to_the_app_role(self, alice: Connection) -> None:
        await add(alice, 1)
        for query in (
            "INSERT INTO tasks (user_id, title, created_at) VALUES ('alice', 'x', now())",
            "INSERT INTO tasks (user_id, title, updated_at) VALUES ('alice', 'x', now())",
            "UPDATE tasks SET created_at = now()",
            "UPDATE tasks SET updated_at = now()",
            "UPDATE users SET created_at = now()",
            "UPDATE users SET updated_at = now()",
        ):
            assert (await denied(alice, query)).startswith("permission denied for table")

    @pytest.mark.parametrize("column", ["created_at", "updated_at"])
    async def test_I110_beyond_pythons_years_are_refused(
        self, people: Connection, column: str
    ) -> None:
        for moment in ("infinity", "-infinity", "0044-03-15 BC", "0001-01-01", "10000-01-01"):
            constraint = await broken_by(
                people,
                f"INSERT INTO tasks (user_id, title, {column}) VALUES ('alice', 'x', '{moment}')",
            )
            assert constraint == "ck_tasks_timestamps_range"
            constraint = await broken_by(
                people,
                f"INSERT INTO users (id, email, {column}) VALUES ('x', 'x@y', '{moment}')",
            )
            assert constraint == "ck_users_timestamps_range"
        await people.execute(
            f"""INSERT INTO tasks (user_id, title, {column}) VALUES
            ('alice', 'x', '0001-01-02 00:00 UTC'), ('alice', 'x', '9999-12-30 23:59:59 UTC')"""
        )
        assert len(await people.fetch(f"SELECT {column} FROM tasks")) == 2

    async def test_I110_of_keys_beyond_pythons_years_are_refused(self, people: Connection) -> None:
        key = """INSERT INTO idempotency_keys (user_id, key, fingerprint, task_ids, created_at)
            VALUES ('alice', $1, repeat('0', 64), '{}', $1::text::timestamptz)"""
        for moment in ("infinity", "-infinity", "0044-03-15 BC", "0001-01-01", "10000-01-01"):
            constraint = await broken_by(people, key, moment)
            assert constraint == "ck_idempotency_keys_timestamps_range"
        for moment in ("0001-01-02 00:00 UTC", "9999-12-30 23:59:59.999999 UTC"):
            await people.execute(key, moment)
        assert len(await people.fetch("SELECT created_at FROM idempotency_keys")) == 2

    async def test_updated_at_changes_after_the_last_moment_there_is(
        self, people: Connection, alice: Connection
    ) -> None:
        await people.execute(
            """INSERT INTO tasks (user_id, title, updated_at)
            VALUES ('alice', 'x', '9999-12-30 23:59:59.999998 UTC')"""
        )
        toggle = "UPDATE tasks SET completed = NOT completed RETURNING updated_at"
        last = datetime(9999, 12, 30, 23, 59, 59, 999_999, tzinfo=UTC)
        assert await alice.fetchval(toggle) == last
        moments = [await alice.fetchval(toggle) for _ in range(3)]
        # From then on it is the clock's again, and grows.
        assert moments == sorted(set(moments))
        assert timedelta(0) <= datetime.now(UTC) - moments[0] < timedelta(minutes=1)


class TestUsers:
    async def test_ids_in_the_format_of_better_auth(self, people: Connection) -> None:
        alphabet = string.ascii_letters + string.digits
        user_id = "".join(secrets.choice(alphabet) for _ in range(32))
        await people.execute(USER, user_id, "x@example.org")
        # Ids are not case-folded: this is another user.
        await people.execute(USER, user_id.swapcase(), "y@example.org")
        assert await people.fetchval(TASK, user_id, "x") == 1
        assert await people.fetchval("SELECT user_id FROM tasks") == user_id

    async def test_I64_id_is_made_when_none_is_given(self, people: Connection) -> None:
        user_id = await people.fetchval(
            "INSERT INTO users (email) VALUES ('x@example.org') RETURNING id"
        )
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", user_id)
        with pytest.raises(asyncpg.NotNullViolationError):
            await people.execute(USER, None, "y@example.org")

    async def test_id_has_1_to_255_characters(self, people: Connection) -> None:
        for refused in ("", "x" * 256):
            assert await broken_by(people, USER, refused, "x@y") == "ck_users_id_length"
        await people.execute(USER, "x", "x@example.org")
        await people.execute(USER, "\N{DUCK}" * 255, "y@example.org")

    async def test_I72_id_is_unique(self, people: Connection) -> None:
        assert await broken_by(people, USER, "alice", "x@example.org") == "pk_users"

    async def test_I70_email_is_unique(self, people: Connection) -> None:
        assert await broken_by(people, USER, "carol", "alice@example.org") == "uq_users_email"

    async def test_email_is_required(self, people: Connection) -> None:
        with pytest.raises(asyncpg.NotNullViolationError) as refusal:
            await people.execute(USER, "carol", None)
        assert refusal.value.column_name == "email"

    async def test_I71_email_has_no_upper_case(self, people: Connection) -> None:
        for email in ("Carol@example.org", "carol@EXAMPLE.org"):
            assert await broken_by(people, USER, "carol", email) == "ck_users_email_lower"
        query = "UPDATE users SET email = upper(email)"
        assert await broken_by(people, query) == "ck_users_email_lower"

    async def test_email_may_have_upper_case_beyond_ascii(self, people: Connection) -> None:
        await people.execute(USER, "carol", "\N{LATIN CAPITAL LETTER E WITH ACUTE}va@example.org")

    async def test_username_is_unique_and_may_be_absent(self, people: Connection) -> None:
        await people.execute("UPDATE users SET username = 'first' WHERE id = 'alice'")
        query = "UPDATE users SET username = 'first' WHERE id = 'bob'"
        assert await broken_by(people, query) == "uq_users_username"
        await people.execute(USER, "carol", "carol@example.org")
        assert await people.fetchval("SELECT count(*) FROM users WHERE username IS NULL") == 2

    async def test_D4_refusal_reveals_no_value_to_the_app_role(self, alice: Connection) -> None:
        query = "INSERT INTO users (id, email) VALUES ('alice', 'bob@example.org')"
        with pytest.raises(asyncpg.UniqueViolationError) as refusal:
            await alice.execute(query)
        assert refusal.value.detail is None
        assert "bob@" not in str(refusal.value)

    @pytest.mark.parametrize("role", ["owner", "todo_app"])
    async def test_S23_deleting_one_deletes_the_tasks(
        self, people: Connection, alice: Connection, role: str
    ) -> None:
        await add(people, 50)
        await add(people, 1, "bob")
        connection = people if role == "owner" else alice
        assert await connection.execute("DELETE FROM users WHERE id = 'alice'") == "DELETE 1"
        assert [row["user_id"] for row in await people.fetch("SELECT user_id FROM tasks")] == [
            "bob"
        ]


class TestVerifiedEmail:
    """An address that Better Auth has verified, and that another program changes."""

    CHANGE = "UPDATE users SET email = 'boss@example.org' WHERE id = 'alice'"

    @pytest_asyncio.fixture(autouse=True)
    async def verified(self, people: Connection) -> None:
        await people.execute("UPDATE users SET email_verified = true")

    async def is_verified(self, connection: Connection, change: str) -> bool:
        await connection.execute(change)
        return bool(
            await connection.fetchval("SELECT email_verified FROM users WHERE id = 'alice'")
        )

    @pytest.mark.parametrize(
        "change",
        [
            CHANGE,
            """INSERT INTO users (id, email) VALUES ('alice', 'x')
                ON CONFLICT (id) DO UPDATE SET email = 'boss@example.org'""",
        ],
    )
    async def test_ends_with_a_change_by_the_app_role(self, alice: Connection, change: str) -> None:
        assert not await self.is_verified(alice, change)

    async def test_ends_with_a_change_by_a_login_that_inherits_it(
        self, people: Connection, single_url: str
    ) -> None:
        async with Database.from_url(single_url) as db:
            assert (await db.users.get("alice")).email_verified
            changed = await db.users.set_email("alice", email="boss@example.org")
            assert not changed.email_verified
        assert await people.fetchval("SELECT email_verified FROM users WHERE id = 'bob'")

    async def test_stays_if_the_address_does(self, alice: Connection) -> None:
        assert await self.is_verified(alice, "UPDATE users SET email = email, name = 'new'")

    async def test_is_better_auths_to_decide(self, auth: Connection) -> None:
        assert await self.is_verified(auth, self.CHANGE)

    async def test_is_the_owners_to_decide(self, people: Connection) -> None:
        assert await self.is_verified(people, self.CHANGE)


class TestTransfer:
    async def test_is_possible_for_the_owner(self, people: Connection) -> None:
        await add(people, 2)
        assert await people.execute("UPDATE tasks SET user_id = 'bob' WHERE id = 1") == "UPDATE 1"
        owners = await people.fetch(
            "SELECT user_id, updated_at > created_at AS moved FROM tasks ORDER BY id"
        )
        assert [tuple(row) for row in owners] == [("bob", True), ("alice", False)]

    async def test_to_an_unknown_user_is_refused(self, people: Connection) -> None:
        await add(people, 1)
        query = "UPDATE tasks SET user_id = 'carol'"
        assert await broken_by(people, query) == "fk_tasks_user_id_users"

    async def test_is_denied_to_the_app_role(self, alice: Connection) -> None:
        await add(alice, 1)
        said = await denied(alice, "UPDATE tasks SET user_id = 'bob'")
        assert said == "permission denied for table tasks"

    async def test_B6_is_denied_by_the_policy_alone(
        self, people: Connection, alice: Connection
    ) -> None:
        await add(alice, 1)
        await people.execute("GRANT UPDATE (user_id) ON tasks TO todo_app")
        assert "row-level security" in await denied(alice, "UPDATE tasks SET user_id = 'bob'")


AUTH_TABLES = ("sessions", "accounts", "verifications", "jwks")
SESSION = "INSERT INTO sessions (user_id, token, expires_at) VALUES ($1, $2, now() + $3)"
KEY = "INSERT INTO jwks (id, public_key, private_key, expires_at) VALUES ($1, $2, 'x', now() + $3)"
FIND = "SELECT user_id, public_key FROM find_credential($1, $2)"
SOON = timedelta(minutes=5)


@pytest_asyncio.fixture
async def auth(superuser: Connection, people: Connection) -> AsyncGenerator[Connection]:  # noqa: ARG001  # the users that it signs in
    """A connection with Better Auth's role."""
    await superuser.execute("SET ROLE todo_auth")
    yield superuser
    await superuser.execute("RESET ROLE")


@pytest_asyncio.fixture
async def signed_in(people: Connection) -> Connection:
    """The owner's connection, to a database with sessions and signing keys in it."""
    for user_id, token, left in (
        ("alice", "hers", SOON),
        ("bob", "his", SOON),
        ("alice", "expired", timedelta(microseconds=-1)),
    ):
        await people.execute(SESSION, user_id, token, left)
    for key_id, remaining in (
        ("current", SOON),
        ("endless", None),
        ("retired", timedelta(days=-30, minutes=1)),
        ("forgotten", timedelta(days=-30, minutes=-1)),
    ):
        await people.execute(KEY, key_id, f"{key_id} key", remaining)
    return people


class TestBetterAuth:
    async def test_role_does_everything_with_its_five_tables(
        self, people: Connection, auth: Connection
    ) -> None:
        for table, columns, values, change in (
            ("users", "id, email", "'carol', 'carol@example.org'", "email_verified = true"),
            ("sessions", "user_id, token, expires_at", "'carol', 'x', now()", "ip_address = 'x'"),
            ("accounts", "user_id, account_id, provider_id", "'carol', 'x', 'y'", "password = 'z'"),
            ("verifications", "identifier, value, expires_at", "'x', 'y', now()", "value = 'z'"),
            ("jwks", "public_key, private_key", "'x', 'y'", "expires_at = now()"),
        ):
            query = f"INSERT INTO {table} ({columns}) VALUES ({values}) RETURNING id"
            row_id = await auth.fetchval(query)
            assert await auth.execute(f"UPDATE {table} SET {change}") != "UPDATE 0"
            assert row_id in {row["id"] for row in await auth.fetch(f"SELECT * FROM {table}")}
        assert await auth.fetchval("SELECT count(*) FROM users") == 3
        for table in ("jwks", "verifications", "users"):
            await auth.execute(f"DELETE FROM {table}")
        # These rows are deleted with their users.
        for table in ("users", *AUTH_TABLES):
            assert await people.fetch(f"SELECT FROM {table}") == []

    async def test_role_does_nothing_with_tasks_but_end_them_with_their_user(
        self, people: Connection, auth: Connection
    ) -> None:
        await add(people, 2)
        await add(people, 1, "bob")
        for table in ("tasks", "idempotency_keys", "todo_db_version"):
            for query in (
                f"SELECT FROM {table}",
                f"DELETE FROM {table}",
                f"INSERT INTO {table} DEFAULT VALUES",
                f"TRUNCATE {table}",
            ):
                assert await denied(auth, query) == f"permission denied for table {table}"
        await denied(auth, "SELECT nextval('tasks_id_seq')")
        await denied(auth, "SELECT * FROM find_credential('x', 'y')")
        await denied(auth, "UPDATE tasks SET completed = true")
        await auth.execute("DELETE FROM users WHERE id = 'alice'")
        assert await people.fetchval("SELECT string_agg(user_id, ' ') FROM tasks") == "bob"

    async def test_tables_are_denied_to_the_app_role(self, alice: Connection) -> None:
        for table in AUTH_TABLES:
            for query in (
                f"SELECT FROM {table}",
                f"SELECT id FROM {table}",
                f"INSERT INTO {table} (id) VALUES ('x')",
                f"UPDATE {table} SET id = 'x'",
                f"DELETE FROM {table}",
                f"TRUNCATE {table}",
            ):
                assert await denied(alice, query) == f"permission denied for table {table}"

    async def test_tables_show_no_row_where_a_grant_was_made_by_mistake(
        self, signed_in: Connection, alice: Connection
    ) -> None:
        for table in AUTH_TABLES:
            await signed_in.execute(f"GRANT SELECT, INSERT ON {table} TO PUBLIC")
            assert await alice.fetch(f"SELECT * FROM {table}") == []
        assert "row-level security" in await denied(alice, SESSION, "alice", "mine", SOON)

    async def test_deleting_a_user_deletes_what_signs_in(self, people: Connection) -> None:
        for user_id in ("alice", "bob"):
            await people.execute(SESSION, user_id, user_id, SOON)
            await people.execute(
                "INSERT INTO accounts (user_id, account_id, provider_id) VALUES ($1, $1, 'x')",
                user_id,
            )
        await people.execute("DELETE FROM users WHERE id = 'alice'")
        for table in ("sessions", "accounts"):
            assert [row["user_id"] for row in await people.fetch(f"SELECT * FROM {table}")] == [
                "bob"
            ]

    async def test_token_is_unique(self, signed_in: Connection) -> None:
        assert await broken_by(signed_in, SESSION, "bob", "hers", SOON) == "uq_sessions_token"


class TestFindCredential:
    async def test_returns_the_user_of_a_valid_session(
        self, signed_in: Connection, alice: Connection
    ) -> None:
        del signed_in
        for token, user_id in (("hers", "alice"), ("his", "bob")):
            assert [tuple(row) for row in await alice.fetch(FIND, token, None)] == [(user_id, None)]

    async def test_returns_nothing_for_an_expired_or_unknown_session(
        self, signed_in: Connection, alice: Connection
    ) -> None:
        for token in ("expired", "unknown", "", "HERS", "hers ", "%", "' OR true --", None):
            assert await alice.fetch(FIND, token, None) == []
        await signed_in.execute("UPDATE sessions SET expires_at = '-infinity'")
        assert await alice.fetch(FIND, "hers", None) == []

    async def test_gives_the_public_key_of_an_id(
        self, signed_in: Connection, alice: Connection
    ) -> None:
        del signed_in
        for key_id in ("current", "endless", "retired"):
            assert [tuple(row) for row in await alice.fetch(FIND, None, key_id)] == [
                (None, f"{key_id} key")
            ]

    async def test_gives_no_key_that_is_unknown_or_was_retired_more_than_30_days_ago(
        self, signed_in: Connection, alice: Connection
    ) -> None:
        del signed_in
        for key_id in ("forgotten", "unknown", "", "%", None):
            assert await alice.fetch(FIND, None, key_id) == []

    async def test_is_executable_by_the_app_role_only(
        self, signed_in: Connection, superuser: Connection
    ) -> None:
        await superuser.execute("CREATE ROLE frank")
        try:
            for role in ("frank", "todo_auth"):
                await superuser.execute(f"SET ROLE {role}")
                said = await denied(superuser, FIND, "hers", None)
                assert said == "permission denied for function find_credential"
                await superuser.execute("RESET ROLE")
        finally:
            await superuser.execute("RESET ROLE; DROP ROLE frank")
        del signed_in

    async def test_C2_reads_only_the_real_tables(
        self, signed_in: Connection, alice: Connection
    ) -> None:
        database = await signed_in.fetchval("SELECT current_database()")
        # With every grant that could interfere, as if made by mistake.
        await signed_in.execute(f"GRANT TEMPORARY, CREATE ON DATABASE {database} TO todo_app")
        await alice.execute("""
            CREATE TEMPORARY TABLE sessions (user_id text, token text, expires_at timestamptz);
            CREATE TEMPORARY TABLE jwks (id text, public_key text, expires_at timestamptz);
            INSERT INTO sessions VALUES ('bob', 'forged', 'infinity');
            INSERT INTO jwks VALUES ('forged', 'a key', NULL);
            CREATE SCHEMA evil;
            CREATE TABLE evil.sessions AS SELECT * FROM sessions;
            CREATE TABLE evil.jwks AS SELECT * FROM jwks;
            CREATE FUNCTION evil.now() RETURNS timestamptz LANGUAGE sql
                RETURN '-infinity'::timestamptz;
            CREATE FUNCTION evil.same(text, text) RETURNS boolean LANGUAGE sql RETURN true;
            CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.same);
            GRANT USAGE ON SCHEMA evil TO PUBLIC;
        """)
        find = FIND.replace("find_", "public.find_")
        for path in ("pg_temp, public", "evil, pg_temp, public, pg_catalog", "evil", "pg_temp"):
            await alice.execute(f"SET search_path = {path}")
            assert await alice.fetch(find, "forged", "forged") == []
            assert await alice.fetch(find, "expired", "forgotten") == []
            found = await alice.fetch(find, "hers", "current")
            assert [tuple(row) for row in found] == [("alice", None), (None, "current key")]

    async def test_is_not_fooled_by_a_plugins_column_of_an_arguments_name(
        self, signed_in: Connection, alice: Connection
    ) -> None:
        await signed_in.execute("""
            ALTER TABLE sessions ADD session_token text;
            ALTER TABLE jwks ADD key_id text;
            UPDATE sessions SET session_token = token;
            UPDATE jwks SET key_id = id
        """)
        assert await alice.fetch(FIND, "forged", "forged") == []
        assert [tuple(row) for row in await alice.fetch(FIND, "hers", None)] == [("alice", None)]

    async def test_D5_reads_by_the_indexes(self, signed_in: Connection) -> None:
        await signed_in.execute("""
            INSERT INTO sessions (user_id, token, expires_at)
            SELECT 'alice', 'token ' || n, now() + interval '1 day' FROM generate_series(1, 5000) n;
            INSERT INTO jwks (id, public_key, private_key)
            SELECT 'key ' || n, 'x', 'y' FROM generate_series(1, 5000) n;
            ANALYZE sessions, jwks
        """)
        body = await signed_in.fetchval(
            "SELECT prosrc FROM pg_proc WHERE oid = 'find_credential(text, text)'::regprocedure"
        )
        for number, argument in enumerate(("session_token", "key_id"), 1):
            body = body.replace(f"find_credential.{argument}", f"${number}")
        # A generic plan, as the server makes it for parameters.
        await signed_in.execute(
            f"""PREPARE found (text, text) AS
            {body};
            SET plan_cache_mode = force_generic_plan"""
        )
        plan = "\n".join(
            row[0] for row in await signed_in.fetch("EXPLAIN EXECUTE found ('hers', 'current')")
        )
        for index in ("uq_sessions_token", "pk_jwks"):
            assert f"Index Scan using {index}" in plan
        assert "Seq Scan" not in plan
