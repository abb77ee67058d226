"""Responses of FastAPI applications, which `web` runs."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal

import httpx
import pytest
import pytest_asyncio
from credentials import SECRET, URL, add_session, add_user, bearer, cookie, signed
from driver import Connection
from events import events
from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from locks import until_waiting
from proxy import BEGIN, Fault, Proxy
from pydantic import BaseModel, ConfigDict, Field
from web import client, server

from todo_db import (
    CallTimeoutError,
    ConcurrentUseError,
    ConfigurationError,
    ConflictError,
    Database,
    EmailTakenError,
    ForbiddenOriginError,
    IdempotencyKeyReusedError,
    InvalidCursorError,
    InvalidInputError,
    IsolationError,
    NotAuthenticatedError,
    NotFoundError,
    OutcomeUnknownError,
    PoolExhaustedError,
    SchemaError,
    Settings,
    StaleTaskError,
    TaskNotFoundError,
    TaskRecord,
    TodoDBError,
    TransactionAbortedError,
    TransactionError,
    UnavailableError,
    UserIdTakenError,
    UsernameTakenError,
    UserNotFoundError,
)
from todo_db.fastapi import (
    PROBLEMS,
    CurrentUserId,
    IdempotencyKey,
    IfMatch,
    PathUserId,
    Problem,
    Tasks,
    Users,
    current_database,
    current_user_id,
    etag,
    install,
    lifespan,
)

MARKER: Final = "hunter2zebra"

type Json = dict[str, Any]
type Make = Callable[[], TodoDBError]

# The status, and additional members of the body and headers.
_ANSWERS: Final[dict[type[TodoDBError], tuple[int, Json, Json]]] = {
    TodoDBError: (500, {}, {}),
    ConfigurationError: (500, {}, {}),
    InvalidInputError: (422, {"detail": "must not be blank", "field": "title"}, {}),
    InvalidCursorError: (
        422,
        {"detail": "must come from the page before, unchanged", "field": "cursor"},
        {},
    ),
    NotFoundError: (404, {}, {}),
    UserNotFoundError: (404, {}, {}),
    TaskNotFoundError: (404, {}, {}),
    ConflictError: (409, {"detail": str(ConflictError()), "code": "ConflictError"}, {}),
    EmailTakenError: (409, {"detail": str(EmailTakenError()), "code": "EmailTakenError"}, {}),
    UsernameTakenError: (
        409,
        {"detail": str(UsernameTakenError()), "code": "UsernameTakenError"},
        {},
    ),
    UserIdTakenError: (409, {"detail": str(UserIdTakenError()), "code": "UserIdTakenError"}, {}),
    StaleTaskError: (
        412,
        {
            "detail": "The task does not have the version that If-Match names: it was changed, or"
            " that is not the strong ETag of an earlier response.",
            "code": "StaleTaskError",
        },
        {},
    ),
    IdempotencyKeyReusedError: (
        409,
        {"detail": str(IdempotencyKeyReusedError()), "code": "IdempotencyKeyReusedError"},
        {},
    ),
    NotAuthenticatedError: (401, {}, {"www-authenticate": "Bearer"}),
    ForbiddenOriginError: (
        403,
        {"detail": str(ForbiddenOriginError()), "code": "ForbiddenOriginError"},
        {},
    ),
    IsolationError: (500, {}, {}),
    SchemaError: (500, {}, {}),
    TransactionError: (500, {}, {}),
    TransactionAbortedError: (500, {}, {}),
    ConcurrentUseError: (500, {}, {}),
    UnavailableError: (503, {"detail": str(UnavailableError())}, {"retry-after": "1"}),
    PoolExhaustedError: (503, {"detail": str(PoolExhaustedError())}, {"retry-after": "1"}),
    CallTimeoutError: (503, {"detail": str(CallTimeoutError())}, {"retry-after": "1"}),
    OutcomeUnknownError: (
        504,
        {"detail": str(OutcomeUnknownError()), "code": "OutcomeUnknownError"},
        {},
    ),
}


def kinds(kind: type[TodoDBError] = TodoDBError) -> Iterator[type[TodoDBError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from kinds(narrower)


def made(kind: type[TodoDBError]) -> TodoDBError:
    if kind is InvalidInputError:
        return InvalidInputError("title", "must not be blank")
    return kind()


async def answer(error: Exception) -> httpx.Response:
    """Return the response to an error in a handler."""
    app = FastAPI()
    install(app)

    @app.get("/")
    async def fail() -> None:
        raise error

    async with client(app) as asking:
        return await asking.get("/")


def problem(response: httpx.Response) -> Json:
    """Return the additional members of a problem; check its type, title and status."""
    assert response.headers["content-type"] == "application/problem+json"
    body: Json = response.json()
    assert body.pop("type") == "about:blank"
    assert body.pop("title") == HTTPStatus(response.status_code).phrase
    assert body.pop("status") == response.status_code
    return body


def service(url: str, **changes: Any) -> FastAPI:  # noqa: ANN401  # Settings checks them
    """Return a small application on a database, in which the header `X-User` signs in."""
    given: Json = {"better_auth_secret": SECRET, "better_auth_url": URL, "database_url": url}
    app = FastAPI(lifespan=lifespan(Settings(**(given | changes))))
    install(app)

    @app.get("/me")
    async def me(user_id: CurrentUserId, users: Users) -> str:
        return (await users.get(user_id)).id

    @app.post("/tasks")
    async def create(
        user_id: CurrentUserId, tasks: Tasks, title: str, key: IdempotencyKey = None
    ) -> TaskRecord:
        return await tasks.create(user_id, title, idempotency_key=key)

    @app.get("/tasks")
    async def titles(user_id: CurrentUserId, tasks: Tasks) -> list[TaskRecord]:
        return [task async for task in tasks.iterate(user_id)]

    @app.get("/tasks/{task_id}")
    async def get(user_id: CurrentUserId, tasks: Tasks, task_id: int) -> TaskRecord:
        return await tasks.get(user_id, task_id)

    @app.post("/tasks/{task_id}/toggle")
    async def toggle(user_id: CurrentUserId, tasks: Tasks, task_id: int) -> TaskRecord:
        return await tasks.toggle(user_id, task_id)

    @app.patch("/tasks/{task_id}")
    async def rename(
        user_id: CurrentUserId, tasks: Tasks, task_id: int, title: str, expected: IfMatch
    ) -> TaskRecord:
        return await tasks.update(user_id, task_id, expected_updated_at=expected, title=title)

    @app.get("/api/{user_id}/tasks/{task_id}")
    async def get_of(user_id: PathUserId, tasks: Tasks, task_id: int) -> TaskRecord:
        return await tasks.get(user_id, task_id)

    @app.get("/pool")
    async def pool(database: Annotated[Database, Depends(current_database)]) -> list[int]:
        status = (await database.health()).pool
        return [status.in_use, status.waiting]

    return app


async def by_header(x_user: Annotated[str, Header()]) -> str:
    return x_user


def with_users(app: FastAPI) -> FastAPI:
    """Override the authentication: the header `X-User` contains the user id."""
    app.dependency_overrides[current_user_id] = by_header
    return app


def as_user(user: str) -> dict[str, str]:
    return {"X-User": user}


@pytest_asyncio.fixture
async def alice(db: Database, owner: Connection) -> dict[str, str]:  # noqa: ARG001  # has alice
    """The headers of alice's session."""
    return dict(cookie_header(await add_session(owner, "alice")))


