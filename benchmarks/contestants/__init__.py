"""The contestants: the same eight calls, each written as the library's documentation teaches."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar, Final, Literal
from urllib.parse import parse_qs, urlsplit

COLUMNS: Final = (
    "id",
    "user_id",
    "title",
    "description",
    "completed",
    "created_at",
    "updated_at",
)
PAGE: Final = 50


class Contestant(ABC):
    """One library. Every call names its user, and has committed when it returns.

    `get`, `update` and `toggle` return nothing for a task that the user does not have, and `delete`
    returns false; or they raise `missing`.
    """

    missing: ClassVar[tuple[type[Exception], ...]] = ()

    @abstractmethod
    async def open(self, url: str, connections: int) -> None:
        """Prepare to connect, with at most so many connections."""

    @abstractmethod
    async def close(self) -> None:
        """Close all connections."""

    @abstractmethod
    async def get(self, user: str, task: int) -> object:
        """Return one task."""

    @abstractmethod
    async def list(self, user: str) -> Sequence[object]:
        """Return the 50 newest tasks."""

    @abstractmethod
    async def create(self, user: str, title: str) -> object:
        """Store a task; return it as it was stored."""

    @abstractmethod
    async def create_many(self, user: str, titles: Sequence[str]) -> Sequence[object]:
        """Store tasks, all or none; return them as they were stored."""

    @abstractmethod
    async def update(self, user: str, task: int, title: str) -> object:
        """Change the title; return the task as it is now."""

    @abstractmethod
    async def toggle(self, user: str, task: int) -> object:
        """Change `completed` to its opposite; return the task as it is now."""

    @abstractmethod
    async def delete(self, user: str, task: int) -> object:
        """Delete one task; say whether there was one."""

    @abstractmethod
    async def count(self, user: str) -> int:
        """Count all tasks of the user."""

    def values(self, task: object) -> tuple[object, ...]:
        """Return the columns of a task that a call returned. It is not measured."""
        return tuple(getattr(task, name) for name in COLUMNS)

    def scope(self) -> AbstractAsyncContextManager[object]:
        """Return what one of several concurrent tasks runs in."""
        return nullcontext()


@dataclass(frozen=True)
class Entry:
    """A contestant in the tables.

    Attributes:
        label: Its name there.
        place: Its module in this package, and its class.
        fenced: Whether PostgreSQL's row-level security binds it. If not, its WHERE clauses alone
            keep users apart.
        login: Who it connects as. The application's login sees no row without a user, so that what
            works under it is fenced. The owner's bypasses row-level security.
        turns: The round trips of every call, where they are promised.
    """

    label: str
    place: str
    fenced: bool
    login: Literal["application", "owner"]
    turns: int | None = None

    def create(self) -> Contestant:
        """Import its library, and return it."""
        module, name = self.place.split(":")
        contestant: Contestant = getattr(import_module(f"contestants.{module}"), name)()
        return contestant


ROSTER: Final = {
    "asyncpg": Entry("asyncpg by hand", "by_hand:Unfenced", fenced=False, login="owner"),
    "asyncpg-fenced": Entry(
        "asyncpg by hand, fenced", "by_hand:Fenced", fenced=True, login="application"
    ),
    "todo_db": Entry("todo_db", "todo:TodoDB", fenced=True, login="application", turns=1),
    "todo_db-owner": Entry(
        "todo_db, owner's login", "todo:TodoDB", fenced=True, login="owner", turns=3
    ),
    "psycopg-pipeline": Entry(
        "psycopg pipeline, fenced", "psycopg_pipeline:Fenced", fenced=True, login="application"
    ),
    "sqlalchemy": Entry("SQLAlchemy ORM", "sqlalchemy_orm:Unfenced", fenced=False, login="owner"),
    "sqlalchemy-fenced": Entry(
        "SQLAlchemy ORM, fenced", "sqlalchemy_orm:Fenced", fenced=True, login="application"
    ),
    "sqlmodel": Entry("SQLModel", "sqlmodel_orm:Unfenced", fenced=False, login="owner"),
    "advanced-alchemy": Entry(
        "advanced-alchemy", "advanced_alchemy_repository:Unfenced", fenced=False, login="owner"
    ),
    "tortoise": Entry("Tortoise ORM", "tortoise_orm:Unfenced", fenced=False, login="owner"),
    "piccolo": Entry("Piccolo", "piccolo_orm:Unfenced", fenced=False, login="owner"),
    "django": Entry("Django, async", "django_orm:Unfenced", fenced=False, login="owner"),
}
"""By the name that `--only` takes. The first two are the floors that the others are compared to."""


def parts(url: str) -> dict[str, str]:
    """Split a URL, for libraries that do not take one with the folder of a socket."""
    split = urlsplit(url)
    return {
        "host": parse_qs(split.query)["host"][0],
        "user": str(split.username),
        "database": split.path.removeprefix("/"),
    }
