"""Start the whole application, with an embedded PostgreSQL, until Ctrl-C.

    uv run examples/fullstack/start.py --port 3000

Three roles use the database. The owner migrates it. Better Auth has a login that sees accounts and
no task. FastAPI has a login that sees the tasks of one user at a time and no session.
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
    """Install the packages of package.json, unless that was completed before."""
    last_written = HERE / "node_modules" / ".package-lock.json"
    wanted = HERE / "package.json"
    if not last_written.exists() or last_written.stat().st_mtime < wanted.stat().st_mtime:
        npm = ["npm", "install", "--omit=dev", "--no-audit", "--no-fund"]
        subprocess.run(npm, cwd=HERE, check=True)  # noqa: S603  # no user input


def kept_secret(path: Path) -> str:
    """Return the stored secret that signs sessions; a new one would sign out every user."""
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(32))
    return path.read_text()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def running(*command: str | Path, **environment: str) -> Generator[None]:
    """Run a program, which does not get the terminal's Ctrl-C, and stop it at the end."""
    process = subprocess.Popen(  # noqa: S603  # no shell, and no user input
        command, cwd=HERE, env=os.environ | environment, process_group=0
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(url: str) -> None:
    """Wait until Node.js, FastAPI and PostgreSQL all answer."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health") as answer:  # noqa: S310  # our own
                json.load(answer)
        except OSError:
            # A child process that ended has printed its reason.
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
    # By default SIGTERM ends Python without stopping the other processes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        postgres = stack.enter_context(EmbeddedPostgres(data))
        asyncio.run(migrations.upgrade(postgres.url()))
        # On Neon, give each login a password.
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
            # If one process ends, stop all of them.
            os.wait()
        except KeyboardInterrupt:
            return
        sys.exit("A part of the application has ended.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
