"""`Cache-Control: no-store`, for answers about a user."""

from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_IS_PRIVATE: Final = "todo_db.is_private"


def keep_private(connection: HTTPConnection) -> None:
    """Note that the answer to a request is about a user."""
    connection.scope[_IS_PRIVATE] = True


class NotStored:
    """Keeps answers about users out of caches, unless the handler has set `Cache-Control`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        async def send_private(message: Message) -> None:
            if message["type"] == "http.response.start" and _IS_PRIVATE in scope:
                MutableHeaders(scope=message).setdefault("cache-control", "no-store")
            await send(message)

        await self._app(scope, receive, send_private)
