"""When a call that failed is run again, and after which delay."""

import asyncio
import logging
import time
from math import inf
from random import uniform
from typing import Final

from todo_db.calls import Call
from todo_db.errors import (
    CallTimeoutError,
    OutcomeUnknownError,
    TodoDBError,
    UnavailableError,
)
from todo_db.settings import Settings

_MOST_LOCK_WAITS: Final = 2

_logger: Final = logging.getLogger(__name__)


class Retries:
    """What is known of a call that failed, after each of its tries.

    The second try follows at once, because most losses are of a connection that had been idle; the
    others wait longer and longer. A lock that was not free is waited for once more, so that the
    caller waits twice `lock_timeout` at most.

    Args:
        name: What logs call it.
        settings: How often it is tried, and for how long.
        repeatable: Whether it may be applied twice.
        call: What counts them, if it is observed.

    Attributes:
        is_unknown: Whether an earlier try may have been applied. It stays so when others fail.
    """

    def __init__(
        self, name: str, settings: Settings, *, repeatable: bool, call: Call | None = None
    ) -> None:
        self.is_unknown = False
        self._name = name
        self._settings = settings
        self._repeatable = repeatable
        self._call = call
        self._retries = self._lock_waits = 0
        self._until = inf

    async def wait(self, failure: TodoDBError) -> None:
        """Wait until the call is to be run again: it was not applied, or may be applied twice.

        Raises:
            OutcomeUnknownError: It is not run again, and a try may have been applied.
            TodoDBError: It is not run again; this is its failure.
        """
        match failure:
            case OutcomeUnknownError():
                self.is_unknown, again = True, self._repeatable
            case UnavailableError():
                self._lock_waits += isinstance(failure, CallTimeoutError)
                again = failure.transient and self._lock_waits < _MOST_LOCK_WAITS
            case _:
                again = False
        delay = self._delay_seconds()
        begins = time.monotonic() + delay
        self._until = min(self._until, begins + self._settings.retry_timeout_seconds)
        self._retries += 1
        if not again or self._retries == self._settings.retry_attempts or begins > self._until:
            raise OutcomeUnknownError if self.is_unknown else failure
        if self._call is not None:
            self._call.retries = self._retries
        _logger.info(
            "%s is tried again: %s",
            self._name,
            failure,
            extra={
                "event": "todo_db.call.retried",
                "call": self._name,
                "reason": str(failure),
                "retry": self._retries,
                "delay_ms": round(delay * 1000),
            },
        )
        await asyncio.sleep(delay)

    def _delay_seconds(self) -> float:
        if not self._retries:
            return 0.0
        return 0.05 * 2.0 ** (self._retries - 1) + uniform(0, 0.1)  # noqa: S311  # not a secret
