"""Logins for an application: bound by row-level security, with timeouts of their own."""

import re
from collections.abc import Mapping
from secrets import token_urlsafe
from typing import Final, Literal

from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncConnection

from todo_db.engine import connect_failure, create_direct_engine, execute_unlogged, parse_url
from todo_db.errors import (
    ConfigurationError,
    TodoDBError,
    UnavailableError,
    causes,
    sqlstate_of,
)
from todo_db.settings import Settings

type LoginRole = Literal["todo_app", "todo_auth"]

_NAME: Final = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_RESERVED: Final = frozenset({"none", "postgres", "public", "todo_app", "todo_auth"})
_OTHER: Final[Mapping[LoginRole, LoginRole]] = {"todo_app": "todo_auth", "todo_auth": "todo_app"}
# Two runs in one database follow each other. Roles belong to the server, so a run in another
# database can still collide.
_LOCK: Final = "SELECT pg_advisory_xact_lock(7306001206)"
_PLACE: Final = """
    SELECT current_database(), quote_ident(current_database()),
        CASE WHEN current_setting('server_version_num')::integer >= 160000
            THEN ' WITH INHERIT TRUE, SET TRUE' ELSE '' END
"""
_EXISTS: Final = "SELECT to_regrole(:name) IS NOT NULL"
# What makes a role unfit, because it could pass row-level security. A superuser is a member of all.
_UNFIT: Final = """
    SELECT concat_ws(', and it ',
        CASE WHEN NOT rolcanlogin AND rolname <> :role
            THEN 'is a role that cannot log in' END,
        CASE WHEN EXISTS (SELECT FROM pg_roles b
                WHERE true IN (b.rolsuper, b.rolbypassrls, b.rolreplication)
                AND pg_has_role(r.oid, b.oid, 'MEMBER'))
            THEN 'bypasses row-level security, itself or by a role that it is a member of' END,
        CASE WHEN NOT rolsuper AND EXISTS (SELECT FROM pg_class
                WHERE relkind IN ('r', 'p', 'v', 'm', 'f')
                AND pg_has_role(r.oid, relowner, 'MEMBER'))
            THEN 'owns tables, itself or by a role that it is a member of' END,
        CASE WHEN NOT rolsuper AND EXISTS (SELECT FROM pg_roles o WHERE o.rolname = :other
                AND pg_has_role(r.oid, o.oid, 'MEMBER'))
            THEN 'is a member of ' || :other END,
        CASE WHEN NOT rolsuper AND rolname <> :login AND EXISTS (SELECT FROM pg_roles l
                WHERE l.rolname = :login AND pg_has_role(r.oid, l.oid, 'MEMBER'))
            THEN 'is a member of the login' END)
    FROM pg_roles r WHERE rolname = :name
"""
# A name that another session has just taken, as CREATE ROLE and as the index say it.
_TAKEN: Final = ("42710", "23505")
_CHANGED: Final = "tuple concurrently "


def check_name(name: str) -> None:
    """Refuse a name that a login cannot have.

    Raises:
        ConfigurationError: It has other characters, or belongs to PostgreSQL or to todo_db.
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            "the name of a login has lower-case letters, digits and underscores, and at most 63"
        )
    if name.startswith("pg_") or name in _RESERVED:
        raise ConfigurationError("this name is PostgreSQL's or todo_db's own: choose another one")


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
    timeouts again, in place of what was changed by hand. One transaction; an advisory lock makes
    the runs in one database follow each other.

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
        ConfigurationError: The name cannot be used, or is that of a role that cannot log in; the
            login or its role bypasses row-level security, owns tables or is a member of the other
            role; the role is missing: migrate first; the role of `url` may not create or grant
            roles. Nothing is changed.
        UnavailableError: Another session changed the same role at the same time. Nothing is
            changed.
    """
    check_name(name)
    password = token_urlsafe(24)
    engine = create_direct_engine(url, settings)
    try:
        # A snapshot of before the wait for the lock would not contain a role that is new since.
        async with engine.execution_options(isolation_level="READ COMMITTED").begin() as connection:
            exists, database = await _alter(
                connection, settings, name, role, password, new_password=new_password
            )
    except Exception as error:  # noqa: BLE001  # raised again, as ours
        failure = _failure(error, role, engine.url)
    else:
        if exists and not new_password:
            return None
        place = parse_url(url).libpq_url()
        # Without a name in the URL, the database would be that of the login's name.
        database = place.database or database
        return place.set(username=name, password=password, database=database)
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
) -> tuple[bool, str]:
    await connection.exec_driver_sql(_LOCK)
    if not await connection.scalar(text(_EXISTS), {"name": role}):
        raise ConfigurationError(f"there is no role {role}: run `todo-db migrate` first")
    exists = bool(await connection.scalar(text(_EXISTS), {"name": name}))
    names = {"role": role, "login": name, "other": _OTHER[role]}
    for subject, called in ((role, f"the role {role}"), (name, "the login")):
        unfit = await connection.scalar(text(_UNFIT), names | {"name": subject})
        if unfit:
            raise ConfigurationError(f"{called} {unfit}")
    found = (await connection.exec_driver_sql(_PLACE)).one()
    # Before PostgreSQL 16 the login inherits, or not, all that it is a member of.
    database, quoted, options = map(str, found)
    # The password has no character that needs a quote, and Neon accepts no hash of it.
    verb = "ALTER" if exists else "CREATE"
    secret = f" PASSWORD '{password}'" if new_password or not exists else ""
    await execute_unlogged(connection, f'{verb} ROLE "{name}" LOGIN INHERIT{secret}')
    await connection.exec_driver_sql(f'GRANT {role} TO "{name}"{options}')
    for parameter, value in role_settings(settings).items():
        # A setting for one database would win over that of the login.
        here = f'ALTER ROLE "{name}" IN DATABASE {quoted} RESET {parameter}'
        await connection.exec_driver_sql(here)
        await connection.exec_driver_sql(f'ALTER ROLE "{name}" SET {parameter} = {value}')
    return exists, database


def _failure(error: Exception, role: LoginRole, url: URL) -> TodoDBError:
    sqlstate = sqlstate_of(error)
    if sqlstate == "42501":
        return ConfigurationError(
            f"the role of the database URL may not create this login, or not grant {role} to it:"
            " run this as the owner of the database, the role that ran `todo-db migrate`; it needs"
            f" CREATEROLE, and the ADMIN OPTION of {role} and of a login that exists, which the"
            " role that created these, or a superuser, can grant"
        )
    if sqlstate in _TAKEN or any(_CHANGED in str(cause) for cause in causes(error)):
        return UnavailableError(
            "another session changed the same role at the same time: run this again",
            transient=True,
        )
    return connect_failure(error, url)


def role_settings(settings: Settings) -> dict[str, str]:
    """Return the parameters of a call, which a BEGIN sets, and a single statement cannot.

    For single statements, the login has them.
    """
    return {
        "search_path": "public, pg_temp",
        "statement_timeout": _milliseconds(settings.statement_timeout_seconds),
        "lock_timeout": _milliseconds(settings.lock_timeout_seconds),
        "idle_in_transaction_session_timeout": _milliseconds(
            settings.idle_in_transaction_timeout_seconds
        ),
        "default_transaction_isolation": "'read committed'",
    }


def _milliseconds(seconds: float) -> str:
    return str(max(1, round(seconds * 1000)))
