"""The dependencies, as browsers, WebSockets and users of other issuers meet them."""

import asyncio
import inspect
import json
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final

import httpx
import pytest
import pytest_asyncio
from credentials import SECRET, URL, Key, add_key, add_session, bearer, cookie, signed
from driver import Connection
from events import events
from fastapi import Depends, FastAPI, WebSocket
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.websockets import WebSocketDisconnect
from web import TestClient, WebSocketDenialResponse, client, server

from todo_db import (
    ConfigurationError,
    Database,
    InvalidInputError,
    NewTask,
    Settings,
    TaskRecord,
    TodoDBError,
    UnavailableError,
    UserNotFoundError,
    inputs,
)
from todo_db.fastapi import (
    CurrentUser,
    CurrentUserId,
    IdempotencyKey,
    Identity,
    IfMatch,
    Tasks,
    current_user_id,
    install,
    lifespan,
)
from todo_db.fastapi.dependencies import SignIns
from todo_db.fastapi.problems import _REQUIREMENTS

ISSUER: Final = "https://issuer.example.org"
type Json = dict[str, Any]


def service(url: str, **changes: Any) -> FastAPI:  # noqa: ANN401  # Settings checks them
    given: Json = {"better_auth_secret": SECRET, "better_auth_url": URL, "database_url": url}
    app = FastAPI(lifespan=lifespan(Settings(**(given | changes))))
    install(app)
    add_routes(app)
    return app


def add_routes(app: FastAPI) -> None:
    @app.get("/me")
    async def me(user_id: CurrentUserId) -> str:
        return user_id

    @app.api_route("/change", methods=["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"])
    async def change(user_id: CurrentUserId) -> str:
        return user_id

    @app.post("/tasks")
    async def create(user: CurrentUser, tasks: Tasks, title: str) -> TaskRecord:
        return await tasks.create(user.user_id, title)

    @app.get("/user")
    async def user(user: CurrentUser) -> list[str | None]:
        return [user.user_id, user.email, user.name]

    @app.websocket("/titles")
    async def titles(socket: WebSocket, user_id: CurrentUserId, tasks: Tasks) -> None:
        await socket.accept()
        await socket.send_json([task.title async for task in tasks.iterate(user_id)])
        await socket.close()


@pytest_asyncio.fixture
async def alice(db: Database, owner: Connection) -> dict[str, str]:  # noqa: ARG001  # has alice
    """The headers of alice's session."""
    token = await add_session(owner, "alice")
    return {"Cookie": cookie(signed(token)).cookie or ""}


@pytest_asyncio.fixture
async def asking(url: str, alice: dict[str, str]) -> AsyncGenerator[httpx.AsyncClient]:
    """A client of the small application that has alice's cookie."""
    async with client(service(url), headers=alice) as made:
        yield made


EVIL: Final = {"Origin": "http://localhost:3001"}
CHANGING: Final = ("POST", "PUT", "PATCH", "DELETE")


