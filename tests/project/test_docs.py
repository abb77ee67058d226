"""Every example in the documentation runs, and the pages build without a warning."""

import ast
import inspect
import logging
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import CodeType
from typing import Any, Final

import pytest
from driver import Connection
from pages import blocks, fenced
from typer.main import get_command

import todo_db.fastapi
from todo_db import Database, better_auth, errors, gate, models, repositories, testing
from todo_db.cli.app import app
from todo_db.embedded import LOGIN, EmbeddedPostgres
from todo_db.gate import NEXT as LISTED
from todo_db.gate import Event, State

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = [
    ROOT / "README.md",
    ROOT / "AGENTS.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts),
]
REFERENCE: Final = ROOT / "docs" / "reference"
# What an application may import.
PUBLIC: Final = {
    f"{module.__name__}.{name}"
    for module in (todo_db, better_auth, todo_db.fastapi, models, repositories, testing)
    for name in module.__all__
}
# What the benchmark draws, once it has measured.
CHARTS: Final = set(
    re.findall(r'"(benchmark-\w+\.svg)"', (ROOT / "benchmarks" / "report.py").read_text())
)
# What is not listed there leaves the state as it is.
NEXT: Final = {
    (state, event): LISTED.get((state, event), state) for state in State for event in Event
}
COMMANDS: Final = getattr(get_command(app), "commands", {})


def rows(text: str, first: str) -> list[list[str]]:
    """Return the cells of each row of a table whose first cell begins with this pattern."""
    found = re.findall(rf"^\| {first}.*\|$", text, re.MULTILINE)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in found]
    return [[re.sub(r"^`(\w+)`.*", r"\1", first), *others] for first, *others in cells]


