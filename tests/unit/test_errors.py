"""The error classes, and the translation of driver errors."""

import copy
import pickle
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator

import asyncpg
import pytest
from driver import Connection
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

import todo_db
from todo_db import (
    CallTimeoutError,
    ConfigurationError,
    ConflictError,
    Database,
    EmailTakenError,
    InvalidCursorError,
    InvalidInputError,
    IsolationError,
    OutcomeUnknownError,
    SchemaError,
    TaskNotFoundError,
    TodoDBError,
    TransactionAbortedError,
    TransactionError,
    UnavailableError,
    UserIdTakenError,
    UsernameTakenError,
    UserNotFoundError,
    errors,
)
from todo_db.errors import translated

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, TodoDBError)
}
# The errors that are raised without a field.
PLAIN = [name for name, value in CLASSES.items() if not issubclass(value, InvalidInputError)]
SQLSTATES = {
    value.sqlstate: value
    for value in vars(asyncpg.exceptions).values()
    if isinstance(value, type)
    and issubclass(value, asyncpg.PostgresError)
    and isinstance(value.sqlstate, str)
}


def drawn() -> Iterator[tuple[str, list[str]]]:
    """Return the tree in the module's docstring: each class, and its bases."""
    root, *lines = (errors.__doc__ or "").split("```")[1].strip().splitlines()
    yield root, ["Exception"]
    above = [root]
    for line in lines:
        indent, _, rest = line.partition("── ")
        depth = (len(indent) - 1) // 4 + 1
        for part in re.split(r"\s{2,}", rest):
            if found := re.match(r"(\w+Error)\b(?: \((\w+)\))?", part):
                name, base = found.groups()
                yield name, [above[depth - 1], *([base] if base else [])]
                above[depth:] = [name]


def driver_error(
    sqlstate: str, *, constraint: str | None = None, cause: BaseException | None = None
) -> asyncpg.PostgresError:
    error = SQLSTATES[sqlstate]("Key (email)=(swordfish) is there")
    error.detail = "Failing row contains (swordfish)"
    error.constraint_name = constraint
    error.__cause__ = cause
    return error


def instances() -> Iterator[TodoDBError]:
    yield from (make() for make in errors._BY_CONSTRAINT.values())
    yield from (make() for make in errors._BY_SQLSTATE.values())
    for make in CLASSES.values():
        yield InvalidInputError("title", "must") if make is InvalidInputError else make()
    yield TodoDBError("of its own")
    yield UnavailableError("of its own", retry_after=7.0, transient=True)
    yield InvalidCursorError()


class TestTree:
    def test_is_drawn_in_the_docstring(self) -> None:
        tree = dict(drawn())
        assert len(tree) == len(list(drawn()))
        assert tree == {
            name: [base.__name__ for base in value.__bases__] for name, value in CLASSES.items()
        }

    @pytest.mark.parametrize("name", CLASSES)
    def test_every_class_is_exported(self, name: str) -> None:
        assert name in todo_db.__all__
        assert getattr(todo_db, name) is CLASSES[name]

    def test_invalid_input_is_a_value_error(self) -> None:
        assert issubclass(InvalidCursorError, ValueError)

    def test_only_the_unknown_outcome_is_not_known(self) -> None:
        assert not issubclass(OutcomeUnknownError, UnavailableError)


class TestMessage:
    @pytest.mark.parametrize("name", PLAIN)
    def test_is_a_sentence_of_its_own(self, name: str) -> None:
        error = CLASSES[name]()
        assert error.args == ()
        assert str(error) == vars(CLASSES[name])["message"]
        assert str(error)[-1] in ".`"

    def test_E13_does_not_need_docstrings(self) -> None:
        code = "from todo_db import TaskNotFoundError; print(TaskNotFoundError())"
        done = subprocess.run(
            [sys.executable, "-OO", "-c", code], check=True, capture_output=True, text=True
        )
        assert done.stdout.strip() == TaskNotFoundError.message

    @pytest.mark.parametrize("name", PLAIN)
    def test_can_be_given(self, name: str) -> None:
        assert str(CLASSES[name]("a sentence")) == "a sentence"

    def test_of_invalid_input_names_the_field(self) -> None:
        error = InvalidInputError("title", "must not be blank")
        assert str(error) == "title: must not be blank"
        assert (error.field, error.requirement) == ("title", "must not be blank")

    def test_of_a_bad_cursor_names_the_cursor(self) -> None:
        assert InvalidCursorError().field == "cursor"
        assert str(InvalidCursorError()).startswith("cursor: ")

    def test_of_unavailable_has_a_retry_after(self) -> None:
        assert UnavailableError().retry_after == 1.0
        assert not UnavailableError().transient
        assert UnavailableError(retry_after=7.0, transient=True).retry_after == 7.0


