"""Logins for an application: bound by row-level security, with timeouts of their own."""

import re
from secrets import token_urlsafe
from typing import Final, Literal

from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncConnection

from todo_db.engine import create_direct_engine, parse_url
from todo_db.errors import ConfigurationError, translated
from todo_db.settings import Settings

type LoginRole = Literal["todo_app", "todo_auth"]

_NAME: Final = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_RESERVED: Final = frozenset({"none", "postgres", "public", "todo_app", "todo_auth"})
_EXISTS: Final = "SELECT to_regrole(:name) IS NOT NULL"
# Each is a way past row-level security, or one that would be.
_UNFIT: Final = """
    SELECT rolsuper OR rolbypassrls OR EXISTS (
        SELECT FROM pg_class WHERE relkind IN ('r', 'p', 'v', 'm', 'f')
            AND pg_has_role(r.oid, relowner, 'MEMBER'))
    FROM pg_roles r WHERE rolname = :name
"""


async def create_login(
    url: str,
    settings: Settings,
    name: str,
    *,
    role: LoginRole = "todo_app",
    new_password: bool = False,
) -> URL | None:
    """Create a login that is a member of one role, with the timeouts of `settings`.

    Safe to repeat: a login that exists keeps its password, and gets the membership and the
    timeouts again. One transaction; the roles are locked until it ends.

    Args:
        url: The database, as its owner. The direct endpoint is used.
        settings: Whose timeouts the login gets.
        name: Lower-case letters, digits and underscores.
        role: `todo_app` for the application, `todo_auth` for Better Auth.
        new_password: Replace the password of a login that exists.

    Returns:
        The URL of the login with its new password, on the endpoint of `url`; None if the login
        existed and keeps its password.

    Raises:
        ConfigurationError: The name cannot be used, or the login bypasses row-level security, or
            the role is missing: migrate first.
        IsolationError: The role of `url` may not create or grant roles.
    """
    if not _NAME.fullmatch(name) or name.startswith("pg_") or name in _RESERVED:
        raise ConfigurationError("the name of a login has lower-case letters, digits, underscores")
    password = token_urlsafe(24)
    engine = create_direct_engine(url, settings)
    try:
        async with engine.begin() as connection:
            exists = await _alter(
                connection, settings, name, role, password, new_password=new_password
            )
    except Exception as error:  # noqa: BLE001  # raised again, as ours
        failure = translated(error)
    else:
        if exists and not new_password:
            return None
        return parse_url(url).libpq_url().set(username=name, password=password)
    finally:
        await engine.dispose()
    raise failure


async def _alter(  # noqa: PLR0913  # what a login is made of
    connection: AsyncConnection,
    settings: Settings,
    name: str,
    role: LoginRole,
    password: str,
    *,
    new_password: bool,
) -> bool:
    async def is_true(sql: str, value: str) -> bool:
        return bool(await connection.scalar(text(sql), {"name": value}))

    if not await is_true(_EXISTS, role):
        raise ConfigurationError(f"there is no role {role}: run `todo-db migrate` first")
    exists = await is_true(_EXISTS, name)
    if exists and await is_true(_UNFIT, name):
        raise ConfigurationError("the login bypasses row-level security or owns tables")
    # The password has no character that needs a quote, and Neon accepts no hash of it.
    if not exists:
        await connection.execute(
            text(f"CREATE ROLE \"{name}\" LOGIN INHERIT PASSWORD '{password}'")
        )
    elif new_password:
        await connection.execute(text(f"ALTER ROLE \"{name}\" LOGIN INHERIT PASSWORD '{password}'"))
    await connection.execute(text(f'GRANT {role} TO "{name}"'))
    for parameter, value in role_settings(settings).items():
        await connection.execute(text(f'ALTER ROLE "{name}" SET {parameter} = {value}'))
    return exists


def role_settings(settings: Settings) -> dict[str, str]:
    """Return the parameters that a login has of its own, because one round trip cannot set them."""
    return {
        "statement_timeout": _milliseconds(settings.statement_timeout_seconds),
        "lock_timeout": _milliseconds(settings.lock_timeout_seconds),
        "idle_in_transaction_session_timeout": _milliseconds(
            settings.idle_in_transaction_timeout_seconds
        ),
        "default_transaction_isolation": "'read committed'",
        "search_path": "public, pg_temp",
    }


def _milliseconds(seconds: float) -> str:
    return str(max(1, round(seconds * 1000)))
