"""A demonstration on a fresh PostgreSQL: it tests each claim, and shows what happened."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from todo_db.database import Database
from todo_db.embedded import LOGIN, EmbeddedPostgres
from todo_db.engine import create_direct_engine
from todo_db.errors import IsolationError, TaskNotFoundError, UserNotFoundError
from todo_db.inputs import NewTask
from todo_db.migrations import upgrade
from todo_db.models import REVISION, Task
from todo_db.settings import Settings

_VOLUME: Final = 5_000
_READERS: Final = 25
_PLANNED: Final = """
    EXPLAIN (ANALYZE, COSTS OFF, BUFFERS OFF, TIMING OFF)
    SELECT * FROM tasks WHERE user_id = 'reader07'
"""


class DisprovedError(Exception):
    """A claim of the demonstration is false."""


@dataclass(frozen=True, slots=True)
class Step:
    """One claim, and its proof: a function that returns lines to show, or raises an error."""

    claim: str
    prove: Callable[["DemoContext"], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class DemoContext:
    """What the steps use: the application's database, and the owner's connection."""

    db: Database
    owner: AsyncConnection


@asynccontextmanager
async def demo_context(server: EmbeddedPostgres) -> AsyncGenerator[DemoContext]:
    """Migrate the server's database, and open it as an application does."""
    await upgrade(server.url())
    server.create_login()
    engine = create_direct_engine(server.url(), Settings())
    try:
        async with (
            Database.from_url(server.url(user=LOGIN)) as db,
            engine.connect() as owner,
        ):
            yield DemoContext(db, owner)
    finally:
        await engine.dispose()


def require(*claims: bool) -> None:
    """Raise an error unless every claim is true."""
    if not all(claims):
        raise DisprovedError


async def refusal(attempt: Awaitable[object], error: type[Exception]) -> str:
    """Return the message of the expected error; raise if the attempt succeeds."""
    try:
        await attempt
    except error as refused:
        return str(refused)
    raise DisprovedError


async def _migrated(at: DemoContext) -> str:
    health = await at.db.health()
    require(health.ok, health.revision == REVISION)
    return f"PostgreSQL {health.server_version}, migration {health.revision}"


async def _stored(at: DemoContext) -> str:
    for user_id in ("alice", "bob"):
        await at.db.users.create(user_id, email=f"{user_id}@example.org", name=user_id.capitalize())
    chores = ["Buy milk", "Water the plants", "Call home", "Pay the rent", "Read a book"]
    hers = await at.db.tasks.create_many("alice", [NewTask(title) for title in chores])
    his = await at.db.tasks.create_many("bob", [NewTask(title) for title in chores])
    require([task.id for task in hers] == [1, 2, 3, 4, 5], len(his) == len(hers))
    return "alice has tasks 1 to 5, bob has tasks 6 to 10"


async def _apart(at: DemoContext) -> str:
    pages = [await at.db.tasks.list(user_id) for user_id in ("alice", "bob")]
    owners = [{task.user_id for task in page.items} for page in pages]
    require(owners == [{"alice"}, {"bob"}], all(len(page.items) == 5 for page in pages))  # noqa: PLR2004
    return "each list has 5 tasks, all of its own user"


async def _by_id(at: DemoContext) -> str:
    attempts: list[Awaitable[Any]] = [
        at.db.tasks.get("bob", 1),
        at.db.tasks.update("bob", 1, title="Mine now"),
        at.db.tasks.toggle("bob", 1),
        at.db.tasks.delete("bob", 1),
        at.db.tasks.get("bob", 999),
    ]
    answers = {await refusal(attempt, TaskNotFoundError) for attempt in attempts}
    untouched = await at.db.tasks.get("alice", 1)
    require(len(answers) == 1, untouched.title == "Buy milk", not untouched.completed)
    return f"“{answers.pop()}”, the same as for a task that does not exist"


async def _raw_sql(at: DemoContext) -> str:
    async with at.db.transaction("bob") as tx:
        rows = (await tx.execute(text("SELECT id, user_id FROM tasks"))).all()
    everything = await at.owner.scalar(select(func.count()).select_from(Task))
    require({row.user_id for row in rows} == {"bob"}, everything == 10)  # noqa: PLR2004
    return f"a SELECT without WHERE returns {len(rows)} of {everything} rows, all bob's"


async def _planted(at: DemoContext) -> str:
    try:
        async with at.db.transaction("bob") as tx:
            await tx.execute(insert(Task).values(user_id="alice", title="From bob"))
    except IsolationError as error:
        return f"refused by PostgreSQL: {error}"
    raise DisprovedError


async def _never_again(at: DemoContext) -> str:
    await at.db.tasks.delete("alice", 2)
    new = await at.db.tasks.create("alice", "Buy bread")
    require(new.id > 10)  # noqa: PLR2004
    return f"task 2 deleted; the next task is {new.id}"


async def _moved(at: DemoContext) -> str:
    before = await at.db.tasks.get("alice", 1)
    after = await at.db.tasks.toggle("alice", 1)
    require(
        before.updated_at == before.created_at,
        after.updated_at > before.updated_at,
        after.created_at == before.created_at,
    )
    milliseconds = (after.updated_at - before.updated_at).total_seconds() * 1000
    return f"task 1 toggled: updated_at moved by {milliseconds:.0f} ms, created_at did not"


async def _cascade(at: DemoContext) -> str:
    counted = select(func.count()).select_from(Task).where(Task.user_id == "alice")
    before = await at.owner.scalar(counted)
    await at.db.users.delete("alice")
    after = await at.owner.scalar(counted)
    await refusal(at.db.users.get("alice"), UserNotFoundError)
    require(before == 5, after == 0, await at.db.tasks.count("bob") == 5)  # noqa: PLR2004
    return f"alice deleted: {before} tasks before, {after} after; bob still has his 5"


async def _indexed(at: DemoContext) -> str:
    share = [NewTask(f"Page {number}") for number in range(_VOLUME // _READERS)]
    for number in range(_READERS):
        reader = f"reader{number:02}"
        await at.db.users.create(reader, email=f"{reader}@example.org", name="")
        await at.db.tasks.create_many(reader, share)
    await at.owner.execute(text("ANALYZE tasks"))
    await at.owner.commit()
    async with at.db.transaction("reader07", read_only=True) as tx:
        plan = "\n".join((await tx.execute(text(_PLANNED))).scalars())
    require("idx_tasks_user_id" in plan, "Seq Scan" not in plan, f"rows={len(share)}" in plan)
    return f"idx_tasks_user_id finds the {len(share)}:\n{plan}"


STEPS: Final = (
    Step("A fresh PostgreSQL, migrated", _migrated),
    Step("Two users, ten tasks", _stored),
    Step("Each sees only their own", _apart),
    Step("bob tries alice's task by its id", _by_id),
    Step("bob's SQL forgets the WHERE", _raw_sql),
    Step("Ids are never used again", _never_again),
    Step("bob plants a task for alice", _planted),
    Step("updated_at moves by itself", _moved),
    Step("Deleting a user deletes the tasks", _cascade),
    Step(f"A list out of {_VOLUME:,} tasks uses the index", _indexed),
)


async def play(server: EmbeddedPostgres, show: Callable[[Step, str, bool], object]) -> bool:
    """Run every step, report it to `show`, and return whether all claims are true."""
    async with demo_context(server) as at:
        good = True
        for step in STEPS:
            try:
                seen, held = await step.prove(at), True
            except Exception as error:  # noqa: BLE001  # any error disproves the claim
                seen, held = f"false: {type(error).__name__}", False
            show(step, seen, held)
            good = good and held
        return good
