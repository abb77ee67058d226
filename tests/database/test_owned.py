"""The mixins of an application's tables: what they declare, what they refuse, what mallory sees."""

import re
from collections.abc import AsyncGenerator
from typing import Annotated, Any

import asyncpg
import pytest
import pytest_asyncio
from application import Application, connected, new_base, number
from driver import Connection
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Computed,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    func,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ExcludeConstraint
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    aliased,
    configure_mappers,
    declared_attr,
    mapped_column,
    registry,
    relationship,
)
from sqlalchemy.schema import CreateTable

from todo_db import ConfigurationError, Database, TodoDBError
from todo_db.embedded import LOGIN, EmbeddedPostgres
from todo_db.fence import (
    Fence,
    check,
    declare,
    fence_of,
    fence_sql,
    kind_of,
    object_name,
    problems,
)
from todo_db.models import (
    Base,
    Owned,
    Shared,
    Task,
    Timestamps,
    User,
    owned_reference,
)

# A class that a test makes; no type checker can follow it.
type Class = Any


def key_of(cls: type[DeclarativeBase]) -> list[str]:
    return [column.name for column in inspect(cls).primary_key]


def keys_of(cls: type[DeclarativeBase]) -> set[tuple[str, ...]]:
    """Return the foreign keys of a class, as they are in SQL."""
    return {
        (str(key.name), *key.column_keys, *(each.target_fullname for each in key.elements))
        for key in cls.__table__.foreign_key_constraints  # type: ignore[attr-defined]
    }


@pytest.fixture
def base() -> Class:
    return new_base()


@pytest.fixture
def label(base: Class) -> Class:
    class Label(Owned, base):  # type: ignore[misc]
        __tablename__ = "labels"
        id: Mapped[int] = number()
        name: Mapped[str] = mapped_column(String(50))

    return Label


