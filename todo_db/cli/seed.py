"""Example users and tasks, stored with the public methods."""

from collections.abc import Callable
from itertools import batched
from typing import Final

from todo_db.database import Database
from todo_db.inputs import NewTask

_NAMES: Final = ("alice", "bob")
_TITLES: Final = ("Buy milk", "Water the plants", "Call home", "Pay the rent", "Read a book")
_BATCH: Final = 1_000


async def seed(db: Database, users: int, tasks: int, advance: Callable[[int], object]) -> int:
    """Store users and tasks up to the given numbers; return how many tasks were new.

    Users and tasks of an earlier run are counted, and not stored again.

    Args:
        db: The database.
        users: How many users.
        tasks: How many tasks in total, the same number for each user.
        advance: Called with the number of tasks after each batch.
    """
    created = 0
    for number in range(users):
        user_id = _NAMES[number] if number < len(_NAMES) else f"user{number + 1:05}"
        await db.users.ensure(user_id, email=f"{user_id}@example.org", name=user_id.capitalize())
        wanted = tasks // users + (number < tasks % users)
        present = await db.tasks.count(user_id)
        advance(min(present, wanted))
        for batch in batched(range(present, wanted), _BATCH, strict=False):
            await db.tasks.create_many(user_id, [_task(index) for index in batch])
            created += len(batch)
            advance(len(batch))
    return created


def _task(index: int) -> NewTask:
    title = _TITLES[index % len(_TITLES)]
    again = index // len(_TITLES)
    return NewTask(f"{title} ({again + 1})" if again else title, completed=index % 3 == 2)  # noqa: PLR2004
