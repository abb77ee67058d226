"""The proofs of `todo_db.testing` hold for what is sound, and name each planted mistake."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from secrets import token_hex, token_urlsafe
from typing import Annotated, Any, Final
from uuid import UUID

import pytest
from driver import Connection
from fastapi import FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.staticfiles import StaticFiles
from leaks import leaking, sound
from pydantic import BaseModel, Field
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Enum,
    ForeignKey,
    Identity,
    String,
    UniqueConstraint,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import INET, JSONB, TSVECTOR
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import CreateTable
from sqlalchemy.types import TypeEngine

from todo_db import ConfigurationError, Database, NotFoundError, Transaction
from todo_db.fastapi import (
    CurrentUserId,
    PathUserId,
    Tasks,
    current_user_id,
    install,
    lifespan,
)
from todo_db.fence import RULE, FenceOptions, fence_of, fence_sql, kind_of, share_sql
from todo_db.models import Owned, Shared, Task, Timestamps, owned_reference
from todo_db.records import TaskRecord
from todo_db.testing import assert_fenced, assert_isolated, count_round_trips
from todo_db.testing.answers import Answer, differences
from todo_db.testing.fenced import _value
from todo_db.testing.isolated import _missing
from todo_db.testing.openapi import Document

type Route = Callable[..., Awaitable[object]]


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


class Event(Owned, Base):
    """What happened: it is added, and neither changed nor deleted."""

    __tablename__ = "events"
    __fence__ = FenceOptions(update=[], delete=False)

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    account_id: Mapped[int | None] = owned_reference(Account.id, ondelete="SET NULL")
    currency: Mapped[str] = mapped_column(ForeignKey(Currency.code))


MODELS = (Currency, Account, Payment, Event)


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
        is_owned = kind_of(table) == "owned"
        for statement in (
            fence_sql(fence_of(table), quoted)
            if is_owned
            else share_sql(table.name, table.schema, quoted)
        ):
            await owner.execute(statement)
    await owner.execute("INSERT INTO currencies VALUES ('EUR')")


@pytest.fixture
def without_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the attacks can find something."""

    async def healthy(*_: object) -> None:
        pass

    monkeypatch.setattr("todo_db.testing.fenced._ask_the_doctor", healthy)


@pytest.mark.usefixtures("tables")
class TestAssertFenced:
    @pytest.mark.parametrize("model", [Account, Payment, Event, Task])
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

    async def test_asks_for_a_row_where_a_check_refuses_the_made_up_one(
        self, database: Database, owner: Connection
    ) -> None:
        await owner.execute("ALTER TABLE money_accounts ADD CONSTRAINT rich CHECK (balance < 0)")
        with pytest.raises(ConfigurationError, match=r"money_accounts: .*rich.*give make="):
            await assert_fenced(database, Account)

    async def test_leaves_out_a_reference_that_the_caller_leaves_out(
        self, database: Database
    ) -> None:
        async def make(tx: Transaction) -> dict[str, Any]:
            del tx
            return {"currency": "EUR"}

        await assert_fenced(database, Event, make=make)

    @pytest.mark.parametrize(
        ("kind", "value"), [(Enum("small", "large"), "small"), (Boolean(), False), (JSONB(), {})]
    )
    def test_makes_up_a_value_for_a_type(self, kind: TypeEngine[Any], value: object) -> None:
        assert _value(Column("size", kind)) == value

    @pytest.mark.parametrize("kind", [INET(), TSVECTOR()], ids=["INET", "TSVECTOR"])
    def test_asks_for_the_value_of_an_unknown_type(self, kind: TypeEngine[Any]) -> None:
        with pytest.raises(ConfigurationError, match="give make="):
            _value(Column("address", kind))

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


async def is_missing(tasks: Tasks, user_id: str, task_id: int) -> bool | None:
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
    missing = await is_missing(tasks, user_id, task_id)
    if missing is not None:
        raise HTTPException(404 if missing else 403)
    return "yours"


async def tells_by_body(tasks: Tasks, user_id: CurrentUserId, task_id: int) -> str:
    missing = await is_missing(tasks, user_id, task_id)
    if missing is not None:
        raise HTTPException(404, "there is none" if missing else "it is not yours")
    return "yours"


async def tells_by_header(tasks: Tasks, user_id: CurrentUserId, task_id: int) -> str:
    missing = await is_missing(tasks, user_id, task_id)
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


