"""The tables as the migrations leave them: what statements are built from, and Alembic's target.

They are never handed out: a repository returns records. What Alembic cannot compare (policies,
grants, triggers, checks, identity) is held against the live database by the tests.
"""

from datetime import datetime
from typing import Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    DateTime,
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
"""The migration that leaves the tables like this; a newer database serves as well."""

USER_ID_MAX: Final = 255
KEY_MAX: Final = 255
TITLE_MAX: Final = 200
DESCRIPTION_MAX: Final = 65_536

# What counts as blank in a title: controls, spaces, and the invisible format characters.
_VISIBLE: Final = (
    r"[^\u0001-\u0020\u007f-\u00a0\u00ad\u1680\u180e\u2000-\u200f\u2028-\u202f"
    r"\u205f-\u2064\u2066-\u206f\u3000\ufeff]"
)
# Python's datetime has no infinity and no years BC; the margin leaves room for any time zone.
_TIMESTAMPS: Final = (
    "created_at >= '0001-01-02 00:00:00+00' AND created_at < '9999-12-31 00:00:00+00' AND "
    "updated_at >= '0001-01-02 00:00:00+00' AND updated_at < '9999-12-31 00:00:00+00'"
)


class Base(DeclarativeBase):
    """The one metadata. Constraint names are API: errors are mapped by them."""

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


def _timestamp() -> Mapped[datetime]:
    return mapped_column(DateTime(timezone=True), server_default=func.now())


class User(Base):
    """A person. Better Auth writes the same rows, so every column it needs is here."""

    __tablename__ = "users"
    __table_args__ = (
        CheckConstraint(f"char_length(id) BETWEEN 1 AND {USER_ID_MAX}", name="id_length"),
        # ASCII only, on purpose: the same answer under every locale.
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
    updated_at: Mapped[datetime] = _timestamp()


class Task(Base):
    """Something one user wants to do."""

    __tablename__ = "tasks"
    __table_args__ = (
        CheckConstraint(f"title ~ '{_VISIBLE}'", name="title_not_blank"),
        CheckConstraint(
            f"char_length(description) <= {DESCRIPTION_MAX}", name="description_length"
        ),
        CheckConstraint(_TIMESTAMPS, name="timestamps_range"),
        Index("idx_tasks_user_id", "user_id", "id"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    user_id: Mapped[str] = _user_id()
    title: Mapped[str] = mapped_column(String(TITLE_MAX))
    description: Mapped[str | None] = mapped_column(Text)
    completed: Mapped[bool] = mapped_column(server_default=false())
    created_at: Mapped[datetime] = _timestamp()
    updated_at: Mapped[datetime] = _timestamp()


class IdempotencyKey(Base):
    """Which tasks a user's call made, so that the same call can be told from a new one."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (
        CheckConstraint(f"char_length(key) BETWEEN 1 AND {KEY_MAX}", name="key_length"),
        CheckConstraint("char_length(fingerprint) = 64", name="fingerprint_length"),
    )

    user_id: Mapped[str] = _user_id(primary_key=True)
    key: Mapped[str] = mapped_column(Text, primary_key=True)
    fingerprint: Mapped[str] = mapped_column(Text)
    task_ids: Mapped[list[int]] = mapped_column(ARRAY(BigInteger))
    created_at: Mapped[datetime] = _timestamp()


# What Better Auth writes, column by column as its own planner wants it
# (https://www.better-auth.com/docs/concepts/database). Only it writes them.


class Session(Base):
    """A sign-in of Better Auth's."""

    __tablename__ = "sessions"

    id: Mapped[str] = _text_id()
    user_id: Mapped[str] = _user_id(index=True)
    token: Mapped[str] = mapped_column(Text, unique=True)
    expires_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    ip_address: Mapped[str | None] = mapped_column(Text)
    user_agent: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = _timestamp()
    updated_at: Mapped[datetime] = _timestamp()


class Account(Base):
    """A way to sign in: a password's hash, or another provider's account."""

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
    updated_at: Mapped[datetime] = _timestamp()


class Verification(Base):
    """A code that somebody was sent."""

    __tablename__ = "verifications"

    id: Mapped[str] = _text_id()
    identifier: Mapped[str] = mapped_column(Text, index=True)
    value: Mapped[str] = mapped_column(Text)
    expires_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    created_at: Mapped[datetime] = _timestamp()
    updated_at: Mapped[datetime] = _timestamp()


class SigningKey(Base):
    """A key that Better Auth signs tokens with; the private half is encrypted by its secret."""

    __tablename__ = "jwks"

    id: Mapped[str] = _text_id()
    public_key: Mapped[str] = mapped_column(Text)
    private_key: Mapped[str] = mapped_column(Text)
    alg: Mapped[str | None] = mapped_column(Text)
    crv: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = _timestamp()
    expires_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