def cookie_header(token: str) -> dict[str, str]:
    return {"Cookie": cookie(signed(token)).cookie or ""}


@pytest_asyncio.fixture
async def signed_in(url: str, db: Database) -> AsyncGenerator[httpx.AsyncClient]:  # noqa: ARG001  # has alice and bob
    """A client of the small application, which authenticates by `X-User`."""
    async with client(with_users(service(url))) as asking:
        yield asking


class TestErrors:
    @pytest.mark.parametrize("kind", list(kinds()))
    async def test_are_problem_details(
        self, kind: type[TodoDBError], caplog: pytest.LogCaptureFixture
    ) -> None:
        response = await answer(made(kind))
        status, members, headers = _ANSWERS[kind]
        assert response.status_code == status
        assert problem(response) == members
        usual = {"content-type", "content-length"}
        others = {k: v for k, v in response.headers.items() if k not in usual}
        assert others == headers | {"cache-control": "no-store"}
        Problem.model_validate(response.json() | {"extra": None})
        # The log must show faults of the service.
        failed = {"event": "todo_db.request.failed", "reason": kind.__name__}
        assert events(caplog) == ([failed] if status == 500 else [])
        assert {record.levelname for record in caplog.records} <= {"ERROR"}

    def test_have_one_answer_each(self) -> None:
        assert set(_ANSWERS) == set(kinds())

    @pytest.mark.parametrize("kind", [ConfigurationError, IsolationError, SchemaError, TodoDBError])
    async def test_of_the_service_are_only_logged(
        self, kind: type[TodoDBError], caplog: pytest.LogCaptureFixture
    ) -> None:
        response = await answer(kind("what the operator must know"))
        assert problem(response) == {}
        assert f"{kind.__name__}: what the operator must know" in caplog.text

    @pytest.mark.parametrize(
        ("seconds", "header"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (1.5, "2"), (5.0, "5")]
    )
    async def test_have_retry_after_in_whole_seconds(self, seconds: float, header: str) -> None:
        response = await answer(UnavailableError(retry_after=seconds))
        assert response.headers["retry-after"] == header

    async def test_of_an_unknown_kind_fit_the_kind_above(self) -> None:
        class OddError(TaskNotFoundError):
            pass

        response = await answer(OddError("which one"))
        assert (response.status_code, problem(response)) == (404, {})
        # Otherwise `kinds` would include it.
        del OddError

    async def test_of_the_programmer_reveal_nothing(self) -> None:
        app = FastAPI()
        install(app)

        @app.get("/")
        async def fail() -> None:
            raise RuntimeError(MARKER)

        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as asking:
            response = await asking.get("/")
        assert (response.status_code, problem(response)) == (500, {})
        assert MARKER not in response.text

    def test_are_documented(self) -> None:
        ours = {status for status, _, _ in _ANSWERS.values()} - {500}
        # FastAPI's own response to a body that is not UTF-8.
        assert set(PROBLEMS) == ours | {400}
        for responses in PROBLEMS.values():
            assert set(responses["content"]) == {"application/problem+json"}


