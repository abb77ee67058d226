"""Routes with the mistakes that back ends make, and sound routes that are not to be accused."""

from collections.abc import AsyncIterator
from datetime import UTC, date, datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Literal
from urllib.parse import parse_qs
from uuid import UUID, uuid4

from fastapi import APIRouter, Body, Header, HTTPException, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from todo_db import NotFoundError
from todo_db.fastapi import CurrentUserId, PathUserId, Tasks
from todo_db.records import TaskRecord

leaking = APIRouter(prefix="/leaking")
sound = APIRouter(prefix="/sound")

type Found = list[TaskRecord]
_cache: Final[dict[int, TaskRecord]] = {}
_replies: Final[dict[str, TaskRecord]] = {}
_USERS: Final = ("alice", "mallory")


async def anyones(tasks: Tasks, task_id: int) -> TaskRecord:
    """Return a task of any user, as a statement without the user does."""
    for user in _USERS:
        try:
            return await tasks.get(user, task_id)
        except NotFoundError:
            continue
    raise NotFoundError


async def everything(
    tasks: Tasks, *, completed: bool | None = None, search: str | None = None
) -> Found:
    """Return the tasks of everyone."""
    pages = [await tasks.list(user, completed=completed, search=search) for user in _USERS]
    return [task for page in pages for task in page.items]


class Title(BaseModel):
    title: str


class Link(BaseModel):
    task_id: int


class Links(BaseModel):
    items: list[Link]


class Ids(BaseModel):
    ids: list[int]


class Camel(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)

    task_id: int


class Task(BaseModel):
    task: int


class Search(BaseModel):
    text: str


@leaking.post("/tasks")
async def creates(tasks: Tasks, user_id: CurrentUserId, new: Title) -> TaskRecord:
    return await tasks.create(user_id, new.title)


# By a parameter that need not be given


@leaking.get("/filtered")
async def filtered(tasks: Tasks, user_id: CurrentUserId, *, completed: bool | None = None) -> Found:
    if completed is None:
        return list((await tasks.list(user_id)).items)
    return await everything(tasks, completed=completed)


@leaking.get("/searched")
async def searched(tasks: Tasks, user_id: CurrentUserId, q: str | None = None) -> Found:
    if q is None:
        return list((await tasks.list(user_id)).items)
    return await everything(tasks, search=q)


@leaking.get("/of")
async def of_someone(tasks: Tasks, user_id: CurrentUserId, owner: str | None = None) -> Found:
    return list((await tasks.list("alice" if owner == "alice" else user_id)).items)


@leaking.get("/paged")
async def paged(tasks: Tasks, user_id: CurrentUserId, limit: int = 20, offset: int = 0) -> Found:
    if offset == 0:
        return list((await tasks.list(user_id)).items)
    return (await everything(tasks))[offset:][:limit]


class View(StrEnum):
    MINE = "mine"
    ALL = "all"


@leaking.get("/viewed")
async def viewed(tasks: Tasks, user_id: CurrentUserId, view: View = View.MINE) -> Found:
    return await everything(tasks) if view == View.ALL else list((await tasks.list(user_id)).items)


@leaking.get("/tasks/{task_id}/expanded")
async def expanded(
    tasks: Tasks, user_id: CurrentUserId, task_id: int, *, archived: bool = False
) -> TaskRecord:
    return await (anyones(tasks, task_id) if archived else tasks.get(user_id, task_id))


@leaking.delete("/tasks/{task_id}/forced", status_code=204)
async def forced(
    tasks: Tasks, user_id: CurrentUserId, task_id: int, *, force: bool = False
) -> None:
    await tasks.delete("alice" if force else user_id, task_id)


@leaking.post("/found")
async def found(tasks: Tasks, user_id: CurrentUserId, query: Search) -> Found:
    del user_id
    return await everything(tasks, search=query.text)


# By an id that is not in the path


@leaking.post("/linked")
async def linked(tasks: Tasks, user_id: CurrentUserId, links: Links) -> list[str]:
    del user_id
    return [(await anyones(tasks, link.task_id)).title for link in links.items]


@leaking.post("/tasks/removed")
async def removed(tasks: Tasks, user_id: CurrentUserId, chosen: Ids) -> int:
    return await tasks.delete_many(user_id, chosen.ids) + await tasks.delete_many(
        "alice", chosen.ids
    )


@leaking.delete("/tasks")
async def removed_by_query(
    tasks: Tasks, user_id: CurrentUserId, ids: Annotated[list[int], Query()]
) -> int:
    return await tasks.delete_many(user_id, ids) + await tasks.delete_many("alice", ids)


