"""The events of log records."""

import logging
from typing import Any, Final

import pytest

_USUAL: Final = vars(logging.makeLogRecord({})).keys() | {"message", "asctime"}


def events(caplog: pytest.LogCaptureFixture, name: str | None = None) -> list[dict[str, Any]]:
    """Return the event and the fields of each record of the package, or of those of one event."""
    found = [
        {field: value for field, value in vars(record).items() if field not in _USUAL}
        for record in caplog.records
        if record.name.startswith("todo_db")
    ]
    return [fields for fields in found if name in {None, fields["event"]}]
