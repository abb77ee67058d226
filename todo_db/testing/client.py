"""A client of an application that runs in this process, and signs in as one user or another.

It needs the extra `fastapi`, and httpx.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from todo_db.database import Database
from todo_db.errors import ConfigurationError
from todo_db.testing.openapi import JSON, Request

if TYPE_CHECKING:
    from fastapi import FastAPI
    from httpx import AsyncClient, Response

type Headers = Callable[[str], Mapping[str, str]]
"""Returns the headers with which a user signs in."""

_USER: Final = "x-todo-db-user"
_FORM: Final = "application/x-www-form-urlencoded"
_FILES: Final = "multipart/form-data"
_PATIENCE_SECONDS: Final = 10.0


class Unreachable(Exception):  # noqa: N818  # a reason, not a fault of the program
    """Why an operation could not be called."""


def routes_of(app: "FastAPI") -> Iterator[str]:
    """Yield everything that the application answers, but for files and its documentation."""
    from starlette.routing import Mount, Route, WebSocketRoute  # noqa: PLC0415  # an optional extra
    from starlette.staticfiles import StaticFiles  # noqa: PLC0415  # likewise

    own = {app.openapi_url, app.docs_url, app.redoc_url, app.swagger_ui_oauth2_redirect_url}
    for route in app.routes:
        if isinstance(route, Route) and route.path not in own:
            methods = (route.methods or {"GET"}) - {"HEAD", "OPTIONS"}
            yield from (f"{method} {route.path_format}" for method in methods)
        elif isinstance(route, WebSocketRoute):
            yield f"WEBSOCKET {route.path}"
        elif isinstance(route, Mount) and not isinstance(route.app, StaticFiles):
            yield f"MOUNT {route.path}"


@asynccontextmanager
async def opened(
    app: "FastAPI", headers: Headers | None
) -> AsyncGenerator[tuple["Client", Database]]:
    """Run the lifespan, and yield a client, and the database of the application."""
    from fastapi import Request  # noqa: PLC0415  # an optional extra
    from httpx import ASGITransport, AsyncClient  # noqa: PLC0415  # likewise

    from todo_db.fastapi import current_user_id  # noqa: PLC0415  # likewise

    def named(request: Request) -> str:
        return request.headers[_USER]

    overrides = app.dependency_overrides
    if headers is None:
        app.dependency_overrides = {**overrides, current_user_id: named}
    try:
        async with app.router.lifespan_context(app) as state:
            database = dict(state or {}).get("todo_database")
            if not isinstance(database, Database):
                raise ConfigurationError("the application does not use todo_db.fastapi.lifespan")

            async def with_state(scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401  # ASGI
                await app({**scope, "state": dict(state or {})}, receive, send)

            transport = ASGITransport(with_state, raise_app_exceptions=False)
            async with AsyncClient(transport=transport, base_url="http://testserver") as client:
                yield Client(client, headers or (lambda user: {_USER: user})), database
    finally:
        app.dependency_overrides = overrides


@dataclass(frozen=True)
class Client:
    """Sends requests as one user or another."""

    http: "AsyncClient"
    headers: Headers

    async def send(self, user: str, request: Request) -> "Response":
        """Send a request.

        Raises:
            Unreachable: The answer does not end.
        """
        headers = {**request.headers, **self.headers(user)}
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                return await self.http.request(
                    request.method,
                    request.path,
                    params=request.query,
                    headers=headers,
                    **_body(request),
                )
        except TimeoutError:
            raise Unreachable(
                f"its answer does not end in {_PATIENCE_SECONDS:g} s: name it in skip="
            ) from None


def _body(request: Request) -> dict[str, Any]:
    """Return what makes httpx send the body in its form."""
    match request.media:
        case media if media == JSON:
            return {"json": request.body}
        case media if media == _FORM:
            return {"data": request.body}
        case media if media == _FILES:
            members = cast("dict[str, object]", request.body)
            return {
                "files": {
                    name: (name, value) if isinstance(value, bytes) else (None, str(value))
                    for name, value in members.items()
                }
            }
        case _:
            return {"content": request.body}