class TestOwned:
    def test_adds_the_user_first_and_a_key_for_references(self, label: Class) -> None:
        assert label.__table__.c.keys() == ["user_id", "id", "name"]
        assert not label.__table__.c.user_id.nullable
        assert keys_of(label) == {("fk_labels_user_id_users", "user_id", "users.id")}
        assert key_of(label) == ["id"]
        [unique] = [
            each for each in label.__table__.constraints if isinstance(each, UniqueConstraint)
        ]
        assert (unique.name, unique.columns.keys()) == ("uq_labels_user_id_id", ["user_id", "id"])
        assert kind_of(label.__table__) == "owned"

    def test_lets_the_application_set_what_postgresql_does_not_make(self, base: Class) -> None:
        class Row(Owned, Timestamps, base):  # type: ignore[misc]
            __tablename__ = "rows"
            id: Mapped[str] = mapped_column(primary_key=True, server_default="x")
            name: Mapped[str] = mapped_column("Name")
            size: Mapped[int] = mapped_column(Computed("length(name)"))
            done: Mapped[bool] = mapped_column(server_default="false")

        assert fence_of(Row.__table__) == Fence(
            "rows", None, ("Name", "done", "user_id"), ("Name", "done"), touch=True
        )

    @pytest.mark.parametrize("made", ["column", "annotated", "declared", "core", "constraint"])
    def test_joins_a_key_that_the_application_gives(self, base: Class, made: str) -> None:
        class Declared:
            @declared_attr
            @classmethod
            def code(cls) -> Mapped[str]:
                return mapped_column(primary_key=True)

        parts: dict[str, Any] = {
            "column": {"code": mapped_column(Text, primary_key=True)},
            "annotated": {
                "__annotations__": {"code": Mapped[Annotated[str, mapped_column(primary_key=True)]]}
            },
            "declared": {},
            "core": {"code": Column(Text, primary_key=True)},
            "constraint": {
                "code": mapped_column(Text),
                "__table_args__": (PrimaryKeyConstraint("code", name="mine"),),
            },
        }
        bases = (*((Declared,) if made == "declared" else ()), Owned, base)
        cls: Any = type("Row", bases, {"__tablename__": "rows"} | parts[made])
        assert key_of(cls) == ["user_id", "code"]
        assert cls.__table__.primary_key.name == ("mine" if made == "constraint" else None)

    def test_is_the_key_where_there_is_no_other(self, base: Class) -> None:
        class Preferences(Owned, base):  # type: ignore[misc]
            __tablename__ = "preferences"
            theme: Mapped[str]

        assert key_of(Preferences) == ["user_id"]
        assert fence_of(Preferences.__table__).update == ("theme",)

    def test_works_in_every_style_of_declaration(self) -> None:
        class DataBase(MappedAsDataclass, DeclarativeBase):
            pass

        class Data(Owned, Timestamps, DataBase):
            __tablename__ = "data"
            name: Mapped[str]
            id: Mapped[int] = number(init=False)

        assert Data(name="x").name == "x"

        @registry().mapped
        class Decorated(Owned):
            __tablename__ = "decorated"
            id: Mapped[int] = number()

        class Last(new_base(), Owned):  # type: ignore[misc]
            __tablename__ = "last"
            id: Mapped[int] = number()

        class Abstract(Owned, new_base()):  # type: ignore[misc]
            __abstract__ = True
            id: Mapped[int] = number()

        class Concrete(Abstract):
            __tablename__ = "concrete"

        classes: list[Any] = [Data, Decorated, Last, Concrete]
        for cls in classes:
            assert kind_of(cls.__table__) == "owned"
            assert "user_id" in cls.__table__.c

    def test_adds_its_keys_to_todo_dbs_base_by_the_same_names(self) -> None:
        convention = Base.metadata.naming_convention
        names = []
        for options in ({}, {"naming_convention": convention}):

            class Label(Owned, new_base(**options)):  # type: ignore[misc]
                __tablename__ = "labels"
                id: Mapped[int] = number()
                parent_id: Mapped[int | None] = owned_reference("labels.id")

            names.append(
                {
                    str(each.name)
                    for each in (*Label.__table__.constraints, *Label.__table__.indexes)
                    if not isinstance(each, PrimaryKeyConstraint)
                }
            )
        assert names[0] == names[1]

    def test_does_not_make_a_table_of_its_own_for_a_class_in_one_table(self, label: Class) -> None:
        class Special(label):  # type: ignore[misc]
            extra_id: Mapped[int | None] = owned_reference(Task.id)

        assert Special.__table__ is label.__table__
        assert "extra_id" in fence_of(label.__table__).update
        assert len(keys_of(label)) == 2

    def test_refuses_joined_inheritance(self, label: Class) -> None:
        with pytest.raises(ConfigurationError, match="inherits from a mapped class"):

            class Special(label):  # type: ignore[misc]
                __tablename__ = "specials"
                id: Mapped[int] = mapped_column(ForeignKey("labels.id"), primary_key=True)

    @pytest.mark.parametrize(
        ("parts", "problem"),
        [
            ({"id": mapped_column(Integer, primary_key=True)}, "needs a sequence"),
            ({"id": mapped_column(Integer, Identity(), primary_key=True)}, "needs a sequence"),
            ({"name": mapped_column(Text, unique=True)}, r"unique key \(name\)"),
            ({"user_id": mapped_column(Text, nullable=True)}, "has no column user_id text"),
            ({"user_id": mapped_column(Integer)}, "has no column user_id text"),
            ({"__fence__": {"update": ["nome"]}}, "no column nome, which its __fence__"),
            ({"__fence__": {"update": ["id"]}}, r"unique key \(id\)"),
            ({"a" * 64: mapped_column(Text)}, "longer than 63 bytes"),
            ({"__tablename__": "ü" * 32}, "longer than 63 bytes"),
        ],
    )
    def test_refuses_what_tells_about_other_users(
        self,
        base: Class,
        parts: dict[str, Any],
        problem: str,
    ) -> None:
        with pytest.raises(ConfigurationError, match=problem):
            type("Row", (Owned, base), {"__tablename__": "rows", "id": number()} | parts)

    def test_names_no_more_problems_of_a_table_without_a_user(self) -> None:
        table = Table("t", MetaData(), Column("id", Integer, primary_key=True))
        declare(table, "owned", {})
        [problem] = problems(table)
        assert problem.startswith("t has no column user_id")

    def test_leaves_a_class_on_a_join_alone(self, base: Class) -> None:
        one = Table("one", base.metadata, Column("id", Integer, primary_key=True))
        two = Table("two", base.metadata, Column("one_id", ForeignKey("one.id"), primary_key=True))
        joined = one.join(two)
        both: Class = type("Both", (base,), {"__table__": joined})
        assert inspect(both).local_table is joined

    def test_takes_numbers_of_the_application_where_it_says_so(self, base: Class) -> None:
        class Row(Owned, base):  # type: ignore[misc]
            __tablename__ = "rows"
            place: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)

        assert key_of(Row) == ["user_id", "place"]