def examples(module: Path) -> list[str]:
    """Return the examples of a module's docstrings, in order."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, owners)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [source for node in nodes for source in fenced(ast.get_docstring(node) or "", "python")]


def documented() -> list[str]:
    """Return the names that the reference explains, with the module that it takes them from."""
    found: list[str] = []
    for page in sorted(REFERENCE.glob("*.md")):
        text = page.read_text()
        (module, *_) = re.findall(r"^.. currentmodule:: (\S+)$", text, re.MULTILINE) or [""]
        found += re.findall(r"^.. auto(?:class|data|function):: ([\w.]+)", text, re.MULTILINE)
        found += [
            f"{module}.{name}" for name in re.findall(r"^.. py:data:: (\w+)", text, re.MULTILINE)
        ]
        for name, members in re.findall(
            r"^.. automodule:: (\S+)\n   :members: (.+)$", text, re.MULTILINE
        ):
            found += [f"{name}.{member}" for member in members.split(", ")]
    return found


def showing(language: str) -> list[object]:
    return [
        pytest.param(page, id=str(page.relative_to(ROOT)))
        for page in PAGES
        if blocks(page, language)
    ]


def compiled(source: str, page: Path) -> CodeType:
    # Not the path: coverage would take the lines of an example for those of its module.
    name = f"<{page.name}>"
    code: CodeType = compile(
        source, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
    )
    return code


class TestPython:
    @pytest.mark.parametrize("page", showing("python"))
    async def test_runs_from_top_to_bottom(
        self,
        page: Path,
        todo_postgres: EmbeddedPostgres,
        todo_database_name: str,
        owner: Connection,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for source in blocks(page, "sql"):
            if "CREATE TABLE" in source:
                await owner.execute(source)
        url = todo_postgres.url(user=LOGIN, database=todo_database_name)
        monkeypatch.setenv("DATABASE_URL", url)
        async with Database.from_url(url) as db:
            # test_house runs the complete programs.
            shown = [block for block in blocks(page, "python") if "asyncio.run(" not in block]
            if ".users." not in "".join(shown):
                await db.users.create("alice", email="alice@example.org", name="Alice")
            # Names that a page assumes: an open database, and the imports of the page before.
            names: dict[str, Any] = {"__name__": "shown", "db": db}
            exec("from sqlalchemy import select; from todo_db.models import Task", names)  # noqa: S102
            for source in shown:
                done = eval(compiled(source, page), names)  # noqa: S307
                if inspect.isawaitable(done):
                    await done
        # A page turns the log on.
        logging.getLogger("todo_db").setLevel(logging.NOTSET)
        for name, value in names.items():
            if name == "test_with_anyio":
                await value(url)
            elif name.startswith("test_"):
                async with Database.from_url(url) as fresh:
                    await value(fresh)


class TestDocstrings:
    @pytest.mark.parametrize(
        "module",
        [
            pytest.param(module, id=module.relative_to(ROOT).as_posix())
            for module in sorted((ROOT / "todo_db").rglob("*.py"))
            if examples(module)
        ],
    )
    async def test_examples_run(
        self, module: Path, todo_database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DATABASE_URL", todo_database_url)
        async with Database.from_url(todo_database_url) as db:
            for user in ("alice", "bob"):
                await db.users.create(user, email=f"{user}@example.org", name=user)
            names: dict[str, Any] = {"__name__": "shown"}
            # The imports that the page names.
            exec(blocks(REFERENCE / "api.md", "python")[0], names)  # noqa: S102
            for source in examples(module):
                names["db"] = db
                done = eval(compiled(source, module), names)  # noqa: S307
                if inspect.isawaitable(done):
                    await done


class TestReference:
    def test_explains_every_public_name(self) -> None:
        shown = {name.rpartition(".")[2] for name in documented()}
        # By a directive that takes all members of the module.
        shown |= {name for name, _ in inspect.getmembers(errors, inspect.isclass)}
        assert {name for name in PUBLIC if name.rpartition(".")[2] not in shown} == {
            # A class of SQLAlchemy's, without anything of its own.
            "todo_db.models.Base"
        }

    def test_explains_no_private_name(self) -> None:
        for name in documented():
            module, _, member = name.rpartition(".")
            public = getattr(sys.modules[module], "__all__", [member])
            assert member in public, name
            assert not member.startswith("_"), name

    def test_explains_no_name_twice(self) -> None:
        names = documented()
        assert sorted(names) == sorted(set(names))

    def test_every_public_name_has_an_example(self) -> None:
        code = "\n".join(
            source
            for shown in (
                *(blocks(page, "python") for page in PAGES),
                *(examples(module) for module in (ROOT / "todo_db").rglob("*.py")),
            )
            for source in shown
        )
        names = {name.rpartition(".")[2] for name in PUBLIC}
        without = {name for name in names if not re.search(rf"\b{name}\b", code)}
        # Only Better Auth writes these tables.
        assert without == {
            "Account",
            "Session",
            "SigningKey",
            "User",
            "Verification",
        }


class TestSQL:
    @pytest.mark.parametrize("page", showing("sql"))
    async def test_runs_as_the_owner(self, page: Path, owner: Connection) -> None:
        for source in blocks(page, "sql"):
            statements = re.sub(r"^(BEGIN|ROLLBACK).*;$", "", source, flags=re.MULTILINE)
            # Roll back, because roles belong to the whole server of the tests.
            transaction = owner.transaction()
            await transaction.start()
            await owner.execute("SET LOCAL client_min_messages = error")
            for statement in filter(str.strip, statements.split(";\n")):
                made = re.search(r"CREATE ROLE (\w+)", statement)
                if made and await owner.fetchval(
                    "SELECT to_regrole($1) IS NOT NULL", made.group(1)
                ):
                    statement = statement.replace(made.group(1), f"{made.group(1)}_shown", 1)  # noqa: PLW2901
                await owner.execute(statement)
            await transaction.rollback()


class TestShell:
    def test_names_commands_that_exist(self) -> None:
        named: set[str] = set()
        for page in PAGES:
            named |= set(re.findall(r"todo-db ([a-z]+)", page.read_text()))
        assert named == COMMANDS.keys()

    def test_names_scripts_that_exist(self) -> None:
        for page in PAGES:
            for path in re.findall(
                r"\b((?:examples|benchmarks|tests)/[\w/]+\.py)", page.read_text()
            ):
                # The tutorial's are those of its example.
                places = (ROOT, ROOT / "examples" / "notebook")
                assert any((place / path).is_file() for place in places), (page.name, path)


class TestTables:
    def test_states_of_a_transaction_are_those_of_the_code(self) -> None:
        page = (ROOT / "docs" / "explanation" / "transaction.md").read_text()
        columns = [State[name.upper()] for name in rows(page, "Event")[0][1:]]
        shown = {
            (state, Event[name.upper()]): State[after.upper()]
            for name, *following in rows(page, "`[A-Z_]+`")
            for state, after in zip(columns, following, strict=True)
        }
        assert shown == NEXT

    def test_states_in_the_docstring_are_those_of_the_code(self) -> None:
        table = re.search(r"^```\n(.*?)^```$", str(gate.__doc__), re.DOTALL | re.MULTILINE)
        assert table is not None
        header, *lines = [re.split(r" {2,}", line) for line in table.group(1).splitlines()]
        columns = [State[name.upper()] for name in header[1:]]
        shown = {
            (state, event): State[after.upper()]
            for event, (_, *following) in zip(Event, lines, strict=True)
            for state, after in zip(columns, following, strict=True)
        }
        assert shown == NEXT

    def test_constraints_and_indexes_are_those_of_the_models(self) -> None:
        page = (ROOT / "docs" / "database-models.md").read_text()
        shown = set(re.findall(r"\b(?:pk|fk|uq|ck|ix|idx)_\w+", page))
        assert shown == models.OUR_NAMES

    def test_errors_of_sqlstates_are_those_of_the_code(self) -> None:
        page = (ROOT / "docs" / "reference" / "errors.md").read_text()
        shown = {code: kind.strip("`") for code, kind, *_ in rows(page, "`[0-9A-Z]{2,5}`")}
        made = {code: type(make()).__name__ for code, make in errors._BY_SQLSTATE.items()}
        assert shown == made | dict.fromkeys(errors._INVALID_VALUES, "InvalidInputError")


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as the pages and code hosts name them."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


class TestLinks:
    @pytest.mark.parametrize(
        "page",
        [
            pytest.param(page, id=page.relative_to(ROOT).as_posix())
            for page in (
                *PAGES,
                ROOT / "CONTRIBUTING.md",
                ROOT / "CHANGELOG.md",
                ROOT / "docs" / "llms.txt",
                ROOT / "examples" / "fullstack" / "README.md",
            )
        ],
    )
    def test_lead_to_a_page_and_a_heading(self, page: Path) -> None:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        found = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", prose)
        for link in map("".join, found):
            if re.match(r"https?:", link) or Path(link).name in CHARTS:
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


class TestDiagrams:
    def test_are_those_that_the_script_draws(self, tmp_path: Path) -> None:
        runpy.run_path(str(ROOT / "docs" / "diagrams.py"))["draw"](tmp_path)
        drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
        assert drawn == {name: (ROOT / "docs" / "images" / name).read_text() for name in drawn}
        assert len(drawn) == 3


class TestPages:
    @pytest.mark.filterwarnings("default")
    def test_build_without_a_warning(self, tmp_path: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", ROOT / "docs", tmp_path],
            check=False,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
        )
        assert done.returncode == 0, done.stderr

    def test_are_all_in_the_contents(self) -> None:
        contents = (ROOT / "docs" / "index.md").read_text()
        for page in PAGES:
            name = page.relative_to(ROOT).with_suffix("").as_posix().removeprefix("docs/")
            known = {"README", "AGENTS", "index"}
            assert name in known or name in contents or name.startswith("decisions/"), name
