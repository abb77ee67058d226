"""advanced-alchemy: its asynchronous repository, which commits and refreshes."""

from collections.abc import Sequence
from datetime import datetime

from advanced_alchemy.base import IdentityBase
from advanced_alchemy.config import AsyncSessionConfig, EngineConfig, SQLAlchemyAsyncConfig
from advanced_alchemy.filters import LimitOffset, OrderBy
from advanced_alchemy.repository import SQLAlchemyAsyncRepository
from sqlalchemy import DateTime, FetchedValue
from sqlalchemy.orm import Mapped, mapped_column

from contestants import PAGE, Contestant


class Task(IdentityBase):
    """A task of one user."""

    __tablename__ = "tasks"

    user_id: Mapped[str]
    title: Mapped[str]
    description: Mapped[str | None]
    completed: Mapped[bool] = mapped_column(server_default=FetchedValue())
    created_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=FetchedValue()
    )
    updated_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=FetchedValue(), server_onupdate=FetchedValue()
    )


class Tasks(SQLAlchemyAsyncRepository[Task]):
    """The repository."""

    model_type = Task


class Unfenced(Contestant):
    """Only the WHERE clauses keep users apart."""

    async def open(self, url: str, connections: int) -> None:
        self._config = SQLAlchemyAsyncConfig(
            connection_string=url.replace("postgresql:", "postgresql+asyncpg:"),
            session_config=AsyncSessionConfig(expire_on_commit=False),
            engine_config=EngineConfig(pool_size=connections, max_overflow=0),
        )

    async def close(self) -> None:
        await self._config.get_engine().dispose()

    async def get(self, user: str, task: int) -> object:
        async with self._config.get_session() as session:
            return await _find(Tasks(session=session), user, task)

    async def list(self, user: str) -> Sequence[object]:
        async with self._config.get_session() as session:
            tasks: Sequence[object] = await Tasks(session=session).get_many(
                Task.user_id == user, LimitOffset(PAGE, 0), OrderBy("id", "desc")
            )
            return tasks

    async def create(self, user: str, title: str) -> object:
        async with self._config.get_session() as session:
            return await Tasks(session=session).add(
                Task(user_id=user, title=title), auto_commit=True
            )

    async def create_many(self, user: str, titles: Sequence[str]) -> Sequence[object]:
        async with self._config.get_session() as session:
            tasks: Sequence[object] = await Tasks(session=session).add_many(
                [Task(user_id=user, title=title) for title in titles], auto_commit=True
            )
            return tasks

    async def update(self, user: str, task: int, title: str) -> object:
        async with self._config.get_session() as session:
            repository = Tasks(session=session)
            found = await _find(repository, user, task)
            if found is not None:
                found.title = title
                await repository.update(found, auto_commit=True)
            return found

    async def toggle(self, user: str, task: int) -> object:
        async with self._config.get_session() as session:
            repository = Tasks(session=session)
            found = await _find(repository, user, task)
            if found is not None:
                found.completed = not found.completed
                await repository.update(found, auto_commit=True)
            return found

    async def delete(self, user: str, task: int) -> object:
        async with self._config.get_session() as session:
            return await Tasks(session=session).delete_where(
                Task.user_id == user, Task.id == task, auto_commit=True
            )

    async def count(self, user: str) -> int:
        async with self._config.get_session() as session:
            return int(await Tasks(session=session).count(Task.user_id == user))


async def _find(repository: Tasks, user: str, task: int) -> Task | None:
    found: Task | None = await repository.get_one_or_none(Task.user_id == user, Task.id == task)
    return found
