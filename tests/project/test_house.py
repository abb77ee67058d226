"""The README and other files for newcomers are consistent with the code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import tracked

from todo_db import Settings
from todo_db.embedded import LOGIN, EmbeddedPostgres

ROOT = Path(__file__).resolve().parents[2]


class TestReadme:
    text = (ROOT / "README.md").read_text()

    def test_shows_the_example_unchanged(self) -> None:
        block = re.search(r"<!-- (\S+) -->\n```python\n(.*?)```", self.text, re.DOTALL)
        assert block is not None
        path, shown = block.groups()
        assert shown == (ROOT / path).read_text()

    @pytest.mark.parametrize(
        ("page", "least"), [("README.md", 5), ("docs/explanation/guarantees.md", 30)]
    )
    def test_names_tests_that_exist(self, page: str, least: int) -> None:
        rows = re.findall(
            r"`(tests/[\w/]+\.py)(?:::(\w+))?(?:::(\w+))?`", (ROOT / page).read_text()
        )
        assert len(rows) >= least
        for path, *names in rows:
            source = (ROOT / path).read_text()
            for name in filter(None, names):
                assert re.search(rf"(class|def) {name}\b", source), f"{path}::{name}"


class TestExamples:
    @pytest.mark.parametrize("example", ["quickstart.py"])
    def test_run(
        self, example: str, todo_postgres: EmbeddedPostgres, todo_database_name: str
    ) -> None:
        url = todo_postgres.url(user=LOGIN, database=todo_database_name)
        done = subprocess.run(
            [sys.executable, "-W", "error", ROOT / "examples" / example],
            check=False,
            capture_output=True,
            text=True,
            env=os.environ | {"DATABASE_URL": url},
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "['Buy milk']\nThe user has no such task.\n"


class TestEnvExample:
    def test_documents_every_setting_with_its_default(self) -> None:
        lines = (ROOT / ".env.example").read_text().splitlines()
        shown = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
        for name, field in Settings.model_fields.items():
            if field.validation_alias is not None:
                assert name.upper() in shown
                continue
            value = shown.pop(f"TODO_DB_{name.upper()}")
            if field.default is None:
                # An empty variable is as good as none.
                assert value == ""
                continue
            assert (
                type(field.default)(value) == field.default or value == str(field.default).lower()
            )
        assert all(not name.startswith("TODO_DB_") for name in shown)


class TestTree:
    def test_alembic_is_no_package(self) -> None:
        # A package would shadow the library alembic for programs that run in this folder.
        assert not (ROOT / "alembic" / "__init__.py").exists()

    def test_decisions_are_wrapped_at_100(self) -> None:
        for page in (ROOT / "docs" / "decisions").glob("*.md"):
            for line in page.read_text("utf-8").splitlines():
                assert len(line) <= 100 or line.startswith("|"), f"{page.name}: {line}"

    def test_no_file_names_a_package_index(self) -> None:
        hosts = "|".join(("python" + "hosted", "py" + r"pi\.org", "registry" + r"\.npm"))
        for name in tracked():
            text = (ROOT / name).read_text(errors="replace")
            assert not re.search(hosts, text), name
