import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import asyncpg
import pytest
from typer.testing import CliRunner, Result

import todo_db_command
from todo_db import Database, cli
from todo_db.cli import app, demo
from todo_db.doctor import Report
from todo_db.embedded import LOGIN, OWNER, EmbeddedPostgres
from todo_db.environment import LOCK_SQL
from todo_db.errors import TaskNotFoundError, UnavailableError
from todo_db.migrations import script_directory
from todo_db.models import REVISION
from todo_db.records import Health

MARKER = "hunter2"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app.app, arguments)


@pytest.fixture(autouse=True)
def _nowhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder without the developer's .env and .todo-db."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.delenv("DIRECT_DATABASE_URL", raising=False)


@pytest.fixture
def set_url(
    todo_postgres: EmbeddedPostgres, todo_database_name: str, monkeypatch: pytest.MonkeyPatch
) -> str:
    url = todo_postgres.url(user=OWNER, database=todo_database_name)
    monkeypatch.setenv("DATABASE_URL", url)
    return url


class TestDemo:
    def test_every_claim_holds(self) -> None:
        result = run("demo")
        assert result.exit_code == 0
        for step in demo.STEPS:
            assert f"✓   {step.claim}" in result.output
        assert "idx_tasks_user_id" in result.output
        assert "All claims are true" in result.output

    def test_is_disproved_when_a_defence_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def without_policies(at: demo.DemoContext) -> str:
            for table in ("users", "tasks"):
                for policy in ("own", "fence"):
                    await at.owner.exec_driver_sql(f"DROP POLICY {table}_{policy} ON {table}")
                await at.owner.exec_driver_sql(
                    f"CREATE POLICY {table}_open ON {table} TO todo_app USING (true)"
                )
            await at.owner.commit()
            return "all doors open"

        steps = (*demo.STEPS[:3], demo.Step("The fence is taken away", without_policies))
        monkeypatch.setattr(demo, "STEPS", (*steps, *demo.STEPS[3:]))
        result = run("demo")
        assert result.exit_code == 1
        assert "✓   bob tries alice's task by its id" in result.output
        assert "✗   bob's SQL forgets the WHERE" in result.output
        assert "false: DisprovedError" in result.output
        assert "At least one claim is false" in result.output

    async def test_is_disproved_by_what_should_be_refused(self) -> None:
        with pytest.raises(demo.DisprovedError):
            await demo.refusal(asyncio.sleep(0), TaskNotFoundError)


