"""The tables that the migrations create, and the mixins with which an application adds its own.

A repository returns records, never these models. Alembic does not compare policies, grants,
triggers, checks and identity columns of the tables here; the tests compare them with a live
database. For the tables of an application, `todo_db.operations` compares most of them.
"""

from datetime import datetime
from typing import Any, ClassVar, Final, Literal, NamedTuple, cast

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    FetchedValue,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    event,
    false,
    func,
    text,
)
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.orm import (
    DeclarativeBase,
    InstrumentedAttribute,
    Mapped,
    MappedColumn,
    Mapper,
    declared_attr,
    mapped_column,
)

from todo_db import fence
from todo_db.errors import ConfigurationError
from todo_db.fence import OWNER, FenceOptions

__all__ = [
    "Account",
    "Base",
    "IdempotencyKey",
    "Owned",
    "Session",
    "Shared",
    "SigningKey",
    "Task",
    "Timestamps",
    "User",
    "Verification",
    "owned_reference",
]

REVISION: Final = "0004"
"""The migration that creates these tables; a newer database works as well."""
VERSION_TABLE: Final = "todo_db_version"
"""Names the last of these migrations that ran. `alembic_version` is the application's."""

USER_ID_MAX: Final = 255
KEY_MAX: Final = 255
TITLE_MAX: Final = 200
DESCRIPTION_MAX: Final = 65_536

# Blank characters of a title are controls, spaces, and invisible format characters.
_VISIBLE: Final = (
    r"[^\u0001-\u0020\u007f-\u00a0\u00ad\u1680\u180e\u2000-\u200f\u2028-\u202f"
    r"\u205f-\u2064\u2066-\u206f\u3000\ufeff]"
)
# Python's datetime has no infinity and no years BC; the margin allows for any time zone.
_CREATED: Final = "created_at >= '0001-01-02 00:00:00+00' AND created_at < '9999-12-31 00:00:00+00'"
_TIMESTAMPS: Final = f"{_CREATED} AND {_CREATED.replace('created_at', 'updated_at')}"


class Base(DeclarativeBase):
    """The metadata of all tables. Errors are mapped by constraint names, so these are API."""

    # What the server sets comes back with the INSERT or UPDATE that set it.
    __mapper_args__ = {"eager_defaults": True}  # noqa: RUF012  # as SQLAlchemy declares it

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def _text_id() -> Mapped[str]:
    return mapped_column(Text, primary_key=True, server_default=text("(gen_random_uuid())::text"))


def _user_id(*, index: bool = False) -> Mapped[str]:
    return mapped_column(Text, ForeignKey("users.id", ondelete="CASCADE"), index=index)


def _owner(table: str) -> MappedColumn[str]:
    name = fence.object_name("fk", table, OWNER, "users")
    # A column, not its name: an application may have other metadata.
    key = ForeignKey(User.__table__.c.id, ondelete="CASCADE", name=name)
    return mapped_column(Text, key, nullable=False, sort_order=-1)


def _timestamp(
    server_onupdate: FetchedValue | None = None, *, sort_order: int = 0
) -> MappedColumn[datetime]:
    return mapped_column(
        DateTime(timezone=True),
        nullable=False,
        server_default=func.now(),
        server_onupdate=server_onupdate,
        sort_order=sort_order,
    )


class User(Base):
    """A user. Better Auth writes the same rows, so the table has every column that it needs."""

    __tablename__ = "users"
    __table_args__ = (
        CheckConstraint(f"char_length(id) BETWEEN 1 AND {USER_ID_MAX}", name="id_length"),
        # COLLATE "C" folds only ASCII, so that the result is the same in every locale.
        CheckConstraint('email = lower(email COLLATE "C")', name="email_lower"),
        CheckConstraint(_TIMESTAMPS, name="timestamps_range"),
    )

    id: Mapped[str] = _text_id()
    email: Mapped[str] = mapped_column(Text, unique=True)
    username: Mapped[str | None] = mapped_column(Text, unique=True)
    name: Mapped[str] = mapped_column(Text, server_default="")
    email_verified: Mapped[bool] = mapped_column(server_default=false())
    image: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = _timestamp()
    updated_at: Mapped[datetime] = _timestamp(FetchedValue())


OUR_COLUMNS: Final[dict[str, frozenset[str]]] = {}
"""The tables of todo_db and their columns, without those that an application adds."""