class TestUniqueKeys:
    @staticmethod
    def table(*parts: Class) -> None:
        class Row(Owned, new_base()):  # type: ignore[misc]
            __tablename__ = "rows"
            __table_args__ = parts
            id: Mapped[int] = number()
            name: Mapped[str]
            folded: Mapped[str] = mapped_column(Computed("lower(name)"))
            made: Mapped[str] = mapped_column(server_default="x")

    @pytest.mark.parametrize(
        "part",
        [
            UniqueConstraint("name"),
            UniqueConstraint("folded"),
            Index("i", "name", unique=True),
            Index("i", func.lower(text("name")), unique=True),
            Index("i", func.concat(Column("user_id"), Column("name")), unique=True),
            ExcludeConstraint(("name", "=")),
            ExcludeConstraint(("user_id", "<>"), ("name", "=")),
        ],
    )
    def test_without_the_user_are_refused(self, part: Class) -> None:
        with pytest.raises(ConfigurationError, match="tells a user by an error"):
            self.table(part)

    @pytest.mark.parametrize(
        "part",
        [
            UniqueConstraint("user_id", "name"),
            UniqueConstraint("id", "name"),
            Index("i", "user_id", func.lower(text("name")), unique=True),
            Index("i", "name"),
            ExcludeConstraint(("user_id", "="), ("name", "=")),
            CheckConstraint("name <> ''"),
        ],
    )
    def test_with_the_user_or_what_postgresql_makes_are_taken(self, part: Class) -> None:
        self.table(part)


class TestForeignKeys:
    @pytest.mark.parametrize(
        ("target", "problem"),
        [
            ("labels.id", "could name a row of another user: use owned_reference"),
            ("users.id", "which users there are"),
            ("plain.id", "which rows of plain there are"),
        ],
    )
    def test_without_the_user_are_refused(
        self,
        base: Class,
        label: Class,
        target: str,
        problem: str,
    ) -> None:
        class Plain(base):  # type: ignore[misc]
            __tablename__ = "plain"
            id: Mapped[int] = number()

        targets = {"labels.id": label.id, "users.id": User.id, "plain.id": Plain.id}
        with pytest.raises(ConfigurationError, match=problem):

            class Row(Owned, base):  # type: ignore[misc]
                __tablename__ = "rows"
                id: Mapped[int] = number()
                other: Mapped[Any] = mapped_column(
                    Text, ForeignKey(targets[target].property.columns[0])
                )

    def test_to_a_shared_table_are_taken(self, base: Class) -> None:
        class Bank(base):  # type: ignore[misc]
            __tablename__ = "banks"
            id: Mapped[int] = number()

        class Currency(Shared, base):  # type: ignore[misc]
            __tablename__ = "currencies"
            code: Mapped[str] = mapped_column(primary_key=True)
            bank_id: Mapped[int | None] = mapped_column(ForeignKey("banks.id"))

        class Price(Owned, base):  # type: ignore[misc]
            __tablename__ = "prices"
            id: Mapped[int] = number()
            currency: Mapped[str] = mapped_column(ForeignKey("currencies.code"))

        assert (kind_of(Currency.__table__), kind_of(Price.__table__)) == ("shared", "owned")

    def test_to_a_class_that_is_not_defined_yet_are_judged_later(self, base: Class) -> None:
        class Row(Owned, base):  # type: ignore[misc]
            __tablename__ = "rows"
            id: Mapped[int] = number()
            label_id: Mapped[int] = mapped_column(ForeignKey("labels.id"))

        Table("labels", base.metadata, Column("id", Integer, primary_key=True))
        with pytest.raises(ConfigurationError, match="which rows of labels"):
            check(Row.__table__)


