"""todo_db. Which login it has decides between one round trip and three."""

from collections.abc import Sequence

from contestants import Contestant
from todo_db import Database, NewTask, TaskNotFoundError


class TodoDB(Contestant):
    """Calls of `Database.tasks`. They also check their arguments, and a page has a cursor."""

    missing = (TaskNotFoundError,)

    async def open(self, url: str, connections: int) -> None:
        self._db = Database.from_url(url, pool_size=connections, max_overflow=0)
        await self._db.open()

    async def close(self) -> None:
        await self._db.close()

    async def get(self, user: str, task: int) -> object:
        return await self._db.tasks.get(user, task)

    async def list(self, user: str) -> Sequence[object]:
        return (await self._db.tasks.list(user)).items

    async def create(self, user: str, title: str) -> object:
        return await self._db.tasks.create(user, title)

    async def create_many(self, user: str, titles: Sequence[str]) -> Sequence[object]:
        return await self._db.tasks.create_many(user, [NewTask(title) for title in titles])

    async def update(self, user: str, task: int, title: str) -> object:
        return await self._db.tasks.update(user, task, title=title)

    async def toggle(self, user: str, task: int) -> object:
        return await self._db.tasks.toggle(user, task)

    async def delete(self, user: str, task: int) -> object:
        await self._db.tasks.delete(user, task)
        return True

    async def count(self, user: str) -> int:
        return await self._db.tasks.count(user)