class TestHTTPException:
    @pytest.mark.parametrize("status", [400, 403, 404, 405, 418, 429, 451, 500, 503])
    async def test_is_a_problem_too(self, status: int) -> None:
        response = await answer(HTTPException(status))
        assert response.status_code == status
        assert problem(response) == {}

    async def test_keeps_its_detail_and_headers(self) -> None:
        response = await answer(HTTPException(429, "Slowly", {"Retry-After": "7"}))
        assert problem(response) == {"detail": "Slowly"}
        assert response.headers["retry-after"] == "7"

    async def test_may_have_a_detail_of_several_parts(self) -> None:
        response = await answer(HTTPException(400, {"why": ["a", "b"]}))
        assert problem(response) == {"detail": {"why": ["a", "b"]}}

    @pytest.mark.parametrize("status", [299, 419, 499, 599])
    async def test_may_have_a_status_that_has_no_name(self, status: int) -> None:
        response = await answer(HTTPException(status, "Unnamed"))
        assert response.status_code == status
        assert response.json()["status"] == status
        assert response.json()["detail"] == "Unnamed"

    @pytest.mark.parametrize("status", [204, 304])
    async def test_has_no_body_where_none_may_be(self, status: int) -> None:
        response = await answer(HTTPException(status, headers={"ETag": '"1"'}))
        assert response.status_code == status
        assert response.content == b""
        assert response.headers["etag"] == '"1"'

    async def test_of_an_unknown_route_and_method(self) -> None:
        app = FastAPI()
        install(app)
        async with client(app) as asking:
            missing = await asking.get(f"/{MARKER}")
            refused = await asking.delete("/health")
        assert (missing.status_code, problem(missing)) == (404, {})
        assert (refused.status_code, problem(refused)) == (405, {})
        assert refused.headers["allow"] == "GET"


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    count: int = 0
    counts: dict[str, int] = {}
    pet: Annotated[Cat | Dog, Field(discriminator="kind")] | None = None


def strict() -> FastAPI:
    """Return an application that validates each part of a request."""
    app = FastAPI()
    install(app)

    @app.post("/{path}")
    async def post(
        path: int, body: Strict, number: int = 0, x_number: Annotated[int, Header()] = 0
    ) -> None:
        raise AssertionError((path, number, x_number, body))

    return app