class TestOwnedReference:
    def test_names_the_row_together_with_the_user(self, base: Class, label: Class) -> None:
        class Link(Owned, base):  # type: ignore[misc]
            __tablename__ = "links"
            task_id: Mapped[int] = owned_reference(Task.id, primary_key=True)
            label_id: Mapped[int] = owned_reference(label.id, primary_key=True)

        pair = ("user_id", "label_id", "labels.user_id", "labels.id")
        assert ("fk_links_user_id_label_id_labels", *pair) in keys_of(Link)
        assert key_of(Link) == ["user_id", "task_id", "label_id"]
        # The primary key begins with the other one.
        [index] = Link.__table__.indexes
        assert (index.name, index.columns.keys()) == (
            "ix_links_user_id_label_id",
            ["user_id", "label_id"],
        )
        assert isinstance(Link.__table__.c.task_id.type, BigInteger)

    def test_has_no_index_that_is_not_wanted(self, base: Class, label: Class) -> None:
        class Row(Owned, base):  # type: ignore[misc]
            __tablename__ = "rows"
            __table_args__ = (Index("mine", "user_id", "two", "id"),)
            id: Mapped[int] = number()
            one: Mapped[int] = owned_reference(label.id, index=False)
            two: Mapped[int] = owned_reference(label.id)

        assert [index.name for index in Row.__table__.indexes] == ["mine"]

    @pytest.mark.parametrize("name", ["parent", "order", "Parent Id", 'a"b'])
    def test_set_null_leaves_the_user(self, base: Class, name: str) -> None:
        reference: Any = owned_reference("rows.id", ondelete="SET NULL")
        annotations = {"id": Mapped[int], name: Mapped[int | None]}
        parts = {"id": number(), name: reference, "__annotations__": annotations}
        cls: Any = type("Row", (Owned, base), {"__tablename__": "rows"} | parts)
        quoted = {"parent": "parent", 'a"b': '"a""b"'}.get(name, f'"{name}"')
        [ondelete] = [
            key.ondelete for key in cls.__table__.foreign_key_constraints if len(key.columns) > 1
        ]
        assert ondelete == f"SET NULL ({quoted})"
        assert ondelete in str(CreateTable(cls.__table__).compile(dialect=_dialect()))

    def test_set_null_of_what_may_not_be_null_is_refused(self, base: Class) -> None:
        with pytest.raises(ConfigurationError, match=r"needs Mapped\[… \| None\]"):

            class Row(Owned, base):  # type: ignore[misc]
                __tablename__ = "rows"
                id: Mapped[int] = number()
                parent: Mapped[int] = owned_reference("rows.id", ondelete="SET NULL")

    @pytest.mark.parametrize("target", ["labels.id", "rows.nothing", "id", ""])
    def test_string_is_for_the_same_table(self, base: Class, target: str) -> None:
        with pytest.raises(ConfigurationError, match="a string names a column of the same table"):

            class Row(Owned, base):  # type: ignore[misc]
                __tablename__ = "rows"
                id: Mapped[int] = number()
                parent: Mapped[int] = owned_reference(target)

    def test_string_may_have_a_schema(self, base: Class) -> None:
        class Row(Owned, base):  # type: ignore[misc]
            __tablename__ = "rows"
            __table_args__ = {"schema": "Mine"}  # noqa: RUF012
            id: Mapped[int] = number()
            parent: Mapped[int] = owned_reference("Mine.rows.id")

        assert len(keys_of(Row)) == 2

    def test_target_must_be_unique_with_the_user(self, base: Class, label: Class) -> None:
        class Plain(base):  # type: ignore[misc]
            __tablename__ = "plain"
            id: Mapped[int] = number()

        for position, column in enumerate((Plain.id, label.name, User.id)):
            with pytest.raises(ConfigurationError, match="unique together with user_id"):
                type(
                    f"Row{position}",
                    (Owned, base),
                    {
                        "__tablename__": f"rows{position}",
                        "__annotations__": {"other": Mapped[int]},
                        "id": number(),
                        "other": owned_reference(column),
                    },
                )

    @pytest.mark.parametrize("mixin", [Shared, Timestamps])
    def test_is_for_owned_classes(self, base: Class, label: Class, mixin: type) -> None:
        with pytest.raises(ConfigurationError, match="a class that derives from Owned"):
            type(
                "Row",
                (mixin, base),
                {
                    "__tablename__": "rows",
                    "__annotations__": {"other": Mapped[int]},
                    "id": number(),
                    "other": owned_reference(label.id),
                },
            )

    def test_serves_relationships_without_a_warning(self, base: Class) -> None:
        class Project(Owned, base):  # type: ignore[misc]
            __tablename__ = "projects"
            id: Mapped[int] = number()
            parent_id: Mapped[int | None] = owned_reference("projects.id")
            parent: Mapped["Project | None"] = relationship(
                foreign_keys=[parent_id], remote_side="Project.id"
            )
            tags: Mapped[list["Tag"]] = relationship(secondary="project_tags")

        class Tag(Owned, base):  # type: ignore[misc]
            __tablename__ = "tags"
            id: Mapped[int] = number()

        class ProjectTag(Owned, base):  # type: ignore[misc]
            __tablename__ = "project_tags"
            project_id: Mapped[int] = owned_reference(Project.id, primary_key=True)
            tag_id: Mapped[int] = owned_reference(Tag.id, primary_key=True)

        class Note(Owned, base):  # type: ignore[misc]
            __tablename__ = "notes"
            id: Mapped[int] = number()
            project_id: Mapped[int] = owned_reference(Project.id)
            tag_id: Mapped[int] = owned_reference(Tag.id)
            project: Mapped[Project] = relationship(foreign_keys=[project_id])
            tag: Mapped[Tag] = relationship(foreign_keys=[tag_id])

        configure_mappers()
        joined = str(select(Note).join(Note.project).join(Project.parent.of_type(aliased(Project))))
        assert "projects.id = notes.project_id" in joined


