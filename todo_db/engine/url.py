"""The database URL, as Neon and other services hand it out, and what the driver makes of it.

The rules are libpq's (https://www.postgresql.org/docs/current/libpq-connect.html), with these
differences on purpose; those about TLS are in `todo_db.engine.tls`:

- A raw @ is allowed at the end of the login only. libpq and SQLAlchemy take what follows the
  first one for the host, even where it is a piece of the password.
- A key that is said twice, or is empty, or cannot be honoured, is an error.
- `options` is refused. Poolers do not take it, and only the server knows which names it takes.
- Login, host, port and database that the URL leaves out are read from PGUSER, PGPASSWORD, the
  file of PGPASSFILE, PGHOST, PGPORT and PGDATABASE. No other variable counts.

No message repeats a URL or any part of its values.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv6Address
from typing import Any, Final

from sqlalchemy import URL

from todo_db.engine.parameters import check_text, choice, decoded, read_query
from todo_db.engine.tls import Tls, read_tls
from todo_db.errors import ConfigurationError

_DRIVER: Final = "postgresql+asyncpg"
_SCHEMES: Final = ("postgres", "postgresql", _DRIVER)
_PARTS: Final = re.compile(
    r"(?:(?P<user>[^:@/?]*)(?::(?P<password>[^@/]*))?@)?(?P<hosts>[^@/?]*)"
    r"(?:/(?P<database>[^@?]*))?(?:\?(?P<query>[^@]*))?",
    re.DOTALL,
)
# One of a list: a name, an address, or a socket's folder with its slashes encoded; its port.
_HOST_AND_PORT: Final = re.compile(
    r"(?:\[(?P<address>[^\[\]]+)\]|(?P<name>[^\[\]:]*))(?::(?P<port>[^:]*))?"
)
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9._-]*")
_NEON: Final = re.compile(r"(?:[^/]+\.)?neon\.(?:tech|build)\.?", re.IGNORECASE)
_POOLER: Final = re.compile(r"^([^.]+)-pooler(?=\.)")
# For clients that send no server name with TLS; asyncpg does.
_NEON_OPTIONS: Final = re.compile(r"(?:endpoint|project)=(?P<endpoint>[^\s.]+)")

_NUMBER: Final = re.compile(r"[0-9]{1,5}")
_SESSIONS: Final = ("any", "primary", "standby", "prefer-standby", "read-write", "read-only")
_ENCODE: Final = "write @ : / ? % in a user name or password as %40 %3A %2F %3F %25"
_BAD_HOST: Final = (
    "a host of the database URL is not a name, an IP address or a folder: write the port behind"
    " host: or in port=, an IPv6 address in brackets or in host=, the / of a folder as %2F, and"
    f" {_ENCODE}"
)
_DEFAULT_PORT: Final = 5432
_LONGEST_SECONDS: Final = 3600


@dataclass(frozen=True, slots=True, repr=False)
class Endpoint:
    """A database to connect to, and how.

    Attributes:
        url: Login, hosts and database, for SQLAlchemy's asyncpg dialect. A socket's folder, and
            a list of hosts, are in its query.
        tls: What the connections do about TLS.
        options: The other keywords of `asyncpg.connect` that the URL asks for.
        assumes_untracked_pooler: Whether the URL says `pgbouncer=true`: a pooler that does not
            track prepared statements is in front of the database.
    """

    url: URL
    tls: Tls
    options: Mapping[str, Any]
    assumes_untracked_pooler: bool

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts and folders of sockets, in the order in which they are tried."""
        return tuple(str(self.url.query.get("host", self.url.host or "")).split(","))

    @property
    def ssl_mode(self) -> str:
        """The mode in force, one of libpq's."""
        return self.tls.mode

    @property
    def demands_tls(self) -> bool:
        """Whether a connection without TLS is refused."""
        return self.tls.is_demanded

    @property
    def is_neon(self) -> bool:
        """Whether one of its hosts is Neon's."""
        return any(map(_is_neon, self.hosts))

    @property
    def is_pooled(self) -> bool:
        """Whether Neon's pooler stands in front of one of its hosts."""
        return any(_direct_host(host) != host for host in self.hosts)

    def libpq_url(self) -> URL:
        """Return the URL that psql and others of libpq's take, with what it says of TLS."""
        query = self.tls.libpq_query()
        if self.ssl_mode in {"allow", "disable"} and not all(map(_is_socket, self.hosts)):
            query["sslmode"] = self.ssl_mode
        if (session := self.options["target_session_attrs"]) != "any":
            query["target_session_attrs"] = session
        return self.url.set(drivername="postgresql").update_query_dict(query)

    def direct(self) -> "Endpoint":
        """Return the same database without Neon's pooler: what migrations need."""
        if not self.is_pooled:
            return self
        hosts = ",".join(map(_direct_host, self.hosts))
        if "host" in self.url.query:
            return replace(self, url=self.url.update_query_dict({"host": hosts}))
        return replace(self, url=self.url.set(host=hosts))

    def connect_args(self) -> dict[str, Any]:
        """Return the keywords of `asyncpg.connect`, with one TLS context to share.

        Raises:
            ConfigurationError: `sslrootcert` cannot be read.
        """
        return {**self.tls.connect_args(), **self.options}