class TestOrigin:
    @pytest.mark.parametrize("method", CHANGING)
    async def test_of_another_page_is_403_for_a_change(
        self, method: str, asking: httpx.AsyncClient
    ) -> None:
        for headers in (EVIL, {"Origin": "null"}, {"Sec-Fetch-Site": "same-site"}):
            response = await asking.request(method, "/change", headers=headers)
            assert response.status_code == 403
            assert response.headers["content-type"] == "application/problem+json"
            assert response.json()["code"] == "ForbiddenOriginError"

    @pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
    async def test_does_not_matter_for_reading(
        self, method: str, asking: httpx.AsyncClient
    ) -> None:
        assert (await asking.request(method, "/change", headers=EVIL)).status_code == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"Origin": URL},
            {"Origin": URL, "Sec-Fetch-Site": "same-site"},
            {"Origin": "http://test"},
            {"Sec-Fetch-Site": "same-origin"},
            {"Origin": "null", "Sec-Fetch-Site": "same-origin"},
        ],
    )
    async def test_of_the_own_page_passes(
        self, headers: dict[str, str], asking: httpx.AsyncClient
    ) -> None:
        for method in CHANGING:
            assert (await asking.request(method, "/change", headers=headers)).json() == "alice"

    async def test_twice_is_none_of_them(self, asking: httpx.AsyncClient) -> None:
        twice = [("Origin", URL), ("Origin", "http://test")]
        assert (await asking.post("/change", headers=twice)).status_code == 403

    async def test_does_not_matter_for_a_bearer(
        self, asking: httpx.AsyncClient, owner: Connection
    ) -> None:
        token = await add_session(owner, "alice")
        key = Key()
        await add_key(owner, key.id, json.dumps(key.jwk))
        for credential in (token, signed(token), key.jwt()):
            headers = EVIL | {"Authorization": f"Bearer {credential}"}
            assert (await asking.post("/change", headers=headers)).json() == "alice"

    async def test_is_no_matter_before_the_credential(self, asking: httpx.AsyncClient) -> None:
        asking.headers["Cookie"] = "better-auth.session_token=junk.junk"
        assert (await asking.post("/change", headers=EVIL)).status_code == 401

    async def test_can_be_required_and_more_of_them_trusted(
        self, url: str, alice: dict[str, str]
    ) -> None:
        more = {"strict_origin": True, "better_auth_trusted_origins": EVIL["Origin"]}
        async with client(service(url, **more), headers=alice) as strict:
            assert (await strict.post("/change")).status_code == 403
            assert (await strict.get("/change")).status_code == 200
            assert (await strict.post("/change", headers=EVIL)).json() == "alice"

    async def test_of_test_clients_is_none_and_passes(
        self, url: str, alice: dict[str, str]
    ) -> None:
        def post() -> object:
            with TestClient(service(url)) as testing:
                return testing.post("/change", headers=alice).json()

        assert await asyncio.to_thread(post) == "alice"
        async with server(service(url)) as at, httpx.AsyncClient(base_url=at) as real:
            assert (await real.post("/change", headers=alice)).json() == "alice"


def talk(app: FastAPI, headers: Mapping[str, str]) -> tuple[object, Json]:
    """Return what a WebSocket got: a message, a status or a close code; and the problem."""
    with TestClient(app) as testing:
        try:
            with testing.websocket_connect("/titles", headers=dict(headers)) as socket:
                return socket.receive_json(), {}
        except WebSocketDenialResponse as denied:
            return denied.status_code, denied.json()
        except WebSocketDisconnect as closed:
            return closed.code, {}


class TestWebSocket:
    async def test_has_the_user_and_the_repositories(
        self, url: str, alice: dict[str, str], db: Database
    ) -> None:
        await db.tasks.create("alice", "hers")
        await db.tasks.create("bob", "his")
        for headers in (alice, alice | {"Origin": URL}):
            assert await asyncio.to_thread(talk, service(url), headers) == (["hers"], {})

    async def test_is_denied_without_a_credential_and_from_another_page(
        self, url: str, alice: dict[str, str]
    ) -> None:
        for headers, status in (({}, 401), (alice | EVIL, 403)):
            got, problem = await asyncio.to_thread(talk, service(url), headers)
            assert (got, problem["status"]) == (status, status)

    @staticmethod
    async def sent(
        app: FastAPI, path: str, *, can_deny: bool = False, accepts: bool = False
    ) -> list[Json]:
        """Return what is sent to a server that does not know denial responses."""
        messages: list[Json] = []

        async def receive() -> Json:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:  # noqa: ANN401  # ASGI
            messages.append(message)

        scope: Json = {"type": "websocket", "path": path, "headers": [], "query_string": b""}
        if can_deny:
            scope["extensions"] = {"websocket.http.response": {}}
        await app(scope, receive, send)
        assert any(message["type"] == "websocket.accept" for message in messages) is accepts
        return messages

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (InvalidInputError("x", "must be y"), 1008),
            (UnavailableError(), 1013),
            (ConfigurationError(), 1011),
            (UserNotFoundError(), 1008),
        ],
    )
    @pytest.mark.parametrize("accepts", [False, True])
    async def test_is_closed_by_an_error(
        self, *, error: Exception, code: int, accepts: bool
    ) -> None:
        app = FastAPI()
        install(app)

        @app.websocket("/")
        async def fail(socket: WebSocket) -> None:
            if accepts:
                await socket.accept()
            raise error

        messages = await self.sent(app, "/", accepts=accepts)
        assert (messages[-1]["type"], messages[-1]["code"]) == ("websocket.close", code)
        messages = await self.sent(app, "/", accepts=accepts, can_deny=True)
        kind = "close" if accepts else "http.response.body"
        assert messages[-1]["type"] == f"websocket.{kind}"

    async def test_whose_client_has_gone_gets_nothing_for_an_error(self) -> None:
        app = FastAPI()
        install(app)

        @app.websocket("/")
        async def fail(socket: WebSocket) -> None:
            await socket.accept()
            raise UnavailableError

        async def receive() -> Json:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:  # noqa: ANN401  # ASGI
            if message["type"] == "websocket.close":
                raise OSError

        await app(
            {"type": "websocket", "path": "/", "headers": [], "query_string": b""}, receive, send
        )

    async def test_that_was_closed_gets_nothing_for_an_error(self) -> None:
        app = FastAPI()
        install(app)

        @app.websocket("/")
        async def fail(socket: WebSocket) -> None:
            await socket.accept()
            await socket.close(1000)
            raise UnavailableError

        messages = await self.sent(app, "/", accepts=True)
        assert [message.get("code") for message in messages] == [None, 1000]


