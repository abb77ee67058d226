"""The tables of this application, behind the same fence as the tasks."""

from datetime import datetime
from typing import Literal

from sqlalchemy import BigInteger, DateTime, Identity, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

from todo_db.fence import FenceOptions
from todo_db.models import Base, Owned, Task, Timestamps, owned_reference


class Label(Owned, Timestamps, Base):
    """A label that a user puts on tasks. Its name is unique for the user."""

    __tablename__ = "labels"
    __table_args__ = (UniqueConstraint("user_id", "name"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    name: Mapped[str] = mapped_column(String(50))


class TaskLabel(Owned, Base):
    """A label on a task; both belong to the same user."""

    __tablename__ = "task_labels"

    task_id: Mapped[int] = owned_reference(Task.id, primary_key=True)
    label_id: Mapped[int] = owned_reference(Label.id, primary_key=True)


class Conversation(Owned, Timestamps, Base):
    """A chat of one user with an assistant."""

    __tablename__ = "conversations"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    title: Mapped[str] = mapped_column(String(200))
    messages: Mapped[list["Message"]] = relationship(
        back_populates="conversation", order_by="Message.id", passive_deletes=True
    )


class Message(Owned, Base):
    """One message of a conversation. It can be added and deleted, and never changed."""

    __tablename__ = "messages"
    __fence__ = FenceOptions(update=[])

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    conversation_id: Mapped[int] = owned_reference(Conversation.id)
    role: Mapped[Literal["user", "assistant"]] = mapped_column(String(20))
    body: Mapped[str] = mapped_column(Text)
    conversation: Mapped[Conversation] = relationship(back_populates="messages")


class DatedTask(Task):
    """A task with a date until which it has to be done: a column of this application."""

    due_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
