"""`todo-db login`: the login of an application, made by the owner."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from todo_db import ConfigurationError, Database, Settings
from todo_db.cli import app
from todo_db.embedded import OWNER, EmbeddedPostgres
from todo_db.logins import create_login


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app.app, ["login", *arguments])


@pytest.fixture
def server(
    folder: Path,
    todo_postgres: EmbeddedPostgres,  # noqa: ARG001  # makes the wheel's files readable for all
    monkeypatch: pytest.MonkeyPatch,
) -> EmbeddedPostgres:
    """A server that is not started, with its place for the command line."""
    monkeypatch.chdir(folder)
    return EmbeddedPostgres(folder / "postgres")


def test_is_made_once_and_keeps_its_password(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server:
        monkeypatch.setenv("DATABASE_URL", server.url())
        assert "todo-db migrate" in run("todo_application").output
        assert CliRunner().invoke(app.app, ["migrate"]).exit_code == 0
        made = run("todo_application")
        assert made.exit_code == 0
        assert made.stdout.startswith("postgresql://todo_application:")
        again = run("todo_application")
        assert (again.exit_code, again.stdout) == (0, "")
        replaced = run("todo_application", "--new-password")
        assert replaced.stdout.startswith("postgresql://todo_application:")
        assert replaced.stdout != made.stdout
        assert run("better_auth", "--role", "todo_auth").exit_code == 0
        monkeypatch.setenv("DATABASE_URL", made.stdout.strip())
        health = CliRunner().invoke(app.app, ["health"])
        # The table can wrap a line of the reason.
        assert re.search(r"round_trips +│ 1 ", health.stdout), health.stdout
        assert CliRunner().invoke(app.app, ["doctor"]).exit_code == 0


def test_that_owns_tables_is_refused(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server:
        monkeypatch.setenv("DATABASE_URL", server.url())
        assert CliRunner().invoke(app.app, ["migrate"]).exit_code == 0
        refused = run(OWNER)
    assert refused.exit_code == 1
    assert "owns tables" in refused.output


@pytest.mark.parametrize("name", ["", "todo_app", "public", "pg_mine", "Upper", 'a"b', "x" * 64])
async def test_name_that_cannot_be_used_is_refused(url: str, name: str) -> None:
    with pytest.raises(ConfigurationError):
        await create_login(url, Settings(), name)


async def test_health_says_how_many_round_trips(db: Database) -> None:
    health = await db.health()
    assert health.round_trips == 3
    assert health.form_reason
