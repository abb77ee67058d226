"""A proxy between a client and the server's unix socket: it counts round trips and injects faults.

It does not parse the protocol: it searches for a pattern in each chunk of bytes that arrives. The
messages of these tests arrive in one chunk.
"""

import asyncio
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Final, Literal, Self

from sqlalchemy import make_url

from todo_db import TodoDBError

type Sender = Literal["client", "server"]

BEGIN: Final = b"BEGIN ISOLATION LEVEL"
COMMIT: Final = b"Q\x00\x00\x00\x0bCOMMIT\x00"
ROLLBACK: Final = b"Q\x00\x00\x00\rROLLBACK\x00"
STARTUP: Final = b"application_name\x00todo_db"
_SOCKET: Final = ".s.PGSQL.5432"
TERMINATE: Final = b"X\x00\x00\x00\x04"


class Fault(Enum):
    """What the proxy does with the message that contains the pattern, and its connection."""

    CUT_BEFORE = auto()
    """Not delivered; the connection is cut."""
    CUT_AFTER = auto()
    """Delivered; the connection is cut, instead of the answer if the client sent it."""
    SWALLOW = auto()
    """Delivered; nothing comes back any more."""
    HANG = auto()
    """Not delivered; nothing passes any more, either way."""


@dataclass
class _Planned:
    pattern: bytes
    fault: Fault
    sender: Sender
    left: int


@dataclass
class _Link:
    """The state of one client's connection."""

    muted: set[Sender] = field(default_factory=set[Sender])
    cut_at_answer: bool = False
    answered: bool = True


class Proxy:
    """Listens in a folder of its own; `url` connects to the server through the proxy.

    Attributes:
        round_trips: How often a client sent something and then waited, over all connections.
        connections: How many connections were opened.
        sent: All that clients sent.
    """

    def __init__(self, url: str) -> None:
        self.round_trips = 0
        self.connections = 0
        self.sent = bytearray()
        self._server_url = make_url(url)
        self._folder = ""
        self._planned: list[_Planned] = []
        self._links: set[asyncio.Task[None]] = set()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        # The path of pytest's own folders can be too long for a socket.
        self._folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="todo-"))
        server = await asyncio.start_unix_server(self._serve, Path(self._folder, _SOCKET))
        self._stack.push_async_callback(self.cut)
        self._stack.callback(server.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def url(self) -> str:
        return self._server_url.update_query_dict({"host": self._folder}).render_as_string(
            hide_password=False
        )

    @property
    def pending(self) -> int:
        """Return how many planned faults have not happened yet."""
        return sum(planned.left for planned in self._planned)

    def break_at(
        self, pattern: bytes, fault: Fault, *, sender: Sender = "client", times: int = 1
    ) -> None:
        self._planned.append(_Planned(pattern, fault, sender, times))

    def heal(self) -> None:
        """Forget the planned faults that have not happened yet."""
        self._planned.clear()

    async def cut(self) -> None:
        """Close all current connections."""
        links = list(self._links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    async def turns[T](self, awaitable: Awaitable[T]) -> int:
        """Count the round trips of a call, also if it raises an error of the package."""
        before = self.round_trips
        with suppress(TodoDBError):
            await awaitable
        return self.round_trips - before

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        self.connections += 1
        writers = [writer]
        try:
            socket = Path(str(self._server_url.query["host"]), _SOCKET)
            server_reader, server_writer = await asyncio.open_unix_connection(socket)
            writers.append(server_writer)
            link = _Link()
            async with asyncio.TaskGroup() as group:
                ways = (
                    group.create_task(self._carry(link, "client", reader, server_writer)),
                    group.create_task(self._carry(link, "server", server_reader, writer)),
                )
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ways:
                    way.cancel()
        except asyncio.CancelledError:
            # `cut` cancelled it. asyncio's streams log a handler that ends as cancelled.
            return
        finally:
            for end in writers:
                end.close()
            for end in writers:
                with suppress(OSError):
                    await end.wait_closed()
            self._links.discard(task)

    async def _carry(
        self,
        link: _Link,
        sender: Sender,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
    ) -> None:
        with suppress(OSError):
            while piece := await source.read(1 << 20):
                self._note(link, sender, piece)
                if sender in link.muted:
                    continue
                if sender == "server" and link.cut_at_answer:
                    return
                fault = self._fault(sender, piece)
                if fault is Fault.CUT_BEFORE:
                    return
                if fault is Fault.HANG:
                    link.muted |= {"client", "server"}
                    continue
                sink.write(piece)
                await sink.drain()
                if fault is Fault.SWALLOW:
                    link.muted.add("server" if sender == "client" else "client")
                elif fault is Fault.CUT_AFTER:
                    if sender == "server":
                        return
                    link.cut_at_answer = True

    def _note(self, link: _Link, sender: Sender, piece: bytes) -> None:
        if sender == "server":
            link.answered = True
            return
        self.sent += piece
        if link.answered and piece != TERMINATE:
            self.round_trips += 1
            link.answered = False

    def _fault(self, sender: Sender, piece: bytes) -> Fault | None:
        for planned in self._planned:
            if planned.left and planned.sender == sender and planned.pattern in piece:
                planned.left -= 1
                return planned.fault
        return None


async def until(fact: Callable[[], bool]) -> None:
    """Wait until a condition becomes true, by polling."""
    async with asyncio.timeout(30):
        while not fact():  # noqa: ASYNC110  # nothing sets an event
            await asyncio.sleep(0.002)


@asynccontextmanager
async def timeout_after(fact: Awaitable[object]) -> AsyncGenerator[None]:
    """Time the block out, as `asyncio.timeout` does, once this was waited for."""

    async def expire() -> None:
        await fact
        limit.reschedule(asyncio.get_running_loop().time())

    async with asyncio.timeout(None) as limit:
        expiring = asyncio.create_task(expire())
        try:
            yield
        finally:
            expiring.cancel()