_REQUESTS: Final[dict[str, Callable[[httpx.AsyncClient], Any]]] = {
    "path": lambda asking: asking.post(f"/{MARKER}", json={}),
    "query": lambda asking: asking.post("/1", params={"number": MARKER}, json={}),
    "header": lambda asking: asking.post("/1", headers={"X-Number": MARKER}, json={}),
    "cookie": lambda asking: asking.post("/1", headers={"Cookie": f"n={MARKER}"}, json=MARKER),
    "body": lambda asking: asking.post("/1", json=MARKER),
    "body that is a list": lambda asking: asking.post("/1", json=[MARKER]),
    "body that is no JSON": lambda asking: asking.post(
        "/1", content=MARKER, headers={"Content-Type": "application/json"}
    ),
    "body of another type": lambda asking: asking.post("/1", data={"count": MARKER}),
    "field": lambda asking: asking.post("/1", json={"count": MARKER}),
    "unknown field": lambda asking: asking.post("/1", json={MARKER: 1}),
    "key of a mapping": lambda asking: asking.post("/1", json={"counts": {MARKER: "x"}}),
    "tag of a union": lambda asking: asking.post("/1", json={"pet": {"kind": MARKER}}),
}


class TestValidation:
    @pytest.mark.parametrize("name", _REQUESTS)
    async def test_repeats_nothing_of_the_request(
        self, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, logger="todo_db")
        async with client(strict()) as asking:
            response = await _REQUESTS[name](asking)
        assert response.status_code == 422
        said = problem(response)
        assert set(said) == {"detail", "field"}
        assert said["detail"]
        assert MARKER not in response.text
        assert MARKER not in str(response.headers)
        assert MARKER not in caplog.text

    @pytest.mark.parametrize(
        ("path", "headers", "body", "field"),
        [
            ("/x", {}, {}, "path"),
            ("/1?number=x", {}, {}, "number"),
            ("/1", {"X-Number": "x"}, {}, "x-number"),
            ("/1", {}, {"count": "x"}, "count"),
        ],
    )
    async def test_names_the_field(
        self, path: str, headers: dict[str, str], body: Json, field: str
    ) -> None:
        async with client(strict()) as asking:
            response = await asking.post(path, headers=headers, json=body)
        assert response.status_code == 422
        assert problem(response)["field"] == field


def versioned() -> FastAPI:
    """Return an application that returns the parsed header."""
    app = FastAPI()
    install(app)

    @app.get("/")
    async def get(expected: IfMatch) -> datetime | None:
        return expected

    return app


