"""The real Better Auth on Node.js, in its newest or oldest version: the example's server."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Self

import httpx
from cache import ROOT, packages
from driver import Connection
from ports import free_port

PASSWORD: Final = "correct horse battery"  # noqa: S105  # of accounts that these tests make
_EXAMPLE: Final = ROOT / "examples" / "fullstack"
_SCRIPTS: Final = Path(__file__).parent / "node"
_PACKAGES: Final[dict[str, str]] = json.loads((_EXAMPLE / "package.json").read_text())[
    "dependencies"
]
NEWEST: Final = _PACKAGES["better-auth"]
OLDEST: Final = "1.3.0"
"""The first of the versions 1.3."""


def installed(version: str) -> Path:
    """Return a folder with a version and the example's server, installing it on first use."""
    wanted = {"better-auth": version}
    package = {"private": True, "type": "module", "dependencies": _PACKAGES | wanted}
    with packages(f"better-auth-{version}", json.dumps(package)) as folder:
        for name, source in _files(version).items():
            target = folder / name
            # A server of another process may be reading it.
            if not target.exists() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
    return folder


def _files(version: str) -> dict[str, Path]:
    """Return the files of the example's server by their names, and what the old version needs."""
    files = {file.name: file for file in (*_EXAMPLE.glob("*.mjs"), *_SCRIPTS.glob("*.mjs"))}
    pages = (_EXAMPLE / "public").rglob("*")
    files |= {str(file.relative_to(_EXAMPLE)): file for file in pages if file.is_file()}
    if version != NEWEST:
        files |= {"auth-of-new.mjs": files["auth.mjs"], "auth.mjs": files["auth-of-old.mjs"]}
    return files


class BetterAuth:
    """A running server, and HTTP clients for it.

    Args:
        database_url: The URL with its login.
        version: The version of the package better-auth.
        port: The port to listen on; a free one by default.
        api_url: The server for all other requests.
        form: Options of Better Auth, and `jwks` of its plugin `jwt`. Without the page then.
        public_url: `BETTER_AUTH_URL`; the server's own by default.
        secrets: `BETTER_AUTH_SECRETS`.
    """

    SECRET: Final = "known to these tests, and 32 characters at least"  # noqa: S105  # likewise

    def __init__(  # noqa: PLR0913  # what a server can be given
        self,
        database_url: str,
        *,
        version: str = NEWEST,
        port: int | None = None,
        api_url: str = "http://127.0.0.1:1",
        form: dict[str, Any] | None = None,
        public_url: str = "{url}",
        secrets: str = "",
    ) -> None:
        self._folder = installed(version)
        port = port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.public_url = public_url.format(url=self.url)
        self.path = "/api/auth" if form is None else form.get("basePath", "/api/auth")
        self._program = "server.mjs" if form is None else "form-server.mjs"
        self._environment = os.environ | {
            "DATABASE_URL": database_url,
            "BETTER_AUTH_SECRET": self.SECRET,
            "BETTER_AUTH_SECRETS": secrets,
            "BETTER_AUTH_URL": self.public_url,
            "FORM": json.dumps(form),
            "TODO_API_URL": api_url,
            "PORT": str(port),
        }
        self._browsers: list[httpx.AsyncClient] = []

    async def __aenter__(self) -> Self:
        self._process = subprocess.Popen(  # noqa: ASYNC220  # it is ended by a plain function, too
            ["node", self._program],
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        async with asyncio.timeout(120):
            line = await asyncio.to_thread(self._process.stdout.readline)
        if not line.startswith("Listening on "):
            self._stop()
            raise AssertionError(line)
        return self

    async def __aexit__(self, *_: object) -> None:
        for browser in self._browsers:
            await browser.aclose()
        self._stop()

    def _stop(self) -> None:
        self._process.terminate()
        self._process.communicate()

    def browser(self) -> httpx.AsyncClient:
        """Return a client with cookies of its own."""
        browser = httpx.AsyncClient(
            base_url=self.url,
            headers={"origin": "/".join(self.public_url.split("/")[:3])},
            timeout=60,
            trust_env=False,
        )
        self._browsers.append(browser)
        return browser

    async def sign_up(self, name: str, *, email: str | None = None) -> httpx.AsyncClient:
        """Sign up a new user; return the client with the session."""
        browser = self.browser()
        await ask(
            browser,
            "sign-up/email",
            {"name": name, "email": email or f"{name}@example.org", "password": PASSWORD},
            base=self.path,
        )
        return browser

    async def script(self, name: str) -> str:
        """Run a script in the server's folder; return what it prints."""
        done = await asyncio.to_thread(
            subprocess.run,
            ["node", name],
            cwd=self._folder,
            env=self._environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return str(done.stdout)


@asynccontextmanager
async def todo_api(
    database_url: str, auth_url: str, *, port: int | None = None
) -> AsyncGenerator[httpx.AsyncClient]:
    """Run the FastAPI example in another process; yield a client that stores no cookies."""
    port = port or free_port()
    process = subprocess.Popen(  # noqa: ASYNC220  # it ends at once
        [
            *(sys.executable, "-m", "uvicorn", "fastapi_app:app", "--app-dir", _EXAMPLE.parent),
            *("--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"),
        ],
        env=os.environ
        | {
            "DATABASE_URL": database_url,
            "BETTER_AUTH_SECRET": BetterAuth.SECRET,
            "BETTER_AUTH_URL": auth_url,
        },
    )
    try:
        async with (
            httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30
            ) as client,
        ):
            async with asyncio.timeout(120):
                while True:
                    try:
                        assert (await client.get("/health")).json()["ok"]
                    except httpx.ConnectError:
                        assert process.poll() is None
                        await asyncio.sleep(0.05)
                    else:
                        break
            yield client
    finally:
        process.terminate()
        process.wait()


async def ask(
    browser: httpx.AsyncClient,
    path: str,
    body: object = None,
    *,
    status: int = 200,
    base: str = "/api/auth",
) -> Any:  # noqa: ANN401  # JSON
    """Send a request to Better Auth, a POST if there is a body; return the answer."""
    method = "GET" if body is None else "POST"
    answer = await browser.request(method, f"{base}/{path}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def tables_that_name(owner: Connection, *values: str) -> set[str]:
    """Return every table with a row that contains one of the texts, in any column."""
    names = [
        str(row[0])
        for row in await owner.fetch(
            "SELECT oid::regclass FROM pg_class WHERE relkind = 'r' AND relnamespace = "
            "'public'::regnamespace"
        )
    ]
    return {
        name
        for name in names
        if await owner.fetchval(
            f"SELECT EXISTS (SELECT FROM {name} t"
            " WHERE EXISTS (SELECT FROM unnest($1::text[]) v WHERE strpos(t::text, v) > 0))",
            values,
        )
    }
