"""The REST API of a todo application: `uvicorn fastapi_app:app --app-dir examples`."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Query, Request, Response, status
from pydantic import BaseModel, Field

from todo_db import NewTask, TaskChanges, TaskRecord, TaskSort, UserRecord
from todo_db.fastapi import (
    PROBLEMS,
    CurrentUserId,
    IdempotencyKey,
    IfMatch,
    Tasks,
    Users,
    etag,
    install,
    lifespan,
)

app = FastAPI(title="Todo", version="1.0.0", lifespan=lifespan(), max_body_size=2**20)
install(app)
api = APIRouter(prefix="/api", responses=PROBLEMS | {413: {"description": "Too long"}})


@dataclass(frozen=True)
class TaskPage:
    items: list[TaskRecord]
    next_cursor: str | None


class Filters(BaseModel):
    completed: bool | None = None
    search: Annotated[str, Field(max_length=200)] | None = None
    sort: TaskSort = TaskSort.NEWEST
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    cursor: str | None = None


@api.get("/me")
async def me(user_id: CurrentUserId, users: Users) -> UserRecord:
    return await users.get(user_id)


@api.get("/tasks")
async def list_tasks(
    user_id: CurrentUserId,
    tasks: Tasks,
    filters: Annotated[Filters, Query()],
    request: Request,
    response: Response,
) -> TaskPage:
    page = await tasks.list(user_id, **dict[str, Any](filters))
    if page.next_cursor:
        url = request.url.include_query_params(cursor=page.next_cursor)
        response.headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'
    return TaskPage(list(page.items), page.next_cursor)


@api.post("/tasks", status_code=status.HTTP_201_CREATED)
async def create_task(
    user_id: CurrentUserId,
    tasks: Tasks,
    new: NewTask,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> TaskRecord:
    task = await tasks.create(user_id, **asdict(new), idempotency_key=idempotency_key)
    response.headers.update({"Location": f"/api/tasks/{task.id}", "ETag": etag(task)})
    return task


@api.delete("/tasks")
async def delete_completed_tasks(
    user_id: CurrentUserId,
    tasks: Tasks,
    completed: Literal["true"],  # noqa: ARG001  # required, to prevent a deletion by mistake
) -> dict[str, int]:
    return {"deleted": await tasks.delete_completed(user_id)}


@api.get("/tasks/{task_id}")
async def get_task(
    user_id: CurrentUserId, tasks: Tasks, task_id: int, response: Response
) -> TaskRecord:
    task = await tasks.get(user_id, task_id)
    response.headers["ETag"] = etag(task)
    return task


@api.patch("/tasks/{task_id}")
async def update_task(  # noqa: PLR0913, PLR0917  # the parts of the request
    user_id: CurrentUserId,
    tasks: Tasks,
    task_id: int,
    changes: TaskChanges,
    expected: IfMatch,
    response: Response,
) -> TaskRecord:
    task = await tasks.update(user_id, task_id, expected_updated_at=expected, **changes)
    response.headers["ETag"] = etag(task)
    return task


@api.post("/tasks/{task_id}/toggle")
async def toggle_task(
    user_id: CurrentUserId, tasks: Tasks, task_id: int, response: Response
) -> TaskRecord:
    task = await tasks.toggle(user_id, task_id)
    response.headers["ETag"] = etag(task)
    return task


@api.delete("/tasks/{task_id}", status_code=status.HTTP_204_NO_CONTENT)
async def delete_task(user_id: CurrentUserId, tasks: Tasks, task_id: int) -> None:
    await tasks.delete(user_id, task_id)


app.include_router(api)
