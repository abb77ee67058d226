"""The `todo-db` command (extra `cli`)."""

import logging
import os
import sys
from typing import NoReturn


def main() -> None:
    """Run the command line, or name the missing extra."""
    try:
        from todo_db.cli.app import app  # noqa: PLC0415  # an optional extra
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        sys.exit("The command line is an extra: pip install 'todo-db[cli]'")
    # On the command line only the outcome matters.
    logging.basicConfig(level=logging.ERROR)
    # It names the line of `.env` that it could not read, which a command would do without.
    logging.getLogger("dotenv").setLevel(logging.WARNING)
    try:
        try:
            app()
        finally:
            # What is still in the buffer fails here, and not while Python ends.
            sys.stdout.flush()
    except OSError as error:
        _give_up(error)


def _give_up(error: OSError) -> NoReturn:
    """Say that the output cannot be written, such as to a full disk, and exit with status 1."""
    sys.stderr.write(f"The output cannot be written: {error.strerror}\n")
    # Python would try to write the rest once more.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
