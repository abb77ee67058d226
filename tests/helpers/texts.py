"""The texts in which a secret could be."""

import base64
import traceback
from collections.abc import Iterator

from todo_db import TodoDBError


def spellings(secret: str) -> Iterator[str]:
    """Yield encodings of a secret, also as a part of a longer text."""
    raw = secret.encode()
    yield secret
    yield raw.hex()
    for shift in range(3):
        # Without both ends, which depend on the text before and after it.
        whole = base64.urlsafe_b64encode(bytes(shift) + raw).decode()
        yield whole[4:-4]


def texts_of(error: BaseException) -> Iterator[str]:
    """Yield all texts of an error and of the errors in its chain."""
    pending, seen = [error], set[int]()
    while pending:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield f"{one} {one!r} {one.args!r}"
        if isinstance(one, TodoDBError):
            yield repr(vars(one))
        yield from traceback.format_exception(one)
        pending += [cause for cause in (one.__cause__, one.__context__) if cause is not None]
        if isinstance(one, BaseExceptionGroup):
            pending += one.exceptions
