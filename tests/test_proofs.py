"""The proofs of `todo_db.testing` hold for what is sound, and name each planted mistake."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import pytest
from driver import Connection
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Identity,
    String,
    UniqueConstraint,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import CreateTable

from todo_db import ConfigurationError, Database, NotFoundError, Transaction
from todo_db.fastapi import CurrentUserId, Tasks, install, lifespan
from todo_db.fence import RULE, fence_of, fence_sql
from todo_db.models import Owned, Shared, Task, Timestamps, owned_reference
from todo_db.records import TaskRecord
from todo_db.testing import assert_fenced, assert_isolated, count_round_trips


class Base(DeclarativeBase):
    pass


class Currency(Shared, Base):
    __tablename__ = "currencies"

    code: Mapped[str] = mapped_column(String(3), primary_key=True)


class Account(Owned, Timestamps, Base):
    __tablename__ = "money_accounts"
    __table_args__ = (UniqueConstraint("user_id", "name"), CheckConstraint("balance >= 0"))

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    name: Mapped[str] = mapped_column(String(10))
    balance: Mapped[int]
    parent_id: Mapped[int | None] = owned_reference("money_accounts.id", ondelete="SET NULL")


class Payment(Owned, Base):
    __tablename__ = "payments"
    __table_args__ = (CheckConstraint("note <> '1'"),)

    account_id: Mapped[int] = owned_reference(Account.id, primary_key=True)
    task_id: Mapped[int] = owned_reference(Task.id, primary_key=True)
    note: Mapped[str | None]


MODELS = (Account, Payment)


def quoted(name: str) -> str:
    return postgresql.dialect().identifier_preparer.quote(name)  # type: ignore[no-untyped-call]


def plain(table: str, column: str, target: str) -> str:
    """Return what makes a foreign key one that does not carry the user."""
    return (
        f"DROP CONSTRAINT fk_{table}_user_id_{column}_{target},"
        f" ADD FOREIGN KEY ({column}) REFERENCES {target} (id)"
    )


@pytest.fixture
async def tables(owner: Connection) -> None:
    for model in MODELS:
        table = Base.metadata.tables[model.__tablename__]
        await owner.execute(str(CreateTable(table).compile(dialect=postgresql.dialect())))  # type: ignore[no-untyped-call]
        for statement in fence_sql(fence_of(table), quoted):
            await owner.execute(statement)


@pytest.fixture
def without_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the attacks can find something."""

    async def healthy(*_: object) -> None:
        pass

    monkeypatch.setattr("todo_db.testing.fenced._ask_the_doctor", healthy)


