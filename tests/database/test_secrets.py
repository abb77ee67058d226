"""Values of users and parts of the URL never appear in a log, an error or a repr.

Every field and every part of the URL contains one marker. `test_engine`, `test_settings` and
`test_url` test errors that occur before there is a connection.
"""

import asyncio
import base64
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from datetime import UTC, datetime
from inspect import Parameter, signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final
from urllib.parse import quote

import pytest
import pytest_asyncio
from cluster import Cluster
from driver import Connection
from locks import until_waiting
from proxy import BEGIN, COMMIT, STARTUP, Fault, Proxy
from sqlalchemy import make_url, text
from texts import spellings, texts_of

from todo_db import (
    CallTimeoutError,
    ConcurrentUseError,
    ConfigurationError,
    Database,
    EmailTakenError,
    IdempotencyKeyReusedError,
    InvalidInputError,
    IsolationError,
    NewTask,
    OutcomeUnknownError,
    PoolExhaustedError,
    SchemaError,
    Settings,
    StaleTaskError,
    TaskChanges,
    TaskNotFoundError,
    TaskRepository,
    TaskSort,
    TodoDBError,
    Transaction,
    TransactionAbortedError,
    TransactionError,
    UnavailableError,
    UserChanges,
    UserIdTakenError,
    UsernameTakenError,
    UserNotFoundError,
    UserRepository,
)
from todo_db.doctor import examine
from todo_db.embedded import OWNER, EmbeddedPostgres
from todo_db.engine import Pool, parse_url
from todo_db.migrations import upgrade

# In lower case, like e-mail addresses.
MARKER: Final = "hunter2zebra"
LOGIN: Final = f"login-{MARKER}"
DATABASE: Final = f"database-{MARKER}"
ALICE: Final = f"alice-{MARKER}"
BOB: Final = f"bob-{MARKER}"
NUL: Final = f"{MARKER}\x00"
SURROGATE: Final = f"{MARKER}\ud800"
LONG: Final = MARKER * 6_000
NO_RETRIES: Final = {"retry_attempts": 1, "pool_size": 1, "max_overflow": 0}

LOGGERS: Final = (
    *("", "alembic", "asyncio", "asyncpg", "sqlalchemy", "sqlalchemy.engine", "sqlalchemy.pool"),
    "todo_db",
)

type Arguments = dict[str, Any]


class Witness:
    """Records everything that is logged, warned about, printed and raised."""

    def __init__(
        self,
        log: pytest.LogCaptureFixture,
        output: pytest.CaptureFixture[str],
        warned: pytest.WarningsRecorder,
    ) -> None:
        self.errors: list[BaseException] = []
        self.shown: list[str] = []
        self._log = log
        self._output = output
        self._warned = warned

    async def failure[E: BaseException](self, kind: type[E], awaitable: Awaitable[object]) -> E:
        """Expect an error of this kind, and record it."""
        async with asyncio.timeout(20):
            with pytest.raises(kind) as caught:
                await awaitable
        self.errors.append(caught.value)
        return caught.value

    async def outcome(self, awaitable: Awaitable[object]) -> type[BaseException] | None:
        """Wait for a result or an error; return the class of the error."""
        ended = (await asyncio.gather(awaitable, return_exceptions=True))[0]
        if not isinstance(ended, BaseException):
            return None
        self.errors.append(ended)
        return type(ended)

    def leaks(self) -> list[str]:
        """Return everything recorded that contains the marker."""
        printed = self._output.readouterr()
        heard = [
            *self.shown,
            *(line for error in self.errors for line in texts_of(error)),
            *(f"{record.getMessage()} {vars(record)!r}" for record in self._log.records),
            self._log.text,
            *(f"{warning.message} {warning!r}" for warning in self._warned),
            printed.out,
            printed.err,
        ]
        return [line for line in heard if any(secret in line for secret in spellings(MARKER))]


