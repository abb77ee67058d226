"""Tortoise ORM, on its asyncpg backend."""

from collections.abc import Sequence

from tortoise import Model, Tortoise, fields
from tortoise.transactions import in_transaction

from contestants import PAGE, Contestant, parts


class Task(Model):
    """A task of one user."""

    id = fields.BigIntField(primary_key=True)
    user_id = fields.TextField()
    title = fields.CharField(max_length=200)
    description = fields.TextField(null=True)
    completed = fields.BooleanField(default=False)
    created_at = fields.DatetimeField(auto_now_add=True)
    updated_at = fields.DatetimeField(auto_now=True)

    class Meta:
        """The table is there already."""

        table = "tasks"


class Unfenced(Contestant):
    """Only the WHERE clauses keep users apart."""

    async def open(self, url: str, connections: int) -> None:
        credentials = parts(url) | {"minsize": 1, "maxsize": connections}
        await Tortoise.init(
            config={
                "connections": {
                    "default": {
                        "engine": "tortoise.backends.asyncpg",
                        "credentials": credentials,
                    }
                },
                "apps": {"models": {"models": [__name__], "default_connection": "default"}},
                "use_tz": True,
            }
        )

    async def close(self) -> None:
        await Tortoise.close_connections()

    async def get(self, user: str, task: int) -> object:
        return await Task.get_or_none(user_id=user, id=task)

    async def list(self, user: str) -> Sequence[object]:
        tasks: Sequence[object] = await Task.filter(user_id=user).order_by("-id").limit(PAGE)
        return tasks

    async def create(self, user: str, title: str) -> object:
        return await Task.create(user_id=user, title=title)

    async def create_many(self, user: str, titles: Sequence[str]) -> Sequence[object]:
        """Store them, and read them again, because `bulk_create` does not return their ids."""
        async with in_transaction():
            await Task.bulk_create([Task(user_id=user, title=title) for title in titles])
            tasks: list[object] = await Task.filter(user_id=user).order_by("-id").limit(len(titles))
        return tasks[::-1]

    async def update(self, user: str, task: int, title: str) -> object:
        found = await Task.get_or_none(user_id=user, id=task)
        if found is not None:
            found.title = title
            await _save(found, "title")
        return found

    async def toggle(self, user: str, task: int) -> object:
        found = await Task.get_or_none(user_id=user, id=task)
        if found is not None:
            found.completed = not found.completed
            await _save(found, "completed")
        return found

    async def delete(self, user: str, task: int) -> object:
        return await Task.filter(user_id=user, id=task).delete()

    async def count(self, user: str) -> int:
        return int(await Task.filter(user_id=user).count())


async def _save(task: Task, field: str) -> None:
    await task.save(update_fields=[field])
    # The trigger of the table sets it.
    await task.refresh_from_db(fields=["updated_at"])
