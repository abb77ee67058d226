"""What is observed of a call: its name, how long it took, and what it waited for."""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Final, Self

TRANSACTIONS: Final = frozenset({"transaction", "run"})
"""The names of transactions: their time is the caller's too."""

UNOBSERVED: Final = nullcontext()
"""What stands around a call that is not observed."""

_logger: Final = logging.getLogger(__name__)


class Call:
    """A call, or a transaction, while it runs: a context manager around it.

    Attributes:
        name: The name of its statement, such as `tasks.list`, or that of the method of `Database`
            or `Transaction`: `transaction`, `run`, `execute`, `find_credential`.
        retries: How often it was run again.
        round_trips: What it sent, of all tries. Of a transaction, BEGIN, COMMIT and what no call
            inside it counts. Connecting and preparing statements are not counted.
        pool_wait_seconds: How long it waited for connections.
    """

    __slots__ = ("_begun", "_slow_seconds", "name", "pool_wait_seconds", "retries", "round_trips")

    def __init__(self, name: str, slow_seconds: float) -> None:
        self.name: Final = name
        self.retries = 0
        self.round_trips = 0
        self.pool_wait_seconds = 0.0
        self._slow_seconds = slow_seconds
        self._begun = 0.0

    def __enter__(self) -> Self:
        self._begun = time.perf_counter()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self.end(time.perf_counter() - self._begun, error)

    def end(self, seconds: float, error: BaseException | None) -> None:  # noqa: ARG002  # for others
        """Write a line if it was slow."""
        if seconds > self._slow_seconds:
            milliseconds = round(seconds * 1000)
            pool_wait = round(self.pool_wait_seconds * 1000)
            _logger.warning(
                "%s took %d ms: %d retries, %d ms of waiting for a connection, %d round trips",
                *(self.name, milliseconds, self.retries, pool_wait, self.round_trips),
                extra={
                    "event": "todo_db.call.slow",
                    "call": self.name,
                    "duration_ms": milliseconds,
                    "retries": self.retries,
                    "pool_wait_ms": pool_wait,
                    "round_trips": self.round_trips,
                },
            )


type Observe = Callable[[str], Call]
"""Makes the `Call` of a name."""
