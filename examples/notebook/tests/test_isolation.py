"""No user reaches what belongs to another one: in no table, and by no route."""

import pytest
from notebook.app import app
from notebook.models import Conversation, Label, Message, TaskLabel

from todo_db import Database
from todo_db.models import Base
from todo_db.testing import assert_fenced, assert_isolated


@pytest.mark.parametrize("model", [Label, TaskLabel, Conversation, Message])
async def test_table_is_fenced(database: Database, model: type[Base]) -> None:
    await assert_fenced(database, model)


async def test_api_is_isolated(todo_database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", todo_database_url)

    async def task(database: Database, user: str) -> int:
        return (await database.tasks.create(user, "x")).id

    await assert_isolated(app, ids={"task_id": task})
