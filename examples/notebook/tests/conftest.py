"""The fixtures of todo_db, on a database that has the tables of this application too."""

from pathlib import Path

import pytest

pytest_plugins = ["todo_db.testing"]


@pytest.fixture(scope="session")
def todo_migrations() -> Path:
    return Path(__file__).parent.parent / "pyproject.toml"
