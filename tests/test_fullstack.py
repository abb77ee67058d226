"""The full-stack example, started with its documented command and used in a browser."""

import asyncio
import json
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import asyncpg
import httpx
import pytest
import pytest_asyncio
from better_auth import PASSWORD, ask, free_port, tables_that_name
from driver import Connection
from fullstack import ROOT, Person, chromium_browser, started, visitor
from playwright.async_api import Browser, Route, expect

from todo_db.embedded import EmbeddedPostgres

pytestmark = pytest.mark.browser

IMAGES: Final = ROOT / "docs" / "images"
"""The pictures of the documentation are taken when they are missing."""


@pytest.fixture(scope="module")
def data() -> Generator[Path]:
    with TemporaryDirectory(prefix="todo-db-") as folder:
        yield Path(folder) / "postgres"


@pytest.fixture(scope="module")
def address(data: Path) -> Generator[str]:
    with started(data) as address:
        yield address


@pytest_asyncio.fixture
async def administrator(data: Path, address: str) -> AsyncGenerator[Connection]:
    """A superuser's connection to the application's own PostgreSQL."""
    del address
    with EmbeddedPostgres(data) as server:
        connection = await asyncpg.connect(server.url(user="postgres"))
        yield connection
        await connection.close()


@pytest_asyncio.fixture(scope="module")
async def chromium() -> AsyncGenerator[Browser]:
    async with chromium_browser() as browser:
        yield browser


@pytest_asyncio.fixture
async def alice(chromium: Browser, address: str) -> AsyncGenerator[Person]:
    async with Person(chromium, address, "Alice") as alice:
        await alice.sign_up()
        yield alice
        # The next test starts without her account.
        if await alice.page.locator("#tasks").is_visible():
            await alice.delete_account()
            await expect(alice.page.locator("#door")).to_be_visible()
    assert alice.complaints == []


@pytest_asyncio.fixture
async def bob(chromium: Browser, address: str) -> AsyncGenerator[Person]:
    async with Person(chromium, address, "Bob") as bob:
        await bob.sign_up()
        yield bob
        await bob.delete_account()
        await expect(bob.page.locator("#door")).to_be_visible()
    assert bob.complaints == []


async def titles(address: str, cookies: httpx.Cookies) -> list[str]:
    async with visitor(address, cookies) as client:
        items = (await client.get("/api/tasks")).json()["items"]
    return [item["title"] for item in items]


