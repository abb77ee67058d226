import asyncio
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from driver import Connection
from locks import until_waiting
from sqlalchemy import delete, select, update

from todo_db import (
    Database,
    EmailTakenError,
    IsolationError,
    NewTask,
    TransactionAbortedError,
    UnavailableError,
    UserChanges,
    UserIdTakenError,
    UsernameTakenError,
    UserNotFoundError,
    UserRecord,
    UserRepository,
)
from todo_db.models import User
from todo_db.repositories import Operation

PATIENCE = 60


async def stored(owner: Connection) -> list[UserRecord]:
    return [UserRecord(**dict(row)) for row in await owner.fetch("SELECT * FROM users ORDER BY id")]


class TestEveryMethod:
    NAMES = ("create", "delete", "ensure", "get", "set_email", "update")

    def test_is_named_here(self) -> None:
        public = [
            name
            for name, _ in inspect.getmembers(UserRepository, inspect.isfunction)
            if not name.startswith("_")
        ]
        assert tuple(public) == self.NAMES

    @pytest.mark.parametrize("name", NAMES)
    def test_takes_user_id_first_and_has_no_default_for_it(self, name: str) -> None:
        method = getattr(UserRepository, name)
        _, first, *_ = inspect.signature(method).parameters.values()
        assert first.name == "user_id"
        assert first.kind in {first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD}
        assert first.default is first.empty
        with pytest.raises(TypeError, match="user_id"):
            method(None)


class TestCreate:
    async def test_returns_what_is_stored(self, database: Database, owner: Connection) -> None:
        begun = datetime.now(UTC)

        plain = await database.users.create("q6ZxG4vK9uWc1TnB", email="A@Example.ORG", name="")
        full = await database.users.create(
            "zoë's id; --", email="ZOË@example.org", name=" Zoë 🧀 ", username="zoë"
        )

        assert (plain.id, plain.email) == ("q6ZxG4vK9uWc1TnB", "a@example.org")
        assert (plain.name, plain.username, plain.image) == ("", None, None)
        assert (full.id, full.email) == ("zoë's id; --", "zoë@example.org")
        assert (full.name, full.username, full.image) == (" Zoë 🧀 ", "zoë", None)
        assert await stored(owner) == [plain, full]
        for user in (plain, full):
            assert user.email_verified is False
            assert user.created_at == user.updated_at
            assert user.created_at.utcoffset() == timedelta(0)
            assert abs(user.created_at - begun) < timedelta(minutes=1)
        with pytest.raises(AttributeError):
            plain.name = "Mallory"  # type: ignore[misc]
        assert not hasattr(plain, "__dict__")

    async def test_refuses_what_another_user_has(self, db: Database, owner: Connection) -> None:
        await db.users.create("carol", email="carol@example.org", name="", username="carol")
        before = await stored(owner)
        with pytest.raises(UserIdTakenError):
            await db.users.create("alice", email="new@example.org", name="")
        for email in ("alice@example.org", "ALICE@Example.org"):
            with pytest.raises(EmailTakenError):
                await db.users.create("mallory", email=email, name="")
        with pytest.raises(UsernameTakenError):
            await db.users.create("mallory", email="m@example.org", name="", username="carol")
        assert await stored(owner) == before

    async def test_takes_ids_and_usernames_as_they_are(self, db: Database) -> None:
        for n, user_id in enumerate(("Alice", "alice ", "älice")):
            await db.users.create(user_id, email=f"{n}@b.org", name="", username=user_id)
            assert (await db.users.get(user_id)).username == user_id
        assert (await db.users.get("alice")).username is None

    async def test_at_once_has_one_winner(self, db: Database) -> None:
        async with asyncio.timeout(PATIENCE):
            outcomes = await asyncio.gather(
                *(
                    db.users.create("carol", email=f"carol{n}@example.org", name="")
                    for n in range(8)
                ),
                return_exceptions=True,
            )
        lost = [outcome for outcome in outcomes if isinstance(outcome, UserIdTakenError)]
        won = [outcome for outcome in outcomes if isinstance(outcome, UserRecord)]
        assert (len(won), len(lost)) == (1, 7)
        assert await db.users.get("carol") == won[0]


class TestSetEmail:
    async def test_stores_it_in_lower_case(self, db: Database, owner: Connection) -> None:
        before = await db.users.get("alice")
        changed = await db.users.set_email("alice", email="New@Example.org")
        assert changed == replace(before, email="new@example.org", updated_at=changed.updated_at)
        assert changed.updated_at > before.updated_at
        assert changed in await stored(owner)
        assert await db.users.set_email("alice", email="new@example.org") == changed

    async def test_refuses_that_of_another_user_and_a_user_that_is_missing(
        self, db: Database, owner: Connection
    ) -> None:
        before = await stored(owner)
        with pytest.raises(EmailTakenError):
            await db.users.set_email("alice", email="Bob@example.org")
        with pytest.raises(UserNotFoundError):
            await db.users.set_email("carol", email="carol@example.org")
        assert await stored(owner) == before


