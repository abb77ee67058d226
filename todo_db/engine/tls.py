"""TLS: the mode that is in force, and the context that the driver gets.

The rules are libpq's (https://www.postgresql.org/docs/current/libpq-ssl.html). `sslmode` and
`sslrootcert` decide together. These differences are on purpose:

- On Neon the mode is verify-full, whatever the URL asks for, and the certificates to trust are
  the system's unless the URL names a file. That is why `channel_binding=require`, which asyncpg
  cannot do, is accepted there, and refused elsewhere: both keep an impostor from the login.
- verify-full without a root certificate trusts the system's. libpq refuses to connect.
- disable, allow and prefer refuse `sslrootcert`, because they would not keep an impostor away.
  libpq ignores the file, or goes on in clear text after it refused a certificate.
- A file that cannot be read is an error. libpq's `require` then verifies nothing.
- A certificate that a file vouches for may break RFC 5280 in details, as for libpq. Python's
  default contexts are stricter; that stays so for the system's authorities.
- Variables such as PGSSLMODE, ~/.postgresql/root.crl and client certificates are not read.

asyncpg has these rules too, but it reads the files again for each connection, while the event
loop waits, and it knows neither `sslrootcert=system` nor Neon. Here one context serves all
connections. allow and prefer are asyncpg's own, because they need its second try.
"""

import os.path
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from todo_db.engine.parameters import choice
from todo_db.errors import ConfigurationError

# Where the certificates to trust come from: from nowhere, from ~/.postgresql/root.crt, or as
# `sslrootcert` says.
type _Root = Literal["none", "home", "system", "file"]

_HOME_ROOT: Final = "~/.postgresql/root.crt"

# The mode in force, by `sslmode` and the root. What is not there is refused.
_MODES: Final[Mapping[str, Mapping[_Root, str]]] = {
    "": {"none": "prefer", "home": "prefer", "system": "verify-full"},
    "disable": {"none": "disable", "home": "disable"},
    "allow": {"none": "allow", "home": "allow"},
    "prefer": {"none": "prefer", "home": "prefer"},
    "require": {"none": "require", "home": "verify-ca", "file": "verify-ca"},
    "verify-ca": {"home": "verify-ca", "file": "verify-ca"},
    "verify-full": {
        "none": "verify-full",
        "home": "verify-full",
        "system": "verify-full",
        "file": "verify-full",
    },
}
_REMEDIES: Final[Mapping[_Root, str]] = {
    "none": "sslmode=verify-ca of the database URL needs sslrootcert: name a file",
    "system": "sslrootcert=system of the database URL needs sslmode=verify-full",
    "file": "sslrootcert of the database URL needs sslmode=verify-full, verify-ca or require",
}
_SSL_MODES: Final = tuple(filter(None, _MODES))
_OPTIONAL: Final = frozenset({"disable", "allow", "prefer"})


@dataclass(frozen=True, slots=True, repr=False)
class Tls:
    """What a connection does about TLS.

    Attributes:
        mode: The mode in force, one of libpq's. `require` verifies nothing.
        root: A file with the certificates to trust; None for the system's.
        direct: Whether TLS begins at once, without PostgreSQL's own request for it.
    """

    mode: str
    root: str | None
    direct: bool

    @property
    def is_demanded(self) -> bool:
        """Whether a connection without TLS is refused."""
        return self.mode not in _OPTIONAL

    def libpq_query(self) -> dict[str, str]:
        """Return the keys that make libpq do the same, as far as TLS is demanded."""
        match self.mode:
            case "verify-ca" | "verify-full":
                return {"sslmode": self.mode, "sslrootcert": self.root or "system"}
            case "require":
                return {"sslmode": self.mode}
            case _:
                return {}

    def connect_args(self) -> dict[str, Any]:
        """Return the keywords of `asyncpg.connect`, with one context to share.

        Raises:
            ConfigurationError: `sslrootcert` cannot be read.
        """
        ssl_argument = self._context() if self.is_demanded else self.mode
        return {"ssl": ssl_argument, "direct_tls": self.direct}

    def _context(self) -> ssl.SSLContext:
        if self.mode == "verify-full" and self.root is None:
            context = ssl.create_default_context()
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = self.mode == "verify-full"
        if self.mode == "require":
            context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["postgresql"])
        try:
            if self.root is not None:
                context.load_verify_locations(self.root)
        except OSError:
            failure = ConfigurationError(
                "the root certificate (sslrootcert of the database URL, or ~/.postgresql/root.crt)"
                " cannot be read: name a file in PEM format"
            )
        else:
            return context
        raise failure


def read_tls(query: Mapping[str, str], *, is_neon: bool, is_local: bool) -> Tls:
    """Return what the keys about TLS mean together.

    Args:
        query: Keys of the URL.
        is_neon: Whether a host is Neon's.
        is_local: Whether all hosts are Unix sockets, which have no TLS.

    Raises:
        ConfigurationError: A value is unknown, or the keys contradict one another.
    """
    root, file = _root(query, is_neon=is_neon)
    mode = _mode(query, root, is_neon=is_neon)
    binding = choice(query, "channel_binding", ("disable", "prefer", "require"), "prefer")
    if binding == "require" and not is_neon:
        raise ConfigurationError(
            "the database URL cannot have channel_binding=require, which asyncpg does not know:"
            " write sslmode=verify-full instead"
        )
    direct = choice(query, "sslnegotiation", ("postgres", "direct"), "postgres") == "direct"
    if direct and mode in _OPTIONAL:
        raise ConfigurationError(
            "sslnegotiation=direct of the database URL needs sslmode=require or verify-full"
        )
    if is_local:
        return Tls("disable", None, direct=False)
    return Tls(mode, file, direct)


def _mode(query: Mapping[str, str], root: _Root, *, is_neon: bool) -> str:
    asked = _asked_mode(query)
    if is_neon:
        if asked in _OPTIONAL:
            raise ConfigurationError("Neon needs TLS: sslmode of the database URL must be require")
        return "verify-full"
    mode = _MODES[asked].get(root)
    if mode is None:
        raise ConfigurationError(_REMEDIES[root])
    return mode


def _asked_mode(query: Mapping[str, str]) -> str:
    if "ssl" not in query:
        return choice(query, "sslmode", _SSL_MODES, "") if "sslmode" in query else ""
    if "sslmode" in query:
        raise ConfigurationError("the database URL has ssl and sslmode: keep sslmode")
    # `ssl=true` is JDBC's, and libpq takes it; the other words are SQLAlchemy's and asyncpg's.
    asked = choice(query, "ssl", ("true", *_SSL_MODES), "")
    return "require" if asked == "true" else asked


def _root(query: Mapping[str, str], *, is_neon: bool) -> tuple[_Root, str | None]:
    given = query.get("sslrootcert", "system" if is_neon else None)
    if given == "system":
        return "system", None
    if given is not None:
        return "file", given
    # Without a home, or without leave to look into it, there is no such file: pathlib raises.
    home = os.path.expanduser(_HOME_ROOT)  # noqa: PTH111
    return ("home", home) if os.path.isfile(home) else ("none", None)  # noqa: PTH113
