"""Pages of other origins in Chromium, in the browser of a user who is signed in.

The application is the easiest to attack: it takes any body, and its CORS policy trusts every page.
So only the rule for origins can refuse a request.
"""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final, Literal
from urllib.parse import quote

import pytest
import pytest_asyncio
from credentials import COOKIE, SECRET, URL, add_session, add_user, signed
from driver import Connection
from fastapi import FastAPI, WebSocket
from fullstack import chromium_with_all_cookies
from playwright.async_api import BrowserContext, Frame, Page
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from web import server

from todo_db import Settings
from todo_db.embedded import LOGIN, EmbeddedPostgres
from todo_db.fastapi import CurrentUserId, Tasks, install, lifespan

pytestmark = pytest.mark.browser

# Each is the body of an async function; `url` is what it attacks.
REQUESTS: Final = {
    "fetch without a body": """
        await fetch(url, { method: "POST", mode: "no-cors", credentials: "include" })""",
    "fetch of a text": """
        await fetch(url, { method: "POST", mode: "no-cors", credentials: "include",
            headers: { "content-type": "text/plain" }, body: '{"title": "planted"}' })""",
    "form": """
        await submit("application/x-www-form-urlencoded")""",
    "form of a text": """
        await submit("text/plain")""",
    **{
        f"fetch of JSON by {method}": f"""
        await fetch(url, {{ method: "{method}", credentials: "include",
            headers: {{ "content-type": "application/json" }}, body: '{{"title": "planted"}}' }})"""
        for method in ("POST", "PUT", "PATCH", "DELETE")
    },
    "WebSocket": """
        const socket = new WebSocket(url.replace("http", "ws"));
        await new Promise((done) => { socket.onclose = done; });""",
}
# A form's answer is shown in a frame, so that the page stays.
_RUN: Final = """async ([body, url]) => {
    const submit = async (type) => {
        const frame = document.createElement("iframe");
        frame.name = "answer";
        const form = document.createElement("form");
        Object.assign(form, { method: "post", action: url, enctype: type, target: "answer" });
        form.innerHTML = '<input name="title" value="planted">';
        document.body.append(frame, form);
        const answered = new Promise((done) => { frame.onload = done; });
        form.submit();
        await answered;
        frame.remove();
    };
    const work = Object.getPrototypeOf(async () => {}).constructor;
    await new work("url", "submit", body)(url, submit);
}"""
_SANDBOX: Final = """() => {
    const frame = document.createElement("iframe");
    frame.sandbox = "allow-scripts allow-forms";
    frame.srcdoc = "<body></body>";
    document.body.append(frame);
}"""


type Outcomes = dict[str, tuple[list[int], int]]


class Recorder:
    """Notes the status of every answer of `/anything`, except those to questions about CORS."""

    def __init__(self, app: ASGIApp, statuses: list[int]) -> None:
        self._app = app
        self._statuses = statuses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def noted(message: Message) -> None:
            if message["type"] == "websocket.accept":
                self._statuses.append(101)
            elif "status" in message:
                self._statuses.append(message["status"])
            await send(message)

        is_noted = scope.get("path") == "/anything" and scope.get("method") != "OPTIONS"
        await self._app(scope, receive, noted if is_noted else send)


def service(url: str, statuses: list[int]) -> FastAPI:
    """Return an application that adds a task for whatever request or WebSocket it gets."""
    app = FastAPI(
        lifespan=lifespan(
            Settings(better_auth_secret=SECRET, better_auth_url=URL, database_url=url)
        )
    )
    install(app)
    # Every page may send everything, and read the answers.
    app.add_middleware(
        CORSMiddleware,
        allow_origin_regex=".*",
        allow_credentials=True,
        allow_methods=["*"],
        allow_headers=["*"],
    )
    app.add_middleware(Recorder, statuses)

    @app.api_route("/anything", methods=["POST", "PUT", "PATCH", "DELETE"], status_code=201)
    async def change(user_id: CurrentUserId, tasks: Tasks) -> str:
        await tasks.create(user_id, "planted")
        return "done"

    @app.websocket("/anything")
    async def listen(socket: WebSocket, user_id: CurrentUserId, tasks: Tasks) -> None:
        await socket.accept()
        await tasks.create(user_id, "planted")
        await socket.close()

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse("<title>A page</title>")

    return app