_quote: Final = PGDialect().identifier_preparer.quote  # type: ignore[no-untyped-call]  # SQLAlchemy's


class _Reference(NamedTuple):
    """What `owned_reference` was called with, until its class is mapped."""

    target: InstrumentedAttribute[Any] | str
    ondelete: str
    has_index: bool


_REFERENCE: Final = "todo_db.reference"


class Owned:
    """A mixin for tables whose rows belong to one user each, behind the fence of todo_db.

    It adds the column `user_id` with its foreign key to `users` (`ON DELETE CASCADE`). `user_id`
    is a part of the primary key if the application gives the key's values, and all of it if there
    is no other key. An `id` that PostgreSQL makes (`Identity(always=True)`, or a `server_default`)
    stays the key alone; then `(user_id, id)` is unique too, for `owned_reference` of other classes.

    Autogenerate writes its table with `op.fence` (`todo_db.migrations.configure`). An INSERT of an
    entity needs no `user_id`: `Transaction.session` fills it in.

    ```python
    class Label(Owned, Timestamps, Base):
        __tablename__ = "labels"
        __fence__ = FenceOptions(delete=False)

        id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
        name: Mapped[str] = mapped_column(String(50))
    ```

    Raises:
        ConfigurationError: At the definition of a class through which one user could learn of
            another one's rows: by a unique key, a primary key or a foreign key without `user_id`.
    """

    __fence__: ClassVar[FenceOptions] = {}
    """Narrows what the application may do: `{"update": ["name"], "delete": False}`."""

    # No annotations: in a MappedAsDataclass they would have to be fields of a dataclass.
    user_id = declared_attr(lambda cls: _owner(cls.__tablename__))  # pyright: ignore[reportUnknownArgumentType, reportUnknownLambdaType, reportUnknownMemberType]
    """The user whose row this is."""

    # SQLAlchemy calls it in place of Table, before it reads the primary key.
    @classmethod
    def __table_cls__(cls, *arguments: Any, **options: Any) -> Table:  # noqa: ANN401  # Table's
        table = Table(*arguments, **options)
        key = table.primary_key
        is_given = not key.columns or any(map(_is_given_key, key.columns))
        if OWNER in table.c and OWNER not in key.columns and is_given:
            table.c[OWNER].primary_key = True
            table.append_constraint(
                PrimaryKeyConstraint(table.c[OWNER], *key, name=cast("str | None", key.name))
            )
        return table


class Shared:
    """A mixin for tables that every user may read and no user may change, such as currencies.

    Autogenerate writes its table with `op.share` (`todo_db.migrations.configure`).

    ```python
    class Currency(Shared, Base):
        __tablename__ = "currencies"

        code: Mapped[str] = mapped_column(String(3), primary_key=True)
    ```
    """


class Timestamps:
    """A mixin for `created_at` and `updated_at`, which PostgreSQL sets.

    `updated_at` grows with every real change, by the trigger that the fence creates. `Owned` shows
    a class that has it.
    """

    created_at = declared_attr(lambda _: _timestamp(sort_order=98))  # pyright: ignore[reportUnknownArgumentType, reportUnknownLambdaType]
    updated_at = declared_attr(lambda _: _timestamp(FetchedValue(), sort_order=99))  # pyright: ignore[reportUnknownArgumentType, reportUnknownLambdaType]


def owned_reference[T](
    target: InstrumentedAttribute[T] | str,
    *,
    primary_key: bool = False,
    index: bool = True,
    ondelete: Literal["CASCADE", "SET NULL", "RESTRICT", "NO ACTION"] = "CASCADE",
) -> MappedColumn[T]:
    """Return a column that names a row of another owned table, which belongs to the same user.

    Its foreign key is `(user_id, column)`. A foreign key on the column alone would accept another
    user's row, and tell which ids exist: PostgreSQL checks foreign keys without row-level security.
    Give a relationship over it this column alone, `relationship(foreign_keys=[task_id])`: two that
    both wrote `user_id` would conflict.

    ```python
    class TaskLabel(Owned, Base):
        __tablename__ = "task_labels"

        task_id: Mapped[int] = owned_reference(Task.id, primary_key=True)
        label_id: Mapped[int] = owned_reference(Label.id, primary_key=True)
    ```

    Args:
        target: The column that it names, such as `Label.id`; as a string, such as `"messages.id"`,
            for a row of the same table.
        primary_key: Whether it is a part of the primary key, as in a table that links two others.
        index: Whether to create an index on `(user_id, column)`, which deleting the other row
            needs. An index or key of the table that begins so is used instead.
        ondelete: What becomes of this row when the other one is deleted. `SET NULL` needs
            `Mapped[int | None]`, and leaves `user_id` as it is.
    """
    return mapped_column(
        primary_key=primary_key, info={_REFERENCE: _Reference(target, ondelete, index)}
    )


