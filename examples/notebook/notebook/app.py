"""The API: `uvicorn notebook.app:app`."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, status
from notebook.labels import LabelRecord, LabelRepository
from notebook.models import Conversation, DatedTask, Message, TaskLabel
from pydantic import AwareDatetime, BaseModel, Field
from sqlalchemy.orm import selectinload

from todo_db import NotFoundError, Transaction
from todo_db.fastapi import (
    PROBLEMS,
    CurrentDatabase,
    CurrentUserId,
    install,
    lifespan,
    repository,
)

app = FastAPI(title="Notebook", lifespan=lifespan())
install(app)
api = APIRouter(prefix="/api", responses=PROBLEMS)
Labels = Annotated[LabelRepository, Depends(repository(LabelRepository))]


class NewLabel(BaseModel):
    name: Annotated[str, Field(max_length=50)]


class LabelPage(BaseModel):
    items: list[LabelRecord]
    next_cursor: str | None


class DueDate(BaseModel):
    due_at: AwareDatetime | None


class NewConversation(BaseModel):
    title: Annotated[str, Field(max_length=200)]


class NewMessage(BaseModel):
    body: Annotated[str, Field(min_length=1, max_length=10_000)]


class MessageView(BaseModel, from_attributes=True):
    id: int
    role: str
    body: str


class ConversationView(BaseModel, from_attributes=True):
    id: int
    title: str
    messages: list[MessageView]


@api.get("/labels")
async def list_labels(
    user_id: CurrentUserId, labels: Labels, cursor: str | None = None
) -> LabelPage:
    page = await labels.list(user_id, cursor=cursor)
    return LabelPage(items=list(page.items), next_cursor=page.next_cursor)


@api.post("/labels", status_code=status.HTTP_201_CREATED)
async def create_label(user_id: CurrentUserId, labels: Labels, new: NewLabel) -> LabelRecord:
    return await labels.create(user_id, new.name)


@api.delete("/labels/{label_id}", status_code=status.HTTP_204_NO_CONTENT)
async def delete_label(user_id: CurrentUserId, labels: Labels, label_id: int) -> None:
    await labels.delete(user_id, label_id)


@api.put("/tasks/{task_id}/labels/{label_id}", status_code=status.HTTP_204_NO_CONTENT)
async def put_label(
    user_id: CurrentUserId, database: CurrentDatabase, task_id: int, label_id: int
) -> None:
    async def work(tx: Transaction) -> None:
        # A task or a label of another user is refused like one that does not exist.
        await tx.session().merge(TaskLabel(user_id=user_id, task_id=task_id, label_id=label_id))

    await database.run(user_id, work)


@api.put("/tasks/{task_id}/due")
async def put_due_date(
    user_id: CurrentUserId, database: CurrentDatabase, task_id: int, due: DueDate
) -> datetime | None:
    async def work(tx: Transaction) -> datetime | None:
        task = await tx.session().get(DatedTask, task_id)
        if task is None:
            raise NotFoundError
        task.due_at = due.due_at
        return task.due_at

    return await database.run(user_id, work)


@api.post("/conversations", status_code=status.HTTP_201_CREATED)
async def create_conversation(
    user_id: CurrentUserId, database: CurrentDatabase, new: NewConversation
) -> ConversationView:
    async with database.transaction(user_id) as tx:
        conversation = Conversation(title=new.title, messages=[])
        tx.session().add(conversation)
        await tx.session().flush()
        return ConversationView.model_validate(conversation)


@api.get("/conversations/{conversation_id}")
async def get_conversation(
    user_id: CurrentUserId, database: CurrentDatabase, conversation_id: int
) -> ConversationView:
    async with database.transaction(user_id, read_only=True) as tx:
        conversation = await tx.session().get(
            Conversation, conversation_id, options=[selectinload(Conversation.messages)]
        )
        if conversation is None:
            raise NotFoundError
        return ConversationView.model_validate(conversation)


@api.post("/conversations/{conversation_id}/messages", status_code=status.HTTP_201_CREATED)
async def add_message(
    user_id: CurrentUserId, database: CurrentDatabase, conversation_id: int, new: NewMessage
) -> MessageView:
    async with database.transaction(user_id) as tx:
        message = Message(conversation_id=conversation_id, role="user", body=new.body)
        tx.session().add(message)
        await tx.session().flush()
        return MessageView.model_validate(message)


app.include_router(api)