class Site:
    """The application of a user who is signed in, and a browser.

    Attributes:
        url: Where the application is.
        other_port: The port of a page that is not the application's.
    """

    def __init__(
        self, context: BrowserContext, owner: Connection, url: str, other: str, statuses: list[int]
    ) -> None:
        self.url = url.replace("127.0.0.1", "localhost")
        self.other_port = other.rpartition(":")[2]
        self._context = context
        self._owner = owner
        self._statuses = statuses

    async def sign_in(self, same_site: Literal["Lax", "None"]) -> None:
        await self._context.add_cookies(
            [
                {
                    "name": COOKIE,
                    "value": quote(signed(await add_session(self._owner, "alice")), safe=""),
                    # Chromium takes a secure cookie from a host of this name without TLS, too.
                    "url": self.url.replace("http:", "https:"),
                    "httpOnly": True,
                    "sameSite": same_site,
                    "secure": same_site == "None",
                }
            ]
        )

    async def opened(self, url: str) -> Page:
        page = await self._context.new_page()
        await page.goto(url)
        return page

    async def send_all(self, page: Page | Frame) -> Outcomes:
        """Return the answers to each request of the page, and how many tasks it added."""
        outcomes: Outcomes = {}
        for name, body in REQUESTS.items():
            before = await self._count()
            self._statuses.clear()
            await page.evaluate(_RUN, [body, f"{self.url}/anything"])
            outcomes[name] = ([*self._statuses], await self._count() - before)
        return outcomes

    async def _count(self) -> int:
        return int(await self._owner.fetchval("SELECT count(*) FROM tasks"))


@pytest_asyncio.fixture
async def site(
    todo_postgres: EmbeddedPostgres, todo_database_name: str, owner: Connection, tmp_path: Path
) -> AsyncGenerator[Site]:
    await add_user(owner, "alice")
    statuses: list[int] = []
    app = service(todo_postgres.url(user=LOGIN, database=todo_database_name), statuses)
    async with (
        server(app) as url,
        server(app) as other,
        chromium_with_all_cookies(tmp_path) as context,
    ):
        yield Site(context, owner, url, other, statuses)


REFUSED: Final[Outcomes] = dict.fromkeys(REQUESTS, ([403], 0))


class TestPage:
    async def test_of_the_application_can_send_everything(self, site: Site) -> None:
        await site.sign_in("Lax")
        outcomes = await site.send_all(await site.opened(site.url))
        assert outcomes == dict.fromkeys(REQUESTS, ([201], 1)) | {"WebSocket": ([101], 1)}

    async def test_on_another_port_changes_nothing(self, site: Site) -> None:
        await site.sign_in("Lax")
        page = await site.opened(f"http://localhost:{site.other_port}")
        assert await site.send_all(page) == REFUSED

    # The two below get no cookie that is `SameSite=Lax`. Better Auth can be told to make it `None`.

    async def test_of_another_site_changes_nothing(self, site: Site) -> None:
        await site.sign_in("None")
        page = await site.opened(f"http://127.0.0.1:{site.other_port}")
        assert await site.send_all(page) == REFUSED

    async def test_in_a_sandbox_changes_nothing(self, site: Site) -> None:
        await site.sign_in("None")
        page = await site.opened(site.url)
        await page.evaluate(_SANDBOX)
        sandbox = page.frames[-1]
        assert await sandbox.evaluate("origin") == "null"
        assert await site.send_all(sandbox) == REFUSED
