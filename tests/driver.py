"""asyncpg's own connections, for what the tests ask behind the package's back."""

import asyncpg

type Connection = asyncpg.Connection[asyncpg.Record]
