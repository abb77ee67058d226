import asyncio

from todo_db import Database, Settings, TaskNotFoundError


async def main() -> None:
    async with Database(Settings()) as db:  # DATABASE_URL, from the environment or .env
        await db.users.ensure("alice", email="alice@example.org", name="Alice")
        await db.users.ensure("bob", email="bob@example.org", name="Bob")
        task = await db.tasks.create("alice", "Buy milk")
        await db.tasks.update("alice", task.id, completed=True)
        page = await db.tasks.list("alice", completed=True, search="milk", limit=20)
        print([found.title for found in page.items])
        try:
            await db.tasks.get("bob", task.id)
        except TaskNotFoundError as error:
            print(error)  # the same error as for a task that does not exist
        await db.users.delete("alice")  # and her tasks with her


asyncio.run(main())
