"""Piccolo: its query builder, which knows RETURNING."""

from collections.abc import Sequence

from piccolo.columns import BigSerial, Boolean, Text, Timestamptz, Varchar
from piccolo.engine.postgres import PostgresEngine
from piccolo.table import Table

from contestants import COLUMNS, PAGE, Contestant, parts


class Task(Table, tablename="tasks"):
    """A task of one user."""

    id = BigSerial(primary_key=True)
    user_id = Text()
    title = Varchar(length=200)
    description = Text(null=True, default=None)
    completed = Boolean()
    created_at = Timestamptz()
    updated_at = Timestamptz()


class Unfenced(Contestant):
    """Only the WHERE clauses keep users apart."""

    async def open(self, url: str, connections: int) -> None:
        self._engine = PostgresEngine(config=parts(url))
        await self._engine.start_connection_pool(min_size=1, max_size=connections)
        Task._meta.db = self._engine  # noqa: SLF001  # no file piccolo_conf.py names it

    async def close(self) -> None:
        await self._engine.close_connection_pool()

    async def get(self, user: str, task: int) -> object:
        return await Task.objects().where(Task.user_id == user, Task.id == task).first()

    async def list(self, user: str) -> Sequence[object]:
        tasks: Sequence[object] = await (
            Task.objects()
            .where(Task.user_id == user)
            .order_by(Task.id, ascending=False)
            .limit(PAGE)
        )
        return tasks

    async def create(self, user: str, title: str) -> object:
        task = Task(user_id=user, title=title)
        await task.save()
        return task

    async def create_many(self, user: str, titles: Sequence[str]) -> Sequence[object]:
        tasks: Sequence[object] = await Task.insert(
            *(Task(user_id=user, title=title) for title in titles)
        ).returning(*Task.all_columns())
        return tasks

    async def update(self, user: str, task: int, title: str) -> object:
        return _first(
            await Task.update({Task.title: title})
            .where(Task.user_id == user, Task.id == task)
            .returning(*Task.all_columns())
        )

    async def toggle(self, user: str, task: int) -> object:
        found = await Task.objects().where(Task.user_id == user, Task.id == task).first()
        if found is None:
            return None
        return _first(
            await Task.update({Task.completed: not found.completed})
            .where(Task.user_id == user, Task.id == task)
            .returning(*Task.all_columns())
        )

    async def delete(self, user: str, task: int) -> object:
        return await Task.delete().where(Task.user_id == user, Task.id == task).returning(Task.id)

    async def count(self, user: str) -> int:
        return int(await Task.count().where(Task.user_id == user))

    def values(self, task: object) -> tuple[object, ...]:
        return (
            tuple(task[name] for name in COLUMNS)
            if isinstance(task, dict)
            else super().values(task)
        )


def _first(rows: Sequence[object]) -> object:
    return rows[0] if rows else None