class TestMigrate:
    @pytest.mark.usefixtures("set_url")
    def test_goes_to_the_newest_by_default(self) -> None:
        assert run("alembic", "downgrade", "base").exit_code == 0
        assert run("migrate").exit_code == 0
        assert "True" in run("health").output

    @pytest.mark.usefixtures("set_url")
    @pytest.mark.parametrize("target", ["head", "0001"])
    def test_says_where_the_database_is(self, target: str) -> None:
        assert run("migrate", target).output == f"Migrated: the database is at {REVISION}.\n"

    async def test_says_that_it_waited_for_another_one(
        self, set_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sooner = [statement.replace("'60s'", "'50ms'") for statement in LOCK_SQL]
        monkeypatch.setattr("todo_db.environment.LOCK_SQL", sooner)
        stuck = await asyncpg.connect(set_url)
        async with stuck.transaction():
            await stuck.execute(next(sql for sql in LOCK_SQL if "advisory" in sql))
            result = await asyncio.to_thread(run, "migrate")
        await stuck.close()
        assert result.exit_code == 1
        assert result.output.startswith("CallTimeoutError: another migration of this database is")

    @pytest.mark.usefixtures("set_url")
    def test_unknown_revision_is_one_line(self) -> None:
        result = run("migrate", "nope")
        assert result.exit_code == 1
        assert result.output == "Can't locate revision identified by 'nope'\n"

    def test_unreachable_database_is_one_line_without_the_url(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DATABASE_URL", f"postgresql://alice:{MARKER}@127.0.0.1:1/todo")
        result = run("migrate")
        assert result.exit_code == 1
        assert result.output == "UnavailableError: the database cannot be reached\n"

    def test_url_of_another_database_is_one_line_without_the_url(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DATABASE_URL", f"mysql://alice:{MARKER}@127.0.0.1/todo")
        result = run("migrate")
        assert result.exit_code == 1
        assert result.output.startswith("ConfigurationError: ")
        assert MARKER not in result.output

    @pytest.mark.parametrize("revision", ["head", "heads", "0002", "+1"])
    @pytest.mark.usefixtures("set_url")
    def test_takes_each_name_of_a_revision(self, revision: str) -> None:
        assert run("alembic", "downgrade", "0001").exit_code == 0
        result = run("migrate", revision)
        assert result.exit_code == 0, result.output

    def test_takes_the_direct_url_alone(
        self, set_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("DATABASE_URL")
        monkeypatch.setenv("DIRECT_DATABASE_URL", set_url)
        assert run("migrate").exit_code == 0

    def test_says_who_can_grant_the_role(
        self, todo_postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        todo_postgres._psql(
            "CREATE ROLE carol LOGIN CREATEROLE", "CREATE DATABASE carols OWNER carol"
        )
        monkeypatch.setenv("DATABASE_URL", todo_postgres.url(user="carol", database="carols"))
        result = run("migrate")
        assert result.exit_code == 1
        assert "superuser run: GRANT todo_app TO carol;" in result.output


class TestAlembic:
    @pytest.mark.usefixtures("set_url")
    def test_passes_any_command_on(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("alembic", "check").exit_code == 0
        assert run("alembic", "current", "--verbose").exit_code == 0
        del capsys

    @pytest.mark.parametrize(
        "line", ["history", "heads", "show 0001", "branches", "upgrade head --sql"]
    )
    def test_starts_no_postgresql_that_it_does_not_need(self, line: str, folder: Path) -> None:
        assert run("alembic", *line.split()).exit_code == 0
        assert list(folder.iterdir()) == []

    @pytest.mark.usefixtures("set_url")
    @pytest.mark.parametrize("line", ["history -i", "history -r base:current", "show current"])
    def test_connects_for_the_current_revision(self, line: str) -> None:
        assert run("alembic", *line.split()).exit_code == 0

    @pytest.mark.parametrize("option", ["-c", "--config"])
    def test_refuses_the_configuration_of_another_project(self, option: str) -> None:
        result = run("alembic", option, "alembic.ini", "heads")
        assert result.exit_code == 1
        assert "for yours, run alembic itself" in result.output

    @pytest.mark.usefixtures("set_url")
    def test_numbers_a_revision_unless_it_is_given_an_id(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path
    ) -> None:
        copy = shutil.copytree(script_directory(), folder / "copy")
        monkeypatch.setattr("todo_db.migrations.script_directory", lambda: copy)
        number = f"{int(REVISION) + 1:04}"
        assert run("alembic", "revision", "-m", "by number").exit_code == 0
        assert run("alembic", "revision", "--rev-id", "mine", "-m", "by id").exit_code == 0
        assert f"revision = '{number}'" in (copy / f"versions/{number}_by_number.py").read_text()
        source = (copy / "versions/mine_by_id.py").read_text()
        assert f"\ndown_revision: str | None = '{number}'\n" in source

    @pytest.mark.usefixtures("set_url")
    def test_unknown_revision_is_one_line(self) -> None:
        result = run("alembic", "upgrade", "nope")
        assert result.exit_code == 1
        assert result.output == "Can't locate revision identified by 'nope'\n"

    def test_without_a_command_shows_its_help(self) -> None:
        result = run("alembic")
        assert result.exit_code == 2
        assert "usage: todo-db alembic" in result.output


class TestOrder:
    """What is wrong with the arguments or the settings is said before a PostgreSQL starts."""

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("login Bad-Name", "ConfigurationError: the name of a login has lower-case letters"),
            ("login todo_app", "ConfigurationError: this name is PostgreSQL's or todo_db's own"),
            ("migrate nope", "Can't locate revision identified by 'nope'"),
            ("alembic upgrade nope", "Can't locate revision identified by 'nope'"),
            ("alembic downgrade nope-1", "Can't locate revision identified by 'nope'"),
            ("alembic stamp nope", "Can't locate revision identified by 'nope'"),
        ],
    )
    def test_of_an_argument(self, line: str, said: str, folder: Path) -> None:
        result = run(*line.split())
        assert result.exit_code == 1
        assert result.output.startswith(said)
        assert list(folder.iterdir()) == []

    @pytest.mark.parametrize(
        ("line", "wrong", "right"),
        [
            ("login todo_login", "DATABASE_URL", "DIRECT_DATABASE_URL"),
            ("seed", "DIRECT_DATABASE_URL", "DATABASE_URL"),
        ],
    )
    def test_of_the_url_that_is_used_later(
        self, line: str, wrong: str, right: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(wrong, "mysql://localhost/todo")
        monkeypatch.setenv(right, f"postgresql://todo_owner@/todo?host={folder}/.todo-db")
        result = run(*line.split())
        assert result.exit_code == 1
        assert "must begin with postgresql://" in result.output
        assert list(folder.iterdir()) == []

    def test_of_a_setting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TODO_DB_POOL_SIZE", MARKER)
        monkeypatch.setattr(EmbeddedPostgres, "start", lambda _self: pytest.fail("it started"))
        result = run("demo")
        assert result.exit_code == 1
        assert result.output.startswith("ConfigurationError: pool_size: ")

    @pytest.mark.parametrize("command", ["seed", "health", "doctor", "psql", "url"])
    def test_of_a_direct_url_alone(
        self, command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DIRECT_DATABASE_URL", "postgresql://localhost/todo")
        result = run(command)
        assert result.exit_code == 1
        assert result.output.startswith("ConfigurationError: only DIRECT_DATABASE_URL is set")
        assert list(folder.iterdir()) == []


class TestFiles:
    """A file that cannot be used is named, in one line."""

    def test_that_is_no_folder(self, folder: Path) -> None:
        (folder / ".todo-db").touch()
        result = run("health")
        assert result.exit_code == 1
        assert f"cannot use {folder}/.todo-db: File exists" in result.output

    def test_of_a_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DATABASE_URL", "postgresql://localhost/todo")
        monkeypatch.setattr(EmbeddedPostgres, "program", lambda _name: Path("/missing/psql"))
        result = run("psql")
        assert result.exit_code == 1
        assert result.output == "/missing/psql cannot be used: No such file or directory\n"

    def test_C4_that_is_the_output_is_left_to_main(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("todo_db.cli.app.create_project", fail)
        assert type(run("init").exception) is OSError

    def test_line_of_the_env_file_that_is_broken_is_named(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DIRECT_DATABASE_URL", "postgresql://localhost/todo")
        (folder / ".env").write_text(f"A=1\nDATABASE_URL='{MARKER}\n")
        command = [sys.executable, "-c", "from todo_db.cli import main; main()", "health"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert "could not parse statement starting at line 2" in done.stderr
        assert MARKER not in done.stderr


class TestInit:
    def test_writes_what_alembic_needs_and_says_what_comes_next(self, folder: Path) -> None:
        result = run("init")
        assert result.exit_code == 0
        assert [str(path) for path in sorted(folder.rglob("*")) if path.is_file()] == [
            str(folder / name)
            for name in (
                "migrations/env.py",
                "migrations/script.py.mako",
                "migrations/versions/.gitkeep",
                "models.py",
                "pyproject.toml",
            )
        ]
        assert result.output.count("wrote ") == 5
        assert result.output.splitlines()[5:] == [
            "Next, with the owner's URL in DATABASE_URL (todo-db serve prints one):",
            "  todo-db migrate",
            '  alembic revision --autogenerate -m "add labels"',
            "  alembic upgrade head",
        ]
        assert tomllib.loads((folder / "pyproject.toml").read_text("utf-8")) == {
            "tool": {
                "alembic": {
                    "script_location": "%(here)s/migrations",
                    "prepend_sys_path": ["."],
                }
            }
        }
        assert (folder / "migrations/env.py").read_text("utf-8").splitlines()[2:] == [
            "from models import Base",
            "",
            "from todo_db.migrations import configure",
            "",
            "configure(Base.metadata)",
        ]

    def test_keeps_what_is_there(self, folder: Path) -> None:
        settings = '[project]\nname = "ünïcode"'
        (folder / "pyproject.toml").write_text(settings, "utf-8")
        (folder / "app").mkdir()
        (folder / "app/models.py").write_text("# mine")
        (folder / "db").mkdir()
        (folder / "db/env.py").write_text("# mine")
        assert run("init", "app.models", "--folder", "db").exit_code == 0
        for path in ("app/models.py", "db/env.py"):
            assert (folder / path).read_text() == "# mine"
        written = (folder / "pyproject.toml").read_text("utf-8")
        assert written.startswith(f"{settings}\n[tool.alembic]\n")
        assert tomllib.loads(written)["project"] == {"name": "ünïcode"}

    def test_takes_a_package_for_the_module(self, folder: Path) -> None:
        (folder / "app/models").mkdir(parents=True)
        assert run("init", "app.models").exit_code == 0
        assert list((folder / "app").rglob("*.py")) == []

    def test_finds_a_module_in_src(self, folder: Path) -> None:
        (folder / "src/app").mkdir(parents=True)
        assert run("init", "app.models").exit_code == 0
        assert (folder / "src/app/models.py").exists()
        assert not (folder / "app").exists()
        settings = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))
        assert settings["tool"]["alembic"]["prepend_sys_path"] == ["src"]

    @pytest.mark.parametrize("module", ["", "a.", "a b", "1a", "a-b", "a.class", "../a", "a.*"])
    def test_refuses_what_is_no_module(self, module: str, folder: Path) -> None:
        result = run("init", "--", module)
        assert result.exit_code == 1
        assert "ConfigurationError: the module must be a dotted name" in result.output
        assert list(folder.iterdir()) == []

    @pytest.mark.parametrize("module", ["todo_db", "sqlalchemy.models", "typing"])
    def test_refuses_to_hide_a_library(self, module: str, folder: Path) -> None:
        result = run("init", module)
        assert result.exit_code == 1
        assert "is a library's name: choose another module" in result.output
        assert list(folder.iterdir()) == []

    @pytest.mark.parametrize("name", ["", "alembic", "a/b", "../a", "a b", "a.b"])
    def test_refuses_what_is_no_folder(self, name: str, folder: Path) -> None:
        result = run("init", "--folder", name)
        assert result.exit_code == 1
        assert "ConfigurationError: the folder must be a name" in result.output
        assert list(folder.iterdir()) == []

    @pytest.mark.parametrize(
        ("file", "text"),
        [
            ("alembic.ini", ""),
            ("pyproject.toml", "[tool.alembic]"),
            ("pyproject.toml", "[tool.alembic.more]"),
        ],
    )
    def test_refuses_to_do_it_twice(self, file: str, text: str, folder: Path) -> None:
        (folder / file).write_text(text)
        result = run("init")
        assert result.exit_code == 1
        assert "Alembic is set up here already" in result.output
        assert [path.name for path in folder.iterdir()] == [file]

    def test_refuses_settings_that_are_not_utf_8(self, folder: Path) -> None:
        (folder / "pyproject.toml").write_bytes(b"\xff")
        result = run("init")
        assert result.exit_code == 1
        assert "pyproject.toml cannot be read: it is not UTF-8" in result.output
        assert [path.name for path in folder.iterdir()] == ["pyproject.toml"]

    def test_keeps_the_settings_as_they_are(self, folder: Path) -> None:
        settings = folder / "pyproject.toml"
        settings.write_bytes(b"[project]\r\n")
        settings.chmod(0o640)
        (folder / "link").symlink_to(settings.rename(folder / "real.toml"))
        (folder / "link").rename(settings)
        assert run("init").exit_code == 0
        assert settings.read_bytes().startswith(b"[project]\r\n\n[tool.alembic]\n")
        assert settings.is_symlink()
        assert settings.stat().st_mode & 0o777 == 0o640

    @pytest.mark.parametrize(
        ("path", "reason"),
        [
            ("pyproject.toml", "read: Is a directory"),
            ("models.py", "written: Is a directory"),
            ("migrations/env.py", "written: Is a directory"),
        ],
    )
    def test_refuses_a_folder_in_place_of_a_file(
        self, path: str, reason: str, folder: Path
    ) -> None:
        (folder / path).mkdir(parents=True)
        result = run("init")
        assert result.exit_code == 1
        assert result.output == f"ConfigurationError: {path} cannot be {reason}\n"
        assert list(folder.rglob("*.new")) == []

    def test_refuses_a_file_in_place_of_the_folder(self, folder: Path) -> None:
        (folder / "migrations").touch()
        result = run("init")
        assert result.exit_code == 1
        assert "migrations/env.py cannot be written: File exists" in result.output

    def test_loses_no_settings_on_a_full_disk(self, folder: Path) -> None:
        settings = folder / "pyproject.toml"
        settings.write_text("[project]\n")
        (folder / ".pyproject.toml.new").symlink_to("/dev/full")
        result = run("init")
        assert result.exit_code == 1
        assert "pyproject.toml cannot be written: No space left on device" in result.output
        assert settings.read_text() == "[project]\n"

    @pytest.mark.parametrize("text", ["tool = {black = {}}", "[project"])
    def test_refuses_settings_that_it_would_break(self, text: str, folder: Path) -> None:
        (folder / "pyproject.toml").write_text(text)
        result = run("init")
        assert result.exit_code == 1
        assert "cannot be added to pyproject.toml" in result.output
        assert (folder / "pyproject.toml").read_text() == text


class TestSeed:
    @pytest.mark.usefixtures("set_url")
    def test_twice_is_once(self) -> None:
        assert "2 users and 10 tasks are there; 10 tasks are new" in run("seed").output
        assert "2 users and 10 tasks are there; 0 tasks are new" in run("seed").output

    async def test_gives_each_user_the_same_number_of_tasks(
        self, database: Database, set_url: str
    ) -> None:
        await asyncio.to_thread(run, "seed", "--users", "3", "--tasks", "2500")
        people = ("alice", "bob", "user00003")
        assert [await database.tasks.count(user) for user in people] == [834, 833, 833]
        page = await database.tasks.list("user00003", completed=True, search="milk", limit=1)
        assert page.items[0].title.startswith("Buy milk (")
        del set_url


class TestHealth:
    @pytest.mark.usefixtures("set_url")
    def test_shows_the_state(self) -> None:
        result = run("health")
        assert result.exit_code == 0
        assert REVISION in result.output

    def test_exits_with_1_on_a_problem(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DATABASE_URL", f"postgresql://alice:{MARKER}@127.0.0.1:1/todo")
        monkeypatch.setenv("TODO_DB_RETRY_ATTEMPTS", "1")
        result = run("health")
        assert result.exit_code == 1
        assert UnavailableError.__name__ in result.output
        assert MARKER not in result.output


class TestDoctor:
    def test_says_what_is_wrong_and_what_to_do(self, set_url: str) -> None:
        result = run("doctor")
        assert result.exit_code == 1
        found = ["durability-weakened"] * 3 + ["login-bypasses"]
        assert re.findall(r"^ *([a-z]+-[a-z]+)  ", result.stdout, re.MULTILINE) == found
        for name in ("fsync", "full_page_writes", "synchronous_commit", OWNER):
            assert name in result.stdout
        assert "todo-db login todo_login" in " ".join(result.stdout.split())
        assert set_url not in result.output

    @pytest.mark.usefixtures("set_url")
    def test_shows_first_what_it_examined(self) -> None:
        lines = [line.strip("│ ").split("│") for line in run("doctor").stdout.splitlines()[1:6]]
        about = {name.strip(): value.strip() for name, value in lines}
        assert re.fullmatch(r"PostgreSQL \d+\.\d+", about.pop("server"))
        assert about == {
            "migration": REVISION,
            "endpoint": "direct",
            "line": "unix socket",
            "credentials": "none: the settings name no issuer",
        }

    @pytest.mark.usefixtures("set_url")
    def test_shows_an_unknown_revision(self) -> None:
        assert run("alembic", "downgrade", "base").exit_code == 0
        result = run("doctor")
        assert result.exit_code == 1
        assert "unknown" in result.stdout
        assert "migrations-missing" in result.stdout

    def test_finds_nothing_on_a_sound_database(
        self,
        todo_postgres: EmbeddedPostgres,  # noqa: ARG002  # makes the wheel's files readable for all
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        with EmbeddedPostgres(Path(".todo-db")) as server:
            monkeypatch.setenv("DATABASE_URL", server.url())
            assert run("migrate").exit_code == 0
            server.create_login()
            monkeypatch.setenv("DATABASE_URL", server.url(user=LOGIN))
            result = run("doctor")
        assert result.exit_code == 0
        assert result.stdout.splitlines()[-1].startswith("No weakness was found")

    def test_unreachable_database_is_one_line_without_the_url(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DATABASE_URL", f"postgresql://alice:{MARKER}@127.0.0.1:1/todo")
        monkeypatch.setenv("TODO_DB_RETRY_ATTEMPTS", "1")
        result = run("doctor")
        assert result.exit_code == 1
        assert result.output == "UnavailableError: the database cannot be reached\n"


class TestTwoLogins:
    def test_migrations_go_by_the_owners_url(
        self,
        todo_postgres: EmbeddedPostgres,
        todo_database_name: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv(
            "DATABASE_URL", todo_postgres.url(user=LOGIN, database=todo_database_name)
        )
        monkeypatch.setenv("DIRECT_DATABASE_URL", todo_postgres.url(database=todo_database_name))
        for command in (("alembic", "downgrade", "-1"), ("migrate",), ("seed",)):
            result = run(*command)
            assert result.exit_code == 0, result.output
        assert run("url").output.startswith(f"postgresql://{LOGIN}@")


class TestUrl:
    def test_hides_the_password_unless_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        url = f"postgresql://alice:{MARKER}@localhost/todo"
        monkeypatch.setenv("DATABASE_URL", url)
        assert run("url").output == "postgresql://alice:***@localhost/todo\n"
        assert run("url", "--show-password").output == f"{url}\n"

    def test_blanks_are_written_as_libpq_reads_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        url = "postgresql://alice:my%20+secret@/my%20todo?host=%2Frun%2Fmy%20folder"
        monkeypatch.setenv("DATABASE_URL", url)
        assert run("url", "--show-password").output == f"{url}\n"

    @pytest.mark.parametrize("password", [f"p@{MARKER}", f"p/{MARKER}", f"12/{MARKER}"])
    def test_prints_no_piece_of_a_password(
        self, monkeypatch: pytest.MonkeyPatch, password: str
    ) -> None:
        monkeypatch.setenv("DATABASE_URL", f"postgresql://alice:{password}@localhost/todo")
        result = run("url")
        assert result.exit_code == 1
        assert MARKER not in result.output
        assert "%40" in result.output

    def test_without_a_setting_is_the_embedded_one_and_says_so(self, folder: Path) -> None:
        result = CliRunner().invoke(app.app, ["url"])
        assert result.stderr.splitlines() == [
            "DATABASE_URL is not set: using the embedded PostgreSQL in .todo-db/",
            "This PostgreSQL runs while a command uses it: keep todo-db serve running.",
        ]
        assert result.stdout.startswith("postgresql://todo_owner@/todo?host=")
        assert (folder / ".todo-db" / "data" / "PG_VERSION").exists()
        assert not (folder / ".todo-db" / "data" / "postmaster.pid").exists()


class TestPsql:
    def test_runs_on_the_database(
        self, set_url: str, monkeypatch: pytest.MonkeyPatch, folder: Path
    ) -> None:
        output = folder / "output"
        secret = set_url.replace("@", f":{MARKER}@", 1)
        monkeypatch.setenv("DATABASE_URL", secret)
        assert run("psql", "-Atc", "SELECT 6 * 7", "-o", str(output)).exit_code == 0
        assert output.read_text() == "42\n"

    @pytest.mark.usefixtures("set_url")
    def test_exits_as_it_does(self) -> None:
        assert run("psql", "-c", "SELECT nonsense").exit_code == 1


class TestPsqlWithTls:
    URL = "postgresql://alice@127.0.0.1:1/todo?sslmode=verify-full"

    def test_does_not_use_the_psql_of_the_wheel(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("DATABASE_URL", self.URL)
        program = tmp_path / "psql"
        program.write_text('#!/bin/sh\n[ "$1" = "$WANTED" ] && exit 7\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("WANTED", f"{self.URL}&sslrootcert=system")
        assert run("psql").exit_code == 7

    def test_C4_ctrl_c_is_for_psql(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("DATABASE_URL", self.URL)
        program = tmp_path / "psql"
        program.write_text("#!/bin/sh\ntrap 'exit 5' INT\necho ready\nsleep 30 & wait\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        command = [sys.executable, "-c", "from todo_db.cli import main; main()", "psql"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as running:
            assert running.stdout is not None
            assert running.stdout.readline() == "ready\n"
            # A terminal sends it to every process of the group.
            os.killpg(running.pid, signal.SIGINT)
            assert running.wait(120) == 5

    def test_says_so_where_there_is_none(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("DATABASE_URL", self.URL)
        monkeypatch.setenv("PATH", str(tmp_path))
        result = run("psql")
        assert result.exit_code == 1
        assert result.output.startswith("ConfigurationError: the database URL demands TLS")


class TestServe:
    def test_migrates_and_prints_the_url(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(signal, "pthread_sigmask", lambda _how, _mask: set())
        monkeypatch.setattr(signal, "sigwait", min)
        result = run("serve")
        assert result.exit_code == 0
        assert result.stdout.startswith("DATABASE_URL=postgresql://todo_owner@/todo?host=")
        assert run("health").exit_code == 0

    def test_refuses_when_there_is_a_database(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DATABASE_URL", f"postgresql://alice:{MARKER}@localhost/todo")
        result = run("serve")
        assert result.exit_code == 1
        assert "DATABASE_URL names another server: unset it" in result.output
        assert MARKER not in result.output

    def test_refuses_when_migrations_go_to_another_database(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DIRECT_DATABASE_URL", f"postgresql://alice:{MARKER}@localhost/todo")
        monkeypatch.setattr(signal, "pthread_sigmask", lambda _how, _mask: set())
        monkeypatch.setattr(signal, "sigwait", min)
        result = run("serve")
        assert result.exit_code == 1
        assert "DIRECT_DATABASE_URL names another server: unset it" in result.output
        assert list(folder.iterdir()) == []

    def test_in_a_long_folder_serves_the_one_that_the_url_names(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(folder))
        (folder / ("x" * 120)).mkdir()
        monkeypatch.chdir(folder / ("x" * 120))
        monkeypatch.setenv("DATABASE_URL", run("url").stdout.strip())
        assert run("migrate").exit_code == 0
        assert Path(".todo-db").exists()

    def test_serves_the_one_that_the_url_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(signal, "pthread_sigmask", lambda _how, _mask: set())
        monkeypatch.setattr(signal, "sigwait", min)
        first = run("serve").stdout
        made = run("login", "todo_login")
        assert made.stderr.splitlines() == [
            "DATABASE_URL is not set: using the embedded PostgreSQL in .todo-db/",
            "This PostgreSQL runs while a command uses it: keep todo-db serve running.",
            "The password is not shown again:",
        ]
        Path(".env").write_text(f"DATABASE_URL='{made.stdout.strip()}'\n")
        assert run("serve").stdout == first
        assert run("doctor").exit_code == 0

    def test_names_a_setting_that_is_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TODO_DB_POOL_SIZE", MARKER)
        result = run("serve")
        assert result.exit_code == 1
        assert result.output.startswith("ConfigurationError: pool_size: ")
        assert MARKER not in result.output

    @pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
    def test_stops_its_server_when_it_is_stopped(self, folder: Path, stop: signal.Signals) -> None:
        command = [sys.executable, "-c", "from todo_db.cli import main; main()", "serve"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
            assert serving.stdout is not None
            assert serving.stdout.readline().startswith("DATABASE_URL=postgresql://")
            assert (folder / ".todo-db" / "data" / "postmaster.pid").exists()
            serving.send_signal(stop)
            assert serving.wait(120) == 0
        assert not (folder / ".todo-db" / "data" / "postmaster.pid").exists()


class TestMain:
    def test_runs_the_commands(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", ["todo-db", "--help"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0

    def test_says_which_extra_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "todo_db.cli.app")
        monkeypatch.delattr(cli, "app")
        monkeypatch.setitem(sys.modules, "typer", None)
        with pytest.raises(SystemExit, match=r"todo-db\[cli\]"):
            cli.main()

    @pytest.mark.parametrize("module", ["asyncpg", "typer"])
    def test_C4_ctrl_c_while_it_imports_is_130(self, module: str, tmp_path: Path) -> None:
        (tmp_path / f"{module}.py").write_text(
            "import time\nprint('ready', flush=True)\ntime.sleep(30)\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", "from todo_db_command import main; main()", "--version"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        ) as running:
            assert running.stdout is not None
            assert running.stdout.readline() == "ready\n"
            running.send_signal(signal.SIGINT)
            assert running.communicate(timeout=120) == ("", "")
        assert running.returncode == 130

    @pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
    def test_C4_ctrl_c_is_handled_as_before_it_imports(
        self, handler: signal.Handlers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["todo-db", "--version"])
        before = signal.signal(signal.SIGINT, handler)
        try:
            with pytest.raises(SystemExit):
                todo_db_command.main()
            assert signal.getsignal(signal.SIGINT) is handler
        finally:
            signal.signal(signal.SIGINT, before)

    def test_another_missing_module_is_not_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "todo_db.cli.app")
        monkeypatch.delattr(cli, "app")
        monkeypatch.setitem(sys.modules, "todo_db.cli.seed", None)
        with pytest.raises(ModuleNotFoundError):
            cli.main()

    @pytest.mark.parametrize("late", [False, True])
    def test_C4_failure_of_the_output_ends_the_program(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        late: bool,  # noqa: FBT001
    ) -> None:
        def fail() -> None:
            raise OSError(28, "No space left on device")

        closed: list[int] = []
        monkeypatch.setattr(app, "app", (lambda: None) if late else fail)
        monkeypatch.setattr("todo_db.cli.os.dup2", lambda _new, old: closed.append(old))
        output = SimpleNamespace(fileno=lambda: 1, flush=fail if late else lambda: None)
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        assert closed == [1]
        assert "No space left" in capsys.readouterr().err

    @pytest.mark.parametrize("argument", ["--version", "url"])
    def test_C4_output_that_cannot_be_written_is_one_line(self, argument: str) -> None:
        command = [sys.executable, "-c", "from todo_db.cli import main; main()", argument]
        settings = os.environ | {"DATABASE_URL": "postgresql://localhost/todo"}
        # As a developer may have it: each piece is written at once.
        settings["PYTHONUNBUFFERED"] = "1"
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                command, check=False, stdout=full, stderr=subprocess.PIPE, text=True, env=settings
            )
        assert done.returncode == 1
        assert done.stderr == "The output cannot be written: No space left on device\n"


class TestJson:
    """With `--json`, standard output is one JSON text, for a program."""

    @pytest.mark.usefixtures("set_url")
    @pytest.mark.parametrize(
        ("command", "members"),
        [
            (["migrate"], {"revision"}),
            (["seed", "--tasks", "3"], {"users", "tasks", "created"}),
            (["url"], {"url"}),
            (["health"], {field.name for field in fields(Health)}),
            (["doctor"], {field.name for field in fields(Report)}),
        ],
    )
    def test_has_what_the_command_says(self, command: list[str], members: set[str]) -> None:
        assert json.loads(run(*command, "--json").stdout).keys() == members


class TestVersion:
    def test_is_that_of_the_package(self) -> None:
        assert run("--version").stdout == f"todo-db {version('todo-db')}\n"
