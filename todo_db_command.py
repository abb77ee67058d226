"""Starts the `todo-db` command.

It stands outside of the package because importing that takes a second, in which Ctrl-C would print
a traceback.
"""

import os
import signal
from contextlib import suppress
from importlib import import_module

_INTERRUPTED = 130


def main() -> None:
    """Import the command line, and run it."""
    before = signal.getsignal(signal.SIGINT)
    # A shell starts a program in the background with SIG_IGN.
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    cli = import_module("todo_db.cli")
    # `cli.main` names the extra that is missing.
    with suppress(ModuleNotFoundError):
        import_module("todo_db.cli.app")
    signal.signal(signal.SIGINT, before)
    cli.main()


def _end(_number: int, _frame: object) -> None:
    # An exception could be caught by what is being imported.
    os._exit(_INTERRUPTED)
