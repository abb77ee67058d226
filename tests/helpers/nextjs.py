"""The application of examples/nextjs: the real Next.js builds and runs it."""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from html import unescape
from pathlib import Path
from typing import Final

import httpx
from better_auth import BetterAuth
from cache import ROOT, packages
from pages import tracked

EXAMPLE: Final = ROOT / "examples" / "nextjs"
_MAPPING: Final = ROOT / "examples" / "fullstack" / "auth.mjs"
_NEXT: Final = ("node", "node_modules/next/dist/bin/next")


def built(api_url: str) -> Path:
    """Build the example in a folder of its own, with the mapping of the other example."""
    environment = os.environ | {"TODO_API_URL": api_url, "NEXT_TELEMETRY_DISABLED": "1"}
    with packages("nextjs", (EXAMPLE / "package.json").read_text()) as folder:
        # With what servers have cached of earlier tests.
        for part in ("app", "lib", ".next/cache/fetch-cache"):
            shutil.rmtree(folder / part, ignore_errors=True)
        sources = {ROOT / name for name in tracked() if name.startswith("examples/nextjs/")}
        targets = {file: folder / file.relative_to(EXAMPLE) for file in sources}
        for source, target in (targets | {_MAPPING: folder / "lib" / "auth.ts"}).items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        subprocess.run([*_NEXT, "build"], check=True, cwd=folder, env=environment)
    return folder


@asynccontextmanager
async def serving(folder: Path, database_url: str, url: str, api_url: str) -> AsyncGenerator[None]:
    """Run `next start` until the end of the block."""
    process = await asyncio.create_subprocess_exec(
        *(*_NEXT, "start", "-H", "127.0.0.1", "-p", url.rpartition(":")[2]),
        cwd=folder,
        env=os.environ
        | {
            "BETTER_AUTH_SECRET": BetterAuth.SECRET,
            "BETTER_AUTH_URL": url,
            "DATABASE_URL": database_url,
            "NEXT_TELEMETRY_DISABLED": "1",
            "TODO_API_URL": api_url,
        },
    )
    try:
        async with asyncio.timeout(60), httpx.AsyncClient(timeout=60, trust_env=False) as client:
            while True:
                try:
                    assert (await client.get(f"{url}/api/auth/ok")).json() == {"ok": True}
                except httpx.ConnectError:
                    assert process.returncode is None
                    await asyncio.sleep(0.05)
                else:
                    break
        yield
    finally:
        process.terminate()
        await process.wait()


async def shown(browser: httpx.AsyncClient) -> list[str]:
    """Return the titles on the page that the server component makes."""
    text = (await browser.get("/tasks")).text
    return [unescape(title) for title in re.findall(r"<li>(.*?) <", text.replace("<!-- -->", ""))]


async def add(browser: httpx.AsyncClient, title: str, **headers: str) -> int:
    """Submit the page's form, as a browser does without JavaScript; return the status."""
    form = re.findall(r'name="(\$ACTION[^"]*)"', (await browser.get("/tasks")).text)
    fields = dict.fromkeys(form, (None, "")) | {"title": (None, title)}
    return (await browser.post("/tasks", files=fields, headers=headers)).status_code