@pytest.mark.usefixtures("tables")
class TestAssertFenced:
    @pytest.mark.parametrize("model", [Account, Payment, Task])
    async def test_holds_for_a_sound_table(
        self, database: Database, model: type[DeclarativeBase]
    ) -> None:
        await assert_fenced(database, model)

    @pytest.mark.parametrize(
        ("model", "mistake", "message"),
        [
            (Account, "ALTER TABLE {} DISABLE ROW LEVEL SECURITY", r"money_accounts.*op\.fence"),
            (Account, "ALTER TABLE {} NO FORCE ROW LEVEL SECURITY", r"money_accounts.*op\.fence"),
            (Account, "DROP POLICY fence ON {}", r"money_accounts.*op\.fence"),
            (Account, "ALTER POLICY fence ON {} WITH CHECK (true)", r"money_accounts.*op\.fence"),
            (
                Account,
                "GRANT UPDATE (user_id) ON {} TO todo_app",
                r"UPDATE \(user_id\) on public\.money_accounts",
            ),
            (Account, "CREATE UNIQUE INDEX names ON {} (name)", "names"),
            (
                Payment,
                "ALTER TABLE {} ADD FOREIGN KEY (task_id) REFERENCES tasks (id)",
                "payments",
            ),
        ],
    )
    async def test_names_a_planted_mistake(
        self,
        database: Database,
        owner: Connection,
        model: type[DeclarativeBase],
        mistake: str,
        message: str,
    ) -> None:
        await owner.execute(mistake.format(model.__tablename__))
        with pytest.raises((AssertionError, ConfigurationError), match=message):
            await assert_fenced(database, model)

    @pytest.mark.usefixtures("without_doctor")
    @pytest.mark.parametrize(
        ("model", "mistake", "message"),
        [
            (Account, "DISABLE ROW LEVEL SECURITY", "SELECT reached a row of alice's"),
            (Account, "ADD CONSTRAINT one UNIQUE (name)", "INSERT of the same values"),
            (
                Payment,
                plain("payments", "task_id", "tasks"),
                "INSERT that refers to tasks",
            ),
            (
                Account,
                plain("money_accounts", "parent_id", "money_accounts"),
                "refers to money_accounts",
            ),
        ],
    )
    async def test_mallory_finds_a_planted_mistake(
        self,
        database: Database,
        owner: Connection,
        model: type[DeclarativeBase],
        mistake: str,
        message: str,
    ) -> None:
        await owner.execute(f"ALTER TABLE {model.__tablename__} {mistake}")
        with pytest.raises(AssertionError, match=message):
            await assert_fenced(database, model)

    @pytest.mark.usefixtures("without_doctor")
    @pytest.mark.parametrize(
        ("policies", "attack"),
        [
            (["SELECT USING (true)"], "SELECT reached"),
            (["SELECT USING (true)", "UPDATE USING (true)"], "reached"),
            (["SELECT USING (true)", "DELETE USING (true)"], "reached"),
            ([f"SELECT USING (user_id {RULE})", "INSERT WITH CHECK (true)"], "a row for alice"),
        ],
    )
    async def test_mallory_finds_a_policy_for_one_command(
        self,
        database: Database,
        owner: Connection,
        policies: list[str],
        attack: str,
    ) -> None:
        await owner.execute("DROP POLICY fence ON money_accounts")
        for number, policy in enumerate(policies):
            await owner.execute(f"CREATE POLICY more_{number} ON money_accounts FOR {policy}")
        with pytest.raises(AssertionError, match=attack):
            await assert_fenced(database, Account)

    async def test_takes_rows_that_the_caller_makes(self, database: Database) -> None:
        made: list[str] = []

        async def make(tx: Transaction) -> dict[str, Any]:
            made.append(tx.user_id)
            return {"name": f"{len(made)}", "balance": len(made)}

        await assert_fenced(database, Account, make=make)
        assert {"alice", "mallory"} == set(made)

    async def test_refuses_a_model_that_is_not_owned(self, database: Database) -> None:
        with pytest.raises(ConfigurationError, match="currencies is not owned"):
            await assert_fenced(database, Currency)


class Owner(BaseModel):
    owner: Annotated[str, Field(max_length=50)]
    title: str


class Ids(BaseModel):
    task_ids: list[int]


async def forgets_the_user(tasks: Tasks, user_id: CurrentUserId, task_id: int) -> TaskRecord:
    del user_id
    return await tasks.get("alice", task_id)


async def _missing(tasks: Tasks, user_id: str, task_id: int) -> bool | None:
    """Return None if the task is the user's, else whether it does not exist at all."""
    try:
        await tasks.get(user_id, task_id)
    except NotFoundError:
        try:
            await tasks.get("alice", task_id)
        except NotFoundError:
            return True
        return False
    return None


async def tells_by_status(tasks: Tasks, user_id: CurrentUserId, task_id: int) -> str:
    missing = await _missing(tasks, user_id, task_id)
    if missing is not None:
        raise HTTPException(404 if missing else 403)
    return "yours"


async def tells_by_body(tasks: Tasks, user_id: CurrentUserId, task_id: int) -> str:
    missing = await _missing(tasks, user_id, task_id)
    if missing is not None:
        raise HTTPException(404, "there is none" if missing else "it is not yours")
    return "yours"


async def tells_by_header(tasks: Tasks, user_id: CurrentUserId, task_id: int) -> str:
    missing = await _missing(tasks, user_id, task_id)
    if missing is not None:
        raise HTTPException(404, headers={} if missing else {"x-cache": "hit"})
    return "yours"


async def takes_the_user_from_the_body(tasks: Tasks, user_id: CurrentUserId, new: Owner) -> int:
    owner = new.owner if new.owner == "alice" else user_id
    return (await tasks.create(owner, new.title)).id


async def takes_ids_of_others(tasks: Tasks, user_id: CurrentUserId, chosen: Ids) -> int:
    await tasks.delete_many(user_id, chosen.task_ids)
    return await tasks.delete_many("alice", chosen.task_ids)


