"""Waiting for a lock, without sleeping for luck."""

import asyncio

from driver import Connection


async def until_waiting(owner: Connection) -> None:
    """Return once a backend waits for a lock that another one holds."""
    async with asyncio.timeout(20):
        while not await owner.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            pass
