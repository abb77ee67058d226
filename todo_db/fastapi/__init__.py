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
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from http import HTTPStatus
from typing import Any, Final, cast

from fastapi import APIRouter, FastAPI
from fastapi.exception_handlers import (
    http_exception_handler,
    request_validation_exception_handler,
)
from fastapi.responses import JSONResponse
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, ExceptionHandler, Receive, Scope, Send

from todo_db.authenticator import Authenticator, Identity
from todo_db.database import Database
from todo_db.fastapi.caching import NotStored
from todo_db.fastapi.dependencies import (
    CurrentDatabase,
    CurrentUser,
    CurrentUserId,
    IdempotencyKey,
    IfMatch,
    PathUserId,
    SignIns,
    Tasks,
    Users,
    current_database,
    current_user,
    current_user_id,
    etag,
    path_user_id,
    repository,
)
from todo_db.fastapi.documentation import document_security
from todo_db.fastapi.problems import HANDLERS, PROBLEMS, Problem
from todo_db.settings import Settings
from todo_db.trust import is_set

__all__ = [
    "PROBLEMS",
    "CurrentDatabase",
    "CurrentUser",
    "CurrentUserId",
    "IdempotencyKey",
    "Identity",
    "IfMatch",
    "PathUserId",
    "Problem",
    "Tasks",
    "Users",
    "current_database",
    "current_user",
    "current_user_id",
    "etag",
    "install",
    "lifespan",
    "path_user_id",
    "repository",
]

_HANDLERS: Final = cast("dict[Any, ExceptionHandler]", HANDLERS)
# What FastAPI gives every application.
_DEFAULTS: Final = (http_exception_handler, request_validation_exception_handler)

_logger: Final = logging.getLogger(__name__)


def lifespan(
    settings: Settings | None = None,
) -> Callable[[FastAPI], AbstractAsyncContextManager[Mapping[str, Any]]]:
    """Return a lifespan that opens a `Database` at startup, and closes it at shutdown.

    An application with a lifespan of its own enters this one in it, and yields its state:
    `async with lifespan()(app) as state: yield {**state}`.

    Args:
        settings: By default read from the environment and `.env` at startup.
    """

    @asynccontextmanager
    async def opened(app: FastAPI) -> AsyncGenerator[Mapping[str, Any]]:
        chosen = settings or Settings()
        async with Database(chosen) as database:
            authenticator = Authenticator(database, chosen) if is_set(chosen) else None
            if authenticator is None:
                _logger.info(
                    "credentials: the settings name no issuer, so none is accepted",
                    extra={"event": "todo_db.credentials.none"},
                )
            else:
                _logger.info(
                    "credentials: %s",
                    authenticator.trust,
                    extra={"event": "todo_db.credentials.accepted"},
                )
                app.state.todo_trust = authenticator.trust
            yield {
                "todo_database": database,
                "todo_authenticator": authenticator,
                "todo_sign_ins": SignIns(),
            }

    return opened


def install(app: FastAPI) -> None:
    """Add error handlers that answer with problem details (RFC 9457), and `GET /health`.

    No answer repeats a value of the request. An id of another user gets the same bytes as an id
    that does not exist. Applications that are mounted before the first request get the same error
    handlers, where they do not have their own.

    An answer for which the database or the credential was asked for has `Cache-Control: no-store`,
    unless the handler sets the header: a shared cache need not tell the cookies of users apart
    (https://www.rfc-editor.org/rfc/rfc9111#section-3).
    """
    app.exception_handlers.update(_HANDLERS)
    app.add_middleware(_Mounted)
    app.add_middleware(NotStored)
    app.include_router(_health)
    document_security(app)


class _Mounted:
    """Gives mounted applications the error handlers: each handles its own errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._is_first = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_first:
            self._is_first = False
            for mounted in _mounted_in(scope["app"]):
                own = {
                    kind: handler
                    for kind, handler in mounted.exception_handlers.items()
                    if handler not in _DEFAULTS
                }
                mounted.exception_handlers = _HANDLERS | own
        await self._app(scope, receive, send)


def _mounted_in(app: Starlette) -> list[Starlette]:
    found = [
        route.app
        for route in app.routes
        if isinstance(route, Mount) and isinstance(route.app, Starlette)
    ]
    return [*found, *(inner for each in found for inner in _mounted_in(each))]


_health: Final = APIRouter(tags=["health"])


@_health.get("/health", responses={503: {"description": "Not ready to serve"}})
async def health(database: CurrentDatabase) -> JSONResponse:
    """Say whether the database answers and is migrated, and nothing else."""
    seen = await database.health()
    status = HTTPStatus.OK if seen.ok else HTTPStatus.SERVICE_UNAVAILABLE
    return JSONResponse({"ok": seen.ok, "problem": seen.problem}, status)
