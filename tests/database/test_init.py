"""What an application does, from `todo-db init` on, with the commands of its command line."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio
from cluster import OTHER_VERSIONS, Cluster

from todo_db.migrations import upgrade

# One process for all of the commands, because each of them takes a second to start.
_RUN = """
import json, sys, warnings
warnings.simplefilter("error")
from alembic.config import CommandLine
from todo_db.cli.app import app

for name, *arguments in json.loads(sys.argv[1]):
    print("$", name, *arguments, flush=True)
    if name == "todo-db":
        app(arguments, standalone_mode=False)
    else:
        CommandLine(prog=name).main(argv=arguments)
"""
_MORE = """

from datetime import datetime

from sqlalchemy import DateTime
from sqlalchemy.orm import relationship

from todo_db.models import Shared, Task, User, owned_reference


class TaskLabel(Owned, Base):
    __tablename__ = "task_labels"

    task_id: Mapped[int] = owned_reference(Task.id, primary_key=True)
    label_id: Mapped[int] = owned_reference(Label.id, primary_key=True)
    label: Mapped[Label] = relationship(foreign_keys=[label_id])


class Currency(Shared, Base):
    __tablename__ = "currencies"

    code: Mapped[str] = mapped_column(primary_key=True)


class AppTask(Task):
    due_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    label_id: Mapped[int | None] = owned_reference(Label.id, ondelete="SET NULL")


class AppUser(User):
    zone: Mapped[str | None]
"""
_REFUSED = """

class Wrong(User):
    label_id: Mapped[int | None] = owned_reference(Label.id)
"""


@pytest_asyncio.fixture(
    params=[
        *(pytest.param(version, marks=pytest.mark.matrix) for version in OTHER_VERSIONS),
        18,
    ]
)
async def url(
    request: pytest.FixtureRequest,
    todo_postgres: object,  # noqa: ARG001  # makes the wheel's files readable for all
) -> AsyncGenerator[str]:
    """The URL of an owner as on Neon: no superuser, but CREATEROLE."""
    with Cluster(request.param) as cluster:
        yield await cluster.create_database("todo")


async def run(folder: Path, url: str, *lines: str) -> tuple[int | None, str]:
    """Run commands in the folder of an application; return the exit code and what they print."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _RUN, json.dumps([line.split() for line in lines])),
        cwd=folder,
        env=os.environ | {"DATABASE_URL": url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(300):
        printed, _ = await process.communicate()
    return process.returncode, printed.decode()


def extend(folder: Path, text: str) -> None:
    models = folder / "models.py"
    models.write_text(models.read_text("utf-8") + text, "utf-8")


class TestWalk:
    async def test_from_init_to_the_second_migration_and_back(
        self, url: str, tmp_path: Path
    ) -> None:
        code, printed = await run(
            tmp_path,
            url,
            "todo-db init",
            "todo-db migrate",
            "alembic revision --autogenerate --rev-id 01 -m first",
            "alembic upgrade head",
            "alembic check",
        )
        assert code == 0, printed
        extend(tmp_path, _MORE)
        code, printed = await run(
            tmp_path,
            url,
            "alembic revision --autogenerate --rev-id 02 -m second",
            "alembic upgrade head",
            "alembic check",
            "todo-db alembic check",
            "alembic downgrade base",
            "alembic upgrade head",
            "alembic check",
            "todo-db migrate",
        )
        assert code == 0, printed
        source = (tmp_path / "migrations/versions/02_second.py").read_text("utf-8")
        for line in (
            "op.fence('task_labels', insert=['label_id', 'task_id', 'user_id'])",
            "op.share('currencies')",
            "op.grant_columns('tasks', insert=['due_at', 'label_id'], update=[",
            "op.grant_columns('users', insert=['zone'], update=['zone'])",
        ):
            assert line in source
        connection = await asyncpg.connect(url)
        await connection.execute("ALTER TABLE labels NO FORCE ROW LEVEL SECURITY")
        await connection.close()
        code, printed = await run(tmp_path, url, "alembic check")
        assert code
        assert "op.fence('labels', insert=['name', 'user_id']" in printed

    async def test_reference_of_a_user_is_refused(self, url: str, tmp_path: Path) -> None:
        await upgrade(url)
        assert (await run(tmp_path, url, "todo-db init"))[0] == 0
        extend(tmp_path, _MORE + _REFUSED)
        code, printed = await run(tmp_path, url, "alembic check")
        assert code
        assert "users.label_id: owned_reference() is for a class that derives" in printed
