"""For FastAPI: the user of a request, the repositories, and error responses.

```python
app = FastAPI(lifespan=lifespan())
install(app)


@app.get("/api/tasks/{task_id}")
async def get_task(user_id: CurrentUserId, tasks: Tasks, task_id: int) -> TaskRecord:
    return await tasks.get(user_id, task_id)
```
"""

import logging
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from http.client import responses
from math import ceil
from typing import Annotated, Any, Final, cast

from fastapi import APIRouter, Depends, FastAPI, Header, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import APIKeyCookie, HTTPBearer
from fastapi.utils import is_body_allowed_for_status_code
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from todo_db.better_auth import Authenticator
from todo_db.database import Database
from todo_db.errors import (
    ConfigurationError,
    ConflictError,
    InvalidInputError,
    NotAuthenticatedError,
    NotFoundError,
    OutcomeUnknownError,
    StaleTaskError,
    TodoDBError,
    UnavailableError,
)
from todo_db.records import TaskRecord, UserRecord
from todo_db.repositories import TaskRepository, UserRepository
from todo_db.settings import Settings

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_ETAG: Final = re.compile(r'"(-?[0-9]{1,18})"')
_MEDIA_TYPE: Final = "application/problem+json"

_logger: Final = logging.getLogger("todo_db")


class Problem(BaseModel):
    """The body of an error response (https://www.rfc-editor.org/rfc/rfc9457).

    Attributes:
        type: Always `about:blank`: the status describes the problem.
        title: The reason phrase of the status.
        status: The status code.
        detail: What was wrong, without a value of the request.
        field: The part of the request that was refused, for 422.
        code: The name of the error's class, for conflicts and unknown outcomes.
    """

    type: str = "about:blank"
    title: str
    status: int
    detail: str | None = None
    field: str | None = None
    code: str | None = None


# The first class that matches counts. Any other error is a fault of the service.
_STATUS: Final[dict[type[TodoDBError], HTTPStatus]] = {
    InvalidInputError: HTTPStatus.UNPROCESSABLE_CONTENT,
    NotAuthenticatedError: HTTPStatus.UNAUTHORIZED,
    NotFoundError: HTTPStatus.NOT_FOUND,
    # https://www.rfc-editor.org/rfc/rfc9110#section-13.1.1
    StaleTaskError: HTTPStatus.PRECONDITION_FAILED,
    ConflictError: HTTPStatus.CONFLICT,
    UnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
    OutcomeUnknownError: HTTPStatus.GATEWAY_TIMEOUT,
}

PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    status.value: {
        "description": status.phrase,
        "content": {_MEDIA_TYPE: {"schema": Problem.model_json_schema()}},
    }
    # FastAPI itself answers 400 to a body that it cannot parse.
    for status in sorted({HTTPStatus.BAD_REQUEST, *_STATUS.values()})
}
"""The error responses of `install`, for the parameter `responses` of a router."""


def lifespan(
    settings: Settings | None = None,
) -> Callable[[FastAPI], AbstractAsyncContextManager[Mapping[str, Any]]]:
    """Return a lifespan that opens a `Database` at startup, and closes it at shutdown.

    Args:
        settings: By default read from the environment and `.env` at startup.
    """

    @asynccontextmanager
    async def opened(_app: FastAPI) -> AsyncGenerator[Mapping[str, Any]]:
        chosen = settings or Settings()
        async with Database(chosen) as database:
            authenticator = None
            if chosen.better_auth_secret is not None:
                authenticator = Authenticator(database, chosen)
            yield {"todo_database": database, "todo_authenticator": authenticator}

    return opened


def install(app: FastAPI) -> None:
    """Add error handlers that answer with problem details (RFC 9457), and `GET /health`.

    No answer repeats a value of the request. An id of another user gets the same bytes as an id
    that does not exist.
    """
    app.add_exception_handler(TodoDBError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_fault)
    app.include_router(_health)


def current_database(request: Request) -> Database:
    """Return the `Database` that the lifespan opened."""
    database: Database = request.state.todo_database
    return database


_BEARER: Final = HTTPBearer(auto_error=False, description="A session token, or a JWT")
_COOKIE: Final = APIKeyCookie(
    name="better-auth.session_token",
    auto_error=False,
    description="Better Auth's cookie; with https its name begins with `__Secure-`",
)


async def current_user_id(
    request: Request,
    _bearer: Annotated[object, Security(_BEARER)],  # for the documentation
    _cookie: Annotated[object, Security(_COOKIE)],
) -> str:
    """Return the id of the user who sent the request, by Better Auth's cookie, token or JWT.

    For another authentication, put a function of your own into `app.dependency_overrides`. Every
    other dependency trusts the id that it returns.

    Raises:
        NotAuthenticatedError: The credential is missing or not valid.
        ConfigurationError: `BETTER_AUTH_SECRET` is not set.
    """
    authenticator: Authenticator | None = request.state.todo_authenticator
    if authenticator is None:
        raise ConfigurationError("BETTER_AUTH_SECRET and BETTER_AUTH_URL must be set")
    headers = request.headers
    return await authenticator.user_id(
        cookie="; ".join(headers.getlist("cookie")), authorization=headers.get("authorization")
    )


CurrentUserId = Annotated[str, Depends(current_user_id)]
"""The id of the user who sent the request."""


