"""SQLModel: add, commit, refresh, as its tutorial writes it."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import BigInteger, DateTime, FetchedValue, Identity, func
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import Field, SQLModel, col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from contestants import PAGE, Contestant

_TIME = DateTime(timezone=True)
_SET_BY_SERVER = {"server_default": FetchedValue()}


class Task(SQLModel, table=True):
    """A task of one user."""

    __tablename__ = "tasks"

    id: int | None = Field(
        default=None, primary_key=True, sa_type=BigInteger, sa_column_args=[Identity(always=True)]
    )
    user_id: str
    title: str
    description: str | None = None
    completed: bool = False
    created_at: datetime | None = Field(
        default=None, sa_type=_TIME, sa_column_kwargs=_SET_BY_SERVER
    )
    updated_at: datetime | None = Field(
        default=None,
        sa_type=_TIME,
        sa_column_kwargs=_SET_BY_SERVER | {"server_onupdate": FetchedValue()},
    )


class Unfenced(Contestant):
    """Only the WHERE clauses keep users apart."""

    async def open(self, url: str, connections: int) -> None:
        self._engine = create_async_engine(
            url.replace("postgresql:", "postgresql+asyncpg:"),
            pool_size=connections,
            max_overflow=0,
        )

    async def close(self) -> None:
        await self._engine.dispose()

    async def get(self, user: str, task: int) -> object:
        async with AsyncSession(self._engine) as session:
            return await _find(session, user, task)

    async def list(self, user: str) -> Sequence[object]:
        newest = select(Task).where(Task.user_id == user).order_by(col(Task.id).desc()).limit(PAGE)
        async with AsyncSession(self._engine) as session:
            tasks: Sequence[object] = (await session.exec(newest)).all()
            return tasks

    async def create(self, user: str, title: str) -> object:
        async with AsyncSession(self._engine) as session:
            task = Task(user_id=user, title=title)
            session.add(task)
            await session.commit()
            await session.refresh(task)
            return task

    async def create_many(self, user: str, titles: Sequence[str]) -> Sequence[object]:
        """Store them, and keep what the INSERT returned: to refresh each would be 100 SELECTs."""
        async with AsyncSession(self._engine, expire_on_commit=False) as session:
            tasks = [Task(user_id=user, title=title) for title in titles]
            session.add_all(tasks)
            await session.commit()
            return tasks

    async def update(self, user: str, task: int, title: str) -> object:
        async with AsyncSession(self._engine) as session:
            found = await _find(session, user, task)
            if found is not None:
                found.title = title
                await _save(session, found)
            return found

    async def toggle(self, user: str, task: int) -> object:
        async with AsyncSession(self._engine) as session:
            found = await _find(session, user, task)
            if found is not None:
                found.completed = not found.completed
                await _save(session, found)
            return found

    async def delete(self, user: str, task: int) -> object:
        async with AsyncSession(self._engine) as session:
            found = await _find(session, user, task)
            if found is not None:
                await session.delete(found)
                await session.commit()
            return found

    async def count(self, user: str) -> int:
        number = select(func.count()).select_from(Task).where(Task.user_id == user)
        async with AsyncSession(self._engine) as session:
            return int((await session.exec(number)).one())


async def _find(session: AsyncSession, user: str, task: int) -> Task | None:
    found: Task | None = (
        await session.exec(select(Task).where(Task.user_id == user, Task.id == task))
    ).first()
    return found


async def _save(session: AsyncSession, task: Task) -> None:
    session.add(task)
    await session.commit()
    await session.refresh(task)