class TestCopies:
    def test_are_like_the_original(self) -> None:
        for error in instances():
            pickled = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own bytes
            for twin in (pickled, copy.copy(error), copy.deepcopy(error)):
                assert type(twin) is type(error)
                assert (str(twin), twin.args, vars(twin)) == (str(error), error.args, vars(error))


class TestTranslated:
    @pytest.mark.parametrize(
        ("sqlstate", "expected", "transient"),
        [
            ("08000", UnavailableError, True),
            ("08003", UnavailableError, True),
            ("08006", UnavailableError, True),
            ("23505", ConflictError, None),
            ("25006", TransactionError, None),
            ("25P02", TransactionAbortedError, None),
            ("25P03", UnavailableError, False),
            ("28000", ConfigurationError, None),
            ("28P01", ConfigurationError, None),
            ("3D000", ConfigurationError, None),
            ("40001", UnavailableError, True),
            ("40P01", UnavailableError, True),
            ("42501", IsolationError, None),
            ("42703", SchemaError, None),
            ("42P01", SchemaError, None),
            ("53000", UnavailableError, False),
            ("53100", UnavailableError, False),
            ("53200", UnavailableError, False),
            ("53300", UnavailableError, True),
            ("55P03", CallTimeoutError, True),
            ("57014", CallTimeoutError, False),
            ("57P01", UnavailableError, True),
            ("57P02", UnavailableError, True),
            ("57P03", UnavailableError, True),
            ("22001", InvalidInputError, None),
            ("42601", TodoDBError, None),
        ],
    )
    def test_sqlstate(self, sqlstate: str, expected: type[TodoDBError], transient: object) -> None:
        error = translated(driver_error(sqlstate))
        assert type(error) is expected
        assert getattr(error, "transient", None) is transient

    def test_F19_transaction_timeout_is_unavailable(self) -> None:
        cause = driver_error("25P04")
        assert isinstance(translated(driver_error("08003", cause=cause)), UnavailableError)

    def test_a_shortage_has_a_longer_retry_after(self) -> None:
        error = translated(driver_error("53100"))
        assert isinstance(error, UnavailableError)
        assert error.retry_after > UnavailableError().retry_after

    @pytest.mark.parametrize(
        ("constraint", "expected"),
        [
            ("pk_users", UserIdTakenError()),
            ("uq_users_email", EmailTakenError()),
            ("uq_users_username", UsernameTakenError()),
            ("fk_tasks_user_id_users", UserNotFoundError()),
        ],
    )
    def test_constraint(self, constraint: str, expected: TodoDBError) -> None:
        error = translated(driver_error("23505", constraint=constraint))
        assert type(error) is type(expected)
        assert str(error) == str(expected)

    def test_an_unknown_constraint_is_mapped_by_its_sqlstate(self) -> None:
        error = translated(driver_error("23505", constraint="uq_swordfish"))
        assert type(error) is ConflictError
        assert "swordfish" not in str(error)

    def test_Z6_the_innermost_server_error_counts(self) -> None:
        shutdown = driver_error("57P01")
        middle = asyncpg.InterfaceError("the connection is closed")
        middle.__cause__ = shutdown
        lost = driver_error("08003", cause=middle)
        assert str(translated(lost)) == str(translated(shutdown))
        assert str(translated(lost)) != str(translated(driver_error("08003")))

    def test_a_constraint_counts_behind_a_lost_connection(self) -> None:
        cause = driver_error("23505", constraint="uq_users_email")
        assert type(translated(driver_error("08003", cause=cause))) is EmailTakenError

    def test_a_context_is_not_a_cause(self) -> None:
        error = driver_error("40001")
        error.__context__ = driver_error("28P01")
        assert type(translated(error)) is UnavailableError

    def test_an_error_of_the_tree_is_itself(self) -> None:
        error = TaskNotFoundError()
        assert translated(error) is error

    def test_A7_a_timeout_of_the_client(self) -> None:
        assert type(translated(TimeoutError("swordfish"))) is CallTimeoutError

    @pytest.mark.parametrize("kind", [ConnectionRefusedError, ConnectionResetError, OSError])
    def test_F10_an_error_of_the_network(self, kind: type[OSError]) -> None:
        error = translated(kind(111, "swordfish"))
        assert type(error) is UnavailableError
        assert error.transient
        assert "swordfish" not in f"{error!r}"

    def test_T3_a_bad_certificate_is_permanent(self) -> None:
        error = translated(ssl.SSLCertVerificationError(1, "swordfish"))
        assert type(error) is ConfigurationError

    def test_F32_an_unknown_host_is_permanent_and_a_busy_name_server_is_not(self) -> None:
        unknown = translated(socket.gaierror(socket.EAI_NONAME, "swordfish"))
        assert type(unknown) is ConfigurationError
        busy = translated(socket.gaierror(socket.EAI_AGAIN, "swordfish"))
        assert isinstance(busy, UnavailableError)
        assert busy.transient

    def test_anything_else_is_named_by_its_class_only(self) -> None:
        error = translated(asyncpg.InterfaceError("swordfish"))
        assert type(error) is TodoDBError
        assert str(error) == "the driver failed with InterfaceError"

    @pytest.mark.parametrize("constraint", [None, "uq_users_email", "ck_labels_name"])
    def test_L1_contains_no_value_for_any_sqlstate(self, constraint: str | None) -> None:
        assert len(SQLSTATES) > 200
        for sqlstate in SQLSTATES:
            error = translated(driver_error(sqlstate, constraint=constraint))
            assert "swordfish" not in f"{error} {error!r} {error.args} {vars(error)}"
            assert error.__cause__ is None

    def test_every_mapped_sqlstate_is_one_of_postgresql(self) -> None:
        for mapped in errors._BY_SQLSTATE:
            assert any(sqlstate.startswith(mapped) for sqlstate in SQLSTATES), mapped


