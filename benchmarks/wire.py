"""A proxy before PostgreSQL's socket, in a process of its own: counts client turns, and delays."""

import asyncio
import multiprocessing
import selectors
import tempfile
from contextlib import ExitStack, suppress
from ctypes import c_double, c_longlong
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Final, Self, cast
from urllib.parse import parse_qs, urlsplit

_SOCKET: Final = ".s.PGSQL.5432"
_TERMINATE: Final = b"X\x00\x00\x00\x04"


class Wire:
    """Leads to the server that `url` names; it is a context manager.

    A turn is what a client sends before it waits: one round trip.

    Attributes:
        url: Leads through the proxy.
    """

    def __init__(self, url: str) -> None:
        self._context = multiprocessing.get_context("spawn")
        # mypy's types of shared values know no ctypes.
        self._turns = cast("Synchronized[int]", self._context.Value(c_longlong, 0))
        self._delay = cast("Synchronized[float]", self._context.Value(c_double, 0))
        self._server = parse_qs(urlsplit(url).query)["host"][0]
        self._stack = ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="wire-"))
        self.url = urlsplit(url)._replace(query=f"host={folder}").geturl()
        self._folder = folder

    def __enter__(self) -> Self:
        ready = self._context.Event()
        process = self._context.Process(
            target=_serve,
            args=(self._folder, self._server, self._turns, self._delay, ready),
            daemon=True,
        )
        process.start()
        self._stack.callback(process.join)
        self._stack.callback(process.terminate)
        if not ready.wait(30):
            raise TimeoutError("the proxy does not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def turns(self) -> int:
        """Return how many turns all clients have taken."""
        return self._turns.value

    def delay(self, seconds: float) -> None:
        """From now on deliver each message so much later, either way."""
        self._delay.value = seconds


def _serve(
    folder: str,
    server: str,
    turns: "Synchronized[int]",
    delay: "Synchronized[float]",
    ready: Event,
) -> None:
    async def serve() -> None:
        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            link = _Link(turns, delay)
            from_server, to_server = await asyncio.open_unix_connection(Path(server, _SOCKET))
            await asyncio.gather(
                link.carry(reader, to_server, is_client=True),
                link.carry(from_server, writer, is_client=False),
            )

        await asyncio.start_unix_server(connect, Path(folder, _SOCKET))
        ready.set()
        await asyncio.Event().wait()

    # select() waits for microseconds; epoll rounds up to milliseconds.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    with suppress(KeyboardInterrupt):
        loop.run_until_complete(serve())


class _Link:
    """One connection."""

    def __init__(self, turns: "Synchronized[int]", delay: "Synchronized[float]") -> None:
        self._turns = turns
        self._delay = delay
        self._is_waiting = False

    async def carry(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, is_client: bool
    ) -> None:
        """Deliver what one side sends."""
        loop = asyncio.get_running_loop()
        while piece := await source.read(1 << 20):
            if is_client:
                self._note(piece)
            if self._delay.value:
                loop.call_later(self._delay.value, self._deliver, sink, piece, is_client)
            else:
                self._deliver(sink, piece, is_client)
        loop.call_later(self._delay.value, sink.close)

    def _note(self, piece: bytes) -> None:
        if not self._is_waiting and piece != _TERMINATE:
            self._turns.value += 1
        self._is_waiting = True

    def _deliver(self, sink: asyncio.StreamWriter, piece: bytes, is_client: bool) -> None:  # noqa: FBT001
        if not is_client:
            self._is_waiting = False
        sink.write(piece)