class TestIfMatch:
    @pytest.mark.parametrize(
        ("header", "expected"),
        [
            ("*", None),
            (" * ", None),
            ('"0"', "1970-01-01T00:00:00Z"),
            ('"-1"', "1969-12-31T23:59:59.999999Z"),
            ('"1"', "1970-01-01T00:00:00.000001Z"),
            ('"1700000000123456"', "2023-11-14T22:13:20.123456Z"),
            (' "1" ', "1970-01-01T00:00:00.000001Z"),
        ],
    )
    async def test_is_the_version_that_is_expected(self, header: str, expected: str | None) -> None:
        async with client(versioned()) as asking:
            response = await asking.get("/", headers={"If-Match": header})
        assert (response.status_code, response.json()) == (200, expected)

    async def test_is_nothing_if_it_is_not_sent(self) -> None:
        async with client(versioned()) as asking:
            assert (await asking.get("/")).json() is None

    @pytest.mark.parametrize(
        "header",
        [
            *("", " ", '""', '"', "junk", '"junk"', "1", "'1'", '"1', '1"', '" 1"', '"1 "'),
            *('W/"1"', 'w/"1"', 'W/"*"', '"*"', "**", '"1", "2"', '"1","1"', '"1", *', '"1"x'),
            *('"+1"', '"--1"', '"-"', '"1.0"', '"1e3"', '"0x1"', '"1_000"', '"\u0661"'),
            *('"999999999999999999"', '"-999999999999999999"', '"1000000000000000000"'),
            *(f'"{"1" * 10_000}"', '"\x00"', '"\xff"', '"253402300800000000"'),
        ],
    )
    async def test_is_a_version_that_no_row_has_otherwise(self, header: str) -> None:
        async with client(versioned()) as asking:
            response = await asking.get("/", headers=[(b"if-match", header.encode())])
        assert (response.status_code, response.json()) == (200, "0001-01-01T00:00:00Z")

    @pytest.mark.parametrize("header", ["", 'W/"1"', "junk"])
    async def test_that_is_no_strong_etag_is_412_and_told_so(
        self, header: str, signed_in: httpx.AsyncClient
    ) -> None:
        signed_in.headers.update(as_user("alice"))
        task = (await signed_in.post("/tasks?title=old")).json()
        sent = {"If-Match": header}
        refused = await signed_in.patch(f"/tasks/{task['id']}?title=new", headers=sent)
        assert refused.status_code == 412
        assert "strong ETag" in problem(refused)["detail"]
        assert (await signed_in.get(f"/tasks/{task['id']}")).json() == task
        missing = await signed_in.patch("/tasks/999999?title=new", headers=sent)
        assert missing.status_code == 404

    @pytest.mark.parametrize(
        "moment",
        [
            datetime(1970, 1, 1, tzinfo=UTC),
            datetime(1, 1, 1, tzinfo=UTC),
            datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
            datetime(2026, 2, 28, 12, 34, 56, 789_012, tzinfo=UTC),
        ],
    )
    async def test_of_an_etag_is_its_timestamp(self, moment: datetime) -> None:
        task = TaskRecord(1, "alice", "x", None, False, moment, moment)  # noqa: FBT003  # as rows come
        async with client(versioned()) as asking:
            response = await asking.get("/", headers={"If-Match": etag(task)})
        assert datetime.fromisoformat(response.json()) == moment

    async def test_lets_one_of_two_writers_win(self, signed_in: httpx.AsyncClient) -> None:
        signed_in.headers.update(as_user("alice"))
        task = (await signed_in.post("/tasks?title=old")).json()
        read = TaskRecord(**task | {"updated_at": datetime.fromisoformat(task["updated_at"])})
        url = f"/tasks/{task['id']}"
        both = await asyncio.gather(
            *(
                signed_in.patch(url, params={"title": title}, headers={"If-Match": etag(read)})
                for title in ("one", "other")
            )
        )
        assert sorted(response.status_code for response in both) == [200, 412]
        won = next(response for response in both if response.status_code == 200)
        assert (await signed_in.get(url)).json() == won.json()
        again = await signed_in.patch(f"{url}?title=last", headers={"If-Match": "*"})
        assert again.json()["title"] == "last"


class TestCurrentUserId:
    async def test_is_the_user_of_the_session(
        self, url: str, alice: dict[str, str], owner: Connection
    ) -> None:
        bob = bearer(await add_session(owner, "bob")).authorization or ""
        async with client(service(url)) as asking:
            assert (await asking.get("/me", headers=alice)).json() == "alice"
            assert (await asking.get("/me", headers={"Authorization": bob})).json() == "bob"
            both = await asking.get("/me", headers=alice | {"Authorization": bob})
            assert both.json() == "bob"
            for headers in ({}, {"Authorization": "Bearer junk"}):
                response = await asking.get("/me", headers=headers)
                assert (response.status_code, problem(response)) == (401, {})
                assert response.headers["www-authenticate"] == "Bearer"

    async def test_is_checked_before_the_rest_of_the_request(self, url: str) -> None:
        async with client(service(url)) as asking:
            for ask in (
                asking.get("/tasks/junk"),
                asking.patch("/tasks/junk", headers={"If-Match": "junk"}),
                asking.get("/api/alice/tasks/junk"),
            ):
                response = await ask
                assert (response.status_code, problem(response)) == (401, {})

    async def test_can_be_replaced(self, url: str, db: Database) -> None:
        await db.tasks.create("bob", "Bob's")
        app = with_users(service(url, better_auth_secret=None, better_auth_url=None))
        async with client(app, headers=as_user("bob")) as asking:
            assert (await asking.get("/me")).json() == "bob"
            assert [task["title"] for task in (await asking.get("/tasks")).json()] == ["Bob's"]

    async def test_needs_the_secret(
        self, url: str, alice: dict[str, str], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="todo_db")
        async with client(service(url, better_auth_secret=None)) as asking:
            assert events(caplog, "todo_db.credentials.none") != []
            response = await asking.get("/me", headers=alice)
        assert (response.status_code, problem(response)) == (500, {})
        assert "BETTER_AUTH_SECRET" in caplog.text

    async def test_is_checked_as_one_line_of_the_log_says(
        self, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="todo_db")
        async with client(service(url)):
            pass
        assert len(events(caplog, "todo_db.credentials.accepted")) == 1
        told = [r.getMessage() for r in caplog.records if "credentials" in r.getMessage()]
        assert len(told) == 1
        assert told[0].startswith(f"credentials: JWTs of the issuer {URL} for {URL} with keys")
        assert SECRET not in caplog.text

    async def test_needs_the_url_at_the_start(self, url: str) -> None:
        with pytest.raises(ConfigurationError, match="BETTER_AUTH_URL"):
            async with client(service(url, better_auth_url=None)):
                pass

    @pytest.mark.parametrize("user", ["", " ", "a" * 256, "a b"])
    async def test_of_another_function_is_checked_too(
        self, user: str, signed_in: httpx.AsyncClient
    ) -> None:
        response = await signed_in.get("/me", headers=as_user(user))
        assert response.status_code == (404 if user == "a b" else 422)


