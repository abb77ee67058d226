"""Tables of an application, declared by `Owned` and `Shared` and fenced as `op.fence` does."""

from driver import Connection
from sqlalchemy import BigInteger, ForeignKey, Identity, String, Text, UniqueConstraint
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import CreateIndex, CreateTable

from todo_db.fence import fence_of, fence_sql, kind_of, share_sql
from todo_db.models import Owned, Shared, Task, Timestamps, owned_reference


class Base(DeclarativeBase):
    """Metadata of its own."""


class Currency(Shared, Base):
    __tablename__ = "currencies"

    code: Mapped[str] = mapped_column(Text, primary_key=True)


class Label(Owned, Timestamps, Base):
    __tablename__ = "labels"
    __table_args__ = (UniqueConstraint("user_id", "name"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    name: Mapped[str] = mapped_column(String(50))
    parent_id: Mapped[int | None] = owned_reference("labels.id", ondelete="SET NULL")
    currency: Mapped[str | None] = mapped_column(ForeignKey(Currency.code))


class TaskLabel(Owned, Base):
    __tablename__ = "task_labels"

    task_id: Mapped[int] = owned_reference(Task.id, primary_key=True)
    label_id: Mapped[int] = owned_reference(Label.id, primary_key=True, ondelete="RESTRICT")


class Note(Owned, Base):
    """Of another schema, with an id that the application gives."""

    __tablename__ = "Notes"
    __table_args__ = {"schema": "app"}  # noqa: RUF012  # as SQLAlchemy declares it

    key: Mapped[str] = mapped_column(Text, primary_key=True)


# Nothing of these is a weakness.
_MORE = """
    -- todo_app cannot touch it.
    CREATE TABLE audit (
        id serial PRIMARY KEY, user_id text REFERENCES users ON DELETE SET NULL,
        task_id bigint UNIQUE REFERENCES tasks ON DELETE SET NULL
    );
    CREATE VIEW audit_view AS SELECT * FROM audit;
    CREATE FUNCTION count_all() RETURNS bigint LANGUAGE sql SECURITY DEFINER
        AS 'SELECT count(*) FROM tasks';
    REVOKE EXECUTE ON FUNCTION count_all() FROM PUBLIC;
    CREATE VIEW counts AS SELECT count_all();
    CREATE SCHEMA hidden;
    CREATE FUNCTION hidden.count_all() RETURNS bigint LANGUAGE sql SECURITY DEFINER
        AS 'SELECT count(*) FROM tasks';
    -- With the rights of its caller.
    CREATE FUNCTION shout(a text) RETURNS text LANGUAGE sql AS 'SELECT upper(a)';
    CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
    CREATE TRIGGER keep AFTER INSERT ON labels FOR EACH ROW EXECUTE FUNCTION keep();
    CREATE VIEW my_labels WITH (security_invoker) AS SELECT * FROM labels;
    GRANT SELECT ON my_labels TO todo_app;
    -- Stricter than the fence.
    CREATE POLICY few ON labels AS RESTRICTIVE FOR INSERT
        WITH CHECK (EXISTS (SELECT FROM tasks t WHERE t.user_id = labels.user_id));
    CREATE POLICY open ON task_labels AS RESTRICTIVE TO todo_app USING (true)
        WITH CHECK (EXISTS (SELECT FROM tasks t WHERE t.id = task_id));
    ALTER POLICY own ON labels USING (
        user_id = nullif((SELECT current_setting('todo_db.user_id', true)), '') AND name <> '');
    -- Keys that a user cannot write, and indexes.
    ALTER TABLE labels ADD number bigint GENERATED ALWAYS AS IDENTITY UNIQUE;
    CREATE UNIQUE INDEX ON labels (user_id, lower(name));
    CREATE INDEX ON labels (name);
    -- Columns of our tables.
    ALTER TABLE tasks ADD priority int NOT NULL DEFAULT 0 CHECK (priority >= 0), ADD project bigint;
    CREATE INDEX ON tasks (user_id, priority);
    GRANT INSERT (priority, project), UPDATE (priority, project) ON tasks TO todo_app;
    ALTER TABLE tasks ADD FOREIGN KEY (user_id, project) REFERENCES labels (user_id, id)
        ON DELETE SET NULL (project);
    ALTER TABLE users ADD plan text, ADD phone text UNIQUE;
    GRANT UPDATE (plan) ON users TO todo_app
"""


async def create_tables(owner: Connection) -> None:
    """Create them all, with what an application adds besides."""
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    quote = dialect.identifier_preparer.quote
    await owner.execute("CREATE SCHEMA app")
    for table in Base.metadata.sorted_tables:
        await owner.execute(str(CreateTable(table).compile(dialect=dialect)))
        for index in table.indexes:
            await owner.execute(str(CreateIndex(index).compile(dialect=dialect)))
        statements = (
            share_sql(table.name, table.schema, quote)
            if kind_of(table) == "shared"
            else fence_sql(fence_of(table), quote)
        )
        for statement in statements:
            await owner.execute(statement)
    await owner.execute(_MORE)