def _is_given_key(column: Column[Any]) -> bool:
    return column.identity is None and column.server_default is None


# Not `__init_subclass__`, which runs too early for a class that a decorator maps.
@event.listens_for(Mapper, "after_mapper_constructed")
def _protect(mapper: Mapper[Any], cls: type) -> None:
    """Complete and check the table of a class that derives from a mixin here."""
    if not isinstance(mapper.local_table, Table):
        return
    table = cast("Table", mapper.local_table)  # pyright: ignore[reportUnknownMemberType]
    if issubclass(cls, Owned):
        _own(table, cls.__fence__)
    elif issubclass(cls, Shared):
        fence.declare(table, "shared", {})
        fence.check(table)
    for column in table.c:
        if _REFERENCE in column.info:
            raise ConfigurationError(
                f"{table.fullname}.{column.name}: owned_reference() is for a class that derives "
                "from Owned"
            )
    if is_ours(table):
        _check_added(table)


def is_ours(table: Table) -> bool:
    """Whether the migrations of todo_db create a table."""
    return table.name in OUR_COLUMNS and table.schema is None


def _own(table: Table, options: FenceOptions) -> None:
    if OWNER in table.c:
        key = table.primary_key.columns.keys()
        if OWNER not in key and not _is_indexed(table, [OWNER, *key], unique=True):
            name = fence.object_name("uq", table.name, OWNER, *key)
            table.append_constraint(UniqueConstraint(OWNER, *key, name=name))
        for column in table.c:
            if reference := column.info.pop(_REFERENCE, None):
                _refer(table, column, reference)
    fence.declare(table, "owned", options)
    fence.check(table)


def _check_added(table: Table) -> None:
    """Refuse a column of an application that the writers of the table would have to fill."""
    for column in table.c:
        is_added = column.name not in OUR_COLUMNS[table.name]
        has_default = column.default is not None or column.onupdate is not None
        is_filled = column.nullable or column.server_default is not None
        if is_added and (has_default or not is_filled):
            raise ConfigurationError(
                f"{table.name}.{column.name} is added to a table of todo_db, whose repositories do "
                "not know it: make it nullable, or give it a server_default"
            )
    fence.check(table)


def _refer(table: Table, column: Column[Any], reference: _Reference) -> None:
    target, ondelete, has_index = reference
    subject = f"{table.fullname}.{column.name}"
    if isinstance(target, str):
        name, _, key = target.rpartition(".")
        if name not in {table.name, table.fullname} or key not in table.c:
            raise ConfigurationError(
                f"{subject}: a string names a column of the same table; name one of another class "
                "by its attribute, such as Label.id"
            )
        parent = table.c[key]
    else:
        parent = cast("Column[Any]", target.property.columns[0])
    if not _is_indexed(parent.table, [OWNER, parent.name], unique=True):
        raise ConfigurationError(
            f"{subject}: owned_reference() names a column of an owned table that is unique "
            f"together with {OWNER}, such as its primary key"
        )
    column.type = parent.type
    if ondelete == "SET NULL":
        if not column.nullable:
            raise ConfigurationError(f"{subject}: ondelete='SET NULL' needs Mapped[… | None]")
        # Without the list, user_id would become NULL as well.
        ondelete = f"SET NULL ({_quote(column.name)})"
    table.append_constraint(
        ForeignKeyConstraint(
            [table.c[OWNER], column],
            [parent.table.c[OWNER], parent],
            ondelete=ondelete,
            name=fence.object_name("fk", table.name, OWNER, column.name, parent.table.name),
        )
    )
    if has_index and not _is_indexed(table, [OWNER, column.name]):
        Index(fence.object_name("ix", table.name, OWNER, column.name), table.c[OWNER], column)


def _is_indexed(table: Table, names: list[str], *, unique: bool = False) -> bool:
    """Whether an index or a key of the table begins with these columns, in this order."""
    keys = [
        constraint.columns.values()
        for constraint in table.constraints
        if isinstance(constraint, PrimaryKeyConstraint | UniqueConstraint)
    ]
    keys += [index.columns.values() for index in table.indexes if index.unique or not unique]
    return any(
        [column.name for column in key][: None if unique else len(names)] == names for key in keys
    )


