"""Alembic's operations for the fence, and what autogenerate makes of an application's models."""

from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from alembic import command
from alembic.util import CommandError
from application import Application, connected, new_base, number
from sqlalchemy import (
    BigInteger,
    Column,
    Computed,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from todo_db import ConfigurationError
from todo_db.embedded import EmbeddedPostgres
from todo_db.errors import CallTimeoutError
from todo_db.fence import fence_of, fence_sql, share_sql
from todo_db.migrations import downgrade, upgrade
from todo_db.models import Base, Owned, Shared, Task, Timestamps, owned_reference

# Of a table, a column, a schema: all that PostgreSQL and Python could read as something else.
NASTY = "Ä \"x\" 'y' :z %s %% $todo_db$ \\:q"
# A class that a test makes; no type checker can follow it.
type Class = Any

FENCE = "CREATE POLICY fence ON labels"
RULE = "user_id = nullif((SELECT current_setting('todo_db.user_id', true)), '')"


@pytest.fixture
def app(todo_postgres: EmbeddedPostgres, todo_database_name: str, tmp_path: Path) -> Application:
    return Application(tmp_path / "app", todo_postgres.url(database=todo_database_name))


def labels(base: type[DeclarativeBase]) -> Class:
    class Label(Owned, Timestamps, base):  # type: ignore[misc, valid-type]  # made by the test
        __tablename__ = "labels"
        id: Mapped[int] = number()
        name: Mapped[str] = mapped_column(String(50))

    return Label


def currencies(base: type[DeclarativeBase]) -> Class:
    class Currency(Shared, base):  # type: ignore[misc, valid-type]
        __tablename__ = "currencies"
        code: Mapped[str] = mapped_column(primary_key=True)

    return Currency


@pytest.fixture
def label() -> Class:
    return labels(new_base())


def body(source: str, function: str) -> list[str]:
    """Return the calls of an `upgrade` or `downgrade` that protect a table."""
    lines = source.partition(f"def {function}()")[2].partition("\ndef ")[0].splitlines()
    wanted = ("op.fence", "op.share", "op.unfence", "op.grant_columns", "op.revoke_columns")
    return [line.strip() for line in lines if line.strip().startswith(wanted)]


class TestFence:
    async def test_follows_the_table_and_leaves_it_last(
        self, app: Application, label: Class
    ) -> None:
        source = await app.migrate(label.metadata)
        fence = "op.fence('labels', insert=['name', 'user_id'], update=['name'], touch=True)"
        assert body(source, "upgrade") == [fence]
        assert body(source, "downgrade") == ["op.unfence('labels')"]
        assert source.index("op.create_table") < source.index(fence)
        assert source.index("op.unfence") < source.index("op.drop_table")
        assert await app.differences(label.metadata) == []

    async def test_gives_the_application_its_columns_and_no_more(
        self, app: Application, label: Class
    ) -> None:
        await app.migrate(label.metadata)
        async with connected(app.url) as owner:
            rights = await owner.fetch(
                """SELECT privilege_type, column_name FROM information_schema.column_privileges
                WHERE grantee = 'todo_app' AND table_name = 'labels'
                    AND privilege_type <> 'SELECT' ORDER BY 1, 2"""
            )
            assert [tuple(row) for row in rights] == [
                ("INSERT", "name"),
                ("INSERT", "user_id"),
                ("UPDATE", "name"),
            ]
            await owner.execute("INSERT INTO users (id, email) VALUES ('alice', 'a@example.org')")
            changed = """
                INSERT INTO labels (user_id, name, updated_at) VALUES ('alice', 'x', '2020-01-01');
                UPDATE labels SET name = 'y'
            """
            await owner.execute(f"SET todo_db.user_id = 'alice'; {changed}")
            assert await owner.fetchval("SELECT updated_at > '2021-01-01' FROM labels")

    async def test_of_a_class_that_narrows_it_has_less(self, app: Application) -> None:
        base = new_base()

        class Entry(Owned, base):  # type: ignore[misc, valid-type]
            __tablename__ = "entries"
            __fence__ = {"insert": ["user_id", "text"], "update": [], "delete": False}  # noqa: RUF012
            id: Mapped[int] = number()
            text: Mapped[str]
            note: Mapped[str | None]

        source = await app.migrate(base.metadata)
        assert body(source, "upgrade") == [
            "op.fence('entries', insert=['text', 'user_id'], delete=False)"
        ]
        assert await app.differences(base.metadata) == []

    async def test_restores_what_was_there_when_columns_come_and_go(
        self, app: Application, label: Class
    ) -> None:
        await app.migrate(label.metadata)
        before = await app.snapshot()
        base = new_base()

        class Label(Owned, Timestamps, base):  # type: ignore[misc, valid-type]
            __tablename__ = "labels"
            id: Mapped[int] = number()
            color: Mapped[str | None]

        source = await app.migrate(base.metadata)
        less = "op.fence('labels', insert=['user_id'], touch=True)"
        assert body(source, "upgrade") == [
            less,
            "op.fence('labels', insert=['color', 'user_id'], update=['color'], touch=True)",
        ]
        assert body(source, "downgrade") == [
            less,
            "op.fence('labels', insert=['name', 'user_id'], update=['name'], touch=True)",
        ]
        assert await app.differences(base.metadata) == []
        after = await app.snapshot()
        await app.downgrade()
        assert await app.snapshot() == before
        await app.upgrade()
        assert await app.snapshot() == after

    async def test_is_narrowed_before_a_column_is_dropped(
        self, app: Application, label: Class
    ) -> None:
        base = new_base()

        class Label(Owned, Timestamps, base):  # type: ignore[misc, valid-type]
            __tablename__ = "labels"
            id: Mapped[int] = number()

        await app.migrate(label.metadata)
        source = await app.revise(base.metadata)
        assert body(source, "upgrade") == ["op.fence('labels', insert=['user_id'], touch=True)"]
        assert source.index("op.fence") < source.index("op.drop_column")

    async def test_restores_the_fence_of_a_table_that_was_dropped(
        self, app: Application, label: Class
    ) -> None:
        await app.migrate(label.metadata)
        before = await app.snapshot()
        source = await app.migrate(new_base().metadata)
        assert body(source, "upgrade") == ["op.unfence('labels')"]
        await app.downgrade()
        assert await app.snapshot() == before

    async def test_is_no_part_of_dropping_a_table_whose_fence_is_damaged(
        self, app: Application, label: Class
    ) -> None:
        await app.migrate(label.metadata)
        await app.execute("GRANT TRUNCATE ON labels TO todo_app")
        source = await app.migrate(new_base().metadata)
        assert "op.drop_table('labels')" in source
        assert body(source, "upgrade") == body(source, "downgrade") == []

    async def test_goes_before_the_columns_of_a_class_that_is_owned_no_longer(
        self, app: Application, label: Class
    ) -> None:
        await app.migrate(label.metadata)
        before = await app.snapshot()
        metadata = MetaData()
        key = Column("id", BigInteger, Identity(always=True), primary_key=True)
        Table("labels", metadata, key)
        source = await app.migrate(metadata)
        assert body(source, "upgrade") == ["op.unfence('labels')"]
        assert await app.differences(metadata) == []
        await app.downgrade()
        assert await app.snapshot() == before

    async def test_may_be_put_up_twice(self, app: Application, label: Class) -> None:
        await app.migrate(label.metadata)
        before = await app.snapshot()
        source = await app.revise(label.metadata)
        fence = "op.fence('labels', insert=['name', 'user_id'], update=['name'], touch=True)"
        app.rewrite(source.replace("pass", fence, 1))
        await app.upgrade()
        assert await app.snapshot() == before

    async def test_takes_any_name(self, app: Application) -> None:
        await app.execute(f'CREATE SCHEMA "{NASTY.replace(chr(34), chr(34) * 2)}"')
        base = new_base()
        options: Any = {"schema": NASTY}

        class Odd(Owned, Timestamps, base):  # type: ignore[misc, valid-type]
            __tablename__ = NASTY
            __table_args__ = options
            id: Mapped[int] = number()
            value: Mapped[str] = mapped_column(f"v {NASTY}")
            parent_id: Mapped[int | None] = owned_reference(f"{NASTY}.id")

        empty = await app.snapshot()
        source = await app.migrate(base.metadata)
        compile(source, "migration", "exec")
        assert await app.differences(base.metadata) == []
        after = await app.snapshot()
        async with connected(app.url) as owner:
            assert await owner.fetchval(
                "SELECT has_schema_privilege('todo_app', oid, 'USAGE') FROM pg_namespace"
                " WHERE nspname = $1",
                NASTY,
            )
        script = await app.script(command.upgrade, "head")
        await app.downgrade("base")
        assert {line for line in await app.snapshot() if "alembic_version" not in line} == empty
        await app.execute(f"DROP TABLE alembic_version; {script}")
        assert await app.snapshot() == after
        # It is dropped when its class is gone, if the metadata still names the schema.
        less = MetaData()
        Table("other", less, Column("id", Integer, primary_key=True), **options)
        source = await app.revise(less)
        assert f"op.drop_table({NASTY!r}, schema={NASTY!r})" in source
        assert body(source, "upgrade") == [f"op.unfence({NASTY!r}, schema={NASTY!r})"]

    async def test_takes_the_longest_names(self, app: Application) -> None:
        base = new_base()
        long = "ü" * 31 + "x"

        class Long(Owned, base):  # type: ignore[misc, valid-type]
            __tablename__ = long
            id: Mapped[int] = number()
            parent_id: Mapped[int | None] = owned_reference(f"{long}.id", ondelete="SET NULL")

        await app.migrate(base.metadata)
        assert await app.differences(base.metadata) == []
        await app.downgrade("base")


class TestShare:
    @pytest.fixture
    def currency(self) -> Class:
        return currencies(new_base())

    async def test_lets_users_read_and_not_write(self, app: Application, currency: Class) -> None:
        source = await app.migrate(currency.metadata)
        assert body(source, "upgrade") == ["op.share('currencies')"]
        assert body(source, "downgrade") == ["op.unfence('currencies')"]
        assert await app.differences(currency.metadata) == []
        async with connected(app.url) as owner:
            await owner.execute("INSERT INTO currencies VALUES ('EUR')")
            await owner.execute("SET ROLE todo_app")
            assert await owner.fetchval("SELECT code FROM currencies") == "EUR"
            for statement in (
                "INSERT INTO currencies VALUES ('USD')",
                "UPDATE currencies SET code = 'USD'",
                "DELETE FROM currencies",
            ):
                with pytest.raises(Exception, match="permission denied"):
                    await owner.execute(statement)

    async def test_and_back_to_owned_restores_each(self, app: Application, label: Class) -> None:
        base = new_base()

        class Label(Shared, base):  # type: ignore[misc, valid-type]
            __tablename__ = "labels"
            id: Mapped[int] = number()

        await app.migrate(label.metadata)
        owned = await app.snapshot()
        await app.migrate(base.metadata)
        shared = await app.snapshot()
        assert await app.differences(base.metadata) == []
        await app.downgrade()
        assert await app.snapshot() == owned
        await app.upgrade()
        await app.migrate(label.metadata)
        await app.downgrade()
        assert await app.snapshot() == shared

    async def test_of_a_dropped_table_is_restored(self, app: Application, currency: Class) -> None:
        await app.migrate(currency.metadata)
        before = await app.snapshot()
        source = await app.migrate(new_base().metadata)
        assert "op.drop_table('currencies')" in source
        await app.downgrade()
        assert await app.snapshot() == before


@pytest_asyncio.fixture(scope="module")
async def migrated(
    todo_postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory
) -> AsyncGenerator[Application]:
    """One application for all of them, because each mends what it did."""
    todo_postgres.create_database("checked", template="todo_template")
    folder = tmp_path_factory.mktemp("checked")
    app = Application(folder / "app", todo_postgres.url(database="checked"))
    base = new_base()
    labels(base)
    currencies(base)
    await app.migrate(base.metadata)
    yield app
    todo_postgres.drop_database("checked")


class TestCheck:
    @pytest.mark.parametrize(
        "plant",
        [
            "ALTER TABLE labels DISABLE ROW LEVEL SECURITY",
            "ALTER TABLE labels NO FORCE ROW LEVEL SECURITY",
            "DROP POLICY own ON labels",
            "DROP POLICY fence ON labels",
            "ALTER POLICY own ON labels USING (true)",
            "ALTER POLICY own ON labels WITH CHECK (true)",
            f"ALTER POLICY own ON labels USING ({RULE.replace('user_id', 'name', 1)})",
            "ALTER POLICY fence ON labels USING (user_id IS NOT NULL)",
            "ALTER POLICY own ON labels TO PUBLIC",
            f"DROP POLICY fence ON labels; {FENCE} AS RESTRICTIVE FOR INSERT WITH CHECK ({RULE})",
            f"DROP POLICY fence ON labels; {FENCE} TO todo_app USING ({RULE}) WITH CHECK ({RULE})",
            "CREATE POLICY more ON labels USING (true)",
            "GRANT SELECT ON labels TO PUBLIC",
            "GRANT SELECT (name) ON labels TO PUBLIC",
            "GRANT UPDATE (user_id) ON labels TO todo_app",
            "GRANT UPDATE (id) ON labels TO todo_app",
            "GRANT INSERT (id) ON labels TO todo_app",
            "GRANT INSERT ON labels TO todo_app",
            "GRANT UPDATE ON labels TO todo_app",
            "GRANT TRUNCATE ON labels TO todo_app",
            "GRANT REFERENCES ON labels TO todo_app",
            "GRANT REFERENCES (id) ON labels TO todo_app",
            "GRANT TRIGGER ON labels TO todo_app",
            "GRANT DELETE ON labels TO todo_app WITH GRANT OPTION",
            "GRANT UPDATE (name) ON labels TO todo_app WITH GRANT OPTION",
            "REVOKE DELETE ON labels FROM todo_app",
            "REVOKE UPDATE (name) ON labels FROM todo_app",
            "DROP TRIGGER touch ON labels",
            "ALTER TABLE labels DISABLE TRIGGER touch",
        ],
    )
    async def test_is_red_for_a_weakness_until_it_is_mended(
        self, migrated: Application, plant: str
    ) -> None:
        metadata: MetaData = migrated.options["metadata"]
        before = await migrated.snapshot()
        await migrated.execute(plant)
        assert await migrated.differences(metadata) == [
            "op.fence('labels', insert=['name', 'user_id'], update=['name'], touch=True)"
        ]
        fence = fence_of(metadata.tables["labels"])
        await migrated.execute(*fence_sql(fence, '"{}"'.format))
        assert await migrated.snapshot() == before

    @pytest.mark.parametrize(
        "plant",
        [
            "ALTER TABLE currencies NO FORCE ROW LEVEL SECURITY",
            "DROP POLICY todo_db_shared ON currencies",
            "CREATE POLICY more ON currencies FOR INSERT WITH CHECK (true)",
            "GRANT UPDATE ON currencies TO todo_app",
            "GRANT UPDATE (code) ON currencies TO todo_app",
            "GRANT SELECT ON currencies TO PUBLIC",
            "REVOKE SELECT ON currencies FROM todo_app",
        ],
    )
    async def test_is_red_for_a_weakness_of_a_shared_table(
        self, migrated: Application, plant: str
    ) -> None:
        before = await migrated.snapshot()
        await migrated.execute(plant)
        metadata: MetaData = migrated.options["metadata"]
        assert await migrated.differences(metadata) == ["op.share('currencies')"]
        await migrated.execute(*share_sql("currencies", None, str))
        assert await migrated.snapshot() == before

    async def test_is_red_where_the_schema_cannot_be_used(self, app: Application) -> None:
        base = new_base()
        options: Any = {"schema": "Mine"}

        class Label(Owned, base):  # type: ignore[misc, valid-type]
            __tablename__ = "labels"
            __table_args__ = options
            id: Mapped[int] = number()

        await app.execute('CREATE SCHEMA "Mine"')
        await app.migrate(base.metadata)
        assert await app.differences(base.metadata) == []
        await app.execute('REVOKE USAGE ON SCHEMA "Mine" FROM todo_app')
        assert await app.differences(base.metadata) == [
            "op.fence('labels', insert=['user_id'], schema='Mine')"
        ]

    @pytest.mark.parametrize(
        ("plant", "found"),
        [
            ("DROP CONSTRAINT fk_links_user_id_label_id_labels", "add_fk"),
            ("DROP CONSTRAINT uq_links_user_id_id", "add_constraint"),
            ("ADD CONSTRAINT more UNIQUE (label_id)", "remove_constraint"),
            ("ADD CONSTRAINT more FOREIGN KEY (label_id) REFERENCES labels", "remove_fk"),
        ],
    )
    async def test_is_red_for_a_key_without_the_user(
        self, app: Application, plant: str, found: str
    ) -> None:
        base = new_base()
        label = labels(base)

        class Link(Owned, base):  # type: ignore[misc, valid-type]
            __tablename__ = "links"
            id: Mapped[int] = number()
            label_id: Mapped[int] = owned_reference(label.id)

        await app.migrate(base.metadata)
        await app.execute(f"ALTER TABLE links {plant}")
        assert await app.differences(base.metadata) == [found]

    @pytest.mark.parametrize("name", ["order", "Label Id"])
    async def test_is_silent_for_every_kind_of_reference(self, app: Application, name: str) -> None:
        base = new_base()
        label = labels(base)

        class Link(Owned, base):  # type: ignore[misc, valid-type]
            __tablename__ = "links"
            code: Mapped[str] = mapped_column(primary_key=True)
            one: Mapped[int] = owned_reference(label.id, index=False)
            two: Mapped[int | None] = owned_reference(Task.id, ondelete="RESTRICT")
            parent: Mapped[str | None] = owned_reference("links.code", ondelete="NO ACTION")

        column: Any = owned_reference(label.id, ondelete="SET NULL")
        column.column.name = column.column.key = name
        more: Class = type(
            "More",
            (Owned, base),
            {
                "__tablename__": "more",
                "__annotations__": {"id": Mapped[int], "other": Mapped[int | None]},
                "id": number(),
                "other": column,
            },
        )
        assert name in more.__table__.c
        await app.migrate(base.metadata)
        assert await app.differences(base.metadata) == []
        await app.downgrade("base")

    async def test_refuses_what_a_string_hid_at_the_definition(self, app: Application) -> None:
        base = new_base()

        class Early(Owned, base):  # type: ignore[misc, valid-type]
            __tablename__ = "early"
            id: Mapped[int] = number()
            label_id: Mapped[int] = mapped_column(ForeignKey("labels.id"))

        labels(base)
        with pytest.raises(CommandError, match="could name a row of another user"):
            await app.revise(base.metadata)

    async def test_says_nothing_of_todo_dbs_own_tables(self, app: Application) -> None:
        assert await app.differences(Base.metadata) == []
        assert await app.differences(new_base().metadata) == []


class TestGrantColumns:
    """An application adds columns to `tasks` and `users`, by AppTask(Task) and AppUser(User)."""

    @pytest.fixture
    def extended(self, monkeypatch: pytest.MonkeyPatch) -> MetaData:
        # A copy, because a class would change the tables for all other tests.
        metadata = MetaData(naming_convention=Base.metadata.naming_convention)
        for table in Base.metadata.sorted_tables:
            table.to_metadata(metadata)
        monkeypatch.setattr("todo_db.environment.Base", SimpleNamespace(metadata=metadata))
        return metadata

    async def test_covers_added_columns_and_restores(
        self, app: Application, extended: MetaData
    ) -> None:
        before = await app.snapshot()
        tasks = extended.tables["tasks"]
        tasks.append_column(Column("due", Text))
        tasks.append_column(Column("square", BigInteger, Computed("id * id", persisted=True)))
        Index("ix_tasks_due", tasks.c.user_id, tasks.c.due)
        extended.tables["users"].append_column(Column("zone", Text))
        extended.tables["sessions"].append_column(Column("device", Text))
        source = await app.migrate(extended)
        assert body(source, "upgrade") == [
            "op.grant_columns('users', insert=['zone'], update=['zone'])",
            "op.grant_columns('tasks', insert=['due'], update=['due'])",
        ]
        assert await app.differences(extended) == []
        after = await app.snapshot()
        await app.downgrade()
        assert {line for line in await app.snapshot() if "alembic_version" not in line} == before
        await app.upgrade()
        assert await app.snapshot() == after

    async def test_are_revoked_before_a_column_is_dropped(
        self, app: Application, extended: MetaData, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        extended.tables["tasks"].append_column(Column("due", Text))
        await app.migrate(extended)
        before = await app.snapshot()
        monkeypatch.setattr("todo_db.environment.Base", Base)
        source = await app.migrate(Base.metadata)
        assert body(source, "upgrade") == [
            "op.revoke_columns('tasks', insert=['due'], update=['due'])"
        ]
        assert "op.drop_column('tasks', 'due')" in source
        await app.downgrade()
        assert await app.snapshot() == before

    @pytest.mark.parametrize(
        ("plant", "found"),
        [
            ("REVOKE UPDATE (due) ON tasks FROM todo_app", "op.grant_columns('tasks', update="),
            ("GRANT INSERT (square) ON tasks TO todo_app", "op.revoke_columns('tasks', insert="),
        ],
    )
    async def test_are_checked(
        self, app: Application, extended: MetaData, plant: str, found: str
    ) -> None:
        tasks = extended.tables["tasks"]
        tasks.append_column(Column("due", Text))
        tasks.append_column(Column("square", BigInteger, Computed("id * id", persisted=True)))
        await app.migrate(extended)
        await app.execute(plant)
        [difference] = await app.differences(extended)
        assert difference.startswith(found)

    async def test_a_foreign_key_without_the_user_is_refused(
        self, app: Application, extended: MetaData
    ) -> None:
        best = Column("best", BigInteger, ForeignKey("tasks.id", use_alter=True))
        extended.tables["users"].append_column(best)
        with pytest.raises(CommandError, match="could name a row of another user"):
            await app.revise(extended)

    async def test_another_table_of_todo_db_is_left_to_better_auth(self, app: Application) -> None:
        await app.execute("ALTER TABLE users ADD role text; ALTER TABLE sessions ADD device text")
        assert await app.differences(Base.metadata) == []


class TestConfigure:
    async def test_drops_no_table_of_another_project(self, app: Application, label: Class) -> None:
        await app.migrate(label.metadata)
        await app.execute(
            "CREATE TABLE others (id int)",
            "CREATE TABLE guarded (id int)",
            "CREATE POLICY all_of_them ON guarded USING (true)",
        )
        assert await app.differences(label.metadata) == []
        await upgrade(app.url)

    async def test_leaves_a_table_to_the_filter_of_the_application(
        self, app: Application, label: Class
    ) -> None:
        app.options["include_object"] = lambda _item, name, *_: name != "labels"
        assert await app.differences(label.metadata) == []
        app.options["include_object"] = lambda *_: True
        assert len(await app.differences(label.metadata)) == 2

    async def test_takes_other_options_of_alembic(self, app: Application, label: Class) -> None:
        await app.migrate(label.metadata)
        await app.execute("ALTER TABLE labels ALTER name TYPE varchar(60)")
        assert len(await app.differences(label.metadata)) == 1
        app.options["compare_type"] = False
        assert await app.differences(label.metadata) == []

    async def test_has_a_history_of_its_own(self, app: Application, label: Class) -> None:
        await app.migrate(label.metadata)
        async with connected(app.url) as owner:
            assert await owner.fetchval("SELECT version_num FROM alembic_version") == "01"

    async def test_is_silent_with_todo_dbs_own_base(self, app: Application) -> None:
        metadata = MetaData(naming_convention=Base.metadata.naming_convention)
        base = new_base(naming_convention=metadata.naming_convention)
        labels(base)
        await app.migrate(base.metadata)
        assert await app.differences(base.metadata) == []
        await app.downgrade("base")

    @pytest.mark.parametrize("target", ["base", "-1"])
    async def test_needs_the_tables_of_todo_db(
        self, app: Application, label: Class, target: str
    ) -> None:
        await downgrade(app.url, target)
        with pytest.raises(CommandError, match="run `todo-db migrate`"):
            await app.revise(label.metadata)

    async def test_needs_tables_that_are_there_at_all(
        self, app: Application, label: Class, todo_postgres: EmbeddedPostgres
    ) -> None:
        todo_postgres.create_database("bare")
        app.url = todo_postgres.url(database="bare")
        with pytest.raises(CommandError, match="run `todo-db migrate`"):
            await app.revise(label.metadata)
        todo_postgres.drop_database("bare")

    async def test_refuses_metadata_with_a_schema(self, app: Application) -> None:
        base = new_base(schema="mine")
        with pytest.raises(CommandError, match="to each class"):
            await app.revise(labels(base).metadata)


class TestWait:
    @pytest.fixture(autouse=True)
    def _short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from todo_db.environment import LOCK_SQL  # noqa: PLC0415

        sooner = [statement.replace("'60s'", "'50ms'") for statement in LOCK_SQL]
        monkeypatch.setattr("todo_db.environment.LOCK_SQL", sooner)

    @pytest.mark.parametrize("command_", [upgrade, None])
    async def test_behind_a_stuck_migration_ends_with_its_reason(
        self, app: Application, command_: Callable[..., Any] | None
    ) -> None:
        async with connected(app.url) as stuck, stuck.transaction():
            await stuck.execute("SELECT pg_advisory_xact_lock(7306001204)")
            with pytest.raises(CallTimeoutError, match=r"another migration .* is running"):
                await (app.differences(Base.metadata) if command_ is None else command_(app.url))

    async def test_is_not_blamed_for_another_failure(
        self, app: Application, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("todo_db.environment.LOCK_SQL", ["SELECT 1 / 0"])
        with pytest.raises(DBAPIError, match="division by zero"):
            await upgrade(app.url)

    async def test_that_the_login_may_not_begin_is_a_mistake_of_the_settings(
        self, app: Application, todo_postgres: EmbeddedPostgres, label: Class
    ) -> None:
        await app.revise(label.metadata)
        app.url = app.url.replace("todo_owner@", "todo_login@")
        with pytest.raises(ConfigurationError, match="this login may not migrate"):
            await app.upgrade()
        del todo_postgres
