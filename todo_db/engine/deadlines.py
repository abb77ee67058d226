"""Deadlines, with one timer for all of them."""

import asyncio
from collections.abc import Callable
from typing import Any, Final
from weakref import ref

# For each of those that are watched, between two looks at all of them, which take a tenth of it.
_PAUSE_SECONDS: Final = 1e-6


class Deadlines[T]:
    """What may take only so long, on the running event loop.

    A timer for each statement and each caller in the queue would cost more than all else that the
    pool does. Most are over long before their deadline, so one timer is enough: it is set to the
    earliest deadline that it has seen, and looks for the next one when it rings.

    Args:
        expire: Called with what is over, from the event loop.
    """

    def __init__(self, expire: Callable[[T], None]) -> None:
        self._expire = expire
        self._deadlines: dict[T, float] = {}
        self._timer: asyncio.Handle | None = None
        self._rings = 0.0

    def add(self, item: T, deadline: float) -> None:
        """Have `expire` called with the item at the deadline, by the clock of the loop."""
        self._deadlines[item] = deadline
        if self._timer is None or deadline < self._rings:
            self._set_timer(deadline)

    def remove(self, item: T) -> None:
        """Forget the item, if it is not over yet."""
        self._deadlines.pop(item, None)

    def _set_timer(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings = deadline
        # Not a method: a pool that was closed would be kept in memory until the timer rings.
        self._timer = asyncio.get_running_loop().call_at(deadline, _ring, ref(self))

    def ring(self) -> None:
        """Expire what is over in the next turn of the loop.

        An answer that arrived in this turn, while the loop was busy, is in time: its caller runs
        before.
        """
        self._timer = asyncio.get_running_loop().call_soon(self._expire_late)

    def _expire_late(self) -> None:
        self._timer = None
        for item in [item for item, deadline in self._deadlines.items() if deadline <= self._rings]:
            del self._deadlines[item]
            self._expire(item)
        if self._deadlines:
            # Not at once: with thousands of callers in a queue, the loop would do nothing else.
            begins = asyncio.get_running_loop().time() + len(self._deadlines) * _PAUSE_SECONDS
            self._set_timer(max(begins, min(self._deadlines.values())))


def _ring(referred: Callable[[], Deadlines[Any] | None]) -> None:
    deadlines = referred()
    if deadlines is not None:
        deadlines.ring()