class Task(Owned, Timestamps, Base):
    """A task of one user. A class that derives from it adds columns to the table."""

    __tablename__ = "tasks"
    __table_args__ = (
        CheckConstraint(f"title ~ '{_VISIBLE}'", name="title_not_blank"),
        CheckConstraint(
            f"char_length(description) <= {DESCRIPTION_MAX}", name="description_length"
        ),
        CheckConstraint(_TIMESTAMPS, name="timestamps_range"),
        # A composite foreign key of a user's child table needs it to be unique.
        Index("idx_tasks_user_id", "user_id", "id", unique=True),
    )

    # Before user_id, so that PostgreSQL adds no padding to align it.
    id: Mapped[int] = mapped_column(
        BigInteger, Identity(always=True), primary_key=True, sort_order=-2
    )
    title: Mapped[str] = mapped_column(String(TITLE_MAX))
    description: Mapped[str | None] = mapped_column(Text)
    completed: Mapped[bool] = mapped_column(server_default=false())


class IdempotencyKey(Owned, Base):
    """The tasks that one call created, so that a repeated call is recognised by its key."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (
        CheckConstraint(f"char_length(key) BETWEEN 1 AND {KEY_MAX}", name="key_length"),
        CheckConstraint("char_length(fingerprint) = 64", name="fingerprint_length"),
        CheckConstraint(_CREATED, name="timestamps_range"),
    )

    key: Mapped[str] = mapped_column(Text, primary_key=True)
    fingerprint: Mapped[str] = mapped_column(Text)
    task_ids: Mapped[list[int]] = mapped_column(ARRAY(BigInteger))
    created_at: Mapped[datetime] = _timestamp()


# Only Better Auth writes the following tables. Their columns are those that its migrator expects:
# https://www.better-auth.com/docs/concepts/database


class Session(Base):
    """A session of Better Auth."""

    __tablename__ = "sessions"

    id: Mapped[str] = _text_id()
    user_id: Mapped[str] = _user_id(index=True)
    token: Mapped[str] = mapped_column(Text, unique=True)
    expires_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    ip_address: Mapped[str | None] = mapped_column(Text)
    user_agent: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = _timestamp()
    updated_at: Mapped[datetime] = _timestamp(FetchedValue())


class Account(Base):
    """A way to sign in: a password hash, or an account of another provider."""

    __tablename__ = "accounts"

    id: Mapped[str] = _text_id()
    user_id: Mapped[str] = _user_id(index=True)
    account_id: Mapped[str] = mapped_column(Text)
    provider_id: Mapped[str] = mapped_column(Text)
    access_token: Mapped[str | None] = mapped_column(Text)
    refresh_token: Mapped[str | None] = mapped_column(Text)
    id_token: Mapped[str | None] = mapped_column(Text)
    access_token_expires_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    refresh_token_expires_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    scope: Mapped[str | None] = mapped_column(Text)
    password: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = _timestamp()
    updated_at: Mapped[datetime] = _timestamp(FetchedValue())


class Verification(Base):
    """A verification code that Better Auth sent to a user."""

    __tablename__ = "verifications"

    id: Mapped[str] = _text_id()
    identifier: Mapped[str] = mapped_column(Text, index=True)
    value: Mapped[str] = mapped_column(Text)
    expires_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    created_at: Mapped[datetime] = _timestamp()
    updated_at: Mapped[datetime] = _timestamp(FetchedValue())


class SigningKey(Base):
    """A key pair that signs JWTs; Better Auth encrypts the private key with its secret."""

    __tablename__ = "jwks"

    id: Mapped[str] = _text_id()
    public_key: Mapped[str] = mapped_column(Text)
    private_key: Mapped[str] = mapped_column(Text)
    alg: Mapped[str | None] = mapped_column(Text)
    crv: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = _timestamp()
    expires_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


# A class of an application that derives from one above adds its columns and keys to its table.
OUR_COLUMNS.update(
    (table.name, frozenset(column.name for column in table.c))
    for table in Base.metadata.sorted_tables
)
OUR_NAMES: Final = frozenset(
    str(name)
    for table in Base.metadata.sorted_tables
    for name in (
        *(constraint.name for constraint in table.constraints),
        *(index.name for index in table.indexes),
    )
)
"""The names of their constraints and indexes."""