class TestPage:
    async def test_leads_two_users_from_sign_up_to_deletion(
        self, alice: Person, bob: Person, administrator: Connection
    ) -> None:
        await alice.add("Water the plants")
        await alice.add("Book the train to Vienna", "A window seat, before ten")
        await alice.add("Buy milk")
        await alice.page.get_by_label("Done: Water the plants").click()
        await expect(alice.page.locator("li.done .title")).to_have_text("Water the plants")
        await alice.fill("Search", "TRAIN")
        await expect(alice.titles).to_have_text(["Book the train to Vienna"])
        await alice.fill("Search", "")
        await alice.page.get_by_label("Show").select_option("Done")
        await expect(alice.titles).to_have_text(["Water the plants"])
        await alice.page.get_by_label("Show").select_option("All")
        await alice.page.get_by_label("Sort by").select_option("By title")
        await expect(alice.titles).to_have_text(
            ["Book the train to Vienna", "Buy milk", "Water the plants"]
        )
        await alice.edit("Buy milk", "Buy oat milk")
        await expect(alice.titles.nth(1)).to_have_text("Buy oat milk")

        # bob sees no task of alice, and gets the same answer as for a task that does not exist.
        await expect(bob.page.locator("#empty-title")).to_have_text("Nothing to do yet.")
        task_id = await administrator.fetchval("SELECT max(id) FROM tasks")
        assert await bob.send(f"/api/tasks/{task_id}") == await bob.send("/api/tasks/999999")
        assert (await alice.send(f"/api/tasks/{task_id}"))[0] == 200
        await bob.add("his own")
        await alice.page.reload()
        await expect(alice.titles).to_have_count(3)

        await alice.press("Delete: Book the train to Vienna")
        await expect(alice.titles).to_have_text(["Buy oat milk", "Water the plants"])
        await alice.press("Delete all that is done")
        await alice.press("Delete them")
        await expect(alice.titles).to_have_text(["Buy oat milk"])

        # After a sign-out the page shows no task; after the next sign-in, all of them.
        await alice.press("Sign out")
        await expect(alice.page.locator("#door")).to_be_visible()
        assert "milk" not in await alice.page.content()
        await alice.sign_in("wrong horse battery")
        await expect(alice.alert).to_have_text("Invalid email or password")
        await alice.sign_in()
        await expect(alice.titles).to_have_text(["Buy oat milk"])

        user_id = await administrator.fetchval(
            "SELECT id FROM users WHERE email = 'alice@example.org'"
        )
        hers = (user_id, alice.email, "Buy oat milk")
        assert await tables_that_name(administrator, *hers) >= {"users", "sessions", "tasks"}
        await alice.delete_account()
        await expect(alice.alert).to_have_text("Your account is deleted, and everything in it.")
        assert await tables_that_name(administrator, *hers) == set()
        await expect(bob.titles).to_have_text(["his own"])

    async def test_loads_more_pages(self, alice: Person) -> None:
        await alice.create(*(f"Task {number}" for number in range(23)))
        await expect(alice.page.get_by_text("20 tasks, and there are more")).to_be_visible()
        await alice.press("Load more")
        await expect(alice.titles).to_have_text([f"Task {n}" for n in reversed(range(23))])
        await expect(alice.page.get_by_role("button", name="Load more")).to_be_hidden()

    async def test_shows_what_was_typed_as_text(self, alice: Person) -> None:
        markup = "<img src=x onerror=\"document.title='broken'\"><b>bold</b>"
        await alice.add(markup, f"{markup}\n<script>document.title = 'broken'</script>")
        await expect(alice.titles).to_have_text(markup)
        assert await alice.page.locator("#list :is(img, b, script)").count() == 0
        assert await alice.page.title() == "Tasks"

    async def test_shows_errors(self, alice: Person, chromium: Browser, address: str) -> None:
        await alice.fill("New task", "   ")
        await alice.press("Add")
        await expect(alice.alert).to_contain_text("blank")
        async with Person(chromium, address, "ALICE") as other:
            await other.press("Create one")
            await other.fill("Name", "Another")
            await other.fill("E-mail", other.email)
            await other.fill("Password", PASSWORD)
            await other.press("Sign up")
            await expect(other.alert).to_contain_text("User already exists")

    async def test_adds_once_what_is_sent_twice(self, alice: Person) -> None:
        async def lose_the_answer(route: Route) -> None:
            await route.fetch()
            await route.abort()

        await alice.page.route("**/api/tasks", lose_the_answer, times=1)
        await alice.fill("New task", "Buy milk")
        await alice.press("Add")
        await expect(alice.alert).to_contain_text("cannot be reached")
        await alice.press("Add")
        await expect(alice.titles).to_have_text(["Buy milk"])

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    async def test_fits_a_telephone(self, alice: Person, scheme: str) -> None:
        await alice.page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        await alice.page.set_viewport_size({"width": 320, "height": 640})
        await alice.add("long" * 50, "words" * 50)
        await alice.press(f"Edit: {'long' * 50}")
        wide = "document.documentElement.scrollWidth"
        assert await alice.page.evaluate(wide) == 320
        back = await alice.page.evaluate(
            "getComputedStyle(document.documentElement).backgroundColor"
        )
        assert back == {"light": "rgb(244, 245, 248)", "dark": "rgb(18, 20, 26)"}[scheme]

    async def test_works_without_a_mouse(self, alice: Person) -> None:
        keyboard = alice.page.keyboard
        await expect(alice.page.get_by_label("New task")).to_be_focused()
        await keyboard.type("Buy milk")
        await keyboard.press("Enter")
        await expect(alice.titles).to_have_text(["Buy milk"])
        await alice.page.get_by_label("Done: Buy milk").focus()
        await keyboard.press("Space")
        await expect(alice.page.locator("li.done")).to_have_count(1)
        await expect(alice.page.get_by_label("Done: Buy milk")).to_be_focused()
        await keyboard.press("Tab")
        await keyboard.press("Enter")
        await expect(alice.field("Title")).to_be_focused()
        await keyboard.press("ControlOrMeta+A")
        await keyboard.type("Buy oat milk")
        await keyboard.press("Enter")
        await expect(alice.titles).to_have_text(["Buy oat milk"])
        await expect(alice.page.get_by_label("Edit: Buy oat milk")).to_be_focused()


class TestServer:
    async def test_lets_the_page_load_nothing_from_elsewhere(self, address: str) -> None:
        async with visitor(address) as client:
            answer = await client.get("/")
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self';")
            assert "unsafe" not in policy
            for path in ("/server.mjs", "/auth.mjs", "/package.json", "/%2e%2e/server.mjs"):
                assert (await client.get(path)).status_code == 404

    async def test_forwards_no_request_of_another_page(self, address: str) -> None:
        async with visitor(address) as client:
            for site, status in (("same-site", 403), ("cross-site", 403), ("same-origin", 401)):
                headers = {"sec-fetch-site": site}
                answer = await client.post("/api/tasks", headers=headers, json={"title": "x"})
                assert answer.status_code == status

    async def test_logs_each_of_its_parts_in_as_itself(
        self, alice: Person, administrator: Connection
    ) -> None:
        await alice.add("Buy milk")
        rows = await administrator.fetch(
            "SELECT DISTINCT usename, pg_has_role(usename, 'todo_app', 'MEMBER'),"
            " pg_has_role(usename, 'todo_auth', 'MEMBER'), rolsuper OR rolbypassrls"
            " FROM pg_stat_activity JOIN pg_roles ON rolname = usename"
            " WHERE datname = 'todo' AND pid <> pg_backend_pid() ORDER BY 1"
        )
        assert [tuple(row) for row in rows] == [
            ("todo_auth_login", False, True, False),
            ("todo_login", True, False, False),
        ]


class TestStart:
    async def test_keeps_its_data(self, folder: Path) -> None:
        data, port = folder / "postgres", free_port()
        with started(data, "--port", str(port)) as address:
            assert address == f"http://127.0.0.1:{port}"
            async with visitor(address) as alice:
                body = {"name": "Alice", "email": "alice@example.org", "password": PASSWORD}
                await ask(alice, "sign-up/email", body)
                await alice.post("/api/tasks", json={"title": "Buy milk"})
        # Ctrl-C has ended every process, also PostgreSQL.
        with pytest.raises(httpx.ConnectError):
            await titles(address, alice.cookies)
        assert not (data / "postmaster.pid").exists()
        with started(data, "--port", str(port)):
            assert await titles(address, alice.cookies) == ["Buy milk"]
