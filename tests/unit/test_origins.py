"""The rule for requests whose credential is a cookie, as a table."""

from typing import Final

import pytest

from todo_db import ConfigurationError
from todo_db.origins import Origins, can_change_something

RULE: Final = Origins.of(["http://localhost:3000", "https://*.example.org/", "*.example.net:8443"])
STRICT: Final = Origins.of(RULE.trusted, strict=True)
HOST: Final = "localhost:8000"

# Origin, Sec-Fetch-Site, Host, and whether the request passes.
ROWS: Final[dict[str, tuple[str | None, str | None, str | None, bool]]] = {
    "trusted": ("http://localhost:3000", None, HOST, True),
    "trusted, as the browser tells": ("http://localhost:3000", "same-site", HOST, True),
    "trusted, on another site": ("http://localhost:3000", "cross-site", HOST, True),
    "trusted, in capitals": ("HTTP://LOCALHOST:3000", None, HOST, True),
    "trusted subdomain": ("https://a.example.org", "cross-site", HOST, True),
    "trusted subdomain of a subdomain": ("https://b.a.example.org", None, HOST, True),
    "trusted subdomain with a port": ("http://a.example.net:8443", None, HOST, True),
    "another port": ("http://localhost:3001", None, HOST, False),
    "another scheme": ("https://localhost:3000", None, HOST, False),
    "another port, as the browser tells": ("http://localhost:3001", "same-site", HOST, False),
    "another site": ("https://evil.example.com", "cross-site", HOST, False),
    "the domain itself": ("https://example.org", None, HOST, False),
    "a subdomain without TLS": ("http://a.example.org", None, HOST, False),
    "a domain that ends alike": ("https://evilexample.org", None, HOST, False),
    "a domain that begins alike": ("https://a.example.org.evil.com", None, HOST, False),
    "a path before the domain": ("https://evil.com/.example.org", None, HOST, False),
    "a user before the domain": ("https://evil.com@a.example.org", None, HOST, False),
    "a subdomain without its port": ("https://a.example.net", None, HOST, False),
    "same origin": ("http://localhost:8000", "same-origin", HOST, True),
    "a form under no-referrer": ("null", "same-origin", HOST, True),
    "typed by the user": (None, "none", HOST, True),
    "no Origin, another site": (None, "cross-site", HOST, False),
    "no Origin, the same site": (None, "same-site", HOST, False),
    "no Origin, the same origin": (None, "same-origin", HOST, True),
    "junk in Sec-Fetch-Site": (None, "junk", HOST, False),
    "empty Sec-Fetch-Site": (None, "", HOST, False),
    "Sec-Fetch-Site in capitals": (None, "Same-Origin", HOST, False),
    "the host, as the browser denies": ("http://localhost:8000", "cross-site", HOST, False),
    "the host, and no more": ("http://localhost:8000", None, HOST, True),
    "the host behind a proxy with TLS": ("https://localhost:8000", None, HOST, True),
    "the host with the usual port": ("https://todo.org", None, "todo.org:443", True),
    "the host without the usual port": ("https://todo.org", None, "Todo.org", True),
    "the host with another port": ("https://todo.org", None, "todo.org:80", False),
    "null": ("null", None, HOST, False),
    "null to a host of that name": ("null", None, "null", False),
    "empty": ("", None, "", False),
    "no host": ("http://localhost:8000", None, None, False),
    "a scheme alone": ("http://", None, "", False),
    "a file": ("file://", None, "", False),
    "an extension": ("chrome-extension://localhost:8000", None, HOST, False),
    "two origins": ("http://localhost:3000, http://evil.com", None, HOST, False),
}


class TestAllow:
    @pytest.mark.parametrize("name", ROWS)
    def test_follows_the_table(self, name: str) -> None:
        origin, fetch_site, host, passes = ROWS[name]
        assert RULE.allow(origin=origin, fetch_site=fetch_site, host=host) is passes

    def test_a_client_that_is_no_browser_passes_unless_it_is_strict(self) -> None:
        assert RULE.allow(origin=None, fetch_site=None, host=HOST)
        assert not STRICT.allow(origin=None, fetch_site=None, host=HOST)
        assert STRICT.allow(origin="http://localhost:3000", fetch_site=None, host=HOST)
        assert STRICT.allow(origin="http://localhost:8000", fetch_site=None, host=HOST)
        assert STRICT.allow(origin=None, fetch_site="same-origin", host=HOST)

    @pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "get", "", "X", None])
    def test_is_for_what_can_change_something(self, method: str | None) -> None:
        assert can_change_something(method)

    @pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
    def test_is_not_for_reading(self, method: str) -> None:
        assert not can_change_something(method)


class TestList:
    @pytest.mark.parametrize(
        "item",
        ["*", "https://*", "https://a.*.org", "https://a*.org", "http://x:*", "http://?.org"],
    )
    def test_refuses_other_wildcards(self, item: str) -> None:
        with pytest.raises(ConfigurationError, match="BETTER_AUTH_TRUSTED_ORIGINS"):
            Origins.of([item])

    def test_may_name_an_app(self) -> None:
        rule = Origins.of(["todo-app://"])
        assert not rule.allow(origin="https://evil.com", fetch_site=None, host=HOST)
