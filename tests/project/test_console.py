"""Every console block of the pages is typed into a terminal that has the wheel, or a clone."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from cache import ROOT
from pages import blocks, commands, tracked
from ports import free_port
from terminal import Terminal

URL: Final = r"^DATABASE_URL=(.+)$"
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
from app.models import Label, LabelledProject, Project
from todo_db.testing import assert_fenced


@pytest.mark.parametrize("model", [Label, Project, LabelledProject])
async def test_table_is_fenced(database, model):
    await assert_fenced(database, model)
""",
}
TYPED: Final[set[str]] = set()


def typed(page: str) -> Callable[[Callable[..., Any]], pytest.MarkDecorator]:
    """Give a test the commands of each console block of a page; it has to name every block."""
    TYPED.add(page)
    typed = [commands(block) for block in blocks(ROOT / page, "console")]
    return pytest.mark.parametrize("console", [pytest.param(typed, id=page)])


def filled(settings: str, *urls: str) -> str:
    """Return an example of `.env` with URLs in the places of those that it makes up."""
    given = iter(urls)
    return re.sub(r"postgresql://[^']*", lambda _: next(given), settings)


def login_url(printed: str) -> str:
    found = re.search(r"^postgresql://\S+$", printed, re.MULTILINE)
    assert found is not None, printed
    return found[0]


def marked(page: Path) -> dict[str, str]:
    """Return the parts of a page that the benchmark writes."""
    found = re.findall(
        r"^<!-- ([\w ]+) -->\n\n(.*?)<!-- end -->", page.read_text(), re.MULTILINE | re.DOTALL
    )
    return dict(found)


def included(page: str) -> dict[str, str]:
    """Return the files of an example that a page shows, from the line on at which it begins."""
    files: dict[str, str] = {}
    for path, options in re.findall(
        r"^```{literalinclude} ../examples/notebook/(\S+)\n(.*?)^```$",
        (ROOT / page).read_text(),
        re.DOTALL | re.MULTILINE,
    ):
        text = (ROOT / "examples" / "notebook" / path).read_text()
        begin = re.search(r':start-at: "?(.+?)"?$', options, re.MULTILINE)
        files[path] = text[text.index(begin[1]) :] if begin else text
    return files


class TestPages:
    def test_have_no_block_that_is_not_typed(self) -> None:
        pages = {
            name for name in tracked() if name.endswith(".md") and blocks(ROOT / name, "console")
        }
        assert pages == TYPED

    def test_show_commands_in_console_blocks_only(self) -> None:
        for name in tracked():
            if not name.endswith(".md"):
                continue
            for language, block in re.findall(
                r"^```([^\n]*)\n(.*?)^```$", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE
            ):
                assert language not in {"bash", "sh", "shell", "zsh"}, name
                assert bool(commands(block)) == (language == "console"), (name, block)