async def counts_all(tasks: Tasks, user_id: CurrentUserId) -> int:
    del user_id
    return await tasks.count("alice")


async def has_the_time(user_id: CurrentUserId) -> str:
    return f"{user_id} at {time.perf_counter()}"


async def clears(tasks: Tasks, user_id: CurrentUserId) -> None:
    await tasks.delete_completed(user_id)


async def never_answers() -> None:
    raise HTTPException(500)


async def has_another_id(label_id: int) -> int:
    return label_id


async def tells_another_reason_each_time(task_id: int) -> str:
    raise HTTPException(404, f"{task_id} at {token_hex()}")


async def returns_no_object() -> int:
    return 1


async def has_the_user_in_its_path(user_id: PathUserId) -> str:
    return user_id


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
            ("GET", "/count", counts_all, "shows mallory that alice stored something"),
            ("GET", "/never", never_answers, "not reached: alice gets 500"),
            ("GET", "/tasks/{task_id}", tells_another_reason_each_time, "alice gets 404"),
            ("GET", "/labels/{label_id}", has_another_id, "no POST operation returns a label_id"),
            ("POST", "/labels/{label_id}", has_another_id, "no POST operation returns a label_id"),
        ],
    )
    async def test_names_the_route_and_its_mistake(
        self,
        api: FastAPI,
        method: str,
        path: str,
        route: Route,
        message: str,
    ) -> None:
        api.get("/sound/{task_id}")(is_sound)
        api.add_api_route(path, route, methods=[method])
        with pytest.raises(AssertionError) as caught:
            await assert_isolated(api)
        for line in str(caught.value).splitlines():
            assert line.startswith(f"{method} {path}: ")
        assert message in str(caught.value)

    @pytest.mark.parametrize("route", [lists_all, counts_all])
    async def test_finds_a_route_that_stands_before_the_one_that_stores(
        self, todo_database_url: str, monkeypatch: pytest.MonkeyPatch, route: Route
    ) -> None:
        monkeypatch.setenv("DATABASE_URL", todo_database_url)
        app = FastAPI(lifespan=lifespan())
        install(app)
        app.get("/all")(route)
        app.post("/tasks")(creates)
        with pytest.raises(AssertionError, match=r"^GET /all: shows mallory"):
            await assert_isolated(app)

    async def test_names_each_route_that_leaks(self, api: FastAPI) -> None:
        api.include_router(leaking)
        with pytest.raises(AssertionError) as caught:
            await assert_isolated(api)
        lines = str(caught.value).splitlines()
        assert {line.partition(": ")[0] for line in lines} == {
            operation.name
            for operation in Document(api.openapi(), {}).operations
            if operation.path.startswith("/leaking/") and operation.name != "POST /leaking/tasks"
        }
        assert "not reached" not in str(caught.value)
        assert len(lines) == len(set(lines))

    async def test_accuses_no_sound_route(self, api: FastAPI) -> None:
        api.include_router(sound)
        await assert_isolated(api, bodies={"POST /sound/plain": "plain"})

    async def test_names_what_is_not_in_the_document(self, api: FastAPI) -> None:
        async def live(socket: WebSocket) -> None:
            await socket.close()

        api.get("/hidden", include_in_schema=False)(lists_all)
        api.websocket("/live")(live)
        api.mount("/admin", FastAPI())
        api.mount("/static", StaticFiles(directory="."))
        with pytest.raises(AssertionError) as caught:
            await assert_isolated(api)
        hidden = ["GET /hidden", "MOUNT /admin", "WEBSOCKET /live"]
        lines = str(caught.value).splitlines()
        assert [line.partition(": not reached: it is not in")[0] for line in lines] == hidden
        await assert_isolated(api, skip=hidden)

    async def test_does_not_wait_for_an_answer_without_an_end(
        self, api: FastAPI, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def events() -> StreamingResponse:
            async def ticks() -> AsyncIterator[str]:
                while True:
                    yield "data: 1\n\n"
                    await asyncio.sleep(1)

            return StreamingResponse(ticks(), media_type="text/event-stream")

        monkeypatch.setattr("todo_db.testing.client._PATIENCE_SECONDS", 0.5)
        api.get("/events")(events)
        with pytest.raises(AssertionError, match=r"^GET /events: not reached: .* name it in skip="):
            await assert_isolated(api)

    async def test_member_of_a_given_body_replaces_one_that_is_made_up(self, api: FastAPI) -> None:
        class Painted(BaseModel):
            color: Annotated[str, Field(pattern="^#[0-9a-f]{6}$")]
            task_id: int

        async def paint(tasks: Tasks, user_id: CurrentUserId, painted: Painted) -> str:
            return f"{user_id} {painted.color} {await is_missing(tasks, user_id, painted.task_id)}"

        api.post("/painted")(paint)
        with pytest.raises(AssertionError, match=r"alice gets 422 .* give ids=, bodies="):
            await assert_isolated(api)
        with pytest.raises(AssertionError, match="POST /painted: has another body for alice's"):
            await assert_isolated(api, bodies={"POST /painted": {"color": "#ff0000"}})

    async def test_makes_what_is_inside_of_what_it_made(self, api: FastAPI) -> None:
        async def creates_inside(tasks: Tasks, user_id: CurrentUserId, task_id: int) -> TaskRecord:
            return await tasks.create(user_id, f"of {(await tasks.get(user_id, task_id)).id}")

        async def is_inside(
            tasks: Tasks, user_id: CurrentUserId, task_id: int, note_id: int
        ) -> TaskRecord:
            await tasks.get(user_id, task_id)
            return await tasks.get(user_id, note_id)

        api.post("/tasks/{task_id}/notes")(creates_inside)
        api.get("/tasks/{task_id}/notes/{note_id}")(is_inside)
        await assert_isolated(api)

    async def test_names_routes_that_need_an_id_of_each_other(self, api: FastAPI) -> None:
        async def make(database: Database, user: str) -> int:
            return (await database.tasks.create(user, "x")).id

        class Note(BaseModel):
            label_id: int

        class Label(BaseModel):
            note_id: int

        async def creates_note(tasks: Tasks, user_id: CurrentUserId, new: Note) -> TaskRecord:
            return await tasks.create(user_id, f"{(await tasks.get(user_id, new.label_id)).id}")

        async def creates_label(tasks: Tasks, user_id: CurrentUserId, new: Label) -> TaskRecord:
            return await tasks.create(user_id, f"{(await tasks.get(user_id, new.note_id)).id}")

        api.post("/notes")(creates_note)
        api.post("/labels")(creates_label)
        with pytest.raises(AssertionError) as caught:
            await assert_isolated(api)
        said = "not reached: {} and {} need an id of each other: give ids= for one of them"
        notes, labels = "POST /notes", "POST /labels"
        assert str(caught.value).splitlines() == [
            f"{notes}: {said.format(notes, labels)}",
            f"{labels}: {said.format(labels, notes)}",
        ]
        await assert_isolated(api, ids={"label_id": make})

    async def test_allows_an_answer_that_changes_by_itself(self, api: FastAPI) -> None:
        api.get("/time")(has_the_time)
        await assert_isolated(api)

    async def test_allows_a_POST_without_an_answer(self, api: FastAPI) -> None:
        api.post("/cleared", status_code=204)(clears)
        await assert_isolated(api)

    async def test_takes_ids_and_bodies_of_the_caller(self, api: FastAPI) -> None:
        async def task(database: Database, user: str) -> int:
            return (await database.tasks.create(user, "x")).id

        async def by_number(tasks: Tasks, user_id: CurrentUserId, number: int) -> TaskRecord:
            return await tasks.get(user_id, number)

        async def only_red(user_id: CurrentUserId, new: Owner) -> str:
            if new.title != "red":
                raise HTTPException(422)
            return user_id

        api.get("/numbered/{number}")(by_number)
        api.post("/red")(only_red)
        bodies = {"POST /red": {"title": "red"}}
        for given in ({"ids": {"number": task}}, {"bodies": bodies}):
            with pytest.raises(AssertionError, match="not reached"):
                await assert_isolated(api, **given)
        await assert_isolated(api, ids={"number": task}, bodies=bodies)

    async def test_knows_the_user_of_a_path(self, api: FastAPI) -> None:
        api.get("/users/{user_id}")(has_the_user_in_its_path)
        await assert_isolated(api)

    async def test_names_what_cannot_be_compared(self, api: FastAPI) -> None:
        async def only_for_alice(user_id: CurrentUserId, task_id: int) -> str:
            if user_id == "alice":
                return "yours"
            raise HTTPException(404, f"{task_id}: {token_urlsafe()}")

        api.get("/tasks/{task_id}")(only_for_alice)
        with pytest.raises(AssertionError, match="differently to two values of task_id"):
            await assert_isolated(api)

    async def test_names_a_creator_that_returns_no_id(self, api: FastAPI) -> None:
        api.post("/labels")(returns_no_object)
        api.get("/labels/{label_id}")(has_another_id)
        with pytest.raises(AssertionError, match="POST /labels returns no label_id"):
            await assert_isolated(api)

    async def test_signs_in_as_the_caller_says(self, api: FastAPI) -> None:
        def by_header(request: Request) -> str:
            return request.headers["x-user"]

        api.dependency_overrides[current_user_id] = by_header
        api.get("/tasks/{task_id}")(is_sound)
        await assert_isolated(api, headers=lambda user: {"x-user": user})

    async def test_does_not_call_what_is_to_be_skipped(self, api: FastAPI) -> None:
        api.get("/never")(never_answers)
        await assert_isolated(api, skip={"GET /never"})

    async def test_refuses_to_skip_what_is_not_there(self, api: FastAPI) -> None:
        with pytest.raises(AssertionError, match="GET /nowhere: there is no such operation"):
            await assert_isolated(api, skip={"GET /nowhere"})

    async def test_needs_the_lifespan(self) -> None:
        with pytest.raises(ConfigurationError, match="lifespan"):
            await assert_isolated(FastAPI())


class TestAnswer:
    def test_of_two_missing_ids_must_have_one_status(self) -> None:
        found, absent, other = (Answer(status, {}, "") for status in (404, 404, 500))
        [told] = differences("task_id", found, absent, other)
        assert told.startswith("answers differently to two values of task_id that do not exist")


class TestDocument:
    """Requests are made of the schemas."""

    @pytest.mark.parametrize(
        ("schema", "choices"),
        [
            ({"type": "array", "items": {"type": "boolean"}}, [[True], [False]]),
            ({"type": "object"}, [{}]),
            ({"enum": ["red", "blue"]}, ["red", "blue"]),
        ],
    )
    def test_choices_are_those_of_the_type(
        self, schema: dict[str, Any], choices: list[object]
    ) -> None:
        assert Document({"paths": {}}, {})._choices(schema, []) == choices

    SCHEMA: Final[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "kind": {"const": "note"},
            "size": {"default": 3},
            "color": {"enum": ["red", "blue"]},
            "note": {"anyOf": [{"$ref": "#/components/schemas/Text"}, {"type": "null"}]},
            "task_ids": {"type": "array", "items": {"type": "integer"}},
            "count": {"type": "integer", "minimum": 2},
            "done": {"type": "boolean"},
            "nothing": {"type": "null"},
            "day": {"type": "string", "format": "date"},
            "short": {"type": "string", "maxLength": 3},
            "long": {"type": "string", "minLength": 8},
        },
    }

    def test_sample_fits_the_schema(self) -> None:
        parameters = [
            {"name": "task_id", "in": "path", "required": True},
            {"name": "page", "in": "query", "schema": {"type": "integer"}},
            {"name": "wanted", "in": "query", "required": True, "schema": {"type": "boolean"}},
            {"name": "x-mode", "in": "header", "required": True, "schema": {"type": "string"}},
            {"name": "session", "in": "cookie", "required": True, "schema": {"type": "string"}},
        ]
        content = {"application/json": {"schema": self.SCHEMA}}
        put = {"parameters": parameters, "requestBody": {"content": content}}
        document = Document(
            {
                "paths": {"/tasks/{task_id}": {"put": put}},
                "components": {"schemas": {"Text": {"type": "string"}}},
            },
            {},
        )
        request = document.request(document.operations[0], {"task_id": 7}, "mark")
        assert (request.method, request.path) == ("put", "/tasks/7")
        assert (request.query, request.headers) == ({"wanted": True}, {"x-mode": "mark"})
        assert request.body == {
            "kind": "note",
            "size": 3,
            "color": "red",
            "note": "mark",
            "task_ids": [7],
            "count": 2,
            "done": True,
            "nothing": None,
            "day": "2026-01-01",
            "short": "ark",
            "long": "markxxxx",
        }

    @pytest.mark.parametrize("value", [1, "abc", str(UUID(int=1))])
    def test_missing_id_is_another_one_of_the_same_kind(self, value: int | str) -> None:
        first, second = _missing(value, 1), _missing(value, 2)
        assert len({value, first, second}) == 3
        assert type(first) is type(value)


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