class TestEnsure:
    async def test_creates_a_user_and_then_returns_it_unchanged(
        self, db: Database, owner: Connection
    ) -> None:
        carol = await db.users.ensure("carol", email="Carol@Example.org", name="Carol")
        assert (carol.id, carol.email, carol.name) == ("carol", "carol@example.org", "Carol")
        assert carol.created_at == carol.updated_at
        changed = await db.users.update("carol", username="c", image="https://example.org/c.png")
        for email in ("carol@example.org", "new@example.org", "alice@example.org"):
            assert await db.users.ensure("carol", email=email, name="Caroline") == changed
        assert len(await stored(owner)) == 3

    async def test_refuses_a_taken_email_of_a_new_user(
        self, db: Database, owner: Connection
    ) -> None:
        before = await stored(owner)
        for email in ("alice@example.org", "ALICE@example.org"):
            with pytest.raises(EmailTakenError):
                await db.users.ensure("mallory", email=email, name="Mallory")
        assert await stored(owner) == before

    async def test_twenty_at_once_store_one_row(self, db: Database, owner: Connection) -> None:
        async with asyncio.timeout(PATIENCE):
            users = await asyncio.gather(
                *(
                    db.users.ensure("carol", email="carol@example.org", name="Carol")
                    for _ in range(20)
                )
            )
        assert len(set(users)) == 1
        assert [user for user in await stored(owner) if user.id == "carol"] == users[:1]

    async def test_waits_for_a_rival_and_returns_its_row(
        self, db: Database, owner: Connection
    ) -> None:
        async with asyncio.timeout(PATIENCE):
            async with db.transaction("carol") as tx:
                carol = await tx.users.create("carol", email="carol@example.org", name="first")
                alone = asyncio.create_task(
                    db.users.ensure("carol", email="carol@example.org", name="second")
                )
                await until_waiting(owner)
            assert await alone == carol

    async def test_takes_the_email_of_a_rival_that_gave_up(
        self, db: Database, owner: Connection
    ) -> None:
        async def give_up() -> None:
            async with db.transaction("mallory") as tx:
                await tx.users.create("mallory", email="carol@example.org", name="Mallory")
                waiting.append(
                    asyncio.create_task(
                        db.users.ensure("carol", email="carol@example.org", name="Carol")
                    )
                )
                await until_waiting(owner)
                raise ZeroDivisionError

        waiting: list[asyncio.Task[UserRecord]] = []
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(ZeroDivisionError):
                await give_up()
            assert (await waiting[0]).name == "Carol"

    async def test_in_a_transaction_leaves_it_usable(self, db: Database, owner: Connection) -> None:
        async with db.transaction("carol") as tx:
            with pytest.raises(EmailTakenError):
                await tx.users.ensure("carol", email="alice@example.org", name="Carol")
            carol = await tx.users.ensure("carol", email="carol@example.org", name="Carol")
            task = await tx.tasks.create("carol", "x")
            # The row exists now, so the address does not matter.
            assert await tx.users.ensure("carol", email="alice@example.org", name="") == carol
        assert await db.users.get("carol") == carol
        assert await db.tasks.get("carol", task.id) == task
        assert len(await stored(owner)) == 3

    async def test_in_a_transaction_is_undone_with_it(self, db: Database) -> None:
        async def fail() -> None:
            async with db.transaction("carol") as tx:
                await tx.users.ensure("carol", email="carol@example.org", name="Carol")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        with pytest.raises(UserNotFoundError):
            await db.users.get("carol")

    async def test_gives_up_after_three_rivals(self) -> None:
        class AlwaysRivals:
            """The row always exists at the INSERT, and is deleted before the SELECT."""

            tries = 0

            async def perform[T](self, _user_id: str, operation: Operation[T]) -> T:
                self.tries += 1
                nothing: Sequence[tuple[object]] = []
                return operation.map_rows(nothing)

        executor = AlwaysRivals()
        with pytest.raises(UnavailableError):
            await UserRepository(executor).ensure("carol", email="c@example.org", name="")
        assert executor.tries == 3


class TestGet:
    async def test_returns_the_user(self, db: Database, owner: Connection) -> None:
        assert [await db.users.get("alice"), await db.users.get("bob")] == await stored(owner)

    async def test_of_a_missing_user_is_not_found(self, db: Database) -> None:
        for user_id in ("mallory", "Alice", "alice ", "alice@example.org", "%"):
            with pytest.raises(UserNotFoundError):
                await db.users.get(user_id)


