"""The `AsyncEngine`, its pool and its URL: the only place that knows Neon and the pooler."""

from todo_db.engine.pool import Pool, PooledConnection, create_direct_engine
from todo_db.engine.url import Endpoint, parse_url

__all__ = ["Endpoint", "Pool", "PooledConnection", "create_direct_engine", "parse_url"]
