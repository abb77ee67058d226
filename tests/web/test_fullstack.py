"""The full-stack example, started with its documented command and used in a browser."""

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Literal

import asyncpg
import httpx
import pytest
import pytest_asyncio
from better_auth import PASSWORD, ask, tables_that_name
from cache import ROOT
from driver import Connection
from fullstack import EXAMPLE, Person, chromium_browser, guesses, started, visitor
from playwright.async_api import Browser, Route, expect
from ports import free_port

from todo_db.embedded import EmbeddedPostgres

pytestmark = pytest.mark.browser

TASKS: Final = {
    "Water the plants": "",
    "Book the train to Vienna": "A window seat, before ten",
    "Buy milk": "",
}


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
async def production(data: Path, address: str) -> AsyncGenerator[str]:
    """Another server.mjs, with NODE_ENV=production, whose API answers with the headers it got."""
    del address

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = [line.split(": ", 1) for line in head.splitlines()[1:-1]]
        body = json.dumps({name.lower(): value for name, value in lines})
        writer.write(f"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{body}".encode())
        writer.close()

    api = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{free_port()}"
    with EmbeddedPostgres(data) as server:
        environment = {
            "BETTER_AUTH_SECRET": "known to these tests, and 32 characters at least",
            "BETTER_AUTH_URL": url,
            "DATABASE_URL": server.url(user="todo_auth_login"),
            "NODE_ENV": "production",
            "PORT": url.rpartition(":")[2],
            "TODO_API_URL": f"http://127.0.0.1:{api.sockets[0].getsockname()[1]}",
        }
        process = await asyncio.create_subprocess_exec(
            *("node", "server.mjs"),
            cwd=EXAMPLE,
            env=os.environ | environment,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert (await process.stdout.readline()).startswith(b"Listening")
        yield url
        process.terminate()
        await process.wait()
    api.close()


@pytest_asyncio.fixture
async def alice(chromium: Browser, address: str) -> AsyncGenerator[Person]:
    async with Person(chromium, address, "Alice") as alice:
        await alice.sign_up()
        yield alice
        await alice.leave()
    assert alice.complaints == []


@pytest_asyncio.fixture
async def bob(chromium: Browser, address: str) -> AsyncGenerator[Person]:
    async with Person(chromium, address, "Bob") as bob:
        await bob.sign_up()
        yield bob
        await bob.leave()
    assert bob.complaints == []


async def lose_the_answer(route: Route) -> None:
    await route.fetch()
    await route.abort()


def late(answered: asyncio.Event, waiting: asyncio.Event) -> Callable[[Route], Awaitable[None]]:
    """Return a handler that lets the server answer, and keeps the answer for some time."""

    async def answer(route: Route) -> None:
        response = await route.fetch()
        answered.set()
        await waiting.wait()
        await route.fulfill(response=response)

    return answer


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
        await alice.page.route("**/api/tasks", lose_the_answer, times=1)
        await alice.fill("New task", "Buy milk")
        await alice.press("Add")
        await expect(alice.alert).to_contain_text("cannot be reached")
        await alice.press("Add")
        await expect(alice.titles).to_have_text(["Buy milk"])
        # The page did not show the one that it got no answer for.
        await alice.page.reload()
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
        assert back == {"light": "rgb(243, 244, 248)", "dark": "rgb(18, 20, 26)"}[scheme]

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


class TestStates:
    """Every state of the page: axe-core finds no barrier, nothing is wider than the screen."""

    @pytest.mark.parametrize("width", [760, 320])
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    async def test_have_no_barrier(
        self, chromium: Browser, address: str, scheme: Literal["light", "dark"], width: int
    ) -> None:
        person = Person(chromium, address, "A" * 100, scheme=scheme, width=width)
        person.email = "long.name@example.org"
        async with person as alice:
            await expect(alice.page.locator("#door")).to_be_visible()
            await alice.look("signed-out")
            await alice.sign_in("wrong horse battery")
            await expect(alice.alert).to_have_text("Invalid email or password")
            await alice.look("sign-in-error")
            await alice.sign_up()
            await expect(alice.page.locator("#empty")).to_be_visible()
            await alice.look("empty")
            await self.load(alice)
            await self.fill(alice)
            await self.edit(alice)
            await alice.delete_account()
            await expect(alice.alert).to_contain_text("deleted")
        assert person.complaints == []

    async def load(self, alice: Person) -> None:
        page = alice.page
        waiting = asyncio.Event()

        async def hold(route: Route) -> None:
            await waiting.wait()
            await route.continue_()

        await page.route("**/api/me", hold)
        await page.reload()
        await expect(page.locator("#opening")).to_be_visible()
        await alice.look("opening")
        await page.route("**/api/tasks?*", lambda route: route.abort(), times=1)
        waiting.set()
        await expect(alice.alert).to_contain_text("cannot be reached")
        await alice.look("list-error")
        await page.unroute("**/api/me")
        await page.route("**/api/me", lambda route: route.abort(), times=1)
        await page.reload()
        await expect(page.locator("#failure")).to_be_visible()
        await alice.look("failure")
        waiting.clear()
        await page.route("**/api/tasks?*", hold, times=1)
        await alice.press("Try again")
        await expect(page.locator("#list-waiting")).to_be_visible()
        await alice.look("loading")
        waiting.set()
        await expect(page.locator("#empty")).to_be_visible()

    async def fill(self, alice: Person) -> None:
        page = alice.page
        for title, details in TASKS.items():
            await alice.add(title, details)
        await alice.create(*["long" * 50], description="words" * 100)
        await page.get_by_label("Done: Water the plants").click()
        await expect(page.locator("li.done")).to_have_count(1)
        await alice.look("list")
        await alice.fill("New task", " ")
        await alice.press("Add")
        await expect(page.locator("#add-alert")).to_be_visible()
        await alice.look("error")
        await alice.fill("New task", "")
        await page.get_by_label("Show").select_option("Done")
        await expect(alice.titles).to_have_count(1)
        await alice.fill("New task", "Call Bob")
        await alice.press("Add")
        await expect(page.locator("#notice")).to_be_visible()
        await alice.look("notice")
        await alice.fill("Search", "nowhere")
        await expect(page.locator("#empty-title")).to_contain_text("nowhere")
        await alice.look("nothing-found")
        await alice.press("Show all tasks")
        await expect(alice.titles).to_have_count(len(TASKS) + 2)

    async def edit(self, alice: Person) -> None:
        page = alice.page
        await alice.press("Edit: Buy milk")
        await expect(alice.field("Title")).to_be_focused()
        await alice.look("editing")
        await alice.fill("Title", "Buy oat milk")
        task = await alice.find("Buy milk")
        await alice.change(task, title="Buy butter", description="Two of them")
        await alice.press("Save")
        await expect(alice.form.locator(".theirs")).to_be_visible()
        await alice.look("conflict")
        await alice.press("Take theirs")
        await alice.press("Delete: Buy butter")
        await expect(page.get_by_role("button", name="Undo: Buy butter")).to_be_focused()
        await alice.look("undo")
        await alice.press("Delete all that is done")
        await expect(page.get_by_role("dialog", name="Delete all that is done?")).to_be_visible()
        await alice.look("clear")
        await alice.press("Keep them")
        await alice.press("Delete account")
        await expect(page.get_by_role("dialog", name="Delete your account?")).to_be_visible()
        await alice.look("leave")
        await alice.press("Keep it")

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    async def test_are_shown_in_the_documentation(
        self, chromium: Browser, address: str, scheme: Literal["light", "dark"]
    ) -> None:
        picture = ROOT / "docs" / "images" / f"fullstack-{scheme}.png"
        async with Person(chromium, address, "Alice", scheme=scheme) as alice:
            await alice.sign_up()
            for title, details in TASKS.items():
                await alice.add(title, details)
            await alice.page.get_by_label("Done: Water the plants").click()
            await expect(alice.page.locator("li.done .title")).to_have_text("Water the plants")
            if not picture.exists():
                await alice.page.wait_for_timeout(2_500)  # until the colours of new tasks are gone
                await alice.page.mouse.move(0, 0)
                await alice.page.screenshot(path=picture)
            await alice.delete_account()
            await expect(alice.page.locator("#door")).to_be_visible()
        assert picture.stat().st_size < 150_000

    async def test_have_targets_of_44_pixels(self, alice: Person) -> None:
        await alice.create("Buy milk", description="\n".join("123456789"))
        await alice.create("Water the plants")
        await alice.press("Edit: Water the plants")
        await expect(alice.form).to_be_visible()
        for width in (760, 320):
            await alice.page.set_viewport_size({"width": width, "height": 700})
            small = await alice.page.evaluate(
                """() => [...document.querySelectorAll("button, input, select, textarea")]
                    .filter((element) => element.checkVisibility())
                    .map((element) => [element.outerHTML, element.getBoundingClientRect()])
                    .filter(([_, { width, height }]) => width < 44 || height < 44)
                    .map(([html]) => html)"""
            )
            assert small == []

    async def test_keep_a_long_name_beside_sign_out(self, chromium: Browser, address: str) -> None:
        async with Person(chromium, address, "Bartholomew " * 8, width=320) as bob:
            bob.email = "bartholomew@example.org"
            await bob.sign_up()
            button = bob.page.get_by_role("button", name="Sign out")
            box = await button.bounding_box()
            assert box is not None
            assert box["x"] + box["width"] <= 320
            assert box["y"] < 60
            await bob.delete_account()
            await expect(bob.page.locator("#door")).to_be_visible()

    async def test_fold_long_details(self, alice: Person) -> None:
        await alice.create("Short", description="One line")
        await alice.create("Long", description="\n".join("123456789"))
        details = alice.page.locator("li", has_text="Long").locator(".description")
        folded = await details.bounding_box()
        await alice.press("More of: Long")
        unfolded = await details.bounding_box()
        assert folded is not None
        assert unfolded is not None
        assert folded["height"] * 2 < unfolded["height"]
        await alice.press("Less of: Long")
        await expect(alice.page.get_by_role("button", name="More of: Long")).to_be_focused()
        await expect(alice.page.get_by_role("button", name="More of: Short")).to_be_hidden()


class TestLoading:
    async def test_gives_up_on_a_frozen_server(self, alice: Person) -> None:
        async def freeze(_: Route) -> None:
            """Give no answer."""

        await alice.page.route("**/api/me", freeze)
        await alice.page.reload()
        await expect(alice.page.get_by_text("Loading…")).to_be_visible()
        await expect(alice.alert).to_contain_text("did not answer in time")
        await alice.page.unroute("**/api/me")
        await alice.press("Try again")
        await expect(alice.page.locator("#empty")).to_be_visible()
        await expect(alice.page.get_by_label("New task")).to_be_focused()

    async def test_offers_to_load_a_list_again(self, alice: Person) -> None:
        await alice.create("Buy milk")
        await alice.page.route("**/api/tasks?*", lambda route: route.abort(), times=1)
        await alice.page.get_by_label("Sort by").select_option("By title")
        await expect(alice.page.locator("#list-alert")).to_contain_text("cannot be reached")
        await expect(alice.titles).to_be_hidden()
        await alice.press("Try again")
        await expect(alice.titles).to_be_visible()
        assert await alice.focused() == "title"

    async def test_waits_as_long_as_a_busy_server_says(self, alice: Person) -> None:
        times: list[float] = []

        async def refuse(route: Route) -> None:
            times.append(asyncio.get_running_loop().time())
            if len(times) == 3:
                await route.continue_()
            else:
                await route.fulfill(status=503, headers={"retry-after": "1"}, body="{}")

        await alice.page.route("**/api/tasks", refuse)
        await alice.fill("New task", "Buy milk")
        await alice.press("Add")
        await expect(alice.news).to_have_text("The server is busy. Trying again…")
        await expect(alice.titles).to_have_text(["Buy milk"])
        # A second each, and what the machine adds.
        assert all(0.9 < b - a < 10 for a, b in pairwise(times))

    async def test_says_that_a_server_stays_busy(self, alice: Person) -> None:
        count = 0

        async def refuse(route: Route) -> None:
            nonlocal count
            count += 1
            body = json.dumps({"detail": "No connection is free."})
            await route.fulfill(status=503, headers={"retry-after": "0"}, body=body)

        await alice.page.route("**/api/tasks", refuse)
        await alice.fill("New task", "Buy milk")
        await alice.press("Add")
        await expect(alice.page.locator("#add-alert")).to_have_text("No connection is free.")
        assert count == 3
        await expect(alice.page.get_by_label("New task")).to_have_value("Buy milk")


class TestAdding:
    async def test_says_that_the_filter_hides_a_task(self, alice: Person) -> None:
        await alice.page.get_by_label("Show").select_option("Done")
        await expect(alice.page.locator("#empty-title")).to_have_text("Nothing is done yet.")
        await alice.fill("New task", "Buy milk")
        await alice.press("Add")
        status = alice.page.get_by_role("status")
        await expect(status).to_contain_text("Added “Buy milk”. The filter hides it.")
        await expect(alice.titles).to_have_count(0)
        await status.get_by_role("button", name="Show all tasks").click()
        await expect(alice.titles).to_have_text(["Buy milk"])
        assert await alice.focused() == "title"
        assert alice.query == ""

    async def test_keeps_the_pages_that_are_loaded(self, alice: Person) -> None:
        await alice.create(*(f"Task {number}" for number in range(43)))
        await alice.press("Load more")
        await expect(alice.titles).to_have_count(40)
        await alice.add("Buy milk")
        await expect(alice.titles).to_have_count(41)
        await expect(alice.titles.first).to_have_text("Buy milk")
        await alice.press("Load more")
        await expect(alice.titles).to_have_count(44)

    @pytest.mark.parametrize("sort", ["Oldest first", "By title", "Last changed first"])
    async def test_shows_a_task_once_in_every_order(self, alice: Person, sort: str) -> None:
        await alice.create(*(f"Task {number}" for number in range(21)))
        answered, waiting = asyncio.Event(), asyncio.Event()
        await alice.page.route("**/api/tasks?sort=*", late(answered, waiting), times=1)
        await alice.page.get_by_label("Sort by").select_option(sort)
        await answered.wait()
        await alice.fill("New task", "Zebra")
        await alice.press("Add")
        await expect(alice.news).to_have_text("Added “Zebra”.")
        waiting.set()
        await expect(alice.titles.first).to_have_text("Zebra")
        await alice.press("Load more")
        await expect(alice.titles).to_have_count(22)
        await expect(alice.titles.get_by_text("Zebra")).to_have_count(1)
        await expect(alice.titles.first).to_have_text("Zebra")


class TestEditing:
    async def test_changes_title_and_details(self, alice: Person) -> None:
        await alice.create("Buy milk", description="Two bottles")
        await alice.press("Edit: Buy milk")
        await alice.form.get_by_label("Title").fill("Buy oat milk")
        await alice.form.get_by_label("Details").fill("Three bottles\nfrom the market")
        await alice.press("Save")
        await expect(alice.titles).to_have_text(["Buy oat milk"])
        assert await alice.focused() == "Edit: Buy oat milk"
        assert await alice.stored() == {"Buy oat milk": "Three bottles\nfrom the market"}
        await alice.press("Edit: Buy oat milk")
        await alice.form.get_by_label("Details").fill("")
        await alice.press("Save")
        await expect(alice.form).to_be_hidden()
        assert await alice.stored() == {"Buy oat milk": None}

    async def test_sends_only_what_was_changed(self, alice: Person) -> None:
        await alice.create("Buy milk", description="a\r\nb")
        await alice.edit("Buy milk", "Buy oat milk")
        await expect(alice.titles).to_have_text(["Buy oat milk"])
        assert await alice.stored() == {"Buy oat milk": "a\r\nb"}

    async def test_closes_on_escape(self, alice: Person) -> None:
        await alice.create("Buy milk")
        await alice.press("Edit: Buy milk")
        await alice.form.get_by_label("Title").fill("Buy oat milk")
        await alice.page.keyboard.press("Escape")
        await expect(alice.form).to_be_hidden()
        await expect(alice.titles).to_have_text(["Buy milk"])
        assert await alice.focused() == "Edit: Buy milk"

    @pytest.mark.parametrize(
        ("choice", "title", "details"),
        [("Keep mine", "Buy oat milk", None), ("Take theirs", "Buy butter", "Two of them")],
    )
    async def test_shows_both_versions_of_a_conflict(
        self, alice: Person, choice: str, title: str, details: str | None
    ) -> None:
        [task] = await alice.create("Buy milk")
        await alice.press("Edit: Buy milk")
        await alice.form.get_by_label("Title").fill("Buy oat milk")
        await alice.change(task, title="Buy butter", description="Two of them")
        await alice.press("Save")
        await expect(alice.form.get_by_role("alert")).to_contain_text("changed elsewhere")
        await expect(alice.form.get_by_label("Title")).to_have_value("Buy oat milk")
        theirs = alice.form.get_by_role("group", name="Saved elsewhere")
        await expect(theirs).to_contain_text("Buy butter")
        await expect(theirs).to_contain_text("Two of them")
        await alice.press(choice)
        await expect(alice.titles).to_have_text([title])
        assert await alice.focused() == f"Edit: {title}"
        assert await alice.stored() == {title: details}

    async def test_compares_again_after_another_change(self, alice: Person) -> None:
        [task] = await alice.create("Buy milk")
        await alice.press("Edit: Buy milk")
        await alice.form.get_by_label("Title").fill("Buy oat milk")
        for title in ("Buy butter", "Buy cheese"):
            await alice.change(task, title=title)
            await alice.form.locator(".save").click()
            await expect(alice.form.locator(".their-title")).to_have_text(title)
        assert await alice.stored() == {"Buy cheese": None}

    async def test_sees_no_conflict_in_a_check_mark(self, alice: Person) -> None:
        [task] = await alice.create("Buy milk")
        await alice.press("Edit: Buy milk")
        await alice.change(task, completed=True)
        await alice.fill("Title", "Buy oat milk")
        await alice.press("Save")
        await expect(alice.page.locator("li.done .title")).to_have_text("Buy oat milk")

    async def test_sees_no_conflict_with_itself(self, alice: Person) -> None:
        [task] = await alice.create("Buy milk")
        await alice.press("Edit: Buy milk")
        await alice.page.route(f"**/api/tasks/{task['id']}", lose_the_answer, times=1)
        await alice.fill("Title", "Buy oat milk")
        await alice.press("Save")
        await expect(alice.form.get_by_role("alert")).to_contain_text("cannot be reached")
        await alice.press("Save")
        await expect(alice.form).to_be_hidden()
        await expect(alice.titles).to_have_text(["Buy oat milk"])

    async def test_keeps_the_text_of_a_task_that_is_gone(self, alice: Person) -> None:
        [task] = await alice.create("Buy milk")
        await alice.press("Edit: Buy milk")
        await alice.form.get_by_label("Details").fill("Two bottles")
        await alice.send(f"/api/tasks/{task['id']}", "DELETE")
        await alice.press("Save")
        await expect(alice.form.get_by_role("alert")).to_contain_text("gone")
        await alice.press("Save as a new task")
        await expect(alice.form).to_be_hidden()
        assert await alice.stored() == {"Buy milk": "Two bottles"}
        await alice.edit("Buy milk", "Buy oat milk")
        await expect(alice.titles).to_have_text(["Buy oat milk"])

    async def test_adds_once_a_task_that_is_gone(self, alice: Person) -> None:
        [task] = await alice.create("Buy milk")
        await alice.press("Edit: Buy milk")
        await alice.fill("Title", "Buy oat milk")
        await alice.send(f"/api/tasks/{task['id']}", "DELETE")
        await alice.press("Save")
        await alice.page.route("**/api/tasks", lose_the_answer, times=1)
        await alice.press("Save as a new task")
        await expect(alice.form.get_by_role("alert")).to_contain_text("cannot be reached")
        await alice.press("Save as a new task")
        await expect(alice.form).to_be_hidden()
        await alice.page.reload()
        await expect(alice.titles).to_have_text(["Buy oat milk"])

    async def test_survives_another_filter(self, alice: Person) -> None:
        await alice.create("Buy milk", "Water the plants")
        await alice.press("Edit: Buy milk")
        await alice.fill("Title", "Buy oat milk")
        async with alice.page.expect_response("**/api/tasks?search=plants*"):
            await alice.fill("Search", "plants")
        await expect(alice.page.locator("#list-area")).to_have_attribute("aria-busy", "false")
        await expect(alice.form.get_by_label("Title")).to_have_value("Buy oat milk")
        await alice.press("Save")
        await expect(alice.titles).to_have_text(["Buy oat milk", "Water the plants"])

    async def test_says_that_a_task_is_gone(self, alice: Person) -> None:
        tasks = await alice.create("Buy milk", "Water the plants", "Call Bob")
        for task in tasks:
            await alice.send(f"/api/tasks/{task['id']}", "DELETE")
        await alice.press("Edit: Buy milk")
        await expect(alice.alert).to_contain_text("gone")
        await expect(alice.page.get_by_role("button", name="Close")).to_be_focused()
        await alice.press("Close")
        assert await alice.focused() == "Delete: Water the plants"
        await alice.page.get_by_label("Done: Water the plants").click()
        await expect(alice.alert).to_contain_text("gone")
        await expect(alice.titles).to_have_text(["Call Bob"])


class TestDeleting:
    async def test_can_be_undone(self, alice: Person) -> None:
        await alice.create("Buy milk")
        sent: list[str] = []
        alice.page.on("request", lambda request: sent.append(request.method))
        await alice.press("Delete: Buy milk")
        await expect(alice.titles).to_have_count(0)
        await expect(alice.page.get_by_role("status")).to_contain_text("You can undo this")
        await expect(alice.page.get_by_role("button", name="Undo: Buy milk")).to_be_focused()
        await alice.press("Undo: Buy milk")
        await expect(alice.titles).to_have_text(["Buy milk"])
        assert await alice.focused() == "Delete: Buy milk"
        await alice.page.wait_for_timeout(7_000)
        assert sent == []

    async def test_is_sent_after_six_seconds(self, alice: Person) -> None:
        await alice.create("Buy milk", "Water the plants")
        await alice.press("Delete: Water the plants")
        await alice.page.wait_for_timeout(3_000)
        assert set(await alice.stored()) == {"Buy milk", "Water the plants"}
        await expect(alice.news).to_have_text("Deleted “Water the plants”.")
        assert set(await alice.stored()) == {"Buy milk"}
        await expect(alice.page.locator("#list li")).to_have_count(1)
        assert await alice.focused() == "Delete: Buy milk"

    async def test_waits_for_the_keyboard(self, alice: Person) -> None:
        await alice.create("Buy milk")
        await alice.page.get_by_label("Delete: Buy milk").focus()
        await alice.page.keyboard.press("Enter")
        await expect(alice.page.get_by_role("button", name="Undo: Buy milk")).to_be_focused()
        await alice.page.wait_for_timeout(7_000)
        assert set(await alice.stored()) == {"Buy milk"}
        await alice.page.keyboard.press("Tab")
        await expect(alice.page.locator("#empty")).to_be_visible()
        assert await alice.stored() == {}

    async def test_is_sent_when_the_page_is_left(self, alice: Person) -> None:
        await alice.create("Buy milk", "Water the plants")
        await alice.press("Delete: Buy milk")
        await alice.page.goto("about:blank")
        await alice.open()
        await expect(alice.titles).to_have_text(["Water the plants"])

    async def test_is_sent_before_a_sign_out(self, alice: Person) -> None:
        await alice.create("Buy milk", "Water the plants")
        await alice.press("Delete: Buy milk")
        await alice.press("Sign out")
        await expect(alice.page.get_by_label("E-mail").first).to_be_focused()
        await alice.sign_in()
        await expect(alice.titles).to_have_text(["Water the plants"])

    async def test_succeeds_if_the_task_is_gone(self, alice: Person) -> None:
        [task] = await alice.create("Buy milk")
        await alice.press("Delete: Buy milk")
        await alice.send(f"/api/tasks/{task['id']}", "DELETE")
        # It is sent now, and the page stays if it fails.
        await alice.press("Sign out")
        await expect(alice.page.locator("#door")).to_be_visible()
        await alice.sign_in()
        await expect(alice.page.locator("#empty")).to_be_visible()

    async def test_outlives_another_filter(self, alice: Person) -> None:
        await alice.create("Buy milk")
        await alice.press("Delete: Buy milk")
        await alice.page.get_by_label("Show").select_option("Open")
        await expect(alice.page.get_by_role("button", name="Undo: Buy milk")).to_be_visible()
        await expect(alice.titles).to_have_count(0)
        await alice.press("Undo: Buy milk")
        await expect(alice.titles).to_have_text(["Buy milk"])

    async def test_returns_a_task_that_was_not_deleted(self, alice: Person) -> None:
        [task] = await alice.create("Buy milk")
        path = f"**/api/tasks/{task['id']}"
        await alice.page.route(path, lambda route: route.abort(), times=1)
        await alice.press("Delete: Buy milk")
        row = alice.page.locator("#list li", has=alice.page.locator(".title"))
        await expect(row.get_by_role("alert")).to_contain_text("reached")
        await expect(alice.titles).to_have_text(["Buy milk"])

    async def test_asks_before_it_deletes_many(self, alice: Person) -> None:
        tasks = await alice.create(*(f"Task {number}" for number in range(25)))
        await alice.change(tasks[0], completed=True)
        await alice.press("Load more")
        await expect(alice.titles).to_have_count(25)
        await alice.press("Delete all that is done")
        await alice.page.keyboard.press("Escape")
        await expect(alice.page.get_by_role("button", name="Delete all")).to_be_focused()
        await alice.press("Delete all that is done")
        await alice.press("Delete them")
        await expect(alice.titles).to_have_count(24)
        await expect(alice.news).to_have_text("Deleted 1 task.")


class TestAddress:
    async def test_keeps_the_filter(self, alice: Person) -> None:
        await alice.create("Buy milk", "Buy butter", "Water the plants")
        await alice.page.get_by_label("Sort by").select_option("By title")
        await alice.fill("Search", "buy")
        await expect(alice.titles).to_have_text(["Buy butter", "Buy milk"])
        assert alice.query in {"search=buy&sort=title", "sort=title&search=buy"}
        await alice.page.reload()
        await expect(alice.titles).to_have_text(["Buy butter", "Buy milk"])
        await expect(alice.field("Search")).to_have_value("buy")

    async def test_follows_back_and_forward(self, alice: Person) -> None:
        await alice.create("Buy milk", "Water the plants")
        await alice.page.get_by_label("Done: Buy milk").click()
        await expect(alice.page.locator("li.done")).to_be_visible()
        await alice.page.get_by_label("Show").select_option("Done")
        await expect(alice.titles).to_have_text(["Buy milk"])
        # A word is one step, however slowly it is typed.
        for letter in "plan":
            await alice.field("Search").press_sequentially(letter)
            await alice.page.wait_for_timeout(300)
        await expect(alice.titles).to_have_count(0)
        await alice.page.go_back()
        await expect(alice.titles).to_have_text(["Buy milk"])
        await expect(alice.field("Search")).to_have_value("")
        await alice.page.go_back()
        await expect(alice.titles).to_have_text(["Water the plants", "Buy milk"])
        await alice.page.go_forward()
        await expect(alice.titles).to_have_text(["Buy milk"])
        await expect(alice.page.get_by_label("Show")).to_have_value("true")

    async def test_forgets_the_filter_at_a_sign_out(self, alice: Person) -> None:
        await alice.fill("Search", "secret")
        await expect(alice.page.locator("#empty-title")).to_contain_text("secret")
        await alice.press("Sign out")
        await expect(alice.page.locator("#door")).to_be_visible()
        assert alice.query == ""
        assert "secret" not in await alice.page.content()
        await alice.sign_in()
        await expect(alice.page.locator("#empty")).to_be_visible()
        await expect(alice.page.locator("#empty-title")).to_have_text("Nothing to do yet.")

    async def test_may_contain_anything(self, alice: Person) -> None:
        await alice.create("Buy milk")
        await alice.page.goto(f"{alice.address}/?sort=nonsense&completed=perhaps&cursor=x&limit=0")
        await expect(alice.titles).to_have_text(["Buy milk"])
        await expect(alice.page.get_by_label("Sort by")).to_have_value("newest")


class TestLateAnswers:
    async def test_to_an_older_question_is_not_shown(self, alice: Person) -> None:
        waiting = asyncio.Event()

        async def hold(route: Route) -> None:
            await waiting.wait()
            await route.continue_()

        await alice.create("Water the plants", "Buy milk")
        await alice.page.route("**/api/tasks?sort=title*", hold)
        await alice.page.get_by_label("Sort by").select_option("By title")
        await alice.page.get_by_label("Sort by").select_option("Oldest first")
        await expect(alice.titles).to_have_text(["Water the plants", "Buy milk"])
        async with alice.page.expect_response("**/api/tasks?sort=title*"):
            waiting.set()
        await alice.page.wait_for_timeout(200)
        await expect(alice.titles).to_have_text(["Water the plants", "Buy milk"])

    async def test_brings_no_task_back(self, alice: Person) -> None:
        answered, waiting = asyncio.Event(), asyncio.Event()
        [task, _] = await alice.create("Buy milk", "Water the plants")
        await alice.page.route("**/api/tasks?sort=title*", late(answered, waiting))
        await alice.page.get_by_label("Sort by").select_option("By title")
        await answered.wait()
        await alice.send(f"/api/tasks/{task['id']}", "DELETE")
        await alice.press("Edit: Buy milk")
        await expect(alice.alert).to_contain_text("gone")
        waiting.set()
        await expect(alice.news).to_have_text("Shown: 1 task.")
        await expect(alice.titles).to_have_text(["Water the plants"])

    async def test_is_not_shown_after_a_sign_out(self, alice: Person) -> None:
        answered, waiting = asyncio.Event(), asyncio.Event()
        await alice.page.route("**/api/tasks", late(answered, waiting))
        await alice.fill("New task", "Buy milk")
        await alice.press("Add")
        await answered.wait()
        await alice.press("Sign out")
        await expect(alice.page.locator("#door")).to_be_visible()
        waiting.set()
        await alice.page.wait_for_timeout(500)
        assert "milk" not in await alice.page.content()
        await alice.sign_in()
        await expect(alice.titles).to_have_text(["Buy milk"])


class TestNews:
    """What a screen reader says."""

    async def test_names_each_change(self, alice: Person) -> None:
        status = alice.page.get_by_role("status")
        await alice.add("Buy milk")
        await expect(status).to_contain_text("Added “Buy milk”.")
        await alice.page.get_by_label("Done: Buy milk").click()
        await expect(status).to_contain_text("Done: Buy milk")
        await alice.page.get_by_label("Done: Buy milk").click()
        await expect(status).to_contain_text("Open again: Buy milk")
        await alice.edit("Buy milk", "Buy oat milk")
        await expect(status).to_contain_text("Saved “Buy oat milk”.")
        await alice.press("Delete: Buy oat milk")
        await expect(status).to_contain_text("Deleting “Buy oat milk”.")
        await alice.press("Undo: Buy oat milk")
        await expect(status).to_contain_text("“Buy oat milk” is kept.")
        await alice.fill("Search", "nowhere")
        await expect(status).to_contain_text("No task contains “nowhere”.")
        await alice.fill("Search", "")
        await expect(status).to_contain_text("Shown: 1 task.")


class TestSession:
    async def test_that_has_ended_leads_to_the_sign_in(self, alice: Person) -> None:
        await alice.create("Buy milk")
        await alice.send("/api/auth/sign-out", "POST", {})
        await alice.page.get_by_label("Done: Buy milk").click()
        await expect(alice.alert).to_have_text("You are signed out. Please sign in again.")
        await expect(alice.page.locator("#door")).to_be_visible()
        assert "milk" not in await alice.page.content()
        await alice.sign_in()
        await expect(alice.titles).to_have_text(["Buy milk"])


class TestFocus:
    async def test_follows_the_last_page(self, alice: Person) -> None:
        await alice.create(*(f"Task {number}" for number in range(21)))
        await alice.page.get_by_role("button", name="Load more").focus()
        await alice.page.keyboard.press("Enter")
        await expect(alice.page.get_by_label("Done: Task 0")).to_be_focused()
        await expect(alice.news).to_have_text("1 more loaded.")

    async def test_stays_on_a_button_while_it_works(self, alice: Person) -> None:
        await alice.create("Buy milk")
        waiting = asyncio.Event()

        async def hold(route: Route) -> None:
            await waiting.wait()
            await route.continue_()

        await alice.page.route("**/api/tasks/*", hold)
        tick = alice.page.get_by_label("Done: Buy milk")
        await tick.click()
        await expect(tick).to_be_focused()
        await expect(tick).to_be_disabled()
        await expect(tick).not_to_be_checked()
        waiting.set()
        await expect(tick).to_be_checked()
        await expect(tick).to_be_focused()


class TestServer:
    async def test_lets_the_page_load_nothing_from_elsewhere(self, address: str) -> None:
        async with visitor(address) as client:
            answer = await client.get("/")
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self';")
            assert "unsafe" not in policy
            for path in ("/server.mjs", "/auth.mjs", "/package.json", "/%2e%2e/server.mjs"):
                assert (await client.get(path)).status_code == 404

    async def test_counts_guesses_by_the_address_of_the_socket(self, production: str) -> None:
        async with visitor(production) as mallory:
            statuses = await guesses(mallory, [f"203.0.113.{number}" for number in range(15)])
        assert statuses[:3] == [401] * 3
        assert set(statuses[3:]) == {429}

    async def test_forwards_where_a_request_comes_from(self, production: str) -> None:
        given = {"origin": "http://mallory.example", "sec-fetch-site": "same-origin"}
        forged = {"x-forwarded-for": "203.0.113.1"}
        async with visitor(production) as mallory:
            answer = await mallory.post("/api/tasks", headers=given | forged, json={})
        seen = answer.json()
        assert {name: seen[name] for name in given} == given
        assert seen["x-forwarded-for"] == "127.0.0.1"

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
