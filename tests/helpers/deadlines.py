"""Callers with deadlines that are too short for many of their calls, and one without a deadline."""

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Final

import asyncpg
from driver import Connection

from todo_db import Database

type Call = Callable[[str], Awaitable[object]]
"""Stores a task of a user."""

CALLERS: Final = 6
INSERT: Final = "INSERT INTO tasks (user_id, title) VALUES ($1, 'Buy milk') RETURNING id"


@dataclass(frozen=True, slots=True)
class Storm:
    """What became of the calls.

    Attributes:
        done: Calls with a deadline that were done in time.
        late: Calls that their deadline ended.
        errors: Anything else, by the name of its class.
        undisturbed: The median of seconds that a call without a deadline takes alone.
        beside: The same beside the others.
        sessions: Connections that the server accepted meanwhile.
    """

    done: int
    late: int
    errors: Counter[str]
    undisturbed: float
    beside: float
    sessions: int

    @property
    def share(self) -> float:
        """The part of the calls with a deadline that were done."""
        return self.done / max(1, self.done + self.late)


async def slow_down(owner: Connection, seconds: float) -> None:
    """Make each insert of a task take that much longer."""
    await owner.execute(f"""
        CREATE OR REPLACE FUNCTION take_time() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN PERFORM pg_catalog.pg_sleep({seconds}); RETURN NEW; END
        $$;
        CREATE OR REPLACE TRIGGER take_time BEFORE INSERT ON tasks
            FOR EACH ROW EXECUTE FUNCTION take_time()
    """)


@asynccontextmanager
async def todo_db(url: str) -> AsyncGenerator[Call]:
    """The package, with its default settings."""
    async with Database.from_url(url) as database:
        yield lambda user: database.tasks.create(user, "Buy milk")


@asynccontextmanager
async def asyncpg_pool(url: str) -> AsyncGenerator[Call]:
    """asyncpg's own pool of as many connections, and a transaction around the statement."""
    async with asyncpg.create_pool(url, min_size=1, max_size=10) as pool:

        async def call(user: str) -> None:
            async with pool.acquire() as connection, connection.transaction():
                await connection.fetch(INSERT, user)

        yield call


async def storm(
    superuser: Connection,
    opened: AbstractAsyncContextManager[Call],
    *,
    longest: float,
    seconds: float,
    seed: int = 7,
) -> Storm:
    """Have six callers end each call after a random time up to `longest`, and one wait."""
    dice = random.Random(seed)  # noqa: S311  # the same every time
    found: Counter[str] = Counter()
    before = await _sessions(superuser)

    async def hasty(call: Call, until: float) -> None:
        while time.monotonic() < until:
            try:
                async with asyncio.timeout(dice.uniform(0, longest)):
                    await call("bob")
            except TimeoutError:
                found["late"] += 1
            except Exception as error:  # noqa: BLE001  # counted
                found[type(error).__name__] += 1
            else:
                found["done"] += 1

    async def patient(call: Call, until: float) -> list[float]:
        times: list[float] = []
        while time.monotonic() < until:
            begun = time.perf_counter()
            await call("alice")
            times.append(time.perf_counter() - begun)
            await asyncio.sleep(0.02)
        return times

    async with opened as call:
        alone = await patient(call, time.monotonic() + seconds / 3)
        until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            beside = group.create_task(patient(call, until))
            for _ in range(CALLERS):
                group.create_task(hasty(call, until))
    # The server counts a session when it ends.
    await asyncio.sleep(0.1)
    sessions = await _sessions(superuser) - before
    done, late = found.pop("done", 0), found.pop("late", 0)
    return Storm(
        done=done,
        late=late,
        errors=found,
        undisturbed=statistics.median(alone),
        beside=statistics.median(beside.result()),
        sessions=sessions,
    )


async def _sessions(superuser: Connection) -> int:
    """How many sessions of the database the server has counted."""
    found = await superuser.fetchval(
        "SELECT sessions FROM pg_stat_database WHERE datname = current_database()"
    )
    return int(found)
