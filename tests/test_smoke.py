from driver import Connection

from todo_db import Database


async def test_it(db: Database, owner: Connection) -> None:
    task = await db.tasks.create("alice", "x")
    assert await db.tasks.get("alice", task.id) == task
    assert await owner.fetchval("select count(*) from tasks") == 1