def _keys(user_id: str, key: str, *, number: int = 1) -> str:
    return (
        "INSERT INTO idempotency_keys (user_id, key, fingerprint, task_ids)"
        f" SELECT '{user_id}', {key}, repeat('0', 64), '{{}}' FROM generate_series(1, {number})"
    )


# Statements of the owner, to which neither grants nor policies apply.
VIOLATIONS = {
    "pk_users": "INSERT INTO users (id, email) VALUES ('swordfish', 'bob@example.org')",
    "uq_users_email": "INSERT INTO users (email) VALUES ('swordfish@example.org')",
    "uq_users_username": (
        "INSERT INTO users (email, username) VALUES ('bob@example.org', 'swordfish')"
    ),
    "ck_users_id_length": "INSERT INTO users (id, email) VALUES ('', 'swordfish')",
    "ck_users_email_lower": "INSERT INTO users (email) VALUES ('Swordfish@example.org')",
    "ck_users_timestamps_range": (
        "INSERT INTO users (email, created_at) VALUES ('swordfish', 'infinity')"
    ),
    "fk_tasks_user_id_users": "INSERT INTO tasks (user_id, title) VALUES ('swordfish 2', 'x')",
    "ck_tasks_title_not_blank": (
        "INSERT INTO tasks (user_id, title, description) VALUES ('swordfish', E'\\t\\n', 'x')"
    ),
    "ck_tasks_description_length": (
        "INSERT INTO tasks (user_id, title, description)"
        " VALUES ('swordfish', 'x', repeat('swordfish', 8000))"
    ),
    "ck_tasks_timestamps_range": (
        "INSERT INTO tasks (user_id, title, created_at) VALUES ('swordfish', 'x', '0044-03-15 BC')"
    ),
    "pk_idempotency_keys": _keys("swordfish", "'swordfish'", number=2),
    "fk_idempotency_keys_user_id_users": _keys("swordfish 2", "'x'"),
    "ck_idempotency_keys_key_length": _keys("swordfish", "repeat('swordfish', 29)"),
    "ck_idempotency_keys_timestamps_range": (
        "INSERT INTO idempotency_keys (user_id, key, fingerprint, task_ids, created_at)"
        " VALUES ('swordfish', 'x', repeat('0', 64), '{}', '0044-03-15 BC')"
    ),
}
FIELDS = {
    "ck_users_id_length": "user_id",
    "ck_users_email_lower": "email",
    "ck_users_timestamps_range": "created_at",
    "ck_tasks_title_not_blank": "title",
    "ck_tasks_description_length": "description",
    "ck_tasks_timestamps_range": "created_at",
    "ck_idempotency_keys_key_length": "idempotency_key",
    "ck_idempotency_keys_timestamps_range": "created_at",
}


