"""One statement in autocommit, on connections that break before it is sent."""

import pytest
from driver import Connection
from proxy import Fault, Proxy

from todo_db import Database
from todo_db.embedded import LOGIN


@pytest.fixture
def login() -> str:
    """The one whose calls are single statements."""
    return LOGIN


class TestFetch:
    async def test_E4_read_that_was_not_answered_is_sent_again_with_its_arguments(
        self, db: Database, proxy: Proxy, superuser: Connection, todo_database_name: str
    ) -> None:
        # With it, a call under this login is a single statement.
        await superuser.execute(
            f"ALTER ROLE {LOGIN} IN DATABASE {todo_database_name} SET statement_timeout = '5s'"
        )
        task = await db.tasks.create("alice", "Buy milk")
        async with Database.from_url(proxy.url, pool_size=1, max_overflow=0) as near:
            assert await near.tasks.get("alice", task.id) == task
            for fault in (Fault.CUT_BEFORE, Fault.CUT_AFTER):
                proxy.break_at(b"alice", fault)
                assert await near.tasks.get("alice", task.id) == task
                assert not proxy.pending
            assert (await near.health()).round_trips == 1