class TestLifespan:
    async def test_that_did_not_run_is_told(self, caplog: pytest.LogCaptureFixture) -> None:
        app = FastAPI()
        install(app)
        add_routes(app)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test"
        ) as bare:
            for path in ("/me", "/health", "/user"):
                caplog.clear()
                assert (await bare.get(path)).status_code == 500
                assert "give the outermost FastAPI `lifespan=lifespan()`" in caplog.text

    async def test_is_entered_by_one_of_the_application(
        self, url: str, alice: dict[str, str]
    ) -> None:
        settings = Settings(better_auth_secret=SECRET, better_auth_url=URL, database_url=url)

        @asynccontextmanager
        async def own(app: FastAPI) -> AsyncGenerator[Mapping[str, Any]]:
            async with lifespan(settings)(app) as state:
                yield {**state, "mine": "here"}

        app = FastAPI(lifespan=own)
        install(app)
        add_routes(app)

        @app.get("/mine")
        async def mine(connection: Annotated[str, Depends(_mine)]) -> str:
            return connection

        async with client(app, headers=alice) as asking:
            assert (await asking.get("/me")).json() == "alice"
            assert (await asking.get("/mine")).json() == "here"


def _mine(connection: HTTPConnection) -> str:
    return str(connection.state.mine)


class TestMounted:
    async def test_answers_like_the_outer_one(self, url: str, alice: dict[str, str]) -> None:
        outer, inner, innermost = service(url), FastAPI(), FastAPI()
        for app in (inner, innermost):
            add_routes(app)
        inner.mount("/inner", innermost)
        outer.mount("/api", inner)
        async with client(outer) as asking:
            for prefix in ("/api", "/api/inner"):
                for path in ("/me", "/missing", "/user"):
                    expected = await asking.get(path)
                    answer = await asking.get(f"{prefix}{path}")
                    assert (answer.status_code, answer.content) == (
                        expected.status_code,
                        expected.content,
                    )
                assert (await asking.get(f"{prefix}/me", headers=alice)).json() == "alice"
                answer = await asking.post(f"{prefix}/tasks", headers=alice)
                assert answer.headers["content-type"] == "application/problem+json"

    async def test_keeps_error_handlers_of_its_own(self, url: str) -> None:
        outer, inner = service(url), FastAPI()
        add_routes(inner)

        @inner.exception_handler(TodoDBError)
        async def teapot(_connection: HTTPConnection, _error: Exception) -> Response:
            return Response(status_code=httpx.codes.IM_A_TEAPOT)

        outer.mount("/api", inner)
        async with client(outer) as asking:
            assert (await asking.get("/me")).status_code == 401
            assert (await asking.get("/api/me")).status_code == 418

    async def test_has_overrides_of_its_own(self, url: str, db: Database) -> None:  # noqa: ARG002
        outer, inner = service(url), FastAPI()
        add_routes(inner)
        outer.mount("/api", inner)
        for replaced, statuses in ((inner, (401, 200)), (outer, (200, 401))):
            replaced.dependency_overrides[current_user_id] = lambda: "alice"
            async with client(outer) as asking:
                got = [(await asking.get(path)).status_code for path in ("/me", "/api/me")]
            assert tuple(got) == statuses
            replaced.dependency_overrides.clear()

    async def test_needs_the_lifespan_outside(
        self, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        outer = FastAPI()
        install(outer)
        outer.mount("/api", service(url))
        async with client(outer) as asking:
            assert (await asking.get("/api/me")).status_code == 500
        assert "give the outermost FastAPI `lifespan=lifespan()`" in caplog.text


class TestOrder:
    """Whoever has no credential learns nothing else about the request."""

    async def test_is_401_before_412_and_422(self, url: str, alice: dict[str, str]) -> None:
        app = service(url)

        @app.patch("/tasks/{task_id}")
        async def update(
            expected: IfMatch, key: IdempotencyKey, task_id: int, body: NewTask, user: CurrentUser
        ) -> None:
            raise AssertionError((expected, key, task_id, body, user))

        async with client(app) as asking:
            headers = {"If-Match": "junk", "Idempotency-Key": ""}
            bodies: list[object] = [{}, {"title": 1}, [], {"title": "x"}]
            for body in bodies:
                anonymous = await asking.patch("/tasks/junk", headers=headers, json=body)
                assert anonymous.status_code == 401
            known = await asking.patch("/tasks/junk", headers=headers | alice, json={})
            assert known.status_code == 422
            # FastAPI parses the body first.
            junk = headers | {"Content-Type": "application/json"}
            assert (await asking.patch("/tasks/1", headers=junk, content="{")).status_code == 422


class TestIdempotencyKey:
    async def test_is_not_required_with_or_without_a_default(self) -> None:
        app = FastAPI()
        install(app)

        @app.get("/without")
        async def without(key: IdempotencyKey) -> str | None:
            return key

        @app.get("/with")
        async def with_default(key: IdempotencyKey = None) -> str | None:
            return key

        async with client(app) as asking:
            for path in ("/without", "/with"):
                assert (await asking.get(path)).json() is None
                answer = await asking.get(path, headers={"Idempotency-Key": "k"})
                assert answer.json() == "k"
        for path in ("/without", "/with"):
            (parameter,) = app.openapi()["paths"][path]["get"]["parameters"]
            assert (parameter["name"], parameter["required"]) == ("Idempotency-Key", False)


class TestWords:
    def test_of_python_reach_no_client(self) -> None:
        told = re.findall(r'InvalidInputError\([^)]*?f?"([^"]*)"\s*\)', inspect.getsource(inputs))
        python = re.compile(r"\b(a str|an int|True|False|None|NewTask|TaskSort|datetime)\b")
        assert len(told) >= 10
        for requirement in told:
            assert not python.search(_REQUIREMENTS.get(requirement, requirement))

    async def test_of_http_reach_it(self) -> None:
        app = FastAPI()
        install(app)

        @app.post("/")
        async def post(body: NewTask) -> None:
            raise AssertionError(body)

        @app.get("/")
        async def get() -> None:
            inputs.text("title", 5, 1)

        async with client(app) as asking:
            wrong = await asking.post("/", json="x")
            assert wrong.json()["detail"] == "Input should be an object"
            assert (await asking.get("/")).json()["detail"] == "must be a string"


@pytest_asyncio.fixture
async def key(owner: Connection) -> Key:
    """A key of another issuer; it is in the table, so that no server is needed."""
    made = Key()
    await add_key(owner, made.id, json.dumps(made.jwk))
    return made


class TestCurrentUser:
    @staticmethod
    @asynccontextmanager
    async def of_issuer(
        url: str, key: Key, monkeypatch: pytest.MonkeyPatch
    ) -> AsyncGenerator[httpx.AsyncClient]:
        """Yield a client of an application that accepts an issuer's tokens."""
        entry = key.jwk | {"kid": key.id, "alg": "EdDSA"}
        monkeypatch.setattr("jwt.PyJWKClient.fetch_data", lambda _self: {"keys": [entry]})
        issuer = {"jwt_issuer": ISSUER, "jwks_url": "http://issuer/jwks"}
        none = dict.fromkeys(("better_auth_secret", "better_auth_url"))
        async with client(service(url, **issuer, **none)) as asking:
            yield asking

    @staticmethod
    def token(key: Key, **changes: object) -> dict[str, str]:
        told = {"iss": ISSUER, "aud": None, "sub": "carol", "email": "Carol@example.org"}
        return {"Authorization": bearer(key.jwt(**(told | changes))).authorization or ""}

    async def test_is_stored_by_the_first_request(
        self, url: str, db: Database, owner: Connection, key: Key, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with self.of_issuer(url, key, monkeypatch) as asking:
            headers = self.token(key, name="Carol")
            # The id alone stores nothing.
            assert (await asking.get("/me", headers=headers)).json() == "carol"
            with pytest.raises(UserNotFoundError):
                await db.users.get("carol")
            created = await asking.post("/tasks?title=first", headers=headers)
            assert created.json()["user_id"] == "carol"
            user = await db.users.get("carol")
            assert (user.email, user.name) == ("carol@example.org", "Carol")
            told = await asking.get("/user", headers=headers)
            assert told.json() == ["carol", "Carol@example.org", "Carol"]
            # Only the first request of a process stores the user.
            await owner.execute("DELETE FROM users WHERE id = 'carol'")
            assert (await asking.post("/tasks?title=x", headers=headers)).status_code == 404

    async def test_has_the_changed_address_stored(
        self, url: str, db: Database, key: Key, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with self.of_issuer(url, key, monkeypatch) as asking:
            for email in ("a@b.org", "c@d.org", "c@d.org", "a@b.org"):
                headers = self.token(key, email=email)
                assert (await asking.get("/user", headers=headers)).status_code == 200
                assert (await db.users.get("carol")).email == email

    async def test_keeps_the_address_if_the_new_one_is_taken(
        self,
        url: str,
        db: Database,
        key: Key,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async with self.of_issuer(url, key, monkeypatch) as asking:
            taken = self.token(key, email="alice@example.org")
            assert (await asking.get("/user", headers=taken)).status_code == 409
            assert (await asking.get("/user", headers=self.token(key))).status_code == 200
            for _ in range(2):
                assert (await asking.get("/user", headers=taken)).status_code == 200
            assert (await db.users.get("carol")).email == "carol@example.org"
        assert events(caplog) == [{"event": "todo_db.email.taken"}]

    @pytest.mark.parametrize("email", [None, "", 1, "no address"])
    async def test_needs_an_address_in_the_token(
        self,
        email: object,
        url: str,
        db: Database,  # noqa: ARG002  # has users
        key: Key,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        async with self.of_issuer(url, key, monkeypatch) as asking:
            answer = await asking.get("/user", headers=self.token(key, email=email))
            assert answer.status_code == 422
            assert answer.json()["field"] == "email"
            assert ("claim `email`" in answer.json()["detail"]) == (email != "no address")

    async def test_of_better_auth_is_stored_by_better_auth(
        self, url: str, alice: dict[str, str], key: Key, owner: Connection
    ) -> None:
        async with client(service(url)) as asking:
            assert (await asking.get("/user", headers=alice)).json() == ["alice", None, None]
            # A JWT outlives its user, who must not come back.
            gone = {
                "Authorization": bearer(key.jwt(sub="gone", email="g@b.org")).authorization or ""
            }
            assert (await asking.get("/user", headers=gone)).status_code == 200
        assert await owner.fetchval("SELECT count(*) FROM users WHERE id = 'gone'") == 0

    async def test_is_forgotten_when_there_are_many(
        self, db: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("todo_db.fastapi.dependencies._MOST_SIGN_INS", 2)
        sign_ins = SignIns()
        for user_id in ("a", "b", "c", "b", "a"):
            identity = Identity(user_id, f"{user_id}@example.org")
            await sign_ins.ensure(db.users, identity)
        assert list(sign_ins._emails) == ["c", "a"]


class TestReplaced:
    async def test_user_is_believed(self, url: str, db: Database) -> None:  # noqa: ARG002
        app = service(url)
        app.dependency_overrides[current_user_id] = lambda: "alice"
        async with client(app) as asking:
            assert (await asking.post("/change", headers=EVIL)).json() == "alice"
            # Neither is it stored, nor does the token count.
            headers = {"Authorization": "Bearer junk"}
            assert (await asking.get("/user", headers=headers)).json() == ["alice", None, None]
