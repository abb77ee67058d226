"""Labels: pages, names, and one round trip for each call."""

import pytest
from notebook.labels import LabelNameTakenError, LabelRepository

from todo_db import Database, NotFoundError
from todo_db.testing import count_round_trips


@pytest.fixture
async def labels(database: Database) -> LabelRepository:
    await database.users.ensure("alice", email="alice@example.org", name="Alice")
    return LabelRepository(database)


async def test_list_is_paged_by_name(labels: LabelRepository) -> None:
    for name in ("work", "home", "garden"):
        await labels.create("alice", name)
    page = await labels.list("alice", limit=2)
    assert [label.name for label in page.items] == ["garden", "home"]
    rest = await labels.list("alice", limit=2, cursor=page.next_cursor)
    assert [label.name for label in rest.items] == ["work"]
    assert rest.next_cursor is None


async def test_name_is_unique_for_each_user(database: Database, labels: LabelRepository) -> None:
    await database.users.ensure("bob", email="bob@example.org", name="Bob")
    await labels.create("alice", "home")
    await labels.create("bob", "home")
    with pytest.raises(LabelNameTakenError):
        await labels.create("alice", "home")


async def test_deleted_label_is_gone(labels: LabelRepository) -> None:
    label = await labels.create("alice", "home")
    await labels.delete("alice", label.id)
    with pytest.raises(NotFoundError):
        await labels.delete("alice", label.id)


async def test_call_is_one_round_trip(labels: LabelRepository) -> None:
    await labels.list("alice")
    with count_round_trips() as trips:
        await labels.list("alice")
    assert trips.count == 1
