"""Start the whole application, on a PostgreSQL of its own, until Ctrl-C.

    uv run examples/fullstack/start.py --port 3000

Three roles share the database: the owner migrates it, Better Auth has a login that sees accounts
and no task, and FastAPI one that sees the tasks of one user at a time and no session.
"""

import argparse
import asyncio
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from todo_db import migrations
from todo_db.embedded import LOGIN, EmbeddedPostgres

HERE: Final = Path(__file__).resolve().parent
EXAMPLES: Final = HERE.parent
AUTH_LOGIN: Final = "todo_auth_login"
_START_SECONDS: Final = 60


def install() -> None:
    """Install what package.json names, unless that was done to the end."""
    last_written = HERE / "node_modules" / ".package-lock.json"
    wanted = HERE / "package.json"
    if not last_written.exists() or last_written.stat().st_mtime < wanted.stat().st_mtime:
        npm = ["npm", "install", "--no-audit", "--no-fund"]
        subprocess.run(npm, cwd=HERE, check=True)  # noqa: S603  # no input of anybody's


def kept_secret(path: Path) -> str:
    """Return the secret that signs sessions: the same each time, or all would be signed out."""
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(32))
    return path.read_text()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def running(*command: str | Path, **environment: str) -> Generator[None]:
    """Run a program, out of reach of the terminal's Ctrl-C, and stop it at the end."""
    process = subprocess.Popen(  # noqa: S603  # no shell, no input of anybody's
        command, cwd=HERE, env=os.environ | environment, process_group=0
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(url: str) -> None:
    """Wait until Node answers, FastAPI behind it, and PostgreSQL behind that."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health") as answer:  # noqa: S310  # our own
                json.load(answer)
        except OSError:
            # A child that ended has said why.
            ended, _ = os.waitpid(-1, os.WNOHANG)
            if ended or time.monotonic() > deadline:
                sys.exit("The application did not start.")
            time.sleep(0.1)
        else:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description="Start the whole application until Ctrl-C.")
    parser.add_argument("--port", type=int, default=0, help="of the page; a free one by default")
    parser.add_argument(
        "--data", type=Path, default=EXAMPLES.parent / ".todo-db", help="where PostgreSQL keeps it"
    )
    options = parser.parse_args()
    data: Path = options.data
    # Killed by it, Python would leave the others behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        postgres = stack.enter_context(EmbeddedPostgres(data))
        asyncio.run(migrations.upgrade(postgres.url()))
        # On Neon each of them would get a password, too.
        postgres.create_login(LOGIN, role="todo_app")
        postgres.create_login(AUTH_LOGIN, role="todo_auth")
        install()
        port, api_port = options.port or free_port(), free_port()
        url = f"http://127.0.0.1:{port}"
        shared = {
            "BETTER_AUTH_SECRET": kept_secret(data / "better_auth_secret"),
            "BETTER_AUTH_URL": url,
        }
        stack.enter_context(
            running(
                *(sys.executable, "-m", "uvicorn", "fastapi_app:app", "--app-dir", EXAMPLES),
                *("--host", "127.0.0.1", "--port", str(api_port), "--log-level", "warning"),
                DATABASE_URL=postgres.url(user=LOGIN),
                **shared,
            )
        )
        stack.enter_context(
            running(
                *("node", "server.mjs"),
                DATABASE_URL=postgres.url(user=AUTH_LOGIN),
                TODO_API_URL=f"http://127.0.0.1:{api_port}",
                PORT=str(port),
                **shared,
            )
        )
        wait_until_ready(url)
        print(f"Open {url} in a browser. Ctrl-C stops it.", flush=True)
        try:
            # The end of one is the end of all.
            os.wait()
        except KeyboardInterrupt:
            return
        sys.exit("A part of the application has ended.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
