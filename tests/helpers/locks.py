"""Wait until a backend is blocked by a lock, without a fixed sleep."""

import asyncio

from driver import Connection


async def until_waiting(owner: Connection) -> None:
    """Return when a backend waits for a lock that another one holds."""
    async with asyncio.timeout(60):
        while not await owner.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            pass
