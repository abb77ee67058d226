"""The database URL, as Neon and everybody else hand it out, and what the driver makes of it.

The rules are libpq's (https://www.postgresql.org/docs/current/libpq-connect.html), except that on
Neon the certificate is always verified. No message repeats a URL or any part of its values.
"""

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from todo_db.errors import ConfigurationError

_DRIVERS: Final = frozenset({"postgres", "postgresql", "postgresql+asyncpg"})
_NEON: Final = re.compile(r"(^|\.)neon\.(tech|build)$", re.IGNORECASE)
_POOLER: Final = re.compile(r"^([^.]+)-pooler(?=\.)")
# For clients that send no server name with TLS; asyncpg does, and the server refuses it.
_ENDPOINT: Final = re.compile(r"(^|\s+)(endpoint|project)=\S+")

_LONGEST_SECONDS: Final = 3600

# libpq's names, from no wish for TLS to the full check.
_SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_OPTIONAL_TLS: Final = frozenset({"disable", "allow", "prefer"})
# What other clients need and asyncpg does not: SCRAM channel binding, which it does not speak
# (the certificate is verified instead), socket options of libpq's, and the pool of Prisma's.
_IGNORED: Final = frozenset(
    {
        "channel_binding",
        "connection_limit",
        "gssencmode",
        "keepalives",
        "keepalives_count",
        "keepalives_idle",
        "keepalives_interval",
        "pgbouncer",
        "pool_timeout",
        "schema",
        "sslsni",
    }
)
_KNOWN: Final = frozenset(
    {
        "application_name",
        "connect_timeout",
        "host",
        "options",
        "port",
        "ssl",
        "sslmode",
        "sslnegotiation",
        "sslrootcert",
    }
)


@dataclass(frozen=True, slots=True, repr=False)
class Endpoint:
    """A database to connect to, and how.

    Attributes:
        url: Login, host and database, for SQLAlchemy's asyncpg dialect.
        ssl_mode: One of libpq's words.
        ssl_root: A file with certificates to trust; None for the system's.
        options: The other keywords of `asyncpg.connect` that the URL asks for.
    """

    url: URL
    ssl_mode: str
    ssl_root: str | None
    options: Mapping[str, Any]

    @property
    def is_neon(self) -> bool:
        """Whether it is one of Neon's hosts."""
        return bool(_NEON.search(self.url.host or ""))

    @property
    def is_pooled(self) -> bool:
        """Whether Neon's pooler stands in front of it."""
        return self.is_neon and bool(_POOLER.match(self.url.host or ""))

    @property
    def demands_tls(self) -> bool:
        """Whether a connection without TLS is refused."""
        return self.ssl_mode not in _OPTIONAL_TLS

    def libpq_url(self) -> URL:
        """Return the URL that psql and others of libpq's take, with what it says of TLS."""
        query = {"sslmode": self.ssl_mode, "sslrootcert": self.ssl_root or "system"}
        url = self.url.set(drivername="postgresql")
        if self.ssl_mode == "require" and self.ssl_root is None:
            del query["sslrootcert"]
        return url.update_query_dict(query) if self.demands_tls else url

    def direct(self) -> "Endpoint":
        """Return the same database without Neon's pooler: what migrations need."""
        if not self.is_pooled:
            return self
        host = _POOLER.sub(r"\1", self.url.host or "")
        return Endpoint(self.url.set(host=host), self.ssl_mode, self.ssl_root, self.options)

    def connect_args(self) -> dict[str, Any]:
        """Return the keywords of `asyncpg.connect`, with one TLS context to share.

        Raises:
            ConfigurationError: `sslrootcert` cannot be read.
        """
        return {"ssl": self._tls(), **self.options}

    def _tls(self) -> ssl.SSLContext | str:
        if not self.demands_tls:
            return self.ssl_mode
        try:
            # asyncpg would read the certificates of the system again for each connection.
            context = ssl.create_default_context(cafile=self.ssl_root)
        except OSError:
            failure = ConfigurationError("sslrootcert of the database URL cannot be read")
        else:
            context.set_alpn_protocols(["postgresql"])
            if self.ssl_mode != "verify-full":
                context.check_hostname = False
            if self.ssl_mode == "require" and self.ssl_root is None:
                context.verify_mode = ssl.CERT_NONE
            return context
        raise failure