@pytest.fixture
def witness(
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> Witness:
    for name in LOGGERS:
        caplog.set_level(logging.DEBUG, logger=name)
    return Witness(caplog, capfd, recwarn)


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run without the developer's .env and URL."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.delenv("DIRECT_DATABASE_URL", raising=False)


@pytest.fixture(scope="module")
def hba() -> Generator[Path]:
    """A pg_hba.conf that requires a password, in a file that any user may read."""
    with TemporaryDirectory(prefix="todo-") as folder:
        Path(folder).chmod(0o755)
        file = Path(folder, "hba")
        file.write_text(f'local all "{LOGIN}" scram-sha-256\nlocal all all trust\n')
        yield file


@pytest_asyncio.fixture(scope="module")
async def cluster(
    hba: Path,
    todo_postgres: EmbeddedPostgres,  # noqa: ARG001  # makes the wheel's files readable for all
) -> AsyncGenerator[Cluster]:
    """A server that requires a password for one login."""
    with Cluster(18, hba_file=hba) as cluster:
        await cluster.execute(
            f"CREATE ROLE {OWNER} LOGIN CREATEROLE BYPASSRLS",
            f'CREATE DATABASE "{DATABASE}" OWNER {OWNER}',
        )
        await upgrade(cluster.url(OWNER, DATABASE))
        await cluster.execute(f"CREATE ROLE \"{LOGIN}\" LOGIN IN ROLE todo_app PASSWORD '{MARKER}'")
        yield cluster


@pytest.fixture
def url(cluster: Cluster) -> Generator[str]:
    """A URL with the marker in its user, password, database, query and folder."""
    with TemporaryDirectory(prefix="todo-") as folder:
        place = Path(folder, MARKER)
        place.symlink_to(str(make_url(cluster.url(LOGIN, DATABASE)).query["host"]))
        yield (
            f"postgresql://{LOGIN}:{MARKER}@/{DATABASE}?host={quote(str(place))}"
            f"&application_name={MARKER}"
        )


def database(url: str, **settings: Any) -> Database:  # noqa: ANN401  # Settings checks them
    return Database.from_url(url, better_auth_secret=MARKER, **settings)


@pytest_asyncio.fixture
async def superuser(cluster: Cluster) -> AsyncGenerator[Connection]:
    connection = await cluster.connect(database=DATABASE)
    yield connection
    await connection.close()


@pytest_asyncio.fixture
async def db(url: str, superuser: Connection) -> AsyncGenerator[Database]:
    """A Database with alice and bob, and no other user."""
    async with database(url) as opened:
        await opened.users.create(ALICE, **user("alice"))
        await opened.users.create(BOB, **user("bob"))
        yield opened
    await superuser.execute("TRUNCATE users CASCADE")


def user(name: str) -> Arguments:
    return {
        "email": f"{name}-{MARKER}@example.org",
        "name": f"{name}, {MARKER}",
        "username": f"{name}.{MARKER}",
    }


def arguments(task_id: int, at: datetime | None = None, cursor: str | None = None) -> Arguments:
    """Return the arguments of each method after the user; deleting methods come last."""
    task: Arguments = {
        "title": f"title {MARKER}",
        "description": f"description {MARKER}",
        "completed": True,
    }
    found = {"completed": True, "search": MARKER}
    order = {"sort": TaskSort.TITLE}
    return {
        "tasks.create": task | {"idempotency_key": f"one {MARKER} {task_id}"},
        "tasks.create_many": {
            "tasks": [NewTask(**task), NewTask(MARKER)],
            "idempotency_key": f"many {MARKER} {task_id}",
        },
        "tasks.get": {"task_id": task_id},
        "tasks.list": found | order | {"limit": 1, "cursor": cursor},
        "tasks.iterate": found | order,
        "tasks.count": found,
        "tasks.update": {"task_id": task_id, "expected_updated_at": at} | task,
        "tasks.update_many": {"task_ids": [task_id]} | task,
        "tasks.toggle": {"task_id": task_id},
        "users.create": user("carol"),
        "users.ensure": {name: user("alice")[name] for name in ("email", "name")},
        "users.get": {},
        "users.set_email": {"email": user("alice")["email"]},
        "users.update": {name: user("alice")[name] for name in ("name", "username")}
        | {"image": f"https://example.org/{MARKER}.png"},
        "tasks.delete": {"task_id": task_id},
        "tasks.delete_many": {"task_ids": [task_id]},
        "tasks.delete_completed": {},
        "users.delete": {},
    }


METHODS: Final = tuple(arguments(0))


def method(name: str, executor: object) -> Callable[..., Any]:
    repository, _, call = name.partition(".")
    found: Callable[..., Any] = getattr(getattr(executor, repository), call)
    return found


async def call(executor: object, name: str, given: Arguments, *, user_id: str = ALICE) -> object:
    made = method(name, executor)
    taken = signature(made).parameters
    known = {key: value for key, value in given.items() if key in taken or "changes" in taken}
    first = [
        known.pop(key)
        for key, parameter in taken.items()
        if parameter.kind is Parameter.POSITIONAL_ONLY and key in known
    ]
    result = made(user_id, *first, **known)
    if isinstance(result, AsyncIterator):
        return [item async for item in result]
    return await result


class TestWitness:
    """The witness detects leaks; otherwise the other tests prove nothing."""

    @pytest.mark.parametrize(
        "said",
        [
            f"user {MARKER}",
            f"user {ALICE.encode().hex()}",
            base64.urlsafe_b64encode(f'["a{MARKER}", 1]'.encode()).decode(),
            base64.urlsafe_b64encode(f'["ab{MARKER}", 1]'.encode()).decode(),
            base64.urlsafe_b64encode(f'["abc{MARKER}", 1]'.encode()).decode(),
        ],
    )
    def test_knows_the_marker_in_any_writing(self, witness: Witness, said: str) -> None:
        logging.getLogger("todo_db.anything").debug("%s", said)
        assert witness.leaks()

    async def test_looks_behind_an_error(self, witness: Witness) -> None:
        async def hides() -> None:
            try:
                int(MARKER)
            except ValueError:
                raise KeyError from None

        await witness.failure(KeyError, hides())
        assert witness.leaks()

    def test_every_parameter_of_every_method_carries_it(self) -> None:
        repositories = {"tasks": TaskRepository, "users": UserRepository}
        assert set(METHODS) == {
            f"{name}.{public}"
            for name, repository in repositories.items()
            for public in vars(repository)
            if not public.startswith("_")
        }
        for name, given in arguments(0).items():
            repository, _, called = name.partition(".")
            parameters = set(signature(getattr(repositories[repository], called)).parameters)
            if "changes" in parameters:
                changes = TaskChanges if repository == "tasks" else UserChanges
                parameters |= changes.__annotations__.keys()
            assert parameters - {"self", "user_id", "changes"} <= given.keys()


class TestSuccess:
    async def test_of_every_method_is_silent(self, db: Database, witness: Witness) -> None:
        async def every(executor: Database | Transaction) -> None:
            task = await executor.tasks.create(ALICE, MARKER, completed=True)
            await executor.tasks.create(ALICE, f"{MARKER} again", completed=True)
            page = await executor.tasks.list(
                ALICE, completed=True, search=MARKER, sort=TaskSort.TITLE, limit=1
            )
            for name, given in arguments(task.id, task.updated_at, page.next_cursor).items():
                if name not in {"users.create", "users.delete"}:
                    await call(executor, name, given)

        async with db.transaction(ALICE) as tx:
            await every(tx)
        await every(db)
        await db.users.delete(ALICE)
        assert witness.leaks() == []

    async def test_of_own_statements_is_silent(self, db: Database, witness: Witness) -> None:
        async with db.transaction(ALICE) as tx:
            rows = await tx.execute(text("SELECT name, :note FROM users"), {"note": MARKER})
            assert MARKER in str(rows.all())
        assert witness.leaks() == []

    async def test_nothing_that_is_open_prints_it(
        self, db: Database, url: str, witness: Witness
    ) -> None:
        settings = Settings(database_url=url, direct_database_url=url, better_auth_secret=MARKER)
        pool = Pool(settings)
        connection = await pool.acquire()
        async with db.transaction(ALICE) as tx:
            await tx.tasks.count(ALICE, search=MARKER)
            things = (
                *(db, db.tasks, db.users, tx, tx.tasks, tx.users, db._preamble),
                *(settings, pool, connection, parse_url(url), pool.status, await db.health()),
            )
            witness.shown += [f"{thing} {thing!r}" for thing in things]
            witness.shown += [f"{settings.model_dump()} {settings.model_dump_json()}"]
            witness.shown += [repr(vars(thing)) for thing in (db, db.tasks, db.users, pool)]
        pool.release(connection)
        await pool.close()
        assert witness.leaks() == []


class TestRefusals:
    async def test_of_input_repeat_nothing(self, db: Database, witness: Witness) -> None:
        wrong: tuple[object, ...] = (NUL, SURROGATE, LONG, {MARKER: MARKER}, MARKER.encode())
        cases = [
            (name, field, value)
            for name, given in arguments(1).items()
            for field in given
            for value in wrong
        ]
        for name, field, value in cases:
            given = arguments(1)[name] | {field: value}
            if field == "description":
                given[field] = value * 10 if isinstance(value, str) and value == LONG else value
            await witness.outcome(call(db, name, given))
        for name in METHODS:
            for value in wrong:
                made = call(db, name, arguments(1)[name], user_id=value)  # type: ignore[arg-type]
                await witness.failure(InvalidInputError, made)
        await witness.failure(
            InvalidInputError,
            db.tasks.update(ALICE, 1, **{MARKER: MARKER}),  # type: ignore[arg-type]
        )
        await witness.failure(
            InvalidInputError, db.tasks.create_many(ALICE, [NewTask(MARKER), NewTask(NUL)])
        )
        kinds = {type(error) for error in witness.errors}
        assert kinds <= set(InvalidInputError.__subclasses__()) | {InvalidInputError}
        assert witness.leaks() == []

    async def test_of_the_server_repeat_nothing(
        self, db: Database, witness: Witness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With validation off, so that bad values reach the driver and the server."""
        monkeypatch.setattr("todo_db.inputs.text", lambda _field, value, _longest: value)
        monkeypatch.setattr("todo_db.inputs.not_blank", lambda _field, value: value)
        monkeypatch.setattr("todo_db.inputs.bigint", lambda _field, value: value)
        failed = 0
        for name, given in arguments(1).items():
            for field in given.keys() - {"sort", "cursor", "tasks", "expected_updated_at"}:
                for value in (NUL, SURROGATE, LONG, " ", 7.5, (MARKER,), {MARKER: MARKER}):
                    wrong = [value] if field == "task_ids" else value
                    failed += (
                        await witness.outcome(call(db, name, given | {field: wrong})) is not None
                    )
        for value in (NUL, SURROGATE, LONG, " "):
            many = {"tasks": [NewTask(MARKER), NewTask(value, MARKER)]}
            failed += await witness.outcome(call(db, "tasks.create_many", many)) is not None
        assert failed > 50
        assert witness.leaks() == []

    async def test_of_what_contradicts_repeat_nothing(self, db: Database, witness: Witness) -> None:
        key = f"key {MARKER}"
        task = await db.tasks.create(ALICE, MARKER, idempotency_key=key)
        stale = datetime(2020, 1, 1, tzinfo=UTC)
        carol = f"carol-{MARKER}"
        bobs = user("bob")
        cases: list[tuple[type[TodoDBError], Awaitable[object]]] = [
            (UserIdTakenError, db.users.create(ALICE, **user("carol"))),
            (EmailTakenError, db.users.create(carol, **user("carol") | {"email": bobs["email"]})),
            (
                UsernameTakenError,
                db.users.create(carol, **user("carol") | {"username": bobs["username"]}),
            ),
            (EmailTakenError, db.users.ensure(carol, email=bobs["email"], name=MARKER)),
            (UsernameTakenError, db.users.update(ALICE, username=bobs["username"])),
            (
                IdempotencyKeyReusedError,
                db.tasks.create(ALICE, f"another {MARKER}", idempotency_key=key),
            ),
            (
                IdempotencyKeyReusedError,
                db.tasks.create_many(ALICE, [NewTask(MARKER)], idempotency_key=key),
            ),
            (UserNotFoundError, db.users.get(carol)),
            (UserNotFoundError, db.users.delete(carol)),
            (UserNotFoundError, db.tasks.create(carol, MARKER)),
            (UserNotFoundError, db.tasks.create_many(carol, [NewTask(MARKER)])),
            (TaskNotFoundError, db.tasks.get(BOB, task.id)),
            (TaskNotFoundError, db.tasks.update(BOB, task.id, title=MARKER)),
            (TaskNotFoundError, db.tasks.toggle(BOB, task.id)),
            (TaskNotFoundError, db.tasks.delete(BOB, task.id)),
            (
                StaleTaskError,
                db.tasks.update(ALICE, task.id, expected_updated_at=stale, title=MARKER),
            ),
        ]
        for kind, awaitable in cases:
            await witness.failure(kind, awaitable)
        assert witness.leaks() == []

    async def test_of_a_transaction_repeat_nothing(self, db: Database, witness: Witness) -> None:
        async def foreign() -> None:
            async with db.transaction(ALICE) as tx:
                await tx.tasks.create(BOB, MARKER)

        async def aborted() -> None:
            async with db.transaction(ALICE) as tx:
                await witness.outcome(tx.users.create(ALICE, **user("alice")))
                await tx.tasks.create(ALICE, MARKER)

        async def at_once() -> None:
            async with db.transaction(ALICE) as tx:
                await asyncio.gather(tx.tasks.create(ALICE, MARKER), tx.users.get(ALICE))

        async def ended() -> None:
            async with db.transaction(ALICE) as tx:
                pass
            await tx.tasks.create(ALICE, MARKER)

        async def of_another_kind() -> None:
            async with db.transaction(ALICE) as tx:
                await tx.execute(text(f"COMMIT AND CHAIN -- {MARKER}"))

        async def read_only() -> None:
            async with db.transaction(ALICE, read_only=True) as tx:
                await tx.tasks.create(ALICE, MARKER)

        await witness.failure(IsolationError, foreign())
        await witness.failure(TodoDBError, aborted())
        await witness.failure(ConcurrentUseError, at_once())
        await witness.failure(TransactionError, ended())
        await witness.failure(TransactionError, of_another_kind())
        await witness.failure(TransactionError, read_only())
        assert TransactionAbortedError in {type(error) for error in witness.errors}
        assert witness.leaks() == []

    async def test_of_own_statements_hide_their_parameters(
        self, db: Database, witness: Witness
    ) -> None:
        async def divides() -> None:
            async with db.transaction(ALICE) as tx:
                await tx.execute(text("SELECT 1 / 0, :note"), {"note": MARKER})

        await witness.failure(Exception, divides())
        assert witness.leaks() == []


class TestFaults:
    """Faults during every method."""

    @pytest.mark.parametrize(
        ("pattern", "fault", "kind"),
        [
            (BEGIN, Fault.CUT_BEFORE, UnavailableError),
            (ALICE.encode(), Fault.CUT_BEFORE, UnavailableError),
            (ALICE.encode(), Fault.CUT_AFTER, UnavailableError),
            (COMMIT, Fault.CUT_BEFORE, OutcomeUnknownError),
            (ALICE.encode(), Fault.HANG, CallTimeoutError),
        ],
    )
    @pytest.mark.usefixtures("db")
    async def test_lost_connection(
        self,
        url: str,
        witness: Witness,
        pattern: bytes,
        fault: Fault,
        kind: type[TodoDBError],
    ) -> None:
        seen: set[type[BaseException] | None] = set()
        async with Proxy(url) as proxy:
            plain = make_url(proxy.url).difference_update_query(["application_name"])
            broken = plain.render_as_string(hide_password=False)
            settings = {
                "retry_attempts": 2,
                "command_timeout_seconds": 0.1,
                "connect_retry_seconds": 0,
            }
            # A slow server does not open it in this time; then the next call does.
            db = database(broken, **settings)
            for name, given in arguments(1).items():
                proxy.break_at(pattern, fault, times=2)
                seen.add(await witness.outcome(call(db, name, given)))
                # Remove a fault that a method did not trigger.
                proxy._planned.clear()
            await db.close()
        assert kind in seen
        assert all(one is None or issubclass(one, TodoDBError) for one in seen)
        assert witness.leaks() == []

    async def test_killed_backend(
        self, db: Database, superuser: Connection, witness: Witness
    ) -> None:
        async def kill() -> None:
            await until_waiting(superuser)
            await superuser.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted"
            )

        async with database_of(db, **NO_RETRIES) as impatient, superuser.transaction():
            await superuser.execute("LOCK TABLE users, tasks")
            for name, given in arguments(1).items():
                killed = asyncio.create_task(call(impatient, name, given))
                await kill()
                await witness.failure(UnavailableError, killed)
        assert witness.leaks() == []

    async def test_cancelled_call(
        self, db: Database, superuser: Connection, witness: Witness
    ) -> None:
        async with superuser.transaction():
            await superuser.execute("LOCK TABLE users, tasks")
            for name, given in arguments(1).items():
                cancelled = asyncio.create_task(call(db, name, given))
                await until_waiting(superuser)
                cancelled.cancel()
                await witness.failure(asyncio.CancelledError, cancelled)
        assert witness.leaks() == []

    @pytest.mark.parametrize(
        "hasty",
        [{"lock_timeout_seconds": 0.1}, {"statement_timeout_seconds": 0.25}],
        ids=["lock_timeout", "statement_timeout"],
    )
    async def test_timeout(
        self, db: Database, superuser: Connection, witness: Witness, hasty: dict[str, float]
    ) -> None:
        impatient = database_of(db, **NO_RETRIES, **hasty)
        async with superuser.transaction():
            await superuser.execute("LOCK TABLE users, tasks")
            for name, given in arguments(1).items():
                await witness.failure(CallTimeoutError, call(impatient, name, given))
        await impatient.close()
        assert witness.leaks() == []

    async def test_no_free_connection_and_closed_database(
        self, db: Database, witness: Witness
    ) -> None:
        async with (
            database_of(db, **NO_RETRIES, pool_timeout_seconds=0.01) as small,
            small.transaction(ALICE),
        ):
            for name, given in arguments(1).items():
                await witness.failure(PoolExhaustedError, call(small, name, given))
        for name, given in arguments(1).items():
            await witness.failure(ConfigurationError, call(small, name, given))
        assert witness.leaks() == []

    @pytest.mark.parametrize(
        ("away", "back"),
        [
            (
                "REVOKE USAGE ON SCHEMA public FROM PUBLIC, todo_app",
                "GRANT USAGE ON SCHEMA public TO PUBLIC, todo_app",
            ),
            (
                "ALTER TABLE users RENAME TO u; ALTER TABLE tasks RENAME TO t",
                "ALTER TABLE u RENAME TO users; ALTER TABLE t RENAME TO tasks",
            ),
        ],
    )
    async def test_tables_out_of_reach(
        self, db: Database, superuser: Connection, witness: Witness, away: str, back: str
    ) -> None:
        await superuser.execute(away)
        kinds = {
            await witness.outcome(call(db, name, given)) for name, given in arguments(1).items()
        }
        await superuser.execute(back)
        assert kinds <= {IsolationError, SchemaError}
        assert witness.leaks() == []


def database_of(db: Database, **settings: Any) -> Database:  # noqa: ANN401  # as for `database`
    """Return another Database on the same URL."""
    secret = db.settings.database_url
    assert secret is not None
    return database(secret.get_secret_value(), **settings)


class TestConnecting:
    @pytest.fixture
    def broken(self, url: str) -> Iterator[dict[str, str]]:
        """URLs that fail, each for another reason."""
        right = make_url(url)

        def text_of(**parts: Any) -> str:  # noqa: ANN401  # as SQLAlchemy has them
            return right.set(**parts).render_as_string(hide_password=False)

        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            place = f"{LOGIN}:{MARKER}@{{}}/{DATABASE}"
            yield {
                "wrong password": text_of(password=f"wrong-{MARKER}"),
                "unknown user": text_of(username=f"unknown-{MARKER}"),
                "wrong database": text_of(database=f"missing-{MARKER}"),
                "unknown host": f"postgresql://{place.format(f'{MARKER}.invalid')}",
                "unreachable port": f"postgresql://{place.format(f'127.0.0.1:{port}')}",
                "missing folder": str(text_of(query={"host": f"/{MARKER}"})),
                "refused option": text_of(query={**right.query, "options": f"-c {MARKER}=1"}),
                "missing authority": f"postgresql://{place.format('localhost')}"
                f"?sslmode=verify-full&sslrootcert=/{MARKER}",
            }

    async def test_failure_repeats_nothing(self, broken: dict[str, str], witness: Witness) -> None:
        for url in broken.values():
            settings = {"connect_retry_seconds": 0.2, "connect_timeout_seconds": 1}

            async def use(url: str = url, settings: Any = settings) -> None:  # noqa: ANN401  # as for `database`
                async with database(url, **settings) as db:
                    await db.open()

            async def first_call(url: str = url, settings: Any = settings) -> None:  # noqa: ANN401  # as for `database`
                await database(url, **settings).tasks.create(ALICE, MARKER)

            await witness.failure(TodoDBError, use())
            await witness.failure(TodoDBError, first_call())
            await witness.failure(TodoDBError, examine(Settings(database_url=url, **settings)))
        assert witness.leaks() == []

    async def test_failure_of_migrations_repeats_nothing(
        self, broken: dict[str, str], witness: Witness
    ) -> None:
        for url in broken.values():
            await witness.failure(Exception, upgrade(url))
        assert witness.leaks() == []

    async def test_migrations_repeat_nothing(self, cluster: Cluster, witness: Witness) -> None:
        await cluster.create_database(f'"fresh-{MARKER}"')
        url = make_url(cluster.url(OWNER, f"fresh-{MARKER}")).set(password=MARKER)
        await upgrade(url.render_as_string(hide_password=False))
        assert witness.leaks() == []

    async def test_lost_half_way_repeats_nothing(self, url: str, witness: Witness) -> None:
        async with Proxy(url) as proxy:
            plain = make_url(proxy.url).difference_update_query(["application_name"])
            broken = plain.render_as_string(hide_password=False)
            for fault in (Fault.CUT_BEFORE, Fault.CUT_AFTER, Fault.HANG):
                proxy.break_at(STARTUP, fault, times=99)
                db = database(broken, connect_retry_seconds=0.1, connect_timeout_seconds=0.1)
                await witness.failure(UnavailableError, db.open())
                proxy._planned.clear()
        assert witness.leaks() == []
