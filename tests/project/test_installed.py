"""The installed wheel, in a clean environment and an empty folder."""

import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from todo_db.models import REVISION

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run(["uv", "venv", "--quiet", "--python", "3.13", folder], check=True)
    subprocess.run(
        ["uv", "pip", "install", "--quiet", "--python", folder / "bin" / "python", f"{wheel}[cli]"],
        check=True,
    )
    return folder / "bin"


def run(program: Path, *arguments: str, folder: Path, **settings: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    clean |= settings
    done = subprocess.run(
        [program, *arguments], check=False, capture_output=True, text=True, cwd=folder, env=clean
    )
    # Without the output, a failure in CI would say nothing.
    if done.returncode:
        raise subprocess.CalledProcessError(
            done.returncode, program.name, done.stdout, f"{done.stdout}{done.stderr}"
        )
    return done.stdout


class TestWheel:
    def test_carries_the_package_and_its_migrations_and_nothing_else(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
        assert "todo_db/py.typed" in names
        assert "todo_db/_alembic/env.py" in names
        assert "todo_db/_alembic/script.py.mako" in names
        assert "todo_db/_alembic/versions/0004_idempotency_keys.py" in names
        assert {"todo_db/docs/AGENTS.md", "todo_db/docs/llms.txt"} < set(names)
        assert "todo_db/docs/how-to/own-tables.md" in names
        first = {name.split("/")[0] for name in names if ".dist-info" not in name}
        assert first == {"todo_db", "todo_db_command.py"}

    def test_demo_runs_from_an_empty_folder(self, environment: Path, tmp_path: Path) -> None:
        shown = run(environment / "todo-db", "demo", folder=tmp_path, COLUMNS="80")
        assert "All claims are true" in shown
        # A longer line is broken at its end, and the rest begins at the margin.
        assert "\nrows=" not in shown

    def test_migrates_from_an_empty_folder(self, environment: Path, tmp_path: Path) -> None:
        todo_db = environment / "todo-db"
        run(todo_db, "migrate", folder=tmp_path)
        assert f"{REVISION} (head)" in run(todo_db, "alembic", "current", folder=tmp_path)

    def test_doctor_finds_the_schema_as_it_was_migrated(
        self, environment: Path, tmp_path: Path
    ) -> None:
        todo_db = environment / "todo-db"
        run(todo_db, "migrate", folder=tmp_path)
        with pytest.raises(subprocess.CalledProcessError) as found:
            run(todo_db, "doctor", folder=tmp_path)
        codes = re.findall(r"^ *([a-z]+-[a-z]+)  ", found.value.stdout, re.MULTILINE)
        # The login is the embedded server's owner.
        assert codes == ["login-bypasses"]

    def test_alembic_is_not_imported_by_what_serves_requests(
        self, environment: Path, tmp_path: Path
    ) -> None:
        code = "import sys, todo_db; print('alembic' in sys.modules)"
        assert run(environment / "python", "-c", code, folder=tmp_path) == "False\n"


class TestNotebook:
    def test_its_own_tests_pass(self, application: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(ROOT / "examples" / "notebook", tmp_path / "notebook")
        told = run(application / "python", "-m", "pytest", "-q", folder=folder)
        assert re.search(r"^\d+ passed", told, re.MULTILINE)