@pytest.fixture(scope="module")
def computer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python 3.13 and its pip."""
    folder = tmp_path_factory.mktemp("computer") / "python"
    subprocess.run(["uv", "venv", "--quiet", "--seed", "--python", "3.13", folder], check=True)
    return folder / "bin"


@pytest.fixture(scope="module")
def clone(computer: Path, tmp_path_factory: pytest.TempPathFactory) -> Terminal:
    """A clone of the repository, with what was changed here."""
    folder = tmp_path_factory.mktemp("clone")
    for name in tracked():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return Terminal(folder, computer)


@pytest.mark.matrix
class TestClone:
    @typed("README.md")
    def test_readme(self, console: list[list[str]], clone: Terminal) -> None:
        ((demo, tests),) = console
        assert "All claims are true" in clone.type(demo)
        # All of them are what runs this one.
        assert " passed in " in clone.type(f"{tests} -n 0 tests/unit/test_origins.py")

    @typed("docs/index.md")
    def test_landing_page(self, console: list[list[str]], clone: Terminal) -> None:
        ((install, demo, serve),) = console
        clone.type(install)
        assert "All claims are true" in clone.type(demo)
        with clone.keep(serve, URL) as url:
            second = Terminal(clone.folder, DATABASE_URL=url)
            shown = second.paste(
                "uv run python -m asyncio", blocks(ROOT / "docs/index.md", "python")
            )
        assert "Traceback" not in shown

    @typed("docs/tutorial.md")
    def test_quickstart(self, console: list[list[str]], clone: Terminal) -> None:
        (install, serve), (export, prompt) = console
        clone.type(install)
        with clone.keep(serve, URL) as url:
            second = Terminal(clone.folder)
            second.type(export.replace("postgresql://…", url))
            shown = second.paste(prompt, blocks(ROOT / "docs/tutorial.md", "python"))
        assert "Traceback" not in shown

    @typed("docs/explanation/performance.md")
    def test_benchmark(self, console: list[list[str]], clone: Terminal) -> None:
        ((compare, grow),) = console
        # Every contestant proves that it does the work, in the round trips that it promises.
        for line in (compare, grow):
            clone.type(f"{line} --try")
        for page in ("README.md", "docs/explanation/performance.md"):
            before, after = marked(ROOT / page), marked(clone.folder / page)
            assert before.keys() == after.keys()
            changed = {name for name, part in after.items() if part != before[name]}
            # Round trips are exact.
            assert changed == before.keys() - {"trips"}
        for chart in (ROOT / "docs" / "images").glob("[bg]*h-*.svg"):
            drawn = clone.folder / chart.relative_to(ROOT)
            assert drawn.read_text() != chart.read_text(), chart.name


@pytest.fixture
def terminal(computer: Path, wheel: Path, tmp_path: Path) -> Terminal:
    """An empty folder of a computer that finds the wheel in a registry."""
    return Terminal(tmp_path, computer, UV_FIND_LINKS=str(wheel.parent))


@pytest.mark.matrix
class TestProject:
    @typed("docs/tutorial-own-tables.md")
    def test_tables_of_your_own(self, console: list[list[str]], terminal: Terminal) -> None:
        (*install, serve), start, migrate, (damage, check, repair), (prove,) = console
        files = included("docs/tutorial-own-tables.md")
        for line in install:
            terminal.type(line)
        with terminal.keep(serve, URL) as url:
            for line in start:
                terminal.type(line.replace("postgresql://…", url))
            terminal.write("notebook/models.py", files["notebook/models.py"])
            for line in migrate:
                terminal.type(line)
            terminal.type(damage)
            assert "labels" in terminal.type(check, status=255)
            terminal.type(repair)
            terminal.type(check)
        settings = (terminal.folder / "pyproject.toml").read_text()
        terminal.write("pyproject.toml", f"{settings}\n{files.pop('pyproject.toml')}")
        for name, text in files.items():
            terminal.write(name, text)
        assert " passed in " in terminal.type(prove)
        mistake = re.sub(r"transaction\(user_id", 'transaction("alice"', files["notebook/app.py"])
        terminal.write("notebook/app.py", mistake)
        assert "/api/conversations/{conversation_id}" in terminal.type(
            f"{prove} -k isolated", status=1
        )

    @typed("docs/how-to/fastapi.md")
    def test_first_task(self, console: list[list[str]], terminal: Terminal) -> None:
        install, (serve,), (login,), (run,), (seed, *requests) = console
        page = "docs/how-to/fastapi.md"
        for line in install:
            terminal.type(line)
        routes, _, authentication, *_ = blocks(ROOT / page, "python")
        terminal.write("main.py", f"{routes}\n{authentication}")
        address = f"localhost:{free_port()}"
        with terminal.keep(serve, URL):
            (settings,) = blocks(ROOT / page, "ini")
            settings = filled(settings, login_url(terminal.type(login)))
            # As the page says for another authentication.
            terminal.write(".env", re.sub(r"^BETTER_AUTH.*", "", settings, flags=re.MULTILINE))
            with terminal.keep(f"{run} --port {address.partition(':')[2]}", r"(startup complete)"):
                terminal.type(seed)
                shown = [
                    terminal.type(line.replace("localhost:8000", address)) for line in requests
                ]
            terminal.type("uv run todo-db doctor")
        printed = re.findall(r"^{.*", "".join(blocks(ROOT / page, "console")), re.MULTILINE)
        for text, promised in zip(shown, printed, strict=True):
            assert promised.removesuffix("…}") in text


@pytest.fixture(scope="module")
def owners_url(application: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    elsewhere = Terminal(tmp_path_factory.mktemp("server"), application)
    with elsewhere.keep("todo-db serve", URL) as url:
        yield url


@pytest.mark.matrix
class TestDeployment:
    """What is installed is on the path, and a server runs elsewhere."""

    @pytest.fixture
    def installed(self, application: Path, tmp_path: Path) -> Terminal:
        return Terminal(tmp_path, application)

    @typed("docs/how-to/neon.md")
    def test_neon(self, console: list[list[str]], installed: Terminal, owners_url: str) -> None:
        ((migrate,), (login,), (doctor,)) = console
        copied, both = blocks(ROOT / "docs/how-to/neon.md", "ini")
        installed.write(".env", filled(copied, owners_url))
        installed.type(migrate)
        url = login_url(installed.type(login))
        installed.write(".env", filled(both, url, owners_url))
        assert "No weakness was found" in installed.type(doctor)

    @typed("docs/how-to/migrations.md")
    def test_migrations(self, console: list[list[str]], installed: Terminal) -> None:
        ((migrate, login),) = console
        (both,) = blocks(ROOT / "docs/how-to/migrations.md", "ini")
        # Without a URL: the embedded PostgreSQL.
        installed.type(migrate)
        url = login_url(installed.type(login))
        owners = url.replace("todo_login:", "todo_owner:")
        installed.write(".env", filled(both, url, owners))
        assert "No weakness was found" in installed.type("todo-db doctor")

    @typed("docs/how-to/better-auth.md")
    def test_better_auth(
        self, console: list[list[str]], installed: Terminal, owners_url: str
    ) -> None:
        ((login,),) = console
        installed.write(".env", f"DATABASE_URL='{owners_url}'")
        url = login_url(installed.type(login))
        installed.write(".env", f"DATABASE_URL='{url}'")
        assert "0" in installed.type("todo-db psql -Atc 'SELECT count(*) FROM sessions'")
        assert "permission denied" in installed.type(
            "todo-db psql -c 'SELECT count(*) FROM tasks'", status=1
        )

    @typed("docs/how-to/running.md")
    def test_running(self, console: list[list[str]], installed: Terminal, owners_url: str) -> None:
        (migrate, doctor), (health,) = console
        installed.write(".env", f"DATABASE_URL='{owners_url}'")
        url = login_url(installed.type("todo-db login deployed"))
        installed.write(".env", f"DATABASE_URL='{url}'\nDIRECT_DATABASE_URL='{owners_url}'")
        installed.type(migrate)
        assert "No weakness was found" in installed.type(doctor)
        assert '"ok": true' in installed.type(health)

    @typed("docs/reference/command-line.md")
    def test_look_at_the_data(
        self, console: list[list[str]], installed: Terminal, owners_url: str
    ) -> None:
        ((seed, tables, plan, count),) = console
        installed.write(".env", f"DATABASE_URL='{owners_url}'")
        installed.type(seed)
        assert "idx_tasks_user_id" in installed.type(tables)
        assert "Index Scan on idx_tasks_user_id" in installed.type(plan)
        assert re.search(r"^ +0$", installed.type(count), re.MULTILINE)

    @typed("docs/how-to/own-tables.md")
    def test_two_tables_and_a_child_of_both_are_fenced(
        self, console: list[list[str]], installed: Terminal, owners_url: str
    ) -> None:
        (init,), migrate = console
        installed.type(f"export DATABASE_URL='{owners_url}'")
        installed.type(init)
        models = installed.folder / "app" / "models.py"
        text = models.read_text().replace("import Base", "import owned_reference, Base")
        models.write_text(text + TABLES)
        for name, content in TESTS.items():
            installed.write(name, content)
        installed.write("pytest.ini", "[pytest]\nasyncio_mode = auto\npythonpath = .\n")
        for line in migrate:
            installed.type(line)
        assert "3 passed" in installed.type("python -m pytest -q")
        own = [*"".join(TESTS.values()).splitlines(), *TABLES.splitlines()]
        lines = [line for line in own if line.strip() and "Mapped[" not in line]
        assert len(lines) <= 25


@pytest.mark.node
class TestFullstack:
    @typed("examples/fullstack/README.md")
    def test_starts(self, console: list[list[str]], clone: Terminal) -> None:
        ((start,),) = console
        (block,) = blocks(ROOT / "examples/fullstack/README.md", "console")
        listens, opens = block.splitlines()[1:]
        address = r"http://127\.0\.0\.1:\d+"
        pattern = re.sub(r"http://[\d.:]+", lambda _: address, f"({listens}\n{opens})")
        with clone.keep(start, pattern) as printed:
            (first, second) = re.findall(address, printed)
            assert first == second
            assert httpx.get(f"{first}/health", trust_env=False).json()["ok"]
