"""A FastAPI application, called in this process or behind a real server."""

import asyncio
import socket
import warnings
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

with warnings.catch_warnings():
    # It prefers a successor of httpx.
    warnings.simplefilter("ignore")
    from starlette.testclient import TestClient, WebSocketDenialResponse

__all__ = ["TestClient", "WebSocketDenialResponse", "client", "server"]


@asynccontextmanager
async def client(
    app: FastAPI, *, headers: dict[str, str] | None = None
) -> AsyncGenerator[httpx.AsyncClient]:
    """Run the lifespan, and yield a client without a server; errors are raised again."""
    async with app.router.lifespan_context(app) as state:

        async def served(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, "state": dict(state or {})}, receive, send)

        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(served), base_url="http://test", headers=headers
        ) as asking:
            yield asking


@asynccontextmanager
async def server(app: FastAPI) -> AsyncGenerator[str]:
    """Run the application under uvicorn on a port of its own; yield its URL."""
    config = uvicorn.Config(app, lifespan="on", log_config=None, ws="websockets-sansio")
    running = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        host, port = listening.getsockname()
        serving = asyncio.create_task(running.serve([listening]))
        async with asyncio.timeout(60):
            while not running.started:  # noqa: ASYNC110  # nothing sets an event
                await asyncio.sleep(0.002)
        try:
            yield f"http://{host}:{port}"
        finally:
            running.should_exit = True
            async with asyncio.timeout(60):
                await serving