class TestAddedColumns:
    """A class AppTask(Task) adds its columns to `tasks`; here, to a copy."""

    @staticmethod
    def add(name: str, column: Column[Any]) -> None:
        base = new_base()
        for table in Base.metadata.sorted_tables:
            table.to_metadata(base.metadata)
        base.metadata.tables[name].append_column(column)
        type("App", (base,), {"__table__": base.metadata.tables[name]})

    @pytest.mark.parametrize("name", ["tasks", "users"])
    @pytest.mark.parametrize(
        "options",
        [
            {"nullable": False},
            {"default": "x"},
            {"onupdate": "x"},
        ],
        ids=["no value", "default", "onupdate"],
    )
    def test_that_the_repositories_would_have_to_fill_are_refused(
        self, name: str, options: dict[str, Any]
    ) -> None:
        with pytest.raises(ConfigurationError, match="make it nullable, or give it a server_def"):
            self.add(name, Column("due", Text, **options))

    @pytest.mark.parametrize("name", ["tasks", "users"])
    def test_that_fill_themselves_are_taken(self, name: str) -> None:
        self.add(name, Column("due", DateTime))
        self.add(name, Column("due", Text, server_default="", nullable=False))

    def test_without_the_user_in_a_foreign_key_are_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="could name a row of another user"):
            self.add("users", Column("due", ForeignKey("tasks.id")))


class TestObjectName:
    def test_is_cut_as_postgresql_would_but_stays_unique(self) -> None:
        assert object_name("ix", "labels", "id") == "ix_labels_id"
        names = {object_name("ix", "ü" * 40, end) for end in "ab"}
        assert len(names) == 2
        assert all(len(name.encode()) <= 63 for name in names)
        assert object_name("i" * 63) == "i" * 63


class TestFenceSql:
    def test_grants_no_deletes_and_no_columns_that_were_not_asked_for(self) -> None:
        grants = [sql for sql in fence_sql(Fence("t", delete=False), str) if "GRANT" in sql]
        assert grants == ["GRANT SELECT ON t TO todo_app"]

    def test_needs_a_declaration_to_know_a_table(self) -> None:
        table = Table("t", MetaData(), Column("a", Integer))
        assert kind_of(table) is None
        assert fence_of(table) == Fence("t", insert=("a",), update=("a",))


def _dialect() -> Class:
    from sqlalchemy.dialects import postgresql  # noqa: PLC0415

    return postgresql.dialect()  # type: ignore[no-untyped-call]


AppBase: Class = new_base()


class Project(Owned, Timestamps, AppBase):  # type: ignore[misc]
    __tablename__ = "projects"
    id: Mapped[int] = number()
    name: Mapped[str]
    parent_id: Mapped[int | None] = owned_reference("projects.id")


