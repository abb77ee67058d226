"""Django's ORM by its asynchronous methods, which run in threads."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress

import django
from asgiref.sync import ThreadSensitiveContext, sync_to_async
from django.conf import settings
from django.db import connections as open_connections
from django.db import models
from django.db.models.functions import Now

from contestants import PAGE, Contestant, parts

if not settings.configured:
    settings.configure(USE_TZ=True, DATABASES={"default": {}})
    django.setup()


class Task(models.Model):
    """A task of one user."""

    id = models.BigAutoField(primary_key=True)
    user_id = models.TextField()
    title = models.CharField(max_length=200)
    description = models.TextField(null=True)
    completed = models.BooleanField(default=False)
    created_at = models.DateTimeField(db_default=Now())
    updated_at = models.DateTimeField(db_default=Now())

    class Meta:
        """The table is there already."""

        app_label = "benchmark"
        db_table = "tasks"


class Unfenced(Contestant):
    """Only the WHERE clauses keep users apart. Each thread has a connection of its own."""

    async def open(self, url: str, connections: int) -> None:  # noqa: ARG002  # one for each thread
        place = parts(url)
        # A second one would keep the settings of the first.
        await sync_to_async(_forget)()
        open_connections.settings = open_connections.configure_settings(
            {
                "default": {
                    "ENGINE": "django.db.backends.postgresql",
                    "NAME": place["database"],
                    "USER": place["user"],
                    "HOST": place["host"],
                    "CONN_MAX_AGE": None,
                }
            }
        )

    async def close(self) -> None:
        await sync_to_async(open_connections.close_all)()

    def scope(self) -> AbstractAsyncContextManager[object]:
        """Give each task a thread, as Django's ASGI handler gives one to each request."""
        scope: AbstractAsyncContextManager[object] = ThreadSensitiveContext()
        return scope

    async def get(self, user: str, task: int) -> object:
        return await Task.objects.filter(user_id=user, id=task).afirst()

    async def list(self, user: str) -> Sequence[object]:
        newest = Task.objects.filter(user_id=user).order_by("-id")[:PAGE]
        return [task async for task in newest]

    async def create(self, user: str, title: str) -> object:
        return await Task.objects.acreate(user_id=user, title=title)

    async def create_many(self, user: str, titles: Sequence[str]) -> Sequence[object]:
        tasks: Sequence[object] = await Task.objects.abulk_create(
            [Task(user_id=user, title=title) for title in titles]
        )
        return tasks

    async def update(self, user: str, task: int, title: str) -> object:
        found = await Task.objects.filter(user_id=user, id=task).afirst()
        if found is not None:
            found.title = title
            await _save(found, "title")
        return found

    async def toggle(self, user: str, task: int) -> object:
        found = await Task.objects.filter(user_id=user, id=task).afirst()
        if found is not None:
            found.completed = not found.completed
            await _save(found, "completed")
        return found

    async def delete(self, user: str, task: int) -> object:
        return (await Task.objects.filter(user_id=user, id=task).adelete())[0]

    async def count(self, user: str) -> int:
        return int(await Task.objects.filter(user_id=user).acount())


def _forget() -> None:
    with suppress(AttributeError):
        del open_connections["default"]


async def _save(task: Task, field: str) -> None:
    await task.asave(update_fields=[field])
    # The trigger of the table sets it.
    await task.arefresh_from_db(fields=["updated_at"])
