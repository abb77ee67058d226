"""The files that docs/how-to/nextjs.md shows, built and run by the real Next.js."""

import asyncio
import json
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import pytest_asyncio
from better_auth import PASSWORD, ask, todo_api
from fullstack import EXAMPLE as FULLSTACK
from fullstack import chromium_browser, guesses, visitor
from nextjs import EXAMPLE, add, built, serving, shown
from playwright.async_api import Page, expect
from ports import free_port

from todo_db.embedded import LOGIN, EmbeddedPostgres

AUTH: Final = "nextjs_auth_login"
OTHER_PAGES: Final = ("https://mallory.example", "http://127.0.0.1:1", "null")


@pytest.fixture(scope="module")
def api_url() -> str:
    """The address of FastAPI, which a build contains."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def application(api_url: str) -> Path:
    return built(api_url)


@pytest.fixture(scope="module")
def auth_login(todo_postgres: EmbeddedPostgres) -> Generator[str]:
    todo_postgres.create_login(AUTH, role="todo_auth")
    yield AUTH
    todo_postgres._psql(f"DROP ROLE {AUTH}")


@pytest_asyncio.fixture
async def address(
    application: Path,
    api_url: str,
    auth_login: str,
    todo_postgres: EmbeddedPostgres,
    todo_database_name: str,
) -> AsyncGenerator[str]:
    url = f"http://127.0.0.1:{free_port()}"
    own, auth = (
        todo_postgres.url(user=login, database=todo_database_name) for login in (LOGIN, auth_login)
    )
    async with (
        todo_api(own, url, port=int(api_url.rpartition(":")[2])),
        serving(application, auth, url, api_url),
    ):
        yield url


@asynccontextmanager
async def signed_up(address: str, name: str) -> AsyncGenerator[httpx.AsyncClient]:
    async with visitor(address) as browser:
        body = {"name": name, "email": f"{name}@example.org", "password": PASSWORD}
        await ask(browser, "sign-up/email", body)
        yield browser


@pytest_asyncio.fixture
async def alice(address: str) -> AsyncGenerator[httpx.AsyncClient]:
    async with signed_up(address, "alice") as browser:
        yield browser


@pytest_asyncio.fixture
async def bob(address: str) -> AsyncGenerator[httpx.AsyncClient]:
    async with signed_up(address, "bob") as browser:
        yield browser


async def create(browser: httpx.AsyncClient, title: str) -> dict[str, Any]:
    answer = await browser.post("/api/tasks", json={"title": title})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def titles(browser: httpx.AsyncClient) -> list[str]:
    return [task["title"] for task in (await browser.get("/api/tasks")).json()["items"]]


class TestPackages:
    def test_have_the_versions_of_the_other_example(self) -> None:
        here, there = (
            json.loads((folder / "package.json").read_text())["dependencies"]
            for folder in (EXAMPLE, FULLSTACK)
        )
        assert here | there == here


@pytest.mark.node
class TestRewrite:
    async def test_leads_each_user_to_their_own_tasks(
        self, alice: httpx.AsyncClient, bob: httpx.AsyncClient
    ) -> None:
        assert (await ask(alice, "get-session"))["user"]["email"] == "alice@example.org"
        once = {"idempotency-key": "once"}
        made = [
            await alice.post("/api/tasks", json={"title": "hers"}, headers=once) for _ in range(2)
        ]
        assert [answer.status_code for answer in made] == [201, 201]
        assert made[0].json() == made[1].json()
        assert made[0].headers["cache-control"] == "no-store"
        path, first = made[0].headers["location"], {"if-match": made[0].headers["etag"]}

        # Next.js compresses a long answer, and leaves the ETag as it is.
        change = {"description": "x" * 2_000}
        changed = await alice.patch(path, json=change, headers=first)
        assert (changed.status_code, changed.headers["content-encoding"]) == (200, "gzip")
        late = await alice.patch(path, json={"title": "lost"}, headers=first)
        assert (late.status_code, late.json()["code"]) == (412, "StaleTaskError")
        assert late.headers["content-type"] == "application/problem+json"
        latest = {"if-match": changed.headers["etag"]}
        assert (await alice.patch(path, json={"title": "kept"}, headers=latest)).status_code == 200

        await create(bob, "his")
        assert (await titles(alice), await titles(bob)) == (["kept"], ["his"])
        for method in ("GET", "DELETE"):
            foreign = await bob.request(method, path)
            missing = await bob.request(method, "/api/tasks/999999")
            assert foreign.status_code == missing.status_code == 404
            assert foreign.content == missing.content
        assert (await alice.delete(path)).status_code == 204

    async def test_shows_fastapi_where_a_request_comes_from(self, alice: httpx.AsyncClient) -> None:
        for origin in OTHER_PAGES:
            answer = await alice.post("/api/tasks", json={"title": "x"}, headers={"origin": origin})
            assert answer.json()["code"] == "ForbiddenOriginError"
        del alice.headers["origin"]
        for site, status in (("same-site", 403), ("cross-site", 403), ("same-origin", 201)):
            headers = {"sec-fetch-site": site}
            answer = await alice.post("/api/tasks", json={"title": site}, headers=headers)
            assert answer.status_code == status
        assert await titles(alice) == ["same-origin"]


@pytest.mark.node
class TestServerComponent:
    async def test_shows_the_tasks_of_its_user_alone(
        self, alice: httpx.AsyncClient, bob: httpx.AsyncClient, address: str
    ) -> None:
        await create(alice, "hers")
        await create(bob, "his")
        expected = [["hers"], ["his"], []]
        async with visitor(address) as nobody:
            # One after the other, what a cache keeps of one is there for the next.
            assert [await shown(browser) for browser in (alice, bob, nobody)] == expected
            pages = await asyncio.gather(*map(shown, [alice, bob, nobody] * 10))
            assert pages == expected * 10
        private = (await alice.get("/tasks")).headers["cache-control"]
        assert {"private", "no-store"} <= set(private.split(", "))

    async def test_shows_nothing_to_a_session_that_has_ended(
        self, alice: httpx.AsyncClient, address: str
    ) -> None:
        await create(alice, "hers")
        assert await shown(alice) == ["hers"]
        async with visitor(address, httpx.Cookies(alice.cookies)) as mallory:
            assert await shown(mallory) == ["hers"]
            await ask(alice, "sign-out", {})
            assert not alice.cookies
            for browser in (alice, mallory):
                assert "hers" not in (await browser.get("/tasks")).text
                assert (await browser.get("/api/tasks")).status_code == 401


@pytest.mark.node
class TestServerAction:
    async def test_creates_a_task_of_its_user(
        self, alice: httpx.AsyncClient, bob: httpx.AsyncClient
    ) -> None:
        assert await add(alice, "hers") == 303
        assert (await shown(alice), await shown(bob)) == (["hers"], [])

    async def test_refuses_another_page(self, alice: httpx.AsyncClient) -> None:
        for origin in OTHER_PAGES:
            assert await add(alice, "theirs", origin=origin) == 500
        # With this header Next.js lets the request pass, and FastAPI refuses it.
        forged = {"origin": "https://mallory.example", "x-forwarded-host": "mallory.example"}
        assert await add(alice, "theirs", **forged) == 500
        assert await titles(alice) == []


@pytest.mark.node
class TestAddress:
    async def test_is_what_a_client_writes_if_no_proxy_replaces_it(self, address: str) -> None:
        async with visitor(address) as mallory:
            others = [f"203.0.113.{number}" for number in range(5, 10)]
            statuses = await guesses(mallory, ["203.0.113.0"] * 5 + others)
        assert statuses == [401, 401, 401, 429, 429, *[401] * 5]


async def press(page: Page, name: str) -> None:
    """Press a button, once React listens to it."""
    listens = """name => [...document.querySelectorAll("button")].some((one) =>
        one.textContent === name && Object.keys(one).some((key) => key.startsWith("__react")))"""
    await page.wait_for_function(listens, arg=name)
    await page.get_by_role("button", name=name).click()


@pytest.mark.browser
class TestBrowser:
    async def test_forgets_the_tasks_at_a_sign_out(
        self, alice: httpx.AsyncClient, address: str
    ) -> None:
        await create(alice, "hers")
        async with chromium_browser() as browser:
            page = await browser.new_page()
            await page.goto(address)
            await page.get_by_label("E-mail").fill("alice@example.org")
            await page.get_by_label("Password").fill(PASSWORD)
            await press(page, "Sign in")
            await press(page, "Done")
            await expect(page.get_by_role("listitem")).to_have_text("hers ✓")
            assert (await alice.get("/api/tasks")).json()["items"][0]["completed"]

            await page.get_by_label("New task").fill("hers as well")
            await page.get_by_role("button", name="Add").click()
            await expect(page.get_by_role("listitem")).to_have_text(["hers as well Done", "hers ✓"])

            await press(page, "Sign out")
            await page.wait_for_url(f"{address}/")
            assert "hers" not in await page.content()
            await page.go_back()
            await page.wait_for_url(f"{address}/")
            assert "hers" not in await page.content()
