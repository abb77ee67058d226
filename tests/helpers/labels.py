"""Tables of an application of its own, behind the fence of migration 0002."""

from datetime import datetime
from typing import Final

from driver import Connection
from sqlalchemy import (
    BigInteger,
    DateTime,
    FetchedValue,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    SmallInteger,
    String,
    Text,
    func,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from todo_db.models import User

_TABLES: Final = """
    CREATE TABLE labels (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        user_id text NOT NULL REFERENCES users (id) ON DELETE CASCADE,
        name varchar(10) NOT NULL,
        size smallint CONSTRAINT ck_labels_size CHECK (size < 100),
        updated_at timestamptz NOT NULL DEFAULT now(),
        UNIQUE (user_id, name),
        UNIQUE (user_id, id)
    );
    CREATE TABLE notes (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        user_id text NOT NULL,
        label_id bigint NOT NULL,
        body text NOT NULL,
        FOREIGN KEY (user_id, label_id) REFERENCES labels (user_id, id) ON DELETE CASCADE
    );
    GRANT SELECT, DELETE, INSERT (user_id, name, size), UPDATE (name, size, user_id) ON labels
        TO todo_app;
    GRANT SELECT, DELETE, INSERT (user_id, label_id, body), UPDATE (body) ON notes TO todo_app;
    CREATE FUNCTION touch_label() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN NEW.updated_at := clock_timestamp(); RETURN NEW; END $$;
    CREATE TRIGGER touch BEFORE UPDATE ON labels FOR EACH ROW EXECUTE FUNCTION touch_label()
"""
_MINE: Final = "user_id = nullif((SELECT current_setting('todo_db.user_id', true)), '')"


async def create_tables(owner: Connection) -> None:
    """Create `labels`, and `notes` on them, as an application's own migration does."""
    await owner.execute(_TABLES)
    for table in ("labels", "notes"):
        await owner.execute(f"""
            ALTER TABLE {table} ENABLE ROW LEVEL SECURITY;
            ALTER TABLE {table} FORCE ROW LEVEL SECURITY;
            CREATE POLICY {table}_own ON {table} TO todo_app USING ({_MINE}) WITH CHECK ({_MINE});
            CREATE POLICY {table}_fence ON {table} AS RESTRICTIVE TO todo_app
                USING ({_MINE}) WITH CHECK ({_MINE})
        """)


class Base(DeclarativeBase):
    # Its own metadata: the package's tests compare theirs with the database.
    __mapper_args__ = {"eager_defaults": True}  # noqa: RUF012  # as SQLAlchemy declares it


class Label(Base):
    __tablename__ = "labels"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    user_id: Mapped[str] = mapped_column(Text, ForeignKey(User.__table__.c.id))
    name: Mapped[str] = mapped_column(String(10))
    size: Mapped[int | None] = mapped_column(SmallInteger)
    updated_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.now(), server_onupdate=FetchedValue()
    )
    notes: Mapped[list["Note"]] = relationship(
        back_populates="label", cascade="all, delete-orphan", passive_deletes=True
    )


class Note(Base):
    __tablename__ = "notes"
    __table_args__ = (ForeignKeyConstraint(["user_id", "label_id"], [Label.user_id, Label.id]),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    user_id: Mapped[str] = mapped_column(Text)
    label_id: Mapped[int] = mapped_column(BigInteger)
    body: Mapped[str] = mapped_column(Text)
    label: Mapped[Label] = relationship(back_populates="notes")
