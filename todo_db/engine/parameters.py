"""The keys after the `?` of a database URL, in tables.

A key is read, or it describes what happens anyway, or it is refused with what to do instead. No
key is dropped. A message names the key, never its value.
"""

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import parse_qsl, unquote

from todo_db.errors import ConfigurationError

# A lone surrogate is a byte of the environment that was not UTF-8.
_UNUSABLE: Final = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")

_READ: Final = (
    "application_name",
    "channel_binding",
    "connect_timeout",
    "host",
    "options",
    "pgbouncer",
    "port",
    "ssl",
    "sslmode",
    "sslnegotiation",
    "sslrootcert",
    "target_session_attrs",
)

# What asyncpg and todo_db do in any case. The values that say so are accepted.
_FIXED: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {
    "client_encoding": (("utf8", "UTF8"), "asyncpg always uses UTF-8"),
    "gssdelegation": (("0",), "asyncpg has no GSSAPI delegation"),
    "gssencmode": (
        ("disable", "prefer"),
        "asyncpg has no GSSAPI encryption, so use sslmode=verify-full",
    ),
    "load_balance_hosts": (("disable",), "asyncpg tries the hosts in the order of the URL"),
    "max_protocol_version": (("3.0", "3.2", "latest"), "asyncpg speaks version 3.0"),
    "min_protocol_version": (("3.0",), "asyncpg speaks version 3.0"),
    "schema": (("public",), "the tables of todo_db are in the schema public"),
    "ssl_max_protocol_version": (("TLSv1.3",), "TLS 1.2 and 1.3 are used"),
    "ssl_min_protocol_version": (("TLSv1.2",), "TLS 1.2 and 1.3 are used"),
    "sslcompression": (("0",), "TLS is never compressed"),
    "sslsni": (("1",), "asyncpg always sends the host name (SNI)"),
    "uselibpqcompat": (("true",), "sslmode means what it means to libpq"),
}

_LOGIN: Final = "write postgresql://user:password@host/database"
_PREPARED: Final = (
    "set TODO_DB_PREPARED_STATEMENTS=false if the pooler does not track prepared statements"
)
_DEAD_PEER: Final = "asyncpg cannot set it, so set TODO_DB_COMMAND_TIMEOUT_SECONDS"
_FILES: Final = "write the login into the URL, or the password into the file that PGPASSFILE names"
_CLIENT_CERTIFICATE: Final = "todo_db sends no client certificate, so log in with a password"
_REVOCATION: Final = "todo_db reads no revocation lists, so trust an authority for this server only"
_GSSAPI: Final = "todo_db does not log in by GSSAPI, so log in with a password"

_REFUSED: Final[Mapping[str, str]] = {
    "command_timeout": "set TODO_DB_COMMAND_TIMEOUT_SECONDS",
    "connection_limit": "set TODO_DB_POOL_SIZE and TODO_DB_MAX_OVERFLOW",
    "dbname": _LOGIN,
    "fallback_application_name": "write application_name",
    "gsslib": _GSSAPI,
    "hostaddr": "asyncpg cannot connect to one address and verify another name, so write host",
    "keepalives": _DEAD_PEER,
    "keepalives_count": _DEAD_PEER,
    "keepalives_idle": _DEAD_PEER,
    "keepalives_interval": _DEAD_PEER,
    "krbsrvname": _GSSAPI,
    "passfile": _FILES,
    "password": _LOGIN,
    "pool_timeout": "set TODO_DB_POOL_TIMEOUT_SECONDS",
    "prepared_statement_cache_size": _PREPARED,
    "prepared_statement_name_func": _PREPARED,
    "require_auth": "asyncpg cannot refuse a method, so verify the server by sslmode=verify-full",
    "requirepeer": "asyncpg cannot ask for the owner of a socket, so protect the socket's folder",
    "service": _FILES,
    "servicefile": _FILES,
    "socket_timeout": "set TODO_DB_COMMAND_TIMEOUT_SECONDS",
    "sslaccept": "write sslmode",
    "sslcert": _CLIENT_CERTIFICATE,
    "sslcertmode": _CLIENT_CERTIFICATE,
    "sslcrl": _REVOCATION,
    "sslcrldir": _REVOCATION,
    "sslkey": _CLIENT_CERTIFICATE,
    "sslpassword": _CLIENT_CERTIFICATE,
    "statement_cache_size": _PREPARED,
    "tcp_user_timeout": _DEAD_PEER,
    "user": _LOGIN,
}


def read_query(text: str) -> dict[str, str]:
    """Return the keys that decide something here, with their values.

    As for SQLAlchemy, and unlike libpq, a + is a blank.

    Raises:
        ConfigurationError: A key is unknown, is said twice, or cannot be honoured.
    """
    # Bytes that are not UTF-8 become lone surrogates, which no value may have.
    pairs = parse_qsl(text, keep_blank_values=True, errors="surrogateescape")
    _check_keys({key for key, _ in pairs})
    query: dict[str, str] = {}
    for key, value in pairs:
        if key in query:
            raise ConfigurationError(f"the database URL has {key} more than once: keep one of them")
        if not value:
            raise ConfigurationError(f"{key} of the database URL is empty: leave it out")
        check_text(key, value)
        query[key] = value
    for key, (values, _reason) in _FIXED.items():
        choice(query, key, values, values[0])
    return query


def _check_keys(keys: set[str]) -> None:
    # Refused keys come first: an unencoded & in `password` makes an unknown key out of a secret.
    for key, remedy in _REFUSED.items():
        if key in keys:
            raise ConfigurationError(f"the database URL cannot have {key}: {remedy}")
    if unknown := sorted(keys - {*_READ, *_FIXED}):
        names = _UNUSABLE.sub("?", ", ".join(unknown))
        raise ConfigurationError(
            f"the database URL has unknown keys: {names}. Known are {', '.join(_READ)}"
        )


def check_text(name: str, value: str) -> None:
    """Refuse what neither PostgreSQL nor a file system takes.

    Raises:
        ConfigurationError: There is a control character, or a byte that is not UTF-8.
    """
    if _UNUSABLE.search(value):
        raise ConfigurationError(
            f"{name} of the database URL has a control character, or bytes that are not UTF-8:"
            " remove them"
        )


def decoded(name: str, text: str) -> str:
    """Return a part of the URL without its percent-encoding.

    Raises:
        ConfigurationError: As for `check_text`.
    """
    value = unquote(text, errors="surrogateescape")
    check_text(name, value)
    return value


def choice(query: Mapping[str, str], key: str, values: tuple[str, ...], default: str) -> str:
    """Return the value of a key that has a few.

    Raises:
        ConfigurationError: It is none of them.
    """
    value = query.get(key, default)
    if value not in values:
        *most, last = values
        listed = f"{', '.join(most)} or {last}" if most else last
        reason = f": {_FIXED[key][1]}" if key in _FIXED else ""
        raise ConfigurationError(f"{key} of the database URL must be {listed}{reason}")
    return value
