"""The tables that the migrations create: the base of all statements, and Alembic's target.

A repository returns records, never these models. Alembic does not compare policies, grants,
triggers, checks and identity columns; the tests compare them with a live database.
"""

from datetime import datetime
from typing import Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    DateTime,
    FetchedValue,
    ForeignKey,
    Identity,
    Index,
    MetaData,
    String,
    Text,
    false,
    func,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

REVISION: Final = "0004"
"""The migration that creates these tables; a newer database works as well."""

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
_TIMESTAMPS: Final = (
    f"{_CREATED} AND "
    "updated_at >= '0001-01-02 00:00:00+00' AND updated_at < '9999-12-31 00:00:00+00'"
)


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


def _user_id(*, index: bool = False, primary_key: bool = False) -> Mapped[str]:
    return mapped_column(
        Text, ForeignKey("users.id", ondelete="CASCADE"), index=index, primary_key=primary_key
    )


def _timestamp(*, server_onupdate: FetchedValue | None = None) -> Mapped[datetime]:
    return mapped_column(
        DateTime(timezone=True), server_default=func.now(), server_onupdate=server_onupdate
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
    updated_at: Mapped[datetime] = _timestamp(server_onupdate=FetchedValue())


class Task(Base):
    """A task of one user."""

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

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    user_id: Mapped[str] = _user_id()
    title: Mapped[str] = mapped_column(String(TITLE_MAX))
    description: Mapped[str | None] = mapped_column(Text)
    completed: Mapped[bool] = mapped_column(server_default=false())
    created_at: Mapped[datetime] = _timestamp()
    updated_at: Mapped[datetime] = _timestamp(server_onupdate=FetchedValue())


class IdempotencyKey(Base):
    """The tasks that one call created, so that a repeated call is recognised by its key."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (
        CheckConstraint(f"char_length(key) BETWEEN 1 AND {KEY_MAX}", name="key_length"),
        CheckConstraint("char_length(fingerprint) = 64", name="fingerprint_length"),
        CheckConstraint(_CREATED, name="timestamps_range"),
    )

    user_id: Mapped[str] = _user_id(primary_key=True)
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
    updated_at: Mapped[datetime] = _timestamp(server_onupdate=FetchedValue())


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
    updated_at: Mapped[datetime] = _timestamp(server_onupdate=FetchedValue())


class Verification(Base):
    """A verification code that Better Auth sent to a user."""

    __tablename__ = "verifications"

    id: Mapped[str] = _text_id()
    identifier: Mapped[str] = mapped_column(Text, index=True)
    value: Mapped[str] = mapped_column(Text)
    expires_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    created_at: Mapped[datetime] = _timestamp()
    updated_at: Mapped[datetime] = _timestamp(server_onupdate=FetchedValue())


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