class TestUpdate:
    async def test_changes_exactly_the_given_fields(self, db: Database) -> None:
        new: UserChanges = {"name": "", "username": "al", "image": "data:,"}
        before = await db.users.get("alice")
        for size in (1, 2, 3):
            for names in itertools.combinations(new, size):
                changes = UserChanges(**{name: new[name] for name in names})  # type: ignore[literal-required, typeddict-item]
                after = await db.users.update("alice", **changes)
                assert after == replace(before, updated_at=after.updated_at, **changes)
                assert after.updated_at > before.updated_at
                assert await db.users.get("alice") == after
                back = await db.users.update("alice", name="Alice", username=None, image=None)
                assert back == replace(before, updated_at=back.updated_at)
                assert back.updated_at > after.updated_at
                before = back

    async def test_without_fields_or_change_is_get(self, db: Database) -> None:
        before = await db.users.get("alice")
        assert await db.users.update("alice") == before
        assert await db.users.update("alice", name="Alice", username=None) == before

    async def test_of_a_missing_user_is_not_found(self, db: Database, owner: Connection) -> None:
        before = await stored(owner)
        with pytest.raises(UserNotFoundError):
            await db.users.update("mallory")
        with pytest.raises(UserNotFoundError):
            await db.users.update("mallory", name="Mallory")
        assert await stored(owner) == before

    async def test_refuses_a_taken_username(self, db: Database, owner: Connection) -> None:
        await db.users.update("alice", username="al")
        before = await stored(owner)
        with pytest.raises(UsernameTakenError):
            await db.users.update("bob", username="al", name="Al")
        assert await stored(owner) == before
        assert (await db.users.update("bob", username="AL")).username == "AL"
        # Several users may have no username.
        assert (await db.users.update("alice", username=None)).username is None
        assert (await db.users.update("bob", username="al")).username == "al"


class TestDelete:
    async def test_deletes_all_tasks(self, db: Database, owner: Connection) -> None:
        await db.tasks.create_many("alice", [NewTask(f"{n}") for n in range(50)])
        kept = await db.tasks.create("bob", "x")
        await db.users.delete("alice")
        with pytest.raises(UserNotFoundError):
            await db.users.get("alice")
        with pytest.raises(UserNotFoundError):
            await db.users.delete("alice")
        assert await db.tasks.count("alice") == 0
        assert [user.id for user in await stored(owner)] == ["bob"]
        assert [row["id"] for row in await owner.fetch("SELECT id FROM tasks")] == [kept.id]

    async def test_frees_the_email_and_the_id(self, db: Database) -> None:
        await db.tasks.create("alice", "x")
        await db.users.delete("alice")
        again = await db.users.create("alice", email="alice@example.org", name="Alice")
        assert await db.users.get("alice") == again
        assert await db.tasks.count("alice") == 0

    async def test_of_a_missing_user_deletes_nothing(self, db: Database, owner: Connection) -> None:
        before = await stored(owner)
        with pytest.raises(UserNotFoundError):
            await db.users.delete("mallory")
        assert await stored(owner) == before


class TestMallory:
    async def test_sees_and_touches_only_herself(self, db: Database, owner: Connection) -> None:
        mallory = await db.users.create("mallory", email="mallory@example.org", name="Mallory")
        before = await stored(owner)
        async with db.transaction("mallory") as tx:
            assert (await tx.execute(select(User.id))).scalars().all() == ["mallory"]
            bobs = User.id == "bob"
            assert (await tx.execute(select(User.id).where(bobs))).all() == []
            renamed = update(User).where(bobs).values(name="mine").returning(User.id)
            assert (await tx.execute(renamed)).all() == []
            assert (await tx.execute(delete(User).where(bobs).returning(User.id))).all() == []
            for attempt in (
                tx.users.create("bob", email="new@example.org", name=""),
                tx.users.ensure("bob", email="new@example.org", name=""),
                tx.users.get("bob"),
                tx.users.update("bob"),
                tx.users.update("bob", name="mine"),
                tx.users.delete("bob"),
            ):
                with pytest.raises(IsolationError):
                    await attempt
            assert await tx.users.get("mallory") == mallory
        assert await stored(owner) == before

    async def test_aborts_her_transaction_with_a_taken_name(self, db: Database) -> None:
        async def take() -> None:
            async with db.transaction("mallory") as tx:
                with pytest.raises(EmailTakenError):
                    await tx.users.create("mallory", email="bob@example.org", name="")
                with pytest.raises(TransactionAbortedError):
                    await tx.users.get("mallory")

        with pytest.raises(TransactionAbortedError):
            await take()
