"""Goodput under deadlines that are too short for many calls: todo_db and asyncpg's own pool.

Six callers end each of their calls after a random time, and one caller waits for its own. Run it
with `uv run python benchmarks/goodput.py`. Both take turns, so compare the lines of one block; the
times depend on the machine. A cancelled call should not cost more than its own work: neither its
connection, nor the time of other callers.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import asyncpg

from todo_db.embedded import LOGIN, OWNER, EmbeddedPostgres
from todo_db.migrations import upgrade

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from deadlines import Call, asyncpg_pool, slow_down, storm, todo_db
from pgbouncer import PASSWORD, TRIXIE, PgBouncer

SECONDS: Final = 4.0
ROUNDS: Final = 2
# How much longer a call is made to take, and the longest deadline, in milliseconds.
SHAPES: Final = ((0, 60), (0, 20), (3, 60), (3, 20))

type Contestants = dict[str, Callable[[], AbstractAsyncContextManager[Call]]]


@asynccontextmanager
async def pooled(server: EmbeddedPostgres) -> AsyncGenerator[PgBouncer]:
    """PgBouncer 1.24 as Neon configures it, but with two connections to the server."""
    url = server.url(user="postgres")
    async with PgBouncer(TRIXIE, url, max_prepared_statements=1000, default_pool_size=2) as pooler:
        yield pooler


async def compare(
    superuser: "asyncpg.Connection[asyncpg.Record]", contestants: Contestants, place: str
) -> None:
    """Print one line for each contestant and shape."""
    for extra, longest in SHAPES:
        await slow_down(superuser, extra / 1000)
        print(f"\n{place}, a call made {extra} ms longer, deadlines of 0 to {longest} ms")
        for _ in range(ROUNDS):
            for name, opened in contestants.items():
                seen = await storm(superuser, opened(), longest=longest / 1000, seconds=SECONDS)
                print(
                    f"  {name:<22} done {seen.done:5} of {seen.done + seen.late:5}"
                    f" = {seen.share:6.1%}   sessions {seen.sessions:4}   without a deadline"
                    f" {seen.undisturbed * 1000:6.1f} → {seen.beside * 1000:6.1f} ms"
                    f"   {dict(seen.errors) or ''}",
                    flush=True,
                )


async def main(server: EmbeddedPostgres) -> None:
    """Migrate, create two users, and compare directly and behind a pooler."""
    await upgrade(server.url())
    server.create_login()
    superuser = await asyncpg.connect(server.url(user="postgres"))
    await superuser.execute(
        f"ALTER ROLE {LOGIN} PASSWORD '{PASSWORD}'; ALTER ROLE {OWNER} PASSWORD '{PASSWORD}';"
        "INSERT INTO users (id, email) VALUES ('alice', 'a@example.org'), ('bob', 'b@example.org')"
    )
    direct: Contestants = {
        "asyncpg.Pool": lambda: asyncpg_pool(server.url(user=OWNER)),
        "todo_db, its login": lambda: todo_db(server.url(user=LOGIN)),
        "todo_db, owner's login": lambda: todo_db(server.url(user=OWNER)),
    }
    await compare(superuser, direct, "direct")
    async with pooled(server) as pooler:
        behind: Contestants = {
            "asyncpg.Pool": lambda: asyncpg_pool(pooler.url(OWNER, "todo")),
            "todo_db, its login": lambda: todo_db(pooler.url(LOGIN, "todo")),
            "todo_db, owner's login": lambda: todo_db(pooler.url(OWNER, "todo")),
        }
        await compare(superuser, behind, "PgBouncer with 2 connections")
    await superuser.close()


if __name__ == "__main__":
    with (
        TemporaryDirectory(prefix="todo-db-") as folder,
        EmbeddedPostgres(Path(folder) / "postgres", durable=False) as server,
    ):
        asyncio.run(main(server))