class TestPathUserId:
    async def test_is_the_current_user_or_404(self, signed_in: httpx.AsyncClient) -> None:
        task = (await signed_in.post("/tasks?title=x", headers=as_user("bob"))).json()["id"]
        good = await signed_in.get(f"/api/bob/tasks/{task}", headers=as_user("bob"))
        assert good.json()["title"] == "x"
        alices = (await signed_in.post("/tasks?title=y", headers=as_user("alice"))).json()["id"]
        missing = await signed_in.get("/tasks/999999", headers=as_user("alice"))
        assert missing.status_code == 404
        for path in (
            *(f"/api/bob/tasks/{task}", "/api/bob/tasks/999999", "/api/missing/tasks/1"),
            *(f"/api/BOB/tasks/{task}", f"/api/%00/tasks/{task}", f"/api/bob%20/tasks/{task}"),
            # The user's own task under another user's path is not found either.
            *(f"/api/alice/tasks/{task}", f"/api/bob/tasks/{alices}"),
        ):
            other = await signed_in.get(path, headers=as_user("alice"))
            assert (other.status_code, other.content) == (404, missing.content)
            assert other.headers == missing.headers


class TestForeignTasks:
    async def test_are_like_missing_ones_to_the_byte(self, signed_in: httpx.AsyncClient) -> None:
        task = (await signed_in.post("/tasks?title=x", headers=as_user("bob"))).json()["id"]
        for method, path in (
            ("GET", "/tasks/{}"),
            ("POST", "/tasks/{}/toggle"),
            ("PATCH", "/tasks/{}?title=y"),
        ):
            foreign, missing = [
                await signed_in.request(method, path.format(number), headers=as_user("alice"))
                for number in (task, 999_999)
            ]
            assert foreign.status_code == missing.status_code == 404
            assert foreign.content == missing.content
            assert foreign.headers == missing.headers

    async def test_do_not_cross_in_fifty_requests_at_once(
        self, url: str, db: Database, owner: Connection
    ) -> None:
        users = ("alice", "bob")
        for user in users:
            await db.tasks.create(user, f"of {user}")
        headers = {user: cookie_header(await add_session(owner, user)) for user in users}

        async def ask(asking: httpx.AsyncClient, number: int) -> None:
            user = users[number % 2]
            if number % 5 == 0:
                path = "/tasks?title=new"
                assert (await asking.post(path, headers=headers[user])).json()["user_id"] == user
            assert (await asking.get("/me", headers=headers[user])).json() == user
            tasks = (await asking.get("/tasks", headers=headers[user])).json()
            assert {task["user_id"] for task in tasks} == {user}

        async with asyncio.timeout(180), client(service(url)) as asking:
            await asyncio.gather(*(ask(asking, number) for number in range(50)))
            assert (await asking.get("/pool")).json() == [0, 0]


