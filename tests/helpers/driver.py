"""asyncpg connections, for tests that query the database without the package."""

import asyncpg

type Connection = asyncpg.Connection[asyncpg.Record]
