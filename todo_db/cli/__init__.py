"""The `todo-db` command (extra `cli`)."""

import logging
import sys


def main() -> None:
    """Run the command line, or name the missing extra."""
    try:
        from todo_db.cli.app import app  # noqa: PLC0415  # an optional extra
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        sys.exit("The command line is an extra: pip install 'todo-db[cli]'")
    # Retries are logged as warnings; on the command line only the outcome matters.
    logging.basicConfig(level=logging.ERROR)
    app()