class TestCacheControl:
    """A shared cache need not tell the cookies of two users apart."""

    @pytest.mark.parametrize("is_mounted", [False, True])
    async def test_keeps_what_is_about_a_user_out_of_every_cache(
        self, url: str, alice: dict[str, str], *, is_mounted: bool
    ) -> None:
        app = service(url)
        if is_mounted:
            app, inner = FastAPI(lifespan=app.router.lifespan_context), app
            install(app)
            app.mount("/api", inner)
        prefix = "/api" if is_mounted else ""
        async with client(app) as asking:
            for path, headers, status in (
                ("/me", alice, 200),
                ("/tasks", alice, 200),
                ("/tasks/999999", alice, 404),
                ("/tasks/x", alice, 422),
                ("/me", {}, 401),
                ("/health", {}, 200),
            ):
                answer = await asking.get(f"{prefix}{path}", headers=headers)
                assert answer.status_code == status
                assert answer.headers.get_list("cache-control") == ["no-store"], path

    async def test_does_so_with_another_authentication(self, signed_in: httpx.AsyncClient) -> None:
        answer = await signed_in.get("/tasks", headers=as_user("alice"))
        assert answer.headers["cache-control"] == "no-store"

    async def test_leaves_what_the_handler_says(self, url: str, alice: dict[str, str]) -> None:
        app = service(url)

        @app.get("/avatar")
        async def avatar(_user_id: CurrentUserId, response: Response) -> None:
            response.headers["Cache-Control"] = "private, max-age=60"

        async with client(app) as asking:
            answer = await asking.get("/avatar", headers=alice)
        assert answer.headers.get_list("cache-control") == ["private, max-age=60"]

    async def test_leaves_what_is_about_nobody(self, signed_in: httpx.AsyncClient) -> None:
        for path in ("/openapi.json", "/missing"):
            assert "cache-control" not in (await signed_in.get(path)).headers


class TestHealth:
    async def test_is_200(self, signed_in: httpx.AsyncClient) -> None:
        response = await signed_in.get("/health")
        assert (response.status_code, response.json()) == (200, {"ok": True, "problem": None})

    async def test_is_503_before_a_migration(
        self, signed_in: httpx.AsyncClient, owner: Connection
    ) -> None:
        await owner.execute("UPDATE todo_db_version SET version_num = '0001'")
        response = await signed_in.get("/health")
        expected = {"ok": False, "problem": "SchemaError"}
        assert (response.status_code, response.json()) == (503, expected)

    async def test_is_503_without_a_database(self, proxy: Proxy) -> None:
        async with client(service(proxy.url, retry_attempts=1)) as asking:
            proxy.break_at(BEGIN, Fault.CUT_BEFORE)
            response = await asking.get("/health")
            assert (response.status_code, response.json()["ok"]) == (503, False)
            assert (await asking.get("/health")).status_code == 200


class TestUnavailable:
    async def test_is_503_with_a_time_to_wait(self, proxy: Proxy, owner: Connection) -> None:
        await add_user(owner, "alice")
        headers = cookie_header(await add_session(owner, "alice"))
        async with client(service(proxy.url, retry_attempts=1)) as asking:
            proxy.break_at(BEGIN, Fault.CUT_BEFORE)
            # Not 401, because the credential was not checked.
            response = await asking.get("/me", headers=headers)
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            assert set(problem(response)) == {"detail"}
            assert (await asking.get("/me", headers=headers)).json() == "alice"


class TestGivenUp:
    async def test_a_cancelled_request_keeps_no_connection(
        self, url: str, db: Database, owner: Connection
    ) -> None:
        task = await db.tasks.create("alice", "x")
        async with client(with_users(service(url)), headers=as_user("alice")) as asking:
            lock = owner.transaction()
            await lock.start()
            await owner.execute("UPDATE tasks SET completed = true")
            waiting = asyncio.create_task(asking.post(f"/tasks/{task.id}/toggle"))
            await until_waiting(owner)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert (await asking.get("/pool")).json() == [0, 0]
            await lock.rollback()
            assert (await asking.get(f"/tasks/{task.id}")).json()["completed"] is False