class Note(Owned, AppBase):  # type: ignore[misc]
    __tablename__ = "notes"
    id: Mapped[int] = number()
    task_id: Mapped[int] = owned_reference(Task.id)
    text: Mapped[str]


class TaskProject(Owned, AppBase):  # type: ignore[misc]
    __tablename__ = "task_projects"
    task_id: Mapped[int] = owned_reference(Task.id, primary_key=True)
    project_id: Mapped[int] = owned_reference(Project.id, primary_key=True)
    place: Mapped[int | None]


class Setting(Owned, AppBase):  # type: ignore[misc]
    __tablename__ = "settings"
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


# What AppTask(Task) with `project_id = owned_reference(Project.id)` makes of `tasks`.
EXTENDED = """
    ALTER TABLE tasks ADD project_id bigint,
        ADD FOREIGN KEY (user_id, project_id) REFERENCES projects (user_id, id);
    GRANT INSERT (project_id), UPDATE (project_id) ON tasks TO todo_app
"""
MISSING = 999_999
ATTACKS = """
INSERT INTO notes (user_id, task_id, text) VALUES ('mallory', {task}, 'x');
INSERT INTO notes (user_id, task_id, text) VALUES ('alice', {task}, 'x');
INSERT INTO notes (user_id, task_id, text)
    VALUES ('mallory', {task}, 'x')
    ON CONFLICT DO NOTHING;
INSERT INTO notes (id, user_id, task_id, text) OVERRIDING SYSTEM VALUE
    VALUES ({note}, 'mallory', {own_task}, 'x')
    ON CONFLICT (id) DO NOTHING;
UPDATE notes SET task_id = {task};
UPDATE notes SET text = 'x' WHERE id = {note};
DELETE FROM notes WHERE id = {note};
INSERT INTO task_projects (user_id, task_id, project_id)
    VALUES ('mallory', {task}, {own_project});
INSERT INTO task_projects (user_id, task_id, project_id)
    VALUES ('mallory', {own_task}, {project});
INSERT INTO task_projects (user_id, task_id, project_id)
    VALUES ('mallory', {task}, {project})
    ON CONFLICT DO NOTHING;
INSERT INTO task_projects (user_id, task_id, project_id)
    VALUES ('alice', {task}, {project})
    ON CONFLICT (user_id, task_id, project_id) DO UPDATE SET place = 1;
UPDATE task_projects SET place = 1 WHERE task_id = {task};
INSERT INTO projects (user_id, name, parent_id) VALUES ('mallory', 'x', {project});
UPDATE projects SET parent_id = {project};
MERGE INTO projects p USING (VALUES ({project}::bigint)) v (id) ON p.id = v.id
    WHEN MATCHED THEN UPDATE SET name = 'x'
    WHEN NOT MATCHED THEN INSERT (user_id, name)
    VALUES ('mallory', 'x');
INSERT INTO settings (user_id, name, value) VALUES ('mallory', '{name}', 'x');
INSERT INTO settings (user_id, name, value) VALUES ('alice', '{name}', 'x');
INSERT INTO settings (user_id, name, value)
    VALUES ('alice', '{name}', 'x')
    ON CONFLICT (user_id, name) DO UPDATE SET value = 'y';
INSERT INTO tasks (user_id, title, project_id) VALUES ('mallory', 'x', {project});
UPDATE tasks SET project_id = {project}
""".strip().split(";\n")


@pytest_asyncio.fixture(scope="module")
async def place(
    todo_postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory
) -> AsyncGenerator[tuple[str, dict[str, object]]]:
    """A database with rows of alice and mallory, and the ids. No test changes it."""
    todo_postgres.create_database("owned", template="todo_template")
    app = Application(tmp_path_factory.mktemp("owned") / "app", todo_postgres.url(database="owned"))
    await app.migrate(AppBase.metadata)
    await app.execute(EXTENDED)
    url = todo_postgres.url(user=LOGIN, database="owned")
    ids: dict[str, object] = {"name": "theme"}
    async with Database.from_url(url) as db:
        for user, prefix in (("alice", ""), ("mallory", "own_")):
            await db.users.create(user, email=f"{user}@example.org", name=user)
            task = await db.tasks.create(user, "x")
            async with db.transaction(user) as transaction:
                session = transaction.session()
                project = Project(name="x")
                session.add(project)
                await session.flush()
                note = Note(task_id=task.id, text="x")
                session.add(note)
                session.add(TaskProject(task_id=task.id, project_id=project.id))
                if user == "alice":
                    session.add(Setting(name="theme", value="x"))
                await session.flush()
                ids |= {f"{prefix}task": task.id, f"{prefix}note": note.id}
                ids[f"{prefix}project"] = project.id
    yield url, ids
    todo_postgres.drop_database("owned")