def path_user_id(user_id: str, current: CurrentUserId) -> str:
    """Return the `{user_id}` of the path, if it is the user who sent the request.

    Raises:
        NotFoundError: It is another user, or a user that does not exist.
    """
    if user_id != current:
        raise NotFoundError
    return current


PathUserId = Annotated[str, Depends(path_user_id)]
"""The id of the user who sent the request, for paths like `/api/{user_id}/tasks`."""


CurrentDatabase = Annotated[Database, Depends(current_database)]
"""The `Database` that the lifespan opened."""


def repository[R](make: Callable[[Database], R]) -> Callable[[Database], R]:
    """Return a dependency that gives a repository on the database, such as one of your own.

    ```python
    Labels = Annotated[LabelRepository, Depends(repository(LabelRepository))]
    ```
    """

    def on_database(database: CurrentDatabase) -> R:
        return make(database)

    return on_database


Tasks = Annotated[TaskRepository, Depends(repository(TaskRepository))]
"""The repository of tasks; each call is its own transaction."""
Users = Annotated[UserRepository, Depends(repository(UserRepository))]
"""The repository of users; each call is its own transaction."""


def etag(record: TaskRecord | UserRecord) -> str:
    """Return the version of a record, for the header `ETag`."""
    return f'"{(record.updated_at - _EPOCH) // _MICROSECOND}"'


def _if_match(
    value: Annotated[str | None, Header(alias="If-Match", description="An ETag, or *")] = None,
) -> datetime | None:
    if value is None or value.strip() == "*":
        return None
    version = _ETAG.fullmatch(value.strip())
    if version is not None:
        with suppress(OverflowError):
            return _EPOCH + int(version[1]) * _MICROSECOND
    # A weak ETag, a list of ETags, or another format: no task has that version.
    raise StaleTaskError


IfMatch = Annotated[datetime | None, Depends(_if_match)]
"""The header `If-Match`, as `expected_updated_at`; None without the header, or for `*`."""
IdempotencyKey = Annotated[
    str | None,
    Header(alias="Idempotency-Key", description="Unique for this request, such as a UUID"),
]
"""The header `Idempotency-Key`, as `idempotency_key`."""

_health: Final = APIRouter(tags=["health"])


@_health.get("/health", responses={503: {"description": "Not ready to serve"}})
async def health(database: CurrentDatabase) -> JSONResponse:
    """Say whether the database answers and is migrated, and nothing else."""
    seen = await database.health()
    status = HTTPStatus.OK if seen.ok else HTTPStatus.SERVICE_UNAVAILABLE
    return JSONResponse({"ok": seen.ok, "problem": seen.problem}, status)


def _problem(
    status: HTTPStatus, headers: Mapping[str, str] | None = None, **members: object
) -> JSONResponse:
    content = {"type": "about:blank", "title": status.phrase, "status": status, **members}
    return JSONResponse(content, status, headers, media_type=_MEDIA_TYPE)


async def _answer_error(_request: Request, error: Exception) -> JSONResponse:
    status = next(
        (status for kind, status in _STATUS.items() if isinstance(error, kind)),
        HTTPStatus.INTERNAL_SERVER_ERROR,
    )
    match error:
        case InvalidInputError():
            return _problem(status, detail=error.requirement, field=error.field)
        case NotAuthenticatedError():
            return _problem(status, {"WWW-Authenticate": "Bearer"})
        case NotFoundError():
            # The kind of the missing object could reveal ids of other users.
            return _problem(status)
        case UnavailableError():
            return _problem(
                status, {"Retry-After": str(max(1, ceil(error.retry_after)))}, detail=str(error)
            )
        case ConflictError() | OutcomeUnknownError():
            return _problem(status, detail=str(error), code=type(error).__name__)
        case _:
            _logger.error("%s: %s", type(error).__name__, error)
            return _problem(status)


async def _answer_validation(_request: Request, error: Exception) -> JSONResponse:
    # FastAPI's own answer would repeat the input.
    first = cast("RequestValidationError", error).errors()[0]
    # Nested and unknown field names come from the request body, so they are not repeated in the
    # answer.
    named = first["loc"][1:2] if first["type"] != "extra_forbidden" else ()
    field = "".join(part for part in named if isinstance(part, str))
    detail = "is none of the kinds" if first["type"] == "union_tag_invalid" else first["msg"]
    return _problem(HTTPStatus.UNPROCESSABLE_CONTENT, detail=detail, field=field)


async def _answer_http(_request: Request, error: Exception) -> Response:
    refusal = cast("HTTPException", error)
    if not is_body_allowed_for_status_code(refusal.status_code):
        return Response(None, refusal.status_code, refusal.headers)
    phrase = responses.get(refusal.status_code, "Unknown")
    members = {} if refusal.detail == phrase else {"detail": refusal.detail}
    content = {"type": "about:blank", "title": phrase, "status": refusal.status_code, **members}
    return JSONResponse(content, refusal.status_code, refusal.headers, media_type=_MEDIA_TYPE)


async def _answer_fault(_request: Request, _error: Exception) -> JSONResponse:
    # Starlette raises the error again, so that the server logs it.
    return _problem(HTTPStatus.INTERNAL_SERVER_ERROR)