def parse_url(text: str) -> Endpoint:
    """Read a URL as it was pasted: quoted or not, with any of PostgreSQL's scheme names.

    Raises:
        ConfigurationError: It cannot be read, is not PostgreSQL's, or says something that has
            no meaning here; names the key, never the value.
    """
    text = text.strip().strip("'\"").strip()
    if text.startswith("psql "):
        raise ConfigurationError("the database URL is a psql command: take the URL in it")
    url = _parsed(text)
    query = _single_values(url)
    unknown = query.keys() - _KNOWN - _IGNORED
    if unknown:
        raise ConfigurationError(f"the database URL has unknown keys: {', '.join(sorted(unknown))}")
    return _endpoint(url, query)


def _parsed(text: str) -> URL:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        failure = ConfigurationError("the database URL cannot be read")
    else:
        if url.drivername not in _DRIVERS:
            raise ConfigurationError("the database URL must begin with postgresql://")
        if not 0 < (url.port or 5432) < 2**16:
            raise ConfigurationError("the port of the database URL is out of range")
        return url.set(drivername="postgresql+asyncpg")
    raise failure


def _single_values(url: URL) -> dict[str, str]:
    query: dict[str, str] = {}
    for key, value in url.query.items():
        if not isinstance(value, str):
            raise ConfigurationError(f"the database URL says {key} more than once")
        query[key] = value
    return query


def _endpoint(url: URL, query: Mapping[str, str]) -> Endpoint:
    # A socket's folder is the one thing SQLAlchemy itself has to see in the query.
    place = {key: query[key] for key in ("host", "port") if key in query}
    url = url.set(query=place)
    is_neon = bool(_NEON.search(url.host or ""))
    return Endpoint(
        url=url,
        ssl_mode=_ssl_mode(query, is_neon=is_neon),
        ssl_root=_ssl_root(query),
        options=_options(query, is_neon=is_neon),
    )


def _ssl_mode(query: Mapping[str, str], *, is_neon: bool) -> str:
    mode = query.get("sslmode", query.get("ssl", "require" if is_neon else "prefer"))
    if mode not in _SSL_MODES:
        raise ConfigurationError(f"sslmode of the database URL must be {', '.join(_SSL_MODES)}")
    if not is_neon:
        return mode
    if mode in _OPTIONAL_TLS:
        raise ConfigurationError("Neon needs TLS: sslmode of the database URL must be require")
    return "verify-full"


def _ssl_root(query: Mapping[str, str]) -> str | None:
    root = query.get("sslrootcert")
    return None if root == "system" else root


def _options(query: Mapping[str, str], *, is_neon: bool) -> dict[str, Any]:
    options: dict[str, Any] = {}
    server = {"application_name": query.get("application_name", "todo_db")}
    wanted = query.get("options", "")
    if is_neon:
        wanted = _ENDPOINT.sub("", wanted).strip()
    if wanted:
        server["options"] = wanted
    options["server_settings"] = server
    match query.get("sslnegotiation", "postgres"):
        case "direct":
            options["direct_tls"] = True
        case "postgres":
            pass
        case _:
            raise ConfigurationError(
                "sslnegotiation of the database URL must be direct or postgres"
            )
    if "connect_timeout" in query:
        options["timeout"] = _seconds(query["connect_timeout"])
    return options


def _seconds(value: str) -> float:
    if not value.isascii() or not value.isdigit() or not 0 < int(value) <= _LONGEST_SECONDS:
        raise ConfigurationError("connect_timeout of the database URL must be whole seconds")
    return float(value)
