"""SQLAlchemy's ORM: a session for each call, and a ping before it."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime

from sqlalchemy import BigInteger, DateTime, FetchedValue, Identity, delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from contestants import PAGE, Contestant


class Base(DeclarativeBase):
    """`eager_defaults` reads what a trigger sets with the UPDATE, which saves a SELECT."""

    __mapper_args__ = {"eager_defaults": True}  # noqa: RUF012  # as SQLAlchemy declares it


class Task(Base):
    """A task of one user."""

    __tablename__ = "tasks"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
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


class Unfenced(Contestant):
    """Only the WHERE clauses keep users apart."""

    async def open(self, url: str, connections: int) -> None:
        self._engine = create_async_engine(
            url.replace("postgresql:", "postgresql+asyncpg:"),
            pool_size=connections,
            max_overflow=0,
            pool_pre_ping=True,
        )
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)

    async def close(self) -> None:
        await self._engine.dispose()

    @asynccontextmanager
    async def _session(self, user: str) -> AsyncGenerator[AsyncSession]:
        async with self._sessions() as session, session.begin():
            await self.enter(session, user)
            yield session

    async def enter(self, session: AsyncSession, user: str) -> None:
        """Say who the user is."""

    async def get(self, user: str, task: int) -> object:
        async with self._session(user) as session:
            return await _find(session, user, task)

    async def list(self, user: str) -> Sequence[object]:
        newest = select(Task).where(Task.user_id == user).order_by(Task.id.desc()).limit(PAGE)
        async with self._session(user) as session:
            return (await session.scalars(newest)).all()

    async def create(self, user: str, title: str) -> object:
        async with self._session(user) as session:
            task = Task(user_id=user, title=title)
            session.add(task)
        return task

    async def create_many(self, user: str, titles: Sequence[str]) -> Sequence[object]:
        async with self._session(user) as session:
            tasks = [Task(user_id=user, title=title) for title in titles]
            session.add_all(tasks)
        return tasks

    async def update(self, user: str, task: int, title: str) -> object:
        async with self._session(user) as session:
            found = await _find(session, user, task)
            if found is not None:
                found.title = title
        return found

    async def toggle(self, user: str, task: int) -> object:
        async with self._session(user) as session:
            found = await _find(session, user, task)
            if found is not None:
                found.completed = not found.completed
        return found

    async def delete(self, user: str, task: int) -> object:
        one = delete(Task).where(Task.user_id == user, Task.id == task).returning(Task.id)
        async with self._session(user) as session:
            return await session.scalar(one)

    async def count(self, user: str) -> int:
        number = select(func.count()).select_from(Task).where(Task.user_id == user)
        async with self._session(user) as session:
            return await session.scalar(number) or 0


class Fenced(Unfenced):
    """The same behind row-level security: each transaction first sets its user."""

    async def enter(self, session: AsyncSession, user: str) -> None:
        """Send `set_config` in a statement of its own."""
        await session.execute(select(func.set_config("todo_db.user_id", user, True)))  # noqa: FBT003


async def _find(session: AsyncSession, user: str, task: int) -> Task | None:
    return await session.scalar(select(Task).where(Task.user_id == user, Task.id == task))
