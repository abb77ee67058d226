"""The example API, with valid and invalid requests."""

import asyncio
from collections.abc import AsyncGenerator
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from json import dumps
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import pytest_asyncio
import schemathesis
from credentials import SECRET, URL, accepted, add_session, add_user, issue, refused
from driver import Connection
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, Case, GenerationMode, checks
from schemathesis.core.result import Ok
from web import client, server

from todo_db.embedded import LOGIN, EmbeddedPostgres

type Json = dict[str, Any]

_EXAMPLE: Final = Path(__file__).parents[2] / "examples" / "fastapi_app.py"


def _loaded() -> FastAPI:
    spec = spec_from_file_location(_EXAMPLE.stem, _EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    app = module.app
    assert isinstance(app, FastAPI)
    return app


APP: Final = _loaded()
SCHEMA: Final = schemathesis.openapi.from_dict(APP.openapi())
OPERATIONS: Final = {
    each.ok().label: each.ok() for each in SCHEMA.get_all_operations() if isinstance(each, Ok)
}
CHECKS: Final = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
MISSING: Final = 999_999


@pytest.fixture
def configured(
    todo_postgres: EmbeddedPostgres,
    todo_database_name: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Set the environment that the example reads when it starts."""
    monkeypatch.chdir(tmp_path)
    url = todo_postgres.url(user=LOGIN, database=todo_database_name)
    for name, value in {
        "DATABASE_URL": url,
        "BETTER_AUTH_SECRET": SECRET,
        "BETTER_AUTH_URL": URL,
    }.items():
        monkeypatch.setenv(name, value)


async def bearer_of(owner: Connection, user: str) -> dict[str, str]:
    await add_user(owner, user)
    return {"Authorization": f"Bearer {await add_session(owner, user)}"}


@pytest_asyncio.fixture
async def anyone(configured: None) -> AsyncGenerator[httpx.AsyncClient]:  # noqa: ARG001  # set up
    async with client(APP) as asking:
        yield asking


class Person:
    """A client with the session of a user."""

    def __init__(self, asking: httpx.AsyncClient, headers: dict[str, str]) -> None:
        self._asking = asking
        self._headers = headers

    async def ask(
        self, method: str, path: str, headers: dict[str, str] | None = None, json: object = None
    ) -> httpx.Response:
        sent = self._headers | (headers or {})
        if json is None:
            return await self._asking.request(method, path, headers=sent)
        sent["Content-Type"] = "application/json"
        # In ASCII, because httpx's own encoding refuses a lone surrogate.
        content = dumps(json)
        return await self._asking.request(method, path, headers=sent, content=content)

    async def has(self, title: str, **more: object) -> Json:
        """Create a task."""
        response = await self.ask("POST", "/api/tasks", json={"title": title} | more)
        assert response.status_code == 201
        task: Json = response.json()
        return task

    async def titles(self) -> list[str]:
        items = (await self.ask("GET", "/api/tasks")).json()["items"]
        return [task["title"] for task in items]


@pytest_asyncio.fixture
async def alice(anyone: httpx.AsyncClient, owner: Connection) -> Person:
    return Person(anyone, await bearer_of(owner, "alice"))


@pytest_asyncio.fixture
async def mallory(anyone: httpx.AsyncClient, owner: Connection) -> Person:
    return Person(anyone, await bearer_of(owner, "mallory"))


def code(response: httpx.Response) -> tuple[int, str | None]:
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == response.status_code
    return response.status_code, body.get("code") or body.get("field")


class TestMe:
    async def test_is_the_signed_in_user(self, alice: Person, mallory: Person) -> None:
        assert (await alice.ask("GET", "/api/me")).json()["email"] == "alice@example.org"
        assert (await mallory.ask("GET", "/api/me")).json()["id"] == "mallory"

    async def test_is_gone_with_the_user(self, alice: Person, owner: Connection) -> None:
        await owner.execute("DELETE FROM users")
        # Deleting the user deletes the session.
        assert code(await alice.ask("GET", "/api/me")) == (401, None)


_UNFIT: Final[list[tuple[str, str, Json | None, str]]] = [
    ("POST", "/api/tasks", {}, "title"),
    ("POST", "/api/tasks", {"title": ""}, "title"),
    ("POST", "/api/tasks", {"title": " "}, "title"),
    ("POST", "/api/tasks", {"title": "x" * 201}, "title"),
    ("POST", "/api/tasks", {"title": "\ud800"}, "title"),
    ("POST", "/api/tasks", {"title": "\x00"}, "title"),
    ("POST", "/api/tasks", {"title": 1}, "title"),
    ("POST", "/api/tasks", {"title": "x", "description": "x" * 65_537}, "description"),
    ("PATCH", "/api/tasks/1", {"title": None}, "title"),
    ("PATCH", "/api/tasks/1", {"completed": None}, "completed"),
    ("GET", "/api/tasks/x", None, "task_id"),
    ("GET", f"/api/tasks/{2**63}", None, "task_id"),
    ("GET", f"/api/tasks/{'9' * 5_000}", None, "task_id"),
    ("GET", "/api/tasks?limit=0", None, "limit"),
    ("GET", "/api/tasks?limit=101", None, "limit"),
    ("GET", "/api/tasks?sort=x", None, "sort"),
    ("GET", "/api/tasks?cursor=x", None, "cursor"),
    ("GET", "/api/tasks?search=%00", None, "search"),
    ("GET", f"/api/tasks?search={'x' * 201}", None, "search"),
    ("GET", "/api/tasks?completed=maybe", None, "completed"),
]


class TestTasks:
    async def test_are_created(self, alice: Person) -> None:
        response = await alice.ask(
            "POST", "/api/tasks", json={"title": "Buy milk", "description": "2 l"}
        )
        task = response.json()
        assert response.status_code == 201
        assert (task["title"], task["description"], task["completed"]) == ("Buy milk", "2 l", False)
        assert task["user_id"] == "alice"
        assert response.headers["location"] == f"/api/tasks/{task['id']}"
        shown = await alice.ask("GET", response.headers["location"])
        assert (shown.json(), shown.headers["etag"]) == (task, response.headers["etag"])

    async def test_are_created_once_for_a_key(self, alice: Person, mallory: Person) -> None:
        key = {"Idempotency-Key": "k"}
        twice = [
            await alice.ask("POST", "/api/tasks", key, json={"title": "once"}) for _ in range(2)
        ]
        assert twice[0].json() == twice[1].json()
        assert twice[0].headers == twice[1].headers
        assert await alice.titles() == ["once"]
        reused = await alice.ask("POST", "/api/tasks", key, json={"title": "other"})
        assert code(reused) == (409, "IdempotencyKeyReusedError")
        # Each user has their own keys.
        own = await mallory.ask("POST", "/api/tasks", key, json={"title": "other"})
        assert own.status_code == 201

    async def test_are_changed_in_part(self, alice: Person) -> None:
        task = await alice.has("old", description="kept")
        path = f"/api/tasks/{task['id']}"
        changed = (await alice.ask("PATCH", path, json={"title": "new"})).json()
        assert (changed["title"], changed["description"]) == ("new", "kept")
        cleared = (await alice.ask("PATCH", path, json={"description": None})).json()
        assert (cleared["title"], cleared["description"]) == ("new", None)
        same = await alice.ask("PATCH", path, json={})
        assert same.json() == cleared
        assert same.headers["etag"] == (await alice.ask("GET", path)).headers["etag"]

    async def test_are_changed_only_as_they_were_read(self, alice: Person) -> None:
        path = f"/api/tasks/{(await alice.has('old'))['id']}"
        read = (await alice.ask("GET", path)).headers["etag"]
        won = await alice.ask("PATCH", path, {"If-Match": read}, json={"title": "new"})
        assert won.status_code == 200
        assert won.headers["etag"] != read
        for stale in (read, "junk", f"W/{won.headers['etag']}"):
            lost = await alice.ask("PATCH", path, {"If-Match": stale}, json={"title": "lost"})
            assert code(lost) == (412, "StaleTaskError")
        last = {"If-Match": won.headers["etag"]}
        assert (await alice.ask("PATCH", path, last, json={"title": "last"})).status_code == 200
        assert await alice.titles() == ["last"]

    async def test_are_toggled_and_deleted(self, alice: Person) -> None:
        path = f"/api/tasks/{(await alice.has('x'))['id']}"
        for completed in (True, False):
            toggled = await alice.ask("POST", f"{path}/toggle")
            assert toggled.json()["completed"] is completed
            assert toggled.headers["etag"] == (await alice.ask("GET", path)).headers["etag"]
        gone = await alice.ask("DELETE", path)
        assert (gone.status_code, gone.content) == (204, b"")
        assert code(await alice.ask("DELETE", path)) == (404, None)

    async def test_are_deleted_when_completed_and_only_if_requested(
        self, alice: Person, mallory: Person
    ) -> None:
        for who in (alice, mallory):
            await who.has("done", completed=True)
            await who.has("open")
        for query in ("", "?completed=false", "?completed=1", "?completed"):
            refusal = await alice.ask("DELETE", f"/api/tasks{query}")
            assert code(refusal) == (422, "completed")
        deleted = await alice.ask("DELETE", "/api/tasks?completed=true")
        assert (deleted.status_code, deleted.json()) == (200, {"deleted": 1})
        assert await alice.titles() == ["open"]
        assert await mallory.titles() == ["open", "done"]

    async def test_of_alice_are_404_for_mallory(self, alice: Person, mallory: Person) -> None:
        task = await alice.has("secret")
        requests: list[tuple[str, str, Json | None]] = [
            ("GET", "/api/tasks/{}", None),
            ("PATCH", "/api/tasks/{}", {"title": "stolen"}),
            ("PATCH", "/api/tasks/{}", {}),
            ("POST", "/api/tasks/{}/toggle", None),
            ("DELETE", "/api/tasks/{}", None),
        ]
        for method, path, body in requests:
            foreign, missing = [
                await mallory.ask(method, path.format(number), json=body)
                for number in (task["id"], MISSING)
            ]
            assert code(foreign) == (404, None)
            assert (foreign.content, foreign.headers) == (missing.content, missing.headers)
        assert await mallory.titles() == []
        found = await mallory.ask("GET", "/api/tasks?search=secret")
        assert found.json() == {"items": [], "next_cursor": None}
        shown = await alice.ask("GET", f"/api/tasks/{task['id']}")
        assert shown.json() == task

    async def test_of_alice_are_stale_for_mallory_only_as_missing_ones_are(
        self, alice: Person, mallory: Person
    ) -> None:
        task = await alice.has("secret")
        etag = (await alice.ask("GET", f"/api/tasks/{task['id']}")).headers["etag"]
        for header in (etag, '"1"', "junk", "*"):
            foreign, missing = [
                await mallory.ask(
                    "PATCH", f"/api/tasks/{number}", {"If-Match": header}, json={"title": "x"}
                )
                for number in (task["id"], MISSING)
            ]
            assert (foreign.content, foreign.headers) == (missing.content, missing.headers)

    async def test_are_checked(self, alice: Person) -> None:
        for method, path, body, field in _UNFIT:
            response = await alice.ask(method, path, json=body)
            assert (path, body, code(response)) == (path, body, (422, field))

    async def test_body_may_hold_the_longest_description_and_not_much_more(
        self, alice: Person
    ) -> None:
        # A character beyond the basic plane, fully escaped, has twelve bytes.
        body = {"title": "x", "description": "😀" * 65_536}
        assert (await alice.ask("POST", "/api/tasks", json=body)).status_code == 201
        too_long = await alice.ask("POST", "/api/tasks", json={"title": "x" * 2**20})
        assert too_long.status_code == 413


class TestPages:
    @pytest.mark.parametrize("sort", ["newest", "oldest", "recently_updated", "title"])
    async def test_linked_from_each_other_have_every_task_once(
        self, sort: str, alice: Person, mallory: Person
    ) -> None:
        await mallory.has("mallory's milk")
        made = [
            (await alice.has(f"milk & {word} {number}?"))["id"]
            for number, word in product(range(4), ("sugar", "Äpfel", "100%"))
        ]
        await alice.has("bread")
        seen, pages = list[int](), 0
        response = await alice.ask("GET", f"/api/tasks?sort={sort}&limit=5&search=milk%20%26%20")
        while True:
            pages += 1
            seen += [task["id"] for task in response.json()["items"]]
            link = response.headers.get("link")
            if link is None:
                break
            path, _, relation = link.partition(">; ")
            assert relation == 'rel="next"'
            assert path.startswith("</api/tasks?")
            response = await alice.ask("GET", path.removeprefix("<"))
            assert response.status_code == 200
        assert pages == 3
        assert response.json()["next_cursor"] is None
        assert sorted(seen) == sorted(made)
        if sort in {"newest", "oldest"}:
            assert seen == sorted(made, reverse=sort == "newest")

    async def test_are_filtered(self, alice: Person) -> None:
        await alice.has("done", completed=True)
        await alice.has("open")
        for query, titles in {
            "completed=true": ["done"],
            "completed=false": ["open"],
            "search=OPE": ["open"],
            "search=": ["open", "done"],
        }.items():
            page = (await alice.ask("GET", f"/api/tasks?{query}")).json()
            assert [task["title"] for task in page["items"]] == titles

    async def test_of_another_filter_are_refused(self, alice: Person) -> None:
        for title in ("a", "b"):
            await alice.has(title)
        page = (await alice.ask("GET", "/api/tasks?limit=1")).json()
        cursor = page["next_cursor"]
        other = await alice.ask("GET", f"/api/tasks?sort=oldest&cursor={cursor}")
        assert code(other) == (422, "cursor")


class TestCredentials:
    async def test_valid_ones_are_accepted(
        self, anyone: httpx.AsyncClient, owner: Connection
    ) -> None:
        await add_user(owner, "alice")
        for name, credential in accepted(await issue(owner)).items():
            response = await anyone.get("/api/me", headers=credential.headers)
            assert (name, response.json().get("id")) == (name, "alice")

    async def test_invalid_ones_get_the_same_401(
        self, anyone: httpx.AsyncClient, owner: Connection
    ) -> None:
        await add_user(owner, "alice")
        attacks = refused(await issue(owner))
        nothing = await anyone.get("/api/me")
        assert code(nothing) == (401, None)
        others: Json = {}
        for name, credential in attacks.items():
            try:
                response = await anyone.get("/api/me", headers=credential.headers)
            except Exception as error:  # noqa: BLE001  # what a server would make a 500 of
                others[name] = error
                continue
            if (response.content, response.headers) != (nothing.content, nothing.headers):
                others[name] = response
        assert others == {}

    @pytest.mark.parametrize("label", [label for label in OPERATIONS if "/api/" in label])
    async def test_are_asked_for_by_every_operation(
        self, label: str, anyone: httpx.AsyncClient
    ) -> None:
        method, path = label.split()
        response = await anyone.request(method, path.format(task_id=1), json={"title": "x"})
        assert code(response) == (401, None)
        assert response.headers["www-authenticate"] == "Bearer"

    async def test_may_be_a_cookie_in_a_header_of_its_own(
        self, anyone: httpx.AsyncClient, owner: Connection
    ) -> None:
        await add_user(owner, "alice")
        (name, value), *_ = accepted(await issue(owner))["cookie"].headers
        # HTTP/2 may split cookies like this: RFC 9113, section 8.2.3.
        response = await anyone.get("/api/me", headers=[(name, b"theme=dark"), (name, value)])
        assert response.json().get("id") == "alice"


class TestOpenAPI:
    def test_says_how_to_sign_in(self) -> None:
        schema = APP.openapi()
        schemes = schema["components"]["securitySchemes"]
        assert {scheme["type"] for scheme in schemes.values()} == {"http", "apiKey"}
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                assert ("security" in operation) == (path != "/health"), path

    def test_is_valid(self) -> None:
        SCHEMA.validate()

    def test_documents_every_problem_of_every_operation(self) -> None:
        for path, operations in APP.openapi()["paths"].items():
            if path.startswith("/api/"):
                for operation in operations.values():
                    problems = {"400", "401", "404", "409", "412", "413", "422", "503", "504"}
                    assert problems <= set(operation["responses"])

    @pytest.mark.parametrize("label", OPERATIONS)
    @pytest.mark.usefixtures("configured")
    async def test_says_what_the_service_does(self, label: str, owner: Connection) -> None:
        headers = await bearer_of(owner, "alice")
        async with server(APP) as at:
            async with httpx.AsyncClient(base_url=at, headers=headers) as asking:
                created = await asking.post("/api/tasks", json={"title": "x"})
            seen = await asyncio.to_thread(
                _examine, OPERATIONS[label], at, headers, created.json()["id"]
            )
        assert min(seen) in {200, 201, 204}
        assert seen <= {200, 201, 204, 400, 404, 409, 412, 422}


def _examine(
    operation: APIOperation[Any, Any, Any, Any], at: str, headers: dict[str, str], task_id: int
) -> set[int]:
    """Send valid and invalid requests; return the statuses of the responses."""
    seen = set[int]()
    known = {"task_id": task_id} if "{task_id}" in operation.path else None

    @settings(max_examples=50, suppress_health_check=list(HealthCheck))
    @given(
        case=st.one_of(
            operation.as_strategy(),
            operation.as_strategy(path_parameters=known),
            operation.as_strategy(GenerationMode.NEGATIVE),
        )
    )
    def ask(case: Case[Any]) -> None:
        response = case.call_and_validate(base_url=at, headers=headers, checks=CHECKS)
        seen.add(response.status_code)

    ask()
    return seen