class TestMallory:
    """T: mallory cannot learn which ids of alice exist, from any answer of the database."""

    @staticmethod
    def missing(ids: dict[str, object]) -> dict[str, object]:
        gone = {name: MISSING for name in ids if not name.startswith("own_")}
        return ids | gone | {"name": "nothing"}

    @staticmethod
    async def answer(
        connection: Connection, attack: str, ids: dict[str, object]
    ) -> tuple[Any, ...]:
        """Return all that PostgreSQL answers, without the ids that mallory sent."""
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("SET LOCAL ROLE todo_app")
        await connection.execute("SELECT set_config('todo_db.user_id', 'mallory', true)")
        try:
            seen: tuple[Any, ...] = (await connection.execute(attack.format(**ids)),)
        except asyncpg.PostgresError as error:
            fields = error.as_dict()
            for name in ("task", "project", "note", "name"):
                fields = {
                    key: re.sub(rf"\b{ids[name]}\b", "…", value) for key, value in fields.items()
                }
            seen = (type(error), *sorted(fields.items()))
        await transaction.rollback()
        return seen

    @pytest.mark.parametrize("attack", ATTACKS)
    async def test_sees_the_same_for_a_foreign_and_a_missing_id(
        self, place: tuple[str, dict[str, object]], attack: str
    ) -> None:
        url, ids = place
        async with connected(url) as connection:
            foreign = await self.answer(connection, attack, ids)
            assert foreign == await self.answer(connection, attack, self.missing(ids))

    @pytest.mark.parametrize("attack", ATTACKS)
    async def test_sees_the_same_error_of_the_package(
        self, place: tuple[str, dict[str, object]], attack: str
    ) -> None:
        url, ids = place
        seen = []
        async with Database.from_url(url) as db:
            for known in (ids, self.missing(ids)):
                try:
                    async with db.transaction("mallory") as transaction:
                        statement = text(attack.format(**known).replace("::", r"\:\:"))
                        seen.append(str((await transaction.execute(statement)).rowcount))  # type: ignore[attr-defined]
                        raise InterruptedError  # noqa: TRY301  # so that nothing is stored
                except (TodoDBError, InterruptedError) as error:
                    seen.append(f"{error!r} {error}")
        half = len(seen) // 2
        assert seen[:half] == seen[half:]

    async def test_entity_of_alice_is_no_entity_of_mallorys(
        self, place: tuple[str, dict[str, object]]
    ) -> None:
        url, ids = place
        seen = []
        async with Database.from_url(url) as db:
            for task in (ids["task"], MISSING):
                with pytest.raises(TodoDBError) as refusal:
                    async with db.transaction("mallory") as transaction:
                        session = transaction.session()
                        assert await session.get(Note, ids["note"]) is None
                        session.add(Note(task_id=task, text="x"))
                        await session.flush()
                seen.append(repr(refusal.value))
        assert seen[0] == seen[1]

    async def test_does_what_alice_may(self, place: tuple[str, dict[str, object]]) -> None:
        """Otherwise the tests above could pass because every statement fails."""
        url, ids = place
        own = {name.removeprefix("own_"): value for name, value in ids.items() if "own" in name}
        done = 0
        async with connected(url) as connection:
            for attack in ATTACKS:
                mine = ids | own | {"name": "new"}
                [first, *_] = await self.answer(
                    connection, attack.replace("alice", "mallory"), mine
                )
                done += isinstance(first, str)
        # The exceptions: an id that PostgreSQL makes, a link that is there, a circle of projects.
        assert done >= len(ATTACKS) - 5

    def test_insert_needs_the_user_in_plain_sql(self) -> None:
        assert "user_id" in str(insert(Note))
