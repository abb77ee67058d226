"""Round trips to read one task under row-level security, counted at the socket.

The counts are exact, so one run is enough: `uv run python benchmarks/round_trips.py`. It connects
directly to PostgreSQL, and through PgBouncer 1.24 as Neon configures it.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import asyncpg
from sqlalchemy import NullPool, select, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from todo_db import Database
from todo_db.embedded import LOGIN, EmbeddedPostgres
from todo_db.migrations import upgrade
from todo_db.models import Task

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from pgbouncer import PASSWORD, TRIXIE, PgBouncer
from proxy import Proxy

type Read = Callable[[], Awaitable[object]]

ALICE: Final = "alice"
TASK: Final = 1


@asynccontextmanager
async def ours(url: str, **settings: bool) -> AsyncGenerator[Read]:
    """One call, which is its own transaction."""
    async with Database.from_url(url, **settings) as db:
        yield lambda: db.tasks.get(ALICE, TASK)


@asynccontextmanager
async def three_reads(url: str) -> AsyncGenerator[Read]:
    """Several calls share one BEGIN and one COMMIT."""

    async def read() -> None:
        async with db.transaction(ALICE, read_only=True) as tx:
            for _ in range(3):
                await tx.tasks.get(ALICE, TASK)

    async with Database.from_url(url) as db:
        yield read


@asynccontextmanager
async def as_taught(url: str, **options: Any) -> AsyncGenerator[Read]:  # noqa: ANN401  # SQLAlchemy's
    """A session for each request, which first sets role and user id in statements of its own."""
    engine = create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:"), **options)

    async def read() -> None:
        async with AsyncSession(engine) as session, session.begin():
            await session.execute(text("SET LOCAL ROLE todo_app"))
            await session.execute(
                text("SELECT set_config('todo_db.user_id', :user_id, true)"), {"user_id": ALICE}
            )
            await session.scalar(select(Task).where(Task.user_id == ALICE, Task.id == TASK))

    yield read
    await engine.dispose()


WAYS: Final[dict[str, Callable[[str], Any]]] = {
    "todo_db: one call": ours,
    "todo_db: one call, prepared_statements off": lambda url: ours(url, prepared_statements=False),
    "todo_db: one transaction of three calls": three_reads,
    "SQLAlchemy session, SET LOCAL and set_config": as_taught,
    "the same with pool_pre_ping": lambda url: as_taught(url, pool_pre_ping=True),
    "the same with NullPool": lambda url: as_taught(url, poolclass=NullPool),
}


async def counted(url: str, way: Callable[[str], Any]) -> tuple[int, int]:
    """Return the round trips of the first read, opening included, and of a later one."""
    async with Proxy(url) as proxy, way(proxy.url) as read:
        await read()
        first = proxy.round_trips
        await read()
        await read()
        before = proxy.round_trips
        await read()
        return first, proxy.round_trips - before


async def main(server: EmbeddedPostgres) -> None:
    """Migrate, store one task, and count."""
    await upgrade(server.url())
    server.create_login()
    owner = await asyncpg.connect(server.url(user="postgres"))
    await owner.execute(
        f"ALTER ROLE {LOGIN} PASSWORD '{PASSWORD}';"
        "INSERT INTO users (id, email) VALUES ('alice', 'alice@example.org');"
        "INSERT INTO tasks (user_id, title) VALUES ('alice', 'Buy milk')"
    )
    await owner.close()
    async with PgBouncer(TRIXIE, server.url(user="postgres"), max_prepared_statements=1000) as it:
        print("| one read | first, direct | warm, direct | first, pooled | warm, pooled |")
        print("|---|---|---|---|---|")
        for name, way in WAYS.items():
            direct = await counted(server.url(user=LOGIN), way)
            pooled = await counted(it.url(LOGIN, "todo"), way)
            print(f"| {name} | {direct[0]} | {direct[1]} | {pooled[0]} | {pooled[1]} |")


if __name__ == "__main__":
    with (
        TemporaryDirectory(prefix="todo-db-") as folder,
        EmbeddedPostgres(Path(folder) / "postgres", durable=False) as server,
    ):
        asyncio.run(main(server))