class TestConstraints:
    async def test_are_all_mapped_but_those_that_cannot_be_violated(
        self, owner: Connection
    ) -> None:
        found = await owner.fetch("""
            SELECT conname FROM pg_constraint
            WHERE conrelid::regclass::text IN ('users', 'tasks', 'idempotency_keys')
                AND contype IN ('c', 'u', 'p', 'f', 'x')
        """)
        # No caller chooses a task id, and every SHA-256 has the same length.
        unmapped = {"pk_tasks", "ck_idempotency_keys_fingerprint_length"}
        assert {name for (name,) in found} == errors._BY_CONSTRAINT.keys() | unmapped
        assert errors._BY_CONSTRAINT.keys().isdisjoint(unmapped)

    async def test_I110_each_one_is_mapped_from_a_real_violation(
        self, database: Database, owner: Connection
    ) -> None:
        assert VIOLATIONS.keys() == errors._BY_CONSTRAINT.keys()
        await database.users.create(
            "swordfish", email="swordfish@example.org", name="", username="swordfish"
        )
        for constraint, sql in VIOLATIONS.items():
            with pytest.raises(asyncpg.IntegrityConstraintViolationError) as caught:
                await owner.execute(sql)
            assert caught.value.constraint_name == constraint
            assert "swordfish" in f"{caught.value} {caught.value.detail}".lower()
            error = translated(caught.value)
            assert type(error) is type(errors._BY_CONSTRAINT[constraint]())
            assert getattr(error, "field", None) == FIELDS.get(constraint)
            assert "swordfish" not in f"{error} {error!r} {error.args}".lower()

    async def test_are_mapped_behind_sqlalchemys_errors_too(self, db: Database) -> None:
        statements = {
            "INSERT INTO users (id, email) VALUES ('alice', 'x@example.org')": UserIdTakenError,
            "UPDATE users SET username = 'bob' WHERE id = 'alice'": UsernameTakenError,
            "INSERT INTO tasks (user_id, title) VALUES ('alice', ' ')": InvalidInputError,
            "INSERT INTO tasks (user_id, title) VALUES ('bob', 'x')": IsolationError,
            "DELETE FROM todo_db_version": IsolationError,
            "SELECT nothing FROM tasks": SchemaError,
            "SELECT 1 FROM nothing": SchemaError,
        }
        await db.users.update("bob", username="bob")
        for sql, expected in statements.items():
            # What is wrong with the text of a statement stays SQLAlchemy's error.
            with pytest.raises(DBAPIError if expected is SchemaError else expected) as caught:
                async with db.transaction("alice") as tx:
                    await tx.execute(text(sql))
            assert type(translated(caught.value)) is expected, sql

    async def test_a_message_describes_the_constraint_as_it_is(self, owner: Connection) -> None:
        for constraint, number in (
            ("ck_tasks_description_length", "65536"),
            ("ck_users_id_length", "255"),
            ("ck_idempotency_keys_key_length", "255"),
            ("ck_users_timestamps_range", "0001-01-02"),
            ("ck_tasks_timestamps_range", "0001-01-02"),
            ("ck_idempotency_keys_timestamps_range", "0001-01-02"),
        ):
            definition = await owner.fetchval(
                "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = $1", constraint
            )
            assert number in definition
            assert number in str(errors._BY_CONSTRAINT[constraint]())