def parse_url(text: str) -> Endpoint:
    """Read a URL as it was pasted: quoted or not, with any of PostgreSQL's scheme names.

    Raises:
        ConfigurationError: It cannot be read, is not PostgreSQL's, or says something that has
            no meaning here; names the key and what to do, never the value.
    """
    parts = _parts(text.strip().strip("'\"").strip())
    query = read_query(parts["query"])
    hosts, ports = _addresses(parts["hosts"], query)
    is_neon = any(map(_is_neon, hosts))
    _check_options(query, hosts, is_neon=is_neon)
    return Endpoint(
        url=_url(parts, hosts, ports),
        tls=read_tls(query, is_neon=is_neon, is_local=all(map(_is_socket, hosts))),
        options=_options(query),
        assumes_untracked_pooler=choice(query, "pgbouncer", ("true", "false"), "false") == "true",
    )


def _parts(text: str) -> dict[str, str]:
    scheme, _, rest = text.partition("://")
    if scheme.startswith("psql "):
        raise ConfigurationError("the database URL is a psql command: take the URL in it")
    if scheme not in _SCHEMES:
        driver = ", without another driver: todo_db connects by asyncpg" if "+" in scheme else ""
        raise ConfigurationError(f"the database URL must begin with postgresql://{driver}")
    match = _PARTS.fullmatch(rest)
    if match is None:
        raise ConfigurationError(
            "the database URL must be postgresql://user:password@host/database?key=value, with an"
            f" @ after the login only: {_ENCODE}"
        )
    return match.groupdict("")


def _url(parts: Mapping[str, str], hosts: Sequence[str], ports: Sequence[int | None]) -> URL:
    url = URL.create(
        _DRIVER,
        username=decoded("user", parts["user"]) or None,
        password=decoded("password", parts["password"]) or None,
        database=decoded("database", parts["database"]) or None,
    )
    if len(hosts) == 1 and not _is_socket(hosts[0]):
        return url.set(host=hosts[0], port=ports[0])
    query = {"host": ",".join(hosts)}
    # SQLAlchemy wants all of them, or that of the only folder if it is not the default.
    if len(hosts) > 1 or ports[0] is not None:
        query["port"] = ",".join(str(port or _DEFAULT_PORT) for port in ports)
    return url.set(query=query)


def _addresses(
    authority: str, query: Mapping[str, str]
) -> tuple[Sequence[str], Sequence[int | None]]:
    """Return as many ports as hosts. As for libpq, the query replaces what is before the path."""
    pairs = [_host_and_port(place) for place in authority.split(",")]
    names, numbers = (",".join(listed) for listed in zip(*pairs, strict=True))
    # asyncpg reads the variables too, but the rules have to see what it would connect to.
    names = query.get("host") or names or os.environ.get("PGHOST", "")
    numbers = query.get("port") or numbers or os.environ.get("PGPORT", "")
    hosts = [_host(name) for name in names.split(",")]
    if len(hosts) > 1 and not all(hosts):
        raise ConfigurationError("the database URL has an empty host in its list: take it out")
    ports = [_number("port", number, 65535) if number else None for number in numbers.split(",")]
    if len(ports) == 1:
        ports *= len(hosts)
    if len(ports) != len(hosts):
        raise ConfigurationError("port of the database URL must be one, or one for each host")
    return hosts, ports


def _host_and_port(place: str) -> tuple[str, str]:
    match = _HOST_AND_PORT.fullmatch(place)
    if match is None:
        raise ConfigurationError(_BAD_HOST)
    found = match.groupdict("")
    return decoded("host", found["address"] or found["name"]), found["port"]


def _host(text: str) -> str:
    check_text("host", text)
    if _is_socket(text):
        return text
    try:
        known = bool(IPv6Address(text) if ":" in text else _HOST_NAME.fullmatch(text))
    except ValueError:
        known = False
    if not known:
        raise ConfigurationError(_BAD_HOST)
    # One spelling: certificates and Neon's proxy compare it with theirs.
    return text.lower().rstrip(".") if _is_neon(text) else text


def _is_socket(host: str) -> bool:
    return host.startswith("/")


def _is_neon(host: str) -> bool:
    return bool(_NEON.fullmatch(host))


def _direct_host(host: str) -> str:
    return _POOLER.sub(r"\1", host) if _is_neon(host) else host


def _check_options(query: Mapping[str, str], hosts: Sequence[str], *, is_neon: bool) -> None:
    """Accept of `options` only what repeats the name of Neon's host."""
    options = query.get("options")
    endpoints = {_direct_host(host).partition(".")[0] for host in hosts}
    if options is None or (is_neon and _endpoint_of(options) in endpoints):
        return
    raise ConfigurationError(
        "the database URL cannot have options: let ALTER ROLE ... SET store a parameter, and"
        " choose an endpoint of Neon by its host"
    )


def _endpoint_of(options: str) -> str | None:
    match = _NEON_OPTIONS.fullmatch(options)
    return match["endpoint"].removesuffix("-pooler").lower() if match else None


def _options(query: Mapping[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {
        "server_settings": {"application_name": query.get("application_name", "todo_db")},
        # Said always, or asyncpg would read PGTARGETSESSIONATTRS.
        "target_session_attrs": choice(query, "target_session_attrs", _SESSIONS, "any"),
    }
    if "connect_timeout" in query:
        seconds = _number("connect_timeout", query["connect_timeout"], _LONGEST_SECONDS)
        options["timeout"] = float(seconds)
    return options


def _number(key: str, text: str, most: int) -> int:
    if not _NUMBER.fullmatch(text) or not 0 < int(text) <= most:
        raise ConfigurationError(f"{key} of the database URL must be a number from 1 to {most}")
    return int(text)
