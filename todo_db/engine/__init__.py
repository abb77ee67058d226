"""The connections, and the URL that says where they go."""

from todo_db.engine.connection import (
    PooledConnection,
    connect_failure,
    create_direct_engine,
    execute_unlogged,
)
from todo_db.engine.driver import (
    STALE_ROWS,
    STALE_STATEMENT,
    TransactionConnection,
    fetch_unwatched,
    observe_answers,
    transport,
)
from todo_db.engine.pool import Pool
from todo_db.engine.url import Endpoint, parse_url

__all__ = [
    "STALE_ROWS",
    "STALE_STATEMENT",
    "Endpoint",
    "Pool",
    "PooledConnection",
    "TransactionConnection",
    "connect_failure",
    "create_direct_engine",
    "execute_unlogged",
    "fetch_unwatched",
    "observe_answers",
    "parse_url",
    "transport",
]
