"""The full-stack example in a browser: how tests start it, use its page and look at it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator, Iterable
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, Self
from urllib.parse import urlsplit

import httpx
from better_auth import PASSWORD
from cache import ROOT
from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Locator,
    async_playwright,
    expect,
)

EXAMPLE: Final = ROOT / "examples" / "fullstack"
START: Final = EXAMPLE / "start.py"
SCREENSHOTS: Final = os.environ.get("TODO_SCREENSHOTS")
"""A folder. If it is set, every state of the page is stored there."""
# For a slow machine: on a fast one, what is waited for comes much sooner.
_PATIENCE_MS: Final = 30_000
expect.set_options(timeout=_PATIENCE_MS)
_AXE: Final = EXAMPLE / "node_modules" / "axe-core" / "axe.min.js"
_CHROMIUM: Final = (
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
)
_VIOLATIONS: Final = """async () => (await axe.run(document, { resultTypes: ["violations"] }))
    .violations.filter(({ impact }) => ["serious", "critical"].includes(impact))
    .map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html).join(" ")}`)"""


@contextmanager
def started(data: Path, *arguments: str) -> Generator[str]:
    """Start the application as in its README; yield its URL, and end it with Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, START, "--data", data, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        found = next(filter(None, (re.match(r"Open (\S+) ", line) for line in process.stdout)))
        yield found[1]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 0


def visitor(address: str, cookies: httpx.Cookies | None = None) -> httpx.AsyncClient:
    """Return a browser without a page."""
    headers = {"origin": address}
    return httpx.AsyncClient(
        base_url=address, headers=headers, cookies=cookies, trust_env=False, timeout=60
    )


@cache
def axe() -> str:
    """Return the source of axe-core. The page's policy lets no script in, so tests evaluate it."""
    if not _AXE.exists():
        npm = ["npm", "install", "--include=dev", "--no-audit", "--no-fund"]
        subprocess.run(npm, cwd=EXAMPLE, check=True)
    return f"{_AXE.read_text()};undefined"


def _chromium() -> str:
    path = shutil.which("chromium")
    assert path is not None, "Debian's package chromium is not installed"
    return path


async def guesses(browser: httpx.AsyncClient, addresses: Iterable[str]) -> list[int]:
    """Guess a password from each of the addresses, as the client says; return the statuses."""
    statuses: list[int] = []
    for number, address in enumerate(addresses):
        body = {"email": "alice@example.org", "password": f"guess number {number}"}
        headers = {"x-forwarded-for": address}
        answer = await browser.post("/api/auth/sign-in/email", json=body, headers=headers)
        statuses.append(answer.status_code)
    return statuses


@asynccontextmanager
async def chromium_browser() -> AsyncGenerator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=_chromium(), args=_CHROMIUM)
        yield browser
        await browser.close()


@asynccontextmanager
async def chromium_with_all_cookies(folder: Path) -> AsyncGenerator[BrowserContext]:
    """Run a browser that sends the cookies of one site for pages of another.

    Chromium does so by a preference, which Playwright's usual contexts do not have.
    """
    preferences = folder / "Default" / "Preferences"
    preferences.parent.mkdir()
    preferences.write_text(json.dumps({"profile": {"cookie_controls_mode": 0}}))
    async with async_playwright() as playwright:
        context = await playwright.chromium.launch_persistent_context(
            folder, executable_path=_chromium(), args=_CHROMIUM
        )
        yield context
        await context.close()


class Person:
    """A user of the page, in a separate browser context."""

    def __init__(
        self,
        browser: Browser,
        address: str,
        name: str,
        *,
        scheme: Literal["light", "dark"] = "light",
        width: int = 760,
    ) -> None:
        self._browser = browser
        self._scheme: Literal["light", "dark"] = scheme
        self._width = width
        self.address = address
        self.name = name
        self.email = f"{name.lower()}@example.org"
        self.complaints: list[str] = []

    async def __aenter__(self) -> Self:
        self._preamble = await self._browser.new_context(
            viewport={"width": self._width, "height": 710}, color_scheme=self._scheme
        )
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._preamble.close()

    async def open(self, path: str = "") -> None:
        """Open the page in a new tab."""
        self.page = await self._preamble.new_page()
        self.page.set_default_timeout(_PATIENCE_MS)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._hear)
        await self.page.goto(f"{self.address}{path}")
        self.form = self.page.locator("form.edit")
        self.news = self.page.locator("#news")

    def _hear(self, message: ConsoleMessage) -> None:
        # The browser also logs refused and lost requests, which are not errors of the page.
        about_request = "/api/" in message.location["url"] and "load resource" in message.text
        if message.type in {"error", "warning"} and not about_request:
            self.complaints.append(message.text)

    @property
    def alert(self) -> Locator:
        return self.page.get_by_role("alert")

    @property
    def titles(self) -> Locator:
        return self.page.locator("#list .title")

    async def press(self, name: str) -> None:
        await self.page.get_by_role("button", name=name, exact=True).click()

    def field(self, label: str) -> Locator:
        """Return the visible field: dialogs and other tasks have fields of the same name."""
        return self.page.locator("input:visible, textarea:visible").and_(
            self.page.get_by_label(label)
        )

    async def fill(self, label: str, text: str) -> None:
        await self.field(label).fill(text)

    async def sign_up(self) -> None:
        await self.press("Create one")
        await self.fill("Name", self.name)
        await self.fill("E-mail", self.email)
        await self.fill("Password", PASSWORD)
        await self.press("Sign up")
        await expect(self.page.locator("#name")).to_have_text(self.name)

    async def sign_in(self, password: str = PASSWORD) -> None:
        await self.fill("E-mail", self.email)
        await self.fill("Password", password)
        await self.press("Sign in")

    async def add(self, title: str, details: str = "") -> None:
        await self.fill("New task", title)
        await self.page.locator("#add-form").get_by_label("Details").fill(details)
        await self.press("Add")
        await expect(self.titles.get_by_text(title, exact=True)).to_be_visible()

    async def edit(self, title: str, new: str) -> None:
        await self.press(f"Edit: {title}")
        await self.fill("Title", new)
        await self.press("Save")

    async def delete_account(self) -> None:
        await self.press("Delete account")
        await self.fill("Password", PASSWORD)
        await self.press("Delete it")

    async def look(self, state: str) -> None:
        """Check the page for barriers in this state, and store a picture of it."""
        # A colour that is changing would be measured.
        await self.page.evaluate(
            "Promise.allSettled(document.getAnimations()"
            ".filter((one) => Number.isFinite(one.effect.getTiming().iterations))"
            ".map((one) => one.finished)).then(() => null)"
        )
        if SCREENSHOTS is not None:
            path = Path(SCREENSHOTS) / f"{self._scheme}-{self._width}-{state}.png"
            await self.page.screenshot(path=path, full_page=True, animations="disabled")
        assert await self.page.evaluate("document.documentElement.scrollWidth") == self._width
        await self.page.evaluate(axe())
        assert await self.page.evaluate(_VIOLATIONS) == []

    @property
    def query(self) -> str:
        return urlsplit(self.page.url).query

    async def find(self, title: str) -> dict[str, Any]:
        """Return a task that the server has."""
        items = json.loads((await self.send("/api/tasks"))[1])["items"]
        return next(dict(item) for item in items if item["title"] == title)

    async def focused(self) -> str:
        """Return the name of the element that has the keyboard focus."""
        return str(
            await self.page.evaluate(
                "() => document.activeElement.ariaLabel ?? document.activeElement.name"
                " ?? document.activeElement.tagName"
            )
        )

    async def leave(self) -> None:
        """Delete the account, whatever the page shows, so that the next test can sign up."""
        await self._preamble.request.post(
            f"{self.address}/api/auth/delete-user",
            data={"password": PASSWORD},
            headers={"origin": self.address},
        )

    async def send(
        self,
        path: str,
        method: str = "GET",
        body: object = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, str]:
        """Send a request that the page does not send."""
        given = {"method": method}
        if body is not None:
            given["body"] = json.dumps(body)
            headers = {"content-type": "application/json"} | (headers or {})
        status, text = await self.page.evaluate(
            "([path, given]) => fetch(path, given).then(async a => [a.status, await a.text()])",
            [path, given | {"headers": headers or {}}],
        )
        return int(status), str(text)

    async def create(self, *titles: str, description: str | None = None) -> list[dict[str, Any]]:
        """Create tasks elsewhere, and load the page again."""
        tasks: list[dict[str, Any]] = []
        for title in titles:
            task = {"title": title, "description": description}
            tasks.append(json.loads((await self.send("/api/tasks", "POST", task))[1]))
        await self.page.reload()
        await expect(self.titles.first).to_be_visible()
        return tasks

    async def change(self, task: dict[str, Any], **changes: object) -> None:
        """Change a task elsewhere."""
        assert (await self.send(f"/api/tasks/{task['id']}", "PATCH", changes))[0] == 200

    async def stored(self) -> dict[str, str | None]:
        """Return the descriptions by the titles that the server has."""
        items = json.loads((await self.send("/api/tasks"))[1])["items"]
        return {item["title"]: item["description"] for item in items}