async def lists_all(tasks: Tasks, user_id: CurrentUserId) -> list[TaskRecord]:
    del user_id
    return list((await tasks.list("alice")).items)


async def never_answers() -> None:
    raise HTTPException(500)


async def has_another_id(label_id: int) -> int:
    return label_id


async def is_sound(tasks: Tasks, user_id: CurrentUserId, task_id: int) -> TaskRecord:
    return await tasks.get(user_id, task_id)


async def creates(tasks: Tasks, user_id: CurrentUserId, new: Owner) -> TaskRecord:
    return await tasks.create(user_id, new.title)


@pytest.fixture
def api(todo_database_url: str, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    monkeypatch.setenv("DATABASE_URL", todo_database_url)
    app = FastAPI(lifespan=lifespan())
    install(app)
    app.post("/tasks")(creates)
    return app


class TestAssertIsolated:
    async def test_holds_for_sound_routes(self, api: FastAPI) -> None:
        api.get("/tasks/{task_id}")(is_sound)
        await assert_isolated(api)

    async def test_leaves_the_application_as_it_was(self, api: FastAPI) -> None:
        await assert_isolated(api)
        assert api.dependency_overrides == {}

    @pytest.mark.parametrize(
        ("method", "path", "route", "message"),
        [
            ("GET", "/tasks/{task_id}", forgets_the_user, "shows mallory"),
            ("GET", "/tasks/{task_id}", tells_by_status, "403 to alice's task_id, and 404"),
            ("GET", "/tasks/{task_id}", tells_by_body, "another body"),
            ("GET", "/tasks/{task_id}", tells_by_header, "another header x-cache"),
            ("GET", "/one", forgets_the_user, "shows mallory"),
            ("POST", "/chosen", takes_the_user_from_the_body, "change what belongs to alice"),
            ("POST", "/removed", takes_ids_of_others, "change what belongs to alice"),
            ("GET", "/all", lists_all, "shows mallory what belongs to alice"),
            ("GET", "/never", never_answers, "not reached: alice gets 500"),
            ("GET", "/labels/{label_id}", has_another_id, "no POST operation returns a label_id"),
        ],
    )
    async def test_names_the_route_and_its_mistake(
        self,
        api: FastAPI,
        method: str,
        path: str,
        route: Callable[..., Awaitable[object]],
        message: str,
    ) -> None:
        api.get("/sound/{task_id}")(is_sound)
        api.add_api_route(path, route, methods=[method])
        with pytest.raises(AssertionError) as caught:
            await assert_isolated(api)
        for line in str(caught.value).splitlines():
            assert line.startswith(f"{method} {path}: ")
        assert message in str(caught.value)

    async def test_takes_ids_bodies_and_headers_of_the_caller(self, api: FastAPI) -> None:
        async def task(database: Database, user: str) -> int:
            return (await database.tasks.create(user, "x")).id

        async def by_number(tasks: Tasks, user_id: CurrentUserId, number: int) -> TaskRecord:
            return await tasks.get(user_id, number)

        api.get("/numbered/{number}")(by_number)
        await assert_isolated(
            api, ids={"number": task}, bodies={"POST /tasks": {"owner": "x", "title": "y"}}
        )

    async def test_does_not_call_what_is_to_be_skipped(self, api: FastAPI) -> None:
        api.get("/never")(never_answers)
        await assert_isolated(api, skip={"GET /never"})

    async def test_refuses_to_skip_what_is_not_there(self, api: FastAPI) -> None:
        with pytest.raises(AssertionError, match="GET /nowhere: there is no such operation"):
            await assert_isolated(api, skip={"GET /nowhere"})

    async def test_needs_the_lifespan(self) -> None:
        with pytest.raises(ConfigurationError, match="lifespan"):
            await assert_isolated(FastAPI())


class TestCountRoundTrips:
    async def test_counts_each_answer_of_the_server(self, database: Database) -> None:
        await database.tasks.count("alice")
        trips = (await database.health()).round_trips
        with count_round_trips() as once:
            await database.tasks.count("alice")
        with count_round_trips() as twice:
            await database.tasks.count("alice")
            await database.tasks.count("alice")
        assert (once.count, twice.count) == (trips, 2 * (trips or 0))

    async def test_counts_nothing_outside_its_block(self, database: Database) -> None:
        with count_round_trips() as trips:
            pass
        await database.tasks.count("alice")
        assert trips.count == 0