@leaking.post("/tasks/finished")
async def finished(tasks: Tasks, user_id: CurrentUserId, ids: Annotated[list[int], Body()]) -> int:
    del user_id
    return len([await anyones(tasks, each) for each in ids])


@leaking.post("/camel")
async def camel(tasks: Tasks, user_id: CurrentUserId, chosen: Camel) -> str:
    del user_id
    return (await anyones(tasks, chosen.task_id)).title


@leaking.post("/named")
async def named(tasks: Tasks, user_id: CurrentUserId, chosen: Task) -> str:
    del user_id
    return (await anyones(tasks, chosen.task)).title


@leaking.get("/by-header")
async def by_header(
    tasks: Tasks, user_id: CurrentUserId, x_task_id: Annotated[int, Header()]
) -> TaskRecord:
    del user_id
    return await anyones(tasks, x_task_id)


@leaking.post("/tasks/{task_id}/children", status_code=201)
async def child(tasks: Tasks, user_id: CurrentUserId, task_id: int, new: Title) -> TaskRecord:
    await anyones(tasks, task_id)
    return await tasks.create(user_id, new.title)


@leaking.patch("/tasks/{task_id}/given")
async def given(
    tasks: Tasks,
    user_id: CurrentUserId,
    task_id: int,
    to: Annotated[str, Body(embed=True, alias="userId")],
) -> None:
    task = await tasks.get(user_id, task_id)
    await tasks.create("alice" if to == "alice" else user_id, task.title)


# By something else than the body of an answer


@leaking.get("/moved")
async def moved(tasks: Tasks, user_id: CurrentUserId) -> RedirectResponse:
    del user_id
    return RedirectResponse(f"/found?title={(await everything(tasks))[0].title}", 303)


@leaking.get("/total")
async def total(tasks: Tasks, user_id: CurrentUserId, response: Response) -> Found:
    response.headers["x-total-count"] = str(await tasks.count("alice"))
    return list((await tasks.list(user_id)).items)


@leaking.get("/statistics")
async def statistics(tasks: Tasks, user_id: CurrentUserId) -> dict[str, Any]:
    del user_id
    return {"count": await tasks.count("alice"), "at": datetime.now(UTC)}


@leaking.get("/tasks/{task_id}/count")
async def counted(tasks: Tasks, user_id: CurrentUserId, task_id: int) -> dict[str, int]:
    del user_id
    try:
        await anyones(tasks, task_id)
    except NotFoundError:
        return {"count": 0}
    return {"count": 1}


@leaking.get("/exported")
async def exported(tasks: Tasks, user_id: CurrentUserId) -> StreamingResponse:
    del user_id

    async def lines() -> AsyncIterator[str]:
        for task in await everything(tasks):
            yield f"{task.id},{task.title}\n"

    return StreamingResponse(lines(), media_type="text/csv")


@leaking.delete("/tasks/{task_id}/denied")
async def denied(tasks: Tasks, user_id: CurrentUserId, task_id: int) -> None:
    """Answer mallory with 404, but only after the row is gone."""
    await tasks.delete_many("alice", [task_id])
    if user_id != "alice":
        raise HTTPException(404)


@leaking.get("/tasks/{task_id}/opened")
async def opened(tasks: Tasks, user_id: CurrentUserId, task_id: int) -> None:
    """Change something by GET."""
    await tasks.update_many("alice", [task_id], completed=True)
    await tasks.get(user_id, task_id)


# By what another user has asked before


@leaking.get("/tasks/{task_id}/cached")
async def cached(tasks: Tasks, user_id: CurrentUserId, task_id: int) -> TaskRecord:
    if task_id not in _cache:
        _cache[task_id] = await tasks.get(user_id, task_id)
    return _cache[task_id]


@leaking.post("/repeated")
async def repeated(
    tasks: Tasks, user_id: CurrentUserId, new: Title, idempotency_key: Annotated[str, Header()]
) -> TaskRecord:
    if idempotency_key not in _replies:
        _replies[idempotency_key] = await tasks.create(user_id, new.title)
    return _replies[idempotency_key]


# Sound ones


class Color(StrEnum):
    RED = "red"


class Node(BaseModel):
    name: str
    parent: "Node | None" = None
    children: list["Node"] = []


class Move(BaseModel):
    action: Literal["move"]
    position: Annotated[int, Field(gt=5, le=100)]