class TestServer:
    """Behind a real uvicorn."""

    async def test_opens_before_the_first_request_and_closes_after_the_last(
        self, url: str, alice: dict[str, str], db: Database, owner: Connection
    ) -> None:
        await db.close()
        async with server(service(url)) as at, httpx.AsyncClient(base_url=at) as asking:
            assert await backends(owner) >= 1
            assert (await asking.get("/me", headers=alice)).json() == "alice"
            both = await asyncio.gather(*(asking.get("/me", headers=alice) for _ in range(8)))
            assert {response.status_code for response in both} == {200}
            assert await backends(owner) > 1
        async with asyncio.timeout(60):
            # The server notices a closed connection with a delay.
            while await backends(owner):
                pass

    async def test_does_not_start_on_a_database_that_is_not_migrated(
        self, url: str, owner: Connection
    ) -> None:
        await owner.execute("UPDATE todo_db_version SET version_num = '0001'")
        with pytest.raises(SchemaError):
            async with client(service(url)):
                pass
        async with asyncio.timeout(60):
            while await backends(owner):
                pass

    async def test_a_client_that_hangs_up_keeps_no_connection(
        self, url: str, db: Database, owner: Connection
    ) -> None:
        task = await db.tasks.create("alice", "x")
        async with (
            server(with_users(service(url))) as at,
            httpx.AsyncClient(base_url=at, headers=as_user("alice")) as asking,
        ):
            lock = owner.transaction()
            await lock.start()
            await owner.execute("UPDATE tasks SET title = title || '!'")
            host, port = httpx.URL(at).host, httpx.URL(at).port
            _, writer = await asyncio.open_connection(host, port)
            path = f"/tasks/{task.id}/toggle"
            writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nX-User: alice\r\n\r\n".encode())
            await until_waiting(owner)
            writer.close()
            await writer.wait_closed()
            await lock.rollback()
            async with asyncio.timeout(60):
                while (await asking.get("/pool")).json() != [0, 0]:
                    pass
            # The request was sent, so it was applied.
            assert (await asking.get(f"/tasks/{task.id}")).json()["completed"] is True

    @pytest.mark.parametrize("status", [204, 304, 404, 412, 500])
    async def test_sends_each_status_as_the_protocol_has_it(self, status: int) -> None:
        app = FastAPI()
        install(app)

        @app.get("/")
        async def fail() -> None:
            raise HTTPException(status)

        async with server(app) as at, httpx.AsyncClient(base_url=at) as asking:
            for _ in range(2):
                response = await asking.get("/")
                assert response.status_code == status
                assert bool(response.content) == (status > 400)

    async def test_same_bytes_for_foreign_and_missing(self, url: str, db: Database) -> None:
        task = await db.tasks.create("bob", "x")
        async with (
            server(with_users(service(url))) as at,
            httpx.AsyncClient(base_url=at, headers=as_user("alice")) as asking,
        ):
            foreign = await asking.get(f"/tasks/{task.id}")
            missing = await asking.get("/tasks/999999")
        assert foreign.status_code == missing.status_code == 404
        assert foreign.content == missing.content
        assert set(foreign.headers) == set(missing.headers)


async def backends(owner: Connection) -> int:
    """Count the connections to the test's database, without the owner's."""
    number = await owner.fetchval(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    return int(number)


class TestIdempotencyKey:
    async def test_makes_a_task_once(self, signed_in: httpx.AsyncClient) -> None:
        signed_in.headers.update(as_user("alice") | {"Idempotency-Key": "k"})
        first, second = [await signed_in.post("/tasks?title=x") for _ in range(2)]
        assert first.json() == second.json()
        other = await signed_in.post("/tasks?title=y")
        assert other.status_code == 409
        assert problem(other)["code"] == "IdempotencyKeyReusedError"
        assert len((await signed_in.get("/tasks")).json()) == 1
        blank = await signed_in.post("/tasks?title=x", headers={"Idempotency-Key": " "})
        assert (blank.status_code, problem(blank)["field"]) == (422, "idempotency_key")


class TestState:
    async def test_is_separate_for_each_application(self, url: str, db: Database) -> None:  # noqa: ARG002  # has alice
        async def database_of(request: Request) -> list[int]:
            return [id(request.state.todo_database)]

        apps = [with_users(service(url)) for _ in range(2)]
        for app in apps:
            app.get("/which")(database_of)
        async with client(apps[0]) as one, client(apps[1]) as other:
            ids = [json.loads((await asking.get("/which")).text)[0] for asking in (one, other)]
        assert ids[0] != ids[1]
