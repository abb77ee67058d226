"""Which pages may send a request with the user's cookie.

A browser adds the cookie to requests of every page on the same host, whatever its port, and to some
requests of other sites. It also says where the page is from, in the headers `Origin` and
`Sec-Fetch-Site`. Clients that are not browsers send neither.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import urlsplit

from todo_db.errors import ConfigurationError

_PORTS: Final = {"http": 80, "https": 443}
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
# `https://*.example.org`, or without the scheme, as Better Auth has it.
_SUBDOMAINS: Final = re.compile(r"(?:(https?)://)?\*\.([a-z0-9.-]+(?::[0-9]+)?)")


def origin_of(url: str, setting: str) -> str:
    """Return the origin of a URL as browsers write it: scheme, host, and an unusual port.

    Raises:
        ConfigurationError: It is no http or https URL. Names the setting.
    """
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ConfigurationError(f"{setting} must be a URL such as https://todo.example.org")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{'' if port in {None, _PORTS[parts.scheme]} else f':{port}'}"


def can_change_something(method: str | None) -> bool:
    """Return whether a request can have an effect; None is the method of a WebSocket."""
    return method not in _SAFE_METHODS


@dataclass(frozen=True, slots=True)
class Origins:
    """The rule for requests whose credential is a cookie.

    Attributes:
        trusted: Origins whose pages may send such requests.
        subdomains: Patterns of such origins.
        strict: Whether a request without both headers is refused.
    """

    trusted: frozenset[str]
    subdomains: tuple[re.Pattern[str], ...] = ()
    strict: bool = False

    @classmethod
    def of(cls, listed: Iterable[str], *, strict: bool = False) -> Self:
        """Read origins such as `https://todo.example.org`, and `https://*.example.org`.

        Raises:
            ConfigurationError: An item has a wildcard in another place.
        """
        exact: set[str] = set()
        patterns: list[re.Pattern[str]] = []
        for item in (each.rstrip("/").lower() for each in listed):
            if not {"*", "?"} & set(item):
                exact.add(item)
            elif found := _SUBDOMAINS.fullmatch(item):
                scheme, host = found.group(1) or "https?", re.escape(found.group(2))
                patterns.append(re.compile(rf"{scheme}://(?:[a-z0-9-]+\.)+{host}"))
            else:
                raise ConfigurationError(
                    "BETTER_AUTH_TRUSTED_ORIGINS: a wildcard must be the whole first part of the"
                    " host, as in https://*.example.org"
                )
        return cls(frozenset(exact), tuple(patterns), strict)

    def allow(self, *, origin: str | None, fetch_site: str | None, host: str | None) -> bool:
        """Return whether a request with these headers comes from a page that may send it.

        Args:
            origin: The header `Origin`: the page's origin, or `null`.
            fetch_site: The header `Sec-Fetch-Site`.
            host: The header `Host`.
        """
        if origin is not None and self._trusts(origin.lower()):
            return True
        if fetch_site is not None:
            return fetch_site in {"same-origin", "none"}
        if origin is None:
            return not self.strict
        return _is_of_host(origin.lower(), host)

    def _trusts(self, origin: str) -> bool:
        return origin in self.trusted or any(p.fullmatch(origin) for p in self.subdomains)


def _is_of_host(origin: str, host: str | None) -> bool:
    # The scheme is not compared, because a proxy in front may have removed TLS.
    scheme, _, place = origin.partition("://")
    if scheme not in _PORTS or not place or host is None:
        return False
    return host.lower() in {place, f"{place}:{_PORTS[scheme]}"}