class Rename(BaseModel):
    action: Literal["rename"]
    name: str


class Everything(BaseModel):
    color: Color
    day: date
    at: datetime
    key: UUID
    short: Annotated[str, Field(min_length=2, max_length=3)]
    amount: Annotated[float, Field(lt=0)]
    pair: Annotated[list[str], Field(min_length=2, max_length=2)]
    tree: Node
    change: Annotated[Move | Rename, Field(discriminator="action")]
    extra: dict[str, int]
    note: str | None = None


@sound.post("/everything", status_code=202)
async def takes_everything(user_id: CurrentUserId, everything: Everything) -> dict[str, Any]:
    return {"user": user_id, "color": everything.color}


@sound.post("/short", status_code=201)
async def unique_and_short(
    tasks: Tasks, user_id: CurrentUserId, name: Annotated[str, Body(embed=True, max_length=4)]
) -> TaskRecord:
    """Refuse a name that the user has already."""
    if name in {task.title for task in (await tasks.list(user_id, limit=100)).items}:
        raise HTTPException(409)
    return await tasks.create(user_id, name)


@sound.post("/tasks", status_code=201)
async def wrapped(tasks: Tasks, user_id: CurrentUserId, new: Title) -> dict[str, Any]:
    return {"data": {"task": await tasks.create(user_id, new.title)}}


@sound.post("/several/tasks", status_code=201)
async def several(tasks: Tasks, user_id: CurrentUserId, new: list[Title]) -> Found:
    return [await tasks.create(user_id, each.title) for each in new]


@sound.get("/tasks/{task_id}")
async def one(tasks: Tasks, user_id: CurrentUserId, task_id: int) -> TaskRecord:
    return await tasks.get(user_id, task_id)


@sound.get("/several/tasks/{task_id}")
async def one_of_several(tasks: Tasks, user_id: CurrentUserId, task_id: int) -> TaskRecord:
    return await tasks.get(user_id, task_id)


@sound.get("/tasks/{task_id}/explained")
async def explained(tasks: Tasks, user_id: CurrentUserId, task_id: int) -> TaskRecord:
    """Name each request in the body, as problem details often do."""
    try:
        return await tasks.get(user_id, task_id)
    except NotFoundError:
        problem = {"request": str(uuid4()), "at": str(datetime.now(UTC)), "retry": 3}
        raise HTTPException(404, problem) from None


@sound.get("/told")
async def told(user_id: CurrentUserId, q: str | None = None, page: int = 1) -> dict[str, Any]:
    """Repeat what was asked for."""
    return {"user": user_id, "q": q, "page": page}


@sound.get("/traced")
async def traced(
    user_id: CurrentUserId, x_request_id: Annotated[str | None, Header()] = None
) -> dict[str, Any]:
    return {"user": user_id, "request": x_request_id or str(uuid4())}


@sound.get("/users/{user_id}/tasks")
async def of_a_path(tasks: Tasks, user_id: PathUserId) -> Found:
    return list((await tasks.list(user_id)).items)


_FORM: Final = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-www-form-urlencoded": {
                "schema": {
                    "type": "object",
                    "properties": {"title": {"type": "string"}, "task_id": {"type": "integer"}},
                }
            }
        },
    }
}


async def _form(request: Request) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs((await request.body()).decode()).items()}


@sound.post("/form", openapi_extra=_FORM)
async def form(tasks: Tasks, user_id: CurrentUserId, request: Request) -> RedirectResponse:
    sent = await _form(request)
    await tasks.update(user_id, int(sent["task_id"]), title=sent["title"])
    return RedirectResponse("/sound/told", 303)


@leaking.post("/form", openapi_extra=_FORM)
async def leaking_form(tasks: Tasks, user_id: CurrentUserId, request: Request) -> str:
    del user_id
    return (await anyones(tasks, int((await _form(request))["task_id"]))).title


_FILES: Final = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
                        "count": {"type": "integer"},
                    },
                }
            }
        },
    }
}


@sound.post("/files", openapi_extra=_FILES)
async def files(user_id: CurrentUserId, request: Request) -> str:
    body = await request.body()
    if b'filename="file"' not in body or b'name="count"' not in body:
        raise HTTPException(422)
    return user_id


_PLAIN: Final = {"requestBody": {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@sound.post("/plain", openapi_extra=_PLAIN)
async def plain(user_id: CurrentUserId, request: Request) -> str:
    if await request.body() != b"plain":
        raise HTTPException(422)
    return user_id
