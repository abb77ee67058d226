"""The installed wheel, in a clean environment and an empty folder."""

import os
import re
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from todo_db.models import REVISION

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # The wheel is built from the source distribution.
    subprocess.run(["uv", "build", "--quiet", "--out-dir", folder, ROOT], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run(["uv", "venv", "--quiet", "--python", "3.13", folder], check=True)
    subprocess.run(
        ["uv", "pip", "install", "--quiet", "--python", folder / "bin" / "python", f"{wheel}[cli]"],
        check=True,
    )
    return folder / "bin"


@pytest.fixture(scope="module")
def application(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the developers of an application install."""
    folder = tmp_path_factory.mktemp("application") / "venv"
    packages = [f"{wheel}[cli,fastapi,testing]", "httpx", "uvicorn"]
    subprocess.run(["uv", "venv", "--quiet", "--python", "3.13", folder], check=True)
    subprocess.run(
        ["uv", "pip", "install", "--quiet", "--python", folder / "bin" / "python", *packages],
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


@contextmanager
def serving(application: Path, folder: Path) -> Generator[str]:
    """Keep `todo-db serve` running, and yield the URL that it prints."""
    with subprocess.Popen(
        [application / "todo-db", "serve"], stdout=subprocess.PIPE, text=True, cwd=folder
    ) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip().partition("=")[2]
        finally:
            server.send_signal(signal.SIGINT)


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
        assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"todo_db"}

    def test_demo_runs_from_an_empty_folder(self, environment: Path, tmp_path: Path) -> None:
        assert "All claims are true" in run(environment / "todo-db", "demo", folder=tmp_path)

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


TABLES: Final = """

class Project(Owned, Base):
    __tablename__ = "projects"
    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    name: Mapped[str] = mapped_column(String(50))


class LabelledProject(Owned, Base):
    __tablename__ = "labelled_projects"
    project_id: Mapped[int] = owned_reference(Project.id, primary_key=True)
    label_id: Mapped[int] = owned_reference(Label.id, primary_key=True)
"""
TESTS: Final = {
    "conftest.py": """
from pathlib import Path
import pytest
pytest_plugins = ["todo_db.testing"]


@pytest.fixture(scope="session")
def todo_migrations() -> Path:
    return Path("pyproject.toml")
""",
    "test_isolation.py": """
import pytest
from models import Label, LabelledProject, Project
from todo_db.testing import assert_fenced


@pytest.mark.parametrize("model", [Label, Project, LabelledProject])
async def test_table_is_fenced(database, model):
    await assert_fenced(database, model)
""",
}


class TestWalk:
    """From an empty folder to a proof, with what the how-to says."""

    def test_two_tables_and_a_child_of_both_are_fenced(
        self, application: Path, tmp_path: Path
    ) -> None:
        def call(program: str, *arguments: str) -> str:
            return run(application / program, *arguments, folder=tmp_path, **settings)

        settings: dict[str, str] = {}
        call("todo-db", "init")
        models = tmp_path / "models.py"
        text = models.read_text().replace("import Base", "import owned_reference, Base")
        models.write_text(text + TABLES)
        for name, content in TESTS.items():
            (tmp_path / name).write_text(content)
        (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\npythonpath = .\n")
        with serving(application, tmp_path) as settings["DATABASE_URL"]:
            call("alembic", "revision", "--autogenerate", "-m", "add tables")
            call("alembic", "upgrade", "head")
            call("alembic", "check")
        assert "3 passed" in call("python", "-m", "pytest", "-q")
        own = [*"".join(TESTS.values()).splitlines(), *TABLES.splitlines()]
        lines = [line for line in own if line.strip() and "Mapped[" not in line]
        assert len(lines) <= 25


REQUESTS: Final = """
from fastapi.testclient import TestClient
from main import app

with TestClient(app) as client:
    made = client.post("/api/tasks", json={"title": "Buy milk"}, headers={"X-User-Id": "alice"})
    path = f"/api/tasks/{made.json()['id']}"
    got = [client.get(path, headers={"X-User-Id": user}) for user in ("alice", "bob")]
    print(*(response.status_code for response in (made, *got, client.get(path))))
"""


class TestFirstTask:
    """From an empty folder to a task over HTTP, with the code of the how-to."""

    def test_is_its_owners(self, application: Path, tmp_path: Path) -> None:
        def call(program: str, *arguments: str) -> str:
            return run(application / program, *arguments, folder=tmp_path)

        call("todo-db", "init")
        call("todo-db", "migrate")
        url = call("todo-db", "login", "todo_login").strip()
        (tmp_path / ".env").write_text(f"DATABASE_URL='{url}'\n")
        page = (ROOT / "docs" / "how-to" / "fastapi.md").read_text()
        blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
        routes, _, authentication = blocks[:3]
        (tmp_path / "main.py").write_text(f"{routes}\n{authentication}")
        with serving(application, tmp_path):
            # Stores alice and bob.
            call("todo-db", "seed", "--tasks", "0")
            assert call("python", "-c", REQUESTS) == "201 200 404 401\n"
            call("todo-db", "doctor")
